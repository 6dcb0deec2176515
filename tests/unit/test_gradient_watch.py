"""Steps that can only do harm are left out: what clipping hides, and a learning rate that leaps."""

import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from weightproof.snapshots.tensor_store import same_bits
from weightproof_callbacks.gradient_watch import GROSS_RATE_RATIO, GradientWatch


class Clipper:
    """What a watch needs of an Accelerator."""

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)


class Steps:
    def __init__(self, *, accelerator=None, acts=True, lr=0.1):
        self.weight = nn.Parameter(torch.ones(4))
        self.optimizer = torch.optim.SGD([self.weight], lr=lr)
        self.accelerator = accelerator
        self.watch = GradientWatch(self.optimizer, accelerator=accelerator, acts=acts)

    def step(self, gradient, *, clip=1.0, lr=None, **clipping):
        """Take a step; whether the weights moved."""
        before = self.weight.detach().clone()
        self.weight.grad = gradient.clone()
        if self.accelerator is not None and clip is not None:
            self.accelerator.clip_grad_norm_([self.weight], clip, **clipping)
        if lr is not None:
            self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        return not same_bits(before, self.weight.detach())


SOUND = torch.full((4,), 3.0)


def test_norms_are_those_before_clipping():
    steps = Steps(accelerator=Clipper())
    assert steps.step(SOUND)
    assert steps.watch.drain() == [(pytest.approx(6.0), False)]


def test_an_infinite_norm_that_clipping_made_zero_is_seen():
    steps = Steps(accelerator=Clipper())
    broken = SOUND.clone()
    broken[0] = 1e35  # its square is infinite: clipping divides every gradient by infinity
    assert not steps.step(broken)
    assert steps.watch.drain() == [(math.inf, True)]


def test_a_gradient_that_breaks_after_clipping_is_seen():
    steps = Steps(accelerator=Clipper())
    steps.accelerator.clip_grad_norm_([steps.weight], 1.0)
    assert not steps.step(torch.full((4,), torch.nan), clip=None)
    assert steps.watch.drain() == [(math.inf, True)]


def test_a_norm_of_another_order_is_not_taken_for_it():
    steps = Steps(accelerator=Clipper())
    steps.step(SOUND, norm_type=math.inf)
    assert steps.watch.drain() == [(pytest.approx(2.0), False)]  # each is 1 after clipping


def test_a_clipping_counts_for_one_step_only():
    steps = Steps(accelerator=Clipper())
    steps.step(SOUND)
    steps.step(torch.full((4,), 0.5), clip=None)
    assert [norm for norm, _ in steps.watch.drain()] == [pytest.approx(6.0), pytest.approx(1.0)]


def test_the_accelerator_is_as_it_was_afterwards():
    accelerator = Clipper()
    steps = Steps(accelerator=accelerator)
    assert "clip_grad_norm_" in vars(accelerator)
    steps.watch.remove()
    assert vars(accelerator) == {}


def test_two_watches_do_not_take_each_other_for_the_accelerator():
    accelerator = Clipper()
    first, second = Steps(accelerator=accelerator), Steps(accelerator=accelerator)
    second.watch.remove()
    assert "clip_grad_norm_" in vars(accelerator)
    first.watch.remove()
    assert vars(accelerator) == {}


def test_a_learning_rate_that_leaps_is_not_stepped_with():
    steps = Steps(lr=0.01)
    assert steps.step(SOUND)
    assert not steps.step(SOUND, lr=1.0)
    assert steps.step(SOUND, lr=0.01)
    assert [left_out for _, left_out in steps.watch.drain()] == [False, True, False]


@pytest.mark.parametrize("rate", [-0.01, float("nan"), float("inf")])
def test_a_learning_rate_that_nobody_can_mean_is_not_stepped_with(rate):
    steps = Steps(lr=0.01)
    assert steps.step(SOUND)
    assert not steps.step(SOUND, lr=rate)
    assert steps.step(SOUND, lr=0.01)


def test_a_schedule_that_crosses_zero_by_a_little_is_stepped_with():
    steps = Steps(lr=0.01)
    assert steps.step(SOUND)
    assert steps.step(SOUND, lr=-0.0004)


def test_warm_up_from_zero_and_restarts_are_no_leap():
    steps = Steps(lr=0.0)
    rates = [0.0, *(0.001 * 1.9**i for i in range(12)), 1e-9, 0.001 * 1.9**11]
    assert all(steps.step(SOUND, lr=rate) or rate == 0.0 or rate < 1e-6 for rate in rates)
    assert not any(left_out for _, left_out in steps.watch.drain())


def test_up_to_the_limit_is_no_leap_and_a_new_group_has_no_past():
    steps = Steps(lr=0.01)
    assert steps.step(SOUND)
    assert steps.step(SOUND, lr=0.01 * GROSS_RATE_RATIO)
    steps.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 100.0})
    assert steps.step(SOUND)


def test_a_watch_that_does_not_act_only_notes():
    steps = Steps(accelerator=Clipper(), acts=False)
    assert steps.step(SOUND)
    assert steps.step(SOUND, lr=1e6)
    assert [left_out for _, left_out in steps.watch.drain()] == [False, False]


# ---- rates of common schedules ------------------------------------------------------------------------------------

STEPS = 60
PEAK = 1e-2
SCHEDULES = {
    "warm-up from 0, cosine": lambda o: get_cosine_schedule_with_warmup(o, 10, STEPS),
    "warm-up of one step from 0": lambda o: get_constant_schedule_with_warmup(o, 1),
    "linear warm-up from 1e-8": lambda o: lr_scheduler.LinearLR(o, start_factor=1e-8, total_iters=10),
    "constant 1e-3 of it, then all": lambda o: lr_scheduler.ConstantLR(o, factor=1e-3, total_iters=5),
    "exponential warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, 10.0 ** (step / 2 - 8))),
    "cosine, restarts from 0": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=7, T_mult=2, eta_min=0.0),
    "restarts that halve": lambda o: get_cosine_with_hard_restarts_schedule_with_warmup(o, 3, STEPS, 4),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=PEAK, total_steps=STEPS),
    "one cycle from a hundredth in one step": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=PEAK, total_steps=STEPS, pct_start=0.02, div_factor=1000.0, cycle_momentum=False
    ),
    "cyclic": lambda o: lr_scheduler.CyclicLR(
        o, base_lr=PEAK / 1000, max_lr=PEAK, step_size_up=1, cycle_momentum=False
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.1, patience=1),
    "warm-up, stable, decay": lambda o: get_wsd_schedule(o, 10, 20, num_stable_steps=20),
    "inverse square root": lambda o: get_inverse_sqrt_schedule(o, 10),
    "polynomial": lambda o: get_polynomial_decay_schedule_with_warmup(o, 10, STEPS, lr_end=1e-9),
    "warm-up, then cosine (sequential)": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, start_factor=1e-4, total_iters=5), lr_scheduler.CosineAnnealingLR(o, T_max=20)],
        milestones=[5],
    ),
    "step up again (multiplicative)": lambda o: lr_scheduler.MultiplicativeLR(
        o, lambda step: 1e-4 if step == 10 else 1e4 if step == 20 else 1.0
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_common_schedule_is_taken_for_a_leap(name):
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=PEAK)
    schedule = SCHEDULES[name](optimizer)
    watch = GradientWatch(optimizer)
    rates = []
    for _ in range(STEPS - 1):
        weight.grad = torch.ones(4)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(*((1.0,) if name == "plateau" else ()))
    assert not any(left_out for _, left_out in watch.drain())
    assert max(rates) <= PEAK * 1.001
    watch.remove()


def test_a_rate_that_leaps_beyond_a_schedule_of_tiny_steps_is_seen():
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=PEAK)
    schedule = lr_scheduler.LinearLR(optimizer, start_factor=1e-8, total_iters=10)
    watch = GradientWatch(optimizer)
    for step in range(20):
        weight.grad = torch.ones(4)
        if step == 15:
            optimizer.param_groups[0]["lr"] *= 100.0
        optimizer.step()
        schedule.step()
        optimizer.param_groups[0]["lr"] = schedule.get_last_lr()[0] if step < 15 else PEAK
    assert [place for place, (_, left_out) in enumerate(watch.drain()) if left_out] == [15]
