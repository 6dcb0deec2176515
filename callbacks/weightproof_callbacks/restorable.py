"""What a run must be made of to be taken back whole: asked before its first step, answered by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weightproof.errors import InputError
from weightproof.parallel.placements import is_dtensor, local_of, refusal_of
from weightproof.weights import iter_tensors, unwrap
from weightproof_callbacks.optimizer_state import require_known_optimizer

__all__ = ["require_restorable"]

# Packages of modules that pack their weights out of reach.
_PACKED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")


def require_restorable(optimizer: Any, model: nn.Module) -> None:
    """Refuse, before the first step, a run that could not be taken back whole.

    Raises:
        InputError: An optimizer of which not all is known, parameters that are offloaded or on the meta device,
            quantised packed parameters, or shards that keep no shapes; by name, with what to do.
    """
    require_known_optimizer(optimizer)
    model = unwrap(model)
    for name, module in model.named_modules():
        if type(module).__module__.startswith(_PACKED):
            raise InputError(
                f"{name or 'the model'} is a {type(module).__qualname__}, which packs its weights out of reach: "
                "quantise after training"
            )
        hook = getattr(module, "_hf_hook", None)
        if getattr(hook, "offload", False):
            raise InputError(
                f"the parameters of {name or 'the model'} are offloaded by accelerate and lie elsewhere between two "
                "steps: train with a device map without offload, or shard with FSDP version 2"
            )
    for named in iter_tensors(model):
        if reason := _parameter_refusal(named.tensor):
            raise InputError(f"{named.name} could not be restored: {reason}")


def _parameter_refusal(tensor: Any) -> str | None:
    if not is_dtensor(tensor) and (reason := refusal_of(tensor)):
        return reason
    local = local_of(tensor)
    if local.device.type == "meta":
        return "it is on the meta device, without values: load the weights before training"
    if type(local) is Tensor and (is_dtensor(tensor) or type(tensor) in (Tensor, nn.Parameter)):
        odd = local.layout != torch.strided or local.is_quantized
        return f"its layout {local.layout} is not supported" if odd else None
    return (
        f"it is a {type(tensor).__name__}, whose packed or wrapped values cannot be written back bit for bit: "
        "quantise after training, or train adapters on weights that are not packed"
    )
