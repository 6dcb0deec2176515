"""Windows of a text or JSONL file as batches that can be read again and again, none of it held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weightproof.errors import InputError
from weightproof.folders.text_data import Encode, read_examples

__all__ = ["TextBatches"]


@dataclass(frozen=True)
class TextBatches:
    """Batches of token windows.

    A text file is one stream of tokens, cut into windows of `length`; what is left at the end makes a shorter one. An
    example of a JSONL file is cut in the same way, and its windows are padded on the right where a batch needs it.

    Attributes:
        path: Text or JSONL (`text`, `input_ids`, or `prompt` and `completion`, of which the prompt is not scored).
        encode: Text to token ids.
        length: Tokens per window.
        batch_size: Windows per batch.
        max_tokens: Stop after as many; None reads everything.
        name: What the data is for, in errors.
    """

    path: Path
    encode: Encode | None
    length: int = 512
    batch_size: int = 8
    max_tokens: int | None = None
    name: str = "factor"

    def __post_init__(self) -> None:
        """Validate the sizes."""
        for field in ("length", "batch_size"):
            value = getattr(self, field)
            if value < (2 if field == "length" else 1):
                raise InputError(f"{field} must be at least {2 if field == 'length' else 1}, not {value}")

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The batches, the same each time."""
        rows: list[tuple[list[int], list[int] | None]] = []
        read = 0
        for row in self._windows():
            rows.append(row)
            read += len(row[0])
            if len(rows) == self.batch_size:
                yield _stacked(rows)
                rows = []
            if self.max_tokens is not None and read >= self.max_tokens:
                break
        if rows:
            yield _stacked(rows)

    def _windows(self) -> Iterator[tuple[list[int], list[int] | None]]:
        """Token ids and labels of each window of two or more tokens."""
        is_stream = self.path.suffix.lower() != ".jsonl"
        held: list[int] = []
        for example in read_examples(self.path, self.encode, name=self.name):
            ids, labels = list(example["input_ids"]), example.get("labels")
            if is_stream:
                held += ids
                while len(held) >= self.length:
                    yield held[: self.length], None
                    held = held[self.length :]
                continue
            for start in range(0, len(ids), self.length):
                part = ids[start : start + self.length]
                if len(part) > 1:
                    yield part, None if labels is None else list(labels[start : start + self.length])
        if len(held) > 1:
            yield held, None


def _stacked(rows: list[tuple[list[int], list[int] | None]]) -> dict[str, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    padded = [ids + [0] * (longest - len(ids)) for ids, _ in rows]
    mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]
    batch = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
    if any(labels is not None for _, labels in rows):
        given = [(ids if labels is None else labels) + [-100] * (longest - len(ids)) for ids, labels in rows]
        batch["labels"] = torch.tensor(given)
    return batch
