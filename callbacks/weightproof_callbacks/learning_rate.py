"""A learning rate that is lowered once and stays lower: in the optimizer, and in every schedule around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from weightproof_callbacks.optimizer_state import stepping_optimizer

# Learning rates that schedules keep in the optimizer's parameter groups (torch's, OneCycleLR and CyclicLR included).
_IN_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr")
# And those that they keep themselves.
_IN_SCHEDULES = ("base_lrs", "_last_lr", "min_lrs", "max_lrs")


class LearningRate:
    """Scales all learning rates of a run.

    Args:
        optimizer: As `accelerator.prepare` returned it; None: there is nothing to scale.
        scheduler: Of the learning rate, or None.

    Attributes:
        scale: By how much the learning rate is smaller than the run was begun with.
    """

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler
        self.scale = 1.0

    def rescale(self, restored: float, factor: float | None) -> None:
        """After a rollback: lower the rate once more.

        Args:
            restored: Scale of the state that was put back.
            factor: By how much it is to be lower than it was before the rollback; None: not at all.
        """
        self.scale *= 1.0 if factor is None else factor
        if self.scale != restored and self._optimizer is not None:
            self._multiply(self.scale / restored)

    def notes(self) -> dict[str, float]:
        """For the record of a step."""
        return {} if self.scale == 1.0 else {"learning_rate_scale": self.scale}

    def _multiply(self, factor: float) -> None:
        written: set[int] = set()  # tensors that a group and a schedule share
        for group in stepping_optimizer(self._optimizer).param_groups:
            for key in _IN_GROUPS:
                if key in group:
                    group[key] = _scaled(group[key], factor, written)
        for schedule in _schedules(self._scheduler):
            for name in _IN_SCHEDULES:
                rates = vars(schedule).get(name)
                if isinstance(rates, list):
                    vars(schedule)[name] = [_scaled(rate, factor, written) for rate in rates]


def _scaled(rate: Any, factor: float, written: set[int]) -> Any:
    """The rate times the factor; a tensor (capturable optimizers) stays the object that it is."""
    if isinstance(rate, Tensor):
        if id(rate) not in written:
            written.add(id(rate))
            rate.mul_(factor)
        return rate
    return rate * factor if isinstance(rate, int | float) else rate


def _schedules(scheduler: Any) -> Iterator[Any]:
    """A schedule and those inside of it (accelerate's wrapper, SequentialLR, ChainedScheduler)."""
    if scheduler is None:
        return
    inner = vars(scheduler).get("scheduler")
    if inner is not None:
        yield from _schedules(inner)
        return
    yield scheduler
    for one in vars(scheduler).get("_schedulers", ()):
        yield from _schedules(one)
