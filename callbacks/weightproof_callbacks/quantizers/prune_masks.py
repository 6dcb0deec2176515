"""torch.nn.utils.prune: `weight_orig` is trained, `weight_mask` zeroes it, `weight` is stale until the next forward."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from weightproof.folders.readers import PackedWeight, Reading

_ORIGINAL, _MASK = "_orig", "_mask"


class PruneMaskReader:
    """Reads every tensor of a module that torch.nn.utils.prune masks: what the next forward pass computes with."""

    name = "prune-mask"

    def read(self, module: nn.Module) -> Reading:
        """One packed weight for each masked matrix."""
        own, buffers = vars(module)["_parameters"], vars(module)["_buffers"]
        masked = [
            name.removesuffix(_ORIGINAL)
            for name, tensor in own.items()
            if name.endswith(_ORIGINAL) and tensor is not None and tensor.ndim == 2
            if buffers.get(f"{name.removesuffix(_ORIGINAL)}{_MASK}") is not None
        ]
        if not masked:
            return None
        return tuple(_masked(module, name) for name in masked)


def _masked(module: nn.Module, name: str) -> PackedWeight:
    original = vars(module)["_parameters"][f"{name}{_ORIGINAL}"]
    mask = vars(module)["_buffers"][f"{name}{_MASK}"]
    tensors = {f"{name}{_ORIGINAL}": original, f"{name}{_MASK}": mask}
    # transformers' Conv1D keeps (d_in, d_out).
    turned = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    shape = original.shape[::-1] if turned else original.shape
    rebuild = partial(_product, name, turned)
    return PackedWeight(
        name=name,
        backend=PruneMaskReader.name,
        d_out=int(shape[0]),
        d_in=int(shape[1]),
        dtype=original.dtype,
        registered=tuple(tensors),
        tensors=tensors,
        dequantize=partial(rebuild, tensors),
        rebuild=rebuild,
    )


def _product(name: str, turned: bool, tensors: Mapping[str, Tensor]) -> Tensor:
    original, mask = tensors[f"{name}{_ORIGINAL}"].detach(), tensors[f"{name}{_MASK}"].detach()
    product = mask.to(dtype=original.dtype) * original
    return product.T if turned else product
