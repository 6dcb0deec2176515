"""The detection benchmark's figures against slow ways to get them, and its edits against what they promise."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import build

FOLDER = Path(__file__).parents[2] / "benchmarks" / "detection"
sys.path.insert(0, str(FOLDER))

import adversarial  # noqa: E402
import measure  # noqa: E402
import plot  # noqa: E402
import run  # noqa: E402
import score  # noqa: E402

sys.path.remove(str(FOLDER))
TAU = score.TAU


def row(case: str, lower: float, upper: float, **given: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": "llama-0", "case": case, "group": "one matrix", "declared": False, "broken": False,
        "preserving": False, "block": None, "blamed": [], "action": "KEEP", "check_seconds": 1.0,
        "truth": {"delta": (lower + upper) / 2, "lower": lower, "upper": upper, "max_logit": None},
        "outcomes": {"invariants": "PASS"}, "statistics": {}, "situations": {"all": "loss_accepts"},
    }  # fmt: skip
    return values | given


HARM, CALM = (2 * TAU, 3 * TAU), (0.0, TAU / 4)

# ---------------------------------------------------------------- truth


def test_an_edit_is_judged_by_its_whole_interval():
    assert score.truth_of(row("a", *HARM)) == "harmful"
    assert score.truth_of(row("b", *CALM)) == "benign"
    assert score.truth_of(row("c", TAU / 4, TAU * 2)) == "grey"
    assert score.truth_of(row("d", 0.0, TAU * 0.6)) == "grey"
    assert score.truth_of(row("e", math.inf, math.inf)) == "harmful"


def test_an_edit_that_should_preserve_and_moves_a_logit_is_neither():
    same = {"delta": 0.0, "lower": 0.0, "upper": 0.0, "max_logit": 5e-5}
    assert score.truth_of(row("a", 0.0, 0.0, preserving=True, truth=same)) == "benign"
    assert score.truth_of(row("b", 0.0, 0.0, preserving=True, truth=same | {"max_logit": 2e-4})) == "not preserved"


# ---------------------------------------------------------------- figures


def test_the_area_is_the_share_of_pairs_in_order():
    generator = np.random.default_rng(0)
    harmful, benign = generator.integers(0, 6, 40).astype(float), generator.integers(0, 5, 30).astype(float)
    pairs = [1.0 if bad > good else 0.5 * (bad == good) for bad, good in itertools.product(harmful, benign)]
    assert score.auroc(harmful, benign) == pytest.approx(np.mean(pairs))


def test_the_threshold_flags_no_more_of_the_benign_than_allowed():
    generator = np.random.default_rng(1)
    harmful, benign = generator.normal(2, 1, 300), generator.normal(0, 1, 250)
    for rate in (0.0, 0.01, 0.1, 1.0):
        found, threshold = score.tpr_at(harmful, benign, rate)
        assert (benign > threshold).mean() <= rate
        assert found == (harmful > threshold).mean()
    assert score.tpr_at(harmful, benign, 1.0)[0] == 1.0
    assert score.tpr_at(np.ones(3), np.ones(3), 0.01)[0] == 0.0  # ties are not told apart


def test_intervals_of_shares_hold_the_true_share_as_often_as_they_say():
    generator = np.random.default_rng(2)
    inside = []
    for _ in range(300):
        found = score.share(list(generator.random(60) < 0.9))
        inside.append(found["lower"] <= 0.9 <= found["upper"])
    assert np.mean(inside) >= 0.94
    assert score.share([]) == {"value": None, "lower": None, "upper": None, "hits": 0, "of": 0}
    assert score.share([True] * 300)["lower"] == pytest.approx(0.025 ** (1 / 300))


def test_what_is_not_finite_scores_above_all_and_what_was_not_measured_below():
    failed = {"outcomes": {"invariants": "PASS", "loss": "FAIL"}}
    rows = [
        row("a", *HARM, statistics={"loss/s": math.inf}),
        row("not finite any more", *HARM, **failed),
        row("not measured", *HARM),
        row("b", *HARM, statistics={"loss/s": 3.0}),
        row("c", *CALM, statistics={"loss/s": 1.0}),
    ]
    infinite, broken, missing, finite, calm = score.scores_of(rows, "loss/s")
    assert missing == 0.0 < calm < finite < broken == infinite < math.inf
    some_have_none = [*rows, row("d", *CALM)]
    assert score.scores_of(some_have_none, "loss/s")[1] == 0.0


def test_ablations_decide_again_from_the_outcomes_of_the_others():
    outcomes = {
        "invariants": "PASS",
        "divergence": "FAIL",
        "variance": "WARN",
        "loss": "FAIL",
        "subspace": "NOT_MEASURED",
    }
    found = score.with_ablations([row("a", *HARM, outcomes=outcomes)])[0]["situations"]
    assert set(found) == {"all", *(f"outputs without {name}" for name in ("invariants", "divergence", "variance"))}
    assert found["outputs without variance"] == "outputs_reject"
    assert found["outputs without divergence"] == "no_forward_weights_warned"


def test_weights_alone_find_what_lies_beyond_every_benign_edit_or_breaks_its_contract():
    far = {score.WEIGHT_STATISTIC: 0.5}
    near = {score.WEIGHT_STATISTIC: 0.2}
    rows = [
        row("benign", *CALM, statistics=near),
        row("found", *HARM, statistics=far),
        row("missed", *HARM, statistics=near),
        row("contract", *HARM, declared=True, broken=True, outcomes={"invariants": "FAIL"}),
        row("as declared", *CALM, declared=True),
        row("a wrong declaration does not raise the threshold", *CALM, declared=True, broken=True, statistics=far),
        row("other seed", *HARM, model="llama-1", statistics=far),
        row("other seed, flagged", *CALM, model="llama-1", statistics={score.WEIGHT_STATISTIC: 0.3}),
    ]
    found = score.weights_alone(rows)
    assert (found["undeclared"]["thresholds"], found["undeclared"]["tpr"]["hits"]) == ({"llama": 0.3}, 2)
    assert found["undeclared"]["fpr"]["hits"] == 0
    assert found["undeclared"]["held_out"]["fpr"]["hits"] == 1
    assert found["undeclared"]["held_out"]["tpr"]["hits"] == 1
    assert found["declared"]["tpr"]["value"] == 1.0


def test_a_wrong_declaration_that_does_no_harm_is_no_false_alarm():
    rows = [
        row("rightly taken back", *CALM, declared=True, broken=True, situations={"all": "t0_fail"}),
        row("false alarm", *CALM, situations={"all": "outputs_reject"}),
        row("missed", *HARM),
    ]
    found = score.by_choice(rows)["all"]
    assert found["false_alarms"] == ["llama-0: false alarm"]
    assert found["missed"] == ["llama-0: missed"]
    assert found["broken_declarations_benign"]["value"] == 1.0


def test_that_nothing_changed_is_no_claim_of_harm():
    quiet = row("nothing", *CALM, situations={"weights": "no_forward_weights_warned"})
    assert score.is_flagged(quiet, "weights", {})
    assert not score.is_flagged(quiet | {"statistics": {"invariants/no_op": 1.0}}, "weights", {})


def test_a_tier_ranks_a_broken_contract_above_every_statistic():
    rows = [
        row("found", *HARM, statistics={"loss/difference": 0.3}, outcomes={"invariants": "PASS", "loss": "FAIL"}),
        row("contract", *HARM, statistics={"loss/difference": 0.0}, outcomes={"invariants": "FAIL", "loss": "PASS"}),
        row("calm", *CALM, statistics={"loss/difference": 0.01}, preserving=True,
            truth={"delta": 0.0, "lower": 0.0, "upper": 0.0, "max_logit": 0.0}),
        row("rightly taken back", *CALM, declared=True, broken=True, statistics={"loss/difference": 0.01},
            outcomes={"invariants": "FAIL"}),
    ]  # fmt: skip
    found = score.by_tier(rows)
    assert found["T0 to T3"]["auroc"]["value"] == 1.0
    assert found["T0 to T3"]["n_preserving"] == 1
    assert found["T0 and T1"]["auroc"]["value"] == pytest.approx(0.75)  # one found, one as quiet as the benign


# ---------------------------------------------------------------- files


def test_rows_end_where_a_run_was_interrupted_and_other_limits_make_them_again(tmp_path, monkeypatch):
    recipe = measure.Recipe("llama", 0)
    monkeypatch.setattr(measure, "CACHE", tmp_path)
    now = measure.what_decides()
    made = [{"version": measure.VERSION, "policy": policy, "case": case} for case, policy in (("a", now), ("b", "old"))]
    text = "".join(f"{json.dumps(one)}\n" for one in made) + '{"version": 1, "pol'
    (tmp_path / f"rows-{recipe.folder.name}.jsonl").write_text(text, encoding="utf-8")
    assert [one["case"] for one in measure.current_rows(recipe)] == ["a"]


def test_points_picture_and_page_hold_every_edit(tmp_path):
    rows = [row("a", *HARM), row("b", math.inf, math.inf), row("c", *CALM)]
    found = score.points(rows)
    score.write_points(found, tmp_path / "points.csv")
    with (tmp_path / "points.csv").open(encoding="utf-8") as file:
        assert [one["case"] for one in csv.DictReader(file)] == ["a", "b", "c"]
    assert plot.picture(found, TAU).startswith(b"\x89PNG")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{run.BEGIN}\nold\n{run.END}\nafter\n", encoding="utf-8")
    run.write_page(page, "new")
    run.write_page(page, "newer")
    assert page.read_text(encoding="utf-8") == f"before\n{run.BEGIN}\n\nnewer\n\n{run.END}\nafter\n"


# ---------------------------------------------------------------- edits that deceive


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_reading_in_another_order_moves_the_outputs_and_no_singular_value(architecture):
    model = build(architecture).eval()
    for parameter in model.parameters():  # gains that differ, as after training
        if parameter.ndim == 1:
            parameter.data.add_(torch.rand_like(parameter) * 0.3)
    before = copy.deepcopy(model)
    with torch.no_grad():
        adversarial.read_in_another_order(model, torch.Generator().manual_seed(0))
        ids = torch.arange(12)[None] + 5
        assert not torch.allclose(model(input_ids=ids).logits, before(input_ids=ids).logits, atol=1e-3)
    moved = 0
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        moved += not torch.equal(ours, theirs)
        if ours.ndim == 2:
            assert torch.allclose(torch.linalg.svdvals(ours), torch.linalg.svdvals(theirs), atol=1e-4)
        assert ours.detach().abs().sum() == pytest.approx(float(theirs.detach().abs().sum()), rel=1e-5)
    assert moved
