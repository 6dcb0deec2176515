# ruff: noqa: E501 - tables of cases, one line each
"""Recipes as text: what is read, what is refused and in which words, where they are found."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from weightproof import cli, registry
from weightproof.edits import RTN
from weightproof.errors import InputError
from weightproof.kinds import Quantize
from weightproof.procedure.source import shipped_recipes
from weightproof.recipe import load_recipe

GOOD = """
description: A good one.
model: somewhere
data: {retain: text.txt}
policy: balanced
guards: {loss: {max_windows: 300}}
cadence: {every: 5}
training: {window: 16, learning_rate: 1e-3}
edits:
  - {edit: rtn, bits: 8}
  - {edit: rtn, name: four, bits: 4, granularity: group, group_size: 32, on_violation: revert-worst, expect: any}
  - {external: cast, dtype: bfloat16, kind: "cast:bfloat16", targets: ["*proj*"], expect: ROLLBACK}
  - {train: full, steps: 3, batch_size: 2, schedule: {prune: {final_sparsity: 0.5, begin: 1, end: 3, every: 1}}}
  - {train: lora, name: adapter, steps: 3, r: 4}
  - {edit: lora_merge, adapter: "@adapter"}
out: results
fast: {"edits[0].bits": 6, cadence.every: 2}
"""


@pytest.fixture
def written(tmp_path):
    """Write a recipe and load it."""

    def write(text, **how):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return load_recipe(path, **how)

    return write


def test_a_recipe_becomes_steps_with_checked_parameters(written, tmp_path):
    recipe = written(GOOD)
    assert [step.verb for step in recipe.steps] == ["edit", "edit", "external", "train", "train", "edit"]
    assert [step.name for step in recipe.steps] == ["1-rtn", "four", "3-cast", "4-full", "adapter", "6-lora_merge"]
    assert recipe.steps[0].make() == RTN(8)
    assert recipe.steps[1].make() == RTN(4, "group", 32)
    assert recipe.steps[1].on_violation == "revert-worst"
    assert recipe.steps[2].targets == ("*proj*",)
    assert recipe.steps[2].expect == "ROLLBACK"
    assert recipe.steps[3].params["learning_rate"] == 1e-3  # YAML takes 1e-3 for text
    assert recipe.steps[3].params["schedule"].sparsity_at(3) == 0.5
    assert recipe.steps[4].params["window"] == 16
    assert recipe.cadence.every == 5
    assert recipe.policy.name == "balanced, overridden"
    assert recipe.path(recipe.data.retain) == tmp_path / "text.txt"
    assert recipe.name == "mine"


def test_values_are_replaced_by_fast_then_by_set(written):
    recipe = written(GOOD, fast=True, sets=["edits[1].bits=3", "data.target=more.txt", "trackers=[jsonl]"])
    assert recipe.steps[0].make() == RTN(6)
    assert recipe.steps[1].make().bits == 3
    assert recipe.path(recipe.data.target) == Path("more.txt").absolute(), "named from here, not from the recipe"
    assert recipe.cadence.every == 2
    assert recipe.content["edits"][0]["bits"] == 6


BAD = {
    "unknown key": ("edits: [{edit: rtn, bits: 8}]\ndevic: cpu", "devic is unknown; did you mean 'device'"),
    "unknown parameter": ("edits: [{edit: rtn, bits: 8}, {edit: rtn, bit: 4}]", r"edits\[1\]\.bit is unknown; did you mean 'bits'"),
    "unknown key of a step": ("edits: [{edit: rtn, bits: 8, expected: KEEP}]", r"edits\[0\]\.expected .* did you mean 'expect'"),
    "missing parameter": ("edits: [{edit: rtn}]", r"edits\[0\]\.bits is missing"),
    "wrong type": ("edits: [{edit: rtn, bits: four}]", r"edits\[0\]\.bits must be a whole number, not 'four'"),
    "a flag is no number": ("edits: [{edit: rtn, bits: true}]", r"edits\[0\]\.bits must be a whole number"),
    "bits=0": ("edits: [{edit: rtn, bits: 0}]", r"edits\[0\]: bits must be a whole number from 2 to 8, not 0"),
    "sparsity": ("edits: [{edit: prune, sparsity: 1.5}]", r"edits\[0\]: sparsity must be a share .* not 1\.5"),
    "no 2:4": ("edits: [{edit: prune, pattern: '4:2'}]", r"edits\[0\]: pattern '4:2'"),
    "unknown edit": ("edits: [{edit: rtm, bits: 8}]", r"edits\[0\]\.edit is 'rtm'.* did you mean 'rtn'"),
    "unknown tracker": ("trackers: [jsonk]\nedits: [{edit: rtn, bits: 8}]", r"trackers\[0\] is 'jsonk'.* did you mean 'jsonl'"),
    "unknown guard": ("guards: {los: {}}\nedits: [{edit: rtn, bits: 8}]", r"guards\.los is unknown; did you mean 'loss'"),
    "unknown limit": ("guards: {loss: {max_los: 1}}\nedits: [{edit: rtn, bits: 8}]", "guards: .*no limit 'max_los'"),
    "required guard": ("required: [los]\nedits: [{edit: rtn, bits: 8}]", r"required\[0\] is 'los'.* 'loss'"),
    "unknown policy": ("policy: balance\nedits: [{edit: rtn, bits: 8}]", "policy: unknown policy 'balance'; did you mean 'balanced'"),
    "no steps": ("model: demo", "edits must be a list with at least one entry"),
    "a misspelt verb": ("edits: [{edti: rtn}]", r"has none of them: edti; did you mean 'edit' by 'edti'\?"),
    "no adapter folder": ("edits: [{edit: lora_merge, adapter: absent}]", "there is no adapter folder"),
    "no verb": ("edits: [{bits: 8}]", r"edits\[0\] must have one of edit:.*none of them: bits"),
    "two verbs": ("edits: [{edit: rtn, train: full, bits: 8}]", r"has edit and train"),
    "no mapping": ("edits: [rtn]", r"edits\[0\] must be a mapping"),
    "expect": ("edits: [{edit: rtn, bits: 8, expect: KEPT}]", r"edits\[0\]\.expect is 'KEPT'.* 'KEEP'"),
    "same name": ("edits: [{edit: rtn, bits: 8, name: a}, {edit: rtn, bits: 4, name: a}]", r"edits\[1\]\.name is 'a', as in edits\[0\]"),
    "name of a folder": ("edits: [{edit: rtn, bits: 8, name: ../a}]", r"edits\[0\]\.name is '../a'"),
    "reference": ("edits: [{train: lora, name: tuned, steps: 2}, {edit: lora_merge, adapter: '@tune'}]", r"refers to the step 'tune'.* did you mean 'tuned'"),
    "training without": ("training: {steps: 3}\nedits: [{edit: rtn, bits: 8}]", "training is given, and no step trains"),
    "training key": ("training: {stepz: 3}\nedits: [{train: full, steps: 2}]", r"training\.stepz is unknown; did you mean 'steps'"),
    "schedule": ("edits: [{train: full, steps: 9, schedule: {prun: {}}}]", r"edits\[0\]\.schedule is 'prun'.* 'prune'"),
    "schedule's key": ("edits: [{train: full, steps: 9, schedule: {prune: {finl_sparsity: 1}}}]", r"schedule\.prune\.finl_sparsity is unknown"),
    "schedule's end": ("edits: [{train: full, steps: 2, schedule: {prune: {final_sparsity: 0.5, begin: 1, end: 3, every: 1}}}]", "ends at step 3 and the training at step 2"),
    "cadence": ("cadence: {evry: 3}\nedits: [{edit: rtn, bits: 8}]", r"cadence\.evry is unknown; did you mean 'every'"),
    "cadence's word": ("cadence: {on_violation: rolback}\nedits: [{edit: rtn, bits: 8}]", "cadence.on_violation is 'rolback'.*'rollback'"),
    "kind": ("edits: [{external: cast, dtype: bfloat16, kind: int99}]", r"edits\[0\]\.kind int99"),
    "cast to integers": ("edits: [{external: cast, dtype: int8}]", r"edits\[0\]: Cast needs a floating point dtype"),
    "not installed": ("edits: [{external: torchao, bits: 8}]", r"edits\[0\]: torchao is not installed: pip install 'weightproof\[quantization\]'"),
    "twice": ("model: a\nmodel: b\nedits: [{edit: rtn, bits: 8}]", "key 'model' is written twice"),
    "code": ("model: !!python/object/apply:os.system [id]\nedits: []", "could not determine a constructor"),
    "no yaml": ("edits: [", "is not valid YAML"),
    "a list": ("- edits", "must be a mapping of names to values"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recipe_is_one_sentence_with_its_place(written, monkeypatch, case):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "torchao" else find(name))
    text, message = BAD[case]
    with pytest.raises(InputError, match=message) as error:
        written(text)
    assert "mine.yaml" in str(error.value)
    assert "\n" not in str(error.value)


BAD_SETS = {
    "edits[0]]=4": "is no place in a recipe",
    "edits[3].bits=4": "there is no entry 3; the recipe has 1",
    "edits[0].bits": "write it as key=value",
    "edits.=4": "ends with a point",
    "model.name=4": "no mapping that could hold 'name'",
    "edits[0].bits=[": "is not valid YAML",
    "edits[0].bitz=4": r"edits\[0\]\.bitz is unknown; did you mean 'bits'",
}


@pytest.mark.parametrize("text", BAD_SETS)
def test_a_bad_replacement_is_one_sentence(written, text):
    with pytest.raises(InputError, match=BAD_SETS[text]):
        written("model: demo\nedits: [{edit: rtn, bits: 8}]", sets=[text])


def test_a_name_that_nobody_ships_suggests_the_nearest():
    with pytest.raises(InputError, match="no recipe is called 'int9'; did you mean 'int8'"):
        load_recipe("int9")
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe("absent.yaml")


def test_the_demo_is_run_by_a_verb_of_its_own():
    with pytest.raises(InputError, match="weightproof demo"):
        load_recipe("demo")


def others():
    """What another package's entry point would give."""
    folder = Path(__file__).parent / "other_package"
    return {path.stem: path for path in folder.glob("*.yaml")}


def test_recipes_of_another_package_are_found_and_a_clash_is_named_apart(monkeypatch):
    ours = registry.plugins("weightproof.recipes")
    other = EntryPoint("acme", "tests.recipes.test_recipe_files:others", "weightproof.recipes")
    monkeypatch.setattr("weightproof.procedure.source.plugins", lambda group: {**ours, "acme": other})
    monkeypatch.setattr(
        "weightproof.procedure.source.load_plugin", lambda group, name: {**ours, "acme": other}[name].load()
    )
    found = shipped_recipes()
    assert {"int8", "acme/int8", "acme-only"} <= found.keys()
    assert load_recipe("acme-only").steps[0].make() == RTN(5)
    assert load_recipe("acme/int8").steps[0].make().kind == Quantize(8, "tensor")


def call(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(part) for part in argv])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_recipes_are_listed_shown_and_copied(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "recipes", "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["demo"]["run"] == "weightproof demo"
    assert rows["mixed-precision"]["steps"] == "plan"
    assert all(row["description"] and "cannot be used" not in row["description"] for row in rows.values())
    code, text, _ = call(capsys, "recipes", "show", "int8")
    assert text.startswith("# Eight bits")
    assert call(capsys, "recipes", "copy", "int8")[:2] == (0, "int8.yaml\n")
    assert Path("int8.yaml").read_text() == text
    assert load_recipe("int8.yaml").steps == load_recipe("int8").steps
    code, _, err = call(capsys, "recipes", "copy", "int8")
    assert code == 3
    assert "exists already" in err
    code, _, err = call(capsys, "recipes", "copy", "int8", "int8.txt")
    assert code == 3
    assert "not called .yaml" in err
