"""Retain data in two halves by documents: one for the guards, one that they never see and that tells the truth."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from weightproof.errors import InputError
from weightproof.folders.text_data import read_examples
from weightproof.forward.calibration import examples_of
from weightproof.forward.windows import is_encoder_decoder, main_input
from weightproof.loss_data.items import DOCUMENT_NAMES
from weightproof.losses import LossData


def halves(retain: Any, model: nn.Module) -> tuple[LossData, LossData]:
    """The data of the guards and the data of the truth.

    Examples of one document stay together; documents go to one half and the other in turn. Of one text (or stream
    of token ids), whose documents are not known, the guards get the first half.

    Args:
        retain: As `GuardSession(retain=...)` takes it.
        model: The model that will read it.

    Raises:
        InputError: If there is too little of it to divide, or it cannot be read.
    """
    given = retain if isinstance(retain, LossData) else LossData(retain)
    examples = _examples(given, model)
    if len(examples) == 1:
        guard, truth = _torn(examples[0], main_input(model))
    else:
        parities: dict[str, int] = {}
        sides: tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]] = ([], [])
        for number, example in enumerate(examples):
            sides[parities.setdefault(_document(example, number), len(parities) % 2)].append(example)
        guard, truth = sides
    if not len(guard) or not len(truth):
        raise InputError("the retain data are one document: give at least two, half of them tell the truth")
    return replace(given, data=guard), replace(given, data=truth)


def _examples(given: LossData, model: nn.Module) -> list[Mapping[str, Any]]:
    if not isinstance(given.data, (str, os.PathLike)):
        return list(examples_of(given.data, model, "retain", None))
    path = Path(given.data)
    found = list(read_examples(path, given.encode, name="retain", encoder_decoder=is_encoder_decoder(model)))
    if path.suffix.lower() == ".jsonl":
        return list(found)
    return [{main_input(model): [token for piece in found for token in piece["input_ids"]]}]


def _document(example: Mapping[str, Any], number: int) -> str:
    named = next((example[key] for key in DOCUMENT_NAMES if example.get(key) is not None), None)
    return f"{number}" if named is None else f"named {named}"


def _torn(example: Mapping[str, Any], key: str) -> tuple[Any, Any]:
    """One stream of ids in two; rows of one tensor in turn."""
    ids = example.get(key)
    if ids is None or len(ids) < 2:
        raise InputError("the retain data hold too little to divide between the guards and the truth: give more")
    if getattr(ids, "ndim", 1) > 1:
        rows = [{name: value[index] for name, value in example.items()} for index in range(len(ids))]
        return rows[0::2], rows[1::2]
    middle = len(ids) // 2
    return ids[:middle], ids[middle:]
