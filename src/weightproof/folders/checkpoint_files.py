"""The files of a model folder: which ones hold weights, what their headers say; nothing is executed or unpickled.

A folder is untrusted input: links that lead out of it, pipes, pickles, oversized JSON and headers, and weights
stored twice are refused in a sentence before anything of them is parsed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weightproof.errors import InputError

_SINGLE = "model.safetensors"
# The largest known index (a model of 90,000 tensors) has 10 MB; the largest known header 3 MB.
MAX_JSON_BYTES = 64 << 20
MAX_HEADER_BYTES = 32 << 20
_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class FileTensor:
    """One tensor of a checkpoint file: where it lies and what its header says."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def read(self) -> Tensor:
        """The whole tensor."""
        return _open(self.file, lambda handle: handle.get_tensor(self.key))

    def read_item(self, index: int) -> Tensor:
        """Entry `index` of the first dimension, kept as a dimension of size 1; the rest is not read."""
        return _open(self.file, lambda handle: handle.get_slice(self.key)[index : index + 1])


def _open(file: Path, read: Callable[[Any], Any]) -> Any:
    try:
        with safe_open(file, framework="pt") as handle:
            return read(handle)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a complete safetensors file ({error}); download or save it again") from error


def require_regular(folder: Path, file: Path) -> None:
    """Refuse what is no file of this folder: a pipe that never ends, a link that leads out of it.

    Files of the Hugging Face cache are links from `snapshots/<revision>` to `blobs` beside it; these are its own.
    """
    home, real = folder.resolve(), file.resolve()
    home = home.parent.parent if home.parent.name == "snapshots" else home
    if not real.is_relative_to(home):
        raise InputError(
            f"{file} leads out of its folder, to {real}: nothing was read; copy it into the folder if you trust it"
        )
    if real.exists() and not real.is_file():
        raise InputError(f"{file} is no regular file; download or save the model again")


def _require_small_header(file: Path) -> None:
    """Refuse a safetensors file whose header is larger than that of any model, before it is parsed."""
    try:
        with file.open("rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); download or save it again") from error
    if size > MAX_HEADER_BYTES:
        raise InputError(
            f"{file} is not a complete safetensors file: it claims a header of {size} bytes, more than the "
            f"{MAX_HEADER_BYTES} that any model needs; download or save it again"
        )


def read_tensors_of(file: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file by its key; for small files, such as those of adapters.

    Raises:
        InputError: If it leads out of its folder, or is torn or oversized.
    """
    require_regular(file.parent, file)
    _require_small_header(file)
    return _open(file, lambda handle: {key: handle.get_tensor(key) for key in handle.keys()})  # noqa: SIM118


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder.

    Raises:
        InputError: If it leads out of its folder, is too large, or holds no JSON object.
    """
    require_regular(file.parent, file)
    try:
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise InputError(f"{file} has {size} bytes, more than the {MAX_JSON_BYTES} that any model needs")
        content = json.loads(file.read_text(encoding="utf-8"))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error}); download or save the model again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object; download or save the model again")
    return content


def check_folder(folder: Path) -> None:
    """Refuse what is no folder."""
    if not folder.exists():
        raise InputError(f"{folder} does not exist; give the path of a model folder")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give the model folder that holds config.json and safetensors files")


def _explain_missing_weights(folder: Path) -> InputError:
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled:
        return InputError(
            f"{folder} holds its weights as a pickle ({pickled[0]}), which can run code when loaded and is refused; "
            "load it where you trust it and save it again with save_pretrained, which writes safetensors"
        )
    if (folder / "adapter_config.json").exists():
        return InputError(
            f"{folder} holds a PEFT adapter only; merge it into its base model and save that (merge_and_unload)"
        )
    return InputError(f"{folder} holds no safetensors weights; give a folder written by save_pretrained")


def _shards(folder: Path) -> dict[Path, list[str]]:
    """Files of a checkpoint with the keys an index places in each (none without an index)."""
    index = folder / _INDEX
    if (folder / _SINGLE).exists() and index.exists():
        raise InputError(
            f"{folder} holds its weights twice, as {_SINGLE} and in the files that {_INDEX} names: which one is loaded "
            "depends on the program; remove one of them"
        )
    if (folder / _SINGLE).exists():
        return {folder / _SINGLE: []}
    if not index.exists():
        others = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith("adapter_")]
        if not others:
            raise _explain_missing_weights(folder)
        return {file: [] for file in others}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map; download or save the model again")
    shards: dict[Path, list[str]] = {}
    for key, file in weight_map.items():
        shards.setdefault(folder / str(file), []).append(key)
    if missing := sorted(file.name for file in shards if not file.exists()):
        raise InputError(f"{index} names {missing[0]}, which is not in the folder; download the model again")
    return shards


def read_headers(folder: Path) -> list[FileTensor]:
    """Every tensor in the safetensors files of a folder; no values are read.

    Raises:
        InputError: For pickles, torn, missing or oversized files, and for a tensor that is stored twice.
    """
    tensors: list[FileTensor] = []
    for file, expected in _shards(folder).items():
        require_regular(folder, file)
        _require_small_header(file)

        def read(handle: Any, file: Path = file) -> list[FileTensor]:
            slices = [(key, handle.get_slice(key)) for key in handle.keys()]  # noqa: SIM118 - not a dict
            return [
                FileTensor(key, file, tuple(part.get_shape()), _DTYPES.get(part.get_dtype())) for key, part in slices
            ]

        found = _open(file, read)
        if lacking := sorted(set(expected) - {tensor.key for tensor in found}):
            raise InputError(f"{file} lacks {lacking[0]}, which the index places there; download the model again")
        tensors += found
    if twice := [key for key, count in Counter(tensor.key for tensor in tensors).items() if count > 1]:
        raise InputError(f"{twice[0]} is stored in two files of {folder}; remove the files of an older save")
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json."""
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} has no config.json, which says how its matrices are stored; copy it from the model")
    return read_json(folder / "config.json")
