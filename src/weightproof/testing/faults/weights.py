"""Weights that are not what they should be, on one process or on all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weightproof.errors import InputError
from weightproof.testing.faults.fault import ParameterFault
from weightproof.testing.injection import Injection
from weightproof.testing.tampering import overwrite, pick_element


@dataclass(frozen=True, kw_only=True)
class RankNaN(ParameterFault):
    """NaN in one element of a gradient of one process after gradients were averaged: only there it reaches a weight."""

    name: ClassVar[str] = "rank-nan"
    hits: ClassVar[str] = "a gradient of one rank"
    rank: int | None = 0

    def before_step(self, run: Injection) -> None:
        """The gradient that the optimizer is about to use."""
        name, parameter = self.target(run)
        if parameter.grad is None:
            return
        element = pick_element(parameter.grad, self.seed)

        def spoiled(values: Tensor) -> Tensor:
            values.view(-1)[element] = torch.nan
            return values

        overwrite(parameter.grad, spoiled)
        run.note(self, f"NaN in the gradient of {name}")


@dataclass(frozen=True, kw_only=True)
class NormGainFlip(ParameterFault):
    """The gain of a normalisation layer is multiplied, by default with -1: every sign behind it flips."""

    name: ClassVar[str] = "norm-gain-flip"
    hits: ClassVar[str] = "a norm gain"
    weaker: ClassVar[Mapping[str, Any] | None] = {"factor": 0.99}
    factor: float = -1.0

    def target(self, run: Injection) -> tuple[str, nn.Parameter]:
        """The gain that is named, else the last one."""
        if self.tensor is not None:
            return run.parameter(self.tensor, self.seed)
        found = run.parameters()
        gains = [name for name, one in found.items() if one.dim() == 1 and name.endswith("weight")]
        if not gains:
            raise InputError(f"{self.name}: this model trains no norm gain: name a tensor")
        return gains[-1], found[gains[-1]]  # the last one is in front of the output

    def after_step(self, run: Injection) -> None:
        """Multiply it."""
        name, gain = self.target(run)
        overwrite(gain, lambda values: values * self.factor)
        run.note(self, f"{name} x{self.factor:g}")


@dataclass(frozen=True, kw_only=True)
class Desynchronised(ParameterFault):
    """One process's replica drifts apart: noise on one matrix, of a spread relative to its own."""

    name: ClassVar[str] = "desynchronised"
    hits: ClassVar[str] = "a replica"
    rank: int | None = 1
    relative: float = 1e-3

    def after_step(self, run: Injection) -> None:
        """Add the noise."""
        name, parameter = self.target(run)
        generator = torch.Generator().manual_seed(self.seed)

        def drifted(values: Tensor) -> Tensor:
            noise = torch.randn(values.shape, generator=generator).to(values.device, values.dtype)
            return values + self.relative * values.float().std().to(values.dtype) * noise

        overwrite(parameter, drifted)
        run.note(self, f"noise of {self.relative:g} of its spread on {name}")


@dataclass(frozen=True, kw_only=True)
class StaleMasters(ParameterFault):
    """A weight is written, its fp32 master is not: the next step of the optimizer undoes the change."""

    name: ClassVar[str] = "stale-masters"
    hits: ClassVar[str] = "a weight that has a master"
    factor: float = 1.01

    def target(self, run: Injection) -> tuple[str, nn.Parameter]:
        """The weight that is named, else the first one that has a master."""
        parameters = run.parameters()
        kept = sorted(name for name in run.masters if name in parameters)
        if not kept or (self.tensor is not None and self.tensor not in kept):
            raise InputError(f"{self.name}: no master of {self.tensor or 'any weight'}: give masters= to inject")
        name = self.tensor or kept[0]
        return name, parameters[name]

    def after_step(self, run: Injection) -> None:
        """Write the weight alone."""
        name, parameter = self.target(run)
        overwrite(parameter, lambda values: values * self.factor)
        run.note(self, f"{name} x{self.factor:g}, not its master")
