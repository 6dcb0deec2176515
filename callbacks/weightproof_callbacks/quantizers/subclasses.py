"""What the backends share that keep a weight in a tensor subclass: its inner tensors are read, copied and put back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from weightproof.folders.readers import PackedWeight, flat_tensors, plain_copy, rebuilt, wrappers


def parameter(module: nn.Module, name: str = "weight") -> Any:
    """A module's own parameter of that name, or None."""
    return vars(module).get("_parameters", {}).get(name)


def comes_from(thing: object, package: str) -> bool:
    """Whether an object's class, or one that it derives from, is defined in a package.

    Example:
        >>> comes_from(nn.Linear(1, 1), "torch"), comes_from(nn.Linear(1, 1), "torchao")
        (True, False)
    """
    return any(kind.__module__ == package or kind.__module__.startswith(f"{package}.") for kind in type(thing).__mro__)


def subclass_weight(
    weight: Any,
    backend: str,
    beside: Mapping[str, Tensor] | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
) -> PackedWeight:
    """The packed weight of a module whose parameter `weight` is a wrapper subclass with `dequantize()`.

    Args:
        weight: The parameter, logically (d_out, d_in).
        backend: Its name.
        beside: Other registered tensors of the module that belong to it (scales of activations).
        bits: Width of a code, where known.
        group_size: Inputs that share a scale, where known.
    """
    beside = dict(beside or {})
    return PackedWeight(
        name="weight",
        backend=backend,
        d_out=int(weight.shape[0]),
        d_in=int(weight.shape[1]),
        dtype=weight.dtype,
        registered=("weight", *beside),
        tensors=flat_tensors("weight", weight) | beside,
        dequantize=partial(_values, weight),
        bits=bits,
        group_size=group_size,
        rebuild=partial(_values_of, weight),
        owners=tuple(wrappers(weight)),
    )


def _values(weight: Any) -> Tensor:
    return plain_copy(weight.detach().dequantize())


def _values_of(weight: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    return _values(rebuilt("weight", weight, tensors))
