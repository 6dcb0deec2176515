"""Training state beside the weights: what a rollback does with the optimizer.

Moments gathered during a rejected window carry the fault on: weights restored bit for bit under
poisoned moments do not learn again. Clearing them costs no memory and lets training go on.
"""

from __future__ import annotations

from typing import Any


def clear_optimizer_state(optimizer: Any) -> int:
    """Forget the per-parameter state (moments, step counts) of every parameter; returns how many had one.

    Torch optimizers rebuild it at their next step, as at the start of training.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the torch optimizer
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    return sum(inner.state.pop(parameter, None) is not None for parameter in parameters)
