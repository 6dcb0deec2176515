"""What `attach` refuses, with the sentence it refuses it with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

from weightproof.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator


def require_attachable(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> None:
    """Refuse a run that the Accelerator does not see whole, and objects that do not belong together.

    Raises:
        InputError: Several processes were launched but the Accelerator runs alone, the model was not
            prepared, a guard is attached already, or the optimizer trains another model.
    """
    _require_all_processes(accelerator)
    if not any(plain(accelerator, model) is plain(accelerator, prepared) for prepared in accelerator._models):
        raise InputError(
            "attach guards what the Accelerator trains and saves, and this model was not prepared: call it with what "
            "accelerator.prepare(model, ...) returned"
        )
    if any(getattr(held, "guards_checkpoints", False) for held in accelerator._custom_objects):
        raise InputError("a guard is attached to this Accelerator already: detach() it first")
    if optimizer is not None and engine_of(model) is None:
        _require_own_parameters(model, torch_optimizer(optimizer))


def plain(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DDP, torch.compile or a DeepSpeed engine; mixed precision stays as it is."""
    # keep_torch_compile=True would write the inner model into the compiled one, and take DDP out of it.
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def engine_of(model: Any) -> Any | None:
    """The model itself where it is a DeepSpeed engine, which steps by itself."""
    return model if type(model).__module__.startswith("deepspeed.") and hasattr(model, "global_steps") else None


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside what `prepare` returned, or the one given.

    Raises:
        InputError: If it is none.
    """
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise InputError(f"optimizer must be a torch optimizer or what accelerator.prepare made of it, not {inner!r}")
    return inner


def _require_all_processes(accelerator: Accelerator) -> None:
    distributed = torch.distributed
    joined = distributed.is_available() and distributed.is_initialized()
    launched = distributed.get_world_size() if joined else 1
    if accelerator.num_processes != launched:
        raise InputError(
            f"{launched} processes were launched but the Accelerator sees {accelerator.num_processes}: each would "
            "train a model of its own. On a machine without GPU make it with Accelerator(cpu=True), or export "
            "ACCELERATE_USE_CPU=true"
        )


def _require_own_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise InputError(
            "the optimizer trains none of this model's parameters: prepare both in one call, and give attach the pair"
        )
