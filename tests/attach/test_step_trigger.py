"""When a step is over: torch optimizers say so themselves, a DeepSpeed engine is asked before each forward pass."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from weightproof.errors import InputError
from weightproof_callbacks.accelerator_trigger import StepTrigger


def stand_in_engine():
    """A module as DeepSpeed's engine looks to the trigger: it steps by itself and counts."""

    class DeepSpeedEngine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = torch.nn.Linear(2, 2)
            self.global_steps = 3

        def forward(self, inputs):
            return self.module(inputs)

    DeepSpeedEngine.__module__ = "deepspeed.runtime.engine"
    sys.modules.setdefault("deepspeed.runtime.engine", ModuleType("deepspeed.runtime.engine"))
    return DeepSpeedEngine()


@pytest.mark.parametrize("settings", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_all_parameters_are_written_when_the_torch_optimizer_says_so(settings):
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **settings)
    seen = []
    trigger = StepTrigger(model, optimizer, lambda: seen.append([p.detach().clone() for p in model.parameters()]))
    model(torch.ones(1, 4)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    ((weight, bias),) = seen
    assert torch.equal(weight, model.weight)
    assert torch.equal(bias, model.bias)
    assert not torch.equal(weight, before[0])
    trigger.remove()
    optimizer.step()
    assert len(seen) == 1


def test_what_the_act_raises_leaves_step_and_the_next_step_is_whole():
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    failing = [True]

    def act():
        if failing:
            raise ArithmeticError

    StepTrigger(model, optimizer, act)
    model(torch.ones(1, 4)).sum().backward()
    start = model.weight.detach().clone()
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert torch.equal(model.weight, start - 0.1 * model.weight.grad)
    failing.clear()
    optimizer.step()
    assert torch.allclose(model.weight, start - 0.2 * model.weight.grad)


def test_a_skipped_step_of_a_scaler_is_no_step():
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    seen = []
    StepTrigger(model, optimizer, lambda: seen.append(1))
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 4)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert len(seen) == 1


def test_the_dry_run_of_torchs_checkpoints_is_no_step_but_a_rate_of_zero_is_one():
    model, seen = torch.nn.Linear(4, 4), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    StepTrigger(model, optimizer, lambda: seen.append(1))
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.state, "torch has filled it by a step"
    assert seen == []
    optimizer.param_groups[0]["lr"] = 0.0  # as warm-up schedules begin
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert seen == [1]


def test_an_engine_is_asked_before_each_forward_pass_of_training_and_when_caught_up():
    engine, seen = stand_in_engine(), []
    trigger = StepTrigger(engine, object(), lambda: seen.append(engine.global_steps))
    inputs = torch.ones(1, 2)
    engine(inputs)
    assert seen == [], "steps before the guard was attached are none of its business"
    engine.global_steps += 1
    engine.eval()
    engine(inputs)
    assert seen == [], "an evaluation between two steps is not the moment"
    engine.train()
    engine(inputs)
    engine(inputs)
    assert seen == [4]
    engine.global_steps += 1
    trigger.catch_up()
    trigger.catch_up()
    assert seen == [4, 5]
    engine.global_steps = 40
    trigger.forget()
    engine(inputs)
    assert seen == [4, 5], "a loaded count is not a step"
    trigger.remove()
    engine.global_steps += 1
    engine(inputs)
    assert seen == [4, 5]


def test_without_an_optimizer_there_is_no_trigger():
    engine = stand_in_engine()
    StepTrigger(engine, None, lambda: pytest.fail("nobody asked")).catch_up()
    engine.global_steps += 1
    engine(torch.ones(1, 2))


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(InputError, match="must be a torch optimizer"):
        StepTrigger(torch.nn.Linear(2, 2), object(), lambda: None)
