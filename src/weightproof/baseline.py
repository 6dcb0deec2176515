"""The baseline: what the model was before any change, captured once, saved and digested.

File format (`guard_baseline.safetensors`): a safetensors file with the singular values and the
whitening factors of every Marchenko-Pastur fit; its metadata holds `header`, the JSON of all
readings, and `digest`, the SHA-256 of the header followed by the digest of every tensor. A file
whose digest does not match is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from weightproof.errors import BaselineError
from weightproof.folders.files import write_atomically
from weightproof.folders.jsonable import to_jsonable
from weightproof.readings.readings_json import from_jsonable
from weightproof.snapshots.tensor_store import tensor_digest
from weightproof.types import (
    BulkFit,
    BulkReading,
    CircuitReading,
    MatrixReading,
    Readings,
    StructureReading,
    SubspaceReading,
    TensorReading,
)

FILE_NAME = "guard_baseline.safetensors"
_FORMAT = "weightproof-baseline-v2"
_FIT_TENSORS = ("singular_values", "row_scale", "col_scale")


@dataclass(frozen=True)
class Baseline:
    """Readings of the unchanged model with the fits they came from.

    `fits` holds one `BulkFit` (with its singular values) per measured matrix, by name.
    """

    readings: Readings
    fits: Mapping[str, BulkFit]
    environment: Mapping[str, str]
    created_at: str

    @property
    def model_digest(self) -> str:
        """SHA-256 over the per-tensor digests of the model it was captured from."""
        return self.readings.model_digest

    def require_same_model(self, tensors: Mapping[str, TensorReading]) -> None:
        """Refuse a model that is not the one this baseline was captured from.

        Raises:
            BaselineError: Naming the first differences: missing, added, shape, dtype or content.
        """
        differences = list(_differences(self.readings.tensors, tensors))
        if differences:
            shown = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
            raise BaselineError(
                f"this baseline belongs to another model: {shown}. Capture a new baseline from this model, "
                "or load the weights the baseline was captured from"
            )

    def save(self, path: Path | str) -> Path:
        """Write the baseline into a folder (as `guard_baseline.safetensors`) or to a file path."""
        path = _file_in(Path(path))
        tensors: dict[str, torch.Tensor] = {}
        for name, fit in self.fits.items():
            for field_name in _FIT_TENSORS:
                value = getattr(fit, field_name)
                if value is not None:
                    tensors[f"{name}|{field_name}"] = value.detach().contiguous().clone()
        header = json.dumps(
            {
                "format": _FORMAT,
                "created_at": self.created_at,
                "environment": dict(self.environment),
                "readings": _readings_json(self.readings),
                "fits": {name: _scalars(fit) for name, fit in self.fits.items()},
            },
            # Not sorted: measurements, and the digest of a decision, follow the order of the model.
            allow_nan=False,
        )
        content = safetensors_bytes(tensors, metadata={"header": header, "digest": _digest(header, tensors)})
        write_atomically(path, content)
        return path

    @classmethod
    def load(cls, path: Path | str) -> Baseline:
        """Read a baseline and check its digest.

        Raises:
            BaselineError: If the file is missing, torn, of another format, or was altered.
        """
        path = _file_in(Path(path))
        if not path.is_file():
            raise BaselineError(f"no baseline at {path}: capture one first (GuardSession(...).save_state(folder))")
        try:
            with safe_open(path, framework="pt") as handle:
                metadata = handle.metadata() or {}
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise BaselineError(f"the baseline {path} is torn or not a safetensors file ({error})") from error
        header = metadata.get("header", "")
        if not header or metadata.get("digest") != _digest(header, tensors):
            raise BaselineError(f"the baseline {path} was altered or is of another kind: its digest does not match")
        return _decode(json.loads(header), tensors, path)


def _file_in(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def _digest(header: str, tensors: Mapping[str, torch.Tensor]) -> str:
    whole = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        whole.update(f"{name}={tensor_digest(tensors[name])}\n".encode())
    return whole.hexdigest()


def _differences(ours: Mapping[str, TensorReading], theirs: Mapping[str, TensorReading]) -> Iterator[str]:
    """What differs in words: tensors on one side only first, for they say most about which model it is."""
    yield from (f"{name} is missing from the model" for name in sorted(ours.keys() - theirs.keys()))
    yield from (f"{name} is not in the baseline" for name in sorted(theirs.keys() - ours.keys()))
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name].shape != theirs[name].shape:
            yield f"{name} has shape {list(theirs[name].shape)}, the baseline {list(ours[name].shape)}"
        elif ours[name].dtype != theirs[name].dtype:
            yield f"{name} is {theirs[name].dtype}, the baseline {ours[name].dtype}"
        elif ours[name].digest != theirs[name].digest:
            yield f"{name} has other values"
        elif theirs[name].differing_ranks and not theirs[name].is_buffer:  # the digest is that of rank 0
            yield f"{name} has other values on rank {', '.join(map(str, theirs[name].differing_ranks))}"


def _scalars(fit: BulkFit) -> dict[str, Any]:
    return {field.name: getattr(fit, field.name) for field in fields(fit) if field.name not in _FIT_TENSORS}


def _readings_json(readings: Readings) -> dict[str, Any]:
    kept = ("model_digest", "tensors", "structure", "matrices", "bulks", "circuits", "second_moments", "unmeasured")
    found = {name: to_jsonable(getattr(readings, name)) for name in kept}
    if readings.subspace is not None:  # what later merges add to
        found["subspace"] = to_jsonable(readings.subspace)
    return {**found, "untrained": sorted(readings.untrained)}


def _decode(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], path: Path) -> Baseline:
    if header.get("format") != _FORMAT:
        raise BaselineError(f"the baseline {path} has format {header.get('format')!r}, this version reads {_FORMAT}")
    found = header["readings"]
    structure = StructureReading(
        modules=found["structure"]["modules"],
        ties=frozenset(tuple(tie) for tie in found["structure"]["ties"]),
        embedding_sizes=found["structure"]["embedding_sizes"],
    )
    readings = Readings(
        model_digest=found["model_digest"],
        tensors={name: _decode_tensor(reading) for name, reading in found["tensors"].items()},
        structure=structure,
        matrices={k: MatrixReading(**v) for k, v in found["matrices"].items()},
        bulks={k: BulkReading(**v) for k, v in found["bulks"].items()},
        circuits={k: _decode_circuit(v) for k, v in found.get("circuits", {}).items()},
        second_moments=found["second_moments"],
        unmeasured=found["unmeasured"],
        untrained=frozenset(found["untrained"]),
        subspace=None if "subspace" not in found else from_jsonable(SubspaceReading, found["subspace"]),
    )
    fits = {name: _decode_fit(name, scalars, tensors) for name, scalars in header["fits"].items()}
    return Baseline(readings, fits, header["environment"], header["created_at"])


def _decode_tensor(found: Mapping[str, Any]) -> TensorReading:
    lists = {name: tuple(found.get(name, ())) for name in ("shape", "differing_ranks", "nonfinite_ranks")}
    return TensorReading(**{**found, **lists})


def _decode_circuit(found: Mapping[str, Any]) -> CircuitReading:
    values = None if found["values"] is None else tuple(found["values"])
    return CircuitReading(**{**found, "matrices": tuple(found["matrices"]), "values": values})


def _decode_fit(name: str, scalars: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> BulkFit:
    return BulkFit(
        **scalars,
        singular_values=tensors[f"{name}|singular_values"],
        row_scale=tensors.get(f"{name}|row_scale"),
        col_scale=tensors.get(f"{name}|col_scale"),
    )
