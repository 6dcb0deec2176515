"""Digests of tensors that may be sharded: the same as of the unsharded ones, without gathering them.

Rows are hashed where they lie and only their digests travel, 32 bytes a row, to one owner per tensor.
Tensors that are not cut between rows meet on an owner, one at a time for each, and are hashed there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from weightproof.collective import Processes, deal
from weightproof.parallel.placements import ROWS, local_of, refusal_of, shape_of
from weightproof.parallel.shards import Shard, assemble, dealt, shard_of
from weightproof.snapshots.tensor_store import (
    HASH_THREADS,
    digest_of_leaves,
    leaf_digests,
    tensor_digest,
    tensor_digests,
)

_OPERATION = "digests of sharded tensors"
# Tensors up to this size meet on their owners all at once.
_SMALL_BYTES = 1 << 16


def tensor_digests_of(processes: Processes, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`tensor_digest` of the whole of each tensor, on every rank.

    What is whole here is hashed here, so that copies that differ between ranks have digests that
    differ. A placement that cannot be read (`refusal_of`) has a digest of all its parts by rank:
    it changes with any of them, but is not that of the unsharded tensor.

    Args:
        processes: All of them take part where anything is sharded.
        tensors: Parameters and buffers by name, the same names in the same order on every rank.

    Raises:
        CollectiveError: If another rank failed, or its tensors have other shapes or dtypes.
    """
    refused = {name: tensor for name, tensor in tensors.items() if refusal_of(tensor) is not None}
    shards = {name: shard_of(tensor) for name, tensor in tensors.items() if name not in refused}
    found = tensor_digests({name: local_of(tensors[name]) for name, shard in shards.items() if shard is None})
    cut = {name: shard for name, shard in shards.items() if shard is not None}
    if refused:
        found |= _of_parts(processes, refused)
    if cut:
        found |= _of_shards(processes, cut)
    return {name: found[name] for name in tensors}


def _of_parts(processes: Processes, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    with processes.together(_OPERATION):
        here = tensor_digests({name: local_of(tensor) for name, tensor in tensors.items()})
    everywhere = processes.gather(_OPERATION, here)
    return {
        name: hashlib.sha256(f"{list(shape_of(tensor))}{[rank[name] for rank in everywhere]}".encode()).hexdigest()
        for name, tensor in tensors.items()
    }


def _of_shards(processes: Processes, shards: Mapping[str, Shard]) -> dict[str, str]:
    small = {name: shard for name, shard in shards.items() if _hashes_by_row(shard) or _size(shard) <= _SMALL_BYTES}
    large = [name for name in shards if name not in small]
    with processes.together(_OPERATION):
        found = _met_at_once(processes, small)
    digests = dealt(
        processes,
        large,
        cost=lambda name: _size(shards[name]),
        parts=[shards.__getitem__],
        work=lambda name, whole: tensor_digest(whole),
        operation=_OPERATION,
    )
    everywhere = processes.gather(_OPERATION, found)
    return {name: digest for rank in everywhere for name, digest in rank.items()} | dict(
        zip(large, digests, strict=True)
    )


def _met_at_once(processes: Processes, shards: Mapping[str, Shard]) -> dict[str, str]:
    """Digests of those that this rank owns: from the leaves of tensors cut by rows, else from the whole."""
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        travelling = dict(zip(shards, pool.map(_leaves, shards.values()), strict=True))
    owners = deal([_size(shard) for shard in travelling.values()], processes.size)
    wholes = assemble(processes, _OPERATION, list(zip(owners, travelling.values(), strict=True)))
    found: dict[str, str] = {}
    for (name, shard), whole in zip(shards.items(), wholes, strict=True):
        if whole is not None and travelling[name] is shard:
            found[name] = tensor_digest(whole)
        elif whole is not None:
            found[name] = digest_of_leaves(shard.dtype, shard.shape, whole.numpy().tobytes())
    return found


def _hashes_by_row(shard: Shard) -> bool:
    return shard.layout == ROWS and len(shard.shape) > 1


def _leaves(shard: Shard) -> Shard:
    """The digests of a tensor's leaves, (leaves, 32), sharded as its rows are; a tensor of other cut as it is."""
    if not _hashes_by_row(shard):
        return shard
    digests = torch.frombuffer(bytearray(leaf_digests(shard.local)), dtype=torch.uint8) if len(shard.local) else None
    local = torch.empty(0, dtype=torch.uint8) if digests is None else digests
    return replace(shard, shape=(shard.shape[0], 32), dtype=torch.uint8, local=local.view(-1, 32))


def _size(shard: Shard) -> int:
    return torch.Size(shard.shape).numel() * shard.dtype.itemsize
