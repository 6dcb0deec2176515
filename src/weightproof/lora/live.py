"""Read adapters from a live model by the attributes that PEFT gives its layers; PEFT is not imported.

A LoRA layer has `lora_A`, `lora_B`, `scaling` and `base_layer`; a module of `modules_to_save` has a table of that
name beside `original_module`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.errors import InputError
from weightproof.families import clean_name, unwrap
from weightproof.lora.deltas import Adapter, AdapterDelta
from weightproof.lora.folders import expert_deltas
from weightproof.parallel.placements import cut_of, is_flattened
from weightproof.weights import iter_weight_matrices

# Variants of LoRA that train differently and merge like one of the two that are read here.
_MERGED_ALIKE = ("DoraLinearVariant", "VeloraLinearVariant")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(raw path, layer) of every LoRA layer of a model, those without an active adapter too."""
    for path, module in unwrap(model).named_modules():
        if all(hasattr(module, name) for name in ("lora_A", "lora_B", "scaling", "base_layer")):
            yield path, module


def saved_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(raw path, wrapper) of every module that an adapter replaces by a trained copy."""
    for path, module in unwrap(model).named_modules():
        if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict) and hasattr(module, "original_module"):
            yield path, module


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has LoRA layers."""
    return next(lora_layers(model), None) is not None


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters in the LoRA layers of a model, sorted."""
    return tuple(sorted({name for _, layer in lora_layers(model) for name in _names(layer)}))


def _names(layer: Any) -> list[str]:
    return [*layer.lora_A, *(layer.lora_embedding_A if hasattr(layer, "lora_embedding_A") else ())]


def merged_names(layer: Any) -> tuple[str, ...]:
    """Adapters that a layer notes as merged into its weights, in order, a name for each time."""
    return tuple(getattr(layer, "merged_adapters", ()) or ())


def read_live_adapter(model: nn.Module, adapter_name: str = "default") -> Adapter:
    """Copy one adapter out of a live model.

    Raises:
        InputError: The model has no LoRA layers or no such adapter, a variant that is not understood, or factors that
            are sharded.
    """
    known = adapter_names(model)
    if adapter_name not in known:
        have = f"it has {', '.join(known)}" if known else "it has no LoRA layers at all"
        raise InputError(f"the model has no LoRA adapter {adapter_name!r}: {have}")
    deltas: dict[str, AdapterDelta] = {}
    biases: dict[str, Tensor] = {}
    for path, layer in lora_layers(model):
        if adapter_name in _names(layer):
            deltas |= {delta.name: delta for delta in layer_deltas(path, layer, adapter_name)}
            biases |= _added_bias(path, layer, adapter_name)
    config = getattr(unwrap(model), "peft_config", None)
    settings = config.get(adapter_name) if isinstance(config, Mapping) else None
    base = getattr(settings, "base_model_name_or_path", None)
    return Adapter(
        deltas=deltas,
        replaced=_saved(model, adapter_name),
        biases=biases,
        base=str(base) if base else None,
        source=f"the adapter {adapter_name!r} of the live model",
    )


def layer_deltas(path: str, layer: Any, adapter_name: str) -> list[AdapterDelta]:
    """What one adapter changes in one layer, copied: one matrix, or one for each expert of a stack."""
    module, scaling = clean_name(path), float(layer.scaling[adapter_name])
    variant = getattr(layer, "lora_variant", {}).get(adapter_name)
    if variant is not None and type(variant).__name__ not in _MERGED_ALIKE:
        raise InputError(
            f"{module} is adapted by the variant {type(variant).__name__}, which is not understood here. Merge it "
            "inside session.edit(): outputs decide then"
        )
    if not isinstance(layer.lora_A, nn.ModuleDict):
        raise InputError(
            f"{module} is adapted by {type(layer).__name__}, which is not plain LoRA. Merge it inside session.edit(): "
            "outputs decide then"
        )
    if adapter_name not in layer.lora_A:
        a, b = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
        return [AdapterDelta(f"{module}.weight", _copy(module, b).T, _copy(module, a).T, scaling)]
    factors: Any = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    a, b = (_copy(module, factor.weight) for factor in factors)
    if hasattr(layer, "parameter_name"):
        return _stacked(f"{module}.{layer.parameter_name}", layer, a, b, adapter_name)
    if a.ndim > 2:
        if b[0, 0].numel() != 1:
            raise InputError(f"{module} is a convolution whose B is {list(b.shape)}: its kernel must be of size 1")
        a, b = a.flatten(1), b.flatten(1)
    magnitude = None
    if adapter_name in getattr(layer, "lora_magnitude_vector", {}):
        magnitude = _copy(module, layer.lora_magnitude_vector[adapter_name].weight).reshape(-1)
    return [AdapterDelta(f"{module}.weight", a, b, scaling, magnitude)]


def _stacked(key: str, layer: Any, a: Tensor, b: Tensor, adapter_name: str) -> list[AdapterDelta]:
    """The deltas of a parameter that is targeted directly, oriented as its matrices are."""
    found = expert_deltas(key, a, b, int(layer.r[adapter_name]), float(layer.scaling[adapter_name]))
    if len(found) == 1:
        return found
    # PEFT goes by `is_transposed` alone; a class that stores its experts turned without saying so is read turned here.
    if getattr(layer, "_did_swap_in_out_features", True) != _reads_turned(layer.get_base_layer(), layer.parameter_name):
        return found
    return [AdapterDelta(one.name, one.b.T, one.a.T, one.scaling) for one in found]


def _reads_turned(holder: nn.Module, parameter: str) -> bool:
    """Whether the matrices of a stack are read as (E, in, out)."""
    one = next(matrix for matrix in iter_weight_matrices(holder) if matrix.name == f"{parameter}[0]")
    return one.select is not None and tuple(one.select(torch.empty(1, 2, 3)).shape) == (3, 2)


def _added_bias(path: str, layer: Any, adapter_name: str) -> dict[str, Tensor]:
    bias = None
    if adapter_name in layer.lora_B:  # a ModuleDict has no `get`
        bias = layer.lora_B[adapter_name].bias
    if bias is None:
        return {}
    name = f"{clean_name(path)}.bias"
    return {name: _copy(name, bias) * float(layer.scaling[adapter_name])}


def _saved(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, wrapper in saved_modules(model):
        if adapter_name in wrapper.modules_to_save:
            for leaf, tensor in wrapper.modules_to_save[adapter_name].named_parameters():
                found[f"{clean_name(path)}.{leaf}"] = _copy(path, tensor)
    return found


def _copy(name: str, tensor: Tensor) -> Tensor:
    if is_flattened(tensor) or cut_of(tensor) is not None:
        raise InputError(f"the factors of {name} are sharded over processes: give the adapter's folder instead")
    return tensor.detach().clone()
