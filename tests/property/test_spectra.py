"""Invariances of spectra and fits: scaling, transpose, permutation, rotation, and monotone bounds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightproof.marchenko_pastur import NULLS, bound_num_spikes, fit_bulk, tracy_widom_threshold
from weightproof.spectrum import NormReference, delta_norm_bound, estimate_norm, measure_spectrum, profile, track_norm

few = settings(max_examples=15, deadline=None, derandomize=True)
sides = st.integers(min_value=1, max_value=90)
seeds = st.integers(min_value=0, max_value=2**32 - 1)
scales = st.floats(min_value=1e-6, max_value=1e6)
nulls = pytest.mark.parametrize("null", NULLS)


def _matrix(seed, m, n):
    """Noise, with unequal rows and a few spikes in half of the draws; float32."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((m, n))
    if seed % 2:
        spikes = rng.standard_normal((m, 2)) @ rng.standard_normal((2, n))
        matrix = (matrix + spikes) * np.exp(0.3 * rng.standard_normal((m, 1)))
    return torch.from_numpy(matrix).float()


def _rotation(rng, size):
    return torch.from_numpy(np.linalg.qr(rng.standard_normal((size, size)))[0])


def _values(matrix):
    values = measure_spectrum(matrix).singular_values
    assert values is not None
    return values


def _close(found, expected, rel):
    for field in ("sigma_mp", "threshold", "edge_plus", "edge_minus"):
        size = float(expected.singular_values[0])
        assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=rel, abs=1e-6 * size), field
    assert found.aspect_ratio == expected.aspect_ratio


@few
@given(seeds, sides, sides, scales)
def test_the_spectrum_scales_with_the_matrix(seed, m, n, scale):
    matrix = _matrix(seed, m, n).double()
    plain, scaled = measure_spectrum(matrix), measure_spectrum(matrix * scale)
    assert scaled.spectral_norm == pytest.approx(scale * plain.spectral_norm, rel=1e-9)
    assert scaled.stable_rank == pytest.approx(plain.stable_rank, rel=1e-9)
    assert scaled.effective_rank == pytest.approx(plain.effective_rank, rel=1e-6)
    assert profile(matrix * scale).norm_collapse == pytest.approx(profile(matrix).norm_collapse, rel=1e-6)


@few
@given(seeds, sides, sides)
def test_the_spectrum_does_not_see_transpose_permutation_or_rotation(seed, m, n):
    rng = np.random.default_rng(seed)
    matrix = _matrix(seed, m, n).double()
    moved = [
        matrix.t(),
        matrix[torch.from_numpy(rng.permutation(m))][:, torch.from_numpy(rng.permutation(n))],
        _rotation(rng, m) @ matrix @ _rotation(rng, n),
    ]
    expected = _values(matrix)
    for other in moved:
        torch.testing.assert_close(_values(other), expected, rtol=1e-7, atol=1e-7 * float(expected[0]))


@few
@given(seeds, sides, sides)
def test_the_global_null_does_not_see_rotation(seed, m, n):
    rng = np.random.default_rng(seed)
    matrix = _matrix(seed, m, n).double()
    plain = fit_bulk(matrix, "global")
    rotated = fit_bulk(_rotation(rng, m) @ matrix @ _rotation(rng, n), "global")
    _close(rotated, plain, 1e-6)
    assert rotated.num_spikes == plain.num_spikes


@nulls
@few
@given(seeds, sides, sides, scales)
def test_fits_scale_with_the_matrix(null, seed, m, n, scale):
    matrix = _matrix(seed, m, n).double()
    plain, scaled = fit_bulk(matrix, null), fit_bulk(matrix * scale, null)
    # Whitening takes the scale out; the raw spectra carry it.
    unit = 1.0 if null == "biwhitened" else scale
    size = unit * float(plain.singular_values[0])
    torch.testing.assert_close(scaled.singular_values, plain.singular_values * unit, rtol=1e-6, atol=1e-6 * size)
    for field in ("sigma_mp", "threshold", "edge_plus"):
        assert getattr(scaled, field) == pytest.approx(unit * getattr(plain, field), rel=1e-6)
    assert scaled.num_spikes == plain.num_spikes
    assert scaled.spike_energy == pytest.approx(plain.spike_energy, abs=1e-6)


@nulls
@few
@given(seeds, sides, sides)
def test_fits_do_not_see_transpose(null, seed, m, n):
    matrix = _matrix(seed, m, n)
    plain, turned = fit_bulk(matrix, null), fit_bulk(matrix.t().contiguous(), null)
    assert (turned.d_out, turned.d_in) == (plain.d_in, plain.d_out)
    if null == "signflip" and m == n:
        return  # a square matrix has no tall orientation: two draws of the signs
    # Five Sinkhorn passes end on the other side; they have not quite settled for very few rows.
    _close(turned, plain, 1e-5 if null != "biwhitened" else 1e-3 if min(m, n) >= 10 else 1e-2)


@pytest.mark.parametrize("null", ["biwhitened", "global"])
@few
@given(seeds, sides, sides)
def test_fits_do_not_see_permutation(null, seed, m, n):
    rng = np.random.default_rng(seed)
    matrix = _matrix(seed, m, n)
    moved = matrix[torch.from_numpy(rng.permutation(m))][:, torch.from_numpy(rng.permutation(n))]
    plain, permuted = fit_bulk(matrix, null), fit_bulk(moved, null)
    _close(permuted, plain, 1e-5)
    torch.testing.assert_close(permuted.singular_values, plain.singular_values, rtol=1e-3, atol=1e-5)


@few
@given(st.integers(min_value=0, max_value=1000), st.integers(60, 120), st.integers(60, 120))
def test_the_signflip_edge_moves_within_its_stated_error_under_permutation(seed, m, n):
    rng = np.random.default_rng(seed)
    matrix = _matrix(2 * seed, m, n)
    moved = matrix[torch.from_numpy(rng.permutation(m))][:, torch.from_numpy(rng.permutation(n))]
    plain, permuted = fit_bulk(matrix, "signflip"), fit_bulk(moved, "signflip")
    torch.testing.assert_close(permuted.singular_values, plain.singular_values, rtol=1e-4, atol=1e-4)
    spread = tracy_widom_threshold(m, n) / tracy_widom_threshold(m, n, level=0.5) - 1
    assert abs(permuted.edge_plus / plain.edge_plus - 1) <= spread


@few
@given(seeds, sides, sides, st.floats(0, 5), st.floats(0, 5))
def test_a_larger_change_never_narrows_the_bounds_on_the_spikes(seed, m, n, first, second):
    fit = fit_bulk(_matrix(seed, m, n), "global")
    small, large = sorted((first, second))
    inner, outer = bound_num_spikes(fit, small), bound_num_spikes(fit, large)
    assert outer[0] <= inner[0] <= fit.num_spikes <= inner[1] <= outer[1]


@few
@given(seeds, sides, sides, st.floats(1e-4, 10), st.floats(1e-5, 1.0))
def test_bounds_hold_the_norm_for_any_change(seed, m, n, size, limit):
    rng = np.random.default_rng(seed)
    before = _matrix(seed, m, n)
    after = before + size * torch.from_numpy(rng.standard_normal((m, n))).float()
    old, new, change = (float(torch.linalg.matrix_norm(w.double(), 2)) for w in (before, after, after - before))
    assert change <= delta_norm_bound(after, before, key=seed) * (1 + 1e-6)
    low, high = old / (1 + limit), old * (1 + limit)
    for estimate in (
        track_norm(after, before, NormReference(old), (low, high), key=seed),
        estimate_norm(after, key=seed, limit=(low, high)),
        estimate_norm(after, key=seed),
    ):
        assert abs(estimate.value - new) <= estimate.error
        if estimate.error < min(abs(new - low), abs(new - high)):
            assert (low <= estimate.value <= high) == (low <= new <= high)
