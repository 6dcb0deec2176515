"""Moments that no gradients could have made are named; those of training never are, whatever the optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weightproof.testing.tampering import flip_bit, pick_element
from weightproof_callbacks.gradient_watch import GradientWatch
from weightproof_callbacks.moment_watch import MomentWatch

OPTIMIZERS = {
    "Adam": lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=0.1),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
    "AdamW amsgrad": lambda ps: torch.optim.AdamW(ps, lr=1e-2, amsgrad=True),
    "AdamW fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "AdamW maximize": lambda ps: torch.optim.AdamW(ps, lr=1e-2, maximize=True),
    "Adam beta 0": lambda ps: torch.optim.Adam(ps, lr=1e-2, betas=(0.0, 0.5)),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=1e-2, weight_decay=0.1),
    "RAdam": lambda ps: torch.optim.RAdam(ps, lr=1e-2, weight_decay=0.1),
    "Adamax": lambda ps: torch.optim.Adamax(ps, lr=1e-2, weight_decay=0.1),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3, centered=True, momentum=0.9, weight_decay=0.1),
    "Adadelta": lambda ps: torch.optim.Adadelta(ps, lr=1.0, weight_decay=0.1),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=1e-4, momentum=0.99, weight_decay=0.1),
    "SGD nesterov": lambda ps: torch.optim.SGD(ps, lr=1e-3, momentum=0.9, nesterov=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
}


class Run:
    """A small model whose gradients vary by factors of a thousand."""

    def __init__(self, optimizer="AdamW", dtype=torch.float32):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.watch = GradientWatch(self.optimizer, model=self.model)
        self.generator = torch.Generator().manual_seed(1)

    def train(self, steps, scale=1.0):
        for _ in range(steps):
            size = scale * 10.0 ** float(torch.rand((), generator=self.generator) * 3 - 2)
            data = torch.randn(4, 8, generator=self.generator).to(next(self.model.parameters()).dtype)
            (size * self.model(data).square().mean()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self, key):
        return self.optimizer.state[self.model[0].weight][key]

    def flip(self, key, bit=1):
        return flip_bit(self.state(key), pick_element(self.state(key), 0), bit)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_makes_no_impossible_moment(optimizer, dtype):
    run = Run(optimizer, dtype)
    for _ in range(10):
        run.train(10)
        assert run.watch.impossible_moments() == ()


@pytest.mark.parametrize(
    ("optimizer", "key"),
    [
        ("AdamW", "exp_avg_sq"),
        ("AdamW", "exp_avg"),
        ("AdamW fused", "exp_avg_sq"),
        ("AdamW amsgrad", "max_exp_avg_sq"),
        ("RMSprop", "square_avg"),
        ("SGD", "momentum_buffer"),
    ],
)
def test_a_flipped_top_bit_is_named_also_steps_later(optimizer, key):
    run = Run(optimizer)
    run.train(20)
    before, after = run.flip(key)
    assert not abs(after) <= 1e10 * abs(before)  # between 1 and 2 it becomes NaN or infinite
    run.train(2)
    assert any(said.startswith(f"{key} of 0.weight holds ") for said in run.watch.impossible_moments())


def test_a_second_moment_below_zero_is_impossible_however_small():
    run = Run()
    run.train(5)
    run.flip("exp_avg_sq", bit=0)
    assert len(run.watch.impossible_moments()) == 1


def test_nan_is_impossible():
    run = Run()
    run.train(5)
    run.state("exp_avg")[0, 0] = torch.nan
    assert run.watch.impossible_moments() == ("exp_avg of 0.weight holds nan",)


def test_what_was_there_before_is_taken_as_it_is():
    old = Run()
    old.train(20, scale=1e4)
    resumed = Run()
    resumed.optimizer.load_state_dict(old.optimizer.state_dict())
    resumed.train(5, scale=1e-3)
    assert resumed.watch.impossible_moments() == (), "the hook of load_state_dict has seen it"
    later = MomentWatch(old.optimizer, old.model)
    later.saw(1e-6)
    assert later.impossible() == ()


def test_steps_that_nobody_saw_are_trusted_and_judged_from_there_on():
    run = Run()
    run.train(5)

    def closure():
        run.optimizer.zero_grad()
        loss = 1e6 * run.model(torch.ones(1, 8)).sum()
        loss.backward()
        return loss

    run.optimizer.step(closure)
    assert run.watch.impossible_moments() == ()
    run.train(3)
    assert run.watch.impossible_moments() == ()
    run.flip("exp_avg_sq", bit=0)
    assert len(run.watch.impossible_moments()) == 1


def test_packed_and_unknown_states_are_not_read():
    run = Run("Adagrad")
    run.train(3)
    run.state("sum")[0, 0] = 1e30
    assert run.watch.impossible_moments() == ()
    run = Run()
    run.train(3)
    state = run.optimizer.state[run.model[0].weight]
    state["exp_avg_sq"] = torch.full((8, 8), 255, dtype=torch.uint8)
    assert run.watch.impossible_moments() == ()


def test_nothing_is_left_behind():
    run = Run()
    run.watch.remove()
    assert not run.optimizer._optimizer_load_state_dict_post_hooks
    assert not run.optimizer._optimizer_step_pre_hooks
