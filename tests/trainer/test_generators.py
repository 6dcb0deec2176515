"""A Trainer that resumes without its random generators is told so, and has them again before its next step."""

from __future__ import annotations

import logging

import pytest
import torch
from tests.support.twins import differences
from tests.trainer.test_rolling import Replayable, Seen, run

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
