"""The file of a delta: safetensors, `<matrix>` or `<matrix>|left` and `<matrix>|right`, all else in its header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from weightproof.differences.factors import LowRank, Part
from weightproof.errors import InputError
from weightproof.folders.checkpoint_files import require_regular
from weightproof.folders.files import write_atomically
from weightproof.snapshots.tensor_store import tensor_digest

NAME = "delta.safetensors"
FORMAT = 1
_LEFT, _RIGHT = "|left", "|right"


def write(path: Path, parts: Mapping[str, Part], metadata: Mapping[str, Any]) -> Path:
    """Write it, the old file or the new one at any time; a folder gets `delta.safetensors`."""
    file = path if path.suffix == ".safetensors" else path / NAME
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        if isinstance(part, LowRank):
            tensors |= {f"{name}{_LEFT}": part.left, f"{name}{_RIGHT}": part.right}
        else:
            tensors[name] = part
    tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    digests = {key: tensor_digest(tensor) for key, tensor in tensors.items()}
    header = json.dumps({"format": FORMAT, "metadata": metadata, "tensors": digests}, sort_keys=True)
    content = safetensors_bytes(tensors, metadata={"weightproof.delta": header, "digest": _sha(header)})
    write_atomically(file, content)
    return file


def read(path: Path) -> tuple[dict[str, Part], dict[str, Any]]:
    """Parts and metadata, every digest proven.

    Raises:
        InputError: Nothing of the kind is there, or it is torn, altered, or of a later format.
    """
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        what = f"the folder holds no {NAME} and no PEFT adapter" if path.is_dir() else "there is no such file"
        raise InputError(f"no delta at {path}: {what}; make one with weightproof delta make")
    require_regular(file.parent, file)
    try:
        with safe_open(file, framework="pt") as handle:
            said = handle.metadata() or {}
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise InputError(f"the delta {file} is torn, or no safetensors file ({error}): make it again") from error
    header = said.get("weightproof.delta")
    if header is None:
        raise InputError(
            f"{file} is no delta of weightproof: its tensors do not say what they were made for. Give the adapter's "
            "folder, or make one with weightproof delta make BEFORE AFTER"
        )
    if said.get("digest") != _sha(header):
        raise InputError(f"the delta {file} was altered: its header does not have the digest it was written with")
    return _decoded(file, json.loads(header), tensors)


def _decoded(file: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Part], Any]:
    if header.get("format") != FORMAT:
        raise InputError(f"the delta {file} has the format {header.get('format')!r}; this version reads {FORMAT}")
    expected = header["tensors"]
    wrong = sorted(expected.keys() ^ tensors.keys()) or [
        key for key, tensor in sorted(tensors.items()) if tensor_digest(tensor) != expected[key]
    ]
    if wrong:
        raise InputError(f"the delta {file} was altered: {wrong[0]} is not what was written")
    parts: dict[str, Part] = {}
    for key, tensor in tensors.items():
        if key.endswith(_LEFT):
            name = key.removesuffix(_LEFT)
            parts[name] = LowRank(tensor, tensors[f"{name}{_RIGHT}"])
        elif not key.endswith(_RIGHT):
            parts[key] = tensor
    return parts, header["metadata"]


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
