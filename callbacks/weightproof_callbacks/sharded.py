"""The masters of DeepSpeed's ZeRO optimizers: the copies from which each step writes the weights again.

A ZeRO optimizer steps on its own flat copy of the weights (in fp32, each process its part) and then
overwrites the weights with it. Whatever was written into the weights alone is undone by the next
step. So a kept change must also be written into the masters, and a rejected one must leave them too.

`find_masters` recognises the optimizer by what it keeps; deepspeed is imported only where one was found.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.errors import InputError
from weightproof.snapshots.tensor_store import same_bits
from weightproof.weights import iter_tensors, unwrap

__all__ = ["ZeroMasters", "clear_moments", "find_masters", "flat_masters", "zero_optimizer"]

# What marks the optimizers: the list of flat masters that each of them keeps.
_STAGE_3 = "fp32_partitioned_groups_flat"
_STAGES_1_AND_2 = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")
_WHOLE_MASTERS = ("fp32_groups_flat", "fp32_groups")


@dataclass(frozen=True, slots=True, eq=False)
class _Fragment:
    """The part of one weight that this process steps on: flat views, equal in number of elements."""

    name: str
    parameter: Any
    weight: Tensor
    master: Tensor


class ZeroMasters:
    """The masters that this process holds, by the public names of their weights.

    Every method is local: nothing waits for another process, and each process sees its own part.
    Stages 1 to 3 in fp32, fp16 and bf16, with or without offload to the CPU. Weights without a master
    (frozen ones, buffers) are none of its business. Moments are neither kept nor restored.

    Args:
        model: The model that the optimizer trains, or the engine around it.
        optimizer: DeepSpeed's ZeRO optimizer, unwrapped.

    Raises:
        InputError: If the masters lie where they cannot be read and written in place.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        if reason := _refusal_of(optimizer):
            raise InputError(f"{type(optimizer).__name__} of DeepSpeed cannot be guarded: {reason}")
        self._model = _inside_engine(model)
        self._optimizer = optimizer
        self._is_stage_3 = hasattr(optimizer, _STAGE_3)
        trained = {id(parameter) for parameter in self._trained()}
        found = [named for named in iter_tensors(self._model) if id(named.tensor) in trained]
        self._parameters: dict[str, Any] = {named.name: named.tensor for named in found}
        self._first_names = {tied: named.name for named in found for tied in named.tied_names}
        if len(self._parameters) < len(trained):
            raise InputError(
                f"DeepSpeed trains {len(trained)} parameters, of which this model holds {len(self._parameters)}: "
                "guard the model that was given to DeepSpeed"
            )
        self._shapes = {name: _shape(parameter) for name, parameter in self._parameters.items()}

    def tensors(self) -> dict[str, Tensor]:
        """This process's masters, by weight: flat views of live storage, without alignment padding.

        A master that is the weight itself (stage 3 can step on the weights where they are fp32) is left out.

        Raises:
            InputError: If the masters were moved away, or a weight was replaced or changed its shape.
        """
        return {
            fragment.name: fragment.master
            for fragment in self._fragments()
            if fragment.master.data_ptr() != fragment.weight.data_ptr()
        }

    def refresh(self, names: Iterable[str]) -> None:
        """Write the present weights into their masters, so that the next step starts from them.

        Args:
            names: Public names of the weights that changed; those without a master here are passed over.

        Raises:
            InputError: As in `tensors`; no master has been written then.
        """
        wanted = {self._first_names.get(name, name) for name in names}
        writers = importlib.import_module("deepspeed.utils")
        for fragment in [fragment for fragment in self._fragments() if fragment.name in wanted]:
            # DeepSpeed's own writers: they know where the master lies and cast to its dtype.
            if self._is_stage_3:
                writers.safe_set_local_fp32_param(fragment.parameter, fragment.parameter.ds_tensor)
            else:
                writers.safe_set_full_fp32_param(fragment.parameter, fragment.parameter.detach())

    def stale(self) -> tuple[str, ...]:
        """Names of the weights that the next step would undo: not bit for bit what their master gives here.

        Raises:
            InputError: As in `tensors`.
        """
        return tuple(
            fragment.name
            for fragment in self._fragments()
            if not same_bits(fragment.master.to(fragment.weight.dtype), fragment.weight)
        )

    def _trained(self) -> list[Any]:
        """Every parameter that the optimizer trains, on whichever process its master lies."""
        groups = next(
            getattr(self._optimizer, name)
            for name in ("fp16_groups", "bit16_groups", "bf16_groups")
            if hasattr(self._optimizer, name)
        )
        return [parameter for group in groups for parameter in group]

    def _fragments(self) -> list[_Fragment]:
        if moved := getattr(self._optimizer, "offloaded_states", None):
            places = ", ".join(sorted(str(getattr(state, "value", state)) for state in moved))
            raise InputError(f"DeepSpeed's states were moved away ({places}): call engine.reload_states() first")
        self._require_the_same_parameters()
        return list(self._partitioned() if self._is_stage_3 else self._replicated())

    def _require_the_same_parameters(self) -> None:
        present = {named.name: named.tensor for named in iter_tensors(self._model)}
        for name, parameter in self._parameters.items():
            if present.get(name) is not parameter:
                raise InputError(
                    f"{name} is another parameter object than the one DeepSpeed trains, and would be trained no "
                    "longer: write new values into the parameter instead of replacing it"
                )
            if _shape(parameter) != self._shapes[name]:
                raise InputError(
                    f"{name} had shape {list(self._shapes[name])} when DeepSpeed took it over, and now has "
                    f"{list(_shape(parameter))}: its master cannot follow"
                )

    def _replicated(self) -> Iterator[_Fragment]:
        """Stages 1 and 2: the weights are whole everywhere, each process has the masters of one stretch."""
        for name, parameter in self._parameters.items():
            link = parameter._hp_mapping
            if link is None:
                continue  # its master lies on other processes
            place = link.lp_fragment_address
            weight = parameter.detach().reshape(-1).narrow(0, place.start, place.numel)
            yield _Fragment(name, parameter, weight, link.get_hp_fragment().detach())

    def _partitioned(self) -> Iterator[_Fragment]:
        """Stage 3: each process has one stretch of every weight (`ds_tensor`) and the master of that stretch."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        flats = getattr(self._optimizer, _STAGE_3)
        for parameters, flat in zip(self._optimizer.fp16_groups, flats, strict=True):
            start = 0
            for parameter in parameters:
                part = parameter.ds_tensor
                size = _without_padding(parameter)
                weight = part.detach().reshape(-1).narrow(0, 0, size)
                master = flat.detach().narrow(0, start, size)
                start += part.ds_numel
                if size:
                    yield _Fragment(names[id(parameter)], parameter, weight, master)


def find_masters(accelerator: Any, model: nn.Module | None, optimizer: Any) -> ZeroMasters | None:
    """The masters that a run's optimizer steps on.

    Args:
        accelerator: `accelerate.Accelerator` of the run, if any.
        model: The model, as it was or as `prepare` returned it (a DeepSpeed engine).
        optimizer: The optimizer, as `prepare` returned it; None is found through the engine.

    Returns:
        None where a step changes the weights themselves: no DeepSpeed, or DeepSpeed without masters.

    Raises:
        InputError: DeepSpeed keeps masters in a way that is not supported; the message says which.
    """
    engine = _engine_of(accelerator, model)
    found = zero_optimizer(optimizer) or zero_optimizer(getattr(engine, "optimizer", None))
    if found is None:
        return None
    trained = model if model is not None else engine
    if trained is None:
        raise InputError("DeepSpeed's masters are found by the names of their weights: give the model, too")
    return ZeroMasters(trained, found)


def clear_moments(optimizer: Any) -> int | None:
    """Forget the moments of a ZeRO optimizer; they begin again at its next step, as at the start of training.

    Args:
        optimizer: The optimizer, as `prepare` returned it or unwrapped.

    Returns:
        How many of this process's flat masters had some; None if this is no ZeRO optimizer.
    """
    found = zero_optimizer(optimizer)
    if found is None or not flat_masters(found):
        return None
    # Stage 3 puts the flat masters into the parameter groups only while it steps: the groups are empty here.
    cleared = sum(found.optimizer.state.pop(flat, None) is not None for flat in flat_masters(found))
    if hasattr(found, "_hp_optimizer_states_linked"):
        found._hp_optimizer_states_linked = False  # so that checkpoints link each weight to its moments anew
    return cleared


def zero_optimizer(optimizer: Any) -> Any:
    """The DeepSpeed optimizer with masters inside accelerate's wrappers, or None."""
    marks = (_STAGE_3, *_STAGES_1_AND_2, *_WHOLE_MASTERS)
    while optimizer is not None:
        if type(optimizer).__module__.startswith("deepspeed.runtime") and any(hasattr(optimizer, m) for m in marks):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def _engine_of(accelerator: Any, model: Any) -> Any:
    """The DeepSpeed engine: the model itself, or the one that `prepare` made of it."""
    if _inside_engine(model) is not model:
        return model
    engine = getattr(getattr(accelerator, "deepspeed_engine_wrapped", None), "engine", None)
    return engine if model is None or unwrap(_inside_engine(engine)) is unwrap(model) else None


def _inside_engine(model: Any) -> Any:
    """The module inside a DeepSpeed engine; anything else as it is."""
    is_engine = any(kind.__module__.startswith("deepspeed.runtime") for kind in type(model).__mro__)
    return model.module if is_engine and isinstance(getattr(model, "module", None), nn.Module) else model


def _refusal_of(optimizer: Any) -> str | None:
    """Why the masters of a DeepSpeed optimizer cannot be read and written in place; None when they can."""
    if type(optimizer).__name__.startswith(("ZenFlow", "SuperOffload")) or getattr(optimizer, "zenflow", False):
        return "it updates its masters beside the training loop, so that no moment is safe to read them"
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
        return "weights or masters are offloaded to NVMe: offload to the CPU, or not at all"
    return None if flat_masters(optimizer) else "it keeps whole fp32 masters without ZeRO: choose ZeRO stage 1, 2 or 3"


def flat_masters(optimizer: Any) -> list[Tensor]:
    """This process's flat masters; none where they are not flat."""
    kept = (getattr(optimizer, name, None) for name in (_STAGE_3, *_STAGES_1_AND_2))
    return next((masters for masters in kept if masters is not None), [])


def _shape(parameter: Any) -> tuple[int, ...]:
    """Shape of the whole weight; a stage 3 parameter is empty where it is not gathered."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _without_padding(parameter: Any) -> int:
    """Elements of a stage 3 weight that lie on this process; the parts are equal but for padding at the end."""
    rank = torch.distributed.get_rank(group=parameter.ds_process_group)
    return max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - rank * parameter.ds_tensor.ds_numel))
