"""Controls keep as much of a matrix as the K-FAC edit does."""

from __future__ import annotations

import pytest
import torch
from trained_models import RECIPES, load, make_windows

from weightproof import InputError, edits, fit_factors
from weightproof.edits.kfac_controls import KFACControl
from weightproof.weights import iter_weight_matrices

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def scene():
    model = load("llama").model
    data = [{"input_ids": one["input_ids"]} for one in make_windows(RECIPES["llama"], 8, seed=70_000)]
    edit = edits.KFAC(fit_factors(model, data, UP, progress=False), energy=0.8)
    return edit, next(one for one in iter_weight_matrices(model) if one.name == UP)


def kept_pairs(edit, matrix, plan) -> torch.Tensor:
    bases = edit.bases(matrix.name)
    rotated = bases.gradient.vectors.T @ plan.double() @ bases.activation.vectors
    return rotated.abs() > 1e-5


def test_pairs_drawn_at_random_or_from_the_bottom_are_as_many(scene):
    edit, matrix = scene
    ours = kept_pairs(edit, matrix, edit.plan(matrix))
    assert 0 < int(ours.sum()) < ours.numel() / 2
    random, again, other = (
        kept_pairs(edit, matrix, KFACControl(edit, "random", seed).plan(matrix)) for seed in (0, 0, 1)
    )
    inverse = kept_pairs(edit, matrix, KFACControl(edit, "inverse").plan(matrix))
    for found in (random, other, inverse):
        assert int(found.sum()) == pytest.approx(int(ours.sum()), rel=0.01)
    assert torch.equal(random, again)
    assert not torch.equal(random, other)
    assert not (inverse & ours).any()


def test_truncation_takes_as_many_parameters(scene):
    edit, matrix = scene
    plan = KFACControl(edit, "svd").plan(matrix)
    kept = edit.read(matrix).kept_pairs * plan.numel()
    rank = int(torch.linalg.matrix_rank(plan, rtol=1e-5))
    assert rank == round(kept / (192 + 64))


def test_an_unknown_control_is_refused(scene):
    with pytest.raises(InputError, match="random, inverse, svd"):
        KFACControl(scene[0], "top")
