"""Flipped bits: of a gradient, of the optimizer's state, of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from weightproof.errors import InputError
from weightproof.parallel.placements import local_of
from weightproof.testing.faults.fault import ParameterFault
from weightproof.testing.injection import Injection
from weightproof.testing.tampering import flip_bit, pick_element

# Bits from the most significant one: the top bit of an exponent, and lower ones, which move a number by 2^8 and 2^4,
# up where that bit is 0 (of gradients and weights of a common size it is). What a bit of the
# fraction does to one number among many nobody can see.
TOP_EXPONENT_BIT = 1
LOWER_EXPONENT_BIT = 5
LOW_EXPONENT_BIT = 6


@dataclass(frozen=True, kw_only=True)
class _BitFlip(ParameterFault):
    element: int | None = None
    bit: int | None = TOP_EXPONENT_BIT  # None: the highest one below the top that makes the number larger
    weaker: ClassVar[Mapping[str, Any] | None] = {"bit": LOWER_EXPONENT_BIT}

    def flip(self, run: Injection, tensor: Tensor, what: str) -> None:
        """Flip the bit and note it."""
        element = pick_element(tensor, self.seed) if self.element is None else self.element
        bit = _raising_bit(tensor, element) if self.bit is None else self.bit
        before, after = flip_bit(tensor, element, bit)
        run.note(self, f"bit {bit} of {what}[{element}]: {before:g} -> {after:g}")


def _raising_bit(tensor: Tensor, element: int) -> int:
    """The highest bit below the top one of the exponent that makes a number larger, whatever its size is."""
    number = local_of(tensor).detach().flatten()[element]
    for bit in range(TOP_EXPONENT_BIT + 1, 8 * tensor.element_size()):
        before, after = flip_bit(number.reshape(1).clone(), 0, bit)
        if abs(after) > abs(before):
            return bit
    return TOP_EXPONENT_BIT


@dataclass(frozen=True, kw_only=True)
class GradientBitFlip(_BitFlip):
    """One bit of one element of a gradient, as it comes out of the backward pass (of shards: before the step)."""

    name: ClassVar[str] = "gradient-bit-flip"
    hits: ClassVar[str] = "a gradient"

    def prepare(self, run: Injection) -> None:
        """Wait for the gradient, which may be clipped soon after."""
        name, parameter = self.target(run)
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
    weaker: ClassVar[Mapping[str, Any] | None] = {"bit": None, "state": "exp_avg_sq"}
    state: str = "exp_avg"

    def before_step(self, run: Injection) -> None:
        """The moments of earlier steps; in the first step there are none yet."""
        name, parameter = self.target(run)
        moment = run.optimizer.state.get(parameter, {}).get(self.state)
        if not isinstance(moment, Tensor):
            raise InputError(f"{self.name}: the optimizer holds no {self.state!r} of {name} at step {run.step}")
        self.flip(run, moment, f"{self.state} of {name}")


@dataclass(frozen=True, kw_only=True)
class WeightBitFlip(_BitFlip):
    """One bit of one element of a weight, after the step has written it."""

    name: ClassVar[str] = "weight-bit-flip"
    hits: ClassVar[str] = "a weight"
    weaker: ClassVar[Mapping[str, Any] | None] = {"bit": LOW_EXPONENT_BIT}

    def after_step(self, run: Injection) -> None:
        """Flip it."""
        name, parameter = self.target(run)
        self.flip(run, parameter, name)
