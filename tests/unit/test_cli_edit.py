"""`weightproof edit kfac`, and factors given to `certify` and to recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trained_models import VOCAB_SIZE, load, untrained
from transformers import LlamaConfig, LlamaForCausalLM

from weightproof import Certificate, fit_factors
from weightproof.cli import main
from weightproof.curvature import Factors

UP = "model.layers.1.mlp.up_proj.weight"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(one) for one in arguments])
    return int(left.value.code or 0)


def windows(count: int = 40, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (2, 24), generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    """A model folder and factors of its MLPs."""
    folder = tmp_path_factory.mktemp("edit")
    model = load("llama").model
    model.save_pretrained(folder / "base")
    data = [{"input_ids": one} for one in windows()]
    fit_factors(model, data, "*.mlp.*", progress=False).save(folder / "factors.safetensors")
    rows = torch.cat(windows(30, seed=9)).tolist()
    (folder / "retain.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_edit_that_is_kept_leaves_a_model_with_certificate_policy_and_prediction(scene, tmp_path, capsys):
    before, out = everything(scene), tmp_path / "edited"
    common = "edit", "kfac", scene / "base", "--factors", scene / "factors.safetensors"
    assert run(*common, "--energy", 0.99999, "--policy", "aggressive", "--out", out) == 0
    assert "KEEP" in capsys.readouterr().out
    assert everything(scene) == before
    edited, base = (load_file(one / "model.safetensors") for one in (out / "models" / "kfac", scene / "base"))
    changed = {name for name, tensor in edited.items() if not torch.equal(tensor, base[name])}
    assert changed == {f"model.layers.{i}.mlp.{one}_proj.weight" for i in range(3) for one in ("gate", "up")}
    for path in (out / "certificate.json", out / "models" / "kfac" / "certificate.json"):
        predicate = Certificate.load(path).predicate
        assert predicate["policy"]["name"] == "aggressive"
        assert predicate["policy"]["resolved"]["limits"]
        guards = {one["guard"]: one for one in predicate["steps"][-1]["verdicts"]}
        assert "nats per token predicted" in guards["curvature"]["reason"]
    verify = "verify", out / "models" / "kfac" / "certificate.json", "--model", out / "models" / "kfac"
    assert run(*verify, "--base", scene / "base", "--level", 2, "--unsigned-ok") == 0
    assert "it is advice" in capsys.readouterr().out
    # The recipe that it leaves does the same again.
    assert run("run", out / "recipe.yaml", "--out", tmp_path / "again") == 0
    again = load_file(tmp_path / "again" / "models" / "kfac" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in edited.items())


def test_one_that_is_rolled_back_writes_its_evidence_and_no_model(scene, tmp_path, capsys):
    common = "edit", "kfac", scene / "base", "--factors", scene / "factors.safetensors", "--energy", 0.1, "--json"
    out = tmp_path / "edited"
    assert run(*common, "--retain", scene / "retain.jsonl", "--include", "*.mlp.*", "--out", out) == 1
    printed = json.loads(capsys.readouterr().out)
    assert (printed["exit_code"], printed["steps"][0]["action"], printed["model"]) == (1, "ROLLBACK", None)
    assert not (out / "models").exists()
    assert (out / "report.html").is_file()
    step = Certificate.load(out / "certificate.json").predicate["steps"][-1]
    assert (step["action"], step["applied"]) == ("ROLLBACK", "restored")


def test_too_little_evidence_is_undecided(scene, tmp_path):
    common = "edit", "kfac", scene / "base", "--factors", scene / "factors.safetensors", "--energy", 0.99999
    assert run(*common, "--policy", "conservative", "--out", tmp_path / "edited") == 2


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(scene, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = "edit", "kfac", scene / "base", "--factors", scene / "factors.safetensors", "--energy", 0.9, "--dry-run"
    assert run(*common) == 0
    said = capsys.readouterr().out
    assert UP in said
    assert "6 matrices would be edited" in said
    assert run(*common, "--include", "*.layers.1.mlp.up_proj", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == UP
    assert row["kept_mass"] >= 0.9
    assert 0 < row["kept_pairs"] < 1
    assert row["predicted_loss_change"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def broken(scene, tmp_path_factory) -> dict[str, tuple[object, ...]]:
    """Arguments that cannot be used, by name."""
    folder = tmp_path_factory.mktemp("broken")
    factors = Factors.load(scene / "factors.safetensors")

    def with_(name: str, **changes: object) -> Path:
        one = factors[UP]
        fields = {key: getattr(one, key) for key in ("activation_sum", "gradient_sum", "tokens", "weight_digest")}
        bad = type(one)(UP, **{**fields, **changes})
        return Factors({**factors.by_name, UP: bad}, factors.source, {}).save(folder / name)

    model = load("llama").model
    model.get_parameter(UP).data.mul_(1.5)
    model.save_pretrained(folder / "other-weights")
    untrained("gpt2").save_pretrained(folder / "other-model")
    nan, skewed = factors[UP].gradient_sum.clone(), factors[UP].activation_sum.clone()
    nan[0, 0] = torch.nan
    skewed[0, 1] += skewed.abs().max()
    return {
        "other weights": (folder / "other-weights", scene / "factors.safetensors"),
        "another model": (folder / "other-model", scene / "factors.safetensors"),
        "not finite": (scene / "base", with_("nan.safetensors", gradient_sum=nan)),
        "not symmetric": (scene / "base", with_("skewed.safetensors", activation_sum=skewed)),
        "few tokens": (scene / "base", with_("few.safetensors", tokens=3)),
        "no file": (scene / "base", folder / "nowhere.safetensors"),
        "good": (scene / "base", scene / "factors.safetensors"),
    }


@pytest.mark.parametrize(
    ("case", "options", "words"),
    [
        ("other weights", (), f"belong to other weights: {UP} has the hash "),
        ("another model", (), "belong to another model: it has no matrix model.layers.0.mlp.gate_proj.weight"),
        ("not finite", (), f"G of {UP} holds NaN or inf"),
        ("not symmetric", (), f"A of {UP} is not symmetric"),
        ("few tokens", (), f"{UP} was fitted on 3 tokens and has 192 dimensions"),
        ("no file", (), "no factors at"),
        ("good", ("--energy", 1.5), "energy is the share of the curvature to keep, a number from 0 to 1"),
        ("good", ("--energy", "nan"), "energy is the share of the curvature to keep, a number from 0 to 1"),
        ("good", ("--energy", -0.1), "energy is the share of the curvature to keep, a number from 0 to 1"),
        ("good", ("--formula", "newest"), "formula must be one of original, modified, ekfac"),
        ("good", ("--formula", "ekfac"), "corrected"),
        ("good", ("--include", "*.up_porj.*"), "'*.up_porj.*' chooses no weight matrix of this model"),
        ("good", ("--include", "*.q_proj"), "'*.q_proj' chooses nothing with factors: model.layers.0.self_attn.q_proj"),
        ("good", ("--policy", "lenient"), "unknown policy 'lenient'"),
        ("good", ("--retain", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(broken, tmp_path, capsys, case, options, words):
    model, factors = broken[case]
    judged = options[:1] in (("--policy",), ("--retain",))  # a dry run judges nothing
    for last in (("--out", tmp_path / "edited"), *([] if judged else [("--dry-run",)])):
        assert run("edit", "kfac", model, "--factors", factors, *options, *last) == 3
        said = capsys.readouterr()
        (sentence,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert words in sentence
        assert list(tmp_path.iterdir()) == []


def test_a_head_over_a_huge_vocabulary_is_refused_with_its_size(tmp_path, capsys):
    config = LlamaConfig(
        vocab_size=70_000, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    data = [{"input_ids": one} for one in windows(4)]
    fit_factors(model, data, "*.mlp.*", progress=False).save(tmp_path / "factors.safetensors")
    common = "edit", "kfac", tmp_path / "base", "--factors", tmp_path / "factors.safetensors"
    for glob in ("lm_head", "lm_head.weight", "head"):
        assert run(*common, "--include", glob, "--out", tmp_path / "edited") == 3
        said = capsys.readouterr().err
        assert "lm_head.weight (70000 x 8): a factor of 70000 x 70000 would take 18.3 GiB" in said
    assert not (tmp_path / "edited").exists()


def test_a_place_that_holds_something_else_is_refused_before_anything_is_read(scene, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    common = "edit", "kfac", "nowhere", "--factors", "nowhere"
    assert run(*common, "--out", tmp_path) == 3
    assert "not empty" in capsys.readouterr().err
    assert run(*common) == 3
    assert "name a folder for the results with --out" in capsys.readouterr().err


def test_a_failure_on_the_way_leaves_no_folder_and_the_one_before(scene, tmp_path, monkeypatch):
    common = "edit", "kfac", scene / "base", "--factors", scene / "factors.safetensors", "--policy", "aggressive"
    out = tmp_path / "edited"
    out.mkdir()
    for name in ("summary.json", "recipe.yaml", "certificate.json"):  # as an earlier run leaves them
        (out / name).write_text(name)
    kept = everything(out)

    def fails(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr("weightproof_callbacks.model_saver.shutil.copyfile", fails)
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fails)
    assert run(*common, "--energy", 0.99999, "--out", out) == 3
    assert everything(out) == kept
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]


def test_certify_foretells_and_blames_and_refuses_factors_of_other_weights(scene, tmp_path, capsys):
    subject = tmp_path / "subject"
    load("llama").model.save_pretrained(subject)
    tensors = load_file(subject / "model.safetensors")
    tensors[UP] = -tensors[UP]
    save_file(tensors, subject / "model.safetensors", metadata={"format": "pt"})
    factors = "--factors", scene / "factors.safetensors"
    out = tmp_path / "certified"
    assert run("certify", scene / "base", subject, "--weights-only", *factors, "-o", out, "--json") == 2
    verdict = next(one for one in json.loads(capsys.readouterr().out)["verdicts"] if one["guard"] == "curvature")
    assert verdict["outcome"] == "WARN"
    assert f"100% of it by {UP}" in verdict["reason"]
    assert run("certify", scene / "base", subject, "--weights-only", "-o", tmp_path / "plain", "--json") == 2
    assert "curvature" not in [one["guard"] for one in json.loads(capsys.readouterr().out)["verdicts"]]
    assert run("certify", subject, scene / "base", "--weights-only", *factors, "-o", tmp_path / "no") == 3
    assert f"belong to other weights: {UP}" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_recipe_takes_factors_beside_it(scene, tmp_path, capsys):
    recipe = scene / "two.yaml"
    recipe.write_text(
        "model: base\nfactors: factors.safetensors\npolicy: aggressive\n"
        "edits:\n  - {edit: rtn, bits: 8, save: false}\n  - {edit: rtn, bits: 7, save: false}\n"
    )
    assert run("run", recipe, "--out", tmp_path / "out") == 0
    steps = Certificate.load(tmp_path / "out" / "certificate.json").predicate["steps"]
    outcomes = [one["outcome"] for step in steps for one in step["verdicts"] if one["guard"] == "curvature"]
    assert len(outcomes) == 2
    recipe.write_text("model: base\nfactors: nowhere.safetensors\nedits: [{edit: rtn, bits: 8}]\n")
    assert run("run", recipe, "--out", tmp_path / "none") == 3
    assert "no factors at" in capsys.readouterr().err
