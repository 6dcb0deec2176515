"""Foreseen loss changes: exact where theory says so, and close to what trained models do.

Two oracles in float64: the Gauss-Newton quadratic 1/2 E[(J e)' (diag p - p p') (J e)], where J e is the change of the
logits (the second-order term of the KL), and squared inner products of an edit with gradients taken one by one.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
import trained_models
from scipy.stats import spearmanr
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from weightproof.curvature import Factor, Factors, fit_factors, predict_loss_change
from weightproof.curvature.eigenbasis import eigenbasis
from weightproof.curvature.factors import Source
from weightproof.curvature.fitting import correct_eigenvalues
from weightproof.curvature.prediction import loss_form, quadratic_form
from weightproof.edits import RTN, SVD, Prune
from weightproof.errors import InputError
from weightproof.numerics.matrices import seeded_generator
from weightproof.snapshots.tensor_store import tensor_digest
from weightproof.weights import iter_weight_matrices

NAMES = {
    "llama": ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight"),
    "gpt2": ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.weight"),
}
EITHER = pytest.mark.parametrize("model_name", NAMES)


def drawn(*shape: int, seed: str = "change") -> torch.Tensor:
    return torch.randn(*shape, generator=seeded_generator(seed, *shape), dtype=torch.float64)


def covariance(size: int, seed: str) -> torch.Tensor:
    rows = drawn(2 * size, size, seed=seed)
    return rows.T @ rows / len(rows)


def factors_of(*parts: Factor) -> Factors:
    return Factors({one.name: one for one in parts}, Source("sampled", "causal", 0, 1, ""), {})


def as_stored(model_name: str, change: torch.Tensor) -> torch.Tensor:
    return change.T if model_name == "gpt2" else change  # Conv1D keeps (d_in, d_out)


# ---- the forms ------------------------------------------------------------------------------------------------------


def test_the_form_is_the_quadratic_of_the_whole_kronecker_product():
    a, g, change = covariance(5, "a"), covariance(7, "g"), drawn(7, 5)
    whole = torch.kron(g, a)  # of the row-major vector of E
    found = predict_loss_change(factors_of(Factor("w", 9 * a, 9 * g, 9)), {"w": change * 0}, {"w": change})
    expected = 0.5 * change.flatten() @ whole @ change.flatten()
    assert found.total == pytest.approx(float(expected), rel=1e-12)


def test_corrected_eigenvalues_replace_those_of_the_factors():
    a, g, change = covariance(5, "a"), covariance(7, "g"), drawn(7, 5)
    left, right = eigenbasis(g).vectors, eigenbasis(a).vectors
    corrected = drawn(7, 5, seed="eigenvalues").square()
    basis = torch.kron(left, right)
    whole = basis @ torch.diag(corrected.flatten()) @ basis.T
    expected = float(0.5 * change.flatten() @ whole @ change.flatten())
    assert loss_form(Factor("w", 3 * a, 3 * g, 3, "", 3 * corrected))(change) == pytest.approx(expected, rel=1e-12)
    # With the factors' own eigenvalues both forms are one.
    own = torch.outer(eigenbasis(g).values, eigenbasis(a).values)
    same = loss_form(Factor("w", 3 * a, 3 * g, 3, "", 3 * own))(change)
    assert same == pytest.approx(loss_form(Factor("w", 3 * a, 3 * g, 3))(change), rel=1e-10)


@pytest.mark.parametrize("corrected", [None, torch.ones(4, 3, dtype=torch.float64)])
def test_what_is_not_finite_has_no_prediction_and_what_did_not_change_costs_nothing(corrected):
    factor = Factor("w", torch.eye(3, dtype=torch.float64), torch.eye(4, dtype=torch.float64), 4, "", corrected)
    before = drawn(4, 3)
    broken = before.clone()
    broken[1, 1] = math.nan
    found = predict_loss_change(factors_of(factor), {"w": before}, {"w": broken})
    assert found.by_matrix == {"w": None}
    assert found.total is None
    assert predict_loss_change(factors_of(factor), {"w": before}, {"w": before.clone()}).total == 0.0


def test_factors_that_are_no_covariance_or_of_other_weights_or_too_few_tokens_foretell_nothing():
    before, whole = drawn(4, 3), torch.eye(4, dtype=torch.float64)
    good = Factor("w", torch.eye(3, dtype=torch.float64), whole, 4, tensor_digest(before))
    skew, broken = whole.clone(), whole.clone()
    skew[0, 1], broken[1, 1] = 1.0, math.nan
    for given, message in (
        ({"gradient_sum": skew}, "the factor G of w is not symmetric"),
        ({"gradient_sum": -whole}, "the factor G of w has negative numbers on its diagonal"),
        ({"gradient_sum": broken}, "the factor G of w holds NaN or inf"),
        ({"tokens": 3}, "fitted on 3 tokens and has 4 dimensions"),
        ({"weight_digest": "0" * 64}, "belong to other weights: w has the hash"),
    ):
        with pytest.raises(InputError, match=message):
            predict_loss_change(factors_of(replace(good, **given)), {"w": before}, {"w": before + 1})
    assert predict_loss_change(factors_of(good), {"w": before}, {"w": before + 1}).total == pytest.approx(6 / 16)


# ---- against the model ----------------------------------------------------------------------------------------------


def gauss_newton(model, ids: torch.Tensor, parameter: str, change: torch.Tensor) -> float:
    """1/2 E[(J e)' (diag p - p p') (J e)] over the scored positions, nats per token."""
    weight = dict(model.named_parameters())[parameter].detach()

    def logits(value: torch.Tensor) -> torch.Tensor:
        return functional_call(model, {parameter: value}, (ids,)).logits[:, :-1]

    with torch.no_grad():  # central differences; a Llama's norms compute in float32, which leaves 1e-4
        moved = (logits(weight + change) - logits(weight - change)) / 2
        p = logits(weight).softmax(-1)
    return float(0.5 * ((p * moved.square()).sum(-1) - (p * moved).sum(-1).square()).mean())


def kl(model, ids: torch.Tensor, parameter: str, change: torch.Tensor) -> float:
    edited = copy.deepcopy(model)
    with torch.no_grad():
        dict(edited.named_parameters())[parameter].add_(change)
        before, after = (one(ids).logits[:, :-1].log_softmax(-1) for one in (model, edited))
    return float((before.exp() * (before - after)).sum(-1).mean())


@EITHER
def test_equals_the_exact_quadratic_where_the_kronecker_product_is_exact(model_name):
    """One scored token with always the same input: nothing is left to approximate but the draw of the labels."""
    model = trained_models.load(model_name).model.double()
    ids = torch.tensor([[5, 9]])
    data = [{"input_ids": ids.expand(512, 2)}] * 8
    factors = fit_factors(model, data, include=NAMES[model_name], progress=False)
    for name in NAMES[model_name]:
        factor = factors[name]
        change = 1e-4 * drawn(len(factor.gradient_sum), len(factor.activation_sum))
        stored = as_stored(model_name, change)
        exact = gauss_newton(model, ids, name, stored)
        to_either_side = [kl(model, ids, name, sign * stored) for sign in (1, -1)]  # the third order cancels
        assert sum(to_either_side) / 2 == pytest.approx(exact, rel=1e-3)
        assert loss_form(factor)(change) == pytest.approx(exact, rel=0.1)  # 4096 draws
        # With every label at its own probability the draw is gone too.
        enumerated = Factor(name, factor.activation_covariance, exact_gradients(model, model_name, ids, factor), 1)
        assert loss_form(enumerated)(change) == pytest.approx(exact, rel=1e-5 if model_name == "gpt2" else 1e-3)


def exact_gradients(model, model_name: str, ids: torch.Tensor, factor: Factor) -> torch.Tensor:
    """G = sum_y p_y g_y g_y' for one scored token; g from the weight's gradient g a'."""
    weight = dict(model.named_parameters())[factor.name]
    # The input up to its sign, with which g changes too.
    direction = eigenbasis(factor.activation_covariance)
    a = direction.vectors[:, 0] * direction.values[0].sqrt()
    logits = model(ids).logits[0, 0]
    total = torch.zeros(len(factor.gradient_sum), len(factor.gradient_sum), dtype=torch.float64)
    for y, p in enumerate(logits.softmax(-1).detach()):
        loss = -logits.log_softmax(-1)[y]
        (slope,) = torch.autograd.grad(loss, weight, retain_graph=True)
        g = as_stored(model_name, slope) @ a / a.square().sum()
        total += p * torch.outer(g, g)
    return total


@EITHER
def test_corrected_eigenvalues_are_exact_in_every_direction_of_the_basis(model_name):
    """E[(u' g)^2 (v' a)^2] / 2 is what u v' costs; the product of two means is not."""
    model = trained_models.load(model_name).model.double()
    name = NAMES[model_name][1]
    ids = trained_models.chain_samples(48, 2, seed=3)
    data = [{"input_ids": ids}]
    options = {"labels": "empirical", "require_full_rank": False, "progress": False}
    plain = fit_factors(model, data, include=name, **options)[name]
    corrected = correct_eigenvalues(factors_of_fit(model, data, name, options), model, data, progress=False)[name]
    left, right = eigenbasis(plain.gradient_covariance).vectors, eigenbasis(plain.activation_covariance).vectors
    slopes = [as_stored(model_name, slope) for slope in per_window_gradients(model, ids, name)]
    misses = {"plain": [], "corrected": []}
    for i, j in ((0, 0), (0, 1), (1, 0), (2, 3), (4, 1)):
        change = torch.outer(left[:, i], right[:, j])
        exact = 0.5 * sum(float((slope * change).sum()) ** 2 for slope in slopes) / len(slopes)
        assert loss_form(corrected)(change) == pytest.approx(exact, rel=1e-8)
        misses["plain"].append(abs(math.log(loss_form(plain)(change) / exact)))
    assert max(misses["plain"]) > 0.05


def factors_of_fit(model, data, name, options) -> Factors:
    return fit_factors(model, data, include=name, **options)


def per_window_gradients(model, ids: torch.Tensor, name: str) -> list[torch.Tensor]:
    weight = dict(model.named_parameters())[name]
    found = []
    for row in ids:
        loss = cross_entropy(model(row[None, :]).logits[0, :-1], row[1:], reduction="sum")
        found.append(torch.autograd.grad(loss, weight)[0])
    return found


# ---- on trained models (benchmarks/curvature.py has the full comparison) --------------------------------------------


class Scene:
    """A trained model, its factors, and the KL of an edit on held-out windows."""

    def __init__(self, model_name: str) -> None:
        recipe = trained_models.RECIPES[model_name]
        self.model = trained_models.load(model_name).model
        data = [{"input_ids": one["input_ids"]} for one in trained_models.make_windows(recipe, 8, 50_000)]
        self.factors = fit_factors(self.model, data, progress=False)
        self.matrices = {one.name: one for one in iter_weight_matrices(self.model) if one.name in self.factors}
        self.before = {name: one.load().clone() for name, one in self.matrices.items()}
        self.ids = torch.cat([one["input_ids"] for one in trained_models.make_windows(recipe, 4, 20_000)])
        self.base = self.read()

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        return self.model(input_ids=self.ids).logits[:, :-1].double().log_softmax(-1)

    def edited(self, plan, names=None) -> dict[str, torch.Tensor]:
        names = list(self.matrices) if names is None else names
        return {name: value for name in names if (value := plan(self.matrices[name])) is not None}

    def kl(self, after: dict[str, torch.Tensor]) -> float:
        with torch.no_grad():
            for name, value in after.items():
                self.matrices[name].load().copy_(value)
            now = self.read()
            for name, value in self.before.items():
                self.matrices[name].load().copy_(value)
        return float((self.base.exp() * (self.base - now)).sum(-1).mean())


@pytest.fixture(scope="module", params=tuple(NAMES))
def scene(request):
    return Scene(request.param)


def test_predictions_rank_edits_and_have_their_size(scene):
    names = list(scene.matrices)
    plans = [RTN(bits).plan for bits in (8, 6, 4, 3, 2)]
    plans += [Prune(share).plan for share in (0.1, 0.3, 0.5, 0.7)] + [SVD(rank=rank).plan for rank in (56, 32, 8)]
    edits = [scene.edited(plan) for plan in plans]
    edits += [scene.edited(RTN(2).plan, [name]) for name in names[::3]]
    told = [predict_loss_change(scene.factors, scene.before, scene.before | after).total for after in edits]
    found = [scene.kl(after) for after in edits]
    assert spearmanr(told, found).statistic >= 0.95
    squares = [sum(float((scene.before[n] - v).square().sum()) for n, v in after.items()) for after in edits]
    assert spearmanr(squares, found).statistic < spearmanr(told, found).statistic
    small = [math.log(p / k) for p, k in zip(told, found, strict=True) if k < 0.02]
    assert len(small) >= 8
    assert abs(sum(small) / len(small)) < math.log(1.3)
    assert max(map(abs, small)) < math.log(2.5)


def test_the_damaged_matrix_is_blamed(scene):
    """Every matrix is rounded to 8 bits, and one, each in its turn, to 2."""
    rounded = scene.before | scene.edited(RTN(8).plan)
    for name in scene.matrices:
        after = rounded | scene.edited(RTN(2).plan, [name])
        assert predict_loss_change(scene.factors, scene.before, after).ranked()[0][0] == name


def test_an_indefinite_factor_foretells_nothing():
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)  # eigenvalues 3 and -1
    change = torch.tensor([[1.0, -1.0], [0.0, 0.0]], dtype=torch.float64)  # along the negative one
    assert quadratic_form(change, indefinite, torch.eye(2, dtype=torch.float64)) is None
    along = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert quadratic_form(along, indefinite, torch.eye(2, dtype=torch.float64)) == pytest.approx(3.0)
