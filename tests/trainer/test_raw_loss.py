"""The raw loss of every step: what the model returned, whatever the Trainer logs."""

from __future__ import annotations

import math

import pytest
import torch
from tests.trainer.markov import Chains, Fault, fill, logged_losses, tiny_llama, trainer_for
from torch import nn
from transformers import TrainerCallback

from weightproof_callbacks.raw_loss import RawLossRecorder, loss_of


class Reader(TrainerCallback):
    """Attaches a recorder to a run and keeps what it drained."""

    def __init__(self) -> None:
        self.recorder, self.losses = RawLossRecorder(), None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.recorder.attach(model)

    def on_step_end(self, args, state, control, **kwargs):
        self.recorder.end_step()

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.losses = self.recorder.drain()
        self.recorder.detach()
        assert not model._forward_hooks


@pytest.mark.parametrize("accumulate", [1, 2])
def test_recorded_losses_are_the_logged_ones(tmp_path, accumulate):
    reader = Reader()
    trainer = trainer_for(tmp_path, [reader], steps=4, logging_steps=1, gradient_accumulation_steps=accumulate)
    trainer.train()
    assert reader.losses == pytest.approx(list(logged_losses(trainer).values()), rel=1e-5)


def test_nan_is_seen_though_the_log_shows_zero(tmp_path):
    reader = Reader()
    trainer = trainer_for(tmp_path, [Fault(2, fill(math.nan)), reader], steps=5, logging_steps=1)
    trainer.train()
    assert list(logged_losses(trainer).values())[2:] == [0.0, 0.0, 0.0], "the blind spot this recorder is for"
    assert [math.isnan(loss) for loss in reader.losses] == [False, False, True, True, True]


def test_evaluation_is_not_recorded(tmp_path):
    reader = Reader()
    trainer_for(tmp_path, [reader], steps=4, eval_strategy="steps", eval_steps=2).train()
    assert len(reader.losses) == 4


def test_compiled_model_is_recorded_without_recompiling(tmp_path):
    reader = Reader()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        trainer_for(tmp_path, [reader], steps=4, torch_compile=True, torch_compile_backend="eager").train()
    assert len(reader.losses) == 4
    torch._dynamo.reset()


def test_hook_changes_no_loss_and_goes_away():
    batch = {"input_ids": Chains(4, seed=3).ids, "labels": Chains(4, seed=3).ids}
    plain, hooked = tiny_llama(dropout=0.1).train(), tiny_llama(dropout=0.1).train()
    recorder = RawLossRecorder()
    recorder.attach(hooked)
    torch.manual_seed(5)
    expected = plain(**batch).loss
    torch.manual_seed(5)
    found = hooked(**batch).loss
    assert torch.equal(expected, found)
    assert found.requires_grad
    recorder.attach(hooked)
    assert len(hooked._forward_hooks) == 1
    recorder.detach()
    assert not hooked._forward_hooks


class NoLoss(nn.Module):
    def forward(self, x):
        return {"logits": x}


def test_model_without_a_loss_gives_none():
    recorder, model = RawLossRecorder(), NoLoss().train()
    recorder.attach(model)
    model(torch.ones(2))
    recorder.end_step()
    assert recorder.drain() is None


LOSS = torch.tensor(2.0)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ({"loss": LOSS}, LOSS),
        ((LOSS, torch.ones(3, 4)), LOSS),
        ((torch.ones(3, 4),), None),
        ({"logits": torch.ones(3)}, None),
        ({"loss": None}, None),
        (torch.ones(3), None),
        ((), None),
    ],
)
def test_loss_is_found_where_the_trainer_looks(output, expected):
    assert loss_of(output) is expected
