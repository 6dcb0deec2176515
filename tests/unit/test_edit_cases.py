"""The cases themselves: trained models are trained, preserving edits preserve, harmful edits harm."""

from __future__ import annotations

import copy

import pytest
import torch
from trained_models import NAMES, chain_samples, load, unigram_entropy, untrained
from weight_edits import HARMFUL, NOT_ADMITTED, PRESERVING, SCALE, Edit, apply_edit, preserving_edits

PRESERVING_CASES = [
    pytest.param(name, edit, id=f"{name}-{edit.name}") for name in NAMES for edit in preserving_edits(name)
]


@pytest.mark.parametrize("name", NAMES)
def test_the_trained_model_beats_the_untrained_one_and_symbol_frequencies(name: str) -> None:
    model, _, loss = load(name)
    assert loss(model) < loss(untrained(name)) - 1.0
    assert loss(model) < unigram_entropy() - 0.5


@pytest.mark.parametrize("name", NAMES)
def test_loading_twice_gives_the_same_weights_and_windows(name: str) -> None:
    first, second = load(name), load(name)
    weights = second.model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in first.model.state_dict().items())
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(first.heldout, second.heldout, strict=True))


@pytest.mark.parametrize(("name", "edit"), PRESERVING_CASES)
def test_a_preserving_edit_changes_weights_but_no_logit(name: str, edit: Edit) -> None:
    model, heldout, _ = load(name)
    edited = copy.deepcopy(model)
    apply_edit(edit, edited)
    with torch.no_grad():
        gap = max((edited(**w).logits - model(**w).logits).abs().max().item() for w in heldout)
    assert gap < 1e-4
    before = dict(model.named_parameters())
    assert max((p - before[n]).abs().max().item() for n, p in edited.named_parameters()) > 1e-3


@pytest.mark.parametrize(("name", "edit_name"), NOT_ADMITTED, ids=[" ".join(key) for key in NOT_ADMITTED])
def test_what_is_listed_as_not_admitted_is_left_out(name: str, edit_name: str) -> None:
    assert edit_name in {edit.name for edit in PRESERVING}
    assert edit_name not in {edit.name for edit in preserving_edits(name)}


def test_a_gelu_mlp_does_not_admit_the_rescaling() -> None:
    model, heldout, _ = load("gpt2")
    edited = copy.deepcopy(model)
    edit = next(edit for edit in PRESERVING if edit.name == "W_up*c with W_down/c")
    apply_edit(edit, edited)
    with torch.no_grad():
        assert (edited(**heldout[0]).logits - model(**heldout[0]).logits).abs().max() > 0.1
    assert SCALE > 10


@pytest.mark.parametrize("name", NAMES)
def test_most_destructive_edits_harm_the_model(name: str) -> None:
    model, _, loss = load(name)
    base, harmless = loss(model), []
    for edit in HARMFUL:
        edited = copy.deepcopy(model)
        apply_edit(edit, edited)
        if loss(edited) - base <= 0.02:  # NaN is harm
            harmless.append(edit.name)
    assert len(harmless) <= 1, harmless


def test_chain_samples_are_reproducible_and_depend_on_the_seed() -> None:
    assert torch.equal(chain_samples(4, 16, seed=1), chain_samples(4, 16, seed=1))
    assert not torch.equal(chain_samples(4, 16, seed=1), chain_samples(4, 16, seed=2))
