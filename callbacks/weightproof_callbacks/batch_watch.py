"""The batches of a run of several processes, compared by digest at every check.

A hook on the model sees every batch that is trained on, wherever the loop took it from. Accelerate knows which pass
over which data it belongs to, and whether it is the last one of it. Batches of loaders that accelerate did not
prepare, and of data that are only streamed, prove nothing (`weightproof.parallel.run_agreement.proven_skew`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from weightproof.collective import Processes
from weightproof.parallel.run_agreement import Given, Skew, proven_skew, row_digests, shared_batches

logger = logging.getLogger("weightproof")

__all__ = ["BatchWatch"]


class BatchWatch:
    """Notes the batches that this process trains on. With one process there is nothing to compare, and no hook.

    Args:
        model: The model, without wrappers.
        processes: Of the run.
    """

    def __init__(self, model: nn.Module, processes: Processes) -> None:
        self._processes = processes
        self._given: list[Given] = []
        self._before: list[Given] = []  # of the window before: its last place is judged now
        self._count = 0  # batches before those
        self._groups: tuple[tuple[int, ...], ...] | None = None
        self._passes = 0
        self._ended = False
        self._told: set[str] = set()
        self._handle: Any = None
        if processes.size > 1:
            # Not traced: under torch.compile a growing list would cause a recompilation at every step.
            hook: Any = torch.compiler.disable(self._note)
            self._handle = model.register_forward_pre_hook(hook, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook away."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def forget(self) -> None:
        """What was given so far may come again: the run was taken back, or a checkpoint was loaded."""
        self._count += len(self._before) + len(self._given)
        self._given.clear()
        self._before.clear()

    def disagreements(self) -> tuple[str, ...]:
        """What is proven to be wrong with the batches since the last check, the same on every rank."""
        if self._handle is None:
            return ()
        now, self._given = self._given, []
        ours = [*self._before, *now]
        whole = self._processes.gather("digests of the batches", [replace(one, rows=()) for one in ours])
        if self._groups is None and all(whole):
            self._groups = shared_batches(whole)
            self._tell_shared(self._groups)
        skew = Skew() if self._groups is None else proven_skew(whole, self._groups, self._count)
        if skew.unproven and self._groups is not None:  # rare: their rows tell whether the data repeat themselves
            whole = self._processes.gather("digests of the rows of the batches", ours)
            skew = proven_skew(whole, self._groups, self._count)
        self._count += len(self._before)
        self._before = now
        if skew.unproven:
            self._tell("unproven", f"batches differ from what they should be, or are meant to: {skew.unproven[0]}")
        return skew.proven

    def _tell_shared(self, groups: tuple[tuple[int, ...], ...]) -> None:
        if len(groups) == 1:
            self._tell(
                "shared",
                "every process is given the same batches: that is right for tensor parallelism, else the loader is not "
                "sharded and all but one of them train in vain",
            )

    def _tell(self, topic: str, message: str) -> None:
        if self._processes.is_main and topic not in self._told:
            logger.warning("%s", message)
        self._told.add(topic)

    # -- what the model is given ---------------------------------------------------------------

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        batch = [one for one in (*args, *(kwargs[key] for key in sorted(kwargs))) if _is_data(one)]
        passing, is_last = self._position()
        self._given.append(Given(*row_digests(batch), passing, is_last))

    def _position(self) -> tuple[int | None, bool]:
        """Which pass over data that have every row once, None for any other; and whether this batch ends it."""
        state = GradientState()
        is_last = bool(state.end_of_dataloader)
        if self._ended and not is_last:
            self._passes += 1
        self._ended = is_last
        loader = state.active_dataloader
        data = getattr(loader, "dataset", None)
        known = loader is not None and data is not None and not isinstance(data, IterableDataset)
        return (self._passes if known else None), is_last


def _is_data(value: Any) -> bool:
    """Whether an argument of the model is data: no number that is the same for all rows, and nothing to be trained."""
    if isinstance(value, Tensor):
        return value.dim() > 0 and not value.requires_grad
    return isinstance(value, Mapping | list | tuple)
