"""The manifest of a snapshot on disk: what it consists of, by digest, in one JSON file that is written last.

The text has one form: writing again what was read gives the same bytes, or the file was altered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightproof.errors import RestoreError, SnapshotError
from weightproof.folders.files import FileSystem, reason_of
from weightproof.folders.sealed_json import json_text_digest, open_sealed, seal
from weightproof.snapshots.tensor_files import StoredTensor, file_size

FORMAT = "weightproof-snapshot-v2"


@dataclass(frozen=True)
class Manifest:
    """One process's part of a snapshot.

    Attributes:
        id: Number of the snapshot in its folder; of two snapshots the later has the larger one.
        step: Step of the run.
        rank: Of the process that wrote it.
        size: How many processes there were.
        tensors: Digest of each tensor by name.
        objects: The files that it needs: what each of them holds, in order. Their names follow (`object_name`).
        values: JSON that belongs to the tensors.
        others: Digest of the manifest of every other rank, by rank, this one's place being empty; in rank 0's only.
    """

    id: int
    step: int
    rank: int
    size: int
    tensors: Mapping[str, str]
    objects: tuple[tuple[StoredTensor, ...], ...]
    values: Mapping[str, Any]
    others: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its objects' files."""
        return sum(file_size(held) for held in self.objects)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over everything it says."""
        return json_text_digest(self._content())

    def render(self) -> bytes:
        """The content of its file.

        Raises:
            SnapshotError: If a value has no JSON form, or another one after it was read back.
        """
        return seal(self._content())

    def _content(self) -> dict[str, Any]:
        _require_json(self.values, "values")
        return {
            "format": FORMAT,
            "id": self.id,
            "step": self.step,
            "rank": self.rank,
            "size": self.size,
            "tensors": dict(self.tensors),
            "objects": [[[item.digest, item.dtype, list(item.shape)] for item in held] for held in self.objects],
            "values": self.values,
            "others": list(self.others),
        }

    @classmethod
    def read(cls, path: Path, files: FileSystem) -> Manifest:
        """Read a manifest and prove every byte of it.

        Raises:
            RestoreError: If it is gone, cannot be read, or is not the file that was written.
        """
        try:
            content = open_sealed(bytes(files.read(path)))
            if content is None:
                raise RestoreError(f"the manifest {path} was altered after it was written")
            return cls._of(content)
        except OSError as error:
            raise RestoreError(f"the manifest {path} cannot be read: {reason_of(error)}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RestoreError(f"the manifest {path} was altered or is of another kind ({error})") from error

    def as_read(self) -> Manifest:
        """What will be read from its file; it shares nothing with `values`."""
        return self._of(json.loads(json.dumps(self._content())))

    @classmethod
    def _of(cls, found: Mapping[str, Any]) -> Manifest:
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}, this version reads {FORMAT}")
        objects = tuple(
            tuple(StoredTensor(digest, dtype, tuple(shape)) for digest, dtype, shape in held)
            for held in found["objects"]
        )
        if not {item.digest for held in objects for item in held}.issuperset(found["tensors"].values()):
            raise ValueError("it names tensors that no file holds")
        numbers = {name: int(found[name]) for name in ("id", "step", "rank", "size")}
        return cls(
            **numbers,
            tensors=found["tensors"],
            objects=objects,
            values=found["values"],
            others=tuple(found["others"]),
        )


def _require_json(value: object, where: str) -> None:
    """Refuse what JSON would give back as something else: keys that are no text, tensors, classes of one's own."""
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise SnapshotError(f"{where} has the key {key!r}: JSON keeps keys that are text only")
            _require_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _require_json(item, f"{where}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise SnapshotError(f"{where} is a {type(value).__name__}, which has no JSON form: hand it in as a tensor")
