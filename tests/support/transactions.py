"""Twins: a run that suffers a fault and is taken back, beside one that never suffered it.

The small Llama has dropout, so that the random generators matter. `Transaction` is a guard without judgement: it
takes the safe point, does the damage and goes back at fixed steps, by the public parts alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tests.support.chains import VOCAB
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed

from weightproof.snapshot import Snapshot
from weightproof_callbacks.training_state import TrainingState

SAFE, FAULT, BACK = 4, 5, 6  # steps after which the safe point is taken, the damage is done, and the run goes back
STEPS = 10  # of the undisturbed twin
WINDOW = BACK - SAFE


def dropout_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_dropout=0.2, pad_token_id=None,
        bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def warmup(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate still rises at the safe point, and after it."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 8))


class Seen:
    """Digests of the batches that a model was given in training, in order."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.batches: list[str] = []
        self._handle = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            ids = args[0] if args else kwargs["input_ids"]
            self.batches.append(hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:12])

    def remove(self) -> list[str]:
        self._handle.remove()
        return self.batches


def damage(model: torch.nn.Module, optimizer: Any, *, draws: bool = True) -> None:
    """Noise in every weight, poisoned moments, a wrong learning rate, and numbers drawn out of turn."""
    inner = getattr(optimizer, "optimizer", optimizer)
    noise = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for parameter in model.parameters():
            local = _local(parameter)
            local.add_(torch.randn(local.shape, generator=noise).to(local.dtype))
        for state in inner.state.values():
            _local(state["exp_avg"]).fill_(1e3)
            _local(state["exp_avg_sq"]).fill_(float("nan"))
            state["step"] += 1000
    for group in inner.param_groups:
        group["lr"] = 7.0
    if draws:
        torch.rand(3)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what this process holds of the model."""
    return {name: _local(tensor).detach().clone() for name, tensor in model.state_dict().items()}


@dataclass
class Outcome:
    """What a run left behind."""

    weights: dict[str, torch.Tensor]
    state: str
    seen: list[str]
    moments: dict[str, torch.Tensor] = field(default_factory=dict)


def outcome(model: torch.nn.Module, state: TrainingState, seen: Seen) -> Outcome:
    """Digest of moments, schedule and generators; the moments again as numbers, so that a failure can be read."""
    moments = {name: tensor.clone() for name, tensor in state.tensors().items() if "exp_avg" in name}
    assert moments
    return Outcome(weights_of(model), state.digest, seen.remove(), moments)


def require_twins(ours: Outcome, twin: Outcome) -> None:
    """Weights, moments, schedule and generators are the same bits."""
    for left, right in ((ours.weights, twin.weights), (ours.moments, twin.moments)):
        assert left.keys() == right.keys()
        different = [name for name in left if not torch.equal(left[name], right[name])]
        assert not different, f"other bits than its twin: {different}"
    assert ours.state == twin.state, "schedule or generators stand elsewhere than its twin's"


def require_batches(data: str, ours: Outcome, twin: Outcome, accumulation: int = 2) -> None:
    """Exactly which batches the two runs were given."""
    safe, back = SAFE * accumulation, BACK * accumulation
    if data == "replay":
        assert ours.seen == twin.seen[:back] + twin.seen[safe:], "the window twice, all else once, in order"
    else:
        assert ours.seen[:safe] + ours.seen[back:] == twin.seen, "the twin was never given the window"
        assert not set(ours.seen[safe:back]) & set(twin.seen)
    assert len(twin.seen) == STEPS * accumulation


class Transaction:
    """Call `after(step)` after every step of a run."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        capture: Callable[[], TrainingState],
        data: str,
        draws: bool = True,
    ) -> None:
        self.model, self.optimizer, self.capture, self.data, self.draws = model, optimizer, capture, data, draws
        self.weights: Snapshot | None = None
        self.state: TrainingState | None = None

    def after(self, step: int) -> None:
        if step == SAFE:
            self.weights, self.state = Snapshot.capture(self.model), self.capture()
        if step == FAULT:
            damage(self.model, self.optimizer, draws=self.draws)
        if step == BACK:
            assert self.weights is not None
            assert self.state is not None
            self.weights.restore()
            self.state.restore(self.data)


class TransactionCallback(TrainerCallback):
    """The same in a `Trainer`, by way of the mixin."""

    def __init__(self, data: str | None) -> None:
        self.data = data
        self.transaction: Transaction | None = None
        self.trainer: Any = None

    def bind(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.data is not None:
            capture = self.trainer.capture_training_state
            self.transaction = Transaction(model, optimizer, capture, self.data)

    def on_step_end(self, args, state, control, **kwargs):
        if self.transaction is not None:
            self.transaction.after(state.global_step)


def without_window(rows: int, rows_a_step: int) -> Sequence[int]:
    """Numbers of the rows that are left when those of the rejected window are taken out."""
    return [row for row in range(rows) if not SAFE * rows_a_step <= row < BACK * rows_a_step]
