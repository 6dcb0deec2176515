"""One process's part of the snapshots in a folder: objects, manifests, and nothing about other processes.

objects/<digest>.safetensors    one large tensor, or several small ones
snapshots/00000007.json         manifest of digests, and the JSON of values
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NewType

import torch

from weightproof.errors import RestoreError, SnapshotError
from weightproof.folders.files import FileSystem, make_folders, reason_of, remove_quietly, replace_file
from weightproof.parallel.placements import local_of
from weightproof.snapshots.manifest import Manifest
from weightproof.snapshots.tensor_files import (
    StoredTensor,
    arranged,
    file_size,
    object_name,
    read_tensor_file,
    write_tensor_file,
)
from weightproof.snapshots.tensor_store import readable, tensor_digests

logger = logging.getLogger("weightproof")

SnapshotId = NewType("SnapshotId", int)

# Tensors up to this size share files, each of at most `_PACK_BYTES`: a file costs an fsync.
_SMALL_BYTES = 1 << 16
_PACK_BYTES = 1 << 24
# Room for headers and the manifest beside the tensors.
_SPARE_BYTES = 1 << 20
# Nothing else is ever removed.
_OURS = re.compile(r"\d{8,}\.json|[0-9a-f]{64}\.safetensors|\.(\d{8,}\.json|[0-9a-f]{64}\.safetensors)\.\d+\.part")
_MANIFEST = re.compile(r"(\d{8,})\.json")
_Held = tuple[StoredTensor, ...]


@dataclass(frozen=True)
class Saved:
    """A snapshot that was read back and proven.

    Attributes:
        id: Its number in the folder.
        step: Step of the run.
        tensors: By name, on the CPU; memory of their own.
        values: The JSON saved with them. Tuples come back as lists.
        digest: SHA-256 (hex) of this rank's manifest, which names the digest of every tensor.
    """

    id: SnapshotId
    step: int
    tensors: Mapping[str, torch.Tensor]
    values: Mapping[str, Any]
    digest: str


@dataclass(frozen=True)
class Plan:
    """A save: what the manifest will say, and the values of what is not yet on the disk, by file."""

    manifest: Manifest
    fresh: Mapping[_Held, Sequence[torch.Tensor]]


class KeptTensors:
    """The tensors of one snapshot on one process, read when they are asked for; each read is proven.

    Args:
        files_of: Reads the file that holds certain tensors.
        manifest: Of the snapshot.
    """

    def __init__(self, files_of: Callable[[_Held], list[torch.Tensor]], manifest: Manifest) -> None:
        self._files_of = files_of
        self._places = {item.digest: held for held in manifest.objects for item in held}
        # Small tensors that share a file, and the experts of one stacked tensor, are asked for one after the other.
        self._last: tuple[_Held, list[torch.Tensor]] | None = None
        self.digests: Mapping[str, str] = manifest.tensors

    def read(self, name: str) -> torch.Tensor:
        """A tensor, on the CPU; do not write to it.

        Raises:
            RestoreError: If its file is gone, or not, bit for bit, the one that was written.
        """
        held = self._places[self.digests[name]]
        if self._last is None or self._last[0] != held:
            self._last = held, self._files_of(held)
        index = next(i for i, item in enumerate(held) if item.digest == self.digests[name])
        return self._last[1][index]


class RankFolder:
    """The files of one process.

    Args:
        home: Folder of its own.
        rank: Of the process.
        size: How many processes there are.
        files: Where to write.
    """

    def __init__(self, home: Path, rank: int, size: int, files: FileSystem) -> None:
        self.home, self.rank, self.size = home, rank, size
        self._files = files
        self._objects, self._snapshots = home / "objects", home / "snapshots"

    def prepare(self) -> None:
        """Make the folders, and durable what a killed process renamed last.

        Raises:
            SnapshotError: If that failed.
        """
        with self._disk("write"):
            for folder in (self._objects, self._snapshots):
                make_folders(folder, self._files)
                self._files.sync_folder(folder)

    # ---------------------------------------------------------------- reading

    def manifests(self) -> dict[int, Manifest | None]:
        """By number; None where the file is not, bit for bit, the one that was written (the log says why)."""
        found: dict[int, Manifest | None] = {}
        with self._disk("read"):
            numbers = sorted(int(match[1]) for name in _names(self._snapshots) if (match := _MANIFEST.fullmatch(name)))
        for number in numbers:
            try:
                found[number] = self.manifest(number)
            except RestoreError as error:
                logger.warning("%s", error)
                found[number] = None
        return found

    def manifest(self, number: int) -> Manifest:
        """Read a manifest and prove every byte of it.

        Raises:
            RestoreError: If it is gone, was altered, or is another one.
        """
        path = self._path_of(number)
        manifest = Manifest.read(path, self._files)
        if (manifest.id, manifest.rank, manifest.size) != (number, self.rank, self.size):
            raise RestoreError(
                f"the manifest {path} is of snapshot {manifest.id}, rank {manifest.rank} of {manifest.size} processes"
            )
        return manifest

    def read(self, number: int, committed: Manifest | None) -> Saved:
        """Read a snapshot and prove every byte of it.

        Raises:
            RestoreError: If that failed, or the manifest is not the committed one.
        """
        manifest = self._committed(number, committed)
        found: dict[str, torch.Tensor] = {}
        wanted = set(manifest.tensors.values())
        for held in manifest.objects:
            values = self._file_of(held)
            found |= {item.digest: value for item, value in zip(held, values, strict=True) if item.digest in wanted}
        tensors: dict[str, torch.Tensor] = {}
        given: set[str] = set()
        for name, digest in manifest.tensors.items():
            # Two moments that are alike, all zero for example, must not be one memory to whoever trains on.
            tensors[name] = found[digest].clone() if digest in given else found[digest]
            given.add(digest)
        return Saved(SnapshotId(manifest.id), manifest.step, tensors, manifest.values, manifest.digest)

    def prove(self, number: int, committed: Manifest | None) -> None:
        """Prove every byte of a snapshot, file after file.

        Raises:
            RestoreError: As for `read`.
        """
        for held in self._committed(number, committed).objects:
            self._file_of(held)

    def tensors(self, number: int, committed: Manifest | None) -> KeptTensors:
        """The tensors of a snapshot, one by one.

        Raises:
            RestoreError: If the manifest is damaged, or not the committed one.
        """
        return KeptTensors(self._file_of, self._committed(number, committed))

    def _committed(self, number: int, committed: Manifest | None) -> Manifest:
        manifest = self.manifest(number)
        if committed is None or manifest.digest != committed.digest:
            raise RestoreError(f"the manifest {self._path_of(number)} is not the one that was committed")
        return manifest

    def _file_of(self, held: _Held) -> list[torch.Tensor]:
        return read_tensor_file(self._objects / object_name(held), held, self._files)

    # ---------------------------------------------------------------- writing

    def plan(
        self,
        number: int,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        values: Mapping[str, Any],
        kept: Iterable[Manifest],
    ) -> Plan:
        """Digest the tensors and find which of them kept snapshots have; nothing is written.

        Raises:
            SnapshotError: If there is no room, or a value or dtype cannot be kept.
        """
        plain = {name: local_of(tensor) for name, tensor in tensors.items()}
        digests = tensor_digests(plain)
        distinct = {digests[name]: name for name in plain}
        known = self._known(kept)
        fresh = {
            StoredTensor.of(name, plain[name], digest): plain[name]
            for digest, name in distinct.items()
            if digest not in known
        }
        files = _files_for(fresh)
        objects = {known[digest] for digest in distinct if digest in known} | set(files)
        manifest = Manifest(
            id=number,
            step=int(step),
            rank=self.rank,
            size=self.size,
            tensors=digests,
            objects=tuple(sorted(objects, key=object_name)),
            values=dict(values),
        )
        # What is kept is what the file will say: `values` are the caller's, who may change them.
        manifest = manifest.as_read()
        self._require_room(sum(map(file_size, files)))
        return Plan(manifest, {held: [fresh[item] for item in held] for held in files})

    def _known(self, kept: Iterable[Manifest]) -> dict[str, _Held]:
        """Files of kept snapshots by the digest of what they hold; not those that are gone or cut."""
        with self._disk("read"), os.scandir(self._objects) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries}
        known: dict[str, _Held] = {}
        for manifest in kept:
            for held in manifest.objects:
                if sizes.get(object_name(held)) == file_size(held):
                    known |= {item.digest: held for item in held}
        return known

    def _require_room(self, nbytes: int) -> None:
        with self._disk("write"):
            free = self._files.free_bytes(self._objects)
        if free < nbytes + _SPARE_BYTES:
            raise SnapshotError(
                f"no room for a snapshot in {self.home}: {readable(nbytes + _SPARE_BYTES)} are needed and "
                f"{readable(free)} are free; the snapshots saved before are kept"
            )

    def write_objects(self, plan: Plan) -> None:
        """Write what is not yet on the disk, durably.

        Raises:
            SnapshotError: If that failed; `withdraw` removes what was written.
        """
        with self._disk("write"):
            for held, values in plan.fresh.items():
                write_tensor_file(self._objects / object_name(held), held, values, self._files)
            if plan.fresh:
                self._files.sync_folder(self._objects)

    def write_manifest(self, manifest: Manifest) -> None:
        """Write a manifest, durably; everything it names is on the disk.

        Raises:
            SnapshotError: If that failed; it may be there, and no more than that is known.
        """
        with self._disk("write"):
            replace_file(self._path_of(manifest.id), [manifest.render()], self._files)
            self._files.sync_folder(self._snapshots)

    def withdraw(self, plan: Plan, kept: Iterable[Manifest], *, with_objects: bool = True) -> None:
        """Leave nothing of a save that failed; what cannot be removed now is left for a later sweep."""
        if self._manifest_is_gone(plan.manifest.id) and with_objects:
            needed = _object_names(kept)
            written = [object_name(held) for held in plan.fresh]
            remove_quietly([self._objects / name for name in written if name not in needed], self._files)

    def _manifest_is_gone(self, number: int) -> bool:
        """Whether a manifest is surely removed: one that came back after a loss of power would need its objects."""
        path = self._path_of(number)
        if not path.exists():
            return True
        try:
            self._files.unlink(path)
            self._files.sync_folder(self._snapshots)
        except OSError:
            return False
        return True

    # ---------------------------------------------------------------- removing

    def remove_manifests_except(self, numbers: Collection[int]) -> list[str]:
        """Remove all other manifests, durably; gives the names of the removed files.

        Raises:
            SnapshotError: If one cannot be removed.
        """
        return self._remove(self._snapshots, {_manifest_name(number) for number in numbers})

    def remove_objects_except(self, kept: Iterable[Manifest]) -> list[str]:
        """Remove all files that these manifests do not need; gives their names.

        Raises:
            SnapshotError: If one cannot be removed.
        """
        return self._remove(self._objects, _object_names(kept))

    def _remove(self, folder: Path, needed: set[str]) -> list[str]:
        with self._disk("remove files"):
            names = [name for name in _names(folder) if _OURS.fullmatch(name) and name not in needed]
            for name in names:
                self._files.unlink(folder / name)
            # Also where there are none: an earlier call may have removed some, and failed before this.
            self._files.sync_folder(folder)
        return [f"{folder.name}/{name}" for name in names]

    def _path_of(self, number: int) -> Path:
        return self._snapshots / _manifest_name(number)

    @contextmanager
    def _disk(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SnapshotError(
                f"cannot {doing} in {self.home}: {reason_of(error)}; the snapshots saved before are kept"
            ) from error


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _manifest_name(number: int) -> str:
    return f"{number:08d}.json"


def _object_names(kept: Iterable[Manifest]) -> set[str]:
    return {object_name(held) for manifest in kept for held in manifest.objects}


def _files_for(tensors: Iterable[StoredTensor]) -> list[_Held]:
    """A file for each large tensor, and the small ones together in as few as there must be."""
    files: list[_Held] = []
    pack: list[StoredTensor] = []
    for item in tensors:
        if item.nbytes > _SMALL_BYTES:
            files.append((item,))
            continue
        if pack and sum(each.nbytes for each in pack) + item.nbytes > _PACK_BYTES:
            files.append(tuple(arranged(pack)))
            pack = []
        pack.append(item)
    return [*files, tuple(arranged(pack))] if pack else files
