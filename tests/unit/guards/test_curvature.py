"""The curvature guard: what a change should cost and which matrix is to blame. Advice: it decides nothing."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from hand_readings import after, baseline
from torch import nn
from trained_models import RECIPES, load, make_windows

from weightproof import Action, GuardSession, InputError, Outcome, edits, fit_factors, load_policy
from weightproof.certifying.form import content_of
from weightproof.curvature import Factors, predict_loss_change
from weightproof.curvature.fitting import correct_eigenvalues
from weightproof.errors import PolicyError
from weightproof.guards.curvature import Curvature, CurvatureLimits
from weightproof.judgement.judging import GUARDS, Judged, decide_on, is_asked, judge_all
from weightproof.policy import decide
from weightproof.readings.readings_json import readings_json, readings_of
from weightproof.registry import plugins
from weightproof.types import CurvatureReading, LossForecast, Verdict
from weightproof.verification.result import Findings
from weightproof.verification.verdicts import check_verdicts

UP = "model.layers.1.mlp.up_proj.weight"


def reading(name: str, predicted: float | None, relative: float | None = 0.1, reason: str | None = None):
    return CurvatureReading(name, "ffn", predicted, relative, reason)


def judge(*matrices: CurvatureReading, others: tuple[str, ...] = (), limits: CurvatureLimits | None = None) -> Verdict:
    forecast = LossForecast("f" * 64, matrices, others)
    return Curvature().judge(baseline(), replace(after(), curvature=forecast), limits or CurvatureLimits())


class TestJudgement:
    def test_the_sum_is_judged_and_the_matrix_to_blame_is_named(self):
        quiet = judge(reading("a", 0.002), reading("b", 0.004), others=("head",))
        assert (quiet.outcome, quiet.num_measured, quiet.num_eligible) == (Outcome.PASS, 2, 3)
        first = "0.006 nats per token predicted (limit 0.01); 67% of it by b; no factors for "
        assert quiet.reason == f"{first}head, which changed"
        whole, *each = quiet.measurements
        assert (whole.value, whole.limit) == (pytest.approx(0.006), 0.01)
        assert [(one.target, one.value, one.limit) for one in each] == [("a", 0.002, None), ("b", 0.004, None)]
        loud = judge(reading("a", 0.008), reading("b", 0.004))
        assert loud.outcome is Outcome.WARN
        assert "67% of it by a" in loud.reason

    def test_it_never_fails_however_large_the_prediction(self):
        assert judge(reading("a", 1e9)).outcome is Outcome.WARN

    def test_beyond_the_trust_region_it_says_that_the_quadratic_no_longer_holds(self):
        found = judge(reading("a", 0.002, 0.9), reading("b", 0.001, 0.05))
        assert "1 of 2 matrices moved by more than 30% of their norm (a by 90%)" in found.reason
        assert "quadratic no longer holds" in found.reason
        assert [one.reason is not None for one in found.measurements] == [False, True, False]
        assert "quadratic" not in judge(reading("a", 0.002, 0.9), limits=CurvatureLimits(trust=1.0)).reason
        assert "quadratic" not in judge(reading("a", 0.002, None)).reason  # its norm was zero
        assert "quadratic" not in judge(reading("a", 0.09)).reason
        assert "beyond 0.1 nats the loss is no longer quadratic" in judge(reading("a", 0.11)).reason

    def test_what_was_not_measured_is_no_pass(self):
        unread = judge(reading("a", None, None, "it is not finite"))
        assert (unread.outcome, unread.reason) == (Outcome.NOT_MEASURED, "a: it is not finite")
        partly = judge(reading("a", None, None, "it is not finite"), reading("b", 0.001))
        assert (partly.outcome, partly.num_measured, partly.num_eligible) == (Outcome.PASS, 1, 2)
        assert judge(others=("x", "y")).reason == "no factors for x and 1 more that changed"
        assert judge().reason == "no weight matrix changed"
        nothing = Curvature().judge(baseline(), after(), CurvatureLimits())
        assert (nothing.outcome, "factors=" in nothing.reason) == (Outcome.NOT_MEASURED, True)

    def test_a_change_that_costs_nothing_blames_nobody(self):
        assert judge(reading("a", 0.0)).reason == "0 nats per token predicted (limit 0.01)"

    @pytest.mark.parametrize(
        ("key", "value"), [("predicted", 0.0), ("trust", -1.0), ("holds", 0.0), ("predicted", math.nan)]
    )
    def test_wrong_limits_are_refused(self, key, value):
        with pytest.raises(PolicyError, match=key):
            CurvatureLimits(**{key: value})


class TestAdvice:
    @pytest.mark.parametrize("tier", ["conservative", "balanced", "aggressive"])
    def test_no_tier_decides_otherwise_for_a_warning(self, tier):
        policy, quiet = load_policy(tier), after()
        loud = replace(quiet, curvature=LossForecast("f", (reading("a", 5.0),)))
        pairs = [Judged(baseline(), baseline(), one) for one in (quiet, loud)]
        verdicts = [judge_all(policy, pair) for pair in pairs]
        assert set(verdicts[1]) - set(verdicts[0]) == {"curvature"}
        assert verdicts[1]["curvature"].outcome is Outcome.WARN
        without, with_it = (decide_on(policy, one, kind="unknown", step=1, world_size=1) for one in verdicts)
        assert (without.action, without.situation) == (with_it.action, with_it.situation)
        assert (without.warned, without.assurance) == (with_it.warned, with_it.assurance)

    def test_a_quiet_decision_says_what_was_advised(self):
        verdicts = [
            Verdict("divergence", Outcome.PASS, (), "", 1, 1),
            Verdict("invariants", Outcome.PASS, (), "", 1, 1),
            Verdict("curvature", Outcome.WARN, (), "5 nats", 1, 1),
        ]
        found = decide(load_policy("balanced"), verdicts, kind="unknown", step=1)
        assert (found.action, found.situation) == (Action.KEEP, "no_loss_outputs_pass_quiet")
        assert "advice, which decides nothing: curvature (5 nats)" in found.reason

    def test_it_accepts_nothing(self):
        verdicts = [
            Verdict("curvature", Outcome.PASS, (), "", 1, 1),
            Verdict("invariants", Outcome.PASS, (), "", 1, 1),
        ]
        found = decide(load_policy("aggressive"), verdicts, kind="unknown", step=1)
        assert (found.action, found.situation) == (Action.ROLLBACK, "nothing_measured")

    def test_it_can_be_required(self):
        policy = load_policy("balanced").override(required=["invariants", "curvature"])
        found = decide(policy, [Verdict("invariants", Outcome.PASS, (), "", 1, 1)], kind="unknown", step=1)
        assert (found.action, found.situation) == (Action.ROLLBACK, "required_not_measured")

    def test_without_factors_it_leaves_no_trace(self):
        assert "curvature" in plugins(GUARDS)
        assert not is_asked(Curvature(), after())
        assert "curvature" not in judge_all(load_policy("balanced"), Judged(baseline(), baseline(), after()))
        assert "curvature" not in readings_json(after())
        assert readings_of(readings_json(after())).curvature is None

    def test_readings_go_through_json(self):
        loud = replace(
            after(), curvature=LossForecast("f", (reading("a", 0.5), reading("b", None, None, "no")), ("c",))
        )
        assert readings_of(readings_json(loud)).curvature == loud.curvature


def fitted(model: nn.Module, include: str = "*.mlp.*", name: str = "llama") -> Factors:
    data = [{"input_ids": one["input_ids"]} for one in make_windows(RECIPES[name], 8, seed=70_000)]
    return fit_factors(model, data, include, progress=False)


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, Factors]:
    model = load("llama").model
    return model, fitted(model)


def verdict_of(step) -> Verdict:
    return next(one for one in step.decision.verdicts if one.guard == "curvature")


def forecast_of(step) -> LossForecast:
    assert step.judged.after.curvature is not None
    return step.judged.after.curvature


class TestSession:
    def test_any_edit_is_foretold_as_predict_loss_change_says_and_drift_adds_up(self, llama):
        model, factors = copy.deepcopy(llama[0]), llama[1]
        session = GuardSession(model, policy="aggressive", factors=factors)
        for change in (edits.RTN(bits=8), edits.RTN(bits=6)):
            step = session.apply(change)
            assert step.applied == "kept"
            expected = predict_loss_change(factors, llama[0], model)  # from the weights they were fitted at
            found = forecast_of(step)
            assert {one.name: one.predicted for one in found.matrices} == pytest.approx(dict(expected.by_matrix))
            assert found.factors == factors.digest
            assert set(found.not_covered) == set(expected.not_covered)
            assert f"of it by {expected.ranked()[0][0]}" in verdict_of(step).reason

    def test_layers_that_store_their_weights_turned_and_corrected_eigenvalues(self):
        model = load("gpt2").model
        data = [{"input_ids": one["input_ids"]} for one in make_windows(RECIPES["gpt2"], 8, seed=70_000)]
        factors = correct_eigenvalues(fit_factors(model, data, "*.c_*", progress=False), model, data, progress=False)
        changed = copy.deepcopy(model)
        session = GuardSession(changed, policy="aggressive", factors=factors)
        for bits in (8, 7):  # the second is read with the decomposition that is kept
            step = session.apply(edits.RTN(bits=bits))
            assert step.applied == "kept"
            expected = predict_loss_change(factors, model, changed)
            assert {one.name: one.predicted for one in forecast_of(step).matrices} == pytest.approx(expected.by_matrix)
        assert len(expected.by_matrix) > 4

    def test_a_fault_in_one_matrix_is_blamed_on_it_and_only_it_is_read(self, llama):
        model = copy.deepcopy(llama[0])
        session = GuardSession(model, factors=llama[1])
        with session.edit("sign flips") as step:
            model.get_parameter(UP).data.neg_()
        assert step.applied == "restored"
        (only,) = forecast_of(step).matrices
        assert (only.name, only.relative_change) == (UP, pytest.approx(2.0))
        assert verdict_of(step).outcome is Outcome.WARN
        assert f"100% of it by {UP}" in verdict_of(step).reason
        assert "quadratic no longer holds" in verdict_of(step).reason

    def test_the_rest_of_the_decision_is_what_it_is_without_factors(self, llama):
        plain, foretold = (copy.deepcopy(llama[0]) for _ in range(2))
        one = GuardSession(plain).apply(edits.RTN(bits=4)).decision
        other = GuardSession(foretold, factors=llama[1]).apply(edits.RTN(bits=4)).decision
        assert "curvature" not in [verdict.guard for verdict in one.verdicts]
        assert [verdict for verdict in other.verdicts if verdict.guard != "curvature"] == list(one.verdicts)
        assert (one.action, one.situation, one.reason) == (other.action, other.situation, other.reason)

    def test_norms_and_what_has_no_factors_are_not_measured(self, llama):
        model = copy.deepcopy(llama[0])
        session = GuardSession(model, factors=llama[1])
        with session.edit("norm") as step:
            model.model.norm.weight.data.mul_(1.0001)
        assert (verdict_of(step).outcome, verdict_of(step).reason) == (
            Outcome.NOT_MEASURED,
            "no weight matrix changed",
        )
        with session.edit("attention") as step:
            model.model.layers[0].self_attn.q_proj.weight.data.mul_(1.0001)
        because = "no factors for model.layers.0.self_attn.q_proj.weight, which changed"
        assert verdict_of(step).reason == because
        assert f"guard curvature: {because}" in session.certificate().predicate["not_tested"]

    def test_what_is_not_finite_or_gone_has_a_reason(self, llama):
        model = copy.deepcopy(llama[0])
        session = GuardSession(model, factors=llama[1])
        with session.edit("nan") as step:
            model.get_parameter(UP).data[0, 0] = math.nan
        assert verdict_of(step).reason == f"{UP}: it is not finite"
        with session.edit("gone") as step:
            model.model.layers[1].mlp.up_proj = nn.Identity()
        assert verdict_of(step).reason == f"{UP}: the model has no such matrix any more"
        with session.edit("other shape") as step:
            model.model.layers[1].mlp.up_proj = nn.Linear(3, 5, bias=False)
        assert "it changed its shape" in verdict_of(step).reason

    def test_training_moves_the_baseline_and_then_nothing_is_foretold(self, llama):
        model = copy.deepcopy(llama[0])
        session = GuardSession(model, factors=llama[1])
        session.watch()
        model.get_parameter(UP).data.mul_(1.001)
        window = session.check_window(step=1, raw_losses=[1.0])
        assert "curvature" not in [verdict.guard for verdict in window.decision.verdicts]
        assert forecast_is_absent(window)
        step = session.apply(edits.RTN(bits=8))
        assert verdict_of(step).outcome is Outcome.NOT_MEASURED
        assert "training moved it" in verdict_of(step).reason

    def test_the_certificate_holds_the_reading_and_is_judged_again_from_it(self, llama):
        session = GuardSession(copy.deepcopy(llama[0]), factors=llama[1])
        session.apply(edits.RTN(bits=4))
        certificate = session.certificate()
        content, findings = content_of(certificate), Findings()
        check_verdicts(content, findings)
        assert findings.differences == []
        stated = content.predicate.steps[-1].judged_on
        assert stated is not None
        assert content.readings[stated.after].curvature == forecast_of(session.history[-1])

    def test_partial_revert_is_foretold_anew(self, llama):
        model = copy.deepcopy(llama[0])
        session = GuardSession(model, factors=llama[1])
        with session.edit("two changes", on_violation="revert-worst") as step:
            model.get_parameter(UP).data.neg_()
            model.get_parameter("model.layers.0.mlp.up_proj.weight").data.mul_(1.00001)
        assert step.applied == "kept"
        assert UP not in [one.name for one in forecast_of(step).matrices]


def forecast_is_absent(step) -> bool:
    return step.judged is None or step.judged.after.curvature is None


class TestBadInput:
    def test_factors_of_other_weights_are_refused_by_hash_before_anything_is_read(self, llama):
        model = copy.deepcopy(llama[0])
        model.get_parameter(UP).data.mul_(1.5)
        with pytest.raises(InputError, match=rf"belong to other weights: {UP} has the hash [0-9a-f]+ here"):
            GuardSession(model, factors=llama[1])

    def test_factors_of_another_model(self, llama):
        with pytest.raises(InputError, match="belong to another model: it has no matrix"):
            GuardSession(load("gpt2").model, factors=llama[1])

    def test_factors_that_are_no_covariances(self, llama):
        one = llama[1][UP]
        skewed = one.activation_sum.clone()
        skewed[0, 1] += skewed.abs().max()
        broken = one.gradient_sum.clone()
        broken[0, 0] = math.nan
        for bad, words in (
            (replace(one, activation_sum=skewed), rf"the factor A of {UP} is not symmetric"),
            (replace(one, gradient_sum=broken), rf"the factor G of {UP} holds NaN or inf"),
            (replace(one, tokens=3), "was fitted on 3 tokens"),
        ):
            factors = replace(llama[1], by_name={**llama[1].by_name, UP: bad})
            with pytest.raises(InputError, match=words):
                GuardSession(llama[0], factors=factors)

    def test_what_is_no_factors_at_all(self, llama, tmp_path):
        with pytest.raises(InputError, match="factors must be Factors"):
            GuardSession(llama[0], factors=3)
        with pytest.raises(InputError, match="no factors at"):
            GuardSession(llama[0], factors=tmp_path / "none.safetensors")

    def test_a_file_serves_too(self, llama, tmp_path):
        path = llama[1].save(tmp_path / "f.safetensors")
        step = GuardSession(copy.deepcopy(llama[0]), factors=path).apply(edits.RTN(bits=8))
        assert verdict_of(step).outcome is Outcome.PASS

    def test_weights_are_as_they_were_after_a_refusal(self, llama):
        before = {name: tensor.clone() for name, tensor in llama[0].state_dict().items()}
        with pytest.raises(InputError):
            GuardSession(llama[0], factors=replace(llama[1], by_name={}))
        assert all(torch.equal(tensor, before[name]) for name, tensor in llama[0].state_dict().items())
