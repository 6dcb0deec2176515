"""Readings of a changed model: what a bound may conclude, and tensors that cannot be measured."""

import math

import pytest
import torch
from torch import nn

from weightproof import BaselineError, GuardSession
from weightproof.probes import read_state
from weightproof.readings.changed_matrices import relative_delta
from weightproof.readings.changes import ChangeScope, read_change
from weightproof.readings.tensors import count_nonfinite
from weightproof.snapshot import Snapshot

TRAINED = "0.weight"


def structured_bulk(seed=0):
    """No spike, yet no noise either: the singular values are evenly spread."""
    rng = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(96, 96, generator=rng))[0] for _ in range(2))
    model = nn.Sequential(nn.Linear(96, 96, bias=False))
    model[0].weight.data.copy_(left * torch.linspace(1.0, 2.0, 96) @ right)
    return model


def read_after(model, change):
    state, snapshot = read_state(model), Snapshot.capture(model)
    with torch.no_grad():
        change(model[0].weight)
    scope = ChangeScope(lambda _: 0.1, lambda _family, _count: 0, None, frozenset([TRAINED]))
    return state, read_change(model, snapshot, state, state, scope).state


def test_a_bulk_that_is_not_noise_stays_trained_after_a_tiny_change():
    before, after = read_after(structured_bulk(), lambda weight: weight.mul_(1 + 1e-6))
    assert before.readings.bulks[TRAINED].num_spikes == 0
    assert not before.readings.untrained
    assert after.readings.bulks[TRAINED].method.startswith("weyl-bound")
    assert not after.readings.untrained


def test_a_matrix_that_holds_nan_has_no_fit_and_says_why():
    _, after = read_after(structured_bulk(), lambda weight: weight[0, :3].fill_(math.nan))
    assert after.readings.bulks[TRAINED].reason == after.readings.matrices[TRAINED].reason == "3 values are NaN or inf"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.complex64])
def test_nonfinite_values_are_counted_in_every_floating_dtype(dtype):
    tensor = torch.tensor([1.0, math.nan, -2.0, math.nan]).to(dtype)
    assert count_nonfinite(tensor) == 2
    assert count_nonfinite(tensor[::2].clone()) == 0


def test_an_8_bit_float_beside_the_weights_does_not_stop_a_session():
    model = nn.Sequential(nn.Linear(8, 8))
    model.register_buffer("scales", torch.ones(4).to(torch.float8_e4m3fn))
    with GuardSession(model).edit("halve", targets="0.weight", on_violation="monitor") as step:
        model[0].weight.data.mul_(0.5)
    assert step.record is not None
    assert step.record.changed_names == ("0.weight",)


def test_a_model_without_values_is_refused_in_words():
    with pytest.raises(BaselineError, match=r"weight holds no dense values \(meta"):
        GuardSession(nn.Linear(4, 4, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_relative_delta_is_that_of_the_stored_values(dtype):
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(700, 300, generator=generator).to(dtype)
    after = (before * (1 + 0.01 * torch.randn(700, 300, generator=generator).to(dtype))).t().contiguous().t()
    expected = float((after.double() - before.double()).norm() / before.double().norm())
    assert relative_delta(after, before) == pytest.approx(expected, rel=1e-6)


def test_relative_delta_is_undefined_without_an_original_of_the_same_shape_or_for_zeros():
    weight = torch.ones(3, 2)
    assert relative_delta(weight, None) is None
    assert relative_delta(weight, torch.ones(2, 3)) is None
    assert relative_delta(weight, torch.zeros(3, 2)) is None
