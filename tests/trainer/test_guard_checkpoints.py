"""Checkpoints, resume, and what the control flags do: stop and monitor mode, bad arguments."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.markov import Chains, Fault, Recorder, fill, held_out_loss, logged_losses, same, scale, trainer_for
from transformers import TrainerCallback

from weightproof import GuardCallback
from weightproof.certificate import Certificate
from weightproof.edits import RTN
from weightproof.errors import BaselineError, InputError, PolicyError, RestoreError
from weightproof.session import STATE_FILE
from weightproof.types import Action

SAVE = {"save_strategy": "steps", "save_steps": 10}


def rejected(guard):
    return [step.step for step in guard.history if step.decision.action is not Action.KEEP]


def saved_weights(folder):
    return load_file(folder / "model.safetensors")


def test_certificate_log_and_cost_are_written(tmp_path, capsys):
    guard = GuardCallback(every=10)
    trainer = trainer_for(tmp_path, [guard], steps=20)
    trainer.train()
    (cost,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("weightproof:")]
    assert cost.startswith("weightproof: 2 checks over 20 steps, 0 rejected; ")
    certificate = Certificate.load(tmp_path / "weightproof" / "certificate.json")
    assert [step["step"] for step in certificate.predicate["steps"]] == [10, 20]
    assert certificate.model_digest == guard.session.model_digest
    assert certificate.predicate["cost"]["checks"] == 2
    events = [json.loads(line) for line in (tmp_path / "weightproof" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["type"] == "event"] == [10, 20]


def test_resume_continues_from_the_sidecar_files(tmp_path):
    trainer = trainer_for(tmp_path, [GuardCallback(every=10)], steps=20, **SAVE)
    trainer.train()
    assert (tmp_path / "checkpoint-20" / STATE_FILE).is_file()
    guard = GuardCallback(every=10)
    trainer = trainer_for(tmp_path, [guard], steps=40, **SAVE)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert [step.step for step in guard.history] == [30, 40]
    steps = [step["step"] for step in guard.session.certificate().predicate["steps"]]
    assert steps == [10, 20, 30, 40], "the evidence of the first run is carried on"
    assert rejected(guard) == []


def test_guarded_run_resumed_equals_the_uninterrupted_one(tmp_path):
    whole, resumed = Recorder(30), Recorder(30)
    trainer_for(tmp_path / "whole", [GuardCallback(every=10), whole], steps=30, **SAVE).train()
    trainer_for(tmp_path / "parts", [GuardCallback(every=10)], steps=20, **SAVE).train()
    trainer = trainer_for(tmp_path / "parts", [GuardCallback(every=10), resumed], steps=30, **SAVE)
    trainer.train(resume_from_checkpoint=True)
    assert same(whole.seen[30], resumed.seen[30])


def test_resume_from_an_unguarded_checkpoint_warns_and_starts_anew(tmp_path, caplog):
    trainer_for(tmp_path, [], steps=20, **SAVE).train()
    guard = GuardCallback(every=10)
    trainer = trainer_for(tmp_path, [guard], steps=40, **SAVE)
    with caplog.at_level(logging.WARNING, "weightproof"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert sum("new baseline" in record.message for record in caplog.records) == 1
    assert [step.step for step in guard.history] == [30, 40]


def test_resume_refuses_sidecar_files_of_other_weights(tmp_path):
    trainer_for(tmp_path, [GuardCallback(every=10)], steps=20, **SAVE).train()
    sidecar = tmp_path / "checkpoint-20"
    for name in (STATE_FILE, "guard_baseline.safetensors"):
        (sidecar / name).write_bytes((tmp_path / "checkpoint-10" / name).read_bytes())
    trainer = trainer_for(tmp_path, [GuardCallback(every=10)], steps=30, **SAVE)
    with pytest.raises(BaselineError, match="another model"):
        trainer.train(resume_from_checkpoint=str(sidecar))


def test_save_at_a_violating_step_saves_good_weights(tmp_path):
    guard, recorder = GuardCallback(every=100), Recorder(40)
    trainer = trainer_for(tmp_path, [Fault(50, fill(math.nan)), guard, recorder], steps=60, **SAVE)
    trainer.train()
    assert rejected(guard) == [50]
    found = saved_weights(tmp_path / "checkpoint-50")
    assert all(torch.equal(recorder.seen[40][name], tensor) for name, tensor in found.items())
    assert (tmp_path / "checkpoint-50" / STATE_FILE).is_file()


def test_epoch_strategies_are_checked_before_they_save(tmp_path):
    guard = GuardCallback(every=1000)
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "steps": -1, "num_train_epochs": 2}
    trainer = trainer_for(tmp_path, [Fault(64, fill(math.nan)), guard], **settings)
    trainer.train()
    assert [step.step for step in guard.history] == [32, 64]
    assert rejected(guard) == [64]
    assert all(tensor.isfinite().all() for tensor in saved_weights(tmp_path / "checkpoint-64").values())


def test_best_model_loaded_at_the_end_is_judged(tmp_path):
    guard = GuardCallback(every=10)
    settings = {"eval_strategy": "steps", "eval_steps": 10, "load_best_model_at_end": True}
    trainer_for(tmp_path, [guard], steps=20, **SAVE, **settings).train()
    assert [step.step for step in guard.history] == [10, 20, 20]
    assert rejected(guard) == []


class SaveAfterwards(TrainerCallback):
    """Damages the weights and asks for a save after the guard has run."""

    def __init__(self, step, damage):
        self.fault = Fault(step, damage)

    def on_step_end(self, args, state, control, **kwargs):
        self.fault.on_step_end(args, state, control, **kwargs)
        control.should_save = state.global_step == self.fault.step


@pytest.mark.parametrize("damaged", [False, True])
def test_save_that_was_not_judged_before_is_judged_after(tmp_path, caplog, damaged):
    guard = GuardCallback(every=100)
    later = SaveAfterwards(45, fill(math.nan) if damaged else scale(1.0))
    with caplog.at_level(logging.ERROR, "weightproof"):
        trainer_for(tmp_path, [guard, later], steps=60).train()
    assert (tmp_path / "checkpoint-45" / STATE_FILE).is_file() is not damaged
    assert ("holds rejected weights" in caplog.text) is damaged


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_stop_mode_ends_training_on_good_weights_and_saves_nothing(tmp_path, strategy):
    guard, recorder = GuardCallback(every=10, on_violation="stop"), Recorder(40)
    settings = {**SAVE, "save_strategy": strategy}
    trainer = trainer_for(tmp_path, [Fault(48, fill(math.nan)), guard, recorder], steps=80, **settings)
    trainer.train()
    assert trainer.state.global_step == 50
    assert not (tmp_path / "checkpoint-50").exists()
    assert same(recorder.seen[40], trainer.model.state_dict())
    assert held_out_loss(trainer.model) < 2.0


def test_stopped_run_resumes_from_its_last_good_checkpoint(tmp_path):
    plain, resumed = Recorder(80), Recorder(80)
    trainer_for(tmp_path / "plain", [plain], steps=80).train()
    guard = GuardCallback(every=10, on_violation="stop")
    fault = Fault(48, fill(math.nan))
    trainer = trainer_for(tmp_path / "guarded", [fault, guard, resumed], steps=80, **SAVE)
    trainer.train()
    fault.step = -1
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 80
    assert same(plain.seen[80], resumed.seen[80]), "as if the fault had never happened"


def test_monitor_mode_reports_and_restores_nothing(tmp_path):
    guard, recorder = GuardCallback(every=10, on_violation="monitor"), Recorder(50)
    trainer = trainer_for(tmp_path, [Fault(48, fill(math.nan)), guard, recorder], steps=60, **SAVE)
    trainer.train()
    assert rejected(guard)[0] == 50
    assert {step.applied for step in guard.history} == {"kept"}
    assert all(tensor.isnan().any() for name, tensor in recorder.seen[50].items() if "weight" in name)
    assert trainer.state.global_step == 60


def test_restore_that_fails_ends_training_with_its_error(tmp_path, monkeypatch, caplog):
    def fail(self, snapshot, *args):
        raise RestoreError("layer 0 could not be restored")

    guard = GuardCallback(every=10)
    trainer = trainer_for(tmp_path, [Fault(48, fill(math.nan)), guard], steps=80, **SAVE)
    monkeypatch.setattr("weightproof.transactions.guarded_model.GuardedModel.restore", fail)
    with caplog.at_level(logging.ERROR, "weightproof"), pytest.raises(RestoreError):
        trainer.train()
    assert trainer.control.should_training_stop
    assert not trainer.control.should_save
    assert not (tmp_path / "checkpoint-50").exists()
    assert guard.history[-1].decision.action is Action.HALT
    assert not trainer.model._forward_hooks
    assert "cannot vouch" in caplog.text


def test_scheduled_log_and_evaluation_happen_at_a_violating_step(tmp_path):
    guard = GuardCallback(every=10)
    settings = {"eval_strategy": "steps", "eval_steps": 50}
    trainer = trainer_for(tmp_path, [Fault(48, fill(math.nan)), guard], steps=60, **settings)
    trainer.train()
    assert rejected(guard) == [50]
    assert 50 in logged_losses(trainer)
    (evaluated,) = [row for row in trainer.state.log_history if row["step"] == 50 and "eval_loss" in row]
    assert evaluated["eval_loss"] < 2.0, "the restored weights are evaluated"


@pytest.mark.parametrize("kept", ["retain", "random"])
def test_retain_data_reaches_the_session(tmp_path, kept):
    retain = [Chains(4, seed=5)[index] for index in range(4)] if kept == "retain" else None
    guard = GuardCallback(every=10, retain=retain)
    trainer_for(tmp_path, [guard], steps=10).train()
    names = [windows.name for windows in guard.session.windows]
    assert names == (["random", "calibration", "retain"] if retain else ["random"])


def test_edit_that_is_never_reached_warns_at_the_start(tmp_path, caplog):
    guard = GuardCallback(every=10, edits={5: RTN(8), 30: RTN(8)})
    with caplog.at_level(logging.WARNING, "weightproof"):
        trainer_for(tmp_path, [guard], steps=10).train()
    assert [record.message for record in caplog.records if "never" in record.message] == [
        "edits at step 30 will never be reached: training ends at 10"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be a whole number of steps, 1 or more, not 0"),
        ({"every": 2.5}, "every must be"),
        ({"every": True}, "every must be"),
        ({"on_violation": "explode"}, "on_violation must be one of rollback, monitor, stop"),
        ({"edits": [RTN(8)]}, "edits must map"),
        ({"edits": {0: RTN(8)}}, "a step in edits must be"),
        ({"edits": {"5": RTN(8)}}, "a step in edits must be"),
        ({"edits": {5: "int8"}}, "has no plan"),
        ({"policy": "lenient"}, "lenient"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, message):
    with pytest.raises((InputError, PolicyError), match=message):
        GuardCallback(**arguments)


def test_an_edit_that_selects_nothing_is_refused_when_training_begins(tmp_path):
    trainer = trainer_for(tmp_path, [], steps=10)
    guard = GuardCallback(every=10, edits={5: RTN(8, include=("no_such_*",))})
    with pytest.raises(InputError, match=r"edits\[5\] \(rtn-int8-channel\) selects no weight matrix"):
        guard.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert trainer.control.should_training_stop
    assert not trainer.model._forward_hooks


def test_broken_model_is_refused_when_training_begins(tmp_path):
    trainer = trainer_for(tmp_path, [GuardCallback(every=10)], steps=10)
    with torch.no_grad():
        fill(math.nan)(trainer.model)
    with pytest.raises(BaselineError, match="NaN or inf"):
        trainer.train()
