"""Gradients, looked at just before the optimizer steps with them: a step that can only do harm is left out.

The hook is torch's own (`register_step_pre_hook`), so that it sees what the optimizer will see: gradients that are
averaged over processes, unscaled and clipped, whoever clipped them. Where the norm is not finite, or grossly
above what was usual (`weightproof.statistics.spikes`), the gradients are taken away: the optimizer then writes
nothing, neither weights nor moments nor step counts, and accelerate's wrapper says that the step was skipped, as it
does after an overflow, so that the learning-rate schedule waits as well.

A learning rate that leaps far beyond every one that was used so far, and beyond what its schedule is to reach (a
schedule that breaks), is treated alike.

Clipping hides two things from that place: a norm of 50 that became 1, and an infinite one, which made every
gradient zero. Where the Accelerator is known, the norm that its `clip_grad_norm_` found counts instead.

Not watched: steps under a gradient scaler, which leaves such steps out by itself; DeepSpeed, which steps by
itself; an optimizer that is given a closure, whose gradients do not exist yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightproof.parallel.placements import is_dtensor
from weightproof.statistics.spikes import HISTORY, Score, is_gross_norm, norm_score
from weightproof.statistics.window_reports import rate_peak
from weightproof.types import WindowReport
from weightproof_callbacks.accelerator_checks import torch_optimizer
from weightproof_callbacks.accelerator_trigger import only_fills_its_state
from weightproof_callbacks.moment_watch import MomentWatch
from weightproof_callbacks.sharded import zero_optimizer
from weightproof_callbacks.step_times import StepTimes

__all__ = ["GradientWatch", "gradient_norm"]


# A group's learning rate against the largest that it stepped with so far, or was made with. Warm-up may begin anywhere
# below that (1e-8 of it is common), restarts of a schedule go back to it.
GROSS_RATE_RATIO = 20.0
# Where torch's schedules note, in the group, the rate that they were given to work with.
_NOTED_RATES = ("initial_lr", "max_lr")


class GradientWatch:
    """Notes the gradient norm of every optimizer step, and leaves steps out.

    Args:
        optimizer: The optimizer, as `accelerator.prepare` returned it, or the torch optimizer inside.
        wrapper: accelerate's wrapper around it, if there is one.
        accelerator: The run's `Accelerator`, where it clips.
        acts: Whether steps are left out; else norms are only noted.
        model: The model, where the optimizer's moments are to be held against the gradients (`impossible_moments`).
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        wrapper: Any = None,
        accelerator: Any = None,
        acts: bool = True,
        model: torch.nn.Module | None = None,
    ) -> None:
        self._wrapper = wrapper
        self._clipped: Any = None  # norm that the last clipping found, before the step that follows it
        self._clipper: Any = None
        self._acts = acts
        self._accepted: list[float] = []
        self._window: list[tuple[float, bool]] = []  # norm, whether the step was left out
        self._rates: list[float] = []  # the largest learning rate of each group so far
        self._peak: tuple[float, float] | None = None  # of this window: the largest rate, and the largest before it
        self._update_size: float | None = None  # sum of the rates of this window's steps
        self._drained: tuple[tuple[float, float] | None, float | None] = (None, None)  # both of the window before
        self._times = StepTimes()
        self._handle: Any = None
        self._moments: MomentWatch | None = None
        scaler = getattr(wrapper, "scaler", None) or getattr(optimizer, "scaler", None)
        if optimizer is not None and zero_optimizer(optimizer) is None and scaler is None:
            self._handle = torch_optimizer(optimizer).register_step_pre_hook(self._before_step)
            self._watch_clipping(accelerator)
            self._moments = None if model is None else MomentWatch(optimizer, model)
            self._times.hang_in(model, torch_optimizer(optimizer))

    @property
    def watches(self) -> bool:
        """Whether gradients are looked at."""
        return self._handle is not None

    def remove(self) -> None:
        """Take the hook away."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._moments is not None:
            self._moments.remove()
        self._times.remove()
        if self._clipper is not None and vars(self._clipper).get("clip_grad_norm_") is self._clip:
            del self._clipper.clip_grad_norm_
        self._clipper = None

    def _watch_clipping(self, accelerator: Any) -> None:
        """Read the norm that clipping finds, unless somebody else stands in its place already."""
        if accelerator is None or "clip_grad_norm_" in vars(accelerator):
            return
        found = accelerator.clip_grad_norm_

        def clip(*args: Any, **kwargs: Any) -> Any:
            norm = found(*args, **kwargs)
            of_order_two = len(args) < 3 and kwargs.get("norm_type", 2) == 2
            self._clipped = norm if of_order_two else None
            return norm

        self._clipper, self._clip = accelerator, clip
        accelerator.clip_grad_norm_ = clip

    def _norm(self, present: float) -> float:
        """Before clipping where that is known; the larger one, as a gradient may have been changed since."""
        clipped, self._clipped = self._clipped, None
        if clipped is None:
            return present
        whole = clipped.full_tensor() if is_dtensor(clipped) else clipped
        norms = (present, float(whole))
        return max(norms) if all(math.isfinite(norm) for norm in norms) else math.inf

    def _leaps(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a group's learning rate is far beyond all before it; else it is one of them from now on."""
        rates = [float(group.get("lr", 0.0)) for group in optimizer.param_groups]
        before = [*self._rates, *[0.0] * (len(rates) - len(self._rates))][: len(rates)]
        noted = [_noted(group, optimizer) for group in optimizer.param_groups]
        known = list(zip(rates, before, noted, strict=True))
        if any(_is_gross_rate(rate, most, made) for rate, most, made in known):
            return True
        self._note_rates(known)
        self._rates = [max(rate, most) for rate, most in zip(rates, before, strict=True)]
        return False

    def _note_rates(self, known: Sequence[tuple[float, float, float]]) -> None:
        """Of the rates of a step: how far the largest lies beyond what was known, and how much it moves weights."""
        # A group that never stepped may begin with any rate.
        leaps = [(rate, max(most, made)) for rate, most, made in known if most > 0.0]
        self._peak = max([*leaps, *([self._peak] if self._peak else [])], key=lambda one: one[0] / one[1], default=None)
        self._update_size = (self._update_size or 0.0) + max((rate for rate, _, _ in known), default=0.0)

    def drain(self) -> list[tuple[float, bool]]:
        """Norm of every step since the last call, and whether it was left out; a new window begins."""
        found, self._window = self._window, []
        self._drained = (self._peak, self._update_size)
        self._peak = self._update_size = None
        self._times.drain()
        return found

    @property
    def update_size(self) -> float | None:
        """Sum of the largest learning rates of the window drained last; None where there were none, or only zeros."""
        return self._drained[1] or None

    def reports(self, rank: int) -> tuple[WindowReport, ...]:
        """What is reported of the window drained last; ask for `impossible_moments` first."""
        peak, _ = self._drained
        found = (
            None if peak is None else rate_peak(*peak),
            None if self._moments is None else self._moments.growth(),
            self._times.slowest(f"rank {rank}"),
        )
        return tuple(one for one in found if one is not None)

    def impossible_moments(self) -> tuple[str, ...]:
        """Moments on this process that the gradients so far could not have made (`MomentWatch`)."""
        return () if self._moments is None else self._moments.impossible()

    def trust_moments(self) -> None:
        """The moments come from elsewhere: a checkpoint was loaded."""
        if self._moments is not None:
            self._moments.trust_present()

    def score(self, norms: Sequence[float]) -> Score | None:
        """The largest norm of a window against those that were learned; None where too few were."""
        return norm_score(self._accepted, norms)

    def learn(self, norms: Iterable[float]) -> None:
        """Norms of a window that was kept: what is usual from now on."""
        self._accepted = [*self._accepted, *norms][-HISTORY:]
        if self._moments is not None:
            self._moments.learn()
        self._times.learn()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if only_fills_its_state(optimizer):
            return
        if any(callable(one) for one in (*args[1:], kwargs.get("closure"))):
            if self._moments is not None:
                self._moments.lose_sight()
            return
        gradients = [one.grad for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
        if not gradients:
            return
        present = gradient_norm(gradients)
        norm = self._norm(present)
        taken = [value for value, left_out in self._window if not left_out]
        leaps = self._leaps(optimizer)
        left_out = self._acts and (leaps or is_gross_norm([*self._accepted, *taken], norm))
        self._window.append((norm, left_out))
        if self._moments is not None and not left_out:
            self._moments.saw(present)
        if left_out:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        if self._wrapper is not None and self._acts:
            self._wrapper._is_overflow = left_out


def _is_gross_rate(rate: float, most: float, noted: float) -> bool:
    """Whether nobody would step with that rate: far beyond all, no number, or so negative that it climbs."""
    if not math.isfinite(rate):
        return True
    # A schedule that runs on below its end may cross zero by rounding, or by a little.
    if rate < -max(most, noted) / GROSS_RATE_RATIO:
        return True
    # A group that never stepped with any rate may begin with any.
    return most > 0.0 and rate > GROSS_RATE_RATIO * max(most, noted)


def _noted(group: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> float:
    """The largest rate that a group was made with, or that a schedule noted as its own."""
    made = [optimizer.defaults.get("lr", 0.0), *(group.get(key, 0.0) for key in _NOTED_RATES)]
    return max(float(rate) for rate in made)


def gradient_norm(gradients: list[Tensor]) -> float:
    """Euclidean norm over all gradients, in one synchronisation; of sharded ones over all their parts."""
    groups: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        plain: Any = gradient.coalesce().values() if gradient.is_sparse else gradient.detach()
        key = (plain.device_mesh, plain.placements) if is_dtensor(plain) else plain.device
        groups.setdefault(key, []).append(plain)
    norms: list[Tensor] = []
    for one in groups.values():
        whole: Any = torch.nn.utils.get_total_norm(one)
        norms.append(whole.full_tensor() if is_dtensor(whole) else whole)
    return float(torch.stack([norm.float().to(norms[0].device) for norm in norms]).norm())
