"""A Trainer that resumes without its random generators is told so, and has them again before its next step."""

from __future__ import annotations

import logging

import pytest
import torch
from tests.support.twins import FAULTS, differences
from tests.trainer.test_rolling import Fault, Replayable, Seen, run

from weightproof import GuardCallback
from weightproof_callbacks.generator_record import GENERATORS_FILE

SAVE = {"save_strategy": "steps", "save_steps": 8}


def ends(folder, kind, caplog, *, lose, rows, resume=True):
    """The state after 16 steps of a run that was saved after 8, and what was said when it resumed."""
    settings = (
        {"kind": kind, "rows": rows, "steps": 16, **SAVE} if kind is not None else {"rows": rows, "steps": 16, **SAVE}
    )
    whole = Seen(16)
    run(folder / "whole", [GuardCallback(every=4), whole], **settings)
    checkpoint = folder / "whole" / "checkpoint-8"
    assert (checkpoint / GENERATORS_FILE).is_file()
    if lose:
        (checkpoint / "rng_state.pth").unlink()
    torch.manual_seed(99)
    seen = Seen(16)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "weightproof"):
        run(folder / "whole", [GuardCallback(every=4), seen], resume=str(checkpoint), **settings)
    return whole.states[16], seen.states[16], caplog.text


@pytest.mark.parametrize("rows", [512, 128])  # in the middle of a pass, and where one begins
@pytest.mark.parametrize("lose", [False, True])
def test_a_guarded_trainer_resumes_with_its_generators(tmp_path, caplog, rows, lose):
    whole, found, said = ends(tmp_path, Replayable, caplog, lose=lose, rows=rows)
    assert differences(found, whole) == []
    assert ("did not restore the random generators" in said) == lose


@pytest.mark.parametrize("lose", [False, True])
def test_a_plain_trainer_does_in_the_middle_of_a_pass(tmp_path, caplog, lose):
    whole, found, said = ends(tmp_path, None, caplog, lose=lose, rows=512)
    assert differences(found, whole) == []
    assert ("did not restore the random generators" in said) == lose


def test_a_plain_trainer_says_nothing_where_a_pass_begins_and_the_loader_has_drawn(tmp_path, caplog):
    whole, found, said = ends(tmp_path, None, caplog, lose=False, rows=128)
    assert differences(found, whole) == []
    assert "generators" not in said


@pytest.mark.parametrize("kind", [None, Replayable])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_rollback_to_where_a_run_was_resumed_has_the_generators_of_the_checkpoint(tmp_path, kind, on_disk):
    settings = {"rows": 512, **SAVE} | ({} if kind is None else {"kind": kind})
    run(tmp_path, [GuardCallback(every=4)], steps=8, lr_scheduler_type="constant", **settings)
    torch.manual_seed(99)
    seen, guard = Seen(16), GuardCallback(every=4, snapshot_dir=tmp_path / "states" if on_disk else None)
    callbacks = [Fault(FAULTS["weight-noise"], 9), guard, seen]
    run(tmp_path, callbacks, steps=16, resume=str(tmp_path / "checkpoint-8"), lr_scheduler_type="constant", **settings)
    assert [(step.step, step.record.params["back_to_step"]) for step in guard.history if step.applied != "kept"] == [
        (12, 8)
    ]
    twin = Seen(12)
    run(tmp_path / "twin", [twin], steps=12, without=range(8, 12), lr_scheduler_type="constant", **settings)
    assert differences(seen.states[16], twin.states[12]) == []
