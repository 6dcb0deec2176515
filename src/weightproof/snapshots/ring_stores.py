"""Where the weights of a run's good states lie: in memory, in pinned memory, or in the run's snapshots on disk.

On disk they are written once, with everything else that belongs to a state (`weightproof.snapshots.store`): until that
is done the store stands for the live tensors, which nobody changes meanwhile, and from then on it reads the snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import nn

from weightproof.errors import RestoreError, SnapshotError
from weightproof.parallel.placements import settle
from weightproof.snapshot import _COMPANION, Snapshot, _records, _require_copyable
from weightproof.snapshots.store import KeptTensors
from weightproof.snapshots.tensor_store import Store, readable, tensor_digests
from weightproof.weights import iter_tensors, unwrap

__all__ = ["KeepWeights", "KeptSnapshot", "PinnedStore", "SavedStore"]

# Takes live tensors by name, and keeps what they hold now.
KeepWeights = Callable[[Mapping[str, torch.Tensor]], Store]


class KeptSnapshot(Snapshot):
    """A snapshot whose copies somebody else keeps."""

    @classmethod
    def kept_by(cls, model: nn.Module, keep: KeepWeights, companions: Mapping[str, torch.Tensor] | None = None) -> Self:
        """As `Snapshot.capture`, the copies being made by `keep`.

        Raises:
            SnapshotError: As there, and whatever `keep` raises. The model is untouched.
        """
        model = unwrap(model)
        settle(model)
        beside = {f"{_COMPANION}{name}": tensor for name, tensor in (companions or {}).items()}
        for named in iter_tensors(model):
            _require_copyable(named.name, named.tensor, is_part=named.part_of is not None)
        for name, tensor in beside.items():
            _require_copyable(name, tensor)
        records = _records(model)
        return cls(model, keep({name: one.memory() for name, one in records.items()} | beside), records, beside)

    @property
    def store(self) -> Store:
        """Who keeps the copies.

        Raises:
            RestoreError: The snapshot was discarded.
        """
        return self._held()


class SavedStore:
    """The live tensors until they are saved, and what was saved from then on.

    Attributes:
        nbytes: 0: nothing is kept in memory.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.nbytes = 0
        self._live: Mapping[str, torch.Tensor] | None = tensors
        self._saved: KeptTensors | None = None
        self._prefix = ""

    def saved(self, tensors: KeptTensors, prefix: str) -> None:
        """The tensors lie in a snapshot now, their names there beginning with `prefix`."""
        self._live, self._saved, self._prefix = None, tensors, prefix

    @property
    def digests(self) -> Mapping[str, str]:
        """Digest of every tensor."""
        if self._saved is None:
            return tensor_digests(self._present())
        known = self._saved.digests.items()
        return {name.removeprefix(self._prefix): one for name, one in known if name.startswith(self._prefix)}

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor and prove it.

        Raises:
            RestoreError: If its file is gone or altered.
        """
        return self._present()[name] if self._saved is None else self._saved.read(f"{self._prefix}{name}")

    def discard(self) -> None:
        """Forget them; the snapshot is its folder's to remove."""
        self._live = self._saved = None

    def _present(self) -> Mapping[str, torch.Tensor]:
        if self._live is None:
            raise RestoreError("this good state was dropped: nothing can be read or restored from it")
        return self._live


class PinnedStore:
    """Copies in host memory, pinned where their originals lie on CUDA: they cost the device nothing.

    Raises:
        SnapshotError: If there is no memory for the copies.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        try:
            self._kept = {name: _pinned(tensor) for name, tensor in tensors.items()}
        except (RuntimeError, MemoryError) as error:
            raise SnapshotError(
                f"no pinned memory for a snapshot of {readable(self.nbytes)}: keep good states on disk "
                f'(snapshots="disk"), or free memory; the model is untouched ({str(error).splitlines()[0]})'
            ) from error
        self._digests: dict[str, str] | None = None

    @property
    def digests(self) -> Mapping[str, str]:
        """Computed from the copies when first asked for."""
        if self._digests is None:
            self._digests = tensor_digests(self._kept)
        return self._digests

    def read(self, name: str) -> torch.Tensor:
        """The copy itself."""
        return self._kept[name]

    def discard(self) -> None:
        """Drop the copies."""
        self._kept = {}


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A row-major copy in host memory, bit for bit."""
    kept = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return kept.pin_memory() if tensor.device.type == "cuda" else kept
