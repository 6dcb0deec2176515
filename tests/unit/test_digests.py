"""The digest of a tensor: dtype, shape, then the digests of its rows."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from sharded_models import partition
from torch import nn

from weightproof.collective import Processes
from weightproof.digests import tensor_digests_of
from weightproof.errors import InputError
from weightproof.snapshots import tensor_store
from weightproof.snapshots.tensor_store import tensor_digest


def by_definition(array: np.ndarray, dtype: str) -> str:
    """The definition in words of hashlib and NumPy: leaf i is array[i], or all of it below two dimensions."""
    leaves = [array[i] for i in range(array.shape[0])] if array.ndim >= 2 else [array]
    header = f"{dtype}[{', '.join(str(size) for size in array.shape)}]".encode()
    return hashlib.sha256(header + b"".join(hashlib.sha256(leaf.tobytes()).digest() for leaf in leaves)).hexdigest()


ARRAYS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(4, 3),
    "vector": np.arange(5, dtype=np.float64),
    "scalar": np.array(2.5, dtype=np.float32),
    "stack": np.arange(24, dtype=np.int16).reshape(2, 3, 4),
    "complex": np.arange(6, dtype=np.complex64).reshape(3, 2) * 1j,
    "flags": np.array([[True, False], [False, False]]),
    "no rows": np.zeros((0, 4), dtype=np.float32),
    "empty rows": np.zeros((3, 0), dtype=np.float32),
    "empty": np.zeros(0, dtype=np.float32),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_the_digest_follows_its_definition_whatever_the_memory_layout(name):
    array = ARRAYS[name]
    dtype = str(array.dtype)
    assert tensor_digest(torch.from_numpy(array)) == by_definition(array, dtype)
    turned = torch.from_numpy(array.T.copy()).permute(list(range(array.ndim))[::-1])
    assert tensor_digest(turned) == by_definition(array, dtype)


def test_what_lies_otherwise_in_memory_is_copied_in_pieces(monkeypatch):
    array, sizes = np.arange(60, dtype=np.float32).reshape(20, 3), []
    turned = torch.from_numpy(array.T.copy()).T
    monkeypatch.setattr("weightproof.snapshots.tensor_store._COPIED_BYTES", 64)
    raw = tensor_store.raw_bytes
    monkeypatch.setattr(tensor_store, "raw_bytes", lambda tensor: sizes.append(tensor.nbytes) or raw(tensor))
    assert tensor_digest(turned) == by_definition(array, "float32")
    assert sizes == [60, 60, 60, 60]
    assert tensor_digest(torch.from_numpy(array)) == by_definition(array, "float32")
    assert sizes[4:] == [240]


def test_rows_and_shapes_cannot_be_mistaken_for_each_other():
    matrix = torch.arange(12.0).reshape(4, 3)
    others = [matrix.reshape(3, 4), matrix.reshape(12), matrix.reshape(1, 4, 3), matrix[[1, 0, 2, 3]], matrix.double()]
    assert len({tensor_digest(tensor) for tensor in [matrix, *others]}) == 6


def test_a_sharded_tensor_has_no_digest_of_one_process():
    with pytest.raises(InputError, match=r"\[4, 3\] is sharded"):
        tensor_digest(partition(nn.Parameter(torch.randn(4, 3)), 0, 2))


def test_one_process_alone_hashes_flat_partitions_too():
    whole = torch.randn(5, 7)
    tensors = {"flat": partition(nn.Parameter(whole.clone()), 0, 1), "plain": whole}
    assert tensor_digests_of(Processes.alone(), tensors) == dict.fromkeys(tensors, tensor_digest(whole))
