"""Weight matrices of a model folder, read lazily from safetensors; nothing is executed or unpickled.

config.json says what a file cannot: which matrices GPT-2's family stores (in, out) and which
experts are stored turned. Names are those of the model in memory (transformers 5), so that both
readers can be compared: ViT's and Mixtral's files keep older names and one tensor per expert,
whose gate and up halves are joined again on load.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightproof.errors import InputError
from weightproof.families import family_of, public_names
from weightproof.folders.checkpoint_files import FileTensor, check_folder, read_config, read_headers
from weightproof.folders.layouts import DEPTHWISE, Layout, Piece, Stored, parameter_layout, pieces, unreadable_dtype
from weightproof.types import WeightMatrix

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


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """One tensor of a model folder as it is in memory; experts of their own are one stack.

    Attributes:
        name: Public name in memory.
        shape: Shape in memory.
        dtype: Storage dtype.
        is_buffer: Whether it is a buffer of the model rather than a parameter.
        keys: The tensors of the files that it is made of.
        matrices: Names of the weight matrices in it.
        blocks: Reads it, block of leading rows after block: all of it at once, or expert by expert.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_buffer: bool
    keys: tuple[str, ...]
    matrices: tuple[str, ...]
    blocks: Callable[[], Iterator[Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A model folder, its headers read and checked: tensors and matrices, each read when asked for.

    `tensor_name` of a matrix is the name in memory of the tensor that it lies in.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...]
    matrices: tuple[WeightMatrix, ...]
    weight_files: tuple[Path, ...]


# ---------------------------------------------------------------- config.json


def _model_types(config: Mapping[str, Any]) -> set[str]:
    """model_type of a configuration and of the configurations inside it."""
    types = {str(config["model_type"])} if "model_type" in config else set()
    for value in config.values():
        if isinstance(value, dict):
            types |= _model_types(value)
    return types


def _in_memory_name(key: str, model_types: set[str]) -> str:
    for model_type in sorted(model_types):
        for pattern, replacement in _RENAMED.get(model_type, ()):
            key = re.sub(pattern, replacement, key)
    return key


# ---------------------------------------------------------------- matrices


def _unreadable(tensor: FileTensor) -> str | None:
    if tensor.dtype is None:
        return "its stored dtype is unknown: dequantise the model and save it again"
    return unreadable_dtype(tensor.dtype)


def _stored(name: str, tensor: FileTensor, config: Mapping[str, Any], model_types: set[str]) -> Stored:
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


def _load(tensor: FileTensor, stored: Stored, position: int, piece: Piece) -> Tensor:
    if stored.layout in (Layout.STACK, Layout.TURNED_STACK):
        item = tensor.read_item(position)[0]
        return item.T if stored.layout is Layout.TURNED_STACK else item
    return piece.select(tensor.read())


def _load_joined(parts: tuple[FileTensor, ...]) -> Tensor:
    tensors = [part.read() for part in parts]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _matrices(stored: Stored, tensor: FileTensor) -> Iterator[WeightMatrix]:
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


def _joined_matrix(name: str, parts: tuple[FileTensor, ...]) -> WeightMatrix:
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


def _join_experts(named: Mapping[str, FileTensor]) -> dict[str, tuple[FileTensor, ...]]:
    """Name of one expert's matrix in memory -> its parts in the file, gate before up."""
    places: dict[tuple[str, str, int], list[tuple[int, FileTensor]]] = {}
    for name, tensor in named.items():
        if (match := _EXPERT.fullmatch(name)) and len(tensor.shape) == 2:
            stack, place = _EXPERT_PARTS[match["part"]]
            places.setdefault((match["experts"], stack, int(match["index"])), []).append((place, tensor))
    joined: dict[str, tuple[FileTensor, ...]] = {}
    for (experts, stack, index), parts in sorted(places.items(), key=lambda item: item[0]):
        ordered = tuple(tensor for _, tensor in sorted(parts, key=lambda part: part[0]))
        joined[f"{experts}.{stack}[{index}]"] = ordered
    return joined


def _named(headers: list[FileTensor], model_types: set[str]) -> tuple[dict[str, FileTensor], dict[str, FileTensor]]:
    """Name in memory -> tensor of the file, for parameters and for buffers."""
    parameters = {tensor.key: tensor for tensor in headers if not _BUFFER.fullmatch(f".{tensor.key}")}
    public = public_names(parameters)
    named = {_in_memory_name(public[key], model_types): tensor for key, tensor in parameters.items()}
    buffers = {tensor.key: tensor for tensor in headers if tensor.key not in parameters}
    return named, {_in_memory_name(key, model_types): tensor for key, tensor in buffers.items()}


def _all_matrices(headers: list[FileTensor], config: Mapping[str, Any]) -> Iterator[WeightMatrix]:
    model_types = _model_types(config)
    named, _ = _named(headers, model_types)
    joined = _join_experts(named)
    in_stacks = {part.key for parts in joined.values() for part in parts}
    for name, tensor in named.items():
        if len(tensor.shape) > 1 and tensor.key not in in_stacks:
            yield from _matrices(_stored(name, tensor, config, model_types), tensor)
    for name, parts in joined.items():
        yield _joined_matrix(name, parts)


# ---------------------------------------------------------------- tensors as in memory


def _plain_tensor(name: str, tensor: FileTensor, matrices: tuple[str, ...], *, is_buffer: bool) -> StoredTensor:
    if tensor.dtype is None:
        raise InputError(
            f"{tensor.file}: {tensor.key} is stored in a dtype that this version cannot read; dequantise the model and "
            "save it again"
        )

    def blocks() -> Iterator[Tensor]:
        yield tensor.read()

    return StoredTensor(name, tensor.shape, tensor.dtype, is_buffer, (tensor.key,), matrices, blocks)


def _stack_tensor(name: str, experts: Sequence[WeightMatrix], keys: tuple[str, ...]) -> StoredTensor:
    first = experts[0]
    shape = (len(experts), first.d_out, first.d_in)

    def blocks() -> Iterator[Tensor]:
        for expert in experts:
            yield expert.load()[None]

    return StoredTensor(name, shape, first.dtype, False, keys, tuple(expert.name for expert in experts), blocks)


def _require_alike(name: str, experts: Sequence[WeightMatrix], folder: Path) -> None:
    """A stack has experts 0 to n - 1 of one shape and dtype."""
    for index, expert in enumerate(experts):
        if expert.name != f"{name}[{index}]":
            raise InputError(f"{folder}: {name} lacks expert {index}; download or save the model again")
        if (expert.d_out, expert.d_in, expert.dtype) != (experts[0].d_out, experts[0].d_in, experts[0].dtype):
            raise InputError(f"{folder}: the experts of {name} differ in shape or dtype; save the model again")


def _all_tensors(
    headers: list[FileTensor], matrices: Sequence[WeightMatrix], folder: Path, model_types: set[str]
) -> Iterator[StoredTensor]:
    named, buffers = _named(headers, model_types)
    names = {tensor.key: name for name, tensor in named.items()}
    joined = _join_experts(named)
    stacks: dict[str, list[WeightMatrix]] = {}
    inside: dict[str, list[str]] = {}
    for matrix in matrices:
        if matrix.name in joined:
            stacks.setdefault(matrix.name.rpartition("[")[0], []).append(matrix)
        else:
            inside.setdefault(names[matrix.tensor_name], []).append(matrix.name)
    in_stacks = {part.key for parts in joined.values() for part in parts}
    for name, tensor in named.items():
        if tensor.key not in in_stacks:
            yield _plain_tensor(name, tensor, tuple(inside.get(name, ())), is_buffer=False)
    for name, experts in stacks.items():
        _require_alike(name, experts, folder)
        yield _stack_tensor(name, experts, tuple(part.key for one in experts for part in joined[one.name]))
    for name, tensor in buffers.items():
        yield _plain_tensor(name, tensor, (), is_buffer=True)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The tensors and weight matrices of a model folder, named, shaped and oriented as in memory.

    Headers and config.json are read and checked here; weights only when asked for, one tensor at a time.

    Raises:
        InputError: As `iter_checkpoint_matrices`; also for a stack of experts that lacks one, and for a tensor of
            unknown dtype.
    """
    folder = Path(folder)
    check_folder(folder)
    headers, config = read_headers(folder), read_config(folder)
    matrices = tuple(_all_matrices(headers, config))
    tensors = tuple(_all_tensors(headers, matrices, folder, _model_types(config)))
    holders = {matrix: tensor.name for tensor in tensors for matrix in tensor.matrices}
    named = tuple(replace(matrix, tensor_name=holders[matrix.name]) for matrix in matrices)
    return Checkpoint(folder, config, tensors, named, tuple(sorted({tensor.file for tensor in headers})))


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
    check_folder(folder)
    headers = read_headers(folder)
    return _all_matrices(headers, read_config(folder))
