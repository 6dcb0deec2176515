"""`GuardedTrainerMixin`: gives a guard what the events of a `Trainer` do not, such as batches and other callbacks.

    >>> class MyTrainer(GuardedTrainerMixin, Trainer): ...                      # doctest: +SKIP
    >>> trainer = GuardedTrainer(model, args, callbacks=[GuardCallback()])      # doctest: +SKIP

A callback is handed model, optimizer and scheduler, and can restore those. It cannot give batches again, nor
reach gradients before they are clipped, the gradient scaler, or the state of the other callbacks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState, TrainerControl

from weightproof_callbacks.data_position import BatchMemory
from weightproof_callbacks.training_state import TrainingState

__all__ = ["BestModel", "CallbackState", "GuardedTrainer", "GuardedTrainerMixin"]

# Stands for the checkpoint that Trainer resumes from, where the guard's state on disk is what the run goes on from.
_GOOD_STATE = "weightproof-good-state"
_BEST = ("best_metric", "best_global_step", "best_model_checkpoint")


class GuardedTrainerMixin(Trainer if TYPE_CHECKING else object):
    """Put before `Trainer` (or a subclass of it) in the bases of a class.

    Every callback with a method `bind(trainer)` is bound when training begins.

    Attributes:
        batches: Remembers batches; a guard marks, rewinds and skips in it.
        last_grad_norm: Norm of the gradients of the last optimizer step before clipping; None before the first,
            and where Trainer did not compute it.
    """

    batches: BatchMemory
    last_grad_norm: float | torch.Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches = BatchMemory()
        self.last_grad_norm = None
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`."""
        self.batches = BatchMemory()
        for callback in self.callback_handler.callbacks:
            bind = getattr(callback, "bind", None)
            if callable(bind):
                bind(self)
        return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """As `Trainer.get_batch_samples`, with batches that are to be given again before new ones."""
        stream = self.batches.over(epoch_iterator, self.callback_handler.train_dataloader)
        return super().get_batch_samples(stream, num_batches, device)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer._run_epoch`; a run that goes on from disk goes on in the pass and at the batch where it was."""
        place, epoch = self.batches.places.resuming, kwargs["epoch"]
        if place is not None and epoch < place.epoch:
            return None
        if place is not None:
            rest = {"epochs_trained": epoch, "steps_trained_in_current_epoch": place.batch}
            kwargs = {**kwargs, **rest, "resume_from_checkpoint": _GOOD_STATE}
        is_rest = epoch == kwargs["epochs_trained"] and kwargs["resume_from_checkpoint"] is not None
        skipped = kwargs["steps_trained_in_current_epoch"] if is_rest and not self.args.ignore_data_skip else 0
        self.batches.places.begin_pass(epoch, skipped)
        return super()._run_epoch(*args, **kwargs)

    @property
    def data_begins_anew(self) -> str | None:
        """Why a run that goes on from disk cannot be given the batches that come next; None where it is."""
        if self.args.ignore_data_skip:
            return "ignore_data_skip is set"
        if not hasattr(Trainer, "_run_epoch"):
            return "this version of Trainer does not say when it begins a pass over its data"
        return None

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        self.last_grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.last_grad_norm

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint == _GOOD_STATE:  # its generators are put back with its first batch
            return
        super()._load_rng_state(checkpoint)
        for callback in self.callback_handler.callbacks if checkpoint is not None else ():
            loaded = getattr(callback, "generators_loaded", None)
            if callable(loaded):
                loaded()

    def training_parts(self) -> dict[str, Any]:
        """What Trainer and its callbacks keep, each with `state_dict` and `load_state_dict`, by name for people."""
        parts: dict[str, Any] = {"best model so far": BestModel(self)}
        for i, callback in enumerate(self.callback_handler.callbacks):
            if isinstance(callback, ExportableState) and not isinstance(callback, TrainerControl):
                parts[f"callback {i} {type(callback).__name__}"] = CallbackState(callback)
        return parts

    def capture_training_state(self, device: torch.device | str | None = None, **more: Any) -> TrainingState:
        """`TrainingState.capture` of this run, all that it needs found; call it between two steps.

        Args:
            device: As in `TrainingState.capture`.
            more: Further arguments of it (`extra`, `generators`).
        """
        extra = {**self.training_parts(), **more.pop("extra", {})}
        return TrainingState.capture(
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            scaler=self.accelerator.scaler,
            loader=self.batches,
            extra=extra,
            device=device,
            **more,
        )


class GuardedTrainer(GuardedTrainerMixin, Trainer):
    """A `Trainer` whose guard can restore all of a run."""


class BestModel:
    """Which model was the best so far, of `TrainerState`. Steps, logs and counts tell what was done, and stay."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def _state(self) -> TrainerState:
        return self._trainer.state

    def state_dict(self) -> dict[str, Any]:
        """What is kept."""
        return {name: getattr(self._state, name) for name in _BEST}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put it back."""
        vars(self._state).update(state)


class CallbackState:
    """What a stateful callback (`ExportableState`) says of itself, put back into the same object."""

    def __init__(self, callback: Any) -> None:
        self._callback = callback

    def state_dict(self) -> dict[str, Any]:
        """What is kept: arguments and attributes."""
        state = self._callback.state()
        return copy.deepcopy({"args": state["args"], "attributes": state["attributes"]})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put it back; an argument is written where the callback has an attribute of its name."""
        own = vars(self._callback)
        own.update({name: value for name, value in state["args"].items() if name in own})
        own.update(state["attributes"])
