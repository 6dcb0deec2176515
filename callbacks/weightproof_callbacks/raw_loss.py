"""The raw training loss, read where the model returns it.

`Trainer` replaces a NaN or infinite loss by the mean of the earlier ones before it logs
(`logging_nan_inf_filter=True` is its default), so a model full of NaN logs a loss of 0.0. This
recorder reads the model's own output instead, without a device synchronisation in the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class RawLossRecorder:
    """Records the loss of every training step through one forward hook.

    A micro-batch loss is already divided by the items of the whole step when `Trainer` passes
    `num_items_in_batch` to the model; then a step's loss is the sum over its micro-batches, else
    their mean. Forward passes in eval mode (evaluation, a guard's own) are not recorded.
    """

    def __init__(self) -> None:
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self._micro_batches: list[torch.Tensor] = []
        self._divided_by_items = False
        self._shares = 1
        self._steps: list[torch.Tensor] = []

    def attach(self, model: nn.Module, *, shares: int = 1) -> None:
        """Install the hook on `model`, replacing an earlier one.

        Args:
            model: The model that returns the loss.
            shares: Over how many processes `num_items_in_batch` was added up. Each of them then returns
                its share of the loss, and the mean over processes of `shares` times that is the whole.
        """
        self.detach()
        self._shares = shares
        # Not traced: under torch.compile a growing list would cause a recompilation at every step.
        hook: Any = torch.compiler.disable(self._record)
        self._handle = model.register_forward_hook(hook, with_kwargs=True)

    def detach(self) -> None:
        """Remove the hook and forget what was not drained."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._micro_batches.clear()
        self._steps.clear()

    def add(self, loss: torch.Tensor | float) -> None:
        """Record the loss of one micro-batch that was computed outside of the model; its own is not read any more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            self._micro_batches.clear()
        self._divided_by_items = False
        self._micro_batches.append(torch.as_tensor(loss).detach().float().mean().clone())

    def end_step(self) -> None:
        """Close one optimizer step: its micro-batch losses become one loss."""
        if self._micro_batches:
            device = self._micro_batches[0].device
            losses = torch.stack([loss.to(device) for loss in self._micro_batches])
            self._steps.append(losses.sum() * self._shares if self._divided_by_items else losses.mean())
            self._micro_batches.clear()

    def drain(self) -> tuple[float, ...] | None:
        """Losses of the closed steps since the last call, oldest first (one synchronisation).

        None when no loss was seen: the model returns none, as when `Trainer` computes the loss
        itself (label smoothing, `compute_loss_func`).
        """
        if not self._steps:
            return None
        losses = tuple(torch.stack(self._steps).tolist())
        self._steps.clear()
        return losses

    def _record(self, module: nn.Module, _args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        loss = loss_of(output) if module.training else None
        if loss is not None:
            self._divided_by_items = kwargs.get("num_items_in_batch") is not None
            # A copy: compiled models may reuse the storage of their outputs at the next step.
            self._micro_batches.append(loss.detach().float().mean().clone())


def loss_of(output: Any) -> torch.Tensor | None:
    """The loss in a model output, where `Trainer` looks for it; None when there is none."""
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, tuple) and output:
        loss = output[0] if isinstance(output[0], torch.Tensor) and output[0].ndim == 0 else None
    else:
        loss = getattr(output, "loss", None)
    return loss if isinstance(loss, torch.Tensor) else None
