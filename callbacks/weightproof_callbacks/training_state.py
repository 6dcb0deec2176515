"""Training state beside the weights: what a rollback does with the optimizer.

Moments gathered during a rejected window carry the fault on: weights restored bit for bit under
poisoned moments do not learn again. Clearing them costs no memory and lets training go on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from weightproof.steps import Step
from weightproof_callbacks.sharded import clear_moments


def forget_moments(step: Step, optimizer: Any) -> int:
    """Clear the optimizer's state after the window `step` was rolled back, and note that in its record.

    Returns:
        How many parameters had a state.
    """
    cleared = clear_optimizer_state(optimizer)
    if step.record is not None:
        step.record = replace(step.record, params={**step.record.params, "optimizer_states_cleared": cleared})
    return cleared


def clear_optimizer_state(optimizer: Any) -> int:
    """Forget the per-parameter state (moments, step counts) of every parameter; returns how many had one.

    Torch optimizers rebuild it at their next step, as at the start of training. Of DeepSpeed's ZeRO it is
    kept for flat masters, which are counted instead.
    """
    flat = clear_moments(optimizer)
    if flat is not None:
        return flat
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the torch optimizer
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    return sum(inner.state.pop(parameter, None) is not None for parameter in parameters)
