"""Adapters: what merging one changes, read without PEFT, and whether it belongs to a model.

>>> adapter = read_adapter("my-adapter")                 # doctest: +SKIP
>>> require_fits(adapter, model)                          # doctest: +SKIP
>>> adapter.deltas["model.layers.0.mlp.down_proj.weight"].dense().shape     # doctest: +SKIP
torch.Size([256, 672])
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from weightproof.errors import InputError
from weightproof.folders.checkpoints import iter_checkpoint_matrices
from weightproof.folders.files import write_atomically
from weightproof.lora.deltas import Adapter, AdapterDelta, combine
from weightproof.lora.folders import BASE_NOTE, is_adapter_folder, read_adapter_folder
from weightproof.lora.live import adapter_names, is_adapted, read_live_adapter
from weightproof.snapshots.tensor_store import same_bits, tensor_digest
from weightproof.types import WeightMatrix
from weightproof.weights import iter_tensors, iter_weight_matrices

__all__ = [
    "Adapter",
    "AdapterDelta",
    "adapter_names",
    "combine",
    "is_adapted",
    "is_adapter_folder",
    "read_adapter",
    "record_base",
    "require_fits",
]

logger = logging.getLogger("weightproof")


def read_adapter(source: Path | str | nn.Module, adapter_name: str = "default") -> Adapter:
    """Read an adapter from the folder that PEFT saved it to, or out of a live model.

    LoRA with rank-stabilised scaling, rank and alpha patterns, DoRA, biases, `modules_to_save`, embeddings, and
    `target_parameters` on stacks of experts; names are those of `iter_weight_matrices`, matrices (d_out, d_in).
    Weights are never unpickled.

    Args:
        source: A folder, or a model with LoRA layers (a PeftModel, or any model they were put into).
        adapter_name: Which of several.

    Raises:
        InputError: There is no such adapter, it is a pickle, torn, or of a kind that is not understood, by name.
    """
    if isinstance(source, nn.Module):
        return read_live_adapter(source, adapter_name)
    return read_adapter_folder(Path(source), adapter_name)


def require_fits(adapter: Adapter, model: nn.Module, *, same_base: bool = True) -> None:
    """Refuse an adapter that was not trained on this model.

    Names and shapes must be those of the model. The values of the base are compared where they are known: by the
    digests that `record_base` noted beside the adapter, or with the folder that the adapter names as its base.

    Args:
        adapter: What would be merged.
        model: The base model, or a PEFT model around it.
        same_base: False: merge into other weights of the same shape all the same.

    Raises:
        InputError: Naming the matrix, and the digests of both bases.
    """
    matrices = {name: one for one in iter_weight_matrices(model) for name in (one.name, *one.tied_names)}
    _require_names(adapter, model, matrices)
    for name, delta in adapter.deltas.items():
        matrix = matrices[name]
        if matrix.refusal is None and delta.shape != (matrix.d_out, matrix.d_in):
            raise InputError(
                f"{adapter.source} does not fit this model: its delta of {name} is {list(delta.shape)} (d_out, d_in), "
                f"the matrix {[matrix.d_out, matrix.d_in]}. {_made_for(adapter)}"
            )
    if same_base:
        require_values(adapter, matrices)


def _made_for(adapter: Adapter) -> str:
    return f"It was trained on {adapter.base}" if adapter.base else "It does not say what it was trained on"


def _require_names(adapter: Adapter, model: nn.Module, matrices: Mapping[str, WeightMatrix]) -> None:
    tensors = {name: one.shape for one in iter_tensors(model) for name in (one.name, *one.tied_names)}
    missing = [name for name in adapter.deltas if name not in matrices]
    missing += [name for name in (*adapter.replaced, *adapter.biases) if name not in tensors]
    if missing:
        raise InputError(
            f"{adapter.source} does not fit this model: it changes {missing[0]}, which {type(model).__name__} does not "
            f"have ({len(missing)} of {len(adapter.names)} names are missing). {_made_for(adapter)}"
        )
    for name, tensor in (*adapter.replaced.items(), *adapter.biases.items()):
        if tuple(tensor.shape) != tensors[name]:
            raise InputError(
                f"{adapter.source} does not fit this model: its {name} is {list(tensor.shape)}, that of the model "
                f"{list(tensors[name])}. {_made_for(adapter)}"
            )


def require_values(adapter: Adapter, matrices: Mapping[str, WeightMatrix]) -> None:
    """Compare a base's matrices with those the adapter was trained on, where they are known and whole here.

    Raises:
        InputError: One differs.
    """
    whole = {name: one for name, one in matrices.items() if name in adapter.deltas and _is_comparable(one)}
    for name in sorted(whole.keys() & adapter.base_digests.keys()):
        found = tensor_digest(whole[name].load())
        if found != adapter.base_digests[name]:
            raise _another_base(adapter, name, adapter.base_digests[name], found)
    if adapter.base_digests or adapter.base is None or not Path(adapter.base).is_dir():
        return
    for stored in _stored_base(Path(adapter.base)):
        matrix = whole.get(stored.name)
        if matrix is not None and stored.refusal is None:
            then, now = stored.load().to(matrix.dtype), matrix.load()
            if not same_bits(then, now.cpu()):
                raise _another_base(adapter, stored.name, tensor_digest(then), tensor_digest(now))


def _is_comparable(matrix: WeightMatrix) -> bool:
    """Whether the values of a base are whole here, and its own: what a quantizer packed is rounded."""
    return matrix.refusal is None and matrix.shard is None and matrix.storage is None


def _stored_base(folder: Path) -> Iterable[WeightMatrix]:
    try:
        return list(iter_checkpoint_matrices(folder))
    except InputError as error:
        logger.warning("the base model that the adapter names cannot be compared with this one: %s", error)
        return ()


def _another_base(adapter: Adapter, name: str, then: str, now: str) -> InputError:
    return InputError(
        f"{adapter.source} was trained on another base: {name} had the digest {then[:16]} there"
        f"{f' ({adapter.base})' if adapter.base else ''}, and has {now[:16]} here. Load that base, or pass "
        "same_base=False (in a recipe `same_base: false`) to merge into these weights all the same"
    )


def record_base(folder: Path | str, model: nn.Module, adapter_name: str = "default") -> Path:
    """Note beside a saved adapter which weights it was trained on, so that `require_fits` can tell other ones.

    Args:
        folder: Where PEFT saved the adapter.
        model: The model that it was trained in, unmerged, or the base model.
        adapter_name: Which of several.

    Returns:
        The file: `weightproof_base.json`, with the digest of every matrix that the adapter changes.

    Raises:
        InputError: If the adapter does not fit the model.
    """
    adapter = read_adapter(folder, adapter_name)
    require_fits(adapter, model, same_base=False)
    found = {
        name: tensor_digest(one.load())
        for one in iter_weight_matrices(model)
        for name in (one.name, *one.tied_names)
        if name in adapter.deltas and _is_comparable(one)
    }
    home = Path(adapter.source)
    content = {"format": 1, "torch": torch.__version__, "matrices": dict(sorted(found.items()))}
    file = home / BASE_NOTE
    write_atomically(file, json.dumps(content, indent=1).encode())
    return file
