"""Schedule and gradient scaler after a rollback: where the undisturbed run has them, wherever the state was kept.

Guards judge inside of `optimizer.step()`, before the scaler's update and the schedule's step; `check()`, and a
scaler that skips step after step, act between two steps.
"""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from tests.support.accelerate_loop import LR, fresh_accelerate
from tests.support.chains import Chains, tiny_llama
from tests.support.twins import differences, whole_state
from torch.utils.data import DataLoader, Subset

from weightproof import attach

EVERY, ROWS = 5, 16


class Loop:
    """A schedule that is stepped after every step or after every `period`, and a gradient scaler if asked for."""

    def __init__(self, *, without=(), scaler=True, period=1):
        fresh_accelerate()
        self.accelerator = Accelerator(cpu=True)
        if scaler:  # accelerate makes none on a CPU
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        model, rows = tiny_llama(), 64 * ROWS
        inner = torch.optim.AdamW(model.parameters(), lr=LR)
        schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 1.0 / (1.0 + 0.02 * step))
        data = Subset(Chains(rows, seed=1), [row for row in range(rows) if row // ROWS not in without])
        self.model, self.optimizer, data, self.schedule = self.accelerator.prepare(
            model, inner, DataLoader(data, batch_size=ROWS), schedule
        )
        assert (self.optimizer.scaler is not None) == scaler
        self.period, self.steps, self._batches = period, 0, iter(data)

    def run(self, until):
        while self.steps < until:
            self.accelerator.backward(self.model(**next(self._batches)).loss)
            self.optimizer.step()
            if (self.steps + 1) % self.period == 0:
                self.schedule.step()
            self.optimizer.zero_grad()
            self.steps += 1

    def state(self):
        found = whole_state(self.accelerator.unwrap_model(self.model), self.optimizer, self.schedule)
        scaler = self.optimizer.scaler
        del found["torch"]  # the first batch draws the seed of its loader
        return {**found, "scaler": None if scaler is None else scaler.state_dict()}

    def guarded(self, **options):
        return attach(self.accelerator, self.model, self.optimizer, every=EVERY, **options)

    def break_weights(self):
        with torch.no_grad():
            self.model.lm_head.weight.fill_(math.nan)


def back(guard):
    return [(step.step, step.record.params["back_to_step"]) for step in guard.history if step.applied == "restored"]


@pytest.mark.parametrize("scaler", [False, True])
def test_kept_inside_of_a_step_and_put_back_inside_of_one(scaler):
    loop = Loop(scaler=scaler)
    loop.optimizer.optimizer.register_step_post_hook(lambda *_: loop.break_weights() if loop.steps == 14 else None)
    with loop.guarded() as guard:
        loop.run(18)
        assert back(guard) == [(15, 10)]
        found = loop.state()
    twin = Loop(scaler=scaler, without=range(10, 15))
    twin.run(13)
    assert differences(found, twin.state()) == []


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("kept", [0, 7])
def test_kept_between_two_steps_and_put_back_inside_of_one(scaler, kept):
    loop = Loop(scaler=scaler)
    loop.run(kept)
    # Hooks are called in their order: before the guard judges the step that the optimizer has just written.
    loop.optimizer.optimizer.register_step_post_hook(
        lambda *_: loop.break_weights() if loop.steps + 1 == kept + EVERY else None
    )
    with loop.guarded() as guard:
        loop.run(kept + EVERY)
        assert back(guard) == [(EVERY, 0)]
        loop.run(kept + EVERY + 4)
        found = loop.state()
    twin = Loop(scaler=scaler, without=range(kept, kept + EVERY))
    twin.run(kept + 4)
    assert differences(found, twin.state()) == []


@pytest.mark.parametrize("scaler", [False, True])
def test_kept_inside_of_a_step_and_put_back_between_two(scaler):
    loop = Loop(scaler=scaler)
    with loop.guarded() as guard:
        loop.run(12)
        loop.break_weights()
        assert guard.check().applied == "restored"
        assert back(guard) == [(12, 10)]
        loop.run(17)
        found = loop.state()
    twin = Loop(scaler=scaler, without=range(10, 12))
    twin.run(15)
    assert differences(found, twin.state()) == []


def test_a_scaler_that_skips_step_after_step_is_taken_back_before_a_forward_pass():
    loop, at = Loop(), []
    with loop.guarded() as guard:
        loop.run(12)
        loop.break_weights()
        loop.model.register_forward_pre_hook(lambda *_: at.append(loop.steps) if back(guard) and not at else None)
        loop.run(30)
        (first,) = at
        assert back(guard) == [(12, 10)], "the steps that were skipped are not counted"
        found = loop.state()
    twin = Loop(without=range(10, first))
    twin.run(30 - (first - 10))
    assert differences(found, twin.state()) == []


@pytest.mark.parametrize("scaler", [False, True])
def test_a_schedule_that_steps_now_and_then_is_not_stepped_by_a_rollback(scaler):
    loop = Loop(scaler=scaler, period=8)
    with loop.guarded() as guard:
        loop.run(12)
        held = loop.schedule.scheduler.last_epoch
        loop.break_weights()
        guard.check()
        assert back(guard) == [(12, 10)]
        assert loop.schedule.scheduler.last_epoch == held == 1
        loop.run(16)
        assert loop.schedule.scheduler.last_epoch == 2
