"""A small Llama-style language model: built from configuration, trained with Trainer, measured."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from weightproof_callbacks.commands.corpus import Windows


class TokenWindows(Dataset[dict[str, torch.Tensor]]):
    """Windows as Trainer wants them: the labels are the tokens themselves."""

    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Tokens of one window, twice."""
        return {"input_ids": self._ids[index], "labels": self._ids[index]}


class LossBar(TrainerCallback):
    """One progress bar with the last logged loss, instead of a line a log."""

    def __init__(self, says: str = "training under guard") -> None:
        self._says = says
        self._bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self._bar = tqdm(total=state.max_steps, desc=self._says, unit="step", file=sys.stderr)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show the loss, in nats per token."""
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix_str(f"loss {float(logs['loss']):.2f} nats/token")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


def build_model(config: Mapping[str, Any], *, vocab_size: int, window: int, seed: int) -> LlamaForCausalLM:
    """A randomly initialised Llama of the given sizes; the same seed gives the same weights."""
    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            **config,
            vocab_size=vocab_size,
            max_position_embeddings=window,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=None,
        )
    )


def make_trainer(  # noqa: PLR0913 - one place where the parts of a training run meet
    model: LlamaForCausalLM,
    windows: Windows,
    recipe: Mapping[str, Any],
    *,
    callbacks: Sequence[TrainerCallback],
    output_dir: Path,
    seed: int,
    report_to: Sequence[str] = (),
) -> Trainer:
    """A Trainer for a fixed number of steps: AdamW, cosine with warm-up, bf16 where the machine has it."""
    has_accelerator = torch.accelerator.is_available()
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=recipe["steps"],
        per_device_train_batch_size=recipe["batch_size"],
        learning_rate=recipe["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=recipe["warmup_steps"],
        weight_decay=recipe["weight_decay"],
        adam_beta2=recipe["adam_beta2"],
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=not has_accelerator,
        seed=seed,
        data_seed=seed,
        logging_steps=recipe["log_every"],
        save_strategy="no",
        report_to=list(report_to) or "none",
        run_name="weightproof-demo",
        remove_unused_columns=False,
        dataloader_pin_memory=has_accelerator,
        disable_tqdm=True,  # LossBar shows the same in one line
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=TokenWindows(windows.ids), callbacks=[*callbacks, LossBar()]
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, windows: Windows, batch_size: int = 16) -> float:
    """Held-out code length in bits per byte of text: sum of token NLL / (ln 2 * bytes).

    Args:
        model: A causal language model; its train/eval mode is left as found.
        windows: Held-out windows.
        batch_size: Windows a forward pass.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    nats = 0.0
    for batch in windows.ids.split(batch_size):
        ids = batch.to(device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    model.train(was_training)
    return nats / (math.log(2) * windows.num_bytes.sum().item())


def fastest_thread_count(seconds: float = 0.3) -> int:
    """All of torch's threads, or one where that is faster, measured on small matrix products.

    On a machine whose cores are busy with other work, threads that wait for each other at every
    small operation are several times slower than a single one.
    """
    allowed = torch.get_num_threads()
    if allowed == 1:
        return 1
    left, right = torch.randn(2048, 256), torch.randn(256, 672)
    speed: dict[int, float] = {}
    try:
        for count in (1, allowed):
            torch.set_num_threads(count)
            started, products = time.perf_counter(), 0
            while time.perf_counter() - started < seconds:
                torch.nn.functional.silu(left @ right)
                products += 1
            speed[count] = products / (time.perf_counter() - started)
    finally:
        torch.set_num_threads(allowed)
    return max(speed, key=lambda count: speed[count])
