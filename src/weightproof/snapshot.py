"""The only writer of weights: keeps originals, writes planned values, restores, proves the digest.

A snapshot keeps the values of every parameter and buffer, and the objects that hold them: which
module, parameter and buffer object sits where, and the storage behind each. Restoring puts the same
objects back and writes into the same storage, so that ties, optimizer references and DDP buckets
survive, whatever the edit did (in-place writes, `model.to(dtype)`, replaced modules, parametrizations).

A module's own notes (flags, numbers, small lists, such as PEFT's `merged_adapters`) go back with its
weights, and so do those of its `config` (a number of layers, a vocabulary size). Not covered: train or
eval mode, gradients' values, optimizer state, other objects (a generation config, for example), and
hooks on modules whose tensors and children stayed the same objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from weightproof.errors import InputError, RestoreError, SnapshotError
from weightproof.shards import Shard
from weightproof.tensor_store import (
    FolderStore,
    MemoryStore,
    Store,
    as_bits,
    dense_part,
    model_digest,
    same_bits,
    tensor_digest,
    tensor_digests,
)
from weightproof.types import WeightMatrix
from weightproof.weights import clean_name, iter_tensors, iter_weight_matrices, storage_identity, unwrap

__all__ = ["Snapshot", "model_digest", "tensor_digest", "write_matrix"]

_TABLES = ("_modules", "_parameters", "_buffers")
_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)

# What torch keeps in every module, and the types that a module's own notes are made of.
_MODULE_OWN = frozenset(vars(nn.Module()))
_SIMPLE = (bool, int, float, str, tuple, type(None), torch.dtype, torch.device)


@dataclass(slots=True)
class _Holder:
    """A tensor object, with an alias of the storage that was behind it and what belongs to it."""

    holder: torch.Tensor
    alias: torch.Tensor
    requires_grad: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Holder:
        return cls(tensor, tensor.data, tensor.requires_grad)

    def put_back(self) -> None:
        """Give the object its original storage and flag; a gradient follows the dtype."""
        tensor, alias = self.holder, self.alias
        if not _same_memory(tensor, alias):
            grad, tensor.grad = tensor.grad, None
            tensor.data = alias
            if grad is not None and grad.shape == alias.shape:
                tensor.grad = grad.to(device=alias.device, dtype=alias.dtype)
        if tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)


@dataclass(slots=True)
class _Notes:
    """The flags, numbers and small containers among an object's attributes, and what was in them."""

    owner: object
    kept: dict[str, tuple[object, object]]

    @classmethod
    def of(cls, owner: object) -> _Notes:
        own = vars(owner)
        return cls(owner, {key: (value, _copy(value)) for key, value in own.items() if _is_bookkeeping(key, value)})

    def put_back(self) -> None:
        own = vars(self.owner)
        for key, (value, content) in self.kept.items():
            _refill(value, content)
            if key not in own or own[key] is not value:
                own[key] = value


@dataclass(slots=True)
class _ModuleState:
    """One module object: its class, its tables, its bookkeeping, and what an edit may hang onto it.

    `visible` are the names in the tables that no plain attribute of the instance hides.
    """

    module: nn.Module
    kind: type[nn.Module]
    tables: dict[str, dict[str, object]]
    visible: tuple[str, ...]
    non_persistent: set[str]
    hooks: dict[str, dict[int, object]]
    notes: _Notes
    forward: object

    @classmethod
    def of(cls, module: nn.Module) -> _ModuleState:
        own = vars(module)
        return cls(
            module=module,
            kind=type(module),
            tables={table: dict(own[table]) for table in _TABLES},
            visible=tuple(name for table in _TABLES for name in own[table] if name not in own),
            non_persistent=set(own["_non_persistent_buffers_set"]),
            hooks={table: dict(own[table]) for table in _HOOK_TABLES},
            notes=_Notes.of(module),
            forward=own.get("forward"),
        )

    def is_changed(self) -> bool:
        """Whether the class, a table or the instance's `forward` is not what it was."""
        own = vars(self.module)
        return (
            type(self.module) is not self.kind
            or own.get("forward") is not self.forward
            or own["_non_persistent_buffers_set"] != self.non_persistent
            or any(not _same_objects(own[table], kept) for table, kept in self.tables.items())
            or any(name in own for name in self.visible)
        )

    def put_back(self) -> None:
        """Restore bookkeeping, and of a changed module the tables, in place, and the hooks beside them."""
        if self.is_changed():
            self._put_structure_back()
        self.notes.put_back()

    def _put_structure_back(self) -> None:
        module, own = self.module, vars(self.module)
        module.__class__ = self.kind
        for table, kept in (*self.tables.items(), *self.hooks.items()):
            own[table].clear()
            own[table].update(kept)
        for name in self.visible:
            own.pop(name, None)  # a plain attribute left by a reparametrization would hide the tensor
        own["_non_persistent_buffers_set"].clear()
        own["_non_persistent_buffers_set"].update(self.non_persistent)
        own.pop("forward", None)
        if self.forward is not None:
            own["forward"] = self.forward


@dataclass(slots=True)
class _Record:
    """One distinct tensor: its public names, and every object that holds its storage."""

    name: str
    names: tuple[str, ...]
    holders: list[_Holder] = field(default_factory=list)


class Snapshot:
    """Everything needed to take a change of weights back, bit for bit.

    Made by `Snapshot.capture`; `discard` it when it is no longer needed.

    Attributes:
        nbytes: Size of the copies, in memory or on disk.
    """

    def __init__(self, model: nn.Module, store: Store, records: dict[str, _Record]) -> None:
        self._model = model
        self._store: Store | None = store
        self._records = records
        self._modules = [_ModuleState.of(module) for module in model.modules()]
        self._configs = _configs(model)
        self._paths = dict(model.named_modules(remove_duplicate=False))
        self._registered = _registered(model)
        self._selectors = _selectors(model)
        self.nbytes = store.nbytes

    @classmethod
    def capture(
        cls, model: nn.Module, directory: Path | str | None = None, companions: Mapping[str, torch.Tensor] | None = None
    ) -> Snapshot:
        """Copy every parameter and buffer, and note the module graph.

        Args:
            model: Any module; DDP and torch.compile wrappers are looked through.
            directory: Keep the copies in a fresh sub-folder of this folder (safetensors, verified
                when read back); None: in memory, each on its tensor's device.
            companions: Other live tensors, kept and restored with the model.

        Raises:
            SnapshotError: If there is no room, or a tensor cannot be copied bit for bit (sharded,
                quantized subclass, meta, sparse). The model is untouched.
        """
        model = unwrap(model)
        for raw, tensor in _registered(model).items():
            _require_plain(clean_name(raw), tensor)
        records = _records(model)
        originals = {name: record.holders[0].alias for name, record in records.items()}
        store = MemoryStore(originals) if directory is None else FolderStore(originals, Path(directory))
        return cls(model, store, records)

    @property
    def names(self) -> frozenset[str]:
        """Public names of the tensors at capture, one of each."""
        return frozenset(self._records)

    @property
    def digests(self) -> Mapping[str, str]:
        """SHA-256 of every tensor at capture, by public name."""
        return self._held().digests

    @property
    def model_digest(self) -> str:
        """SHA-256 over names and digests of all tensors at capture."""
        return model_digest(self.digests)

    def original(self, tensor_name: str) -> torch.Tensor:
        """The kept copy of a tensor, by any of its public names; do not write to it.

        Raises:
            InputError: If the model had no such tensor.
            RestoreError: If the copy on disk is gone or was altered.
        """
        if tensor_name in self._records:
            return self._held().read(tensor_name)
        for name, record in self._records.items():
            if tensor_name in record.names:
                return self._held().read(name)
        raise InputError(f"the snapshot holds no tensor {tensor_name!r}")

    def original_matrix(self, matrix: WeightMatrix) -> torch.Tensor | None:
        """What `matrix.load()` gave at capture, (d_out, d_in); None for a matrix that was not there.

        The orientation is the one the matrix had at capture, whatever replaced it since.
        """
        found = self._selectors.get(matrix.name)
        if found is None:
            return None
        tensor_name, select = found
        kept, alias = self.original(tensor_name), self._records[tensor_name].holders[0].alias
        return select(kept if alias.is_contiguous() else _strided_like(kept, alias))

    def original_shard(self, matrix: WeightMatrix) -> torch.Tensor | Shard | None:
        """The original of a matrix: whole where it is whole here, else this process's part."""
        return self.original_matrix(matrix)

    def changed_names(self) -> tuple[str, ...]:
        """Public names of tensors whose bits, dtype or shape differ now, or that were added or removed.

        Compared bit for bit (NaN equals NaN, 0.0 differs from -0.0), without hashing. A tensor with
        several names is given once, unless only some of its names changed.
        """
        now = {name: named.tensor for named in iter_tensors(self._model) for name in (named.name, *named.tied_names)}
        changed: list[str] = []
        for record in self._records.values():
            different = self._differing(record, now)
            changed += [record.name] if len(different) == len(record.names) else different
        known = {name for record in self._records.values() for name in record.names}
        return (*changed, *(name for name in now if name not in known))

    def _differing(self, record: _Record, now: Mapping[str, torch.Tensor]) -> list[str]:
        kept = self._held().read(record.name)
        equal: dict[int, bool] = {}
        for name in record.names:
            tensor = now.get(name)
            if tensor is not None and id(tensor) not in equal:
                equal[id(tensor)] = type(tensor) in _PLAIN_TYPES and same_bits(tensor, kept)
        return [name for name in record.names if name not in now or not equal[id(now[name])]]

    def replaced_modules(self) -> tuple[str, ...]:
        """Public names of modules that are another object or class now, were added, or removed.

        Of a replaced subtree only the topmost name is given.
        """
        now = dict(self._model.named_modules(remove_duplicate=False))
        kinds = {id(state.module): state.kind for state in self._modules}
        different = {
            path
            for path in now.keys() | self._paths.keys()
            if now.get(path) is not self._paths.get(path) or type(now[path]) is not kinds[id(now[path])]
        }
        topmost = [path for path in different if not any(path.startswith(f"{other}.") for other in different)]
        return tuple(sorted(clean_name(path) for path in topmost))

    def restore(self) -> str:
        """Put every object, tie and value back, and prove it.

        The copies that will be written are checked against their digests before anything is
        touched. A gradient follows its parameter back to the original dtype.

        Returns:
            The model digest, equal to the one at capture.

        Raises:
            RestoreError: Naming the tensor. Do not use the model: it may be partly restored.
        """
        digests = self.digests
        try:
            differing = self._verified_differences(digests)
            for state in self._modules:
                state.put_back()
            for owner, name, notes in self._configs:
                vars(owner)[name] = notes.owner
                notes.put_back()
            for record in self._records.values():
                for holder in record.holders:
                    holder.put_back()
                if record.name in differing:
                    _write(record.holders[0].alias, self._held().read(record.name))
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, OSError) as error:
            raise RestoreError(f"restoring failed midway, do not use the model: {error}") from error
        self._prove(digests)
        return model_digest(digests)

    def _verified_differences(self, digests: Mapping[str, str]) -> frozenset[str]:
        """Names of tensors whose storage no longer holds the original, their copies proven intact."""
        differing = []
        for name, record in self._records.items():
            kept = self._held().read(name)
            if not all(same_bits(holder.alias, kept) for holder in record.holders):
                if tensor_digest(kept) != digests[name]:
                    raise RestoreError(f"the kept copy of {name} was altered: nothing was restored")
                differing.append(name)
        return frozenset(differing)

    def _prove(self, digests: Mapping[str, str]) -> None:
        now = _registered(self._model)
        for raw in now.keys() | self._registered.keys():
            if now.get(raw) is not self._registered.get(raw):
                raise RestoreError(
                    f"{clean_name(raw)} is not the original object after restoring: do not use the model"
                )
        if dict(self._model.named_modules(remove_duplicate=False)) != self._paths:
            raise RestoreError("the module graph is not the original one after restoring: do not use the model")
        for record in self._records.values():
            for holder in record.holders:
                if not _same_memory(holder.holder, holder.alias):
                    raise RestoreError(f"{record.name} is not in its original storage: do not use the model")
        found = tensor_digests({name: record.holders[0].alias for name, record in self._records.items()})
        wrong = [name for name in digests if found[name] != digests[name]]
        if wrong:
            raise RestoreError(
                f"{wrong[0]} has another digest after restoring ({len(wrong)} of {len(digests)} tensors): "
                "do not use the model"
            )

    def discard(self) -> None:
        """Free the memory or remove the files; the snapshot cannot be used afterwards."""
        if self._store is not None:
            self._store.discard()
            self._store = None

    def _held(self) -> Store:
        if self._store is None:
            raise RestoreError("this snapshot was discarded: nothing can be read or restored from it")
        return self._store


def write_matrix(matrix: WeightMatrix, values: torch.Tensor) -> None:
    """Write new (d_out, d_in) values into the live storage of a matrix, cast once to its dtype.

    Raises:
        InputError: If the matrix is refused, is not a view of live storage, or has another shape.
    """
    if matrix.refusal is not None:
        raise InputError(f"{matrix.name} cannot be written: {matrix.refusal}")
    if not matrix.is_view:
        raise InputError(f"{matrix.name} cannot be written: it is a copy, not a view of the model's storage")
    target = matrix.load()
    if values.shape != target.shape:
        raise InputError(
            f"{matrix.name} has shape {list(target.shape)} (d_out, d_in), the new values {list(values.shape)}"
        )
    if not target.is_floating_point() or not values.is_floating_point():
        raise InputError(f"{matrix.name}: {values.dtype} values cannot be written into {target.dtype} weights")
    with torch.no_grad():
        target.copy_(values.detach().to(device=target.device, dtype=target.dtype))


def write_part(matrix: WeightMatrix, part: torch.Tensor) -> None:
    """Write this process's part of a sharded matrix."""
    write_matrix(matrix, part)


_PLAIN_TYPES = (torch.Tensor, nn.Parameter)


def _write(target: torch.Tensor, kept: torch.Tensor) -> None:
    """Copy bit for bit into existing storage."""
    with torch.no_grad():
        dense = dense_part(target)
        part = kept[tuple(slice(0, size) for size in dense.shape)]
        as_bits(dense).copy_(as_bits(part).to(dense.device))


def _strided_like(kept: torch.Tensor, alias: torch.Tensor) -> torch.Tensor:
    """The copy laid out in memory as its original is (a convolution in channels-last, for example)."""
    laid_out = torch.empty_strided(alias.size(), alias.stride(), dtype=kept.dtype, device=kept.device)
    _write(laid_out, kept)
    return laid_out


def _registered(model: nn.Module) -> dict[str, torch.Tensor]:
    """Raw name -> tensor object, every registration of every parameter and buffer."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in model.named_modules(remove_duplicate=False)
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    }


def _records(model: nn.Module) -> dict[str, _Record]:
    """One record per storage, under the names of `iter_tensors`, with all objects that hold it."""
    records: dict[str, _Record] = {}
    by_memory: dict[object, _Record] = {}
    for named in iter_tensors(model):
        record = _Record(named.name, (named.name, *named.tied_names))
        records[named.name] = by_memory[storage_identity(named.tensor)] = record
    seen: set[int] = set()
    for tensor in _registered(model).values():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            by_memory[storage_identity(tensor)].holders.append(_Holder.of(tensor))
    return records


def _selectors(model: nn.Module) -> dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """How each matrix is selected from its stored tensor, by matrix name."""
    return {
        matrix.name: (matrix.tensor_name, matrix.select)
        for matrix in iter_weight_matrices(model)
        if matrix.select is not None and matrix.refusal is None
    }


def _require_plain(name: str, tensor: torch.Tensor) -> None:
    """Refuse what cannot be copied and restored bit for bit."""
    reason = None
    if type(tensor) not in _PLAIN_TYPES or type(tensor.data) is not torch.Tensor:
        reason = f"it is a {type(tensor).__name__}, and sharded or quantized tensors are not supported yet"
    elif tensor.is_meta:
        reason = "it is on the meta device and has no values here: load the weights into memory first"
    elif tensor.layout != torch.strided or tensor.is_quantized:
        reason = f"its layout {tensor.layout} is not supported yet"
    if reason:
        raise SnapshotError(f"no snapshot can be taken of {name}: {reason}. The model is untouched")


def _same_memory(tensor: torch.Tensor, alias: torch.Tensor) -> bool:
    if tensor.numel() == 0:
        return tensor.shape == alias.shape and tensor.dtype == alias.dtype and tensor.device == alias.device
    return storage_identity(tensor) == storage_identity(alias)


def _same_objects(now: Mapping[str, object], kept: Mapping[str, object]) -> bool:
    return list(now) == list(kept) and all(now[name] is kept[name] for name in kept)


def _configs(model: nn.Module) -> list[tuple[object, str, _Notes]]:
    """Every `config` of a module, and every configuration within one: its owner, its name there, its notes."""
    waiting: list[tuple[object, str]] = [(module, "config") for module in model.modules()]
    found: list[tuple[object, str, _Notes]] = []
    expanded: set[int] = set()
    while waiting:
        owner, name = waiting.pop()
        config = vars(owner).get(name)
        if isinstance(config, (nn.Module, type, dict)) or not hasattr(config, "__dict__"):
            continue
        found.append((owner, name, _Notes.of(config)))
        if id(config) not in expanded:
            expanded.add(id(config))
            waiting += [(config, key) for key, value in vars(config).items() if hasattr(value, "to_dict")]
    return found


def _is_bookkeeping(key: str, value: object) -> bool:
    """Whether an attribute is a flag, a number or a small list of such, set by the module's own code.

    PEFT, for example, notes in `merged_adapters` that a delta has gone into the weights: weights
    and notes must go back together. Train or eval mode is nobody's weight and stays as it is.
    """
    if key in _MODULE_OWN:
        return False
    if isinstance(value, (list, set, dict)):
        members = [*value, *value.values()] if isinstance(value, dict) else list(value)
        return len(members) <= 256 and all(isinstance(member, _SIMPLE) for member in members)
    return isinstance(value, _SIMPLE)


def _copy(value: object) -> object:
    return value.copy() if isinstance(value, (list, set, dict)) else value


def _refill(value: object, content: object) -> None:
    """Give a container the members it had."""
    if isinstance(value, list) and isinstance(content, list) and value != content:
        value[:] = content
    elif isinstance(value, (set, dict)) and isinstance(content, (set, dict)) and value != content:
        value.clear()
        value |= content  # pyright: ignore[reportOperatorIssue] - content is a copy of value
