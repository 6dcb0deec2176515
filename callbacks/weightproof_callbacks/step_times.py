"""How long steps take on this process: from the end of a forward pass to the end of the optimizer's step.

A process that is held up makes all others wait; before the guard's limit of patience is reached, nobody is told of it.
Checks, evaluations and saves lie outside of that span.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from weightproof.statistics.window_reports import slowest_step
from weightproof.types import WindowReport

__all__ = ["StepTimes"]

_REMEMBERED = 64


class StepTimes:
    """Takes the time of every step of one optimizer."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._known: list[float] = []
        self._window: list[float] = []
        self._drained: list[float] = []
        self._handles: list[Any] = []

    def hang_in(self, model: torch.nn.Module | None, optimizer: torch.optim.Optimizer) -> None:
        """Hang the hooks in; nothing is timed without a model."""
        if model is None:
            return
        # Not traced: under torch.compile a new number would cause a recompilation at every step.
        begin: Any = torch.compiler.disable(self._begin)
        self._handles = [model.register_forward_hook(begin), optimizer.register_step_post_hook(self._end)]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def drain(self) -> None:
        """A new window begins."""
        self._drained, self._window = self._window, []

    def slowest(self, where: str) -> WindowReport | None:
        """The slowest step of the window that was drained last, where it is slow enough to be noted."""
        return slowest_step(self._known, self._drained, where)

    def learn(self) -> None:
        """The window that was drained last was kept."""
        self._known = [*self._known, *self._drained][-_REMEMBERED:]
        self._drained = []

    def _begin(self, module: torch.nn.Module, *_: Any) -> None:
        if module.training:
            self._began = time.perf_counter()

    def _end(self, *_: Any) -> None:
        if self._began is not None:
            self._window.append(time.perf_counter() - self._began)
            self._began = None
