"""Draws kept as they are made: a calibration that is interrupted goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightproof.calibration.draws import Draw
from weightproof.errors import InputError


class Journal:
    """A file with one line for what is drawn from, then one a draw.

    Args:
        path: The file; made with the first draw.
        header: What the draws depend on (model, data, seed), ready for JSON.

    Attributes:
        draws: Those made so far, in order.

    Raises:
        InputError: If the file holds draws of something else, or cannot be read.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self._header = json.loads(json.dumps(header))
        self.draws = self._known()

    def _known(self) -> list[Draw]:
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a line that was being written when it ended is made again
        if len(whole) < len(text):
            os.truncate(self.path, len(whole.encode()))
        lines = whole.splitlines()
        try:
            rows = [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise InputError(f"{self.path} is no file of draws ({error}): remove it, or choose another -o") from error
        if rows and rows[0] != self._header:
            other = next((key for key in self._header if rows[0].get(key) != self._header[key]), "content")
            raise InputError(
                f"{self.path} holds draws of another calibration (its {other!r} differs): finish that one, remove the "
                "file, or choose another -o"
            )
        return [Draw.from_json(row) for row in rows[1:]]

    def add(self, draw: Draw) -> None:
        """Keep a draw; it is on disk when this returns."""
        is_new = not self.path.exists() or not self.path.stat().st_size
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            if is_new:
                file.write(json.dumps(self._header) + "\n")
            file.write(json.dumps(draw.to_json(), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.draws.append(draw)
