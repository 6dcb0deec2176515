"""A loop on Accelerate that resumes without its generators is told so, and has them again before its next step."""

from __future__ import annotations

import json
import logging
import random

import numpy as np
import pytest
import torch
from tests.attach.test_rolling import Loop

from weightproof.collective import Processes
from weightproof.errors import BaselineError
from weightproof.parallel.run_agreement import generator_digests
from weightproof_callbacks.generator_record import GENERATORS_FILE, GeneratorRecord

RNG_FILE = "random_states_0.pkl"


def forgetful():
    """Where a new process stands."""
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)


def resumed(folder, *, lose=False, **options):
    """A loop that is saved after 8 steps, resumed, and goes on to 12; its end, and what was put back."""
    loop = Loop()
    with loop.guarded(**options) as guard:
        loop.run(8)
        loop.accelerator.save_state(str(folder))
        if lose:
            (folder / RNG_FILE).unlink()
        forgetful()
        loop.accelerator.load_state(str(folder))
        found = guard.put_back
        loop.run(12)
        return loop.state(), found


def test_a_resume_that_restores_them_is_passed_over(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "weightproof"):
        state, found = resumed(tmp_path)
    undisturbed = Loop()
    undisturbed.run(12)
    assert found == ()
    assert "generators" not in caplog.text
    assert torch.equal(state["torch"], undisturbed.state()["torch"])


def test_one_that_forgets_them_is_told_and_put_right(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "weightproof"):
        state, found = resumed(tmp_path, lose=True)
    undisturbed = Loop()
    undisturbed.run(12)
    assert found == ("Python, numpy, torch CPU of rank 0",)
    assert "did not restore the random generators: Python, numpy, torch CPU of rank 0" in caplog.text
    for name, value in undisturbed.state()["weights"].items():
        assert torch.equal(state["weights"][name], value), name
    assert torch.equal(state["torch"], undisturbed.state()["torch"])


def test_monitor_only_tells(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "weightproof"):
        state, found = resumed(tmp_path, lose=True, on_violation="monitor")
    undisturbed = Loop()
    undisturbed.run(12)
    assert found == ()
    assert "they are left as they are" in caplog.text
    assert not torch.equal(state["torch"], undisturbed.state()["torch"])


def test_a_rollback_after_the_resume_has_the_right_generators(tmp_path):
    states = []
    for lose in (False, True):
        loop = Loop()
        with loop.guarded() as guard:
            loop.run(8)
            loop.accelerator.save_state(str(tmp_path))
            if lose:
                (tmp_path / RNG_FILE).unlink()
            forgetful()
            loop.accelerator.load_state(str(tmp_path))
            loop.run(9)
            with torch.no_grad():
                loop.accelerator.unwrap_model(loop.model).lm_head.weight.fill_(torch.nan)
            assert guard.check().applied == "restored"
            states.append(generator_digests())
    assert states[0] == states[1]


# ---- the record -----------------------------------------------------------------------------------------------------


def test_a_record_comes_back_from_its_file_and_puts_everything_back(tmp_path):
    held = generator_digests()
    GeneratorRecord.now(Processes.alone()).save(tmp_path)
    forgetful()
    random.gauss(0, 1)
    np.random.normal()  # noqa: NPY002
    record = GeneratorRecord.load(tmp_path)
    assert record.differing(0) == ("Python", "numpy", "torch CPU")
    assert record.settle(Processes.alone(), "here", acts=True) == ("Python, numpy, torch CPU of rank 0",)
    assert generator_digests() == held
    assert record.differing(0) == ()


def test_a_rank_that_was_not_there_is_told_apart_from_one_that_differs(tmp_path, caplog):
    GeneratorRecord([]).save(tmp_path)
    record = GeneratorRecord.load(tmp_path)
    with caplog.at_level(logging.WARNING, "weightproof"):
        assert record.settle(Processes.alone(), "here", acts=True) == ()
    assert "saved by 0 processes: ranks from 0 on begin with random generators of their own" in caplog.text


def test_generators_of_another_machine_are_no_fault():
    record = GeneratorRecord.now(Processes.alone())
    record._ranks[0]["digests"]["CUDA 0"] = "00"
    assert record.differing(0) == ()


def test_a_folder_without_a_record_gives_none_and_an_altered_one_is_refused(tmp_path):
    assert GeneratorRecord.load(tmp_path) is None
    path = tmp_path / GENERATORS_FILE
    GeneratorRecord.now(Processes.alone()).save(tmp_path)
    content = json.loads(path.read_text())
    content["ranks"][0]["digests"]["numpy"] = "0" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(BaselineError, match="was altered after it was written"):
        GeneratorRecord.load(tmp_path)
    path.write_text("{")
    with pytest.raises(BaselineError, match="no usable record of the random generators"):
        GeneratorRecord.load(tmp_path)
