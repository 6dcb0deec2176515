"""The subspace report: planted changes through real PEFT adapters, every candidate on trained models, bad input."""

from __future__ import annotations

import copy
import csv
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trained_models
from torch import Tensor, nn
from trained_adapters import adapted, adapter_folder, configuration
from trained_models import chain_samples, untrained

from weightproof import Delta, InputError
from weightproof.candidates.candidate import Candidate, Sources
from weightproof.candidates.capturing import capture
from weightproof.candidates.registry import CANDIDATES
from weightproof.candidates.weight_side import WeightSide
from weightproof.cli import main
from weightproof.delta_report.making import make_report, read_change
from weightproof.delta_report.page import as_csv, lead
from weightproof.delta_report.prompts import read_prompts
from weightproof.delta_report.stability import stability
from weightproof.delta_report.table import measure
from weightproof.subspace import null_std, recovery, weight_target

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about layers that are tied or turned
D, R = 64, 8
WRITERS = {"llama": ["o_proj", "down_proj"], "gpt2": ["attn.c_proj", "mlp.c_proj"]}
ROLES = {"llama": ("self_attn.o_proj", "mlp.down_proj"), "gpt2": ("attn.c_proj", "mlp.c_proj")}


def frame(seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def planted_adapter(name: str, folder: Path, directions: Tensor, layers: list[int] | None = None) -> nn.Module:
    """A LoRA saved by PEFT whose B spans the given directions, all with the same energy; its base."""
    base = untrained(name)
    model = adapted(
        copy.deepcopy(base),
        configuration(name, target_modules=WRITERS[name], r=R, layers_to_transform=layers),
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_A." in key:
                parameter.copy_(torch.linalg.qr(torch.randn(parameter.shape[1], R, generator=generator)).Q.T)
            if ".lora_B." in key:
                parameter.copy_(0.05 * directions)
    model.save_pretrained(str(folder))
    return base


def given(name: str, basis: Tensor) -> Candidate:
    return Candidate(name, "W:write", "write", frozenset({"weights"}), lambda _sources, _layer: basis)


# ---- planted --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_planted_adapter_scores_as_it_was_planted(name: str, tmp_path: Path):
    q = frame(1)
    base = planted_adapter(name, tmp_path, q[:, :R])
    delta = read_change(tmp_path, base)
    candidates = [
        given("all", q[:, :R]),
        given("part", q[:, 3 : 3 + R]),
        given("none", q[:, R : 2 * R]),
        *(given(f"random {seed}", frame(100 + seed)[:, :R]) for seed in range(12)),
        next(one for one in CANDIDATES if one.name == "dW_left_basis_ceiling"),
    ]
    table = measure(Sources(WeightSide.of(base), None, delta, rank=R, broad_rank=16), candidates)
    rows = {row.name: row for row in table.rows}
    assert table.tensors == ROLES[name]
    assert len(table.layers) == 3
    expected = {"all": D / R, "part": 5 / R * D / R, "none": 0.0, "dW_left_basis_ceiling": D / R}
    for candidate, ratio in expected.items():
        assert rows[candidate].r_weights == pytest.approx(ratio, abs=2e-5)
        assert set(rows[candidate].r_tensors) == set(ROLES[name])
        assert all(value == pytest.approx(ratio, abs=2e-5) for value in rows[candidate].r_tensors.values())
    assert rows["all"].percent_weights == pytest.approx(100.0, abs=1e-3)
    assert rows["part"].percent_weights == pytest.approx(62.5, abs=1e-2)
    deviation = null_std(R, D, 1 / R)
    assert rows["all"].null_weights == pytest.approx(deviation, rel=1e-4)
    assert rows["all"].z_weights == pytest.approx((D / R - 1) / deviation, rel=1e-4)
    random = [row.r_weights for key, row in rows.items() if key.startswith("random") and row.r_weights is not None]
    assert all(abs(value - 1.0) < 4 * deviation for value in random)
    assert abs(sum(random) / len(random) - 1.0) < 4 * deviation / math.sqrt(len(random))
    assert all(row.reasons["r_act"] == "there are no prompts (--prompts)" and row.r_act is None for row in table.rows)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_a_planted_adapter_does_to_activations_lies_where_it_was_planted(name: str, tmp_path: Path):
    q = frame(2)
    last = 2  # nothing after it but the MLP's own writing: the stream that leaves moves along the plant alone
    model = adapted(
        copy.deepcopy(base := untrained(name)),
        configuration(name, target_modules=WRITERS[name][1:], r=R, layers_to_transform=[last]),
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_B." in key:
                parameter.copy_(0.5 * q[:, :R])
    model.save_pretrained(str(tmp_path))
    prompts = {"input_ids": chain_samples(20, 9, seed=3)}
    delta = read_change(tmp_path, base)
    captures = capture(base, prompts, delta=delta, needs={"clean", "delta"})
    sources = Sources(WeightSide.of(base), captures, delta, rank=R, broad_rank=16)
    table = measure(sources, [given("all", q[:, :R]), given("part", q[:, 6 : 6 + R]), given("none", q[:, R : 2 * R])])
    rows = {row.name: row for row in table.rows}
    assert table.layers == (sources.weights.layers[last].name,)
    assert table.num_prompts == 10
    assert rows["all"].r_act == pytest.approx(D / R, abs=1e-4)
    assert rows["none"].r_act == pytest.approx(0.0, abs=1e-4)
    part = rows["part"]
    assert part.r_act is not None
    assert 0.0 < part.r_act < D / R
    assert part.r_act_low is not None
    assert part.r_act_high is not None
    assert part.r_act_low < part.r_act < part.r_act_high
    assert "effective sample too small: 10.0" in part.reasons["r_act_low"]
    assert rows["all"].joint == pytest.approx(D / R, abs=1e-3)
    assert rows["all"].gap == pytest.approx(0.0, abs=1e-3)


# ---- one command ----------------------------------------------------------------------------------------------------


def jsonl(path: Path, rows: Tensor) -> Path:
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows.tolist()))
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(one) for one in arguments])
    return int(left.value.code or 0)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def reported(request: Any, tmp_path_factory: Any) -> tuple[str, Path]:
    """The report of the trained adapter of one architecture, made by the command; its folder."""
    name, root = request.param, tmp_path_factory.mktemp(request.param)
    trained_models.load(name).model.save_pretrained(root / "base")
    pairs = chain_samples(20, 12, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = run(
            "delta", "report", root / "base", adapter_folder(name), "--prompts",
            jsonl(root / "clean.jsonl", chain_samples(20, 12, seed=1)), "--positive", jsonl(root / "p.jsonl", pairs),
            "--negative", jsonl(root / "n.jsonl", pairs.flip(1)), "--splits", 1, "--out", root / "out",
        )  # fmt: skip
    assert code == 0
    return name, root / "out"


def test_every_candidate_computes_or_says_why(reported: tuple[str, Path]):
    name, out = reported
    found = json.loads((out / "report.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [one.name for one in CANDIDATES]
    assert len(rows) == 44
    missing = {key: row["reasons"]["basis"] for key, row in rows.items() if "basis" in row["reasons"]}
    assert missing.keys() == (set() if name == "llama" else {"mlp_gate_read", "gate_kernel"})
    assert all("no gate" in why for why in missing.values())
    for key, row in rows.items():
        if key in missing:
            assert row["r_act"] is None
            assert row["r_weights"] is None
            continue
        assert row["layers"] == 3
        assert 0.0 < row["r_act"] <= D / row["rank"] + 1e-9
        assert 0.0 < row["r_weights"] <= D / row["rank"] + 1e-9
        assert row["percent_act"] <= 100.0 + 1e-9
        assert row["percent_weights"] <= 100.0 + 1e-9
        assert all(value <= 100.0 + 1e-9 for value in row["percent_tensors"].values())
        assert row["r_act_low"] <= row["r_act"] <= row["r_act_high"]
        assert row["joint"] == pytest.approx(math.sqrt(row["r_act"] * row["r_weights"]))
        assert row["gap"] == pytest.approx(math.log2(row["r_act"] / row["r_weights"]))
        assert 0.0 <= row["cosine"] <= 1.0 + 1e-12
    ceiling = rows["dW_left_basis_ceiling"]
    assert ceiling["percent_weights"] == pytest.approx(100.0)
    assert ceiling["cosine"] == pytest.approx(1.0)
    assert rows["TaskDiff_lora_ceiling"]["percent_act_ceiling"] == pytest.approx(100.0)
    assert "taken out" in rows["layer_clean_resid_pca"]["reasons"]["specific_act"]
    assert {one["what"] for one in found["stability"]} == {"halves of the prompts"}


def test_the_files_of_a_report_say_the_same(reported: tuple[str, Path]):
    _, out = reported
    found = json.loads((out / "report.json").read_text())
    rows = list(csv.DictReader((out / "report.csv").read_text().splitlines()))
    assert [row["candidate"] for row in rows] == [row["name"] for row in found["rows"]]
    for line, row in zip(rows, found["rows"], strict=True):
        assert (line["r_weights"] == "") == (row["r_weights"] is None)
        if row["r_weights"] is not None:
            assert float(line["r_weights"]) == pytest.approx(row["r_weights"], rel=1e-5)
            assert float(line[f"r_tensor {found['tensors'][0]}"]) > 0.0
    assert (out / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (out / "report.html").read_text()
    assert page.count("<tr>") >= 44
    assert not re.search(r">\u22120(\.0+)?<", page)  # zero has no sign
    assert ("The intervals are rough" in page) == any("r_act_low" in row["reasons"] for row in found["rows"])
    assert 'src="data:image/png;base64,' in page
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page


def test_without_prompts_the_weights_are_scored_and_activations_are_not_zero(tmp_path: Path, capsys: Any):
    base = planted_adapter("llama", tmp_path / "adapter", frame(1)[:, :R])
    base.save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    assert run("delta", "report", tmp_path / "base", tmp_path / "adapter", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    for row in found["rows"]:
        assert row["r_act"] is None
        assert row["z_act"] is None
        assert row["joint"] is None
        assert "basis" in row["reasons"] or row["reasons"]["r_act"] == "there are no prompts (--prompts)"
    assert sum(row["r_weights"] is not None for row in found["rows"]) == 22
    assert run("delta", "report", tmp_path / "base", tmp_path / "adapter") == 0
    told = capsys.readouterr().out
    assert "Activations were not measured: no prompts were given." in told
    assert "not measured, there are no prompts to read activations on: gate_kernel" in told


def test_a_contrast_shows_its_sides_and_seeds_their_spread(tmp_path: Path, capsys: Any):
    base = planted_adapter("llama", tmp_path / "plus", frame(1)[:, :R])
    planted_adapter("llama", tmp_path / "minus", frame(2)[:, :R])
    base.save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    arguments = ["delta", "report", tmp_path / "base", tmp_path / "plus"]
    assert run(*arguments, "--against", tmp_path / "minus", "-o", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "length of the positive side over the negative: 1" in told
    assert "Drift" in (tmp_path / "out" / "report.html").read_text()
    assert run(*arguments, "--other-seed", tmp_path / "minus", "--json") == 0
    spread = json.loads(capsys.readouterr().out)["stability"][0]
    assert spread["num_tables"] == 2
    assert spread["r_weights"]["dW_left_basis_ceiling"]["std"] == pytest.approx(0.0, abs=1e-4)
    assert spread["r_act"]["write"]["mean"] is None
    assert -1.0 <= spread["order_weights"] <= 1.0


def test_an_adapter_that_writes_nothing_needs_prompts(tmp_path: Path):
    base = untrained("llama")
    model = adapted(copy.deepcopy(base), configuration("llama", target_modules=["q_proj"]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_B." in key:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(str(tmp_path))
    delta = read_change(tmp_path, base)
    with pytest.raises(InputError, match=r"touches no matrix of model.layers.0 that writes.*give --prompts"):
        make_report(base, delta, title="queries")
    found = make_report(base, delta, {"input_ids": chain_samples(8, 9, seed=1)}, title="queries", rank=4)
    row = next(one for one in found.table.rows if one.name == "write")
    assert row.r_act is not None
    assert row.r_weights is None
    assert row.joint is None
    assert "touches no matrix" in row.reasons["r_weights"]
    assert "on activations" in lead(found.table)
    assert as_csv(found.table).count("\n") == 45


def test_the_report_leaves_the_model_as_it_was(tmp_path: Path):
    base = planted_adapter("gpt2", tmp_path, frame(1)[:, :R])
    before = {key: value.clone() for key, value in base.state_dict().items()}
    make_report(base, read_change(tmp_path, base), {"input_ids": chain_samples(16, 9, seed=1)}, title="planted")
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())


def test_a_base_in_half_precision_is_run_in_float32(tmp_path: Path, capsys: Any):
    base = planted_adapter("llama", tmp_path / "adapter", frame(1)[:, :R])
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    prompts = jsonl(tmp_path / "clean.jsonl", chain_samples(16, 9, seed=1))
    assert run("delta", "report", tmp_path / "base", tmp_path / "adapter", "--prompts", prompts, "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["TaskDiff_lora_ceiling"]["r_act"] > rows["suppressed"]["r_act"] > 0.0
    assert rows["dW_left_basis_ceiling"]["r_weights"] == pytest.approx(D / R, abs=1e-4)


def test_one_table_alone_has_no_spread(tmp_path: Path):
    base = planted_adapter("llama", tmp_path, frame(1)[:, :R])
    found = make_report(base, read_change(tmp_path, base), title="planted")
    alone = stability([found.table], "changes")
    assert alone.order_weights is None
    assert alone.r_weights["write"].std is None


@pytest.mark.parametrize(
    ("name", "target", "roles"),
    [
        ("bert", ".*(?:attention.output|[0-9].output).dense", {"attention.output.dense", "output.dense"}),
        ("t5", ".*[.](?:o|wo)", {
            "layer.0.SelfAttention.o", "layer.1.EncDecAttention.o", "layer.1.DenseReluDense.wo",
            "layer.2.DenseReluDense.wo",
        }),
    ],
)  # fmt: skip
def test_an_encoder_and_an_encoder_decoder_are_scored_by_their_weights(
    name: str, target: str, roles: set[str], tmp_path: Path
):
    base = untrained(name)
    model = adapted(copy.deepcopy(base), peft.LoraConfig(target_modules=target, r=4, init_lora_weights=False))
    model.save_pretrained(str(tmp_path))
    table = make_report(base, read_change(tmp_path, base), title=name).table
    assert set(table.tensors) == roles
    rows = {row.name: row for row in table.rows}
    assert rows["dW_left_basis_ceiling"].percent_weights == pytest.approx(100.0)
    assert rows["lm_head_read"].layers == 3  # of six in an encoder-decoder
    assert rows["write"].layers == len(table.layers) == (3 if name == "bert" else 6)


def test_of_two_stacks_the_one_whose_activations_were_read_is_scored(tmp_path: Path):
    base = untrained("t5")
    config = peft.LoraConfig(target_modules=".*[.](?:o|wo)", r=4, init_lora_weights=False)
    adapted(copy.deepcopy(base), config).save_pretrained(str(tmp_path))
    delta, tokens = read_change(tmp_path, base), chain_samples(8, 9, seed=1)
    prompts = {"input_ids": tokens, "decoder_input_ids": tokens}
    with pytest.raises(InputError, match=r"2 lists of blocks \(encoder.block, decoder.block\)"):
        make_report(base, delta, prompts, title="both", rank=4)
    table = make_report(base, delta, prompts, title="one", rank=4, block_names="encoder.block").table
    assert table.layers == tuple(f"encoder.block.{index}" for index in range(3))
    rows = {row.name: row for row in table.rows}
    assert rows["write"].layers == 3
    assert rows["write"].joint is not None
    assert "head does not read" in rows["lm_head_read"].reasons["basis"]


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_prompts_are_lines_or_objects(tmp_path: Path):
    text = tmp_path / "a.txt"
    text.write_text("abc\n\nde\n")
    found = read_prompts(text, lambda words: [ord(letter) for letter in words])
    assert found["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert found["input_ids"][1].tolist() == [ord("d"), ord("e"), 0]
    objects = tmp_path / "a.jsonl"
    objects.write_text('{"input_ids": [1, 2, 3]}\n{"text": "d"}\n')
    assert read_prompts(objects, lambda words: [9])["input_ids"].tolist() == [[1, 2, 3], [9, 0, 0]]
    with pytest.raises(InputError, match=r"prompt 1 of the prompts file .* has no token"):
        read_prompts(text, lambda words: [])
    with pytest.raises(InputError, match="no tokenizer"):
        read_prompts(text, None)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused_by_name(tmp_path: Path, capsys: Any):
    planted_adapter("gpt2", tmp_path / "adapter", frame(1)[:, :R])
    untrained("llama").save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    assert run("delta", "report", tmp_path / "base", tmp_path / "adapter") == 3
    assert "transformer.h.0.attn.c_proj.weight" in capsys.readouterr().err
    other = trained_models.untrained("llama", seed=5)
    base = planted_adapter("llama", tmp_path / "mine", frame(1)[:, :R])
    saved = Delta.between(base, other)
    saved.save(tmp_path / "delta")
    with pytest.raises(InputError, match=r"made for another base: .* had the digest"):
        read_change(tmp_path / "delta", other)
    shape = Delta({"model.layers.0.mlp.down_proj.weight": torch.ones(3, 3)})
    shape.save(tmp_path / "shape")
    with pytest.raises(InputError, match=r"down_proj.weight is \[3, 3\] .*another base"):
        read_change(tmp_path / "shape", base)


def test_what_cannot_be_scored_is_one_sentence_each(tmp_path: Path):
    base = planted_adapter("llama", tmp_path, frame(1)[:, :R])
    delta = read_change(tmp_path, base)
    prompts = {"input_ids": chain_samples(15, 9, seed=1)}
    with pytest.raises(InputError, match=r"15 prompts are too few for rank 8: .* give at least 16, or --rank 7"):
        make_report(base, delta, prompts, title="few")
    with pytest.raises(InputError, match="15 positive prompts are too few"):
        make_report(base, delta, {"input_ids": chain_samples(16, 9, seed=1)}, prompts, prompts, title="few")
    with pytest.raises(InputError, match="go together"):
        make_report(base, delta, prompts, prompts, title="half a pair", rank=2)
    with pytest.raises(InputError, match="need clean ones"):
        make_report(base, delta, None, prompts, prompts, title="no clean", rank=2)
    with pytest.raises(InputError, match="below the width of the stream, 64; it is 64"):
        make_report(base, delta, title="wide", rank=64)
    with pytest.raises(InputError, match="the broad rank must be at least 1"):
        make_report(base, delta, title="narrow", broad_rank=0)
    with pytest.raises(InputError, match="and prompts to halve"):
        make_report(base, delta, title="nothing to halve", splits=3)
    with pytest.raises(InputError, match="the batch size must be 1 or more, not 0"):
        make_report(base, delta, {"input_ids": chain_samples(16, 9, seed=1)}, title="no batch", batch_size=0)
    with pytest.raises(InputError, match="no list of blocks"):
        make_report(nn.Sequential(nn.Linear(4, 4)), delta, title="flat")
    fresh = adapted(copy.deepcopy(base), configuration("llama", target_modules=WRITERS["llama"]))
    fresh.save_pretrained(str(tmp_path / "fresh"))
    with pytest.raises(InputError, match=r"the change is zero in all 6 matrices"):
        make_report(base, read_change(tmp_path / "fresh", base), title="fresh")


def test_a_file_in_place_of_the_folder_is_told_before_the_work(tmp_path: Path, capsys: Any):
    (tmp_path / "file").write_text("mine")
    assert run("delta", "report", "there-is-no-base", tmp_path, "--out", tmp_path / "file") == 3
    assert "is a file: give a folder for the report" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_an_adapter_without_lora_weights_is_refused(tmp_path: Path):
    base = untrained("llama")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    model = adapted(copy.deepcopy(base), config)
    model.save_pretrained(str(tmp_path))
    from safetensors.torch import save_file

    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="no LoRA weights"):
        read_change(tmp_path, base)


def test_a_change_that_is_not_finite_names_its_matrix():
    base = untrained("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    delta = Delta({name: torch.full((64, 192), math.inf)})
    with pytest.raises(InputError, match=rf"the change of {name} cannot be scored: it holds NaN or inf"):
        make_report(base, delta, title="infinite")


def test_a_factored_change_is_never_made_dense(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    base = planted_adapter("llama", tmp_path, frame(1)[:, :R])
    delta = read_change(tmp_path, base)
    part: Any = delta.parts["model.layers.0.mlp.down_proj.weight"]
    monkeypatch.setattr(type(part), "dense", lambda _self: pytest.fail("made dense"))
    assert weight_target(part).factor.shape == (D, R)
    assert recovery(part, frame(1)[:, :R]).ratio == pytest.approx(D / R, abs=1e-5)
