"""A small Llama-style language model: built from configuration, trained with Trainer, measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from weightproof_callbacks.commands.corpus import Windows

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback


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


def build_model(config: Mapping[str, Any], *, vocab_size: int, window: int, seed: int) -> LlamaForCausalLM:
    """A randomly initialised Llama of the given sizes; the same seed gives the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

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
    from transformers import Trainer, TrainingArguments

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
    )
    return Trainer(model=model, args=arguments, train_dataset=TokenWindows(windows.ids), callbacks=list(callbacks))


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
