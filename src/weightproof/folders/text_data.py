"""Text files as examples: .txt as one stream of tokens, .jsonl as one example a line. Nothing is held but a piece."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from weightproof.errors import InputError

Encode = Callable[[str], Sequence[int]]

# A .txt file is encoded in pieces of about this many characters, cut at line ends.
PIECE_CHARACTERS = 2**16
MAX_LINE_CHARACTERS = 2**24
_KINDS = "'text', 'input_ids' or 'prompt' and 'completion'"


def read_examples(
    path: str | Path, encode: Encode | None, *, name: str = "retain", encoder_decoder: bool = False
) -> Iterator[dict[str, Any]]:
    """Examples of a file, one after another, as dicts with `input_ids` and, where the file gives them, labels.

    A `.jsonl` file has one object a line with `input_ids` (and anything a model takes beside it), `text`, or `prompt`
    and `completion`; `label` or `labels` and `document` are passed on. Of a prompt nothing is scored. Any other
    file is UTF-8 text.

    Args:
        path: The file.
        encode: Text to token ids; may be None where the file holds token ids.
        name: What the data is for, in errors.
        encoder_decoder: Whether a prompt is the encoder's input and its completion the decoder's labels.

    Raises:
        InputError: If the file is missing, empty, binary, not what its name says, or holds text and there is no
            `encode`. At once for what the first bytes show, else at the line at fault.
    """
    path = Path(path)
    place = f"the {name} file {str(path)!r}"
    _check(path, place)
    if path.suffix.lower() == ".jsonl":
        return _from_lines(path, encode, place, encoder_decoder=encoder_decoder)
    if encode is None:
        raise InputError(
            f"{place} holds text and there is no tokenizer: give encode= in Python, save a tokenizer into the model's "
            "folder, or give a .jsonl file of 'input_ids'"
        )
    return _from_text(path, encode, place)


def _check(path: Path, place: str) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(8192)
    except OSError as error:
        raise InputError(f"{place} cannot be read: {error.strerror}") from error
    if not start.strip():
        raise InputError(f"{place} is empty: give a text file with something to score")
    if b"\0" in start:
        raise InputError(f"{place} is binary: give UTF-8 text or .jsonl")


def _pieces(file: IO[str], place: str, size: int) -> Iterator[str]:
    """Lines, or what is at most `size` characters of one."""
    while True:
        try:
            piece = file.readline(size)
        except UnicodeDecodeError as error:
            raise InputError(f"{place} is not UTF-8 text ({error.reason} near byte {error.start})") from error
        if not piece:
            return
        if "\0" in piece:
            raise InputError(f"{place} is binary: give UTF-8 text or .jsonl")
        yield piece


def _from_text(path: Path, encode: Encode, place: str) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        piece = ""
        for line in _pieces(file, place, PIECE_CHARACTERS):
            piece += line
            if len(piece) >= PIECE_CHARACTERS:
                yield {"input_ids": _ids(encode, piece)}
                piece = ""
        if piece.strip():
            yield {"input_ids": _ids(encode, piece)}


def _ids(encode: Encode, text: str) -> list[int]:
    return list(encode(text))


def _from_lines(path: Path, encode: Encode | None, place: str, *, encoder_decoder: bool) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(_pieces(file, place, MAX_LINE_CHARACTERS), start=1):
            where = f"{place}, line {number}"
            if len(line) >= MAX_LINE_CHARACTERS:
                raise InputError(f"{where} is longer than {MAX_LINE_CHARACTERS} characters: give one example a line")
            if line.strip():
                yield _example(_object(line, where), encode, where, encoder_decoder=encoder_decoder)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}): give one object a line") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} is {type(value).__name__}, not an object with {_KINDS}")
    return cast("dict[str, Any]", value)


def _example(fields: dict[str, Any], encode: Encode | None, where: str, *, encoder_decoder: bool) -> dict[str, Any]:
    if "input_ids" in fields:
        return {key: value for key, value in fields.items() if not isinstance(value, str) or key.startswith("doc")}
    kept = {
        key: value for key, value in fields.items() if key in ("label", "labels", "document", "document_id", "doc_id")
    }
    if "prompt" in fields and "completion" in fields:
        prompt, completion = (_encoded(fields[key], encode, f"{where}, {key!r}") for key in ("prompt", "completion"))
        if encoder_decoder:
            return {**kept, "input_ids": prompt, "labels": completion}
        return {**kept, "input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
    if "text" not in fields:
        raise InputError(f"{where} has none of {_KINDS} (found: {', '.join(map(repr, fields)) or 'nothing'})")
    return {**kept, "input_ids": _encoded(fields["text"], encode, f"{where}, 'text'")}


def _encoded(text: object, encode: Encode | None, where: str) -> list[int]:
    if not isinstance(text, str):
        raise InputError(f"{where} is {type(text).__name__}, not text")
    if encode is None:
        raise InputError(f"{where} is text and there is no tokenizer: give encode=, or 'input_ids'")
    return _ids(encode, text)
