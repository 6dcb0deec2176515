"""`weightproof inspect`: its numbers against numpy, its sentences, its JSON."""

import json
import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from weightproof import cli
from weightproof.cli.inspect import display_names, shorten
from weightproof.cli.spectral_report import MatrixReport, weight_moments

DOWN = "model.layers.1.mlp.down_proj.weight"


def make_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=120,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A llama with two planted directions in one matrix, some zeros and one heavy element elsewhere."""
    model = make_llama()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        left = np.linalg.qr(rng.standard_normal((48, 2)))[0]
        right = np.linalg.qr(rng.standard_normal((96, 2)))[0]
        planted = left @ np.diag([1.5, 1.0]) @ right.T
        model.get_parameter(DOWN).add_(torch.from_numpy(planted).float())
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[:12] = 0.0
        model.get_parameter("model.layers.0.self_attn.v_proj.weight")[3, 3] = 0.5
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder, {name: p.detach().double().numpy() for name, p in model.named_parameters()}


def run(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(part) for part in ("inspect", *argv)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def report(capsys, *argv):
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


def test_values_agree_with_numpy(llama, capsys):
    folder, weights = llama
    found = {entry["name"]: entry for entry in report(capsys, folder)["matrices"]}
    assert set(found) == {name for name, values in weights.items() if values.ndim == 2}
    for name, entry in found.items():
        values = weights[name]
        singular = np.linalg.svd(values, compute_uv=False)
        assert entry["spectral_norm"] == pytest.approx(singular[0], rel=1e-5)
        assert entry["frobenius_norm"] == pytest.approx(np.linalg.norm(values), rel=1e-5)
        assert entry["stable_rank"] == pytest.approx((singular**2).sum() / singular[0] ** 2, rel=1e-4)
        assert entry["std"] == pytest.approx(values.std(), rel=1e-6)
        assert entry["sparsity"] == pytest.approx((values == 0).mean())
        centred = values - values.mean()
        assert entry["kurtosis"] == pytest.approx((centred**4).mean() / values.var() ** 2 - 3, rel=1e-5, abs=1e-6)
        if entry["alpha"] is not None:
            assert entry["alpha_error"] == pytest.approx((entry["alpha"] - 1) / entry["alpha_tail"] ** 0.5, rel=0.02)


def test_planted_directions_are_counted_under_the_global_null(llama, capsys):
    folder, weights = llama
    result = report(capsys, folder, "--null", "global")
    found = {entry["name"]: entry for entry in result["matrices"]}
    assert found[DOWN]["num_spikes"] == 2
    assert found[DOWN]["pure_bulk"] is False
    assert found[DOWN]["top_over_edge"] == pytest.approx(
        np.linalg.norm(weights[DOWN], 2) / found[DOWN]["edge_plus"], rel=1e-5
    )
    assert result["looks_untrained"] is False


@pytest.mark.parametrize("null", ["biwhitened", "global", "signflip"])
def test_json_is_complete_and_strict(llama, capsys, null):
    folder, _ = llama
    _, out, _ = run(capsys, folder, "--json", "--null", null)
    result = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert result["num_measured"] == result["num_eligible"] == len(result["matrices"])
    assert result["null"] == null
    assert {field.name for field in fields(MatrixReport)} == set(result["matrices"][0])
    assert sum(family["matrices"] for family in result["families"]) == result["num_eligible"]
    assert {family["family"] for family in result["families"]} == {"attn", "ffn", "embed", "head"}


def test_random_initialisation_looks_untrained(tmp_path, capsys):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=48, n_head=4, vocab_size=96, n_positions=64))
    model.save_pretrained(tmp_path)
    assert report(capsys, tmp_path)["looks_untrained"] is True
    code, out, _ = run(capsys, tmp_path)
    assert code == 0
    assert "looks untrained" in out
    assert "measured 6 of 6" in out


def test_nan_is_reported_by_name_and_the_rest_is_measured(tmp_path, capsys):
    model = make_llama()
    with torch.no_grad():
        model.get_parameter(DOWN)[2, 5] = float("nan")
        model.get_parameter("lm_head.weight")[0, :2] = float("inf")
    model.save_pretrained(tmp_path)
    result = report(capsys, tmp_path)
    assert {entry["name"] for entry in result["refused"]} == {DOWN, "lm_head.weight"}
    assert result["num_measured"] == result["num_eligible"] - 2
    entry = next(entry for entry in result["matrices"] if entry["name"] == DOWN)
    assert entry["num_nonfinite"] == 1
    assert entry["spectral_norm"] is None
    assert "NaN or inf" in entry["reason"]
    code, out, _ = run(capsys, tmp_path)
    assert code == 0
    assert "layers.1.mlp.down_proj" in out


def test_limit_measures_the_first_matrices_and_names_the_rest(llama, capsys):
    result = report(capsys, llama[0], "--limit", 3)
    assert result["num_measured"] == 3
    assert len(result["refused"]) == result["num_eligible"] - 3
    assert all("--limit 3" in entry["reason"] for entry in result["refused"])


def test_plot_is_written(llama, tmp_path, capsys):
    path = tmp_path / "new" / "spectra.png"
    code, _, err = run(capsys, llama[0], "--plot", path)
    assert code == 0
    assert "spectra.png" in err
    with Image.open(path) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_tables_fit_the_terminal_and_keep_rows_apart(llama, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich then believes it writes to a terminal
    _, out, _ = run(capsys, llama[0])
    rows = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines() if "_proj" in line]
    assert len(rows) == 14
    assert len({row.split()[0] for row in rows}) == 14
    assert max(map(len, rows)) <= columns


def empty(folder):
    folder.joinpath("config.json").write_text("{}")


def pickled(folder):
    empty(folder)
    folder.joinpath("pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def truncated(folder):
    make_llama().save_pretrained(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [(empty, "no safetensors"), (pickled, "pytorch_model.bin"), (truncated, "model.safetensors")],
    ids=["no weights", "pickle only", "truncated"],
)
def test_unusable_folder_is_one_sentence_and_code_2(tmp_path, capsys, prepare, sentence):
    prepare(tmp_path)
    code, out, err = run(capsys, tmp_path)
    assert code == 3
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert sentence in last
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [("./no/such/folder", "there is no folder"), ("/no/such/folder", "there is no folder")],
)
def test_wrong_path_never_asks_the_network(capsys, monkeypatch, argument, sentence):
    monkeypatch.setattr("weightproof.folders.loading.load_plugin", lambda *_: pytest.fail("asked the Hub"))
    code, _, err = run(capsys, argument)
    assert code == 3
    assert sentence in err


def test_a_file_is_not_a_folder(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"")
    code, _, err = run(capsys, tmp_path / "model.safetensors")
    assert code == 3
    assert "is a file" in err


def test_a_plot_that_is_no_png_is_refused_before_measuring(llama, capsys):
    code, out, err = run(capsys, llama[0], "--plot", "picture.pdf")
    assert (code, out) == (3, "")
    assert "picture.pdf" in err


@pytest.mark.parametrize("place", ["a_file/spectra.png", "a_folder.png"])
def test_a_plot_that_cannot_be_written_is_refused_before_measuring(llama, capsys, tmp_path, place):
    (tmp_path / "a_file").write_text("in the way")
    (tmp_path / "a_folder.png").mkdir()
    code, out, err = run(capsys, llama[0], "--plot", tmp_path / place)
    assert (code, out) == (3, "")
    assert "--plot cannot write" in err


def test_a_hub_id_is_fetched_without_code_and_an_absent_one_is_a_sentence(llama, capsys, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def fetch(model_id, *, allow_patterns):
        asked.append(allow_patterns)
        if model_id == "absent/model":
            raise LocalEntryNotFoundError("cannot reach the Hub")
        return str(llama[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert report(capsys, "some/model", "--limit", 1)["model"] == "some/model"
    assert all(pattern.endswith(("json", "safetensors")) for pattern in asked[0])
    code, _, err = run(capsys, "absent/model")
    assert code == 3
    assert "absent/model" in err
    assert "cannot reach the Hub" in err


def test_a_hub_model_of_pickles_is_refused(tmp_path, capsys, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    code, _, err = run(capsys, "only/pickles")
    assert code == 3
    assert "pickle" in err


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.0, 0.0], [0.0, 0.0]], (0.0, 1.0, None, 0)),
        ([[1.0, -1.0], [1.0, -1.0]], (1.0, 0.0, -2.0, 0)),
        ([[float("nan"), 2.0], [0.0, float("inf")]], (1.0, 0.5, -2.0, 2)),
        ([[float("nan")]], (0.0, 0.0, None, 1)),
    ],
    ids=["zero", "two values", "NaN and inf", "only NaN"],
)
def test_weight_moments(values, expected):
    moments = weight_moments(torch.tensor(values))
    assert (moments.std, moments.sparsity, moments.kurtosis, moments.num_nonfinite) == expected


def test_names_are_shortened_and_stay_apart():
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(12)] + ["lm_head.weight"]
    assert display_names(names)[:1] == ["layers.0.self_attn.q_proj"]
    assert display_names(names)[-1] == "lm_head"
    assert display_names(["a.x.weight", "a.y.weight", "x.weight"]) == ["a.x", "a.y", "x"]
    short = {shorten(name, 20) for name in names}
    assert len(short) == len(names)
    assert max(map(len, short)) <= 20
    assert shorten("model.layers.31.self_attn.q_proj", 20) == "m.l.31.s.q_proj"
    assert shorten("short", 20) == "short"
