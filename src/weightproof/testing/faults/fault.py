"""What all faults share: when they hit, where, and the events at which they can act."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from weightproof.errors import InputError
from weightproof.testing.injection import Injection


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

    def resume(self, run: Injection, folder: Path) -> None:
        """A checkpoint in `folder` is about to be loaded: `injection.resuming(folder)`."""

    def let_go(self, run: Injection) -> None:
        """Put back what is held for a step only."""


@dataclass(frozen=True, kw_only=True)
class ParameterFault(Fault):
    """A fault that hits one parameter.

    Attributes:
        tensor: Its name; None: one of the matrices, drawn by the seed.
    """

    tensor: str | None = None

    def prepare(self, run: Injection) -> None:
        """There must be one."""
        self.target(run)

    def target(self, run: Injection) -> tuple[str, nn.Parameter]:
        """Name and parameter that are hit."""
        return run.parameter(self.tensor, self.seed)
