"""The only walker: a model in memory or a checkpoint on disk -> named tensors and weight matrices.

A matrix is found by what its module is, not by its shape: every parameter of two or more
dimensions is enumerated, of an unknown architecture too, and what is not a linear map or cannot
be read carries the reason in `refusal`, so that "measured n of m" can always be printed.
Buffers are tensors (`iter_tensors`), never matrices. What a quantizer, a mask or a parametrization stores in
its own way is one matrix, read by a reader (`weightproof.readers`), and its parts are tensors. Names are public
(`clean_name`), tied tensors appear once under the first of their names. Of a sharded tensor the shapes, names and
ties are those of the whole model; the values are the part that lies here (`WeightMatrix.shard`).

transformers, accelerate and PEFT are recognised by class and attribute names; none is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from weightproof.errors import InputError
from weightproof.families import clean_name, family_of, public_names, unwrap
from weightproof.folders.checkpoints import iter_checkpoint_matrices
from weightproof.folders.layouts import DEPTHWISE, Layout, Piece, Stored, parameter_layout, pieces, unreadable_dtype
from weightproof.folders.readers import PackedWeight, Placed, Unreadable, packed_weights
from weightproof.parallel.placements import class_of, is_dtensor, is_flattened, local_of, refusal_of, shape_of
from weightproof.parallel.shards import Shard, flat_kernels, shard_of, slab
from weightproof.types import NamedTensor, StructureReading, WeightMatrix

__all__ = [
    "clean_name",
    "iter_checkpoint_matrices",
    "iter_tensors",
    "iter_weight_matrices",
    "read_structure",
    "storage_identity",
    "unwrap",
]

# Experts stored (E, in, out) in classes that do not say so themselves (`is_transposed`).
_TURNED_STACK_CLASSES = frozenset({"GptOssExperts", "Llama4TextExperts"})


@dataclass(slots=True)
class _Entry:
    """One storage and every (raw name, owner) under which it is registered.

    `packed` is the packed weight that it is a part of; `local` its name there.
    """

    tensor: Tensor
    module: nn.Module
    is_buffer: bool
    persistent: bool
    raw_names: list[str] = field(default_factory=list)
    packed: Placed | None = None
    local: str = ""


@dataclass(slots=True)
class _Walk:
    """Everything a model holds, with public names: tensors by storage, and packed weights."""

    entries: list[_Entry]
    packed: list[Placed]
    public: Mapping[str, str]

    def name(self, entry: _Entry) -> str:
        return self.public[entry.raw_names[0]]

    def tied_names(self, entry: _Entry) -> tuple[str, ...]:
        return tuple(self.public[raw] for raw in entry.raw_names[1:])


def storage_identity(tensor: Tensor) -> Hashable:
    """Equal for two tensors that are the same storage seen the same way; of a DTensor, of its local part.

    Tensors without memory of their own (meta, empty, a ZeRO-3 parameter, other subclasses) are
    compared as objects.
    """
    memory = local_of(tensor) if is_dtensor(tensor) else tensor
    if not _has_memory(memory) or memory.is_meta or memory.numel() == 0:
        return id(tensor)
    return memory.device, memory.dtype, memory.data_ptr(), tuple(memory.shape), memory.stride()


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is plain, or a parameter class of its own around plain memory."""
    if type(tensor) in (Tensor, nn.Parameter, nn.Buffer):
        return True
    return not nn.parameter.is_lazy(tensor) and type(tensor.detach()) is Tensor


def _registered(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor, bool]]:
    """(raw name, owner, local name, tensor, is_buffer) of parameters, then of buffers."""
    modules = list(model.named_modules(remove_duplicate=False))
    for is_buffer in (False, True):
        for prefix, module in modules:
            local = module.named_buffers if is_buffer else module.named_parameters
            for name, tensor in local(recurse=False, remove_duplicate=False):
                yield f"{prefix}.{name}" if prefix else name, module, name, tensor, is_buffer


def _walk(model: nn.Module) -> _Walk:
    model = unwrap(model)
    packed = packed_weights(model)
    parts = _parts(packed)
    found: dict[Hashable, _Entry] = {}
    for raw, module, name, tensor, is_buffer in _registered(model):
        if raw in parts and parts[raw][1] is None:
            continue  # a tensor subclass: its inner tensors stand for it
        persistent = not is_buffer or name not in module._non_persistent_buffers_set
        entry = found.setdefault(storage_identity(tensor), _Entry(tensor, module, is_buffer, persistent))
        entry.raw_names.append(raw)
        if raw in parts and entry.packed is None:
            entry.packed, entry.local = parts[raw][0], parts[raw][2]
    for raw, (placed, tensor, local) in parts.items():
        if tensor is None:
            continue
        entry = found.setdefault(
            storage_identity(tensor), _Entry(tensor, placed.module, False, False, [], placed, local)
        )
        if raw not in entry.raw_names:
            entry.raw_names.append(raw)
    entries = list(found.values())
    matrices = [raw for one in packed for raw in one.raws([one.found.name])]
    names = [raw for entry in entries for raw in entry.raw_names]
    return _Walk(entries, packed, public_names(dict.fromkeys([*names, *matrices])))


def _parts(packed: list[Placed]) -> dict[str, tuple[Placed, Tensor | None, str]]:
    """Raw name -> the packed weight that it is a part of, the plain tensor behind it, and its local name.

    None for a registered tensor that holds no values of its own.
    """
    found: dict[str, tuple[Placed, Tensor | None, str]] = {}
    for one in packed:
        tensors = one.found.tensors
        for local in dict.fromkeys([*one.found.registered, *tensors]):
            found |= {raw: (one, tensors.get(local), local) for raw in one.raws([local])}
    return found


def iter_tensors(model: nn.Module) -> Iterator[NamedTensor]:
    """Every parameter, then every buffer, then what lies in packed weights, once per storage.

    Other names are in `tied_names`. A tensor subclass that a reader knows gives the plain tensors it is made of.
    """
    walk = _walk(model)
    for entry in walk.entries:
        shape = shape_of(entry.tensor)
        yield NamedTensor(
            walk.name(entry),
            entry.tensor,
            entry.is_buffer,
            entry.persistent,
            walk.tied_names(entry),
            shape,
            _part_of(walk, entry),
        )


def _part_of(walk: _Walk, entry: _Entry) -> tuple[str, str] | None:
    """Public name of the packed matrix that a tensor is a part of, and its backend; a bias is not a part of it."""
    placed = entry.packed
    if placed is None or entry.local == "bias":
        return None
    return walk.public[placed.raw(placed.found.name)], placed.found.backend


# ---------------------------------------------------------------- matrices


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D: y = x W + b with W stored (nx, nf)."""
    return class_of(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _unreadable(tensor: Tensor, module: nn.Module) -> str | None:
    """Why the values of a parameter cannot be read as they lie in memory; None when they can."""
    local = local_of(tensor)
    if local.is_meta and hasattr(module, "_hf_hook"):
        return "accelerate has offloaded it and it has no values in memory: load the model without offloading"
    if local.is_meta:
        return "it is on the meta device and has no values: load the weights first"
    if reason := refusal_of(tensor):
        return reason
    # Tensor subclasses of quantizers keep a floating dtype and the logical shape.
    if type(local) is not Tensor:
        return f"it is stored as {type(local).__name__}, not as a plain tensor: dequantise it to measure it"
    return unreadable_dtype(local.dtype)


def _module_class(module: nn.Module, ndim: int) -> str:
    """Class name of a module; a subclass of torch's convolutions counts as what it derives from."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"Conv{'Transpose' if module.transposed else ''}{ndim - 2}d"
    return "Linear" if _is_conv1d(module) else class_of(module).__name__


def _matrix_shape(tensor: Tensor) -> tuple[int, ...]:
    """Logical shape of a parameter; of FSDP version 1, where nobody knows it, one row of what is here."""
    return (1, tensor.numel()) if is_flattened(tensor) and tensor.ndim < 2 else shape_of(tensor)


def _stored(name: str, entry: _Entry, shape: tuple[int, ...]) -> Stored:
    module = entry.module
    module_class = _module_class(module, len(shape))
    turned_stack = bool(getattr(module, "is_transposed", class_of(module).__name__ in _TURNED_STACK_CLASSES))
    layout = parameter_layout(shape, module_class, turned_linear=_is_conv1d(module), turned_stack=turned_stack)
    refusal = _unreadable(entry.tensor, module)
    if refusal is None and layout is Layout.CONVOLUTION and shape[1] == 1 and getattr(module, "groups", 1) > 1:
        refusal = DEPTHWISE
    return Stored(name, shape, layout, module_class, refusal)


def _load(tensor: Tensor, piece: Piece) -> Tensor:
    return piece.select(local_of(tensor))


def _refuse_load(name: str, num_parts: int) -> Tensor:
    raise InputError(
        f"{name} is sharded over {num_parts} processes and whole on none of them: a GuardSession reads it through its "
        "owner; to read it yourself, assemble it on one (weightproof.parallel.shards.assemble)"
    )


def _aliases(tensor: Tensor, piece: Piece) -> bool:
    """Whether `load()` shares memory with the parameter (a convolution of unusual strides is copied)."""
    memory = local_of(tensor)
    return memory.is_contiguous() or _address(piece.select(memory)) == _address(memory)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _matrix_shard(layout: Layout, index: int, stored: Shard) -> Shard:
    """The shard of one matrix from that of the stored tensor."""
    if layout in (Layout.STACK, Layout.TURNED_STACK):
        return replace(slab(stored, index), turned=layout is Layout.TURNED_STACK)
    return replace(flat_kernels(stored), turned=layout in (Layout.TURNED, Layout.TRANSPOSED_CONVOLUTION))


def iter_weight_matrices(model: nn.Module) -> Iterator[WeightMatrix]:
    """Every weight matrix of a model, oriented (d_out, d_in), once per storage.

    `load()` gives a view on live storage: what is written to it is written to the model (only
    `snapshot.py` does); of a matrix that is sharded, the part that lies here is in `shard`; of one that is
    packed (`storage`), a fresh dequantised copy. A matrix with a `refusal` is counted, not measured; what its
    `load()` gives means nothing.

    Args:
        model: Any module; DDP, torch.compile and PEFT wrappers are looked through.

    Examples:
        >>> [(m.name, m.d_out, m.d_in) for m in iter_weight_matrices(nn.Sequential(nn.Linear(3, 2)))]
        [('0.weight', 2, 3)]
    """
    walk = _walk(model)
    hidden = {raw for one in walk.packed for raw in one.raws(one.found.registered)}
    for entry in walk.entries:
        if hidden.isdisjoint(entry.raw_names):
            yield from _plain_matrices(walk.name(entry), walk.tied_names(entry), entry)
    yield from _packed_matrices(walk)


def _plain_matrices(name: str, tied_names: tuple[str, ...], entry: _Entry) -> Iterator[WeightMatrix]:
    """The matrices of one parameter."""
    shape = _matrix_shape(entry.tensor)
    if entry.is_buffer or entry.packed is not None or len(shape) < 2:
        return
    stored = _stored(name, entry, shape)
    shard = shard_of(entry.tensor) if stored.refusal is None else None
    for index, piece in enumerate(pieces(stored)):
        suffix = piece.name.removeprefix(name)
        matrix = WeightMatrix(
            name=piece.name,
            family=piece.family,
            d_out=piece.d_out,
            d_in=piece.d_in,
            dtype=entry.tensor.dtype,
            tied_names=tuple(f"{tied}{suffix}" for tied in tied_names),
            tensor_name=name,
            load=partial(_load, entry.tensor, piece),
            refusal=piece.refusal,
            select=piece.select,
        )
        if piece.refusal is not None:
            yield matrix
        elif shard is None:
            yield replace(matrix, is_view=_aliases(entry.tensor, piece))
        else:
            yield _as_shard(matrix, shard, partial(_matrix_shard, stored.layout, index))


def _packed_matrices(walk: _Walk) -> Iterator[WeightMatrix]:
    """One matrix for each packed weight; tied ones, whose parts are the same storage, once."""
    by_raw = {raw: entry for entry in walk.entries for raw in entry.raw_names}
    found: dict[Hashable, WeightMatrix] = {}
    for placed in walk.packed:
        names = [walk.public[raw] for raw in placed.raws([placed.found.name])]
        parts = _stored_parts(walk, placed, by_raw)
        key = tuple(parts.values()) or id(placed)
        if key in found:
            known = found[key]
            found[key] = replace(known, tied_names=(*known.tied_names, *names))
        else:
            found[key] = _packed_matrix(placed, names, parts)
    yield from found.values()


def _stored_parts(walk: _Walk, placed: Placed, by_raw: Mapping[str, _Entry]) -> dict[str, str]:
    """Local name of each part of a packed weight -> public name of the tensor; a bias is not a part."""
    return {local: walk.name(by_raw[placed.raw(local)]) for local in placed.found.tensors if local != "bias"}


def _packed_matrix(placed: Placed, names: list[str], parts: Mapping[str, str]) -> WeightMatrix:
    found = placed.found
    matrix = WeightMatrix(
        name=names[0],
        family=family_of(names[0], class_of(placed.module).__name__),
        d_out=found.d_out,
        d_in=found.d_in,
        dtype=torch.float32,
        tied_names=tuple(names[1:]),
        tensor_name=next(iter(parts.values()), names[0]),
        load=partial(_refuse_packed, names[0], found),
        is_view=False,
        storage=found.backend,
    )
    if not isinstance(found, PackedWeight):
        return replace(matrix, parts=parts, refusal=found.refusal)
    return replace(matrix, dtype=found.dtype, load=found.dequantize, parts=parts, rebuild=found.rebuild)


def _refuse_packed(name: str, found: PackedWeight | Unreadable) -> Tensor:
    raise InputError(f"{name} has no values: {found.refusal if isinstance(found, Unreadable) else found.backend}")


def _as_shard(matrix: WeightMatrix, stored: Shard, select: Callable[[Shard], Shard]) -> WeightMatrix:
    shard, num_parts = select(stored), len(stored.ranges)
    same_memory = _address(shard.local) == _address(stored.local)
    return replace(
        matrix,
        load=partial(_refuse_load, matrix.name, num_parts),
        is_view=same_memory or shard.local.numel() == 0,
        shard=shard,
        select_shard=select,
    )


# ---------------------------------------------------------------- structure


def read_structure(model: nn.Module) -> StructureReading:
    """Module classes (as they were before they were sharded), tie groups and embedding sizes by public name.

    `ties` holds each group of names that share one storage, sorted; `embedding_sizes` the number
    of rows of every embedding table by module name.
    """
    model = unwrap(model)
    modules = [(raw, module) for raw, module in model.named_modules(remove_duplicate=False) if raw]
    public = public_names(raw for raw, _ in modules)
    walk = _walk(model)
    groups = [(walk.name(entry), *walk.tied_names(entry)) for entry in walk.entries if len(entry.raw_names) > 1]
    embeddings = [(raw, module) for raw, module in modules if isinstance(module, nn.Embedding)]
    return StructureReading(
        modules={"": class_of(model).__name__} | {public[raw]: class_of(module).__name__ for raw, module in modules},
        ties=frozenset(tuple(sorted(group)) for group in groups),
        embedding_sizes={public[raw]: module.num_embeddings for raw, module in embeddings},
    )
