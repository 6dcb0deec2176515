"""Steering of packed weights: what an adapter adds to the output of a module, nothing written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.alpha.fitting import Target
from weightproof.differences.factors import LowRank, Part
from weightproof.errors import InputError
from weightproof.families import clean_name


class OutputHook:
    """Adds alpha x D' to what a linear module gives, in float32 and cast once.

    Attributes:
        alpha: The strength; at 0 the output is passed on as it is.
    """

    def __init__(self, module: nn.Module, part: Part) -> None:
        self.alpha = 0.0
        self._part = part
        self._handle = module.register_forward_hook(self._add, with_kwargs=True)

    def remove(self) -> None:
        """Take it off the module."""
        self._handle.remove()

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
        if self.alpha == 0.0:
            return None
        given = args[0] if args else next(iter(kwargs.values()))
        change = applied(self._part, given.to(torch.float32))
        return output + (self.alpha * change).to(output.dtype)


def applied(part: Part, inputs: Tensor) -> Tensor:
    """Product x D' of inputs (..., d_in), through the factors where there are any."""
    if isinstance(part, LowRank):
        return (inputs @ part.right.to(inputs.device).T) @ part.left.to(inputs.device).T
    return inputs @ part.to(inputs.device).T


def hooked_modules(model: nn.Module, packed: Iterable[Target]) -> list[tuple[nn.Module, Part]]:
    """The module of each packed matrix, and what is added to its output.

    Raises:
        InputError: One is no linear map from the last dimension of its input.
    """
    packed = list(packed)
    if not packed:
        return []
    modules: dict[str, list[str]] = {}
    for path, _ in model.named_modules():
        modules.setdefault(clean_name(path), []).append(path)
    found: list[tuple[nn.Module, Part]] = []
    for matrix, part in packed:
        is_linear = matrix.family not in ("embed", "conv") and "[" not in matrix.name and not matrix.tied_names
        path = _innermost(modules.get(matrix.name.rpartition(".")[0], []))
        if path is None or not is_linear:
            raise InputError(
                f"{matrix.name} is stored by {matrix.storage}: it cannot be written, and it is not the weight of one "
                "linear module whose output could be steered instead. Nothing was changed"
            )
        found.append((model.get_submodule(path), part))
    return found


def _innermost(paths: list[str]) -> str | None:
    """The module that holds the weight, of those with its name: an adapter's layer lies around its base layer."""
    longest = max(paths, key=len, default=None)
    return longest if longest is not None and all(longest.startswith(path) for path in paths) else None
