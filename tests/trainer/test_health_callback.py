"""`HealthCallback`: reports along a run, a training that it does not disturb, and what it does when something fails."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from tests.support.chains import Chains
from tests.support.wandb_records import read_offline_run
from tests.trainer.markov import Fault, fill, logged_losses, same, scale, trainer_for, weights

from weightproof import HealthCallback
from weightproof.errors import InputError
from weightproof.trackers import JsonlTracker
from weightproof_callbacks.trainer import GuardCallback
from weightproof_callbacks.trainer_mixin import GuardedTrainer


def callback(**options):
    return HealthCallback(Chains(64, seed=2), **{"every": 10, "rows": 4, **options})


def run(folder, callbacks, *, steps=20, kind=None, **changes):
    trainer = trainer_for(folder, callbacks, steps=steps, **changes)
    if kind is not None:
        trainer = kind(
            model=trainer.model, args=trainer.args, train_dataset=trainer.train_dataset, callbacks=list(callbacks)
        )
    trainer.train()
    return trainer


def test_training_is_the_same_bit_for_bit_with_and_without(tmp_path):
    plain = run(tmp_path / "plain", [])
    watched = run(tmp_path / "watched", [callback(every=3, depth="skip")])
    assert same(weights(plain.model), weights(watched.model))
    assert logged_losses(plain) == logged_losses(watched)
    for (_, left), (_, right) in zip(plain.optimizer.state.items(), watched.optimizer.state.items(), strict=True):
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_reports_are_written_and_logged(tmp_path):
    health = callback()
    trainer = run(tmp_path, [health])
    assert [report.provenance.step for report in health.reports] == [0, 10, 20]
    lines = [json.loads(line) for line in (tmp_path / "weightproof" / "health.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 10, 20]
    assert {"residual_norms", "verdict", "provenance"} <= set(lines[0])
    rows = [row for row in trainer.state.log_history if "health/residual_growth" in row]
    assert [row["step"] for row in rows] == [0, 10, 20]
    assert rows[-1]["health/status"] <= 2
    assert health.reports[0].diagnostics["stability"].status == "skipped"  # before the first step
    assert health.seconds > 0
    assert logged_losses(trainer).keys() == {5, 10, 15, 20}


def test_a_bound_trainer_logs_and_loses_no_row_of_its_own(tmp_path):
    health = callback(every=5)
    trainer = run(tmp_path, [health], kind=GuardedTrainer)
    assert logged_losses(trainer).keys() == {5, 10, 15, 20}
    assert [row["step"] for row in trainer.state.log_history if "health/status" in row] == [0, 5, 10, 15, 20]


def test_trackers_are_given_the_numbers(tmp_path):
    tracker = JsonlTracker(tmp_path / "mine.jsonl")
    run(tmp_path, [callback(trackers=[tracker])])
    rows = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 10, 20]
    assert rows[0]["rows"]["health/gradient_floor"] > 0


def test_wandb_offline(wandb, tmp_path):
    run(tmp_path / "out", [callback()], report_to=["wandb"])
    wandb.finish()
    found = read_offline_run(tmp_path)
    rows = [row for row in found.history if "health/residual_growth" in row]
    assert [row["train/global_step"] for row in rows] == [0, 10, 20]


@pytest.mark.parametrize(
    ("damage", "flag"), [(scale(1e5, only="down_proj"), "residual_growth"), (fill(float("nan")), "residual_growth")]
)
def test_stop_ends_the_run_and_saves_nothing(tmp_path, caplog, damage, flag):
    health = callback(action="stop")
    with caplog.at_level(logging.ERROR, logger="weightproof.health"):
        trainer = run(tmp_path, [Fault(10, damage), health], save_strategy="steps", save_steps=10)
    assert trainer.state.global_step == 10
    assert flag in health.reports[-1].flags
    assert not list(tmp_path.glob("checkpoint-*"))
    assert "step 10, training health: residual_growth" in caplog.text


def test_warn_goes_on(tmp_path, caplog):
    health = callback()
    with caplog.at_level(logging.ERROR, logger="weightproof.health"):
        trainer = run(tmp_path, [Fault(10, scale(1e5, only="down_proj")), health])
    assert trainer.state.global_step == 20
    assert "training health" in caplog.text


def test_beside_a_guard(tmp_path):
    """The guard's verdicts are what they are without the callback."""
    alone, beside = GuardCallback(every=10), GuardCallback(every=10)
    run(tmp_path / "alone", [alone])
    run(tmp_path / "beside", [callback(), beside])
    digests = [[step.decision.evidence_digest for step in guard.history] for guard in (alone, beside)]
    assert digests[0] == digests[1]


def test_a_guard_goes_back_when_health_fails(tmp_path):
    """The guard would judge at step 30; health fails at step 15, and the guard acts there."""
    guard = GuardCallback(every=30)
    health = callback(every=5, action="rollback", guard=guard)
    trainer = run(tmp_path, [Fault(15, scale(3e4, only="1.mlp.down_proj")), health, guard], steps=20)
    [rejected] = [step for step in guard.history if step.applied == "restored"]
    assert rejected.step == 15
    assert rejected.decision.situation == "train_fail"
    verdict = {one.guard: one for one in rejected.decision.verdicts}["health"]
    assert verdict.outcome == "FAIL"
    assert "residual_growth" in verdict.reason
    assert not health.reports[-1].flags
    assert trainer.state.global_step == 20
    with pytest.raises(InputError, match="belong together"):
        callback(action="rollback")


def test_wrong_use_is_said_before_the_first_step(tmp_path):
    for options, words in (
        ({"every": 0}, "every must be"),
        ({"action": "explode"}, "action must be one of"),
    ):
        with pytest.raises(InputError, match=words):
            callback(**options)
    with pytest.raises(InputError, match="fewer than one batch"):
        run(tmp_path, [callback(rows=100)])
    with pytest.raises(InputError, match="no module 'nowhere'"):
        run(tmp_path, [callback(blocks="nowhere")])
