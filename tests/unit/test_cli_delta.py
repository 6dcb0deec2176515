"""`weightproof delta make`, `show`, `alpha`, `search` and `steer`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import trained_models
from safetensors.torch import load_file, save_file
from trained_adapters import adapter_folder

from weightproof import Delta
from weightproof.cli import main
from weightproof.deltas import LowRank

DOWN = "model.layers.1.mlp.down_proj.weight"


def run(*arguments):
    with pytest.raises(SystemExit) as left:
        main(["delta", *(str(one) for one in arguments)])
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    trained_models.load("llama").model.save_pretrained(folder)
    return folder


def test_an_adapter_a_contrast_and_a_pair_of_models_are_made_and_shown(base, tmp_path, capsys):
    adapter = adapter_folder("llama")
    assert run("make", adapter, "--base", base, "-o", tmp_path / "one") == 0
    assert f"written to {tmp_path / 'one' / 'delta.safetensors'}" in capsys.readouterr().out
    one = Delta.load(tmp_path / "one")
    assert one.digest == Delta.load(adapter).digest
    one.scaled(-1.0).save(tmp_path / "minus.safetensors")
    assert run("make", adapter, tmp_path / "minus.safetensors", "-o", tmp_path / "two", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["metadata"]["sides"]["cosine"] == pytest.approx(-1.0)
    assert shown["parts"][DOWN]["norm"] == pytest.approx(2 * one.metadata["norms"][DOWN], rel=1e-5)
    assert shown["parts"][DOWN]["rank"] == 16
    tuned = trained_models.load("llama").model
    with torch.no_grad():
        tuned.model.layers[1].mlp.down_proj.weight.add_(0.5)
    tuned.save_pretrained(tmp_path / "tuned")
    assert run("make", base, tmp_path / "tuned", "-o", tmp_path / "three") == 0
    assert Delta.load(tmp_path / "three").names == (DOWN,)
    assert run("show", tmp_path / "three") == 0
    out = capsys.readouterr().out
    assert "dense" in out
    assert "the digests of 1 matrices of it are known" in out


def test_what_makes_no_delta_is_one_sentence(base, tmp_path, capsys):
    assert run("make", base, adapter_folder("llama"), "-o", tmp_path / "x") == 3
    assert "an adapter and a model: give two of one kind" in capsys.readouterr().err
    assert run("make", base, "-o", tmp_path / "x") == 3
    assert "of a whole model give two" in capsys.readouterr().err
    save_file({"w": torch.ones(2, 2)}, tmp_path / "plain.safetensors")
    assert run("show", tmp_path / "plain.safetensors") == 3
    assert "no delta of weightproof" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_adapter_with_nan_is_one_sentence_and_no_file(tmp_path, capsys):
    adapter = tmp_path / "torn"
    shutil.copytree(adapter_folder("llama"), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = next(key for key in tensors if "down_proj.lora_B" in key)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    for command in (["make", adapter, "-o", tmp_path / "x"], ["show", adapter]):
        assert run(*command) == 3
        assert "down_proj.weight holds NaN or inf" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_alpha_is_foretold_by_command(base, capsys):
    assert run("alpha", base, adapter_folder("llama")) == 0
    words = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj.weight binds" in " ".join(words.split())
    assert run("alpha", base, adapter_folder("llama"), "--json") == 0
    table = json.loads(capsys.readouterr().out)
    assert table["binding"] == DOWN
    assert len(table["rows"]) == 9


def test_the_largest_alpha_is_searched_by_command(base, capsys):
    assert run("search", base, adapter_folder("llama"), "--alphas", "2,0.01") == 0
    words = capsys.readouterr().out
    assert "the largest alpha that the guards keep is 0.01 (2 was rejected)" in words
    assert run("search", base, adapter_folder("llama"), "--alphas", "2", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["alpha"], found["smallest_rejected"]) == (None, 2.0)
    for options, words in ((["--alphas", "a"], "numbers with commas"), (["--bracket", "1"], "two numbers")):
        assert run("search", base, adapter_folder("llama"), *options) == 3
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_steered_model_is_written_with_its_certificate_or_not_at_all(base, tmp_path, capsys):
    weight = trained_models.load("llama").model.model.layers[1].mlp.down_proj.weight.detach()
    part = LowRank(torch.ones(weight.shape[0], 1), torch.ones(1, weight.shape[1]) / weight.numel())
    delta = Delta({DOWN: part}).save(tmp_path / "delta.safetensors")
    assert run("steer", base, delta, "--alpha", 0.01, "-o", tmp_path / "out", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"][0]["action"] == "KEEP"
    made = tmp_path / "out" / found["steps"][0]["model"]
    moved = Delta.between(base, made)
    assert moved.names == (DOWN,)
    assert torch.allclose(moved.dense(DOWN), 0.01 * part.dense(), atol=1e-7)
    command = ["verify", str(made / "certificate.json"), "--model", str(made), "--unsigned-ok"]
    further = [*command, "--base", str(base), "--level", "3"]
    other = Delta({DOWN: LowRank(part.left, 2.0 * part.right)}).save(tmp_path / "other.safetensors")
    for asked, code in (
        (command, 0),
        (further, 2),  # the contract is about the delta, which the certificate names and does not hold
        ([*further, "--adapter", str(delta)], 0),
        ([*further, "--adapter", str(other)], 1),
    ):
        with pytest.raises(SystemExit) as left:
            main(asked)
        assert (left.value.code or 0) == code
    assert run("steer", base, delta, "--alpha", 1e5, "-o", tmp_path / "bad", "--json") == 1
    assert not list((tmp_path / "bad").rglob("*.safetensors"))
