"""The only writer of weights: keeps originals, writes planned values, restores, proves the digest.

A snapshot keeps the values of every parameter and buffer, and the objects that hold them: which
module, parameter and buffer object sits where, and the storage behind each. Restoring puts the same
objects back and writes into the same storage, so that ties, optimizer references and DDP buckets
survive, whatever the edit did (in-place writes, `model.to(dtype)`, replaced modules, parametrizations).
One thing cannot be put back: autograd drops the hooks by which DDP averages gradients from a parameter
that gets another dtype or device. A restore says so; the model must be wrapped again before it is trained.

Of a packed weight (a quantizer's, see `weightproof.readers`) every tensor in it is kept, and so are the objects that
hold them (a tensor subclass, a state, a packed object of C++): the same objects go back, with the same bits in them.

Of a sharded model each process keeps, restores and proves its own part, and waits for no other.

A module's own notes (flags, numbers, small lists, such as PEFT's `merged_adapters`) go back with its
weights, and so do those of its `config` (a number of layers, a vocabulary size). Not covered: train or
eval mode, gradients' values, optimizer state, other objects (a generation config, for example), and
hooks on modules whose tensors and children stayed the same objects.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from weightproof.errors import InputError, RestoreError, SnapshotError
from weightproof.folders.readers import packed_weights
from weightproof.parallel.placements import is_dtensor, is_zero3, local_of, refusal_of, settle, shape_of
from weightproof.parallel.shards import Shard, shard_of
from weightproof.snapshots.module_state import Attributes, ModuleState, configs_of
from weightproof.snapshots.tensor_store import (
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
from weightproof.types import NamedTensor, WeightMatrix
from weightproof.weights import clean_name, iter_tensors, iter_weight_matrices, storage_identity, unwrap

__all__ = ["MatrixBits", "Snapshot", "model_digest", "tensor_digest", "write_matrix", "write_part"]

logger = logging.getLogger("weightproof")

# Keys of what is kept beside the model's own tensors; no parameter has such a name.
_COMPANION = "companion:"


@dataclass(slots=True)
class _Holder:
    """A tensor object, with an alias of the plain storage that was behind it and what belongs to it."""

    holder: torch.Tensor
    alias: torch.Tensor
    requires_grad: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Holder:
        alias = local_of(tensor) if is_dtensor(tensor) else tensor.data
        return cls(tensor, alias, tensor.requires_grad)

    def memory(self) -> torch.Tensor:
        """The storage that holds the values; DeepSpeed moves its partitions about."""
        return local_of(self.holder) if is_zero3(self.holder) else self.alias

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
class _ShardedHolder(_Holder):
    """A DTensor, with what is needed to make it anew around its part."""

    placed: dict[str, Any]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _ShardedHolder:
        found: Any = tensor
        placed = {"device_mesh": found.device_mesh, "placements": found.placements}
        placed |= {"shape": tensor.shape, "stride": tensor.stride()}
        return cls(tensor, local_of(tensor), tensor.requires_grad, placed)

    def put_back(self) -> None:
        """Assigning `data` of a DTensor does nothing: one made around the old part takes over the object."""
        if not _same_memory(self.holder, self.alias):
            kind: Any = type(self.holder)
            grad, self.holder.grad = self.holder.grad, None
            fresh = kind.from_local(self.alias, run_check=False, **self.placed)
            fresh = nn.Parameter(fresh, self.requires_grad) if isinstance(self.holder, nn.Parameter) else fresh
            vars(fresh).update(vars(self.holder))
            torch.utils.swap_tensors(self.holder, fresh)
            self.holder.grad = None if grad is None else grad.to(self.alias.dtype)
        _Holder.put_back(self)  # the flag; `super` does not know classes with slots


def _warn_of_lost_hooks(holders: Sequence[_Holder]) -> None:
    """Say it where gradients are no longer averaged: the replicas would drift apart without an error."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    trained = [held for held in holders if held.requires_grad and type(held) is _Holder]
    lost = sum(
        1 for held in trained if (held.holder.dtype, held.holder.device) != (held.alias.dtype, held.alias.device)
    )
    if lost:
        logger.warning(
            "the change gave %d parameters another dtype or device. Their values are restored, but no "
            "DistributedDataParallel averages their gradients any more: wrap the model again before training it on",
            lost,
        )


def _holder_of(tensor: torch.Tensor) -> _Holder:
    return _ShardedHolder.of(tensor) if is_dtensor(tensor) else _Holder.of(tensor)


@dataclass(slots=True)
class _Record:
    """One distinct tensor: its public names, what part of it is here, and every object that holds its storage."""

    name: str
    names: tuple[str, ...]
    placement: object
    shard: Shard | None
    part_of: tuple[str, str] | None = None
    holders: list[_Holder] = field(default_factory=list)

    def memory(self) -> torch.Tensor:
        """The storage that holds the values."""
        return self.holders[0].memory()


class Snapshot:
    """Everything needed to take a change of weights back, bit for bit.

    Made by `Snapshot.capture`; `discard` it when it is no longer needed.

    Attributes:
        nbytes: Size of the copies, in memory or on disk.
    """

    def __init__(
        self, model: nn.Module, store: Store, records: dict[str, _Record], companions: dict[str, torch.Tensor]
    ) -> None:
        self._model = model
        self._store: Store | None = store
        self._records = records
        self._companions = companions
        self._modules = [ModuleState.of(module) for module in model.modules()]
        self._owners = [(paths, Attributes.of(owner)) for paths, owner in _owners(model)]
        self._configs = configs_of(model)
        self._paths = dict(model.named_modules(remove_duplicate=False))
        self._registered = _registered(model)
        self._packed_names = frozenset(name for name, record in records.items() if record.part_of is not None)
        self._matrices = _matrices(model)
        self.nbytes = store.nbytes

    @classmethod
    def capture(
        cls, model: nn.Module, directory: Path | str | None = None, companions: Mapping[str, torch.Tensor] | None = None
    ) -> Snapshot:
        """Copy every parameter and buffer, or this process's part of it, and note the module graph.

        Args:
            model: Any module; DDP and torch.compile wrappers are looked through. Parameters that FSDP
                or ZeRO-3 left gathered are brought back to their sharded form (see `settle`).
            directory: Keep the copies in a fresh sub-folder of this folder (safetensors, verified
                when read back); None: in memory, each on its tensor's device.
            companions: Other plain tensors by name that belong to the weights (the fp32 masters of an
                optimizer, for example): the same objects are written to when the model is restored.

        Raises:
            SnapshotError: If there is no room, or a tensor cannot be copied bit for bit (a subclass that no
                reader knows, meta, sparse, shards of FSDP version 1). The model is untouched.
        """
        model = unwrap(model)
        settle(model)
        beside = {f"{_COMPANION}{name}": tensor for name, tensor in (companions or {}).items()}
        for named in iter_tensors(model):
            _require_copyable(named.name, named.tensor, is_part=named.part_of is not None)
        for name, tensor in beside.items():
            _require_copyable(name, tensor)
        records = _records(model)
        originals = {name: record.memory() for name, record in records.items()} | beside
        store = MemoryStore(originals) if directory is None else FolderStore(originals, Path(directory))
        return cls(model, store, records, beside)

    @classmethod
    def of_values(
        cls, model: nn.Module, values: Mapping[str, torch.Tensor], companions: Mapping[str, torch.Tensor] | None = None
    ) -> Snapshot:
        """A snapshot whose originals are given instead of copied: `restore` writes them into the model.

        Args:
            model: As in `capture`.
            values: As `present` gave them, of the same model on the same number of processes.
            companions: As in `capture`.

        Raises:
            InputError: If they are not the tensors of this model, by name, dtype and shape.
        """
        model = unwrap(model)
        settle(model)
        beside = {f"{_COMPANION}{name}": tensor for name, tensor in (companions or {}).items()}
        found = cls(model, MemoryStore(values), _records(model), beside)
        for name, memory in found._memories().items():
            given = values.get(name)
            if given is None or (given.dtype, given.shape) != (memory.dtype, memory.shape):
                kind = "missing" if given is None else f"{given.dtype} {list(given.shape)}"
                raise InputError(
                    f"the kept state is of another model: {name} is {kind} there, and {memory.dtype} "
                    f"{list(memory.shape)} here"
                )
        return found

    def present(self) -> Mapping[str, torch.Tensor]:
        """What the model and its companions hold now, by name: the parts that lie here, live; do not write to them."""
        return self._memories()

    @property
    def names(self) -> frozenset[str]:
        """Public names of the tensors at capture, one of each."""
        return frozenset(self._records)

    @property
    def digests(self) -> Mapping[str, str]:
        """SHA-256 of every tensor at capture, by public name; of a sharded one, of the part that lies here."""
        return {name: digest for name, digest in self._held().digests.items() if name in self._records}

    @property
    def model_digest(self) -> str:
        """SHA-256 over names and digests of all tensors at capture."""
        return model_digest(self.digests)

    def original(self, tensor_name: str) -> torch.Tensor:
        """The kept copy of a tensor, by any of its public names; do not write to it.

        Of a sharded tensor it is the part that lies here.

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

        Raises:
            InputError: If it was sharded (see `original_shard`).
        """
        original = self.original_shard(matrix)
        if isinstance(original, Shard):
            raise InputError(f"{matrix.name} was sharded when the snapshot was taken: no process has all of it")
        return original

    def original_shard(self, matrix: WeightMatrix) -> torch.Tensor | Shard | None:
        """The original of a matrix, as `original_matrix` where it was whole here, else the part that lay here."""
        known = self._matrices.get(matrix.name)
        if known is not None and known.rebuild is not None:
            return known.rebuild({local: self.original(name) for local, name in known.parts.items()})
        if known is None or known.select is None:
            return None
        record, kept = self._records[known.tensor_name], self.original(known.tensor_name)
        if record.shard is not None and known.select_shard is not None:
            return known.select_shard(replace(record.shard, local=kept))
        alias = record.memory()
        return known.select(kept if alias.is_contiguous() else _strided_like(kept, alias))

    def changed_names(self) -> tuple[str, ...]:
        """Public names of tensors whose bits, dtype or shape differ now, or that were added or removed.

        Compared bit for bit (NaN equals NaN, 0.0 differs from -0.0), without hashing; of sharded tensors
        the parts that lie here. A tensor with several names is given once, unless only some of its names
        changed.
        """
        settle(self._model)
        now = {name: named for named in iter_tensors(self._model) for name in (named.name, *named.tied_names)}
        changed: list[str] = []
        for record in self._records.values():
            different = self._differing(record, now)
            changed += [record.name] if len(different) == len(record.names) else different
        known = {name for record in self._records.values() for name in record.names}
        return (*changed, *(name for name in now if name not in known))

    def _differing(self, record: _Record, now: Mapping[str, NamedTensor]) -> list[str]:
        kept = self._held().read(record.name)
        equal: dict[int, bool] = {}
        for name in record.names:
            named = now.get(name)
            if named is not None and id(named) not in equal:
                tensor, is_part = named.tensor, named.part_of is not None
                alike = _is_copyable(tensor, is_part=is_part) and _placement(tensor) == record.placement
                # The same bits mean something else where another backend reads them.
                alike = alike and named.part_of == record.part_of
                equal[id(named)] = alike and same_bits(local_of(tensor), kept)
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
        """Put every object, tie and value back, and prove it. Waits for no other process.

        The copies that will be written are checked against their digests before anything is
        touched. A gradient follows its parameter back to the original dtype.

        Returns:
            The model digest, equal to the one at capture.

        Raises:
            RestoreError: Naming the tensor. Do not use the model: it may be partly restored.
        """
        digests = self._held().digests
        try:
            settle(self._model)
            differing = self._verified_differences(digests)
            for state in self._modules:
                state.put_back()
            for owner, name, notes in self._configs:
                vars(owner)[name] = notes.owner
                notes.put_back()
            for _, owner in self._owners:
                owner.put_back()
            self._put_holders_back(self._records.values())
            for name, memory in self._memories().items():
                if name in differing:
                    _write(memory, self._held().read(name))
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, OSError) as error:
            raise RestoreError(f"restoring failed midway, do not use the model: {error}") from error
        self._prove(digests)
        return self.model_digest

    def restore_tensors(self, names: Collection[str]) -> None:
        """Put the values of some tensors back, bit for bit, and prove it; everything else stays as it is.

        For edits that wrote values only: a tensor that is another object now, or lies elsewhere, goes back with
        `restore`. Of sharded tensors the parts that lie here. Waits for no other process.

        Args:
            names: As in `names`.

        Raises:
            InputError: If there is no such tensor, or it is not in its original place; nothing was written.
            RestoreError: If a kept copy was altered, or a value does not take. Restore everything then.
        """
        if blocked := self.displaced(names):
            raise InputError(f"{blocked[0]} was replaced, not only rewritten: restore the whole snapshot")
        digests = self._held().digests
        for name in sorted(names):
            kept = self._held().read(name)
            if tensor_digest(kept) != digests[name]:
                raise RestoreError(f"the kept copy of {name} was altered: it was not restored")
            memory = self._records[name].memory()
            _write(memory, kept)
            if not same_bits(memory, kept):
                raise RestoreError(f"{name} does not hold its original values after restoring: do not use the model")

    def restore_modules(self, names: Collection[str]) -> None:
        """Put modules back with everything in them, objects, ties and values, and prove it; the rest stays as it is.

        For edits that replaced modules, or the objects in them. A tensor that others share goes back for them, too.
        Waits for no other process.

        Args:
            names: Public names of modules at capture, "" for the whole model's own tensors.

        Raises:
            InputError: If there was no such module, or its place is within another that was replaced.
            RestoreError: If a kept copy was altered, or something does not take. Restore everything then.
        """
        inside = {path: module for path, module in self._paths.items() if _is_within(clean_name(path), names)}
        if missing := sorted(set(names) - {clean_name(path) for path in inside}):
            raise InputError(f"the snapshot holds no module {missing[0]!r}")
        now = dict(self._model.named_modules(remove_duplicate=False))
        holders = {path: path.rpartition(".")[0] for path in inside if path}
        if lost := [p for p, one in holders.items() if one not in inside and now.get(one) is not self._paths[one]]:
            raise InputError(f"{clean_name(lost[0])} lies in a module that was replaced: restore that one")
        records = [one for one in self._records.values() if any(_is_within(_owner_name(n), names) for n in one.names)]
        self._verify(records)
        try:
            for path, module in inside.items():
                self._put_in_place(path, module)
            self._put_parts_back(inside, records)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, OSError) as error:
            raise RestoreError(f"restoring a part failed midway, do not use the model: {error}") from error
        self._prove_part(inside, records)

    def _verify(self, records: Iterable[_Record]) -> None:
        """Prove the kept copies before anything is written."""
        digests = self._held().digests
        for record in records:
            if tensor_digest(self._held().read(record.name)) != digests[record.name]:
                raise RestoreError(f"the kept copy of {record.name} was altered: it was not restored")

    def _put_parts_back(self, inside: Mapping[str, nn.Module], records: Sequence[_Record]) -> None:
        kept = {id(module) for module in inside.values()}
        for state in self._modules:
            if id(state.module) in kept:
                state.put_back()
        for paths, owner in self._owners:
            if not paths.isdisjoint(inside):
                owner.put_back()
        self._put_holders_back(records)
        for record in records:
            original = self._held().read(record.name)
            if not same_bits(record.memory(), original):
                _write(record.memory(), original)

    def _put_in_place(self, path: str, module: nn.Module) -> None:
        """Register a module under the parent that it had."""
        parent, _, leaf = path.rpartition(".")
        holder = self._paths[parent]
        if not path or holder._modules.get(leaf) is module:
            return
        order = next(state for state in self._modules if state.module is holder).tables["_modules"]
        known = {**holder._modules, leaf: module}
        holder._modules.clear()
        holder._modules.update({name: known[name] for name in (*order, *known) if name in known})

    def _prove_part(self, inside: Mapping[str, nn.Module], records: Sequence[_Record]) -> None:
        now = dict(self._model.named_modules(remove_duplicate=False))
        if wrong := next((path for path, module in inside.items() if now.get(path) is not module), None):
            raise RestoreError(f"{clean_name(wrong)} is not the original module after restoring: do not use the model")
        read = self._read_again()
        for record in records:
            values = read.get(record.name)
            if values is None or not same_bits(values, self._held().read(record.name)):
                raise RestoreError(f"{record.name} does not hold its original values after restoring: do not use it")
        if moved := self.displaced([record.name for record in records]):
            raise RestoreError(f"{moved[0]} is not in its original storage after restoring: do not use the model")

    def owner_of(self, tensor_name: str) -> str:
        """Public name of the innermost module at capture that a tensor, of then or of now, belongs to."""
        known = {clean_name(path) for path in self._paths}
        name = _owner_name(tensor_name)
        while name and name not in known:
            name = _owner_name(name)
        return name

    def displaced(self, names: Collection[str]) -> tuple[str, ...]:
        """Those of some tensors that the model no longer holds in their original objects and storage."""
        settle(self._model)
        registered = {id(tensor) for tensor in _registered(self._model).values()}
        registered |= {id(named.tensor) for named in iter_tensors(self._model)}

        def in_place(record: _Record) -> bool:
            return all(id(one.holder) in registered and _same_memory(one.holder, one.alias) for one in record.holders)

        return tuple(n for n in sorted(names) if n not in self._records or not in_place(self._records[n]))

    def _memories(self) -> dict[str, torch.Tensor]:
        """The storage behind everything that was kept."""
        return {name: record.memory() for name, record in self._records.items()} | {
            name: tensor.detach() for name, tensor in self._companions.items()
        }

    def _put_holders_back(self, records: Iterable[_Record]) -> None:
        holders = [holder for record in records for holder in record.holders]
        moved = [h for h in holders if isinstance(h, _ShardedHolder) and not _same_memory(h.holder, h.alias)]
        _warn_of_lost_hooks(holders)
        for holder in holders:
            holder.put_back()
        if moved:
            # FSDP keeps a padded alias of each part of its own, and looks for the part again after a load.
            self._model.load_state_dict({}, strict=False)
        for holder in moved:
            holder.alias = local_of(holder.holder)

    def _verified_differences(self, digests: Mapping[str, str]) -> frozenset[str]:
        """Names of what no longer holds the original, the copies proven intact."""
        differing = []
        for name, memory in self._memories().items():
            kept, record = self._held().read(name), self._records.get(name)
            places = [memory] if record is None else [holder.memory() for holder in record.holders]
            if not all(same_bits(place, kept) for place in places):
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
        found = tensor_digests(self._read_again())
        wrong = [name for name in digests if found.get(name) != digests[name]]
        if wrong:
            raise RestoreError(
                f"{wrong[0]} has another digest after restoring ({len(wrong)} of {len(digests)} tensors): "
                "do not use the model"
            )

    def _read_again(self) -> Mapping[str, torch.Tensor]:
        """What the model holds now, found by walking it anew: packed objects are asked again for what is in them."""
        parts = {named.name: local_of(named.tensor) for named in iter_tensors(self._model) if named.part_of is not None}
        plain = {name: memory for name, memory in self._memories().items() if name not in self._packed_names}
        return {**plain, **parts}

    def discard(self) -> None:
        """Free the memory or remove the files; the snapshot cannot be used afterwards."""
        if self._store is not None:
            self._store.discard()
            self._store = None

    def _held(self) -> Store:
        if self._store is None:
            raise RestoreError("this snapshot was discarded: nothing can be read or restored from it")
        return self._store


class MatrixBits:
    """The present bits of a few matrices, to take a trial of other values back exactly.

    Of sharded matrices the part that lies here. Nothing is divided or recomputed: what comes back are the same bits.
    """

    def __init__(self, matrices: Sequence[WeightMatrix], device: torch.device | str | None = None) -> None:
        """Copy them.

        Args:
            matrices: To copy.
            device: Where the copies are kept; None: each beside its matrix.

        Raises:
            InputError: If one of them cannot be written.
        """
        for matrix in matrices:
            _require_writable(matrix)
        self._kept = [(one, _part_here(one), _part_here(one).detach().to(device, copy=True)) for one in matrices]

    def kept(self) -> dict[str, torch.Tensor]:
        """The copies by matrix name; do not write to them."""
        return {matrix.name: kept for matrix, _, kept in self._kept}

    def put_back(self) -> None:
        """Write the bits back; again and again gives the same.

        Raises:
            RestoreError: If a matrix does not hold them afterwards.
        """
        for matrix, target, kept in self._kept:
            with torch.no_grad():
                as_bits(target).copy_(as_bits(kept))
            if not same_bits(target, kept):
                raise RestoreError(f"{matrix.name} does not hold its earlier values: do not use the model")


def _part_here(matrix: WeightMatrix) -> torch.Tensor:
    return matrix.load() if matrix.shard is None else matrix.shard.local


def write_matrix(matrix: WeightMatrix, values: torch.Tensor) -> None:
    """Write new (d_out, d_in) values into the live storage of a matrix, cast once to its dtype.

    Raises:
        InputError: If the matrix is refused, sharded, is not a view of live storage, or has another shape.
    """
    _require_writable(matrix)
    target = matrix.load()
    if values.shape != target.shape:
        raise InputError(
            f"{matrix.name} has shape {list(target.shape)} (d_out, d_in), the new values {list(values.shape)}"
        )
    _overwrite(matrix, target, values)


def write_part(matrix: WeightMatrix, part: torch.Tensor) -> None:
    """Write this process's part of a sharded matrix, laid out as `matrix.shard.local`, cast once to its dtype.

    Raises:
        InputError: If the matrix is refused, not sharded, is not on live storage, or the part has another shape.
    """
    _require_writable(matrix)
    if matrix.shard is None:
        raise InputError(f"{matrix.name} is not sharded: write it whole (write_matrix)")
    target = matrix.shard.local
    if part.shape != target.shape:
        raise InputError(
            f"this process holds {list(target.shape)} of {matrix.name}, the new part is {list(part.shape)}"
        )
    _overwrite(matrix, target, part)


def _require_writable(matrix: WeightMatrix) -> None:
    if matrix.refusal is not None:
        raise InputError(f"{matrix.name} cannot be written: {matrix.refusal}")
    if matrix.storage is not None:
        raise InputError(
            f"{matrix.name} cannot be written: it is stored by {matrix.storage}; edit the model before it is packed, "
            "or use the backend's own tools inside session.edit()"
        )
    if not matrix.is_view:
        raise InputError(f"{matrix.name} cannot be written: it is a copy, not a view of the model's storage")


def _overwrite(matrix: WeightMatrix, target: torch.Tensor, values: torch.Tensor) -> None:
    if not target.is_floating_point() or not values.is_floating_point():
        raise InputError(f"{matrix.name}: {values.dtype} values cannot be written into {target.dtype} weights")
    with torch.no_grad():
        target.copy_(values.detach().to(device=target.device, dtype=target.dtype))


def _write(target: torch.Tensor, kept: torch.Tensor) -> None:
    """Copy bit for bit into existing storage; what was made in inference mode can be written to only there."""
    with torch.inference_mode() if target.is_inference() else torch.no_grad():
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
    every = list(iter_tensors(model))  # walked once: reading a packed object makes new copies each time
    for named in every:
        tensor = named.tensor
        shard = shard_of(tensor) if refusal_of(tensor) is None else None
        record = _Record(named.name, (named.name, *named.tied_names), _placement(tensor), shard, named.part_of)
        records[named.name] = by_memory[storage_identity(tensor)] = record
    seen: set[int] = set()
    for tensor in _registered(model).values():
        # A tensor subclass has no memory of its own: what lies in it is held by its inner tensors.
        record = by_memory.get(storage_identity(tensor))
        if record is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            record.holders.append(_holder_of(tensor))
    for named in every:
        if not records[named.name].holders:
            records[named.name].holders.append(_holder_of(named.tensor))
    return records


def _owner_name(name: str) -> str:
    """What a dotted name lies in: of a tensor its module, of a module its parent; "" for the model."""
    return name.rpartition(".")[0]


def _is_within(name: str, modules: Collection[str]) -> bool:
    """Whether a module is one of these or lies in one; the model itself counts only for what is its own."""
    return any(name == one or (one and name.startswith(f"{one}.")) for one in modules)


def _owners(model: nn.Module) -> list[tuple[frozenset[str], object]]:
    """Every object whose attributes hold a part of a packed weight, once, with the raw paths of its modules.

    Modules, tensor subclasses, states.
    """
    found: dict[int, object] = {}
    paths: dict[int, set[str]] = {}
    for placed in packed_weights(model):
        held = (*placed.found.owners, placed.module, *placed.found.tensors.values())
        registered = (getattr(placed.module, name, None) for name in placed.found.registered)
        for owner in (*held, *registered):
            if owner is not None:
                found[id(owner)] = owner
                paths.setdefault(id(owner), set()).update(placed.paths)
    return [(frozenset(paths[key]), owner) for key, owner in found.items()]


def _matrices(model: nn.Module) -> dict[str, WeightMatrix]:
    """The matrices that are measured, by name."""
    return {matrix.name: matrix for matrix in iter_weight_matrices(model) if matrix.refusal is None}


def _placement(tensor: Any) -> object:
    """How a tensor is spread over processes, in a form that can be compared; None for a plain one."""
    if is_dtensor(tensor):
        return tensor.device_mesh, tensor.placements, tuple(tensor.shape)
    return shape_of(tensor) if is_zero3(tensor) else None


_PLAIN_TYPES = (torch.Tensor, nn.Parameter)


def _is_copyable(tensor: torch.Tensor, *, is_part: bool = False) -> bool:
    """Whether the values are those of a plain tensor, or of a plain part; a part may be a parameter of any class."""
    if type(local_of(tensor)) is not torch.Tensor:
        return False
    return is_part or type(tensor) in _PLAIN_TYPES or is_dtensor(tensor)


def _require_copyable(name: str, tensor: torch.Tensor, *, is_part: bool = False) -> None:
    """Refuse what cannot be copied and restored bit for bit. Of DTensors any placement can."""
    local = local_of(tensor)
    reason = None if is_dtensor(tensor) else refusal_of(tensor)
    if local.is_meta:
        reason = "it is on the meta device and has no values here: load the weights into memory first"
    elif reason is None and not _is_copyable(tensor, is_part=is_part):
        reason = f"it is a {type(tensor).__name__}, a kind of tensor that no reader knows (docs/quantizers.md)"
    elif reason is None and (local.layout != torch.strided or local.is_quantized):
        reason = f"its layout {local.layout} is not supported yet"
    if reason:
        raise SnapshotError(f"no snapshot can be taken of {name}: {reason}. The model is untouched")


def _same_memory(tensor: torch.Tensor, alias: torch.Tensor) -> bool:
    memory = local_of(tensor) if is_dtensor(tensor) else tensor
    if memory.numel() == 0:
        return memory.shape == alias.shape and memory.dtype == alias.dtype and memory.device == alias.device
    return storage_identity(tensor) == storage_identity(alias)
