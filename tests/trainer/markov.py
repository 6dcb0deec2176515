"""Helpers to train a tiny Llama on its Markov chain with `Trainer`, under guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tests.support.chains import Chains, tiny_llama
from transformers import Trainer, TrainerCallback, TrainingArguments


def trainer_for(
    folder: Path, callbacks: Sequence[TrainerCallback], *, model: Any = None, steps: int = 80, **changes: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 16, "learning_rate": 5e-3,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "logging_steps": 5, "save_strategy": "no",
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0, "dataloader_pin_memory": False,
    }  # fmt: skip
    return Trainer(
        model=model if model is not None else tiny_llama(),
        args=TrainingArguments(**{**settings, **changes}),
        train_dataset=Chains(512, seed=1),
        eval_dataset=Chains(64, seed=2),
        callbacks=list(callbacks),
    )


def held_out_loss(model: torch.nn.Module) -> float:
    batch = Chains(64, seed=2).ids
    model.eval()
    with torch.no_grad():
        return float(model(input_ids=batch, labels=batch).loss)


def logged_losses(trainer: Trainer) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Fault(TrainerCallback):
    """Damages the weights after one step. Put it before the guard."""

    def __init__(self, step: int, damage: Callable[[torch.nn.Module], None]) -> None:
        self.step, self.damage = step, damage

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.damage(model)


class Recorder(TrainerCallback):
    """Copies the weights after each of some steps. Put it after the guard."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.seen, self.moments = steps, {}, {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step in self.steps:
            self.seen[state.global_step] = weights(model)
            self.moments[state.global_step] = len(optimizer.state)


def fill(value: float) -> Callable[[torch.nn.Module], None]:
    def damage(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            parameter.fill_(value)

    return damage


def scale(factor: float, only: str = "") -> Callable[[torch.nn.Module], None]:
    def damage(model: torch.nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.mul_(factor)

    return damage
