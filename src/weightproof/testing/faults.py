"""Faults of training, to be injected on purpose: what a guard must find, and what it must let pass.

Every fault is a frozen dataclass: which step of the optimizer it hits (`at`, counted from 1), for how many
steps, on which rank (None: all), from which seed, and how hard. The defaults are harmful strengths; `mild()` gives
the same fault at a strength that training shrugs off. `REGISTRY` holds all of them by name, and `inject`
(injection.py) hangs them into a loop.

    >>> sorted(REGISTRY)[:3]
    ['bad-batch', 'desynchronised', 'gradient-bit-flip']
    >>> WeightBitFlip(at=30).mild().bit
    20
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from weightproof.errors import InputError
from weightproof.testing.injection import Injection
from weightproof.testing.tampering import flip_bit, overwrite, pick_element

__all__ = [
    "REGISTRY",
    "BadBatch",
    "Desynchronised",
    "Fault",
    "GradientBitFlip",
    "LearningRateSpike",
    "LoaderSkew",
    "NormGainFlip",
    "OptimizerBitFlip",
    "Overflow",
    "RankNaN",
    "StaleMasters",
    "StuckRank",
    "WeightBitFlip",
    "WrongRNG",
    "make_fault",
]

# Bits from the most significant one: the top bit of an exponent, and one deep in the fraction of a float32.
TOP_EXPONENT_BIT = 1
FRACTION_BIT = 20


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What all faults share. The events do nothing here; a fault fills in those that it needs.

    Attributes:
        at: Optimizer step that it hits, counted from 1.
        steps: For how many steps in a row.
        rank: On which process; None on all.
        seed: Of everything that it draws.
    """

    name: ClassVar[str] = ""
    hits: ClassVar[str] = ""
    weaker: ClassVar[Mapping[str, Any] | None] = None  # what `mild` sets; None: there is no mild form

    at: int = 1
    steps: int = 1
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what could never happen."""
        if self.at < 1 or self.steps < 1:
            raise InputError(f"{self.name}: at and steps count from 1, not {self.at} and {self.steps}")

    def mild(self) -> Self:
        """The same fault at a strength that training shrugs off.

        Raises:
            InputError: It has no mild form: it is found exactly, or it is harmful whenever it happens.
        """
        if self.weaker is None:
            raise InputError(f"{self.name} has no mild form")
        return replace(self, **self.weaker)

    @property
    def strength(self) -> str:
        """Its own parameters, in words."""
        shared = {one.name for one in fields(Fault)}
        own = [(one.name, getattr(self, one.name)) for one in fields(self) if one.name not in shared]
        told = [f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in own]
        span = [f"steps={self.steps}"] if self.steps > 1 else []
        return ", ".join([*(text for (_, value), text in zip(own, told, strict=True) if value is not None), *span])

    def prepare(self, run: Injection) -> None:
        """Find what will be hit, and refuse where there is nothing; called once."""

    def load(self, run: Injection, batch: Any, previous: Any) -> Any:
        """What the loader gives instead of `batch`; `previous` is what it gave before (None at first)."""
        return batch

    def forward(
        self, run: Injection, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a training forward pass."""
        return args, kwargs

    def before_step(self, run: Injection) -> None:
        """Gradients are final, the optimizer is about to use them."""

    def after_step(self, run: Injection) -> None:
        """The optimizer has written the weights."""

    def let_go(self, run: Injection) -> None:
        """Put back what is held for a step only."""


# ---- flipped bits ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _BitFlip(Fault):
    tensor: str | None = None
    element: int | None = None
    bit: int = TOP_EXPONENT_BIT
    weaker: ClassVar[Mapping[str, Any] | None] = {"bit": FRACTION_BIT}

    def prepare(self, run: Injection) -> None:
        """The parameter that is hit, by name or drawn."""
        run.parameter(self.tensor, self.seed)

    def flip(self, run: Injection, tensor: Tensor, what: str) -> None:
        """Flip the bit and note it."""
        element = pick_element(tensor, self.seed) if self.element is None else self.element
        before, after = flip_bit(tensor, element, self.bit)
        run.note(self, f"bit {self.bit} of {what}[{element}]: {before:g} -> {after:g}")


@dataclass(frozen=True, kw_only=True)
class GradientBitFlip(_BitFlip):
    """One bit of one element of a gradient, as it comes out of the backward pass (of shards: before the step)."""

    name: ClassVar[str] = "gradient-bit-flip"
    hits: ClassVar[str] = "a gradient"

    def prepare(self, run: Injection) -> None:
        """Wait for the gradient, which may be clipped soon after."""
        name, parameter = run.parameter(self.tensor, self.seed)
        done: list[int] = []

        def act() -> None:
            if run.due(self) and parameter.grad is not None and run.step not in done:
                done.append(run.step)  # once a step, whatever the number of micro-batches
                self.flip(run, parameter.grad, f"the gradient of {name}")

        if not run.on_gradient(parameter, act):
            run.held[self] = act

    def before_step(self, run: Injection) -> None:
        """Gradients of shards, which no hook sees earlier."""
        if self in run.held:
            run.held[self]()


@dataclass(frozen=True, kw_only=True)
class OptimizerBitFlip(_BitFlip):
    """One bit of one element of the optimizer's state (`exp_avg`, `exp_avg_sq`, `momentum_buffer`...)."""

    name: ClassVar[str] = "optimizer-bit-flip"
    hits: ClassVar[str] = "an optimizer moment"
    state: str = "exp_avg"

    def before_step(self, run: Injection) -> None:
        """The moments of earlier steps; in the first step there are none yet."""
        name, parameter = run.parameter(self.tensor, self.seed)
        moment = run.optimizer.state.get(parameter, {}).get(self.state)
        if not isinstance(moment, Tensor):
            raise InputError(f"{self.name}: the optimizer holds no {self.state!r} of {name} at step {run.step}")
        self.flip(run, moment, f"{self.state} of {name}")


@dataclass(frozen=True, kw_only=True)
class WeightBitFlip(_BitFlip):
    """One bit of one element of a weight, after the step has written it."""

    name: ClassVar[str] = "weight-bit-flip"
    hits: ClassVar[str] = "a weight"

    def after_step(self, run: Injection) -> None:
        """Flip it."""
        name, parameter = run.parameter(self.tensor, self.seed)
        self.flip(run, parameter, name)


# ---- steps that go wrong --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LearningRateSpike(Fault):
    """The learning rate is many times what it should be, for some steps."""

    name: ClassVar[str] = "learning-rate"
    hits: ClassVar[str] = "the learning rate"
    weaker: ClassVar[Mapping[str, Any] | None] = {"factor": 1.5, "steps": 1}
    factor: float = 100.0
    steps: int = 5

    def before_step(self, run: Injection) -> None:
        """Raise it for this step only: a schedule computes from what it was."""
        held = [(group, group["lr"]) for group in run.optimizer.param_groups]
        for group, rate in held:
            group["lr"] = rate * self.factor
        run.held[self] = held
        run.note(self, f"learning rate x{self.factor:g}")

    def after_step(self, run: Injection) -> None:
        """Put it back."""
        self.let_go(run)

    def let_go(self, run: Injection) -> None:
        """Put it back, also where the step raised."""
        for group, rate in run.held.pop(self, ()):
            group["lr"] = rate


@dataclass(frozen=True, kw_only=True)
class BadBatch(Fault):
    """Token ids and labels of a batch are replaced by random ones (of other inputs: noise of their own spread)."""

    name: ClassVar[str] = "bad-batch"
    hits: ClassVar[str] = "the batch"
    weaker: ClassVar[Mapping[str, Any] | None] = {"share": 0.1, "steps": 1}
    share: float = 1.0
    steps: int = 14
    vocabulary: int | None = None

    def forward(
        self, run: Injection, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """New tensors: the loader's own are left as they are."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + run.step)
        size = self.vocabulary or _vocabulary(run.model)

        def spoiled(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() < 2:
                return value
            hit = torch.rand(value.shape, generator=generator) < self.share
            if value.is_floating_point():
                drawn = value.float().std().cpu() * torch.randn(value.shape, generator=generator)
            else:
                top = size or int(value.max()) + 1
                drawn = torch.randint(top, value.shape, generator=generator)
            return torch.where(hit.to(value.device), drawn.to(value.device, value.dtype), value)

        run.note(self, f"{self.share:.0%} of the batch is random")
        masks = ("attention_mask", "position_ids", "token_type_ids")
        kept = {key: value if key in masks else spoiled(value) for key, value in kwargs.items()}
        return tuple(spoiled(value) for value in args), kept


@dataclass(frozen=True, kw_only=True)
class RankNaN(Fault):
    """NaN in one element of a gradient of one process after gradients were averaged: only there it reaches a weight."""

    name: ClassVar[str] = "rank-nan"
    hits: ClassVar[str] = "a gradient of one rank"
    tensor: str | None = None
    rank: int | None = 0

    def prepare(self, run: Injection) -> None:
        """The parameter that is hit."""
        run.parameter(self.tensor, self.seed)

    def before_step(self, run: Injection) -> None:
        """The gradient that the optimizer is about to use."""
        name, parameter = run.parameter(self.tensor, self.seed)
        if parameter.grad is None:
            return
        element = pick_element(parameter.grad, self.seed)

        def spoiled(values: Tensor) -> Tensor:
            values.view(-1)[element] = torch.nan
            return values

        overwrite(parameter.grad, spoiled)
        run.note(self, f"NaN in the gradient of {name}")


@dataclass(frozen=True, kw_only=True)
class Overflow(Fault):
    """A number leaves the range that it was meant for: the output of a layer, or the scale of the loss.

    `where="activation"`: a layer's output is multiplied. `where="loss scale"`: gradients reach the optimizer
    multiplied, as when the scale of the loss was not divided out.
    """

    name: ClassVar[str] = "overflow"
    hits: ClassVar[str] = "an activation"
    weaker: ClassVar[Mapping[str, Any] | None] = {"factor": 1.02, "steps": 1}
    factor: float = 1e20
    where: str = "activation"
    module: str | None = None
    steps: int = 2

    def prepare(self, run: Injection) -> None:
        """Hang a hook on the layer: the middle one of the linear layers, or the one that is named."""
        if self.where == "loss scale":
            return
        if self.where != "activation":
            raise InputError(f"{self.name}: where is 'activation' or 'loss scale', not {self.where!r}")
        layers = {name: one for name, one in run.model.named_modules() if type(one).__name__ in ("Linear", "Conv1D")}
        name = self.module if self.module is not None else next(iter([*layers][len(layers) // 2 :]), None)
        layer = dict(run.model.named_modules()).get(name or "")
        if name is None or layer is None:
            raise InputError(f"{self.name}: no layer {name or 'of class Linear or Conv1D'} in this model: name one")

        def multiplied(module: nn.Module, args: Any, output: Any) -> Any:
            if not (module.training and run.due(self) and isinstance(output, Tensor)):
                return None
            run.note(self, f"output of {name} x{self.factor:g}")
            return output * self.factor

        run.until_removed(layer.register_forward_hook(multiplied))

    def before_step(self, run: Injection) -> None:
        """Multiply every gradient, where the scale of the loss is hit."""
        if self.where != "loss scale":
            return
        for parameter in run.parameters().values():
            if parameter.grad is not None:
                overwrite(parameter.grad, lambda values: values * self.factor)
        run.note(self, f"gradients x{self.factor:g}")


# ---- weights that are not what they should be -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NormGainFlip(Fault):
    """The gain of a normalisation layer is multiplied, by default with -1: every sign behind it flips."""

    name: ClassVar[str] = "norm-gain-flip"
    hits: ClassVar[str] = "a norm gain"
    weaker: ClassVar[Mapping[str, Any] | None] = {"factor": 0.99}
    tensor: str | None = None
    factor: float = -1.0

    def _gain(self, run: Injection) -> tuple[str, nn.Parameter]:
        if self.tensor is not None:
            return run.parameter(self.tensor, self.seed)
        found = run.parameters()
        gains = [name for name, one in found.items() if one.dim() == 1 and name.endswith("weight")]
        if not gains:
            raise InputError(f"{self.name}: this model trains no norm gain: name a tensor")
        return gains[-1], found[gains[-1]]  # the last one is in front of the output

    def prepare(self, run: Injection) -> None:
        """There must be one."""
        self._gain(run)

    def after_step(self, run: Injection) -> None:
        """Multiply it."""
        name, gain = self._gain(run)
        overwrite(gain, lambda values: values * self.factor)
        run.note(self, f"{name} x{self.factor:g}")


@dataclass(frozen=True, kw_only=True)
class Desynchronised(Fault):
    """One process's replica drifts apart: noise on one matrix, of a spread relative to its own."""

    name: ClassVar[str] = "desynchronised"
    hits: ClassVar[str] = "a replica"
    rank: int | None = 1
    tensor: str | None = None
    relative: float = 1e-3

    def prepare(self, run: Injection) -> None:
        """The matrix that is hit."""
        run.parameter(self.tensor, self.seed)

    def after_step(self, run: Injection) -> None:
        """Add the noise."""
        name, parameter = run.parameter(self.tensor, self.seed)
        generator = torch.Generator().manual_seed(self.seed)

        def drifted(values: Tensor) -> Tensor:
            noise = torch.randn(values.shape, generator=generator).to(values.device, values.dtype)
            return values + self.relative * values.float().std().to(values.dtype) * noise

        overwrite(parameter, drifted)
        run.note(self, f"noise of {self.relative:g} of its spread on {name}")


@dataclass(frozen=True, kw_only=True)
class StaleMasters(Fault):
    """A weight is written, its fp32 master is not: the next step of the optimizer undoes the change."""

    name: ClassVar[str] = "stale-masters"
    hits: ClassVar[str] = "a weight that has a master"
    tensor: str | None = None
    factor: float = 1.01

    def _pair(self, run: Injection) -> tuple[str, nn.Parameter]:
        parameters = run.parameters()
        kept = sorted(name for name in run.masters if name in parameters)
        if not kept or (self.tensor is not None and self.tensor not in kept):
            raise InputError(f"{self.name}: no master of {self.tensor or 'any weight'}: give masters= to inject")
        name = self.tensor or kept[0]
        return name, parameters[name]

    def prepare(self, run: Injection) -> None:
        """There must be a master."""
        self._pair(run)

    def after_step(self, run: Injection) -> None:
        """Write the weight alone."""
        name, parameter = self._pair(run)
        overwrite(parameter, lambda values: values * self.factor)
        run.note(self, f"{name} x{self.factor:g}, not its master")


# ---- the run around the model ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StuckRank(Fault):
    """One process sleeps before its step, while the others wait."""

    name: ClassVar[str] = "stuck-rank"
    hits: ClassVar[str] = "a process"
    weaker: ClassVar[Mapping[str, Any] | None] = {"seconds": 0.2}
    rank: int | None = 1
    seconds: float = 60.0

    def before_step(self, run: Injection) -> None:
        """Sleep."""
        run.note(self, f"asleep for {self.seconds:g} s")
        time.sleep(self.seconds)


@dataclass(frozen=True, kw_only=True)
class WrongRNG(Fault):
    """The random generators of the process (Python, NumPy, torch) are seeded anew, as by a resume that forgets them."""

    name: ClassVar[str] = "wrong-rng"
    hits: ClassVar[str] = "random generators"

    def after_step(self, run: Injection) -> None:
        """Seed them."""
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)  # noqa: NPY002 - training draws from the global generator
        torch.manual_seed(self.seed)
        run.note(self, f"generators seeded with {self.seed}")


@dataclass(frozen=True, kw_only=True)
class LoaderSkew(Fault):
    """A process is given the batch before once more instead of its own. Wrap the loader: `injection.loader(data)`."""

    name: ClassVar[str] = "loader-skew"
    hits: ClassVar[str] = "the data loader"
    rank: int | None = 0

    def load(self, run: Injection, batch: Any, previous: Any) -> Any:
        """The batch before, where there was one."""
        if previous is None:
            return batch
        run.note(self, "the batch before is given again")
        return previous


REGISTRY: Mapping[str, type[Fault]] = {
    kind.name: kind
    for kind in (
        GradientBitFlip,
        OptimizerBitFlip,
        WeightBitFlip,
        LearningRateSpike,
        BadBatch,
        RankNaN,
        StuckRank,
        Desynchronised,
        StaleMasters,
        WrongRNG,
        LoaderSkew,
        Overflow,
        NormGainFlip,
    )
}


def make_fault(name: str, **parameters: Any) -> Fault:
    """A fault by its registered name.

    Raises:
        InputError: There is no such fault, or it has no such parameter.
    """
    if name not in REGISTRY:
        raise InputError(f"there is no fault {name!r}: choose from {', '.join(sorted(REGISTRY))}")
    make: Callable[..., Fault] = REGISTRY[name]
    known = {one.name for one in fields(REGISTRY[name])}
    if unknown := sorted(parameters.keys() - known):
        raise InputError(f"the fault {name!r} has no parameter {unknown[0]!r}: it has {', '.join(sorted(known))}")
    return make(**parameters)


def _vocabulary(model: nn.Module) -> int | None:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return size if isinstance(size, int) else None
