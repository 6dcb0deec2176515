"""Changes of a model by other libraries, for the `external:` steps of recipes.

Each is a frozen dataclass with its parameters, called with the model inside `session.edit()`. A library that is not
installed is said when the recipe is read, with the extra that brings it. `kind` is the contract that is checked
unless the recipe declares another.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from weightproof import kinds
from weightproof.errors import InputError
from weightproof.weights import unwrap
from weightproof_callbacks.quantizers.packages import EXTRA

_PRUNERS = ("l1_unstructured", "random_unstructured")


@dataclass(frozen=True)
class CastTo:
    """`model.to(dtype)`: every floating point tensor rounded.

    Attributes:
        dtype: Such as "bfloat16".
    """

    dtype: str

    def __post_init__(self) -> None:
        """Refuse what is no floating point type."""
        kinds.Cast(self.dtype)

    @property
    def kind(self) -> kinds.Cast:
        """Each element at most half an ulp away."""
        return kinds.Cast(self.dtype)

    def __call__(self, model: nn.Module) -> None:
        """Cast it."""
        model.to(kinds.Cast(self.dtype).dtype)


@dataclass(frozen=True)
class TorchPrune:
    """`torch.nn.utils.prune` on linear layers, made permanent.

    Attributes:
        sparsity: Share of zeros, between 0 and 1.
        method: "l1_unstructured" (magnitude) or "random_unstructured".
        modules: Globs on the names of the layers.
    """

    sparsity: float
    method: str = "l1_unstructured"
    modules: tuple[str, ...] = ("*layers.*",)

    def __post_init__(self) -> None:
        """Check the parameters."""
        if not 0.0 < self.sparsity < 1.0:
            raise InputError(f"sparsity must be a share between 0 and 1, not {self.sparsity!r}")
        if self.method not in _PRUNERS:
            raise InputError(f"method must be one of {', '.join(_PRUNERS)}, not {self.method!r}")

    def __call__(self, model: nn.Module) -> None:
        """Prune it."""
        from torch.nn.utils import prune

        for layer in _linear(model, self.modules):
            getattr(prune, self.method)(layer, "weight", amount=self.sparsity)
            prune.remove(layer, "weight")


@dataclass(frozen=True)
class TorchAO:
    """`torchao.quantization.quantize_` with weights in int8 or int4; the weights are packed afterwards.

    Attributes:
        bits: 8, or 4 (which needs a device and kernels that torchao has).
        group_size: Inputs per scale of int4.
    """

    bits: int = 8
    group_size: int = 32

    def __post_init__(self) -> None:
        """Check the parameters, and that torchao is there."""
        if self.bits not in (4, 8):
            raise InputError(f"bits must be 8 or 4, not {self.bits!r}")
        _require("torchao")

    def __call__(self, model: nn.Module) -> None:
        """Quantize it."""
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int4WeightOnlyConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )

        config = Int8WeightOnlyConfig() if self.bits == 8 else Int4WeightOnlyConfig(group_size=self.group_size)
        quantize_(unwrap(model), config)


@dataclass(frozen=True)
class Quanto:
    """`optimum.quanto.quantize` and `freeze`: weights packed in int8 or int4.

    Attributes:
        bits: 8 or 4.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        """Check the parameters, and that optimum-quanto is there."""
        if self.bits not in (4, 8):
            raise InputError(f"bits must be 8 or 4, not {self.bits!r}")
        _require("optimum.quanto")

    def __call__(self, model: nn.Module) -> None:
        """Quantize it."""
        from optimum import quanto  # pyright: ignore[reportMissingImports]

        quanto.quantize(unwrap(model), weights=quanto.qint8 if self.bits == 8 else quanto.qint4)
        quanto.freeze(unwrap(model))


def _require(module: str) -> None:
    """Refuse a quantizer that is not installed, naming the extra."""
    try:
        found: Any = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the package above it is missing
        found = None
    if found is None:
        raise InputError(f"{module} is not installed: {EXTRA}")


def _linear(model: nn.Module, patterns: tuple[str, ...]) -> Iterator[nn.Module]:
    """Linear layers whose names fit.

    Raises:
        InputError: None does.
    """
    found = [
        layer
        for name, layer in unwrap(model).named_modules()
        if isinstance(getattr(layer, "weight", None), torch.nn.Parameter)
        and type(layer).__name__ in ("Linear", "Conv1D")
        and any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if not found:
        raise InputError(f"modules: no linear layer of this model fits {', '.join(map(repr, patterns))}")
    yield from found
