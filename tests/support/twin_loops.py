"""Twins in a loop of a user's own on Accelerate, and in a `Trainer`: in one process or in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tests.support.accelerate_loop import fresh_accelerate
from tests.support.chains import Chains
from tests.support.transactions import (
    STEPS,
    WINDOW,
    Outcome,
    Seen,
    Transaction,
    TransactionCallback,
    dropout_llama,
    outcome,
    warmup,
    without_window,
)
from torch.utils.data import DataLoader, Subset
from transformers import TrainingArguments, set_seed

from weightproof_callbacks.trainer_mixin import GuardedTrainer
from weightproof_callbacks.training_state import ReplayableLoader, TrainingState

ACCUMULATION = 2
ROWS = 4  # of one micro-batch on one process


def loop(
    data: str | None,
    *,
    processes: int = 1,
    dtype: torch.dtype = torch.float32,
    rows: int = 512,
    order: str = "sequential",
    draws: bool = True,
    inside: bool = False,
    skipped: bool = False,
    model: torch.nn.Module | None = None,
    **settings: Any,
) -> Outcome:
    """Train on Accelerate.

    Args:
        data: What a disturbed run does with the batches of the window; None: the run is not disturbed.
        processes: How many there are.
        dtype: Of the weights.
        rows: Of the data set; fewer than are needed begin another epoch.
        order: "sequential", or drawn from the "global" generators or from one of the loader's "own".
        draws: Whether the fault draws numbers out of turn.
        inside: Act inside of `optimizer.step()`, before the schedule steps, as a hook of the optimizer does.
        skipped: Leave the rows of the window out of the data set.
        model: Already sharded, so that the Accelerator leaves it alone.
        settings: Of AdamW.
    """
    fresh_accelerate()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    own = model if model is not None else dropout_llama(dtype)
    set_seed(1 + accelerator.process_index)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2, **settings)
    dataset = _dataset(rows, processes, skipped)
    generator = torch.Generator().manual_seed(5) if order == "own" else None
    loader = DataLoader(dataset, batch_size=ROWS, shuffle=order != "sequential", generator=generator)
    scheduler = warmup(optimizer)
    if model is None:
        own, optimizer, loader, scheduler = accelerator.prepare(own, optimizer, loader, scheduler)
    else:
        optimizer, loader, scheduler = accelerator.prepare(optimizer, loader, scheduler)
    batches = ReplayableLoader(loader)
    plain = accelerator.unwrap_model(own)
    seen = Seen(plain)

    def capture() -> TrainingState:
        return TrainingState.capture(optimizer=optimizer, scheduler=scheduler, loader=batches)

    transaction = None if data is None else Transaction(plain, optimizer, capture, data, draws)
    total, done = STEPS + (0 if data is None else WINDOW), 0
    if transaction is not None and inside:
        torch_optimizer: Any = getattr(optimizer, "optimizer", optimizer)
        torch_optimizer.register_step_post_hook(lambda *_: transaction.after(done + 1))
    own.train()
    while done < total:
        for batch in batches:
            with accelerator.accumulate(own):
                accelerator.backward(own(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(own.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                done += 1
                if transaction is not None and not inside:
                    transaction.after(done)
            if done == total:
                break
    return outcome(plain, TrainingState.capture(optimizer=optimizer, scheduler=scheduler), seen)


def trained(
    data: str | None,
    folder: Path,
    *,
    processes: int = 1,
    dtype: torch.dtype = torch.float32,
    rows: int = 512,
    skipped: bool = False,
    model: torch.nn.Module | None = None,
    resume: str | None = None,
    **settings: Any,
) -> Outcome:
    """Train by `Trainer`; arguments as of `loop`, `settings` of `TrainingArguments`."""
    fresh_accelerate()
    dataset = _dataset(rows, processes, skipped)
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS + (0 if data is None else WINDOW), "report_to": [],
        "per_device_train_batch_size": ROWS, "gradient_accumulation_steps": ACCUMULATION, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 8, "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "seed": 3, "dataloader_pin_memory": False, "ddp_find_unused_parameters": False,
    }  # fmt: skip
    own = model if model is not None else dropout_llama(dtype)
    trainer = GuardedTrainer(
        model=own,
        args=TrainingArguments(**{**arguments, **settings}),
        train_dataset=dataset,
        callbacks=[TransactionCallback(data)],
    )
    assert trainer.args.world_size == processes
    set_seed(1 + trainer.args.process_index)
    seen = Seen(own)
    trainer.train(resume_from_checkpoint=resume)
    return outcome(own, trainer.capture_training_state(), seen)


def _dataset(rows: int, processes: int, skipped: bool) -> Any:
    whole = Chains(rows, seed=1)
    return Subset(whole, without_window(rows, ROWS * ACCUMULATION * processes)) if skipped else whole
