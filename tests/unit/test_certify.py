"""`weightproof certify` and `explain` on two folders: verdicts, evidence, and one sentence for what cannot be used."""

from __future__ import annotations

import copy
import json
import os
import stat

import pytest
import torch
from certified_folders import copied, make_folders, save_model, save_tokenizer, write_text
from safetensors.torch import load_file, save_file
from trained_models import load

from weightproof import cli
from weightproof.certificate import Certificate
from weightproof.cli.certify import parse_kind_option
from weightproof.errors import InputError
from weightproof.folders.checkpoint_files import MAX_HEADER_BYTES, MAX_JSON_BYTES
from weightproof.folders.loading import load_model
from weightproof.kinds import Cast, Plain, Prune, Quantize
from weightproof.signing import generate_key, write_key_pair


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture
def call(capsys):
    """Run a verb; give exit code, standard output and standard error."""

    def run(*argv):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(part) for part in argv])
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


# ---------------------------------------------------------------- verdicts


def test_int8_is_kept_on_its_loss_and_the_evidence_is_written(folders, call, tmp_path):
    out = tmp_path / "out"
    argv = ("certify", folders / "base", folders / "int8", "--retain", folders / "retain.txt", "--kind", "int8")
    code, text, err = call(*argv, "-o", out)
    assert code == 0, err
    assert text.startswith("kept")
    assert text.index("KEEP") < text.index("because") < text.index("not tested")
    certificate = Certificate.load(out / "certificate.json")
    assert certificate.predicate["assurance"] == "loss"
    assert certificate.subject_name == "int8"
    assert set(certificate.files) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert set(certificate.tensors) == set(load_file(folders / "int8" / "model.safetensors"))
    losses = certificate.predicate["readings"]["subject"]["losses"]
    assert [(one["role"], one["metric"], one["reason"]) for one in losses] == [("retain", "nll", None)]
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in out.iterdir()) == ["certificate.json", "report.html"]


def test_int2_is_rejected_with_the_reason_and_explained(folders, call, tmp_path):
    argv = ("certify", folders / "base", folders / "int2", "--retain", folders / "retain.txt", "-o", tmp_path, "--json")
    code, text, _ = call(*argv)
    found = json.loads(text)
    assert (code, found["exit_code"], found["action"], found["situation"]) == (1, 1, "ROLLBACK", "loss_rejects")
    assert {one["guard"]: one["outcome"] for one in found["verdicts"]}["divergence"] == "FAIL"
    code, words, _ = call("explain", tmp_path / "certificate.json", "--worst", "3")
    assert code == 0
    assert "do not use the subject" in words
    assert "the worst 3 of" in words
    again = json.loads(call("explain", tmp_path / "certificate.json", "--json")[1])
    assert again["reason"] == found["reason"]
    assert again["next"].startswith("do not use")


def test_without_data_outputs_decide(folders, call, tmp_path):
    code, text, _ = call("certify", folders / "base", folders / "int8", "-o", tmp_path, "--json")
    assert (code, json.loads(text)["assurance"]) == (0, "outputs-only")
    assert any("no loss was measured" in sentence for sentence in json.loads(text)["not_tested"])


def test_weights_alone_are_undecided(folders, call, tmp_path):
    code, text, _ = call("certify", folders / "base", folders / "int8", "--weights-only", "-o", tmp_path, "--json")
    found = json.loads(text)
    assert (code, found["situation"], found["assurance"]) == (2, "no_forward_weights_pass", "weights-only")
    assert {v["guard"]: v["outcome"] for v in found["verdicts"]}["loss"] == "NOT_MEASURED"
    assert any(sentence.startswith("module classes") for sentence in found["not_tested"])


def test_a_policy_that_requires_a_loss_is_undecided_without_data(folders, call, tmp_path):
    code, text, _ = call(
        "certify", folders / "base", folders / "int8", "--policy", "conservative", "-o", tmp_path, "--json"
    )
    assert (code, json.loads(text)["situation"]) == (2, "required_not_measured")


def _edited(name):
    model = copy.deepcopy(load("llama").model)
    with torch.no_grad():
        if name == "preserving":
            for layer in model.model.layers:
                layer.mlp.up_proj.weight.mul_(3.0)
                layer.mlp.down_proj.weight.div_(3.0)
        if name == "norm":
            model.model.norm.weight.mul_(3.0)
        if name == "signs":
            model.model.layers[1].mlp.down_proj.weight.neg_()
    return model


@pytest.mark.parametrize(("name", "code"), [("preserving", 0), ("norm", 1), ("signs", 1)])
def test_what_keeps_the_function_is_kept_and_what_breaks_it_is_rejected(folders, call, tmp_path, name, code):
    save_model(_edited(name), tmp_path / name)
    argv = ("certify", folders / "base", tmp_path / name, "--retain", folders / "retain.txt", "-o", tmp_path / "out")
    assert call(*argv)[0] == code


def test_a_gain_that_was_promised_and_not_shown_is_rejected(folders, call, tmp_path):
    target = write_text(tmp_path / "target.txt", seed=60_000)
    argv = ("certify", folders / "base", folders / "int2", "--target", target, "-o", tmp_path / "out", "--json")
    code, text, _ = call(*argv)
    assert (code, json.loads(text)["situation"]) == (1, "loss_rejects")


def test_a_signed_certificate_refers_to_its_parent(folders, call, tmp_path):
    key, public = write_key_pair(tmp_path / "key", generate_key())
    assert public.exists()
    argv = ("--weights-only", "--sign", key)
    call("certify", folders / "base", folders / "int8", *argv, "-o", tmp_path / "first")
    first = Certificate.load(tmp_path / "first" / "certificate.json")
    assert first.envelope is not None
    parent = ("--parent", tmp_path / "first" / "certificate.json")
    code, _, err = call("certify", folders / "int8", folders / "int2", *argv, *parent, "-o", tmp_path / "second")
    assert code in (1, 2), err
    second = Certificate.load(tmp_path / "second" / "certificate.json")
    assert second.predicate["parent"] == {"sha256": first.digest}
    code, _, err = call("certify", folders / "base", folders / "int2", *argv, *parent, "-o", tmp_path / "third")
    assert code == 3
    assert "is not about" in err


def test_a_model_card_is_written_when_asked_and_the_folder_still_verifies(folders, call, tmp_path):
    subject = copied(folders / "int8", tmp_path / "subject")
    (subject / "README.md").write_text("# My model\n")
    argv = ("certify", folders / "base", subject, "--weights-only", "-o", tmp_path / "out", "--model-card", "--json")
    digest = json.loads(call(*argv)[1])["digest"]
    card = (subject / "README.md").read_text()
    assert "# My model" in card
    assert digest in card
    verified = call("verify", tmp_path / "out" / "certificate.json", "--model", subject, "--unsigned-ok")
    assert verified[0] == 0, verified
    code, _, err = call("certify", folders / "base", "owner/name", "--model-card", "-o", tmp_path / "out")
    assert (code, "is no local folder" in err) == (3, True)


# ---------------------------------------------------------------- a subject that is not whole


def _without_tensor(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    return "missing_tensor"


def _renamed(tensors):
    tensors["model.layers.1.mlp.up_projection.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    return "missing_tensor"


def _added(tensors):
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.randn(4, 4)
    return "added_tensor"


def _reshaped(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:-1].clone()
    return "changed_shape"


def _not_a_number(tensors):
    tensors["model.norm.weight"][0] = float("nan")
    return "NaN"


@pytest.mark.parametrize("spoil", [_without_tensor, _renamed, _added, _reshaped, _not_a_number])
def test_a_subject_that_is_not_whole_is_rejected_by_name(folders, call, tmp_path, spoil):
    subject = copied(folders / "int8", tmp_path / "subject")
    tensors = load_file(subject / "model.safetensors")
    named = spoil(tensors)
    save_file(tensors, subject / "model.safetensors", metadata={"format": "pt"})
    code, text, err = call("certify", folders / "base", subject, "-o", tmp_path / "out", "--json")
    assert code == 1, err
    found = json.loads(text)
    assert found["situation"] == "t0_fail"
    assert named in found["reason"]


# ---------------------------------------------------------------- bad input: one sentence, nothing written


def _refused(call, output, *argv):
    code, out, err = call("certify", *argv, "-o", output)
    assert code == 3, (out, err)
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert not output.exists()
    return err


def _tokenizer_of_another(subject):
    save_tokenizer(subject, shift=1)
    return "the same text would be other tokens"


def _no_tokenizer(subject):
    for path in subject.glob("tokenizer*"):
        path.unlink()
    return "the same text would be other tokens"


def _pickle(subject):
    (subject / "model.safetensors").unlink()
    (subject / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.")
    return "which can run code when loaded and is refused"


def _link_out(subject):
    secret = subject.parent / "secret.safetensors"
    (subject / "model.safetensors").rename(secret)
    (subject / "model.safetensors").symlink_to(secret)
    return "leads out of its folder"


def _index_out(subject):
    (subject / "model.safetensors").rename(subject.parent / "weights.safetensors")
    weight_map = {"model.norm.weight": "../weights.safetensors"}
    (subject / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return "leads out of its folder"


def _huge_header(subject):
    (subject / "model.safetensors").write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}")
    return "claims a header of"


def _huge_json(subject):
    with (subject / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    return "more than the"


def _deep_json(subject):
    (subject / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    return "cannot be read as JSON"


def _pipe(subject):
    (subject / "config.json").unlink()
    os.mkfifo(subject / "config.json")
    return "no regular file"


def _torn(subject):
    content = (subject / "model.safetensors").read_bytes()
    (subject / "model.safetensors").write_bytes(content[: len(content) // 2])
    return "not a complete safetensors file"


def _twice(subject):
    (subject / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model.safetensors"}}')
    return "holds its weights twice"


def _other_architecture(subject):
    config = json.loads((subject / "config.json").read_text())
    (subject / "config.json").write_text(json.dumps({**config, "model_type": "qwen3"}))
    return "compares two versions of one model"


def _own_code(subject):
    config = json.loads((subject / "config.json").read_text())
    config |= {"architectures": ["MyLlama"], "auto_map": {"AutoModelForCausalLM": "code.MyLlama"}}
    (subject / "config.json").write_text(json.dumps(config))
    (subject / "code.py").write_text("raise SystemExit('code of the folder was run')")
    return "code in a model folder is never run"


def _adapter(subject):
    (subject / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    return "names a base model of its own"


def _stored_quantised(subject):
    config = json.loads((subject / "config.json").read_text())
    (subject / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    return "stored quantised (gptq)"


SPOILED = [
    _tokenizer_of_another, _no_tokenizer, _pickle, _link_out, _index_out, _huge_header, _huge_json, _deep_json, _pipe,
    _torn, _twice, _other_architecture, _own_code, _adapter, _stored_quantised,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__.strip("_"))
def test_a_folder_that_cannot_be_used_is_one_sentence(folders, call, tmp_path, monkeypatch, spoil):
    monkeypatch.chdir(tmp_path)
    subject = copied(folders / "int8", tmp_path / "subject")
    expected = spoil(subject)
    err = _refused(call, tmp_path / "out", folders / "base", subject, "--retain", folders / "retain.txt")
    assert expected in err
    assert not (tmp_path / "hacked").exists()


def _empty(path):
    path.write_text("\n \n")
    return "is empty"


def _binary(path):
    path.write_bytes(b"\x00\x01\x02" * 100)
    return "is binary"


def _latin(path):
    path.write_bytes("w1 w2 déjà vu".encode("latin-1"))
    return "is not UTF-8 text"


def _absent(path):
    return "cannot be read"


@pytest.mark.parametrize("spoil", [_empty, _binary, _latin, _absent], ids=lambda spoil: spoil.__name__.strip("_"))
def test_data_that_cannot_be_used_is_one_sentence(folders, call, tmp_path, spoil):
    expected = spoil(tmp_path / "retain.txt")
    argv = (folders / "base", folders / "int8", "--retain", tmp_path / "retain.txt")
    assert expected in _refused(call, tmp_path / "out", *argv)


def test_too_little_data_is_not_measured_and_not_a_pass(folders, call, tmp_path):
    write_text(tmp_path / "short.txt", rows=3)
    argv = ("certify", folders / "base", folders / "int8", "--retain", tmp_path / "short.txt", "-o", tmp_path / "out")
    code, text, _ = call(*argv, "--json")
    verdicts = {verdict["guard"]: verdict for verdict in json.loads(text)["verdicts"]}
    assert verdicts["loss"]["outcome"] == "NOT_MEASURED"
    assert "windows of at least 100" in verdicts["loss"]["reason"]
    assert (code, json.loads(text)["assurance"]) == (0, "outputs-only")


def test_a_base_that_is_broken_is_one_sentence(folders, call, tmp_path):
    base = copied(folders / "base", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] *= 2e38  # finite weights, infinite outputs
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    err = _refused(call, tmp_path / "out", base, folders / "int8", "--retain", folders / "retain.txt")
    assert "before any change" in err
    tensors["lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight (1)" in _refused(call, tmp_path / "out", base, folders / "int8")


def test_options_that_cannot_be_used_are_one_sentence(folders, call, tmp_path):
    base, subject, out = folders / "base", folders / "int8", tmp_path / "out"
    assert "no change to certify" in _refused(call, out, base, base)
    assert "there is no folder" in _refused(call, out, base, f"{tmp_path}/absent")
    assert "--kind int99" in _refused(call, out, base, subject, "--kind", "int99")
    # A window of training is judged by less than an edit: int2 was kept as one, and loss was not asked for.
    assert "windows of a guarded training run" in _refused(call, out, base, subject, "--kind", "train")
    assert "tier" in _refused(call, out, base, subject, "--policy", "balansed")
    data = ("--weights-only", "--retain", folders / "retain.txt")
    assert "--retain would not be read" in _refused(call, out, base, subject, *data)
    key, _ = write_key_pair(tmp_path / "key", generate_key())
    key.chmod(key.stat().st_mode | stat.S_IRGRP)
    assert "can be read by others" in _refused(call, out, base, subject, "--sign", key)
    assert "absent.json" in _refused(call, out, base, subject, "--parent", tmp_path / "absent.json")
    (tmp_path / "file").write_text("mine")
    code, _, err = call("certify", base, subject, "-o", tmp_path / "file")
    assert (code, "is a file" in err, (tmp_path / "file").read_text()) == (3, True, "mine")


def test_a_failure_leaves_the_evidence_of_before_as_it_was(folders, call, tmp_path):
    call("certify", folders / "base", folders / "int8", "--weights-only", "-o", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, _, _ = call("certify", folders / "base", folders / "base", "-o", tmp_path)
    assert code == 3
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_explaining_something_else_is_one_sentence(call, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    code, _, err = call("explain", tmp_path / "other.json")
    assert code == 3
    assert len(err.splitlines()) == 1


# ---------------------------------------------------------------- kinds in words, models in memory


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("int4", Quantize(4)),
        ("quantize:bits=4,granularity=group,group_size=64", Quantize(4, "group", 64)),
        ("cast:bfloat16", Cast("bfloat16")),
        ("prune:0.5", Prune(0.5)),
        ("preserving", Plain("preserving")),
        (None, None),
    ],
)
def test_kinds_can_be_declared_in_words(text, kind):
    assert parse_kind_option(text) == kind


@pytest.mark.parametrize("text", ["quantize:bits=x", "prune:half", "cast:int8", "lora_merge", "int8:1", "nonsense"])
def test_kinds_that_cannot_be_declared_in_words_are_refused(text):
    with pytest.raises(InputError, match="--kind"):
        parse_kind_option(text)


def test_a_folder_is_loaded_with_its_tokenizer_whose_digest_is_of_what_it_does(folders, tmp_path):
    base, int8 = load_model(folders / "base"), load_model(folders / "int8")
    assert not base.model.training
    assert base.encode is not None
    assert base.encode("w3 w7\nw1") == [3, 7, 1]
    assert base.tokenizer_digest == int8.tokenizer_digest
    other = copied(folders / "base", tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 77}))
    assert load_model(other).tokenizer_digest == base.tokenizer_digest
    save_tokenizer(other, shift=2)
    assert load_model(other).tokenizer_digest != base.tokenizer_digest


def test_a_folder_that_lacks_a_tensor_is_not_filled_with_random_values(folders, tmp_path):
    folder = copied(folders / "base", tmp_path / "short")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks lm_head\.weight"):
        load_model(folder)


def test_a_class_that_does_not_run_what_the_files_hold_is_refused(folders, call, tmp_path, monkeypatch):
    """What is said of outputs must be said of the weights in the files."""

    def rescaled(folder, *, device):
        loaded = load_model(folder, device=device)
        with torch.no_grad():
            loaded.model.get_parameter("model.norm.weight").add_(1.0)
        return loaded

    monkeypatch.setattr("weightproof.certifying.model_pair.load_model", rescaled)
    assert "model.norm.weight in memory is not what" in _refused(
        call, tmp_path / "out", folders / "base", folders / "int8"
    )


def test_another_tokenizer_is_named_where_no_data_need_one(folders, call, tmp_path):
    subject = copied(folders / "int8", tmp_path / "subject")
    save_tokenizer(subject, shift=1)
    (subject / "config.json").write_text((subject / "config.json").read_text().replace("{", "{ ", 1))
    found = json.loads(call("certify", folders / "base", subject, "-o", tmp_path / "out", "--json")[1])
    [said] = [line for line in found["not_tested"] if "tokenizer.json" in line]
    assert "config.json" not in said.replace("tokenizer_config.json", "")


def test_a_config_of_another_size_names_the_tensor(folders, tmp_path):
    folder = copied(folders / "base", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 2 * config["intermediate_size"]}))
    with pytest.raises(InputError, match=r"mlp\.\w+\.weight .*in another shape than config.json says"):
        load_model(folder)


def test_a_change_in_config_json_alone_is_named(folders, call, tmp_path):
    subject = copied(folders / "base", tmp_path / "subject")
    config = json.loads((subject / "config.json").read_text())
    (subject / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 10.0}))
    code, text, _ = call("certify", folders / "base", subject, "-o", tmp_path / "out", "--json")
    assert code == 1
    assert any("rms_norm_eps" in sentence for sentence in json.loads(text)["not_tested"])
