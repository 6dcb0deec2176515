"""`weightproof factors`, and the batches that it reads from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from trained_models import VOCAB_SIZE, untrained

from weightproof import InputError
from weightproof.cli import main
from weightproof.curvature import Factors, fit_factors
from weightproof.curvature.text_batches import TextBatches

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    untrained("llama").save_pretrained(tmp_path / "model")
    return tmp_path


def lines(path: Path, count: int, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in [17, 30, 5] * count]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(one) for one in arguments])
    return int(left.value.code or 0)


def test_a_text_is_one_stream_of_windows_and_examples_are_padded(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("abcdefghijk" * 3)
    batches = TextBatches(text, lambda words: [ord(letter) for letter in words], length=8, batch_size=3)
    first = list(batches)
    assert [tuple(batch["input_ids"].shape) for batch in first] == [(3, 8), (1, 8)]
    stream = torch.cat([batch["input_ids"].flatten() for batch in first])
    assert "".join(map(chr, stream)) == ("abcdefghijk" * 3)[:32]  # one token more is no window
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, batches, strict=True))
    assert sum(one["input_ids"].numel() for one in TextBatches(text, batches.encode, 8, 1, max_tokens=9)) == 16
    examples = tmp_path / "b.jsonl"
    examples.write_text('{"prompt": "ab", "completion": "cde"}\n{"text": "xyzuvw"}\n')
    (batch,) = TextBatches(examples, batches.encode, 8, 2)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert batch["labels"][0].tolist() == [-100, -100, *map(ord, "cde"), -100]
    assert batch["labels"][1].tolist() == list(map(ord, "xyzuvw"))
    with pytest.raises(InputError, match="length must be at least 2"):
        TextBatches(text, None, length=1)


def test_fit_merge_and_show_by_command(folder, capsys):
    model, out = folder / "model", folder / "parts"
    fit = (
        "factors",
        "fit",
        model,
        "--include",
        "*.up_proj*",
        "--length",
        32,
        "--batch-size",
        2,
        "--labels",
        "empirical",
    )
    first, second = lines(folder / "1.jsonl", 12), lines(folder / "2.jsonl", 12, seed=1)
    assert run(*fit, "--data", first, "-o", out / "1.safetensors", "--ekfac") == 0
    assert "3 matrices in 1 pass over the data" in capsys.readouterr().out
    assert Factors.load(out / "1.safetensors")[UP].corrected_sum is not None
    for number, data in enumerate((first, second), start=1):
        assert run(*fit, "--data", data, "-o", out / f"{number}.safetensors") == 0
    assert run("factors", "merge", out / "1.safetensors", out / "2.safetensors", "-o", out) == 0
    merged = Factors.load(out)
    both = [*TextBatches(first, None, 32, 2), *TextBatches(second, None, 32, 2)]
    expected = fit_factors(untrained("llama"), both, "*.up_proj*", "empirical", progress=False)
    assert torch.allclose(merged[UP].gradient_sum, expected[UP].gradient_sum, rtol=1e-4, atol=1e-7)
    capsys.readouterr()
    assert run("factors", "show", out, "--json", "--model", model) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["factors"][UP]["tokens"] == merged[UP].tokens
    assert shown["digest"] == merged.digest


def test_a_dry_run_reads_no_data_and_writes_nothing(folder, capsys):
    out = folder / "new" / "f.safetensors"
    assert run("factors", "fit", folder / "model", "--data", folder / "none", "-o", out, "--dry-run") == 0
    assert "operations a token" in capsys.readouterr().out
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "{model}", "--data", "{folder}/none.txt", "-o", "{folder}/f.safetensors"), "cannot be read"),
        (("fit", "{model}", "--data", "{data}", "-o", "{data}"), "is a file"),
        (("fit", "{model}", "--data", "{data}", "-o", "{data}/f/g.safetensors"), "is a file"),
        (
            ("fit", "{model}", "--data", "{data}", "-o", "{folder}/f", "--include", "*.uq_proj"),
            "matches no weight matrix",
        ),
        (("fit", "{model}", "--data", "{data}", "-o", "{folder}/f", "--labels", "gold"), "labels must be"),
        (("fit", "{model}", "--data", "{data}", "-o", "{folder}/f"), "no full rank"),
        (("merge", "{data}", "-o", "{folder}/f"), "two or more"),
        (("show", "{folder}/none.safetensors"), "fit them first"),
    ],
)
def test_bad_input_is_one_sentence(folder, capsys, arguments, message):
    data = lines(folder / "few.jsonl", 1)
    places = {"model": folder / "model", "folder": folder, "data": data}
    assert run("factors", *(one.format(**places) for one in arguments)) == 3
    said = capsys.readouterr().err
    assert message in said
    assert not (folder / "f").exists()
    assert "Traceback" not in said
