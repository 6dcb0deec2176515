"""Prompts from a file as one padded batch: a line each, or an object a line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from weightproof.errors import InputError
from weightproof.folders.text_data import Encode, read_examples


def read_prompts(path: Path, encode: Encode | None, name: str = "prompts") -> dict[str, Tensor]:
    """Prompts as `input_ids` and `attention_mask` (prompts, tokens), padded on the right.

    Args:
        path: `.jsonl` with `text` or `input_ids` a line; any other file has one prompt on each line that is not blank.
        encode: Text to token ids.
        name: What the prompts are for, in errors.

    Raises:
        InputError: As `read_examples`, or a prompt has no token.
    """
    if path.suffix.lower() == ".jsonl":
        ids = [list(one["input_ids"]) for one in read_examples(path, encode, name=name)]
    else:
        ids = _lines(path, encode, name)
    if empty := [number for number, one in enumerate(ids, 1) if not one]:
        raise InputError(f"prompt {empty[0]} of the {name} file {str(path)!r} has no token")
    longest = max(map(len, ids))
    return {
        "input_ids": torch.tensor([one + [0] * (longest - len(one)) for one in ids]),
        "attention_mask": torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids]),
    }


def _lines(path: Path, encode: Encode | None, name: str) -> list[list[int]]:
    next(iter(read_examples(path, encode, name=name)))  # refuses what is missing, empty, binary, or has no tokenizer
    assert encode is not None
    lines = path.read_text(encoding="utf-8").splitlines()
    return [list(encode(line)) for line in lines if line.strip()]


def require_enough(batch: Mapping[str, Tensor], rank: int, name: str) -> None:
    """Refuse a rank for which there are too few prompts: half of them make a basis, the other half score it.

    Raises:
        InputError: With both numbers.
    """
    count = len(batch["input_ids"])
    if count < 2 * rank:
        raise InputError(
            f"{count} {name} are too few for rank {rank}: {count - count // 2} of them make a basis of {rank} columns "
            f"and the rest score it; give at least {2 * rank}, or --rank {max(1, count // 2)}"
        )
