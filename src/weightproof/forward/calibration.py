"""Calibration windows: the user's own data, in whatever container, as `Windows`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from weightproof.errors import InputError
from weightproof.families import unwrap
from weightproof.forward.windows import (
    Item,
    Windows,
    digest_items,
    forward_names,
    is_encoder_decoder,
    main_input,
    max_length,
    stack,
    start_id,
    takes,
)
from weightproof.rng import preserved_rng

LABEL_NAMES = ("labels", "label", "label_ids")
_SAMPLE_DIMS = {"input_ids": 1, "pixel_values": 3, "input_features": 2, "input_values": 1}
_EMPTY = "the {name} data has no window: give at least one example with real tokens"


def calibration_windows(
    data: object, model: nn.Module, *, count: int = 8, length: int = 128, name: str = "calibration"
) -> Windows:
    """The first `count` windows of `data`, cut to `length` tokens.

    Reads no more than it needs and leaves the random state as found (a shuffling `DataLoader`
    draws from it). Labels are dropped; a sequence-to-sequence model gets its decoder tokens from
    them. Positions whose attention mask is 0 stay in the input and are left out of every score.

    Args:
        data: An iterable (list, `datasets.Dataset`, `DataLoader`, generator) of dicts of tensors,
            arrays or lists, of tensors, or of lists of token ids; each a sample or a batch. Also one
            such dict or tensor, or one flat list of ids, which is cut into windows. For a plain
            module without `config` each example is the keyword arguments of one call, as it is.
        model: The model that will read them.
        count: Windows to take.
        length: Tokens per window, cut to the model's position table as well.
        name: Name under which readings of these windows are reported.

    Raises:
        InputError: If there is no window, or the examples hold text instead of token ids.
    """
    if count < 1 or length < 1:
        raise InputError(f"count and length of {name} windows must be at least 1, not {count} and {length}")
    model = unwrap(model)
    with preserved_rng():
        if getattr(model, "config", None) is None:
            return _as_they_are(data, model, count, name)
        size = min(length, max_length(model) or length)
        found = (
            item
            for example in examples_of(data, model, name, count * size)
            for sample in samples_of(tensors_of(example, model, name), model)
            for item in _prepare(sample, model, size)
        )
        items = list(itertools.islice(found, count))
    if not items:
        raise InputError(_EMPTY.format(name=name))
    return stack(name, items, model)


def _as_they_are(data: object, model: nn.Module, count: int, name: str) -> Windows:
    examples = itertools.islice(examples_of(data, model, name, None), count)
    batches = tuple(tensors_of(example, model, name) for example in examples)
    if not batches:
        raise InputError(_EMPTY.format(name=name))
    rows = sum(next(iter(batch.values())).shape[0] if next(iter(batch.values())).ndim else 1 for batch in batches)
    return Windows(name, batches, digest_items(batches), rows)


def examples_of(data: object, model: nn.Module, name: str, num_ids: int | None) -> Iterator[Mapping[str, Any]]:
    """Every example as a mapping from input names to values."""
    if isinstance(data, (str, bytes)):
        raise _text_error(name)
    if isinstance(data, Mapping):
        yield cast("Mapping[str, Any]", data)
        return
    key = main_input(model)
    if isinstance(data, (torch.Tensor, np.ndarray)):
        yield {key: data}
        return
    stream = _stream(data, key, name)
    for example in stream:
        if isinstance(example, Mapping):
            yield cast("Mapping[str, Any]", example)
        elif isinstance(example, (str, bytes)):
            raise _text_error(name)
        elif isinstance(example, (int, np.integer)):  # a flat list of ids: the rest of it is ids too
            rest = itertools.islice(stream, None if num_ids is None else max(0, num_ids - 1))
            yield {key: [example, *rest]}
            return
        elif isinstance(example, (list, tuple)) and example and isinstance(example[0], (torch.Tensor, np.ndarray)):
            yield {key: example[0]}  # (inputs, targets), as TensorDataset gives them
        else:
            yield {key: example}


def _stream(data: object, key: str, name: str) -> Iterator[Any]:
    if isinstance(data, Iterable):
        return iter(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):  # a map-style torch Dataset has no __iter__
        indexed = cast("Any", data)
        return (indexed[i] for i in range(len(indexed)))
    raise InputError(
        f"the {name} data is {type(data).__name__}: give an iterable of dicts with {key!r}, of tensors or of lists"
    )


def _text_error(name: str) -> InputError:
    return InputError(f"the {name} data holds text: tokenize it first and give dicts with 'input_ids'")


def tensors_of(example: Mapping[str, Any], model: nn.Module, name: str) -> Item:
    """The numeric inputs that `forward` takes (and labels, from which decoder tokens are made)."""
    key = main_input(model)
    accepted = set(forward_names(model)[0]) | set(LABEL_NAMES)
    is_plain = getattr(model, "config", None) is None
    found: Item = {}
    for field, value in example.items():
        if field not in accepted or value is None or (is_plain and field in LABEL_NAMES and not takes(model, field)):
            continue
        tensor = _tensor(value)
        if tensor is not None:
            found[field] = tensor
    if not found or (not is_plain and key not in found):
        if any(isinstance(value, str) or _is_texts(value) for value in example.values()):
            raise _text_error(name)
        raise InputError(
            f"the {name} examples have no usable {key!r} (found: {', '.join(map(repr, example)) or 'nothing'}): "
            f"tokenize or preprocess them into what {type(model).__name__}.forward takes"
        )
    return found


def _is_texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], str)


def _tensor(value: Any) -> torch.Tensor | None:
    """A CPU tensor of numbers; None for anything that is not one (text, ragged lists, objects)."""
    if not isinstance(value, torch.Tensor):
        try:
            array = np.asarray(value)
        except ValueError:  # ragged
            return None
        if array.dtype.kind not in "biuf":
            return None
        value = torch.from_numpy(np.array(array))
    value = value.detach().cpu()
    return value.float() if value.dtype == torch.float64 else value


def samples_of(example: Item, model: nn.Module) -> Iterator[Item]:
    """Split a batch into its rows; a single sample passes through."""
    main = example[main_input(model)]
    if main.ndim <= _SAMPLE_DIMS.get(main_input(model), main.ndim - 1):
        yield example
        return
    rows = main.shape[0]
    for row in range(rows):
        yield {key: value[row] for key, value in example.items() if value.ndim and value.shape[0] == rows}


def _prepare(sample: Item, model: nn.Module, length: int) -> Iterator[Item]:
    """Cut one sample to windows: a long plain token stream gives several, anything else one."""
    labels = next((sample.pop(key) for key in LABEL_NAMES if key in sample), None)
    if is_encoder_decoder(model) and "decoder_input_ids" not in sample:
        sample = {**sample, **decoder_inputs(sample, labels, model)}
    if not bool(sample.get("decoder_attention_mask", torch.ones(1)).any()):
        return  # every label is ignored: nothing to score
    if "input_ids" in sample and main_input(model) == "input_ids":
        yield from _cut_text(sample, length)
        return
    yield {k: v[:length] if k.startswith("decoder_") else v for k, v in sample.items()}


def _cut_text(sample: Item, length: int) -> Iterator[Item]:
    if sample["input_ids"].numel() == 0:
        return
    if sample["input_ids"].is_floating_point():
        raise InputError("the calibration data holds floating point numbers where token ids belong: give integers")
    ids = sample["input_ids"].long()
    if set(sample) == {"input_ids"} and ids.numel() > length:
        yield from ({"input_ids": piece} for piece in ids.split(length) if piece.numel() == length)
        return
    mask = sample.get("attention_mask")
    start = 0
    if mask is not None:
        real = mask.ne(0).nonzero()
        if not len(real):
            return
        start = int(real[0, -1]) if mask.ndim == 1 else 0  # left padding carries nothing to score
    cut: Item = {}
    for key, value in {**sample, "input_ids": ids}.items():
        if key.startswith("decoder_"):
            cut[key] = value[:length]
        elif value.ndim and value.shape[0] == ids.shape[0]:
            cut[key] = value[start : start + length]
        else:
            cut[key] = value
    yield cut


def decoder_inputs(sample: Item, labels: torch.Tensor | None, model: nn.Module) -> Item:
    """Decoder tokens from labels (shifted right), else from the input tokens, else the start token."""
    if labels is not None and labels.ndim == 1 and labels.numel():
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        made: Item = {"decoder_input_ids": _shift(labels, model) if shift is None else shift(labels=labels[None])[0]}
        if bool(labels.lt(0).any()) and takes(model, "decoder_attention_mask"):
            made["decoder_attention_mask"] = labels.ge(0).long()
        return made
    if main_input(model) == "input_ids":
        return {"decoder_input_ids": _shift(sample["input_ids"], model)}
    return {"decoder_input_ids": torch.tensor([start_id(model)])}


def _shift(ids: torch.Tensor, model: nn.Module) -> torch.Tensor:
    config = getattr(model, "config", None)
    pad = getattr(config, "pad_token_id", None)
    shifted = torch.cat([ids.new_tensor([start_id(model)]), ids[:-1]])
    return shifted.masked_fill(shifted < 0, pad if isinstance(pad, int) else 0)
