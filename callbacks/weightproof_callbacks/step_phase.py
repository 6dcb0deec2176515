"""Where in a step of a loop on Accelerate a state was kept, so that the schedule continues from the right place.

`attach` judges inside of `optimizer.step()`; the loop calls `scheduler.step()` after it. A state kept there and put
back there continues alike. One that was kept between two steps (at `attach`, `check()`, a save, a kept edit) and is
put back inside of one must not see that call: the step it belongs to was taken back. One that was kept inside and is
put back between two steps must see it now. Both hold for a schedule that `accelerator.prepare` wrapped: it asks the
wrapped optimizer whether the step was skipped, as after an overflow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.scheduler import AcceleratedScheduler

__all__ = ["StepPhase"]


class StepPhase:
    """Whether the run is inside of `optimizer.step()` now, and whether that step was skipped.

    Args:
        wrapper: The wrapper that accelerate put around the optimizer, or None.
        scheduler: Of the learning rate.
    """

    def __init__(self, wrapper: Any, scheduler: Any) -> None:
        known = isinstance(scheduler, AcceleratedScheduler) and hasattr(wrapper, "_is_overflow")
        self._wrapper = wrapper if known else None
        self._scheduler = scheduler
        self._inside = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What happens in the block happens inside of `optimizer.step()`."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    @property
    def now(self) -> tuple[bool, bool]:
        """(inside of a step, that step was skipped)."""
        return self._inside, self._wrapper is not None and bool(self._wrapper._is_overflow)

    def put_back(self, then: tuple[bool, bool]) -> None:
        """After a state of `then` was put back: let the schedule go on as it did from there."""
        if self._wrapper is None:
            return
        was_inside, was_skipped = then
        if self._inside:
            self._wrapper._is_overflow = was_skipped if was_inside else True
            return
        self._wrapper._is_overflow = False
        if was_inside and not was_skipped:
            self._advance()

    def _advance(self) -> None:
        gradients = self._scheduler.gradient_state
        syncs = gradients.sync_gradients
        gradients._set_sync_gradients(True)
        try:
            self._scheduler.step()
        finally:
            gradients._set_sync_gradients(syncs)
