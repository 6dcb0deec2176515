"""A guarded Trainer run: it is not disturbed, faults are rolled back, healthy training is left alone."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.trainer.markov import (
    Chains,
    Fault,
    Recorder,
    fill,
    held_out_loss,
    logged_losses,
    same,
    scale,
    tiny_llama,
    trainer_for,
    weights,
)
from transformers import TrainerCallback

from weightproof.edits import RTN
from weightproof.session import GuardSession
from weightproof.types import Action, Outcome
from weightproof_callbacks.trainer import GuardCallback


def actions(guard):
    return [(step.step, step.name, str(step.decision.action), step.applied) for step in guard.history]


def alarms(guard):
    return [step for step in guard.history if step.decision.action is not Action.KEEP or step.decision.warned]


def optimizer_state(trainer):
    state = trainer.optimizer.state_dict()["state"]
    return {f"{key}.{part}": torch.as_tensor(value) for key, parts in state.items() for part, value in parts.items()}


class RandomStates(TrainerCallback):
    """The states of every random number generator when the run ends. Put it after the guard."""

    def on_train_end(self, args, state, control, **kwargs):
        self.python, self.numpy, self.torch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - the global state is the point


def test_guard_without_violation_disturbs_nothing(tmp_path):
    retain = [Chains(8, seed=4)[index] for index in range(8)]
    runs = []
    for name, callbacks in {"plain": [], "guarded": [GuardCallback(every=5, retain=retain)]}.items():
        states = RandomStates()
        model = tiny_llama(dropout=0.1)
        settings = {"eval_strategy": "steps", "eval_steps": 10, "gradient_accumulation_steps": 2}
        trainer = trainer_for(tmp_path / name, [*callbacks, states], model=model, steps=30, **settings)
        trainer.train()
        runs.append((trainer, states))
    (plain, plain_states), (guarded, guarded_states) = runs

    def rows(trainer):
        timing = ("runtime", "per_second")
        return [{k: v for k, v in row.items() if not k.endswith(timing)} for row in trainer.state.log_history]

    assert rows(plain) == rows(guarded)
    assert same(weights(plain.model), weights(guarded.model))
    assert same(optimizer_state(plain), optimizer_state(guarded))
    assert plain_states.python == guarded_states.python
    assert all(np.array_equal(a, b) for a, b in zip(plain_states.numpy, guarded_states.numpy, strict=True))
    assert torch.equal(plain_states.torch, guarded_states.torch)
    assert plain.model.training == guarded.model.training
    assert not guarded.model._forward_hooks


EVERY, STEPS, FAULT = 20, 160, 116  # the loss has been level for more than 60 steps when the fault comes


@pytest.fixture(scope="module")
def clean_loss(tmp_path_factory):
    """Held-out loss of the run without fault, which must have no alarm."""
    guard = GuardCallback(every=EVERY)
    trainer = trainer_for(tmp_path_factory.mktemp("clean"), [guard], steps=STEPS)
    trainer.train()
    assert [step.step for step in guard.history] == list(range(EVERY, STEPS + 1, EVERY))
    assert alarms(guard) == []
    loss = held_out_loss(trainer.model)
    assert loss < 1.6, "the model has clearly learned"
    return loss


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(fill(math.nan), id="nan"),
        pytest.param(fill(0.0), id="zero"),
        pytest.param(scale(100.0), id="scaled"),
        pytest.param(scale(100.0, "lm_head"), id="one-matrix-scaled"),
        pytest.param(scale(math.nan, "model.norm"), id="nan-in-a-norm"),
    ],
)
def test_fault_is_rolled_back_bit_for_bit_and_training_goes_on(tmp_path, damage, clean_loss):
    guard, recorder = GuardCallback(every=EVERY), Recorder(100, 120)
    trainer = trainer_for(tmp_path, [Fault(FAULT, damage), guard, recorder], steps=STEPS)
    storage = [parameter.data_ptr() for parameter in trainer.model.parameters()]
    trainer.train()
    rejected = [step for step in guard.history if step.decision.action is Action.ROLLBACK]
    assert [(step.step, step.applied) for step in rejected] == [(120, "restored")], "at the next check, and only there"
    assert rejected[0].record.digest_before == guard.history[4].record.digest_after
    assert same(recorder.seen[100], recorder.seen[120])
    assert recorder.moments[100] == recorder.moments[120] == len(list(trainer.model.parameters()))
    assert "optimizer AdamW, the state of 21 parameters" in rejected[0].record.params["restored"]
    assert storage == [parameter.data_ptr() for parameter in trainer.model.parameters()]
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in trainer.model.parameters()}, "the optimizer updates the live weights"
    assert held_out_loss(trainer.model) < clean_loss + 0.05
    assert list(logged_losses(trainer)) == list(range(5, STEPS + 1, 5)), "no loss row is lost"


def test_nan_loss_is_seen_though_the_log_shows_zero(tmp_path):
    guard = GuardCallback(every=10)
    trainer = trainer_for(tmp_path, [Fault(35, fill(math.nan)), guard], steps=60)
    trainer.train()
    assert logged_losses(trainer)[40] == 0.0
    assert [entry[2] for entry in actions(guard)] == ["KEEP"] * 3 + ["ROLLBACK"] + ["KEEP"] * 2
    found = {(m.target, m.statistic): m for v in guard.history[3].verdicts for m in v.measurements}
    for what in (("raw losses", "num_nonfinite"), ("gradients", "num_steps_skipped")):
        assert (found[what].value, found[what].outcome) == (5, Outcome.FAIL)


def test_windows_carry_their_raw_losses_and_the_warm_up_they_began_in(tmp_path, monkeypatch):
    windows = []
    check = GuardSession.check_window

    def spy(self, **window):
        windows.append((window["step"], len(window["raw_losses"]), window["in_warmup"]))
        return check(self, **window)

    monkeypatch.setattr(GuardSession, "check_window", spy)
    settings = {"warmup_steps": 15, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 15}
    trainer_for(tmp_path, [GuardCallback(every=10)], steps=33, **settings).train()
    assert windows == [(10, 10, True), (15, 5, True), (20, 5, False), (30, 10, False), (33, 3, False)]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_healthy_training_from_random_init_has_no_alarm(tmp_path, seed):
    guard = GuardCallback(every=25)
    trainer = trainer_for(tmp_path, [guard], model=tiny_llama(seed=seed), steps=300, warmup_steps=30, seed=seed)
    trainer.train()
    assert alarms(guard) == []
    assert held_out_loss(trainer.model) < 1.7


@pytest.mark.parametrize("policy", ["conservative", "aggressive"])
def test_healthy_windows_are_kept_by_every_tier(tmp_path, policy):
    guard = GuardCallback(policy, every=10)
    trainer_for(tmp_path, [guard], steps=30).train()
    assert [entry[2:] for entry in actions(guard)] == [("KEEP", "kept")] * 3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_lora_from_zero_b_has_no_alarm(tmp_path, learned_model):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1)
    model = get_peft_model(learned_model, lora)
    guard = GuardCallback(every=5)
    trainer_for(tmp_path, [guard], model=model, steps=40).train()
    assert len(guard.history) == 8
    assert alarms(guard) == []


@pytest.fixture
def learned_model(tmp_path):
    trainer = trainer_for(tmp_path / "learned", [], steps=60)
    trainer.train()
    return trainer.model


def test_scheduled_edits_are_kept_or_rolled_back_and_training_goes_on(tmp_path):
    guard, recorder = GuardCallback(every=20, edits={65: RTN(8), 75: RTN(2)}), Recorder(74, 75)
    trainer = trainer_for(tmp_path, [guard, recorder], steps=90)
    trainer.train()
    assert [entry for entry in actions(guard) if entry[0] in (65, 75)] == [
        (65, "train", "KEEP", "kept"),
        (65, "rtn-int8-channel", "KEEP", "kept"),
        (75, "train", "KEEP", "kept"),
        (75, "rtn-int2-channel", "ROLLBACK", "restored"),
    ]
    assert recorder.moments[75] == recorder.moments[74], "the moments were gathered on good weights: they stay"
    assert held_out_loss(trainer.model) < 1.7
    assert list(logged_losses(trainer)) == list(range(5, 91, 5))


def test_same_callback_guards_a_second_training(tmp_path):
    guard = GuardCallback(every=10)
    trainer = trainer_for(tmp_path, [guard], steps=20)
    trainer.train()
    first = guard.session
    trainer.train()
    assert guard.session is not first
    assert [step.step for step in guard.history] == [10, 20]
    assert not trainer.model._forward_hooks
