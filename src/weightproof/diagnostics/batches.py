"""Held-out data as batches of one size, which is what agreement between batches is measured on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.errors import InputError
from weightproof.families import unwrap
from weightproof.forward.calibration import LABEL_NAMES
from weightproof.forward.windows import max_length, random_windows
from weightproof.loss_data.items import IGNORED, Form, LossItem, loss_items, task_of
from weightproof.rng import preserved_rng

__all__ = ["health_batches", "random_batches"]

Batch = dict[str, Tensor]


def health_batches(
    data: Any, model: nn.Module, *, batches: int = 8, rows: int = 16, length: int = 128
) -> tuple[Batch, ...]:
    """The first windows of some data, stacked into batches that the model's own loss can be read on.

    Args:
        data: Examples as `calibration_windows` takes them, with labels where the loss needs them.
        model: Its class says which loss that is. For a model of which no loss is known, `data` is an iterable of
            batches (dicts of tensors), taken as they are.
        batches: How many.
        rows: Windows in each.
        length: Tokens in each window at most.

    Raises:
        InputError: If the data is too little for two batches, or an example cannot be used.
    """
    if batches < 1 or rows < 1 or length < 2:
        raise InputError(f"batches, rows and length must be positive (length 2 or more): {batches}, {rows}, {length}")
    model = unwrap(model)
    task, _ = task_of(model)
    with preserved_rng():
        if task is None:
            return _as_they_are(data, batches)
        form = Form(task, min(length, max_length(model) or length), "health")
        items = list(itertools.islice(loss_items(data, model, form), batches * rows))
    found = [_stacked(items[start : start + rows]) for start in range(0, len(items) // rows * rows, rows)]
    if not found:
        raise InputError(
            f"the health data gives {len(items)} windows, fewer than one batch of {rows}: give more, or fewer rows"
        )
    return tuple(found)


def random_batches(
    model: nn.Module, *, batches: int = 8, rows: int = 4, length: int = 64, seed: int = 0
) -> tuple[Batch, ...]:
    """Random inputs of the kind the model eats, for labels that are drawn from the model itself.

    Raises:
        InputError: If nobody knows what it eats.
    """
    model = unwrap(model)
    # Fewer images than token windows are made of a count: ask until there are enough.
    items: list[Batch] = []
    for turn in range(batches * rows):
        windows = random_windows(model, count=batches * rows, length=length, seed=seed + turn)
        if windows is None:
            raise InputError(f"{type(model).__name__} does not say what it eats: give data")
        items += [
            {key: value[row] for key, value in batch.items()}
            for batch in windows.batches
            for row in range(len(next(iter(batch.values()))))
        ]
        if len(items) >= batches * rows:
            break
    return tuple(
        {key: torch.stack([item[key] for item in items[start : start + rows]]) for key in items[0]}
        for start in range(0, batches * rows, rows)
    )


def _as_they_are(data: Any, batches: int) -> tuple[Batch, ...]:
    if not isinstance(data, Iterable) or isinstance(data, Mapping | str | bytes):
        raise InputError(f"the health data is {type(data).__name__}: give an iterable of batches (dicts of tensors)")
    found: list[Batch] = []
    for number, batch in enumerate(itertools.islice(data, batches)):
        if not isinstance(batch, Mapping):
            raise InputError(f"batch {number} of the health data is a {type(batch).__name__}, not a dict of tensors")
        found.append({name: value.detach().cpu() for name, value in batch.items() if isinstance(value, Tensor)})
    if not found or not all(found):
        raise InputError("the health data has no batch of tensors")
    return tuple(found)


def _stacked(items: list[LossItem]) -> Batch:
    """Windows of different lengths, padded on the right; padding is masked and not scored."""
    rows = [item.inputs if item.labels is None else {**item.inputs, "labels": item.labels} for item in items]
    found: Batch = {}
    names = set.intersection(*(set(row) for row in rows))
    for name in sorted(names):
        found[name] = _padded([row[name] for row in rows], IGNORED if name in LABEL_NAMES else 0)
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        if ids not in names:
            continue
        if len({len(row[ids]) for row in rows}) > 1 or any(mask in row for row in rows):
            found[mask] = _padded([row.get(mask, torch.ones_like(row[ids])) for row in rows], 0)
    return found


def _padded(values: list[Tensor], filler: int) -> Tensor:
    if len({value.shape for value in values}) == 1:
        return torch.stack(values)
    if any(value.ndim != 1 for value in values):
        raise InputError("examples of the health data have different shapes: preprocess them to one size")
    return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=filler)
