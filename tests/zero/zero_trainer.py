"""What one process does in the tests of `GuardCallback` in a Trainer that runs on DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from trained_models import calibration_windows, load
from zero_engines import Setup, join, largest, live_part, named

from weightproof import GuardCallback, edits
from weightproof_callbacks.sharded import find_masters


class Poison(transformers.TrainerCallback):
    """Ruins the masters before one step, as a step with NaN gradients does."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.at:
            return
        masters = find_masters(None, kwargs["model"], kwargs["optimizer"])
        assert masters is not None
        with torch.no_grad():
            for master in masters.tensors().values():
                master.mul_(float("nan"))


def trained(rank: int, size: int, setup: Setup, folder: str) -> dict[str, Any]:
    """Kept windows, a kept edit, a window that broke, and training after it."""
    join(size)
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        deepspeed=setup.config,
        use_cpu=True,
        bf16=setup.dtype is torch.bfloat16,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        max_steps=8,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    assert arguments.world_size == size
    data = [{"input_ids": row, "labels": row} for row in calibration_windows("llama")[0]["input_ids"]]
    guard = GuardCallback(every=2, edits={4: edits.RTN(8)}, retain=calibration_windows("llama"), rollback="weights")
    model = load("llama").model.to(setup.dtype)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[guard, Poison(at=5)])
    trainer.train()
    engine = trainer.model_wrapped
    masters = find_masters(trainer.accelerator, engine, trainer.optimizer)
    assert masters is not None
    broken = [step.record for step in guard.history if step.applied == "restored"]
    return {
        "engine": type(engine).__name__,
        "steps": engine.global_steps,
        "history": [(step.step, step.name, str(step.decision.action), step.applied) for step in guard.history],
        "cleared": [record.params.get("optimizer_states_cleared") for record in broken if record is not None],
        "stale": masters.stale(),
        "largest": largest(engine, "lm_head.weight"),
        "finite": all(bool(live_part(parameter).isfinite().all()) for parameter in named(engine).values()),
    }
