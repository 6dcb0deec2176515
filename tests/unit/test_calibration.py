"""Calibration on models: what is measured is what guards judge, the model stays as it was, a run can be interrupted."""

from __future__ import annotations

import json
import math
from contextlib import closing

import pytest
import torch
import transformers
from trained_models import VOCAB_SIZE, calibration_windows, load, nll, untrained

from weightproof import GuardSession, load_policy
from weightproof.calibration.calibrating import calibrate, refit
from weightproof.calibration.drawing import PRESERVING_SHARE, Choices, EditDraw, draw
from weightproof.calibration.measuring import Bench
from weightproof.calibration.output import save
from weightproof.calibration.preserving_edits import KINDS, PERMUTE, UP, VALUES
from weightproof.calibration.splitting import halves
from weightproof.cli import main
from weightproof.edits import RTN
from weightproof.errors import BaselineError, InputError
from weightproof.probes import digest_of, read_tensors

BALANCED = load_policy("balanced")


def digest(model) -> str:
    return digest_of(read_tensors(model, {}, ()))


# ---------------------------------------------------------------- what is measured


def test_what_is_measured_is_what_a_session_judges_and_the_truth_is_that_of_the_other_half():
    trained, retain = load("llama"), calibration_windows("llama", 12)
    before = digest(trained.model)
    bench = Bench(trained.model, BALANCED, retain)
    found = bench.measure(EditDraw(0, 5, "rtn", {"bits": 4, "granularity": "channel"}))
    assert digest(trained.model) == before
    given, hidden = (half.data for half in halves(retain, trained.model))
    with closing(GuardSession(trained.model, policy="balanced", retain=given)) as session:
        old = [nll("llama", trained.model, window).item() for window in hidden]
        step = session.apply(RTN(bits=4), on_violation="monitor")
        new = [nll("llama", trained.model, window).item() for window in hidden]
    told: dict[tuple[str, str], list] = {}
    for verdict in step.verdicts:
        for one in verdict.measurements:
            told.setdefault((one.guard, one.statistic), []).append(one)
    for key, name in (
        (("divergence", "kl"), "kl"),
        (("circuits", "relative_distance"), "distance"),
        (("variance", "log_second_moment_ratio"), "band"),
    ):
        assert found.statistics[name] == pytest.approx(max(abs(one.value) for one in told[key]), rel=1e-6)
    for one in told["spectral", "log_norm_collapse_ratio"]:
        assert abs(one.value) <= found.statistics.get(f"kappa_collapse/{one.family}", 0.0) * (1 + 1e-9)
    assert all(found.statistics[f"kappa/{family}"] <= 0.15 for family in ("attn", "ffn"))
    # A session counts outliers by bounds: what is exact lies within what it says.
    lost = {one.family: one.value for one in told["rmt", "num_spikes_lost"]}
    assert all(
        found.statistics.get(f"spikes_moved/{family}", 0.0) <= 2 * max(value, 1) + 1 for family, value in lost.items()
    )
    true = (sum(new) - sum(old)) / len(hidden)
    assert found.truth is not None
    assert found.truth.delta == pytest.approx(true, rel=1e-3)
    assert found.truth.lower < true < found.truth.upper


ADMITTED = {
    "gpt2": {PERMUTE, VALUES},
    "llama": {PERMUTE, VALUES, UP},
    "bert": {PERMUTE, VALUES},
    "t5": {PERMUTE, VALUES},
}


def fused(name: str) -> torch.nn.Module:
    """Models that keep query, key and value, or gate and up, in one matrix."""
    shared = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shared |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "neox":
            return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shared)).eval()
        return transformers.Phi3ForCausalLM(transformers.Phi3Config(**shared, num_key_value_heads=2)).eval()


@pytest.mark.parametrize("name", [*ADMITTED, "neox", "phi3"])
def test_edits_that_preserve_the_function_do_so_and_move_the_matrices(name):
    model = untrained(name) if name in ADMITTED else fused(name)
    with torch.no_grad():  # biases that matter
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before = digest(model)
    bench = Bench(model, BALANCED)
    wanted = ADMITTED.get(name, {PERMUTE, VALUES} | ({UP} if name == "phi3" else set()))
    assert set(bench.choices.preserving) == wanted
    assert [note.partition(":")[0] for note in bench.notes] == [kind for kind in KINDS if kind not in wanted]
    for kind in wanted:
        found = bench.measure(EditDraw(0, 3, kind, {"factor": 9.0}, preserving=True)).statistics
        assert found.get("kl", found.get("hidden_error")) < 1e-6
        assert found["num_matrices"] >= 4
        if kind != PERMUTE:
            assert max(value for key, value in found.items() if key.startswith("kappa/")) > 0.3
            assert found["distance"] < 1e-4
    assert digest(model) == before


def test_a_model_that_does_not_admit_a_permutation_says_so():
    model = untrained("gpt2")
    size = 4 * model.config.n_embd
    for block in model.transformer.h:  # neurons that are told apart by where they are
        block.mlp.c_fc.register_forward_hook(lambda module, inputs, output: output * torch.linspace(-3, 3, size))
    bench = Bench(model, BALANCED)
    assert PERMUTE not in bench.choices.preserving
    assert any(note.startswith(f"{PERMUTE}: moves the outputs") for note in bench.notes)


def test_draws_are_independent_of_each_other_and_of_all_kinds():
    choices = Choices(("h.0", "h.1"), ("attn", "ffn"), (PERMUTE,))
    drawn = [draw(7, number, choices) for number in range(1200)]
    assert drawn[5] == draw(7, 5, choices) != draw(8, 5, choices)
    assert {one.kind for one in drawn} == {"cast", "rtn", "noise", "prune", "svd", "scale", PERMUTE}
    share = sum(one.preserving for one in drawn) / len(drawn)
    assert share == pytest.approx(PRESERVING_SHARE, abs=0.04)
    assert {one.where for one in drawn} == {"all", "block h.0", "block h.1", "family attn", "family ffn"}
    safe = [draw(7, number, Choices((), ("ffn",), (), safe=True)) for number in range(200)]
    assert {one.kind for one in safe} == {"cast", "rtn", "noise"}
    assert all(one.params.get("bits", 8) == 8 and one.params.get("decibels", 60.0) >= 60.0 for one in safe)


# ---------------------------------------------------------------- halves


def test_documents_stay_together_and_one_text_is_cut_in_the_middle():
    model = untrained("gpt2")
    rows = [{"input_ids": [number, number], "document": f"d{number // 3}"} for number in range(12)]
    given, hidden = (half.data for half in halves(rows, model))
    assert {row["document"] for row in given} == {"d0", "d2"}
    assert {row["document"] for row in hidden} == {"d1", "d3"}
    assert [half.data for half in halves(list(range(10)), model)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    with pytest.raises(InputError, match="one document"):
        halves([{"input_ids": [1, 2], "document": "only"}, {"input_ids": [3, 4], "document": "only"}], model)


def test_too_little_data_for_the_truth_is_refused():
    with pytest.raises(InputError, match=r"half of the retain data must tell the truth.*too little data"):
        Bench(untrained("gpt2"), BALANCED, calibration_windows("gpt2", 2))


# ---------------------------------------------------------------- a whole run


def test_a_run_that_is_interrupted_goes_on_and_gives_the_same(tmp_path):
    model, journal = untrained("gpt2"), tmp_path / "draws.jsonl"
    options = {"false_alarms": 0.3, "draws": 14, "seed": 4}
    whole = calibrate(model, **options)

    def stop(done: int, wanted: int) -> None:
        assert wanted == 14
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, journal=journal, on_draw=stop, **options)
    assert len(journal.read_text().splitlines()) == 6
    journal.write_text(journal.read_text() + '{"number": 5, "ed')  # killed in the middle of a line
    made = []
    again = calibrate(model, journal=journal, on_draw=lambda done, wanted: made.append(done), **options)
    assert made == list(range(6, 15))
    assert [one.statistics for one in again.draws][5:] == [one.statistics for one in whole.draws][5:]
    assert again.fit.limits.keys() == whole.fit.limits.keys()
    with pytest.raises(InputError, match="'seed' differs"):
        calibrate(model, journal=journal, **{**options, "seed": 5})
    assert all(one.label(1.05) == "benign" and one.truth is None for one in again.draws)
    assert again.provenance.data_digest is None
    assert "harmless by construction" in again.provenance.distribution


def test_a_model_whose_outputs_are_not_finite_or_that_cannot_be_run_is_refused():
    model = untrained("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[0] = math.nan
    with pytest.raises((BaselineError, InputError)):
        Bench(model, BALANCED)
    with pytest.raises(InputError, match="cannot be calibrated"):
        Bench(torch.nn.Linear(4, 4), BALANCED)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main(["calibrate", *(str(one) for one in arguments)])
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    untrained("llama").save_pretrained(folder / "model")
    rows = torch.randint(3, VOCAB_SIZE, (400, 24), generator=torch.Generator().manual_seed(2)).tolist()
    (folder / "retain.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return folder


def test_the_verb_writes_a_policy_with_its_evidence_and_fits_again_without_the_model(scene, tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    given = scene / "model", "--retain", scene / "retain.jsonl", "-o", out, "--draws", 20, "--false-alarms", 0.3
    assert run(*given) == 0
    shown = capsys.readouterr().out
    assert "20 edits drawn (truth measured)" in shown
    assert "divergence kl" in shown
    assert "judged on draws that fixed no limit" in shown
    policy, beside = load_policy(out), json.loads((tmp_path / "mine.draws.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.draws.json", "mine.yaml"]
    assert policy.limits["divergence"]["kl"] == beside["fit"]["limits"]["divergence"]["kl"]
    source = policy.sources["limits.divergence.kl"]
    for words in (
        "weightproof calibrate",
        "20 draws (seed 0)",
        beside["provenance"]["model_digest"][:16],
        "0.3",
        "0.95",
    ):
        assert words in source
    assert len(beside["draws"]) == 20
    assert all(row["truth"] is not None for row in beside["draws"])
    assert run(*given) == 3  # nothing is replaced
    assert "exists" in capsys.readouterr().err
    again = tmp_path / "again.yaml"
    assert run("--from", tmp_path / "mine.draws.json", "-o", again) == 0
    capsys.readouterr()
    assert load_policy(again).limits == policy.limits
    stricter = refit(tmp_path / "mine.draws.json", tier="aggressive", false_alarms=0.4)
    assert stricter.fit.tier == "aggressive"
    with pytest.raises(InputError, match="exists"):
        save(stricter, out)
    assert run("--from", tmp_path / "mine.draws.json", "-o", again, "--force", "--false-alarms", 0.01) == 3
    assert "too few benign draws" in capsys.readouterr().err
    assert load_policy(again).limits == policy.limits


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{model}", "--draws", 6, "-o", "{out}"), "too few benign draws: 4 of 6"),
        (("{model}", "--draws", 0, "-o", "{out}"), "--draws must be at least 1"),
        (("{model}", "--false-alarms", 0, "-o", "{out}"), "must lie between 0 and 1"),
        (("{model}", "--tier", "mild", "-o", "{out}"), "a calibration extends a tier"),
        (("{model}", "-o", "{out}.json"), "a policy file ends in .yaml"),
        (("{missing}", "-o", "{out}"), "there is no folder"),
        (("-o", "{out}"), "name a model to calibrate"),
        (("--from", "{retain}", "-o", "{out}"), "is no file of draws"),
        (("--from", "{missing}", "-o", "{out}"), "cannot be read"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_no_policy(scene, tmp_path, capsys, arguments, words):
    names = {"model": scene / "model", "retain": scene / "retain.jsonl"}
    names |= {"out": tmp_path / "out.yaml", "missing": tmp_path / "nowhere"}
    assert run(*(str(one).format(**names) for one in arguments)) == 3
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("*.yaml"))


def test_a_broken_model_is_refused_and_nothing_is_written(scene, tmp_path, capsys):
    model = untrained("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    model.save_pretrained(tmp_path / "broken")
    assert run(tmp_path / "broken", "-o", tmp_path / "out.yaml", "--draws", 12, "--false-alarms", 0.3) == 3
    assert "error:" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
