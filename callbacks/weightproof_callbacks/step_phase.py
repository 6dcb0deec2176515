"""Where in a step of a loop on Accelerate a state was kept, so that schedule and gradient scaler continue from there.

`attach` judges inside of `optimizer.step()`. Two things of that step are still to come: the scaler's update, and the
loop's `scheduler.step()`. A state kept there and put back there continues alike. One that was kept between two steps
(at `attach`, `check()`, a save, a kept edit) and is put back inside of one must not see them: the step they belong
to was taken back. One that was kept inside and is put back between two steps must see both now.

The schedule's step is held back where `accelerator.prepare` wrapped the schedule: it asks the wrapped optimizer whether
the step was skipped, as after an overflow. It is made up for only where the loop steps its schedule after every
step of the optimizer, as was last seen.
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
        scaler: Of the gradients, if there is one.
    """

    def __init__(self, wrapper: Any, scheduler: Any, scaler: Any = None) -> None:
        self._wrapper: Any = wrapper if hasattr(wrapper, "_is_overflow") else None
        self._scheduler = scheduler if isinstance(scheduler, AcceleratedScheduler) else None
        self._scaler = scaler if self._wrapper is not None and getattr(scaler, "is_enabled", bool)() else None
        self._inside = False
        self._place: Any = None  # of the schedule, at the last step
        self._follows = True  # whether the schedule has moved since the step before

    def stepped(self) -> None:
        """The optimizer has stepped, and the loop has not gone on yet."""
        if self._scheduler is None:
            return
        place = getattr(self._scheduler.scheduler, "last_epoch", None)
        self._follows = self._place is None or place is None or place != self._place
        self._place = place

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
        """After a state of `then` was put back: let schedule and scaler go on as they did from there."""
        if self._wrapper is None:
            return
        was_inside, was_skipped = then
        if self._inside:
            self._skip(was_skipped if was_inside else True)
            if not was_inside:
                self._update_scaler(by=-1)
        else:
            self._skip(False)
            if was_inside:
                self._update_scaler(by=1)
            if was_inside and not was_skipped and self._follows:
                self._advance()
        self._place = None

    def _skip(self, skipped: bool) -> None:
        """What the wrapper will say of the step that is being made; under a scaler it asks itself when it is over."""
        self._wrapper._is_overflow = skipped
        if self._scaler is not None and self._inside:
            self._wrapper._accelerate_step_called = not skipped

    def _update_scaler(self, *, by: int) -> None:
        """Make up for the update of a sound step, or take back beforehand the one that is to come."""
        if self._scaler is None:
            return
        state = self._scaler.state_dict()
        state["_growth_tracker"] += by
        if state["_growth_tracker"] == state["growth_interval"]:
            state["scale"] *= state["growth_factor"]
            state["_growth_tracker"] = 0
        self._scaler.load_state_dict(state)

    def _advance(self) -> None:
        gradients = self._scheduler.gradient_state if self._scheduler is not None else None
        if gradients is None or self._scheduler is None:
            return
        syncs = gradients.sync_gradients
        gradients._set_sync_gradients(True)
        try:
            self._scheduler.step()
        finally:
            gradients._set_sync_gradients(syncs)
