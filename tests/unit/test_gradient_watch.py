"""Steps that can only do harm are left out: what clipping hides, and a learning rate that leaps."""

import math

import pytest
import torch
from torch import nn

from weightproof.tensor_store import same_bits
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
