"""Steering as an edit: planned, judged by the contract of a merge, refused for another base, usable in a recipe."""

from __future__ import annotations

import copy

import pytest
import torch
import trained_models
from edit_cases import Session, matrices, small_mlp

from weightproof import Action, Delta, GuardSession, InputError, edits, kinds, steer
from weightproof.deltas import LowRank
from weightproof.edits import Edit, Steer
from weightproof.judgement.plans import prepared, selected
from weightproof.recipe import load_recipe
from weightproof.types import Outcome
from weightproof.verification.kind import kind_of

FIRST = "mlp.0.weight"  # of small_mlp


def a_delta(model, seed=0, **metadata):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, matrix in matrices(model).items():
        left = torch.randn(matrix.d_out, 2, generator=generator)
        found[name] = LowRank(left, torch.randn(2, matrix.d_in, generator=generator))
    first = next(iter(found))
    return Delta({**found, first: found[first].dense()}, metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_plan_is_pure_and_what_a_steering_writes(dtype):
    model = small_mlp().to(dtype)
    delta = a_delta(model)
    edit = edits.steer(delta, 0.3)
    assert isinstance(edit, Edit)
    before = copy.deepcopy(model.state_dict())
    planned = {name: edit.plan(matrix) for name, matrix in matrices(model).items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with steer(model, delta, 0.3):
        for name, values in planned.items():
            assert values is not None
            assert values.dtype == dtype
            assert torch.equal(values, model.state_dict()[name])


def test_its_contract_is_that_each_matrix_grew_by_alpha_d_once():
    model = small_mlp()
    delta = a_delta(model)
    edit = Steer(delta, -0.5)
    for name, matrix in matrices(model).items():
        before, after = matrix.load(), edit.plan(matrix)
        assert after is not None
        (reading,) = edit.kind.measure(name, before, after)
        assert reading.value is not None
        assert reading.value <= reading.limit
        (twice,) = edit.kind.measure(name, before, before - 2 * 0.5 * delta.dense(name))
        assert twice.value == pytest.approx(1.0)
        assert "twice" in (twice.reason or "")


def test_names_shapes_and_base_are_checked_before_planning():
    model = small_mlp()
    delta = a_delta(model)
    wrong = Delta({"mlp.0.wieght": delta.parts[FIRST]})
    with pytest.raises(InputError, match=r"did you mean 'mlp\.0\.weight'"):
        prepared(edits.steer(wrong), Session(model))
    other = Delta(delta.parts, {"base": {"digests": {FIRST: "0" * 64}}})
    with pytest.raises(InputError, match="made for another base"):
        prepared(edits.steer(other), Session(model))
    assert prepared(edits.steer(other, same_base=False), Session(model)).alpha == 1.0
    with pytest.raises(InputError, match="alpha is 0"):
        edits.steer(delta, 0.0)


def test_what_is_excluded_is_not_promised():
    model = small_mlp()
    edit = prepared(Steer(a_delta(model), exclude=(FIRST,)), Session(model))
    assert FIRST not in edit.kind.expected
    assert FIRST not in {one.name for one in selected(model, edit)}
    assert edit.kind.expected


def test_a_guarded_steering_is_kept_or_restored_and_says_what_it_added():
    trained = trained_models.load("llama")
    session = GuardSession(trained.model)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = matrices(trained.model)[name].load()
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(weight.shape[0], 1, generator=generator), torch.randn(1, weight.shape[1], generator=generator)
    delta = Delta({name: LowRank(u / u.norm(), v / v.norm())}, {"base": {"name": "tiny"}, "mode": "planted"})
    was, before = session.model_digest, weight.clone()
    large = session.apply(edits.steer(delta, 60.0))
    assert large.decision is not None
    assert (large.decision.action, large.applied) == (Action.ROLLBACK, "restored")
    assert session.model_digest == was
    small = session.apply(edits.steer(delta, 0.01))
    assert small.decision is not None
    assert (small.decision.action, small.applied) == (Action.KEEP, "kept")
    assert torch.allclose(matrices(trained.model)[name].load(), before + 0.01 * delta.dense(name), atol=1e-7)
    record = small.record
    assert record is not None
    assert record.params["delta"] == {"mode": "planted", "source": None, "base": "tiny", "digest": delta.digest}
    merge = next(one for one in record.contract if one.statistic == "merge_error")
    assert merge.value is not None
    assert merge.value <= merge.limit
    assert next(one for one in small.verdicts if one.guard == "invariants").outcome is Outcome.PASS
    again = kind_of(record, delta, {})  # what a verifier makes of the record, who has the delta
    assert isinstance(again, kinds.LoraMerge)
    (reading,) = again.measure(name, before, before + 0.01 * delta.dense(name))
    assert reading.value is not None
    assert reading.value <= reading.limit
    assert kind_of(record, delta.scaled(2.0), {}) is None
    assert kind_of(record, None, {}) is None
    larger = Delta({**delta.parts, "lm_head.weight": torch.ones(40, 64)}, delta.metadata)
    assert isinstance(kind_of(record, larger, {}), kinds.LoraMerge)  # of which only that matrix was chosen
    session.close()


def test_a_trial_leaves_no_trace():
    trained = trained_models.load("llama")
    session = GuardSession(trained.model)
    was = session.model_digest
    delta = Delta({"lm_head.weight": 1e-4 * torch.ones_like(trained.model.get_output_embeddings().weight)})
    step = session.trial(edits.steer(delta))
    assert step.decision is not None
    assert (step.decision.action, step.applied) == (Action.KEEP, "restored")
    assert (session.history, session.model_digest) == ((), was)
    kept = session.apply(edits.steer(delta))
    assert kept.decision is not None
    assert kept.decision.action is step.decision.action
    assert kept.step == 1
    assert kept.record is not None
    assert kept.record.stray_names == ()
    session.close()


def test_a_recipe_names_a_delta_by_its_path(tmp_path):
    path = a_delta(small_mlp()).save(tmp_path / "style.safetensors")
    text = f"model: demo\nedits:\n  - edit: steer\n    delta: {path}\n    alpha: 0.25\n"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    (step,) = load_recipe(recipe).steps
    edit = step.make()
    assert isinstance(edit, Steer)
    assert (edit.name, edit.content.digest) == ("steer-0.25", Delta.load(path).digest)
    recipe.write_text(text.replace("style", "missing"))
    with pytest.raises(InputError, match="no delta at"):
        load_recipe(recipe)
