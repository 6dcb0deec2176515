"""Recognise what a known library did to a model inside of `session.edit()`, so that it is held to a contract.

Nothing is guessed from how weights look: what tells is what the library itself left behind (PEFT's list of merged
adapters, a pruning mask), or that every changed tensor is, bit for bit, a cast of what it was. Where nothing tells,
the kind stays `unknown` and outputs decide. No library is imported.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from weightproof.contracts.stored_quantize import Grid, StoredQuantize, stored_grids
from weightproof.errors import InputError
from weightproof.families import clean_name, unwrap
from weightproof.guards.packing import NOT_QUANTIZERS
from weightproof.kinds import Cast, Kind, LoraMerge, Plain, Prune
from weightproof.lora.adapters import Adapter, combine, read_adapter
from weightproof.lora.live import adapter_names, lora_layers, merged_names
from weightproof.parallel.placements import local_of
from weightproof.snapshot import Snapshot
from weightproof.snapshots.tensor_store import same_bits
from weightproof.weights import iter_tensors

logger = logging.getLogger("weightproof")

# Narrower dtypes that weights may have been rounded to and brought back from.
_ROUNDED_TO = (torch.bfloat16, torch.float16)
_MASK, _ORIGINAL = "_mask", "_orig"


@dataclass(frozen=True)
class Inferred:
    """A kind that nobody declared, and what told it."""

    kind: Kind
    because: str


@dataclass(frozen=True)
class _Layer:
    """One LoRA layer: which adapters are merged into its weights, and which it would merge."""

    merged: Counter[str]
    active: tuple[str, ...]


@dataclass(frozen=True)
class Traces:
    """What libraries had left in a model before an edit.

    Attributes:
        layers: Raw path -> LoRA layer.
        names: Every adapter in them.
        adapters: Adapters by name, copied; those that cannot be read are left out.
        masks: Raw names of pruned parameters.
        stored: Matrix name -> how a quantizer stores it.
    """

    layers: Mapping[str, _Layer] = field(default_factory=dict[str, _Layer])
    names: frozenset[str] = frozenset()
    adapters: Mapping[str, Adapter] = field(default_factory=dict[str, Adapter])
    masks: frozenset[str] = frozenset()
    stored: Mapping[str, Grid] = field(default_factory=dict[str, Grid])

    @classmethod
    def of(cls, model: nn.Module) -> Traces:
        """As the model is now."""
        found: dict[str, Adapter] = {}
        for name in adapter_names(model):
            try:
                found[name] = read_adapter(model, name)
            except InputError as error:
                logger.info("what merging the adapter %r should do is not known: %s", name, error)
        names, masks = frozenset(adapter_names(model)), frozenset(_masks(model))
        return cls(_layers(model), names, found, masks, stored_grids(model))


def _layers(model: nn.Module) -> dict[str, _Layer]:
    return {path: _Layer(Counter(merged_names(one)), _active(one)) for path, one in lora_layers(model)}


def _active(layer: Any) -> tuple[str, ...]:
    active = getattr(layer, "active_adapters", None) or getattr(layer, "active_adapter", ())
    return (active,) if isinstance(active, str) else tuple(active)


def _masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """Raw name of every parameter that torch.nn.utils.prune masks -> its mask."""
    found: dict[str, torch.Tensor] = {}
    for path, module in unwrap(model).named_modules():
        for name, mask in module.named_buffers(recurse=False):
            local = name.removesuffix(_MASK)
            if local != name and f"{local}{_ORIGINAL}" in dict(module.named_parameters(recurse=False)):
                found[f"{path}.{local}" if path else local] = mask
    return found


def infer(before: Traces, model: nn.Module, snapshot: Snapshot) -> Inferred | None:
    """The kind of the change since `before`, where what was left behind tells it.

    Args:
        before: Taken just before the change.
        model: The changed model.
        snapshot: The state before the change.
    """
    changed = snapshot.changed_names()
    return (
        _merge(before, model, frozenset(changed))
        or _added_adapter(before, model, changed)
        or _pruning(before, model)
        or _quantized(before, model)
        or _cast(model, snapshot, changed)
    )


# ---------------------------------------------------------------- adapters


def _merge(before: Traces, model: nn.Module, changed: frozenset[str]) -> Inferred | None:
    """Adapters that were merged into the weights, or taken out of them."""
    now = _layers(model)
    merged, unmerged = Counter[str](), Counter[str]()
    for path, then in before.layers.items():
        layer = now.get(path)
        weight_moved = any(name.startswith(f"{clean_name(path)}.") and ".lora_" not in name for name in changed)
        left = layer.merged if layer is not None else then.merged
        if layer is None and (weight_moved or _is_zero(before.adapters, then.active)):
            left = then.merged | Counter(
                then.active
            )  # merge_and_unload merges what is active, and takes the layer away
        merged |= left - then.merged
        unmerged |= then.merged - left
    if bool(merged) == bool(unmerged):
        return None
    names = sorted(merged or unmerged)
    if any(name not in before.adapters for name in names):
        return None
    try:
        adapter = combine([before.adapters[name] for name in names])
    except InputError as error:
        logger.info("several adapters were merged at once, and no contract holds them: %s", error)
        return None
    told = "PEFT notes them as merged" if now else "their layers are gone, and the weights of these changed"
    if unmerged:
        told = "PEFT no longer notes them as merged"
    kind = LoraMerge(adapter, reverse=bool(unmerged), same_base=False)
    return Inferred(kind.bound(model), f"adapters {', '.join(names)}: {told}")


def _is_zero(adapters: Mapping[str, Adapter], names: Sequence[str]) -> bool:
    """Whether merging these adapters changes nothing at all."""
    known = [adapters[name] for name in names if name in adapters]
    return bool(known) and all(
        delta.magnitude is None and not bool(delta.b.any() and delta.a.any())
        for adapter in known
        for delta in adapter.deltas.values()
    )


def _added_adapter(before: Traces, model: nn.Module, changed: Sequence[str]) -> Inferred | None:
    """An adapter that was put beside those that are in use (PEFT's `add_weighted_adapter`, for example)."""
    if not before.layers or not changed:
        return None
    now = _layers(model)
    alike = {path: layer.active for path, layer in now.items()} == {p: one.active for p, one in before.layers.items()}
    fresh = sorted(set(adapter_names(model)) - before.names)
    if alike and fresh and all(".lora_" in name for name in changed):
        return Inferred(Plain("preserving"), f"{', '.join(fresh)} was added, and the adapters in use stayed the same")
    return None


# ---------------------------------------------------------------- masks, quantizers, casts


def _pruning(before: Traces, model: nn.Module) -> Inferred | None:
    """Masks that were laid on, or made permanent."""
    now = _masks(model)
    if now.keys() == before.masks:
        return None
    zeros = [1.0 - float(mask.count_nonzero()) / max(1, mask.numel()) for mask in now.values()]
    fresh = [share for name, share in zip(now, zeros, strict=True) if name not in before.masks]
    if fresh:
        return Inferred(Prune(min(fresh)), f"torch.nn.utils.prune masks {len(fresh)} more parameters")
    return Inferred(Prune(0.0, scope="model"), f"{len(before.masks - now.keys())} masks were made permanent")


def _quantized(before: Traces, model: nn.Module) -> Inferred | None:
    """Matrices that a quantizer stores now and did not, or stores another way."""
    now = stored_grids(model)
    fresh = {n: grid for n, grid in now.items() if before.stored.get(n) != grid and grid.backend not in NOT_QUANTIZERS}
    if not fresh or before.stored.keys() - now.keys():
        return None
    kind = StoredQuantize(fresh)
    return Inferred(kind, f"{kind.params()['backend']} stores {len(fresh)} matrices")


def _cast(model: nn.Module, snapshot: Snapshot, changed: Sequence[str]) -> Inferred | None:
    """Every changed tensor is a cast of what it was: to the dtype that it has now, or to a narrower one and back.

    One tensor at a time: the originals may lie on disk, and the first one that is something else settles it.
    """
    present = {name: one.tensor for one in iter_tensors(model) for name in (one.name, *one.tied_names)}
    if not changed or any(name not in present or name not in snapshot.names for name in changed):
        return None
    left: set[torch.dtype] | None = None
    for name in changed:
        then, now = snapshot.original(name), local_of(present[name])
        if then.shape != now.shape or not then.is_floating_point() or not now.is_floating_point():
            return None
        asked = set(_ROUNDED_TO) if now.dtype == then.dtype else {now.dtype}
        asked = asked if left is None else asked & left
        left = {one for one in asked if same_bits(then.to(now.device).to(one).to(now.dtype), now)}
        if not left:
            return None
    dtype = min(left or (), key=str)
    return Inferred(Cast(dtype), "every changed tensor is the cast of what it was, bit for bit")
