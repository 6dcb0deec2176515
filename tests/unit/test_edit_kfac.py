"""The K-FAC edit of a model: through a session, with everything that belongs to a guarded edit."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from trained_models import RECIPES, load, make_windows, untrained

from weightproof import Action, GuardSession, InputError, edits, fit_factors
from weightproof.curvature import Factors
from weightproof.curvature.fitting import correct_eigenvalues
from weightproof.curvature.projection import edit_matrix
from weightproof.snapshot import tensor_digest
from weightproof.weights import iter_weight_matrices

UP = "model.layers.1.mlp.up_proj.weight"


def data(name: str = "llama", count: int = 8) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": one["input_ids"]} for one in make_windows(RECIPES[name], count, seed=70_000)]


def fitted(model: nn.Module, include="*.mlp.*", name: str = "llama") -> Factors:
    return fit_factors(model, data(name), include, progress=False)


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, Factors]:
    model = load("llama").model
    return model, fitted(model)


def digests(model: nn.Module) -> dict[str, str]:
    return {name: tensor_digest(tensor) for name, tensor in model.state_dict().items()}


def test_it_edits_the_maps_into_hidden_layers_as_planned_and_is_judged_by_outputs(llama):
    model, factors = copy.deepcopy(llama[0]), llama[1]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    session = GuardSession(model, policy="aggressive")
    step = session.apply(edits.KFAC(factors, energy=0.999))
    assert step.decision.action is Action.KEEP
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"model.layers.{i}.mlp.{one}_proj.weight" for i in range(3) for one in ("gate", "up")}
    factor = factors[UP]
    covariances = factor.activation_covariance, factor.gradient_covariance
    expected = edit_matrix(before[UP], *covariances, 0.999)
    assert torch.equal(dict(model.named_parameters())[UP], expected)
    assert edits.KFAC(factors).params()["factors"] == factors.digest


def test_much_of_it_is_rolled_back_bit_for_bit(llama):
    model, factors = copy.deepcopy(llama[0]), llama[1]
    before = digests(model)
    step = GuardSession(model).apply(edits.KFAC(factors, energy=0.2, include="*.mlp.*"))
    assert (step.decision.action, step.applied) == (Action.ROLLBACK, "restored")
    assert digests(model) == before


def test_all_of_the_energy_changes_no_bit_and_is_told_as_no_edit(llama):
    model, factors = copy.deepcopy(llama[0]), llama[1]
    before = digests(model)
    session = GuardSession(model)
    step = session.apply(edits.KFAC(factors, energy=1.0))
    assert digests(model) == before
    assert step.record.changed_names == ()
    some = edits.KFAC(factors, energy=1.0, energies={"*layers.0.mlp.up_proj*": 0.9})
    session.apply(some, on_violation="monitor")
    assert {n for n, d in digests(model).items() if d != before[n]} == {"model.layers.0.mlp.up_proj.weight"}


def test_an_energy_of_its_own_is_found_by_names_with_and_without_weight(llama):
    of_one = edits.KFAC(llama[1], energy=0.5, energies={"*.layers.1.mlp.up_proj": 0.9})
    assert of_one.energy_of(UP) == 0.9
    assert of_one.energy_of(UP.replace("up", "gate")) == 0.5


def test_gpt2_is_edited_in_the_orientation_of_the_linear_layer():
    model = untrained("gpt2")
    factors = fitted(model, "*.c_fc*", "gpt2")
    name = "transformer.h.0.mlp.c_fc.weight"
    matrix = next(one for one in iter_weight_matrices(model) if one.name == name)
    plan = edits.KFAC(factors, energy=0.5).plan(matrix)
    stored = model.transformer.h[0].mlp.c_fc.weight
    assert plan.shape == stored.T.shape
    factor = factors[name]
    expected = edit_matrix(stored.T, factor.activation_covariance, factor.gradient_covariance, 0.5)
    assert torch.equal(plan, expected)


def test_what_it_reads_of_a_matrix_agrees_with_what_it_plans(llama):
    model, factors = llama
    matrix = next(one for one in iter_weight_matrices(model) if one.name == UP)
    readings = [edits.KFAC(factors, energy=energy).read(matrix) for energy in (0.5, 0.9, 1.0)]
    assert [one.kept_mass >= energy - 1e-9 for one, energy in zip(readings, (0.5, 0.9, 1.0), strict=True)] == [True] * 3
    assert readings[0].kept_pairs < readings[1].kept_pairs < readings[2].kept_pairs == 1.0
    assert (
        readings[0].predicted_loss_change > readings[1].predicted_loss_change > readings[2].predicted_loss_change == 0
    )
    plan = edits.KFAC(factors, energy=0.5).plan(matrix)
    weight = matrix.load()
    assert readings[0].relative_change == pytest.approx(float((plan - weight).norm() / weight.norm()), rel=1e-5)


def test_corrected_eigenvalues_sum_to_the_trace_and_never_rank_worse(llama):
    """EK-FAC's eigenvalues are the diagonal of the curvature in that basis: they keep more of it for the same pairs."""
    model, _ = llama
    plain = fitted(model, UP)
    factors = correct_eigenvalues(plain, model, data(), progress=False)
    factor = factors[UP]
    corrected = factor.corrected_sum / factor.tokens
    assert corrected.shape == (192, 64)
    assert (corrected >= 0).all()
    matrix = next(one for one in iter_weight_matrices(model) if one.name == UP)
    found = edits.KFAC(factors, energy=0.9, formula="ekfac", include=UP).read(matrix)
    assert 0.9 <= found.kept_mass < 1.0
    assert 0.0 < found.kept_pairs < 1.0
    # By hand for one pair: the sum over tokens of (u' g)^2 (v' a)^2 is at most the largest of either times the other.
    diagonal = torch.outer(
        *(
            torch.linalg.eigvalsh(m).flip(0).clamp(min=0)
            for m in (factor.gradient_covariance, factor.activation_covariance)
        )
    )
    assert corrected.sum() == pytest.approx(float(diagonal.sum()), rel=1.0)
    with pytest.raises(InputError, match="cannot be merged"):
        factors.merge(fit_factors(model, data(count=3), UP, seed=0, progress=False))


def test_factors_of_the_edited_model_differ_layer_by_layer(llama):
    model, factors = copy.deepcopy(llama[0]), llama[1]
    before = digests(model)
    edit = edits.KFAC(factors, energy=0.8, sequential=True, batches=data(), include="*.up_proj*")
    session = GuardSession(model, policy="aggressive")
    ready = edit.prepare(session)
    assert digests(model) == before
    at_once = edits.KFAC(factors, energy=0.8, include="*.up_proj*")
    matrices = {one.name: one for one in iter_weight_matrices(model)}
    first, last = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 2))
    assert torch.equal(ready.plan(matrices[first]), at_once.plan(matrices[first]))
    assert not torch.equal(ready.plan(matrices[last]), at_once.plan(matrices[last]))


def test_bad_input_is_refused_before_anything_is_written(llama, tmp_path):
    model, factors = copy.deepcopy(llama[0]), llama[1]
    before = digests(model)
    session = GuardSession(model)
    for given, message in (
        ({"energy": 1.5}, "energy"),
        ({"energies": {"*": -1}}, "energy"),
        ({"formula": "orig"}, "formula"),
        ({"sequential": True}, "batches="),
        ({"factors": 3}, "needs factors"),
        ({"factors": str(tmp_path / "none.safetensors")}, "fit them first"),
    ):
        with pytest.raises(InputError, match=message):
            edits.KFAC(**{"factors": factors} | given)
    with pytest.raises(InputError, match="corrected"):
        session.apply(edits.KFAC(factors, formula="ekfac"))
    with pytest.raises(InputError, match=r"q_proj.weight .*: it was not among the 9 matrices"):
        session.apply(edits.KFAC(factors, include="*.q_proj*"))
    for include in ("*.mlp.up_proj*", edits.KFAC(factors).include):  # a slip must not leave a matrix with another share
        with pytest.raises(InputError, match=r"energies: '\*\.down_proj' matches none of the . matrices"):
            session.apply(edits.KFAC(factors, energies={"*.down_proj": 0.9}, include=include))
    few = fit_factors(model, data(count=1)[:1], UP, require_full_rank=False, progress=False)
    few = Factors({UP: dataclasses.replace(few[UP], tokens=100)}, few.source, {})
    with pytest.raises(InputError, match="no full rank"):
        session.apply(edits.KFAC(few))
    assert digests(model) == before
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(InputError, match="other weights"):
        session.apply(edits.KFAC(factors))
