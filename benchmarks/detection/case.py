"""One edit of the benchmark, as data."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from writes import Write


@dataclass(frozen=True)
class Case:
    """One edit of one model.

    Attributes:
        name: Unique within a model.
        group: What tables sum over.
        write: The change, in place; None where `edit` makes it.
        edit: One of weightproof's own edits instead, applied by the session.
        kind: What it is declared to be; None: nothing is declared.
        preserving: Whether the function is the same by construction.
        block: The block that is damaged, where it is one; what localisation should name.
    """

    name: str
    group: str
    write: Write | None = None
    edit: Any = None
    kind: Any = None
    preserving: bool = False
    block: int | None = None
    tags: tuple[str, ...] = field(default=())

    def generator(self) -> torch.Generator:
        """Random numbers of this case alone."""
        return torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
