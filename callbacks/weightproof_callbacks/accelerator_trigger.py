"""When an optimizer step is over: the moment at which a guard may read the weights, and take them back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from weightproof_callbacks.accelerator_checks import engine_of, torch_optimizer


class StepTrigger:
    """Calls `act` once after every optimizer step that changed weights.

    A torch optimizer calls its post-hook inside `step()`, after the last parameter is written; steps
    that gradient accumulation or a gradient scaler leave out do not call it. A DeepSpeed engine steps
    by itself, part by part, so there the next forward pass in training mode is the first moment at
    which a step is known to be over; `catch_up()` looks before anything else is judged or saved.

    Once weights are broken, a gradient scaler skips every step: no hook would ever be called again. So
    where there is a scaler, `stalled` is called after `patience` forward passes without a step.

    Args:
        model: The model, as `accelerator.prepare` returned it.
        optimizer: The optimizer, as `prepare` returned it, or None: then nothing is triggered.
        act: What to do after each step. What it raises leaves `optimizer.step()`.
        stalled: What to do when no step was done for long, before a forward pass.
        patience: For how many forward passes in training mode.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        act: Callable[[], None],
        *,
        stalled: Callable[[], None] | None = None,
        patience: int = 0,
    ) -> None:
        self._act = act
        self._stalled = stalled
        self._patience = patience
        self._passes = 0
        self._optimizer = optimizer
        self._engine = None if optimizer is None else engine_of(model)
        self._seen = 0 if self._engine is None else self._engine.global_steps
        self._handles: list[Any] = []
        if self._engine is not None:
            self._handles.append(self._engine.register_forward_pre_hook(self._before_forward))
        elif optimizer is not None:
            self._handles.append(torch_optimizer(optimizer).register_step_post_hook(self._after_step))
            if stalled is not None and getattr(optimizer, "scaler", None) is not None:
                self._handles.append(model.register_forward_pre_hook(self._count_pass))

    def catch_up(self) -> None:
        """Act for a step that is over but was not noticed yet."""
        while self._engine is not None and self._seen < self._engine.global_steps:
            self._seen += 1
            self._act()

    def forget(self) -> None:
        """Take the engine's present count of steps as noticed (it was loaded from a checkpoint)."""
        self._passes = 0
        if self._engine is not None:
            self._seen = self._engine.global_steps

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _before_forward(self, module: torch.nn.Module, _args: Any) -> None:
        if module.training:
            self.catch_up()

    def _count_pass(self, module: torch.nn.Module, _args: Any) -> None:
        if not module.training or self._stalled is None:
            return
        self._passes += 1
        if self._passes > self._patience:
            self._passes = 1
            self._stalled()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if only_fills_its_state(optimizer):
            return
        self._passes = 0
        try:
            self._act()
        except BaseException:
            # The error skips the scaler's update, without which the next step would take gradients as
            # unscaled that are not. The step itself is over.
            scaler = getattr(self._optimizer, "scaler", None)
            if scaler is not None:
                scaler.update()
            raise


def only_fills_its_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this step is the dry run by which torch's checkpoints fill the state of an optimizer that has none.

    It is told by its caller: learning rates of 0 are also what many schedules begin with, and whether all
    gradients are 0 is not for each process to say about its own part.
    """
    rates = [group.get("lr", 1.0) for group in optimizer.param_groups]
    on_host = (rate for rate in rates if not isinstance(rate, torch.Tensor) or rate.device.type == "cpu")
    if [float(rate) for rate in on_host] != [0.0] * len(rates):
        return False
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_init_optim_state":
        frame = frame.f_back
    return frame is not None
