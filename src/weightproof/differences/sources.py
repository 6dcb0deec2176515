"""Where deltas come from: adapters, in folders or in live models, and pairs of models or folders."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.differences.factors import LowRank, Part
from weightproof.errors import InputError
from weightproof.folders.checkpoint_files import read_json
from weightproof.folders.checkpoints import open_checkpoint
from weightproof.folders.loading import LOADERS, load_model
from weightproof.lora.adapters import Adapter, AdapterDelta, read_adapter, require_fits, require_values
from weightproof.lora.folders import CONFIG
from weightproof.lora.live import lora_layers, merged_names
from weightproof.registry import load_plugin
from weightproof.snapshots.tensor_store import tensor_digest
from weightproof.types import WeightMatrix
from weightproof.weights import iter_tensors, iter_weight_matrices, unwrap

logger = logging.getLogger("weightproof")

Model = nn.Module | Path | str
Found = tuple[dict[str, Part], dict[str, Any]]
_HALF = (torch.float16, torch.bfloat16)


# ---------------------------------------------------------------- adapters


def of_adapter(source: Model, adapter_name: str, base: Model | None) -> Found:
    """Parts and metadata of an adapter; see `Delta.from_adapter`.

    Raises:
        InputError: As there.
    """
    method, where = _method(source, adapter_name)
    if method not in (None, "LORA"):
        return _of_other_method(source, adapter_name, base, method, where)
    adapter = read_adapter(source, adapter_name)
    if not adapter.deltas:
        raise InputError(
            f"{adapter.source} has no LoRA weights (it only replaces {', '.join(adapter.names[:3]) or 'nothing'}): "
            "there is no factored delta in it; take the difference of the merged model and its base instead"
        )
    matrices = _base_matrices(adapter, source, base)
    parts, notes = _parts(adapter, matrices)
    missing = dict.fromkeys(adapter.biases, "a bias or a norm: a delta holds matrices")
    for name, tensor in adapter.replaced.items():
        part, why = _replaced(name, tensor, matrices)
        parts, missing = (parts, missing | {name: why}) if part is None else (parts | {name: part}, missing)
    digests = dict(adapter.base_digests) or _digests({name: matrices[name] for name in parts if name in matrices})
    metadata = {
        "mode": "adapter",
        "source": adapter.source,
        "adapter": {"name": adapter_name, "digest": adapter.digest},
        "base": {"name": adapter.base, "digests": digests},
        "dtype": _dtype_of(adapter),
        "not_included": missing,
        "notes": notes,
    }
    return parts, metadata


def _method(source: Model, adapter_name: str) -> tuple[str | None, str | None]:
    """PEFT's name of the method, and of the base; None where nobody says."""
    if isinstance(source, nn.Module):
        known = getattr(unwrap(source), "peft_config", None)
        settings = known.get(adapter_name) if isinstance(known, Mapping) else None
        found = getattr(settings, "peft_type", None), getattr(settings, "base_model_name_or_path", None)
    else:
        file = Path(source) / CONFIG
        config = read_json(file) if file.is_file() else {}
        found = config.get("peft_type"), config.get("base_model_name_or_path")
    method, base = (None if one is None else str(getattr(one, "value", one)) for one in found)
    return method, base


def _of_other_method(source: Model, adapter_name: str, base: Model | None, method: str, where: str | None) -> Found:
    """An adapter that is no LoRA: PEFT merges a copy, and the base is subtracted."""
    if not isinstance(source, nn.Module) and base is None:
        raise InputError(
            f"{source} is an adapter of the method {method}: what it changes is known only beside its base. Give base= "
            "(the model, or its folder); it is then merged minus base"
        )
    model = base if base is None or isinstance(base, nn.Module) else load_model(Path(base)).model
    parts, missing = load_plugin(LOADERS, "peft-delta")(source, adapter_name, model)
    if not parts:
        raise InputError(f"{_called(source)}: merging its adapter {adapter_name!r} changes no weight matrix")
    name = where or (None if base is None else _called(base))
    metadata = {
        "mode": "adapter",
        "source": _called(source),
        "adapter": {"name": adapter_name, "method": method},
        "base": {"name": name, "digests": {} if model is None else _digests_of(model, parts)},
        "not_included": missing,
        "notes": [f"{method}: merged minus base, dense, by PEFT"],
    }
    return parts, metadata


def _digests_of(model: nn.Module, names: Container[str]) -> dict[str, str]:
    return _digests({name: one for name, one in _by_name(iter_weight_matrices(model)).items() if name in names})


def _base_matrices(adapter: Adapter, source: Model, base: Model | None) -> Mapping[str, WeightMatrix]:
    """The base model's matrices by every name, proven to be those of the adapter; none where nobody knows it."""
    if isinstance(base, nn.Module):
        require_fits(adapter, base)
        return _by_name(iter_weight_matrices(base))
    if base is not None:
        return _in_folder(adapter, Path(base))
    if isinstance(source, nn.Module):
        merged = sorted({name for _, layer in lora_layers(source) for name in merged_names(layer)})
        return {} if merged else _by_name(iter_weight_matrices(source))
    if adapter.base and Path(adapter.base).is_dir():
        try:
            open_checkpoint(Path(adapter.base))
        except InputError as error:  # a folder that only has the name of a model: nobody gave it
            logger.warning("the base model that the adapter names cannot be read: %s", error)
            return {}
        return _in_folder(adapter, Path(adapter.base))
    return {}


def _by_name(matrices: Iterable[WeightMatrix]) -> dict[str, WeightMatrix]:
    return {
        name: one for one in matrices if one.refusal is None and one.shard is None
        for name in (one.name, *one.tied_names)
    }  # fmt: skip


def _in_folder(adapter: Adapter, folder: Path) -> dict[str, WeightMatrix]:
    """The matrices of the base's folder; refused where the adapter is of another base."""
    found = _by_name(open_checkpoint(folder).matrices)
    for name, delta in adapter.deltas.items():
        # A tied matrix is stored once, under a name that the file chose: that it is absent says nothing.
        if name in found and delta.shape != (found[name].d_out, found[name].d_in):
            raise InputError(
                f"{adapter.source} is an adapter of another base: its delta of {name} is {list(delta.shape)} "
                f"(d_out, d_in), the matrix in {folder} {[found[name].d_out, found[name].d_in]}"
            )
    if adapter.deltas.keys().isdisjoint(found):
        raise InputError(
            f"{adapter.source} is an adapter of another base: {folder} has none of its matrices, such as "
            f"{next(iter(adapter.deltas))}"
        )
    if adapter.base_digests or str(folder) != adapter.base:
        require_values(adapter, found)
    return found


def _parts(adapter: Adapter, matrices: Mapping[str, WeightMatrix]) -> tuple[dict[str, Part], list[str]]:
    parts: dict[str, Part] = {}
    dora = [name for name, delta in adapter.deltas.items() if delta.magnitude is not None]
    for name, delta in adapter.deltas.items():
        parts[name] = _factored(delta) if delta.magnitude is None else _merged_minus_base(adapter, delta, matrices)
    notes = [f"DoRA: merged minus base, dense, for {len(dora)} matrices"] if dora else []
    return parts, notes


def _factored(delta: AdapterDelta) -> LowRank:
    return LowRank(delta.b.detach().to(torch.float32) * delta.scaling, delta.a)


def _merged_minus_base(adapter: Adapter, delta: AdapterDelta, matrices: Mapping[str, WeightMatrix]) -> Tensor:
    if delta.name not in matrices:
        raise InputError(
            f"{adapter.source} is DoRA: what it changes depends on the weights that it is merged into, and "
            f"{delta.name} of its base is not known. Give base= (the model, or its folder), unmerged"
        )
    return delta.dense(matrices[delta.name].load()).to(torch.float32)


def _replaced(name: str, tensor: Tensor, matrices: Mapping[str, WeightMatrix]) -> tuple[Tensor | None, str]:
    """A replaced matrix as a dense part where the base is known; else why it is none."""
    matrix = matrices.get(name)
    if tensor.ndim < 2:
        return None, "a bias or a norm: a delta holds matrices"
    if matrix is None or matrix.select is None:
        return None, "replaced whole (modules_to_save): its change is known only with the base, give base="
    trained = matrix.select(tensor).detach().to(torch.float32)
    return trained - matrix.load().detach().to(trained.device, torch.float32), ""


def _digests(matrices: Mapping[str, WeightMatrix]) -> dict[str, str]:
    """Digests of the base, of what is stored plainly."""
    return {name: tensor_digest(one.load()) for name, one in matrices.items() if one.storage is None}


def _dtype_of(adapter: Adapter) -> str:
    first = next(iter(adapter.deltas.values()))
    return str(first.b.dtype).removeprefix("torch.")


# ---------------------------------------------------------------- differences


def difference(before: Model, after: Model) -> Found:
    """Parts and metadata of after - before; see `Delta.between`.

    Raises:
        InputError: As there.
    """
    old, new = _matrices_of(before), _matrices_of(after)
    later = {name: one for one in new for name in (one.name, *one.tied_names)}
    parts: dict[str, Part] = {}
    missing: dict[str, str] = {}
    digests: dict[str, str] = {}
    halves = 0
    for one in old:
        other = next((later[name] for name in (one.name, *one.tied_names) if name in later), None)
        _require_same(one, other, before, after)
        assert other is not None
        if reason := one.refusal or other.refusal:
            missing[one.name] = reason
            continue
        start, end = one.load().detach(), other.load().detach()
        change = end.to(start.device, torch.float32) - start.to(torch.float32)
        if bool((change != 0).any()):
            parts[one.name] = change
            digests[one.name] = tensor_digest(start)
            halves += start.dtype in _HALF or end.dtype in _HALF
    missing |= dict.fromkeys(_changed_vectors(before, after), "a bias or a norm: a delta holds matrices")
    if not parts:
        raise InputError(f"no weight matrix differs between {_called(before)} and {_called(after)}: there is no delta")
    notes = [
        f"{halves} matrices were stored in half precision: a change that is small beside the weights is mostly "
        "rounding; take the adapter itself where there is one"
    ]
    metadata = {
        "mode": "difference",
        "source": [_called(before), _called(after)],
        "base": {"name": _called(before), "digests": digests},
        "dtype": str(old[0].dtype).removeprefix("torch."),
        "not_included": missing,
        "notes": notes if halves else [],
    }
    return parts, metadata


def _matrices_of(model: Model) -> list[WeightMatrix]:
    if isinstance(model, nn.Module):
        return list(iter_weight_matrices(model))
    return list(open_checkpoint(Path(model)).matrices)


def _require_same(one: WeightMatrix, other: WeightMatrix | None, before: Model, after: Model) -> None:
    if other is None or (one.d_out, one.d_in) != (other.d_out, other.d_in):
        there = "is not there" if other is None else f"is {[other.d_out, other.d_in]}"
        raise InputError(
            f"{_called(before)} and {_called(after)} are of different architectures: {one.name} is "
            f"{[one.d_out, one.d_in]} (d_out, d_in) in the first, and {there} in the second"
        )
    if one.shard is not None or other.shard is not None:
        raise InputError(
            f"{one.name} is sharded over processes and whole on none of them: save the model and give its folder"
        )


def _changed_vectors(before: Model, after: Model) -> list[str]:
    """Biases and norms that differ: they are told, and not part of a delta."""
    old, new = _vectors_of(before), _vectors_of(after)
    return [name for name in sorted(old.keys() & new.keys()) if not torch.equal(old[name].cpu(), new[name].cpu())]


def _vectors_of(model: Model) -> dict[str, Tensor]:
    if isinstance(model, nn.Module):
        return {
            one.name: one.tensor.detach() for one in iter_tensors(model) if not one.is_buffer and len(one.shape) < 2
        }
    tensors = [one for one in open_checkpoint(Path(model)).tensors if not one.is_buffer and len(one.shape) < 2]
    return {one.name: torch.cat([block.reshape(-1) for block in one.blocks()]) for one in tensors}


def _called(model: Model) -> str:
    if not isinstance(model, nn.Module):
        return str(model)
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return str(name) or type(model).__name__
