"""A `Trainer` run that suffers a fault and goes back equals, bit for bit, a twin that never suffered it."""

from __future__ import annotations

import pytest
import torch
from tests.support.chains import Chains
from tests.support.transactions import BACK, SAFE, dropout_llama, require_batches, require_twins
from tests.support.twin_loops import trained
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from weightproof_callbacks.trainer_mixin import GuardedTrainerMixin

KINDS = {
    "foreach-bf16": {"optim": "adamw_torch", "dtype": torch.bfloat16},
    "fused": {"optim": "adamw_torch_fused"},
}


@pytest.mark.parametrize("data", ["replay", "skip"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_taken_back_equals_its_twin(kind, data, tmp_path):
    order = {"train_sampling_strategy": "sequential"}
    ours = trained(data, tmp_path, **KINDS[kind], **order)
    twin = trained(None, tmp_path, skipped=data == "skip", **KINDS[kind], **order)
    require_twins(ours, twin)
    require_batches(data, ours, twin)


def test_the_window_is_replayed_across_the_end_of_a_shuffled_epoch(tmp_path):
    """5 steps an epoch, which Trainer counts: each later epoch begins before the last batches of the one before."""
    ours, twin = (trained(data, tmp_path, rows=40) for data in ("replay", None))
    require_twins(ours, twin)
    require_batches("replay", ours, twin)
    assert set(twin.seen[:10]) != set(twin.seen[10:])


def test_a_resumed_run_is_taken_back_like_any_other(tmp_path):
    """Trainer makes another loader for what is left of the epoch in which a run is resumed."""
    trained(None, tmp_path, rows=120, max_steps=3, save_strategy="steps", save_steps=3)
    resume = str(tmp_path / "checkpoint-3")
    ours, twin = (trained(data, tmp_path, rows=120, resume=resume) for data in ("replay", None))
    require_twins(ours, twin)
    done = 3 * 2
    assert ours.seen == twin.seen[: BACK * 2 - done] + twin.seen[SAFE * 2 - done :]


class Bound(TrainerCallback):
    """Notes what it is given."""

    def bind(self, trainer):
        self.trainer, self.norms = trainer, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.norms.append(float(self.trainer.last_grad_norm))


def test_the_mixin_gives_callbacks_what_events_do_not(tmp_path):
    class Mine(GuardedTrainerMixin, Trainer):
        pass

    bound, patience = Bound(), EarlyStoppingCallback(2)
    trainer = Mine(
        model=dropout_llama(),
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, max_grad_norm=1e-3,
            eval_strategy="steps", eval_steps=1, save_strategy="no", metric_for_best_model="loss", logging_steps=1,
        ),
        train_dataset=Chains(32, seed=1), eval_dataset=Chains(8, seed=2), callbacks=[bound, patience],
    )  # fmt: skip
    trainer.train()
    logged = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert bound.norms == pytest.approx(logged)
    assert min(logged) > 1e-3, "before clipping"

    state = trainer.capture_training_state(device="cpu")
    (callback,) = [words for words in state.covered if "EarlyStoppingCallback" in words]
    assert callback.startswith("callback ")
    assert {"best model so far", "data position"} <= set(state.covered)
    best = (trainer.state.best_metric, trainer.state.best_global_step)
    trainer.state.best_metric, trainer.state.best_global_step = 9.0, 7
    patience.early_stopping_patience_counter = 2
    trainer.state.log_history.append({"loss": 1.0})
    state.restore("replay")
    assert (trainer.state.best_metric, trainer.state.best_global_step) == best
    assert patience.early_stopping_patience_counter == 0
    assert trainer.state.log_history[-1] == {"loss": 1.0}, "what happened stays in the log"
    assert trainer.state.global_step == 2
