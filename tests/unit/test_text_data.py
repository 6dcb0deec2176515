from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path

import pytest

from weightproof.errors import InputError
from weightproof.folders.text_data import PIECE_CHARACTERS, read_examples


def encode(text: str) -> list[int]:
    return list(text.encode())


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_text_file_is_one_stream_of_tokens_in_pieces(tmp_path):
    lines = [f"line {i} of a text\n" for i in range(9000)]
    examples = list(read_examples(written(tmp_path, "a.txt", "".join(lines)), encode))
    assert len(examples) == -(-sum(map(len, lines)) // PIECE_CHARACTERS)
    joined = list(itertools.chain.from_iterable(example["input_ids"] for example in examples))
    assert bytes(joined).decode() == "".join(lines)
    assert all(bytes(example["input_ids"]).endswith(b"\n") for example in examples)


def test_one_endless_line_is_read_in_pieces(tmp_path):
    path = written(tmp_path, "a.txt", "x" * (3 * PIECE_CHARACTERS + 5))
    assert [len(example["input_ids"]) for example in read_examples(path, encode)] == [PIECE_CHARACTERS] * 3 + [5]


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("w") as file:
        for _ in range(200):
            file.write("some words of a text that goes on\n" * 1000)
    tracemalloc.start()
    count = sum(1 for _ in read_examples(path, encode))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 90
    assert peak < path.stat().st_size / 2


def test_json_lines_hold_text_ids_pairs_and_labels(tmp_path):
    rows = [
        {"text": "ab", "label": 1, "document": "one", "comment": "not used"},
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "source": "words"},
        {"prompt": "ab", "completion": "cd"},
    ]
    path = written(tmp_path, "a.jsonl", "\n\n".join(map(json.dumps, rows)))
    assert list(read_examples(path, encode)) == [
        {"label": 1, "document": "one", "input_ids": [97, 98]},
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]},
        {"input_ids": [97, 98, 99, 100], "labels": [-100, -100, 99, 100]},
    ]
    pair = list(read_examples(path, encode, encoder_decoder=True))[2]
    assert pair == {"input_ids": [97, 98], "labels": [99, 100]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "the retain file '.*a.txt' is empty"),
        ("a.txt", " \n\n ", "is empty"),
        ("a.txt", b"\x89PNG\r\n\x00\x00\x01", "is binary"),
        ("a.txt", b"text" * 5000 + b"\x00 more", "is binary"),
        ("a.txt", b"text \xff\xfe more", "is not UTF-8 text"),
        ("a.jsonl", b"\x80\x04\x95", "is not UTF-8 text"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", "[1, 2]", "line 1 is list, not an object with 'text', 'input_ids'"),
        ("a.jsonl", '{"words": "a"}', "line 1 has none of 'text', .* \\(found: 'words'\\)"),
        ("a.jsonl", '{"text": 3}', "line 1, 'text' is int, not text"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_what_is_no_text_is_refused_in_one_sentence(tmp_path, name, content, message):
    path = written(tmp_path, name, content)
    with pytest.raises(InputError, match=message) as found:
        list(read_examples(path, encode))
    assert "\n" not in str(found.value)


def test_a_line_without_end_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        file.write('{"text": "')
        for _ in range(17):
            file.write("x" * 2**20)
    with pytest.raises(InputError, match="line 1 is longer than"):
        list(read_examples(path, encode))


def test_text_without_a_tokenizer_is_refused_and_ids_are_not(tmp_path):
    with pytest.raises(InputError, match="there is no tokenizer: give encode="):
        read_examples(written(tmp_path, "a.txt", "text"), None)
    with pytest.raises(InputError, match="line 1, 'text' is text and there is no tokenizer"):
        list(read_examples(written(tmp_path, "a.jsonl", '{"text": "a"}'), None))
    ids = written(tmp_path, "b.jsonl", '{"input_ids": [4]}')
    assert list(read_examples(ids, None)) == [{"input_ids": [4]}]


def test_what_is_not_there_or_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_examples(tmp_path / "none.txt", encode, name="target")
    with pytest.raises(InputError, match="cannot be read"):
        read_examples(tmp_path, encode)
