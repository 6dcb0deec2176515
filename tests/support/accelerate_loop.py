"""A training loop of a user's own on Accelerate: a tiny Llama learns a Markov chain, in one process or in several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tests.support.chains import Chains, tiny_llama
from torch.utils.data import DataLoader

LR = 5e-3


def fresh_accelerate() -> None:
    """Forget what Accelerate knows of this process: it lives as long as the process otherwise."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Loop:
    """Model, optimizer and data, prepared; `run` trains for some optimizer steps.

    Args:
        accumulation: micro-batches an optimizer step.
        seed: of the model.
        settings: further arguments of `Accelerator`.
    """

    def __init__(self, *, accumulation: int = 1, seed: int = 0, **settings: Any) -> None:
        fresh_accelerate()
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, **settings)
        model = tiny_llama(seed=seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        data = DataLoader(Chains(512, seed=1), batch_size=16)
        self.model, self.optimizer, self.data = self.accelerator.prepare(model, optimizer, data)
        self.plain = self.accelerator.unwrap_model(self.model)
        self.losses: list[float] = []
        self._batches = self._endless()

    def run(
        self, steps: int, *, before: Callable[[int], None] | None = None, after: Callable[[int], None] | None = None
    ) -> None:
        """Train; `before(n)` and `after(n)` are called around the n-th optimizer step (from 1) of this run."""
        self.model.train()
        done = 0
        while done < steps:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**next(self._batches)).loss
                self.accelerator.backward(loss)
                stepping = self.accelerator.sync_gradients
                if stepping and before is not None:
                    before(done + 1)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.losses.append(loss.item())
            if stepping:
                done += 1
                if after is not None:
                    after(done)

    def ruin_weights(self, value: float = float("nan")) -> None:
        """What no optimizer step repairs."""
        with torch.no_grad():
            for parameter in self.plain.parameters():
                parameter.fill_(value)

    def poison_gradients(self, value: float = float("nan")) -> None:
        """What a bad batch does: every parameter would be ruined by the next step."""
        for parameter in self.plain.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(value)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.plain.state_dict().items()}

    def _endless(self):
        while True:
            yield from self.data
