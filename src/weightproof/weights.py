"""The only walker: a model in memory or a checkpoint on disk -> named tensors and weight matrices.

A matrix is found by what its module is, not by its shape: every parameter of two or more
dimensions is enumerated, of an unknown architecture too, and what is not a linear map or cannot
be read carries the reason in `refusal`, so that "measured n of m" can always be printed.
Buffers are tensors (`iter_tensors`), never matrices. Names are public (`clean_name`), tied
tensors appear once under the first of their names.

transformers and PEFT are recognised by class and attribute names; neither is imported.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from weightproof.checkpoints import iter_checkpoint_matrices
from weightproof.families import clean_name, public_names, unwrap
from weightproof.layouts import DEPTHWISE, Layout, Piece, Stored, parameter_layout, pieces, unreadable_dtype
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
    """One storage and every (raw name, owner) under which it is registered."""

    tensor: Tensor
    module: nn.Module
    is_buffer: bool
    persistent: bool
    raw_names: list[str] = field(default_factory=list)


def storage_identity(tensor: Tensor) -> Hashable:
    """Equal for two tensors that are the same storage seen the same way.

    Tensors without memory of their own (meta, empty, subclasses such as DTensor) are compared as
    objects.
    """
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    if not plain or tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _registered(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor, bool]]:
    """(raw name, owner, local name, tensor, is_buffer) of parameters, then of buffers."""
    modules = list(model.named_modules(remove_duplicate=False))
    for is_buffer in (False, True):
        for prefix, module in modules:
            local = module.named_buffers if is_buffer else module.named_parameters
            for name, tensor in local(recurse=False, remove_duplicate=False):
                yield f"{prefix}.{name}" if prefix else name, module, name, tensor, is_buffer


def _entries(model: nn.Module) -> list[_Entry]:
    found: dict[Hashable, _Entry] = {}
    for raw, module, name, tensor, is_buffer in _registered(unwrap(model)):
        persistent = not is_buffer or name not in module._non_persistent_buffers_set
        entry = found.setdefault(storage_identity(tensor), _Entry(tensor, module, is_buffer, persistent))
        entry.raw_names.append(raw)
    return list(found.values())


def _named_entries(model: nn.Module) -> list[tuple[str, tuple[str, ...], _Entry]]:
    entries = _entries(model)
    public = public_names(raw for entry in entries for raw in entry.raw_names)
    return [(public[entry.raw_names[0]], tuple(public[raw] for raw in entry.raw_names[1:]), entry) for entry in entries]


def iter_tensors(model: nn.Module) -> Iterator[NamedTensor]:
    """Every parameter, then every buffer, once per storage; other names in `tied_names`."""
    for name, tied_names, entry in _named_entries(model):
        yield NamedTensor(name, entry.tensor, entry.is_buffer, entry.persistent, tied_names)


# ---------------------------------------------------------------- matrices


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D: y = x W + b with W stored (nx, nf)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _unreadable(tensor: Tensor) -> str | None:
    """Why the values of a parameter cannot be read as they lie in memory; None when they can."""
    if tensor.is_meta:
        return "it is on the meta device and has no values: load the weights first"
    if type(tensor).__name__ == "DTensor":
        return "it is sharded (DTensor): sharded weights are not supported yet"
    # Tensor subclasses of quantizers keep a floating dtype and the logical shape.
    if type(tensor.data) not in (Tensor, nn.Parameter):
        return f"it is stored as {type(tensor.data).__name__}, not as a plain tensor: dequantise it to measure it"
    return unreadable_dtype(tensor.dtype)


def _module_class(module: nn.Module, ndim: int) -> str:
    """Class name of a module; a subclass of torch's convolutions counts as what it derives from."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"Conv{'Transpose' if module.transposed else ''}{ndim - 2}d"
    return "Linear" if _is_conv1d(module) else type(module).__name__


def _stored(name: str, entry: _Entry) -> Stored:
    module, shape = entry.module, tuple(entry.tensor.shape)
    module_class = _module_class(module, len(shape))
    turned_stack = bool(getattr(module, "is_transposed", type(module).__name__ in _TURNED_STACK_CLASSES))
    layout = parameter_layout(shape, module_class, turned_linear=_is_conv1d(module), turned_stack=turned_stack)
    refusal = _unreadable(entry.tensor)
    if refusal is None and layout is Layout.CONVOLUTION and shape[1] == 1 and getattr(module, "groups", 1) > 1:
        refusal = DEPTHWISE
    return Stored(name, shape, layout, module_class, refusal)


def _load(tensor: Tensor, piece: Piece) -> Tensor:
    return piece.select(tensor.detach())


def _aliases(tensor: Tensor, piece: Piece) -> bool:
    """Whether `load()` shares memory with the parameter (a convolution of unusual strides is copied)."""
    if piece.refusal is not None or tensor.is_contiguous():
        return True
    return _load(tensor, piece).untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def iter_weight_matrices(model: nn.Module) -> Iterator[WeightMatrix]:
    """Every weight matrix of a model, oriented (d_out, d_in), once per storage.

    `load()` gives a view on live storage: what is written to it is written to the model (only
    `snapshot.py` does). A matrix with a `refusal` is counted, not measured; its `load()` raises
    nothing of its own, but its values mean nothing.

    Args:
        model: Any module; DDP, torch.compile and PEFT wrappers are looked through.

    Example:
        >>> [(m.name, m.d_out, m.d_in) for m in iter_weight_matrices(nn.Sequential(nn.Linear(3, 2)))]
        [('0.weight', 2, 3)]
    """
    for name, tied_names, entry in _named_entries(model):
        if entry.is_buffer or entry.tensor.ndim < 2:
            continue
        for piece in pieces(_stored(name, entry)):
            suffix = piece.name.removeprefix(name)
            yield WeightMatrix(
                name=piece.name,
                family=piece.family,
                d_out=piece.d_out,
                d_in=piece.d_in,
                dtype=entry.tensor.dtype,
                tied_names=tuple(f"{tied}{suffix}" for tied in tied_names),
                tensor_name=name,
                load=partial(_load, entry.tensor, piece),
                is_view=_aliases(entry.tensor, piece),
                refusal=piece.refusal,
                select=piece.select,
            )


# ---------------------------------------------------------------- structure


def read_structure(model: nn.Module) -> StructureReading:
    """Module classes, tie groups and embedding sizes under public names.

    `ties` holds each group of names that share one storage, sorted; `embedding_sizes` the number
    of rows of every embedding table by module name.
    """
    model = unwrap(model)
    modules = [(raw, module) for raw, module in model.named_modules(remove_duplicate=False) if raw]
    public = public_names(raw for raw, _ in modules)
    groups = [(name, *tied_names) for name, tied_names, _ in _named_entries(model) if tied_names]
    embeddings = [(raw, module) for raw, module in modules if isinstance(module, nn.Embedding)]
    return StructureReading(
        modules={"": type(model).__name__} | {public[raw]: type(module).__name__ for raw, module in modules},
        ties=frozenset(tuple(sorted(group)) for group in groups),
        embedding_sizes={public[raw]: module.num_embeddings for raw, module in embeddings},
    )
