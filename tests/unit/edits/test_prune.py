"""Magnitude pruning against a full sort: exact counts, ties, one threshold over matrices, N:M, masks."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from edit_cases import CASES, Session, case, matrices, matrix_of, oracle, small_mlp, turned
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded_models import ToyModel

from weightproof import kinds
from weightproof.edits import Edit, Prune
from weightproof.edits.magnitudes import digit_counts, kth_smallest
from weightproof.errors import InputError
from weightproof.judgement.plans import prepared, selected

slow = oracle("edits")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_the_smallest_magnitudes_go_exactly(name, share):
    weight = case(name)
    planned = Prune(share).plan(matrix_of(weight))
    assert np.array_equal(planned.numpy(), slow.pruned([weight.numpy()], share)[0])
    assert int((planned == 0).sum()) >= math.floor(share * weight.numel() + 0.5)
    assert torch.equal(planned, Prune(share).plan(matrix_of(turned(weight))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["random", "ties", "tiny"])
def test_counts_are_exact_in_every_dtype(name, dtype):
    weight = case(name, dtype)
    planned = Prune(0.37).plan(matrix_of(weight))
    assert planned.dtype == dtype
    assert np.array_equal(planned.double().numpy(), slow.pruned([weight.double().numpy()], 0.37)[0])


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:2"])
@pytest.mark.parametrize("name", ["random", "ties", "zero", "one row", "huge", "heavy tails"])
def test_patterns_keep_the_largest_of_every_group(name, pattern):
    weight, edit = case(name), Prune(pattern=pattern)
    kept, of = edit.group
    planned = edit.plan(matrix_of(weight))
    assert np.array_equal(planned.numpy(), slow.pruned_groups(weight.numpy(), kept, of))
    assert int((planned.reshape(-1, of) != 0).sum(1).max()) <= kept
    assert edit.sparsity == 1 - kept / of


@pytest.mark.parametrize("edit", [Prune(0.5), Prune(1.0), Prune(pattern="2:4")], ids=lambda edit: edit.name)
def test_what_is_not_finite_is_never_pruned_away(edit):
    weight = case("random")
    weight[2, 4:6] = float("nan")
    weight[2, 6:8] = float("inf")
    planned = edit.plan(matrix_of(weight))
    assert int(planned.isnan().sum()) == 2
    if edit.pattern == "2:4":
        assert np.array_equal(planned.numpy(), slow.pruned_groups(weight.numpy(), 2, 4), equal_nan=True)
    else:
        assert np.array_equal(planned.numpy(), slow.pruned([weight.numpy()], edit.sparsity)[0], equal_nan=True)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=60),
    st.integers(1, 60),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_threshold_is_that_of_a_sort(values, rank, dtype):
    given_values = torch.tensor(values, dtype=torch.float32)
    found, ties = kth_smallest(rank, dtype, lambda shift, prefix: digit_counts(given_values, dtype, shift, prefix))
    order = sorted(abs(float(value)) for value in given_values if not math.isnan(value))
    if not order:
        assert ties == 0
        return
    rank = min(rank, len(order))
    assert found == order[rank - 1]
    assert ties == rank - sum(value < found for value in order)


# ---- one threshold over all matrices --------------------------------------------------------------------------------


def tied_mlp():
    model = small_mlp((12, 16, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 24).round() / 24)  # few levels: the threshold is tied across matrices
    return model


@pytest.mark.parametrize("make", [small_mlp, tied_mlp], ids=["random", "ties"])
@pytest.mark.parametrize("share", [0.3, 0.62, 1.0])
def test_a_global_threshold_is_that_of_a_sort_over_all(make, share):
    model = make()
    edit = prepared(Prune(share, scope="global"), Session(model))
    chosen = selected(model, edit)
    before = [matrix.load().clone() for matrix in chosen]
    assert len(chosen) == 2
    planned = [edit.plan(matrix) for matrix in chosen]
    wanted = slow.pruned([weight.numpy() for weight in before], share)
    assert all(np.array_equal(ours.numpy(), theirs) for ours, theirs in zip(planned, wanted, strict=True))
    assert all(torch.equal(matrix.load(), kept) for matrix, kept in zip(chosen, before, strict=True))


def test_turned_and_stacked_matrices_of_a_model():
    model = ToyModel()
    for edit in (Prune(0.4), prepared(Prune(0.4, scope="global"), Session(model))):
        chosen = selected(model, edit)
        assert {"layers.0.c_fc.weight", "layers.0.experts.up_proj[2]", "layers.1.experts.up_proj[0]"} <= {
            matrix.name for matrix in chosen
        }
        before = [matrix.load().clone() for matrix in chosen]
        planned = [edit.plan(matrix) for matrix in chosen]
        if edit.scope == "global":
            wanted = slow.pruned([weight.numpy() for weight in before], 0.4)
        else:
            wanted = [slow.pruned([weight.numpy()], 0.4)[0] for weight in before]
        assert all(np.array_equal(ours.numpy(), theirs) for ours, theirs in zip(planned, wanted, strict=True))


def test_a_matrix_from_which_nothing_goes_is_no_target():
    model = small_mlp()
    with torch.no_grad():
        model["mlp"][1].weight.add_(10)
    edit = prepared(Prune(0.3, scope="global"), Session(model))
    assert [matrix.name for matrix in selected(model, edit)] == ["mlp.0.weight"]
    again = prepared(Prune(1e-9, scope="global"), Session(model))
    assert len(selected(model, again)) == 2
    assert all(torch.equal(again.plan(matrix), matrix.load()) for matrix in selected(model, again))


def test_a_global_edit_that_saw_no_model_says_so():
    with pytest.raises(InputError, match="one threshold over all matrices"):
        Prune(0.5, scope="global").plan(matrix_of(case("random")))
    known = prepared(Prune(0.5, scope="global"), Session(small_mlp()))
    with pytest.raises(InputError, match="bare tensor"):
        known.mask(case("random"))


# ---- masks, contract, parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", [Prune(0.5), Prune(pattern="2:4")], ids=lambda edit: edit.name)
def test_the_mask_is_what_the_plan_keeps(edit):
    weight = case("random")
    mask = edit.mask(weight)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, edit.mask(matrix_of(weight)))
    assert torch.equal(torch.where(mask, weight, 0.0), edit.plan(matrix_of(weight)))
    # A matrix that trained on and is masked again is as sparse as before.
    assert int(((weight + 1) * mask == 0).sum()) == weight.numel() // 2


@pytest.mark.parametrize("edit", [Prune(0.5), Prune(0.013), Prune(pattern="2:4"), Prune(pattern="1:4")])
@pytest.mark.parametrize("name", ["random", "ties", "one row", "zero"])
def test_the_contract_holds_and_damage_breaks_it(edit, name):
    weight = case(name)
    planned = edit.plan(matrix_of(weight))
    assert all(one.value <= one.limit for one in edit.kind.measure("w", weight, planned))
    damaged = planned.clone()
    damaged[0, 0] += 1
    assert any(one.value > one.limit for one in edit.kind.measure("w", weight, damaged))


def test_a_global_edit_asks_no_share_of_a_single_matrix():
    assert Prune(0.5, scope="global").kind == kinds.Prune(0.5, "model")
    assert Prune(pattern="2:4").kind == kinds.Prune(0.5)


BAD = [
    ({"sparsity": 1.5}, "share above 0 and at most 1"),
    ({"sparsity": 0.0}, "share above 0"),
    ({"sparsity": 50}, "not percent"),
    ({"sparsity": True}, "share above 0"),
    ({}, "sparsity must be"),
    ({"sparsity": 0.5, "scope": "model"}, "scope must be 'matrix' or 'global'"),
    ({"pattern": "2of4"}, "N:M such as '2:4'"),
    ({"pattern": "4:4"}, "fewer than all"),
    ({"pattern": "0:4"}, "at least 1"),
    ({"pattern": "2:4", "sparsity": 0.6}, "is a sparsity of 0.5"),
    ({"pattern": "2:4", "scope": "global"}, "no meaning"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_parameters_are_refused_in_words(arguments, words):
    with pytest.raises(InputError, match=words):
        Prune(**arguments)


def test_a_width_that_does_not_fit_is_refused_by_name_before_anything_is_written():
    model = small_mlp((12, 10, 8))
    with pytest.raises(InputError, match=r"mlp\.1\.weight has 10 inputs, which is not a multiple of 4"):
        prepared(Prune(pattern="2:4"), Session(model))
    with pytest.raises(InputError, match=r"10 inputs"):
        Prune(pattern="2:4").plan(matrices(model)["mlp.1.weight"])
    assert prepared(Prune(pattern="2:4", exclude=("mlp.1.weight",)), Session(model)).selects(
        matrices(model)["mlp.0.weight"]
    )


def test_name_and_parameters_describe_the_edit():
    assert [Prune(0.25).name, Prune(0.5, scope="global").name] == ["prune-25%", "prune-50%-global"]
    edit = Prune(pattern="2:4", include="ffn")
    assert json.loads(json.dumps(edit.params())) == {
        "sparsity": 0.5, "pattern": "2:4", "scope": "matrix", "include": ["ffn"], "exclude": [],
    }  # fmt: skip
    assert isinstance(edit, Edit)
