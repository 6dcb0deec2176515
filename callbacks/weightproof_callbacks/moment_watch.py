"""Moments of an optimizer that no gradients could have made: a flipped bit in `exp_avg_sq` freezes a weight unseen.

Most moments are averages of what the optimizer was given: `exp_avg` of gradients, `exp_avg_sq` of their squares. No
element of an average is larger than the largest thing averaged, and no element of a gradient is larger than the
gradient's norm. So the largest norm that any step was taken with bounds every first moment, its square every second
one, for good and whatever the betas; and a second moment is never negative. What lies a hundred times beyond that
bound was not put there by training. The top bits of an exponent move a number by factors of 2^32 and more.

Nothing is judged where the bound is not known: optimizers other than torch's own, states that are packed
(8-bit), steps whose gradients nobody saw (a gradient scaler, a closure, DeepSpeed). States that were
there before anybody watched, or that were loaded, are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weightproof.parallel.placements import local_of
from weightproof.statistics.window_reports import Usual, moment_growth
from weightproof.types import WindowReport
from weightproof.weights import clean_name
from weightproof_callbacks.accelerator_checks import torch_optimizer
from weightproof_callbacks.sharded import zero_optimizer
from weightproof_callbacks.state_values import is_composed

__all__ = ["MomentWatch"]

# How far beyond its bound a moment may lie: norms are rounded, and other hooks may change a gradient after it was seen.
SLACK = 100.0

_ADAM = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
# Of torch's own optimizers: which state is an average of gradients (1) or of their squares (2).
_AVERAGES: Mapping[type, Mapping[str, int]] = {
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.NAdam: _ADAM,
    torch.optim.RAdam: _ADAM,
    torch.optim.Adamax: {"exp_avg": 1},
    torch.optim.RMSprop: {"square_avg": 2, "grad_avg": 1},
    torch.optim.Adadelta: {"square_avg": 2},
    torch.optim.SGD: {"momentum_buffer": 1},
}


class _Moment(NamedTuple):
    """The part of one state tensor that lies here."""

    parameter: Any
    key: str
    power: int
    group: Mapping[str, Any]
    values: Tensor


class MomentWatch:
    """Bounds the moments of one optimizer by the gradients that it was given.

    Args:
        optimizer: As `accelerator.prepare` returned it, or the torch optimizer inside; None: there is nothing to bound.
        model: The model, for the names of its parameters.
    """

    def __init__(self, optimizer: Any, model: torch.nn.Module) -> None:
        self._model = model
        self._names: dict[int, str] = {}
        self._norm = 0.0  # the largest that any step was taken with
        self._trusted: dict[int, float] = {}  # by power: the largest moment that was there before
        self._is_blind = False
        self._usual, self._sizes = Usual(), dict[str, float]()
        self._handle: Any = None
        self._inner: torch.optim.Optimizer | None = None
        self._averages: Mapping[str, int] = {}
        if optimizer is None or zero_optimizer(optimizer) is not None:
            return
        self._inner = torch_optimizer(optimizer)
        self._averages = _AVERAGES.get(type(self._inner), {})
        self._handle = self._inner.register_load_state_dict_post_hook(lambda *_: self.trust_present())
        self.trust_present()

    def remove(self) -> None:
        """Take the hook away."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def saw(self, norm: float) -> None:
        """A step is about to be taken with gradients of this norm."""
        if math.isfinite(norm):
            self._norm = max(self._norm, norm)

    def lose_sight(self) -> None:
        """A step is about to be taken with gradients that nobody sees: its moments are taken as they will be."""
        self._is_blind = True

    def trust_present(self) -> None:
        """Take the moments as they are: they were loaded, or come from steps that nobody saw."""
        for moment, (least, most) in self._extremes():
            size = max(abs(least), abs(most))
            if math.isfinite(size):
                self._trusted[moment.power] = max(self._trusted.get(moment.power, 0.0), size)

    def impossible(self) -> tuple[str, ...]:
        """Moments on this process that no gradients could have made, each in words; one synchronisation."""
        if self._is_blind:
            self._is_blind = False
            self.trust_present()
        found: list[str] = []
        self._sizes = {}
        for moment, (least, most) in self._extremes():
            key = f"{moment.key} of {self._name(moment.parameter)}"
            self._sizes[key] = max(abs(least), abs(most)) ** (1.0 / moment.power)
            limit = SLACK * self._bound(moment)
            if -limit * (moment.power == 1) <= least and most <= limit:  # also false for NaN
                continue
            worst = most if not most <= limit else least
            found.append(f"{key} holds {worst:.3g}")
        return tuple(found)

    def growth(self) -> WindowReport | None:
        """The moment whose largest element grew most beyond its usual, as `impossible` saw them last."""
        return moment_growth(self._usual, self._sizes)

    def learn(self) -> None:
        """What `impossible` saw last is of a window that was kept."""
        self._usual.learn(self._sizes)

    def _bound(self, moment: _Moment) -> float:
        """The largest element that this average can have."""
        group = moment.group
        gradient = self._norm
        if not _is_decoupled(self._inner, group) and (decay := float(group.get("weight_decay", 0.0))):
            gradient += decay * float(local_of(moment.parameter).detach().abs().max())
        if moment.key == "momentum_buffer":  # a sum with falling weights
            keeps = float(group.get("momentum", 0.0))
            gradient = gradient / (1.0 - keeps) if keeps < 1.0 else math.inf
        return max(gradient**moment.power, self._trusted.get(moment.power, 0.0))

    def _extremes(self) -> Iterator[tuple[_Moment, tuple[float, float]]]:
        """Least and largest element of every moment."""
        moments = list(self._moments())
        if not moments:
            return
        device = moments[0].values.device
        both = [torch.stack(torch.aminmax(one.values.detach())).to(device, torch.float64) for one in moments]
        yield from zip(moments, (tuple(pair) for pair in torch.stack(both).tolist()), strict=True)

    def _moments(self) -> Iterator[_Moment]:
        if self._inner is None:
            return
        for group in self._inner.param_groups:
            for parameter in group["params"]:
                state = self._inner.state.get(parameter, {})
                for key, power in self._averages.items():
                    values = local_of(state[key]) if isinstance(state.get(key), Tensor) else None
                    if values is not None and _is_plain(values):
                        yield _Moment(parameter, key, power, group, values)

    def _name(self, parameter: Any) -> str:
        known = self._names.get(id(parameter))
        if known is None:  # parameters may be replaced while a run lasts
            self._names = {id(one): clean_name(name) for name, one in self._model.named_parameters()}
            known = self._names.setdefault(id(parameter), "a parameter outside of the model")
        return known


def _is_plain(values: Tensor) -> bool:
    return values.is_floating_point() and values.numel() > 0 and not is_composed(values) and not values.is_sparse


def _is_decoupled(optimizer: Any, group: Mapping[str, Any]) -> bool:
    """Whether weight decay is applied to the weights, not added to the gradients."""
    return isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay", False))
