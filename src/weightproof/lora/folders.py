"""Read an adapter from the folder that PEFT saved: `adapter_config.json` and `adapter_model.safetensors`.

PEFT itself is not imported, nothing is unpickled. What the configuration says beyond what is understood here is
refused by name, so that no variant of LoRA is mistaken for the plain one.

In the file A is (r, d_in) and B is (d_out, r), however the base model stores the matrix: GPT-2's Conv1D, and
`fan_in_fan_out` with it, needs no turning. An embedding's factors are stored the other way around. The factors of a
stack of experts (`target_parameters`) lie joined: A is (E r, d_in), B is (d_out, r E).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from weightproof.errors import InputError
from weightproof.families import clean_name
from weightproof.folders.checkpoint_files import check_folder, read_json, read_tensors_of
from weightproof.lora.deltas import Adapter, AdapterDelta

CONFIG, WEIGHTS, BASE_NOTE = "adapter_config.json", "adapter_model.safetensors", "weightproof_base.json"

# Settings that were read here, or that shape training but not what is merged.
_UNDERSTOOD = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora",
    "velora_config", "qalora_group_size", "runtime_config", "lora_bias", "target_parameters", "ensure_weight_tying",
}  # fmt: skip
# These take a part of the weights out of the base model when training begins: the base on disk is not what it adds to.
_RESIDUAL_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_FACTOR = re.compile(
    r"(?P<path>.+?)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?P<leaf>\.weight|\.bias)?"
)
_NESTING = re.compile(r"(?:\.base_layer)+$")
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "wte", "word_embeddings"})
# The order in which transformers registers the parameters of a stack, and so PEFT wraps them, the first innermost.
_STACK_ORDER = ("gate_up_proj", "up_proj", "down_proj", "weight")


def is_adapter_folder(folder: Path) -> bool:
    """Whether PEFT saved an adapter there."""
    return (folder / CONFIG).is_file()


def read_adapter_folder(folder: Path, adapter_name: str = "default") -> Adapter:
    """Read a folder, or its sub-folder of the adapter's name (where PEFT puts all but the default one).

    Raises:
        InputError: No adapter there, a pickle, a method or setting that is not understood, a factor without its
            partner, or a tensor that belongs to nothing.
    """
    if not folder.exists():
        raise InputError(f"there is no adapter folder {folder}: give the one that save_pretrained wrote the adapter to")
    check_folder(folder)
    if adapter_name != "default" and is_adapter_folder(folder / adapter_name):
        folder = folder / adapter_name
    _require_files(folder)
    config = read_json(folder / CONFIG)
    _require_understood(folder, config)
    tensors = read_tensors_of(folder / WEIGHTS)
    found = _sorted_out(folder, config, tensors)
    if not found.factors:
        raise InputError(
            f"{folder / WEIGHTS} holds no LoRA weights (of {len(tensors)} tensors none is a lora_A or lora_B)"
        )
    deltas: dict[str, AdapterDelta] = {}
    biases: dict[str, Tensor] = {}
    for path, parts in sorted(found.factors.items()):
        for delta in _deltas(folder, config, path, parts, found.factors):
            deltas[delta.name] = delta
        if "lora_B.bias" in parts:
            biases[f"{clean_name(path)}.bias"] = parts["lora_B.bias"] * _scaling(config, clean_name(path))
    base = config.get("base_model_name_or_path")
    note = read_json(folder / BASE_NOTE) if (folder / BASE_NOTE).exists() else {}
    digests = note.get("matrices", {})
    return Adapter(
        deltas=deltas,
        replaced=found.replaced,
        biases=biases,
        base=str(base) if base else None,
        source=str(folder),
        base_digests={str(name): str(value) for name, value in digests.items()} if isinstance(digests, dict) else {},
    )


def _require_files(folder: Path) -> None:
    if not is_adapter_folder(folder):
        hint = " (a whole model lies there: an adapter is what get_peft_model(...).save_pretrained writes)"
        raise InputError(f"{folder} holds no {CONFIG}{hint if (folder / 'config.json').exists() else ''}")
    if not (folder / WEIGHTS).exists():
        pickles = sorted(file.name for file in folder.glob("adapter_model.*"))
        if pickles:
            raise InputError(
                f"{folder / pickles[0]} is a pickle, which can run code when loaded, and is refused: load it where you "
                "trust it and save it again with save_pretrained(..., safe_serialization=True)"
            )
        raise InputError(f"{folder} holds {CONFIG} but no {WEIGHTS}: save the adapter again")


def _require_understood(folder: Path, config: Mapping[str, Any]) -> None:
    method = config.get("peft_type")
    if method != "LORA":
        raise InputError(
            f"{folder} is an adapter of the method {method!r}; LoRA is read from folders, with its variants rsLoRA and "
            "DoRA. Merge it with PEFT inside session.edit(): outputs decide then"
        )
    if strange := sorted(key for key, value in config.items() if value and key not in _UNDERSTOOD):
        raise InputError(
            f"{folder / CONFIG} sets {', '.join(strange)}, which may change what is merged and is not understood here. "
            "Merge it with PEFT inside session.edit(): outputs decide then"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL_STARTS):
        raise InputError(
            f"{folder}: training began from {start!r}, which took a part of the weights out of the base model: the "
            "adapter does not add to the base on disk. Save it as a plain one: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


@dataclass
class _Found:
    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    replaced: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def _sorted_out(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> _Found:
    """Factors by raw path of their layer, and whole tensors by public name; nothing may be left over."""
    found = _Found()
    saved = [str(name) for name in config.get("modules_to_save") or ()]
    for key, tensor in tensors.items():
        if "trainable_tokens" in key:
            raise InputError(f"{folder}: {key} trains single tokens, which is not understood here")
        if match := _FACTOR.fullmatch(key.replace(".default.", ".").removesuffix(".default")):
            leaf = match["leaf"] if match["leaf"] == ".bias" else ""
            found.factors.setdefault(match["path"], {})[f"{match['part']}{leaf}"] = tensor
            continue
        name = clean_name(key)
        path, _, leaf = name.rpartition(".")
        is_bias = leaf == "bias" and config.get("bias") in ("all", "lora_only")
        is_saved = any(f".{entry}." in f".{path}." for entry in saved) or path.rpartition(".")[2] in _EMBEDDINGS
        if not is_bias and not is_saved:
            raise InputError(
                f"{folder}: {key} belongs to nothing: it is no factor of LoRA, and the configuration names no such "
                "module in modules_to_save and trains no such bias"
            )
        found.replaced[name] = tensor
    return found


def _deltas(
    folder: Path, config: Mapping[str, Any], path: str, parts: Mapping[str, Tensor], every: Mapping[str, object]
) -> list[AdapterDelta]:
    """The matrices that the factors of one layer change: one, or one for each expert of a stack."""
    module = clean_name(path)
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_B", "lora_embedding_A") if embedding else ("lora_A", "lora_B")
    if missing := [name for name in names if name not in parts]:
        raise InputError(f"{folder}: {path} has no {missing[0]}, only {', '.join(sorted(parts))}")
    a, b = parts[names[0]], parts[names[1]]
    magnitude = parts.get("lora_magnitude_vector")
    if embedding:
        if magnitude is not None:
            raise InputError(f"{folder}: {path} is DoRA of an embedding, which is not understood here")
        return [AdapterDelta(f"{module}.weight", a.T, b.T, _scaling(config, module))]
    parameters = _stacked_parameters(config, module)
    if parameters:
        parameter = _parameter_at(folder, path, parameters, every)
        key = f"{module}.{parameter}"
        return expert_deltas(key, a, b, _rank(config, key), _scaling(config, key))
    if a.ndim > 2:
        a, b = _flat_kernels(folder, path, a, b)
    if a.shape[0] != (rank := _rank(config, module)):
        raise InputError(f"{folder}: {path} has rank {a.shape[0]}, the configuration says {rank}")
    magnitude = None if magnitude is None else magnitude.reshape(-1)
    return [AdapterDelta(f"{module}.weight", a, b, _scaling(config, module), magnitude)]


def _flat_kernels(folder: Path, path: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of a convolution: A (r, in, *kernel), B (out, r, 1, ...)."""
    if b[0, 0].numel() != 1:
        raise InputError(f"{folder}: {path} is a convolution whose B is {list(b.shape)}: its kernel must be of size 1")
    return a.flatten(1), b.flatten(1)


def expert_deltas(key: str, a: Tensor, b: Tensor, rank: int, scaling: float) -> list[AdapterDelta]:
    """One delta for each expert of a stack from factors that lie joined: A (E r, d_in), B (d_out, r E).

    As PEFT unfolds them: A expert after expert, B rank after rank. A single matrix keeps its plain name.
    """
    if rank < 1 or a.shape[0] % rank or b.shape[1] != a.shape[0]:
        raise InputError(
            f"the factors of {key} are {list(a.shape)} and {list(b.shape)}, which rank {rank} does not divide"
        )
    count = a.shape[0] // rank
    if count == 1:
        return [AdapterDelta(key, a, b, scaling)]
    by_expert, by_rank = a.reshape(count, rank, -1), b.reshape(b.shape[0], rank, count)
    return [AdapterDelta(f"{key}[{index}]", by_expert[index], by_rank[:, :, index], scaling) for index in range(count)]


def _stacked_parameters(config: Mapping[str, Any], module: str) -> list[str]:
    """Names of the parameters of this module that the adapter targets directly."""
    targets = [str(target).rpartition(".") for target in config.get("target_parameters") or ()]
    return [name for holder, _, name in targets if holder and f".{module}".endswith(f".{holder}")]


def _parameter_at(folder: Path, path: str, parameters: list[str], every: Mapping[str, object]) -> str:
    """Which parameter of a stack a nested wrapper is for: PEFT wraps the first one registered innermost."""
    if len(parameters) == 1:
        return parameters[0]
    if unknown := sorted(set(parameters) - set(_STACK_ORDER)):
        raise InputError(
            f"{folder}: several parameters of {clean_name(path)} are adapted, and the file does not say which factors "
            f"are those of {unknown[0]}: give the live model instead of the folder"
        )
    module = _NESTING.sub("", path)
    nested = sorted((other for other in every if _NESTING.sub("", other) == module), key=len)
    ordered = sorted(parameters, key=_STACK_ORDER.index)
    if len(nested) != len(ordered):
        raise InputError(f"{folder}: {module} has factors for {len(nested)} parameters, {len(ordered)} are targeted")
    return ordered[len(nested) - 1 - nested.index(path)]


def _pattern(patterns: object, module: str, otherwise: float) -> float:
    """The value of the first pattern (a regular expression for the end of a name, as PEFT reads it) that matches."""
    items = patterns.items() if isinstance(patterns, dict) else ()
    return next((value for key, value in items if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def _rank(config: Mapping[str, Any], module: str) -> int:
    return int(_pattern(config.get("rank_pattern"), module, config.get("r", 8)))


def _scaling(config: Mapping[str, Any], module: str) -> float:
    alpha, rank = (
        float(_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))),
        _rank(config, module),
    )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
