# ruff: noqa: E501 - a table of cases, one line each
"""Every shipped recipe, run on a tiny trained model of a user's own folder, and each of its certificates verified."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import torch
from certified_folders import save_model, write_text
from once import once_a_run, shared_folder
from safetensors.torch import load_file, save_file
from trained_models import load

from weightproof import cli
from weightproof.certificate import Certificate
from weightproof.certifying.model_pair import Data
from weightproof.errors import InputError
from weightproof.folders.checkpoints import open_checkpoint
from weightproof.procedure.run import run
from weightproof.procedure.source import shipped_recipes
from weightproof.recipe import load_recipe
from weightproof.snapshots.tensor_store import tensor_digest
from weightproof.types import Outcome
from weightproof.verify import Demands, Status, verify

NAMES = sorted(set(shipped_recipes()) - {"demo"})
EXPECTED = {
    "int8": ["KEEP"],
    "int4-group": ["KEEP"],
    "mixed-precision": ["KEEP"],
    "sequential-edits": ["KEEP", "KEEP", "ROLLBACK"],
    "guarded-finetune": ["KEEP"],
    "prune-and-recover": ["KEEP"],
    "lora-finetune-merge-certify": ["KEEP", "KEEP"],
}


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A model folder with text to keep and text to train on."""
    root = shared_folder(tmp_path_factory) / "shipped-recipes"

    def make():
        save_model(load("llama").model, root / "base")
        write_text(root / "retain.txt", rows=800)
        write_text(root / "train.txt", rows=300, seed=7)
        return root

    return once_a_run(tmp_path_factory, "shipped-recipes", make)


def replaced(root, name):
    """`--set` for the texts, and windows as long as the tiny model's sequences."""
    sets = [f"data.retain={root / 'retain.txt'}"]
    if any("train" in entry for entry in load_recipe(name).content["edits"]):
        sets += [f"data.train={root / 'train.txt'}", "training.window=32", "training.learning_rate=2.0e-4"]
    return sets


@pytest.fixture(scope="module")
def ran(mine, tmp_path_factory):
    """Run a recipe once; give its result."""

    def ended(name):
        recipe = load_recipe(name, sets=replaced(mine, name), fast=True)
        return run(recipe, mine / "out" / name, model=str(mine / "base"))

    return functools.cache(lambda name: once_a_run(tmp_path_factory, f"shipped-recipe-{name}", lambda: ended(name)))


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_ends_as_it_expects_and_its_certificates_hold(ran, mine, name):
    result = ran(name)
    assert result.code == 0, result.steps
    assert [step.action for step in result.steps] == EXPECTED[name]
    parent, before, adapters = None, mine / "base", []
    for step in result.steps:
        adapters += [one for one in [result.out / "training" / step.name / "adapter"] if one.is_dir()]
        if step.model is None:
            continue
        folder = result.out / step.model
        certificate = Certificate.load(folder / "certificate.json")
        data = Data(retain=mine / "retain.txt")
        demands = Demands(unsigned_ok=True, parent=parent, base=before, data=data, adapters=adapters)
        level = 3 if adapters else 2 if parent is None and step.verb == "edit" else 1
        found = verify(folder / "certificate.json", folder, level, demands)
        assert found.status is Status.VALID, found.findings
        assert certificate.digest == step.certificate
        assert certificate.predicate["assurance"] == "loss"
        parent, before = certificate, folder
    assert parent is not None
    whole = verify(result.out / "certificate.json", before, 1, Demands(unsigned_ok=True))
    assert whole.status is Status.VALID, whole.findings


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_leaves_what_it_says(ran, name):
    result = ran(name)
    assert {"certificate.json", "report.html", "events.jsonl", "recipe.yaml", "summary.json"} <= {
        path.name for path in result.out.iterdir()
    }
    summary = json.loads((result.out / "summary.json").read_text())
    assert [row["action"] for row in summary["steps"]] == EXPECTED[name]
    again = load_recipe(result.out / "recipe.yaml")
    assert [step.name for step in again.steps] == [step.name for step in result.steps]
    assert again.policy.digest == load_recipe(name).policy.digest


def test_every_shipped_recipe_is_tested_here():
    assert sorted(EXPECTED) == NAMES


def test_the_quantized_model_holds_the_levels_that_it_says(ran):
    result = ran("int8")
    step = result.steps[0]
    for matrix in open_checkpoint(result.out / step.model).matrices:
        if matrix.family in ("attn", "ffn"):
            assert max(len(row.unique()) for row in matrix.load()) <= 255
    assert result.base_size > step.size > result.base_size / 4
    assert step.kl is not None
    assert 0.9 < step.loss_ratio < 1.05


def test_harms_of_a_sequence_add_up_against_the_first_model(ran, mine):
    result = ran("sequential-edits")
    predicate = Certificate.load(result.out / "certificate.json").predicate
    steps, base = predicate["steps"], predicate["baseline"]
    assert [step["action"] for step in steps] == EXPECTED["sequential-edits"]
    assert steps[0]["record"]["digest_before"] == base["model_digest"]
    assert steps[1]["record"]["digest_before"] == steps[0]["record"]["digest_after"]
    assert result.steps[2].model is None
    assert result.steps[2].loss_ratio > 1.05


def test_the_pruned_model_is_pruned_in_its_files(ran):
    result = ran("prune-and-recover")
    matrices = open_checkpoint(result.out / result.steps[0].model).matrices
    shares = [(matrix.load() == 0).float().mean().item() for matrix in matrices if matrix.family in ("attn", "ffn")]
    assert min(shares) == pytest.approx(0.16, abs=1e-3)
    assert result.steps[0].windows >= 4
    assert "16.0 %" in result.steps[0].notes[0]
    log = (result.out / "training" / "pruned" / "weightproof" / "events.jsonl").read_text()
    names = [row["name"] for row in map(json.loads, log.splitlines()) if row["type"] == "event"]
    assert [name for name in names if name != "train"] == ["prune-14%", "prune-16%"]


def test_the_merged_model_is_the_base_and_its_adapter(ran, mine):
    result = ran("lora-finetune-merge-certify")
    adapter = result.out / "training" / "finetune" / "adapter"
    low, base = load_file(adapter / "adapter_model.safetensors"), load_file(mine / "base" / "model.safetensors")
    merged = load_file(result.out / result.steps[1].model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (low[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 2.0 * b @ a)
    assert not torch.equal(merged[f"{name}.weight"], base[f"{name}.weight"])
    noted = json.loads((adapter / "weightproof_base.json").read_text())["matrices"]
    assert noted[f"{name}.weight"] == tensor_digest(base[f"{name}.weight"])


# ---------------------------------------------------------------- not as expected


def call(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(part) for part in argv])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


@pytest.fixture
def int2(mine, tmp_path):
    """A recipe whose first step harms, and whose second is not reached."""
    path = tmp_path / "int2.yaml"
    path.write_text(
        f"model: {mine / 'base'}\ndata: {{retain: {mine / 'retain.txt'}}}\nout: {tmp_path / 'out'}\n"
        "edits: [{edit: rtn, name: two, bits: 2}, {edit: rtn, name: eight, bits: 8}]\n"
    )
    return path


def test_a_rollback_that_was_not_expected_ends_the_run_with_code_1(int2, tmp_path, capsys):
    code, out, _ = call(capsys, "run", int2)
    assert code == 1
    assert "ROLLBACK, expected KEEP" in out
    assert "not run" in out
    assert "the loss rejects" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["action"] for row in summary["steps"]] == ["ROLLBACK", "not run"]
    assert not (tmp_path / "out" / "models").exists()
    assert Certificate.load(tmp_path / "out" / "certificate.json").predicate["decision"]["action"] == "ROLLBACK"


def test_an_earlier_run_is_replaced_and_foreign_folders_are_left_alone(int2, mine, tmp_path, capsys):
    out = tmp_path / "out"
    argv = (
        "run",
        int2,
        "--set",
        "edits[0].bits=8",
        "--set",
        "edits[1].bits=7",
        "--set",
        "chain=false",
        "--set",
        "data={}",
        "--json",
    )
    code, text, _ = call(capsys, *argv)
    assert code == 0
    assert [row["action"] for row in json.loads(text)["steps"]] == ["KEEP", "KEEP"]
    assert json.loads(text)["steps"][1]["certified"] is None
    (out / "left.txt").write_text("of the first run")
    assert call(capsys, *argv)[0] == 0
    assert not (out / "left.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int2.yaml", "out"]
    code, _, err = call(capsys, "run", int2, "--out", mine)
    assert code == 3
    assert "not empty and no earlier run wrote it" in err
    assert (mine / "base" / "config.json").is_file()


def test_a_failure_on_the_way_leaves_nothing_half_written(int2, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr("weightproof_callbacks.model_saver.shutil.copyfile", full)
    code, _, err = call(capsys, "run", int2, "--set", "edits[0].bits=8")
    assert code == 3
    assert "No space left" in err
    assert [path.name for path in tmp_path.iterdir()] == ["int2.yaml"]


BAD = {
    "a pattern that fits nothing": (["edits[0].include=[model.layers.*.q_prj.*]"], r"include: 'model.layers.\*.q_prj.\*' "),
    "an exclusion that fits nothing": (["edits[0].exclude=[lm_haed]"], "exclude: 'lm_haed' fits no weight matrix"),
    "a family of none": (["edits[0].include=[expert]"], "'expert' chooses no weight matrix of this model"),
    "no such text": (["data.retain=absent.txt"], "data.retain: there is no file"),
    "no such model": (["model=absent/folder/x"], "there is no folder absent/folder/x"),
    "nothing to train on": (["edits=[{train: full, steps: 2}]"], r"edits\[0\] trains and data.train is missing"),
    "a width that 2:4 does not fit": (["edits=[{edit: prune, pattern: '5:7'}]"], "not a multiple of 7"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_the_model_is_one_sentence_and_nothing_is_written(int2, tmp_path, case):
    sets, message = BAD[case]
    with pytest.raises(InputError, match=message):
        run(load_recipe(int2, sets=sets))
    assert [path.name for path in tmp_path.iterdir()] == ["int2.yaml"]


@pytest.mark.slow
def test_the_chain_goes_on_from_the_certificate_in_the_base_folder(ran, mine, tmp_path):
    first = ran("int8")
    folder = tmp_path / "base"
    shutil.copytree(first.out / first.steps[0].model, folder)
    recipe = load_recipe("int8", sets=["edits[0].bits=7"])
    result = run(recipe, tmp_path / "out", model=str(folder))
    parent = Certificate.load(folder / "certificate.json")
    last = result.out / result.steps[0].model
    found = verify(last / "certificate.json", last, 1, Demands(unsigned_ok=True, parent=parent))
    assert found.status is Status.VALID, found.findings
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.001
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    other = run(recipe, tmp_path / "other", model=str(folder))
    assert any("the chain begins anew" in note for note in other.notes)


def test_without_text_outputs_decide_and_the_run_says_so(mine, tmp_path):
    result = run(load_recipe("int8"), tmp_path / "out", model=str(mine / "base"))
    assert result.steps[0].assurance == "outputs-only"
    assert result.steps[0].loss_ratio is None
    assert "--set data.retain=FILE" in result.notes[0]
    verdicts = Certificate.load(result.out / "certificate.json").predicate["steps"][0]["verdicts"]
    assert {one["guard"]: one["outcome"] for one in verdicts}["loss"] == str(Outcome.NOT_MEASURED)


@pytest.mark.slow
def test_a_training_that_is_kept_begins_a_session_of_its_own(mine, tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(
        f"model: {mine / 'base'}\ndata: {{retain: {mine / 'retain.txt'}, train: {mine / 'train.txt'}}}\n"
        "training: {window: 32, batch_size: 4, learning_rate: 1.0e-4}\ncadence: {every: 4}\nchain: false\nedits:\n"
        "  - {train: full, name: tuned, steps: 4, save: false}\n"
        "  - {edit: rtn, name: eight, bits: 8}\n"
        "  - {external: cast, name: bf16, dtype: bfloat16}\n"
    )
    result = run(load_recipe(path), tmp_path / "out")
    assert result.code == 0, result.steps
    first, second = (Certificate.load(result.out / f"certificate{n}.json").predicate for n in ("-1", ""))
    assert [step["name"] for step in first["steps"]] == ["tuned"]
    assert [step["kind"] for step in second["steps"]] == ["quantize", "cast"]
    assert second["baseline"]["model_digest"] == first["steps"][0]["record"]["digest_after"]
    assert second["parent"] is None, "no certificate was made of the trained model"
    assert [step.model for step in result.steps] == [None, "models/eight", "models/bf16"]
    sizes = [step.size for step in result.steps]
    assert sizes[0] == result.base_size > sizes[2] == result.base_size // 2 > sizes[1]
