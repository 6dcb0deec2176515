"""Sweeps of K-FAC edits: measured, and put back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from trained_models import RECIPES, load, make_windows

from weightproof import InputError, fit_factors
from weightproof.cli import main
from weightproof.edits.kfac_sweep import best_at, clean_nll, recall, sweep

UP = "*layers.1.mlp.up_proj*"


@pytest.fixture(scope="module")
def scene():
    model = load("llama").model
    data = [{"input_ids": one["input_ids"]} for one in make_windows(RECIPES["llama"], 10, seed=80_000)]
    return model, fit_factors(model, data[:8], UP, progress=False), data[8:]


def bits(model) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in model.parameters()]


def test_rows_hold_the_base_every_edit_and_controls_and_the_model_is_put_back(scene):
    model, factors, clean = scene
    before = bits(model)
    seen = []
    metrics = {"clean": clean_nll(clean), "changed": lambda one: float(seen.append(1) or bits(one) != before)}
    rows = sweep(model, factors, [1.0, 0.6], ["original", "modified"], metrics=metrics, include=UP,
                 controls=["random"], progress=False)  # fmt: skip
    assert [(row.edit, row.energy) for row in rows] == [
        ("base", 1.0), ("original", 1.0), ("modified", 1.0), ("original", 0.6), ("modified", 0.6),
        ("random", 1.0), ("random", 0.6),
    ]  # fmt: skip
    assert [row.metrics["changed"] for row in rows] == [0, 0, 0, 1, 1, 0, 1]
    base, one, _, edited, _, _, random = (row.metrics["clean"] for row in rows)
    assert base == one < edited < random
    assert rows[3].predicted > rows[1].predicted == 0.0
    assert bits(model) == before
    assert best_at(rows, "clean", 10.0, "clean").keys() == {"original", "modified", "random"}


def test_the_model_is_put_back_when_a_metric_fails(scene):
    model, factors, _ = scene
    before = bits(model)

    def fails(one) -> float:
        if bits(one) != before:
            raise ValueError("no")
        return 0.0

    with pytest.raises(ValueError, match="no"):
        sweep(model, factors, [0.5], metrics={"a": fails}, include=UP, progress=False)
    assert bits(model) == before


def test_recall_is_the_greedy_continuation_and_nll_the_models_own(scene):
    model, _, clean = scene
    text = clean[0]["input_ids"][:3, :4]
    recited = model.generate(text, max_new_tokens=5, do_sample=False, pad_token_id=39)
    assert recall(recited, 4)(model) == 1.0
    spoilt = recited.clone()
    spoilt[0, -1] = (spoilt[0, -1] + 1) % 32
    assert recall(spoilt, 4)(model) == pytest.approx(2 / 3)
    assert recall(spoilt, 4, suffix=4)(model) == 1.0
    with torch.no_grad():
        expected = sum(float(model(input_ids=one["input_ids"], labels=one["input_ids"]).loss) for one in clean) / 2
    assert clean_nll(clean)(model) == pytest.approx(expected, rel=1e-5)


def test_the_command_prints_a_table_and_writes_numbers_and_a_picture(scene, tmp_path: Path, capsys):
    model, factors, clean = scene
    model.save_pretrained(tmp_path / "model")
    factors.save(tmp_path / "factors.safetensors")
    for name, rows in (("clean", clean[0]["input_ids"]), ("forget", clean[1]["input_ids"][:4])):
        text = "".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    common = ("kfac", "sweep", tmp_path / "model", "--factors", tmp_path / "factors.safetensors", "--include", UP)
    data = ("--clean", tmp_path / "clean.jsonl", "--forget", tmp_path / "forget.jsonl", "--prefix", 8)
    with pytest.raises(SystemExit) as left:
        main([*map(str, (*common, *data, "--energies", "0.9,0.5", "-o", tmp_path / "out"))])
    assert left.value.code in (0, None)
    shown = capsys.readouterr().out
    assert "clean NLL" in shown
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["energy"] for row in rows] == [1.0, 0.9, 0.5]
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    for wrong, message in ((("--energies", "a"), "numbers from 0 to 1"), (("--prefix", 400), "more than 400 tokens"),
                           (("--formulas", "best"), "formula must be")):  # fmt: skip
        with pytest.raises(SystemExit) as left:
            main([*map(str, (*common, *data, *wrong))])
        assert left.value.code == 3
        assert message in capsys.readouterr().err


def test_nothing_to_sweep_is_refused(scene):
    model, factors, clean = scene
    for given in ({"energies": []}, {"metrics": {}}, {"include": "*.q_proj*"}, {"include": (UP, "*.mpl.*")}):
        with pytest.raises(InputError):
            sweep(model, factors, **{"energies": [0.5], "metrics": {"a": clean_nll(clean)}, "include": UP} | given)
    with pytest.raises(InputError, match="no text"):
        clean_nll([])
