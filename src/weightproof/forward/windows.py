"""Windows: the fixed inputs on which outputs are compared, and random ones that need no data.

A window is one row of model inputs (a token sequence, an image, an audio segment). What a model
eats is read from `model.config`, `model.main_input_name` and the signature of its `forward`, by
the names that transformers uses; transformers itself is not imported.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weightproof.families import unwrap
from weightproof.spectrum import seeded_generator

Item = dict[str, torch.Tensor]

_LOGIT_BYTES = 64 * 2**20
_MAX_ROWS = 2  # few windows a batch: batches are what is dealt to processes, and larger ones are hardly faster
_POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_target_positions", "seq_length")


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Inputs of a fixed set of windows, on the CPU.

    Attributes:
        name: "random" or "calibration" (or what the caller named it).
        batches: Keyword arguments of one forward pass each; every tensor is (rows, ...).
        digest: SHA-256 over the contents of all windows, independent of how they are batched.
        num_tokens: Real (not padded) input tokens; images or audio segments where there is no text.
    """

    name: str
    batches: tuple[Mapping[str, torch.Tensor], ...]
    digest: str
    num_tokens: int

    def first(self) -> Item:
        """The first window alone, as a batch of one row."""
        return {key: value[:1].clone() for key, value in self.batches[0].items()}


def main_input(model: nn.Module) -> str:
    """Name of the model's first input: `main_input_name`, else the first parameter of `forward`."""
    name = getattr(model, "main_input_name", None)
    if isinstance(name, str) and getattr(model, "config", None) is not None:
        return name
    return next(iter(forward_names(model)[0]), "input")


def forward_names(model: nn.Module) -> tuple[tuple[str, ...], bool]:
    """Parameter names of `forward`, and whether it takes any other keyword (`**kwargs`)."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    inner = getattr(model, "get_base_model", None)  # an adapter wrapper forwards to its base model
    if not named and callable(inner):
        return forward_names(inner())  # pyright: ignore[reportArgumentType]
    return named, open_ended


def takes(model: nn.Module, name: str) -> bool:
    """True when `forward` has a parameter of this name."""
    return name in forward_names(model)[0]


def is_encoder_decoder(model: nn.Module) -> bool:
    """True when the model reads decoder tokens beside its main input."""
    return bool(getattr(_config(model), "is_encoder_decoder", False)) and takes(model, "decoder_input_ids")


def max_length(model: nn.Module) -> int | None:
    """Longest token sequence the position table allows; None when nothing limits it.

    RoBERTa-style tables (those with a padding index) begin to count behind that index.
    """
    config = _config(model)
    sources = [config, getattr(config, "text_config", None), getattr(config, "decoder", None)]
    limits = [getattr(source, field, None) for source in sources for field in _POSITION_FIELDS]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return max(1, min(known) - _first_position(model)) if known else None


def _first_position(model: nn.Module) -> int:
    indices = [
        getattr(module, "padding_idx", None)
        for name, module in model.named_modules()
        if "position" in name.rpartition(".")[2]
    ]
    return max((index + 1 for index in indices if isinstance(index, int)), default=0)


def special_ids(model: nn.Module) -> frozenset[int]:
    """Every token id that the configuration gives a role (`*_token_id`, `*_token_index`)."""
    config = _config(model)
    found: set[int] = set()
    for source in (config, getattr(config, "text_config", None)):
        for field, value in vars(source).items() if source is not None else ():
            if field.endswith(("_token_id", "_token_index")):
                found.update(v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int))
    return frozenset(found)


def start_id(model: nn.Module) -> int:
    """The token with which decoder inputs begin."""
    config = _config(model)
    for field in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        value = getattr(config, field, None)
        if isinstance(value, int):
            return value
    return 0


def stack(name: str, items: Iterable[Item], model: nn.Module) -> Windows:
    """Stack items (one window each, no batch axis) into batches of bounded logit memory."""
    items = list(items)
    batches: list[dict[str, torch.Tensor]] = []
    rows: list[Item] = []
    for item in items:
        if rows and (_layout(item) != _layout(rows[0]) or len(rows) >= _rows_per_batch(model, item)):
            batches.append(_join(rows))
            rows = []
        rows.append(item)
    if rows:
        batches.append(_join(rows))
    return Windows(name, tuple(batches), digest_items(items), sum(_count_tokens(item) for item in items))


def digest_items(items: Iterable[Mapping[str, torch.Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the items in order."""
    whole = hashlib.sha256()
    for item in items:
        whole.update(b"window\n")
        for key in sorted(item):
            value = item[key].contiguous()
            whole.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            whole.update(raw_bytes(value))
    return whole.hexdigest()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, in C order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def random_windows(model: nn.Module, *, count: int = 8, length: int = 128, seed: int = 0) -> Windows | None:
    """Random inputs of the kind the model eats, seeded by content.

    Text: uniform tokens without those that have a role; images and audio: noise on a coarse and a
    fine scale. Images and audio segments are fewer, so that about `count * length` positions pass
    through the trunk. None when the configuration does not say what the model eats.

    Args:
        model: A model with a transformers-style `config`; a plain module gives None.
        count: Number of token windows.
        length: Tokens per window, cut to the model's position table.
        seed: Another seed gives other windows.
    """
    model = unwrap(model)
    if getattr(model, "config", None) is None:
        return None
    build = _BUILDERS.get(main_input(model))
    size = min(length, max_length(model) or length)
    items = [] if build is None else list(build(model, count, size, seed))
    return stack("random", items, model) if items else None


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def _layout(item: Item) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    return sorted((key, tuple(value.shape), value.dtype) for key, value in item.items())


def _join(rows: list[Item]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _rows_per_batch(model: nn.Module, item: Item) -> int:
    config = _config(model)
    unpadded_only = getattr(config, "pad_token_id", None) is None and type(model).__name__.endswith("Classification")
    if unpadded_only and "input_ids" in item:
        return 1  # such models find the last real token by the padding id and refuse batches without one
    vocab = vocab_size(model) or int(getattr(config, "num_labels", 1) or 1)
    text = item.get("decoder_input_ids", item.get("input_ids"))
    positions = text.shape[0] if text is not None else 1
    inputs = max(value.numel() for value in item.values())
    return max(1, min(_MAX_ROWS, _LOGIT_BYTES // max(1, 4 * max(positions * vocab, inputs))))


def _count_tokens(item: Item) -> int:
    if "attention_mask" in item and "input_ids" in item:
        return int(item["attention_mask"].ne(0).sum())
    ids = item.get("input_ids", item.get("decoder_input_ids"))
    return int(ids.numel()) if ids is not None else 1


def vocab_size(model: nn.Module) -> int | None:
    """Token ids the model accepts: the smaller of `config.vocab_size` and the embedding's rows."""
    config = _config(model)
    sources = (config, getattr(config, "text_config", None), getattr(config, "decoder", None))
    sizes = [getattr(source, "vocab_size", None) for source in sources]
    try:
        table = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    except (AttributeError, NotImplementedError, TypeError):
        table = None  # not a text model, or a plain module
    weight = getattr(table, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 2:
        sizes.append(weight.shape[0])
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    return min(known) if known else None


def _random_ids(model: nn.Module, length: int, generator: torch.Generator) -> torch.Tensor | None:
    vocab = vocab_size(model)
    if vocab is None:
        return None
    plain = torch.ones(vocab, dtype=torch.bool)
    plain[[i for i in special_ids(model) if 0 <= i < vocab]] = False
    allowed = plain.nonzero().flatten() if bool(plain.any()) else torch.arange(vocab)
    return allowed[torch.randint(len(allowed), (length,), generator=generator)]


def _with_decoder(model: nn.Module, item: Item, length: int, generator: torch.Generator) -> Item:
    if not is_encoder_decoder(model):
        return item
    ids = _random_ids(model, length, generator)
    if ids is None:
        return {}
    ids[0] = start_id(model)
    return {**item, "decoder_input_ids": ids}


def _random_text(model: nn.Module, count: int, length: int, seed: int) -> Iterator[Item]:
    for index in range(count):
        generator = seeded_generator("random-windows", "text", seed, index)
        ids = _random_ids(model, length, generator)
        if ids is None:
            return
        yield _with_decoder(model, {"input_ids": ids}, length, generator)


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Noise (channels, height, width) whose coarse part differs from one sample to the next."""
    fine = torch.randn(shape, generator=generator)
    coarse = torch.randn(1, shape[0], 4, 4, generator=generator)
    return (fine + nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear")[0]) * 0.5**0.5


def _few(count: int, length: int, positions: int) -> int:
    return min(count, max(2, count * length // max(1, positions)))


def _pair(value: object) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return int(value[0]), int(value[1])
    return None


def _random_images(model: nn.Module, count: int, length: int, seed: int) -> Iterator[Item]:
    config = _config(model)
    candidates = (config, getattr(config, "vision_config", None), getattr(config, "encoder", None))
    source = next((c for c in candidates if getattr(c, "image_size", None) is not None), config)
    size = _pair(getattr(source, "image_size", None)) or (64, 64)  # without the field any size will do
    patch = _pair(getattr(source, "patch_size", None)) or (32, 32)
    channels = int(getattr(source, "num_channels", 3))
    for index in range(_few(count, length, (size[0] // patch[0]) * (size[1] // patch[1]))):
        generator = seeded_generator("random-windows", "image", seed, index)
        yield _with_decoder(model, {"pixel_values": _noise((channels, *size), generator)}, length, generator)


def _random_spectrograms(model: nn.Module, count: int, length: int, seed: int) -> Iterator[Item]:
    """Log-mel features (mel bins, 2 frames per source position), the one shape Whisper takes."""
    config = _config(model)
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if not isinstance(bins, int) or not isinstance(positions, int):
        return
    for index in range(_few(count, length, positions)):
        generator = seeded_generator("random-windows", "audio", seed, index)
        features = _noise((1, bins, 2 * positions), generator)[0]
        yield _with_decoder(model, {"input_features": features}, length, generator)


def _random_waveforms(model: nn.Module, count: int, length: int, seed: int) -> Iterator[Item]:
    """Raw samples (wav2vec 2.0 and kin) or, with mel bins, patches of (frames, bins)."""
    config = _config(model)
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    strides = getattr(config, "conv_stride", None)
    if isinstance(bins, int) and isinstance(frames, int):
        shape: tuple[int, ...] = (frames, bins)
    elif isinstance(strides, (list, tuple)):
        hop = int(torch.tensor(strides).prod())
        shape = (hop * min(length, 64) + 2 * hop,)
    else:
        return
    for index in range(min(count, 4)):
        generator = seeded_generator("random-windows", "waveform", seed, index)
        yield {"input_values": torch.randn(shape, generator=generator)}


_BUILDERS: Mapping[str, Callable[[nn.Module, int, int, int], Iterator[Item]]] = {
    "input_ids": _random_text,
    "pixel_values": _random_images,
    "input_features": _random_spectrograms,
    "input_values": _random_waveforms,
}
