"""Clearing moments: an optimizer afterwards steps as it did at the start of training."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from weightproof_callbacks.training_state import clear_optimizer_state

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_step_after_clearing_equals_a_first_step(name, wrapped):
    torch.manual_seed(0)
    used, fresh = nn.Linear(4, 3), nn.Linear(4, 3)
    inner = OPTIMIZERS[name](used.parameters())
    optimizer = Accelerator(cpu=True).prepare(inner) if wrapped else inner
    step(used, optimizer, seed=1)
    fresh.load_state_dict(used.state_dict())
    assert clear_optimizer_state(optimizer) == 2
    assert clear_optimizer_state(optimizer) == 0
    step(used, optimizer, seed=2)
    step(fresh, OPTIMIZERS[name](fresh.parameters()), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(used.parameters(), fresh.parameters(), strict=True))
