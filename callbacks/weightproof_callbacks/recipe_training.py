"""The trainers of recipes: all weights, or a LoRA adapter beside them, with `Trainer` under `GuardCallback`."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments
from transformers import Trainer as HuggingFaceTrainer

from weightproof.errors import InputError
from weightproof.folders.text_data import read_examples
from weightproof.lora.adapters import record_base
from weightproof.procedure.training_job import Trained, TrainingJob
from weightproof.types import Action
from weightproof_callbacks.trainer import GuardCallback

# Of a text longer than the training, the part that is read.
_SPARE = 4


@dataclass(frozen=True, kw_only=True)
class FullTraining:
    """All weights, AdamW, a linear schedule after warm-up.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Of AdamW.
        batch_size: Windows a step.
        window: Tokens of a window.
        warmup_steps: Steps until the learning rate is reached.
        weight_decay: Of AdamW.
        seed: Of data order and generators.
        schedule: A schedule of edits, such as `GradualPruning`.

    Raises:
        InputError: If a number is out of range, or the schedule ends after the training.
    """

    steps: int
    learning_rate: float = 5e-4
    batch_size: int = 8
    window: int = 128
    warmup_steps: int = 0
    weight_decay: float = 0.0
    seed: int = 0
    schedule: Any = None

    changes_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, least in (("steps", 1), ("batch_size", 1), ("window", 2), ("warmup_steps", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be {least} or more, not {getattr(self, name)}")
        if not self.learning_rate > 0.0:
            raise InputError(f"learning_rate must be above 0, not {self.learning_rate}")
        if self.schedule is not None and self.schedule.end > self.steps:
            raise InputError(f"the schedule ends at step {self.schedule.end} and the training at step {self.steps}")

    def train(self, job: TrainingJob) -> Trained:
        """Train all weights."""
        flags = _flags(job.model)
        try:
            return self._trained(job.model, job)
        finally:
            _put_flags_back(flags)

    def _trained(self, model: nn.Module, job: TrainingJob) -> Trained:
        guard = GuardCallback(
            job.policy,
            retain=job.retain,
            trackers=["jsonl"],
            output_dir=job.folder / "weightproof",
            **dict(job.guard),
        )
        scheduled = [] if self.schedule is None else [self.schedule.attach(guard)]
        callbacks: list[TrainerCallback] = [guard, *scheduled]
        scratch = job.folder / "trainer"
        trainer = HuggingFaceTrainer(
            model=model,
            args=self._arguments(scratch, model, job),
            train_dataset=_Windows(self._windows(job)),
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        if not job.progress:
            trainer.remove_callback(ProgressCallback)
        trainer.train()
        model.eval()
        shutil.rmtree(scratch, ignore_errors=True)
        halted = [one.decision.reason for one in guard.history if one.decision and one.decision.action is Action.HALT]
        notes = tuple(one.in_words() for one in scheduled if hasattr(one, "in_words"))
        return Trained(guard.history, int(trainer.state.global_step), halted[0] if halted else None, notes=notes)

    def _arguments(self, scratch: Path, model: nn.Module, job: TrainingJob) -> TrainingArguments:
        on_cpu = next(model.parameters()).device.type == "cpu"
        return TrainingArguments(
            output_dir=str(scratch),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            use_cpu=on_cpu,
            seed=self.seed,
            data_seed=self.seed,
            logging_steps=max(1, self.steps // 10),
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=not on_cpu,
            disable_tqdm=not (job.progress and sys.stderr.isatty()),
        )

    def _windows(self, job: TrainingJob) -> torch.Tensor:
        """Token windows of the text, (num_windows, window), no more than the training can use."""
        wanted = self.steps * self.batch_size * self.window * _SPARE
        ids: list[int] = []
        for example in read_examples(job.text, job.encode, name="train"):
            ids += [int(token) for token in example["input_ids"]]
            if len(ids) >= wanted:
                break
        count = len(ids) // self.window
        if count < self.batch_size:
            raise InputError(
                f"{job.text} gives {count} windows of {self.window} tokens, fewer than one batch of {self.batch_size}: "
                "give more text with --set data.train=FILE, or a smaller window"
            )
        return torch.tensor(ids[: count * self.window]).view(count, self.window)


@dataclass(frozen=True, kw_only=True)
class LoraTraining(FullTraining):
    """A LoRA adapter (PEFT) beside the weights, which stay what they were, bit for bit.

    Attributes:
        r: Rank.
        lora_alpha: The delta is lora_alpha / r times B A.
        lora_dropout: On the input of A.
        target_modules: Names of the layers; None: every linear layer but the head.
        use_dora: Whether magnitudes are learned apart (DoRA).
        use_rslora: Whether the scale is lora_alpha / sqrt(r).
    """

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    use_dora: bool = False
    use_rslora: bool = False

    changes_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        if self.r < 1:
            raise InputError(f"r must be 1 or more, not {self.r}")
        if self.schedule is not None:
            raise InputError("a schedule edits the weights, which LoRA leaves alone: use train: full")

    def train(self, job: TrainingJob) -> Trained:
        """Train an adapter, write it to `adapter` in the job's folder, and take it off the model."""
        import peft

        flags = _flags(job.model)
        targets: Sequence[str] | str = list(self.target_modules) if self.target_modules else "all-linear"
        config = peft.LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,  # pyright: ignore[reportArgumentType] - any number will do
            lora_dropout=self.lora_dropout,
            target_modules=targets,  # pyright: ignore[reportArgumentType]
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            task_type="CAUSAL_LM",
        )
        try:
            with warnings.catch_warnings():  # PEFT asks transformers for what it calls by another name by now
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
                adapted = peft.get_peft_model(job.model, config)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            _put_flags_back(flags)
            raise InputError(f"target_modules: {str(error).splitlines()[0]}") from error
        try:
            trained = self._trained(adapted, job)
            folder = job.folder / "adapter"
            adapted.save_pretrained(str(folder), safe_serialization=True)
        finally:
            adapted.unload()  # pyright: ignore[reportCallIssue] - the original layers go back to their places
            _put_flags_back(flags)
            job.model.eval()
        record_base(folder, job.model)  # PEFT notes the base's path, which says little on another machine
        return Trained(trained.history, trained.steps, trained.halted, folder)


def _flags(model: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    """Which parameters ask for gradients."""
    return [(parameter, parameter.requires_grad) for parameter in model.parameters()]


def _put_flags_back(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, asked in flags:
        parameter.requires_grad_(asked)
        parameter.grad = None


class _Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows as Trainer wants them: the labels are the tokens themselves."""

    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Tokens of one window, twice."""
        return {"input_ids": self._ids[index], "labels": self._ids[index]}
