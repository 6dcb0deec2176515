"""Runs that suffer a fault under guard, and their twins that never did: everything that shapes what comes next."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from weightproof.snapshots.tensor_store import same_bits
from weightproof.testing.tampering import flip_bit, pick_element


def whole_state(model: nn.Module, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Weights, moments, groups, schedule and generators, copied."""
    inner = getattr(optimizer, "optimizer", optimizer)
    state = inner.state_dict()
    moments = {f"{key}.{name}": value for key, one in state["state"].items() for name, value in one.items()}
    return {
        "weights": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "moments": {name: torch.as_tensor(value).clone() for name, value in moments.items()},
        "rates": [group["lr"] for group in inner.param_groups],
        "schedule": getattr(scheduler, "scheduler", scheduler).state_dict().copy() if scheduler else None,
        "torch": torch.get_rng_state(),
        "numpy": [np.asarray(one).tolist() for one in np.random.get_state()],  # noqa: NPY002 - the global generator
        "python": random.getstate(),
    }


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Names of what is not equal, to the last bit."""
    found = []
    for part, ours in left.items():
        theirs = right[part]
        if part in ("weights", "moments"):
            names = sorted(ours.keys() | theirs.keys())
            both = ours.keys() & theirs.keys()
            found += [f"{part} {name}" for name in names if name not in both or not same_bits(ours[name], theirs[name])]
        elif not (torch.equal(ours, theirs) if part == "torch" else ours == theirs):
            found.append(part)
    return found


# ---- faults, each by what it does to model and optimizer between two steps ------------------------------------------


def weight_noise(model: nn.Module, optimizer: Any) -> None:
    """Noise fifty times as large as the weights."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw))


def poisoned_moments(model: nn.Module, optimizer: Any) -> None:
    """First moments that throw the weights away at the next step, second moments that stop all learning after."""
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        state["exp_avg"].fill_(1e4)


def broken_moments(model: nn.Module, optimizer: Any) -> None:
    """Moments that are NaN: gradients and losses are fine, and the next step ruins every weight."""
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        state["exp_avg_sq"].fill_(float("nan"))


def frozen_weight(model: nn.Module, optimizer: Any) -> None:
    """A second moment with its top bit flipped: that one weight stands still, and no loss shows it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    moment = inner.state[next(iter(inner.param_groups[0]["params"]))]["exp_avg_sq"]
    flip_bit(moment, pick_element(moment, 0), 1)


FAULTS: dict[str, Callable[[nn.Module, Any], None]] = {
    "weight-noise": weight_noise, "poisoned-moments": poisoned_moments, "broken-moments": broken_moments,
    "frozen-weight": frozen_weight,
}  # fmt: skip
