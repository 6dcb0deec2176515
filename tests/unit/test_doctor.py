"""`weightproof doctor` and `plugins`: stable codes, each with what to do; nothing is loaded, nothing is changed."""

from __future__ import annotations

import json
import stat
from importlib.metadata import EntryPoint

import pytest
from architectures import build
from certified_folders import copied, save_tokenizer, write_text
from safetensors.torch import load_file, save_file

from weightproof import cli, registry
from weightproof.certifying import preflight_environment
from weightproof.certifying.preflight import CODES, Level, Plan, context_length, examine
from weightproof.collective import Processes
from weightproof.folders.loading import load_model
from weightproof.guards.loss import LossLimits
from weightproof.losses import LossData, LossProbe
from weightproof.signing import generate_key, write_key_pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("doctor")
    build("llama", vocab_size=40).save_pretrained(root / "base")
    save_tokenizer(root / "base")
    copied(root / "base", root / "subject")
    write_text(root / "retain.txt")
    return root


def _levels(plan):
    """Code -> worst level, and code -> every sentence."""
    found = examine(plan)
    order = list(Level)
    levels = {
        code: max((f.level for f in found if f.code == code), key=order.index) for code in {f.code for f in found}
    }
    return levels, {code: " ".join(f"{f.what} {f.do}" for f in found if f.code == code) for code in levels}


def _plan(folder, **changes):
    given = {"base": folder / "base", "subject": folder / "subject", "retain": folder / "retain.txt"}
    return Plan(**{**given, "output": folder / "out", **changes})


def test_a_sound_plan_has_no_error_and_every_finding_a_known_code(folder):
    found = examine(_plan(folder))
    assert [one.code for one in found if one.level is Level.ERROR] == []
    assert {one.code for one in found} <= set(CODES)
    assert [one.code for one in found] == sorted(one.code for one in found)
    assert all(one.do for one in found if one.level is not Level.OK)
    assert not (folder / "out").exists()


def test_without_a_plan_the_environment_is_examined():
    assert {one.code for one in examine(Plan())} == {"WP001", "WP002", "WP003", "WP005", "WP006", "WP301", "WP302"}


def _config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _half(folder):
    _config(folder, dtype="float16")
    return "WP103", Level.WARN, "rounded weights"


def _no_class(folder):
    _config(folder, architectures=None)
    return "WP104", Level.WARN, "names no architecture"


def _own_code(folder):
    _config(folder, auto_map={"AutoModel": "code.Mine"})
    return "WP104", Level.WARN, "never run"


def _quantised(folder):
    _config(folder, quantization_config={"quant_method": "gptq"})
    return "WP104", Level.ERROR, "dequantise"


def _other(folder):
    _config(folder, model_type="gpt2")
    return "WP105", Level.ERROR, "two versions of one model"


def _missing(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    return "WP105", Level.ERROR, "model.norm.weight"


def _incomplete(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "WP101", Level.ERROR, "model-00002-of-00002.safetensors, which is not in the folder"


def _packed(folder):
    tensors = {name: one.to(dtype=one.dtype) for name, one in load_file(folder / "model.safetensors").items()}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].char()
    save_file(tensors, folder / "model.safetensors")
    return "WP102", Level.WARN, "weightproof inspect"


def _other_tokenizer(folder):
    save_tokenizer(folder, shift=1)
    return "WP202", Level.ERROR, "put the base's tokenizer files"


def _torn_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    return "WP201", Level.ERROR, "cannot be loaded"


SPOILED = [
    _half, _no_class, _own_code, _quantised, _other, _missing, _incomplete, _packed, _other_tokenizer, _torn_tokenizer,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__.strip("_"))
def test_what_is_wrong_with_a_subject_has_a_code_and_what_to_do(folder, tmp_path, spoil):
    code, level, words = spoil(copied(folder / "base", tmp_path / "subject"))
    levels, sentences = _levels(_plan(folder, subject=tmp_path / "subject"))
    assert levels[code] is level
    assert words in sentences[code]


def test_data_is_examined_before_it_is_needed(folder, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    levels, sentences = _levels(_plan(folder, retain=tmp_path / "empty.txt"))
    assert levels["WP203"] is Level.ERROR
    assert "is empty" in sentences["WP203"]
    levels, sentences = _levels(_plan(folder, retain=write_text(tmp_path / "short.txt", rows=5)))
    assert levels["WP204"] is Level.WARN
    assert "at least 100" in sentences["WP204"]
    for name in ("base", "subject"):
        plain = copied(folder / name, tmp_path / name)
        for path in plain.glob("tokenizer*"):
            path.unlink()
    levels, _ = _levels(_plan(folder, base=tmp_path / "base", subject=tmp_path / "subject"))
    assert levels["WP201"] is Level.ERROR
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3]}\n' * 60)
    ids = _plan(folder, base=tmp_path / "base", subject=tmp_path / "subject", retain=tmp_path / "ids.jsonl")
    assert _levels(ids)[0]["WP201"] is Level.OK


def test_policy_and_key_are_examined(folder, tmp_path):
    assert _levels(_plan(folder, policy="balansed"))[0]["WP301"] is Level.ERROR
    levels, sentences = _levels(_plan(folder, policy="conservative", retain=None))
    assert levels["WP302"] is Level.ERROR
    assert "requires a loss" in sentences["WP302"]
    key, _ = write_key_pair(tmp_path / "key", generate_key())
    assert _levels(_plan(folder, key=key))[0]["WP303"] is Level.OK
    key.chmod(key.stat().st_mode | stat.S_IROTH)
    levels, sentences = _levels(_plan(folder, key=key))
    assert levels["WP303"] is Level.ERROR
    assert "chmod 600" in sentences["WP303"]


def test_the_machine_is_examined(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(preflight_environment._MINIMUM, "torch", (99, 0))
    monkeypatch.setattr("weightproof.certifying.preflight._free_memory", lambda: 1)
    levels, sentences = _levels(_plan(folder))
    assert levels["WP003"] is Level.WARN
    assert "one process" in sentences["WP003"]
    assert sentences["WP006"].startswith("W&B is offline")
    assert (levels["WP001"], "install torch>=99.0" in sentences["WP001"]) == (Level.ERROR, True)
    assert (levels["WP004"], "--weights-only" in sentences["WP004"]) == (Level.WARN, True)


def test_a_context_longer_than_the_windows_is_told(folder, tmp_path):
    assert context_length({"text_config": {"max_position_embeddings": 7}}) == 7
    assert context_length({}) is None
    base = copied(folder / "base", tmp_path / "base")
    _config(base, max_position_embeddings=131072)
    levels, sentences = _levels(_plan(folder, base=base))
    assert levels["WP106"] is Level.WARN
    assert "not tested" in sentences["WP106"]


def test_windows_are_counted_as_the_loss_guard_cuts_them(folder, tmp_path):
    base, text = copied(folder / "base", tmp_path / "base"), write_text(tmp_path / "text.txt", rows=150)
    _config(base, max_position_embeddings=34)
    levels, sentences = _levels(_plan(folder, base=base, retain=text))
    loaded = load_model(base)
    probe = LossProbe(loaded.model, LossData(text, loaded.encode), None, LossLimits(), Processes.alone())
    [windows] = probe.windows
    assert levels["WP204"] is Level.OK
    assert f"about {windows.num_windows} windows, of at most 34 tokens" in sentences["WP204"]


def test_what_the_policy_says_of_lengths_counts(folder, tmp_path):
    base = copied(folder / "base", tmp_path / "base")
    _config(base, max_position_embeddings=4096)
    (tmp_path / "long.yaml").write_text("extends: balanced\nlimits: {loss: {length: 4096}}\n")
    levels, _ = _levels(_plan(folder, base=base, policy=tmp_path / "long.yaml"))
    assert levels["WP106"] is Level.OK


@pytest.mark.parametrize(("argument", "code"), [("base", 0), ("absent", 1)])
def test_the_verb_prints_findings_and_leaves_with_1_for_errors(folder, capsys, argument, code):
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", str(folder / argument), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (stop.value.code or 0) == code
    assert [set(one) for one in found] == [{"code", "level", "what", "do"}] * len(found)
    assert any(one["code"] == "WP101" and (one["level"] == "ERROR") is bool(code) for one in found)
    with pytest.raises(SystemExit):
        cli.main(["doctor", str(folder / argument)])
    assert "WP101" in capsys.readouterr().out


def test_plugins_lists_what_is_registered_and_what_cannot_be_loaded(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plugins", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert not stop.value.code
    assert {"guards", "loaders", "commands"} <= {one["group"] for one in found}
    assert all(one["error"] is None for one in found)
    broken = EntryPoint("broken", "no.such.module:guard", "weightproof.guards")
    known = registry.plugins

    def with_broken(group):
        return {**known(group), **({"broken": broken} if group == "weightproof.guards" else {})}

    monkeypatch.setattr(registry, "plugins", with_broken)
    with pytest.raises(SystemExit) as stop:
        cli.main(["plugins"])
    assert stop.value.code == 1
    assert "ModuleNotFoundError" in capsys.readouterr().out
