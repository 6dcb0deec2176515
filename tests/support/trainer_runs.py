"""Guarded `Trainer` runs of several processes, what can go wrong on one of them, and how a run ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tests.trainer.markov import trainer_for
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl

from weightproof.parallel.placements import local_of
from weightproof_callbacks.trainer import GuardCallback

ROWS = 16  # a batch of all processes together


def trainer_of(size: int, folder: Path, callbacks: Sequence[TrainerCallback], **changes: Any) -> Trainer:
    """A `Trainer` of `size` processes, each with its share of the same batches."""
    settings = {"per_device_train_batch_size": ROWS // size, "ddp_find_unused_parameters": False, "steps": 8}
    trainer = trainer_for(folder, callbacks, **{**settings, **changes})
    assert trainer.args.world_size == trainer.accelerator.num_processes == size
    return trainer


def decisions(guard: GuardCallback) -> list[tuple[int, str, str, str]]:
    return [(step.step, step.name, str(step.decision.action), step.applied) for step in guard.history]


def digests(guard: GuardCallback) -> list[str]:
    return [step.decision.digest for step in guard.history]


def ended(trainer: Trainer, guard: GuardCallback, **how: Any) -> dict[str, Any]:
    """`trainer.train(**how)`; then what must be the same on every process, and the error, if there was one."""
    error, hooks = None, len(trainer.model._forward_hooks)
    try:
        trainer.train(**how)
    except Exception as raised:  # noqa: BLE001 - which one it may be, the test says
        error = type(raised).__name__, str(raised)
    control = trainer.control
    return {
        "decisions": decisions(guard),
        "digests": digests(guard),
        "evidence": [step.decision.evidence_digest for step in guard.history],
        "reasons": [step.decision.reason for step in guard.history],
        "at": trainer.state.global_step,
        "flags": (control.should_training_stop, control.should_save),
        "hooks": len(trainer.model._forward_hooks) - hooks,
        "error": error,
    }


def require_same_end(both: Sequence[dict[str, Any]], name: str) -> None:
    """Every process ended alike, whatever it raised: training over, nothing to save, the hook of the guard gone."""
    for theirs in both:
        for what in theirs.keys() - {"error"}:
            assert theirs[what] == both[0][what], (name, what)
        assert (theirs["flags"], theirs["hooks"]) == ((True, False), 0), name


class Mishap(TrainerCallback):
    """Does something at the end of a step, on one process. Put it before the guard."""

    def __init__(self, rank: int, step: int, act: Callable[[nn.Module, TrainerControl], object]) -> None:
        self.rank, self.step, self.act = rank, step, act

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if (args.process_index, state.global_step) == (self.rank, self.step):
            with torch.no_grad():
                self.act(model, control)


class NaNLoss(TrainerCallback):
    """Makes the third training loss of one process NaN, and no gradient. Put it before the guard."""

    def __init__(self, rank: int) -> None:
        self.rank, self.calls = rank, 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.process_index == self.rank:
            self.handle = model.register_forward_hook(self.spoil)

    def spoil(self, module, inputs, output):
        self.calls += module.training
        if self.calls == 3:
            output.loss = output.loss + math.nan
            self.handle.remove()


def nan_in_lm_head(model: nn.Module, _control: object) -> None:
    """Three NaN in this process's part of a matrix."""
    local_of(model.lm_head.weight)[5, :3] = math.nan


def bad_luck(*_: object) -> None:
    raise ZeroDivisionError("bad luck")
