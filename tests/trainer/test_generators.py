"""A Trainer that resumes without its random generators is told so, and has them again before its next step."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from tests.support.twins import FAULTS, differences
from tests.trainer.test_rolling import Fault, InOrder, Replayable, Seen, run

from weightproof import GuardCallback
from weightproof_callbacks.generator_record import GENERATORS_FILE

SETTINGS = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 8}
LONG, SHORT = 512, 128  # rows: after 8 steps a run is in the middle of a pass, or where one begins


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By rows: a run of 16 steps that nobody disturbed (its end), and its checkpoint after 8."""
    found = {}
    for rows in (LONG, SHORT):
        folder, seen = tmp_path_factory.mktemp(f"whole-{rows}"), Seen(16)
        run(folder, [GuardCallback(every=4), seen], steps=16, rows=rows, **SETTINGS)
        assert (folder / "checkpoint-8" / GENERATORS_FILE).is_file()
        found[rows] = seen.states[16], folder / "checkpoint-8"
    return found


def resumed(checkpoint, folder, callbacks, *, kind, rows, lose):
    """Go on to step 16 in a process that stands elsewhere."""
    copied = shutil.copytree(checkpoint, folder / "checkpoint-8")
    if lose:
        (copied / "rng_state.pth").unlink()
    torch.manual_seed(99)
    run(folder, callbacks, steps=16, kind=kind, rows=rows, resume=str(copied), **SETTINGS)


@pytest.mark.parametrize(
    ("kind", "rows", "lose"),
    [
        (Replayable, LONG, False),
        (Replayable, LONG, True),
        (Replayable, SHORT, True),
        (InOrder, LONG, True),
        (InOrder, SHORT, False),  # the loader has drawn since: nothing is compared, and nothing said
    ],
)
def test_a_trainer_resumes_with_its_generators(saved, tmp_path, caplog, kind, rows, lose):
    (whole, checkpoint), seen = saved[rows], Seen(16)
    with caplog.at_level(logging.WARNING, "weightproof"):
        resumed(checkpoint, tmp_path, [GuardCallback(every=4), seen], kind=kind, rows=rows, lose=lose)
    assert differences(seen.states[16], whole) == []
    assert ("did not restore the random generators" in caplog.text) == lose


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """A run that was never given the batches of its steps 9 to 12."""
    seen = Seen(12)
    run(tmp_path_factory.mktemp("twin"), [seen], steps=12, rows=LONG, without=range(8, 12), **SETTINGS)
    return seen.states[12]


@pytest.mark.parametrize(("kind", "on_disk"), [(InOrder, True), (Replayable, False)])
def test_a_rollback_to_where_a_run_was_resumed_has_the_generators_of_the_checkpoint(
    saved, twin, tmp_path, kind, on_disk
):
    guard, seen = GuardCallback(every=4, snapshot_dir=tmp_path / "states" if on_disk else None), Seen(16)
    callbacks = [Fault(FAULTS["weight-noise"], 9), guard, seen]
    resumed(saved[LONG][1], tmp_path, callbacks, kind=kind, rows=LONG, lose=False)
    rejected = [(step.step, step.record.params["back_to_step"]) for step in guard.history if step.applied != "kept"]
    assert rejected == [(12, 8)]
    assert differences(seen.states[16], twin) == []
