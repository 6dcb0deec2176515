"""Weight matrices of a model folder, read lazily from safetensors; nothing is executed or unpickled.

config.json says what a file cannot: which matrices GPT-2's family stores (in, out) and which
experts are stored turned. Names are those of the model in memory (transformers 5), so that both
readers can be compared: ViT's and Mixtral's files keep older names and one tensor per expert,
whose gate and up halves are joined again on load.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weightproof.errors import InputError
from weightproof.families import family_of, public_names
from weightproof.layouts import DEPTHWISE, Layout, Piece, Stored, parameter_layout, pieces, unreadable_dtype
from weightproof.types import WeightMatrix

_SINGLE = "model.safetensors"
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

# What config.json's model_type (of the model or of one of its parts) says about storage.
_CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder"})
_CONV1D_MODULE = re.compile(r".*\.(?:c_attn|c_proj|c_fc|q_attn)\.weight")
_TURNED_STACK_TYPES = frozenset({"gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter"})

# Names in files -> names in memory, applied in order.
_RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "vit": (
        (r"\bencoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.attention.o_proj."),
        (r"\bencoder\.layer\.(\d+)\.attention\.attention\.(q|k|v)\w+\.", r"layers.\1.attention.\2_proj."),
        (r"\bencoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.mlp.fc1."),
        (r"\bencoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.mlp.fc2."),
    ),
    "mixtral": ((r"\.block_sparse_moe\.", ".mlp."),),
    "minimax": ((r"\.block_sparse_moe\.", ".mlp."),),
    "gpt_neox": ((r"^embed_out\.", "lm_head."),),
    "granitemoe": (
        (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
        (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
        (r"\.router\.layer\.weight$", ".router.weight"),
    ),
}

# One tensor per expert -> the stack it belongs to in memory, and its place in a fused map.
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<part>w[123]|(?:gate|up|down)_proj)\.weight")
_EXPERT_PARTS = {
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
    "down_proj": ("down_proj", 0),
}
# Buffers of older files; parameters are all else.
_BUFFER = re.compile(
    r".*(?:position_ids|token_type_ids|inv_freq|\.attn\.(?:masked_)?bias|final_logits_bias|running_(?:mean|var))"
)


@dataclass(frozen=True, slots=True)
class _Tensor:
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


# ---------------------------------------------------------------- files of a folder


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error}); download or save the model again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object; download or save the model again")
    return content


def _check_folder(folder: Path) -> None:
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
    if (folder / _SINGLE).exists() and not index.exists():
        return {folder / _SINGLE: []}
    if not index.exists():
        others = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith("adapter_")]
        if not others:
            raise _explain_missing_weights(folder)
        return {file: [] for file in others}
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map; download or save the model again")
    shards: dict[Path, list[str]] = {}
    for key, file in weight_map.items():
        shards.setdefault(folder / str(file), []).append(key)
    if missing := sorted(file.name for file in shards if not file.exists()):
        raise InputError(f"{index} names {missing[0]}, which is not in the folder; download the model again")
    return shards


def _read_headers(folder: Path) -> list[_Tensor]:
    tensors: list[_Tensor] = []
    for file, expected in _shards(folder).items():

        def read(handle: Any, file: Path = file) -> list[_Tensor]:
            slices = [(key, handle.get_slice(key)) for key in handle.keys()]  # noqa: SIM118 - not a dict
            return [_Tensor(key, file, tuple(part.get_shape()), _DTYPES.get(part.get_dtype())) for key, part in slices]

        found = _open(file, read)
        if lacking := sorted(set(expected) - {tensor.key for tensor in found}):
            raise InputError(f"{file} lacks {lacking[0]}, which the index places there; download the model again")
        tensors += found
    return tensors


# ---------------------------------------------------------------- config.json


def _model_types(config: Mapping[str, Any]) -> set[str]:
    """model_type of a configuration and of the configurations inside it."""
    types = {str(config["model_type"])} if "model_type" in config else set()
    for value in config.values():
        if isinstance(value, dict):
            types |= _model_types(value)
    return types


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} has no config.json, which says how its matrices are stored; copy it from the model")
    return _read_json(folder / "config.json")


def _in_memory_name(key: str, model_types: set[str]) -> str:
    for model_type in sorted(model_types):
        for pattern, replacement in _RENAMED.get(model_type, ()):
            key = re.sub(pattern, replacement, key)
    return key


# ---------------------------------------------------------------- matrices


def _unreadable(tensor: _Tensor) -> str | None:
    if tensor.dtype is None:
        return "its stored dtype is unknown: dequantise the model and save it again"
    return unreadable_dtype(tensor.dtype)


def _stored(name: str, tensor: _Tensor, config: Mapping[str, Any], model_types: set[str]) -> Stored:
    """What a parameter of the model in memory would tell, from its name and config.json."""
    shape, module_class, refusal = tensor.shape, "", _unreadable(tensor)
    if ".parametrizations." in name:
        module_class = "ParametrizationList"
    elif len(shape) > 2 and name.endswith(".weight") and family_of(name) != "expert":
        module_class = f"Conv{len(shape) - 2}d"
        # The file does not tell a depthwise convolution from one that reads a single channel.
        one_channel = len(shape) > 3 and config.get("num_channels") == 1
        if shape[1] == 1 and shape[0] > 1 and not one_channel:
            refusal = refusal or DEPTHWISE
    layout = parameter_layout(
        shape,
        module_class,
        turned_linear=bool(model_types & _CONV1D_TYPES) and _CONV1D_MODULE.fullmatch(f".{name}") is not None,
        turned_stack=bool(model_types & _TURNED_STACK_TYPES),
    )
    return Stored(name, shape, layout, module_class, refusal)


def _load(tensor: _Tensor, stored: Stored, position: int, piece: Piece) -> Tensor:
    if stored.layout in (Layout.STACK, Layout.TURNED_STACK):
        item = tensor.read_item(position)[0]
        return item.T if stored.layout is Layout.TURNED_STACK else item
    return piece.select(tensor.read())


def _load_joined(parts: tuple[_Tensor, ...]) -> Tensor:
    tensors = [part.read() for part in parts]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _matrices(stored: Stored, tensor: _Tensor) -> Iterator[WeightMatrix]:
    for position, piece in enumerate(pieces(stored)):
        yield WeightMatrix(
            name=piece.name,
            family=piece.family,
            d_out=piece.d_out,
            d_in=piece.d_in,
            dtype=tensor.dtype or torch.uint8,
            tied_names=(),
            tensor_name=tensor.key,
            load=partial(_load, tensor, stored, position, piece),
            is_view=False,
            refusal=piece.refusal,
            select=piece.select,
        )


def _joined_matrix(name: str, parts: tuple[_Tensor, ...]) -> WeightMatrix:
    return WeightMatrix(
        name=name,
        family="expert",
        d_out=sum(part.shape[0] for part in parts),
        d_in=parts[0].shape[1],
        dtype=parts[0].dtype or torch.uint8,
        tied_names=(),
        tensor_name=parts[0].key,
        load=partial(_load_joined, parts),
        is_view=False,
        refusal=_unreadable(parts[0]),
    )


def _join_experts(named: Mapping[str, _Tensor]) -> dict[str, tuple[_Tensor, ...]]:
    """Name of one expert's matrix in memory -> its parts in the file, gate before up."""
    places: dict[tuple[str, str, int], list[tuple[int, _Tensor]]] = {}
    for name, tensor in named.items():
        if (match := _EXPERT.fullmatch(name)) and len(tensor.shape) == 2:
            stack, place = _EXPERT_PARTS[match["part"]]
            places.setdefault((match["experts"], stack, int(match["index"])), []).append((place, tensor))
    joined: dict[str, tuple[_Tensor, ...]] = {}
    for (experts, stack, index), parts in sorted(places.items(), key=lambda item: item[0]):
        ordered = tuple(tensor for _, tensor in sorted(parts, key=lambda part: part[0]))
        joined[f"{experts}.{stack}[{index}]"] = ordered
    return joined


def _all_matrices(headers: list[_Tensor], config: Mapping[str, Any]) -> Iterator[WeightMatrix]:
    model_types = _model_types(config)
    tensors = {tensor.key: tensor for tensor in headers if not _BUFFER.fullmatch(f".{tensor.key}")}
    public = public_names(tensors)
    named = {_in_memory_name(public[key], model_types): tensor for key, tensor in tensors.items()}
    joined = _join_experts(named)
    in_stacks = {part.key for parts in joined.values() for part in parts}
    for name, tensor in named.items():
        if len(tensor.shape) > 1 and tensor.key not in in_stacks:
            yield from _matrices(_stored(name, tensor, config, model_types), tensor)
    for name, parts in joined.items():
        yield _joined_matrix(name, parts)


def iter_checkpoint_matrices(folder: Path) -> Iterator[WeightMatrix]:
    """Every weight matrix of a model folder, named and oriented as in memory; each is read by `load()`.

    The headers are read and checked at once, the weights only when asked for. A file does not say
    which tensors are tied (a tied one is stored once), so `tied_names` is empty. `tensor_name`
    is the key in the file.

    Raises:
        InputError: If the folder, config.json or a shard is missing, if the weights are pickles,
            or if a file is truncated or corrupt; also by `load()` for a file that changed since.
    """
    folder = Path(folder)
    _check_folder(folder)
    headers = _read_headers(folder)
    return _all_matrices(headers, _read_config(folder))
