"""torch.nn.utils.parametrize (and weight norm of old): the weight is computed from other tensors at each use."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightproof.folders.readers import PackedWeight, Reading


class ParametrizationReader:
    """Reads what a parametrization computes: spectral or weight norm, orthogonal maps, and anyone's own."""

    name = "parametrization"

    def read(self, module: nn.Module) -> Reading:
        """One packed weight for each parametrized matrix; other shapes are left to the walker's refusals."""
        lists = vars(module)["_modules"].get("parametrizations")
        if lists is None or not isinstance(lists, nn.ModuleDict):
            return None
        if module.training and any(_is_stateful(one) for one in lists.modules()):
            return "its parametrization changes state at every use in training mode: call eval() or remove it"
        found = [_parametrized(module, name, chain) for name, chain in lists.items()]
        return tuple(one for one in found if one is not None) or None


def _is_stateful(module: nn.Module) -> bool:
    """Spectral norm runs a power iteration each time the weight is read in training mode."""
    return type(module).__name__ == "_SpectralNorm"


def _parametrized(module: nn.Module, name: str, chain: Any) -> PackedWeight | None:
    turned = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    with torch.no_grad():
        value = getattr(module, name)
    if value.ndim != 2:
        return None
    shape = value.shape[::-1] if turned else value.shape
    prefix = f"parametrizations.{name}."
    inner = {**dict(chain.named_parameters()), **dict(chain.named_buffers())}
    rebuild = partial(_computed, chain, prefix, turned)
    return PackedWeight(
        name=name,
        backend=ParametrizationReader.name,
        d_out=int(shape[0]),
        d_in=int(shape[1]),
        dtype=value.dtype,
        registered=tuple(f"{prefix}{local}" for local in inner),
        tensors={f"{prefix}{local}": tensor for local, tensor in inner.items()},
        dequantize=partial(_present, chain, turned),
        rebuild=rebuild,
    )


def _present(chain: Any, turned: bool) -> Tensor:
    with torch.no_grad():
        value = chain().detach().clone()
    return value.T if turned else value


def _computed(chain: Any, prefix: str, turned: bool, tensors: Mapping[str, Tensor]) -> Tensor:
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    with torch.no_grad():
        value = functional_call(chain, inner, ()).detach().clone()
    return value.T if turned else value
