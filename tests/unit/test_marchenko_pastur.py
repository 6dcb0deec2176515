"""The Marchenko-Pastur law and fits of it: reference values, oracles, nulls, spikes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.oracles import marchenko_pastur as oracle

from weightproof.errors import InputError
from weightproof.marchenko_pastur import (
    NULLS,
    bound_num_spikes,
    bulk_edges,
    fit_bulk,
    growth_ratio,
    is_pure_bulk,
    median_scale_error,
    mp_cdf,
    mp_density,
    mp_median,
    observed_spike,
    spike_alignment,
    tracy_widom_statistic,
    tracy_widom_threshold,
    true_spike,
    visible_threshold,
)
from weightproof.spectrum import delta_norm_bound, seeded_generator

M, N = 512, 2048
NOISE = np.random.default_rng(0).standard_normal((M, N))
ASPECTS = (1 / 512, 0.0625, 0.25, 0.5, 0.75, 0.999, 1.0)


def _unit(vector):
    return vector / np.linalg.norm(vector)


def _spike():
    rng = np.random.default_rng(1)
    u, v = rng.standard_normal(M), rng.standard_normal(N)
    return np.outer(_unit(u), _unit(v))


def _noise(m, n, purpose="noise"):
    return torch.randn(m, n, generator=seeded_generator(purpose, m, n))


def _heteroscedastic(m, n):
    rows, cols = (_noise(1, size, "scales")[0].mul(0.5).exp() for size in (m, n))
    return rows[:, None] * _noise(m, n) * cols


# The law


def test_reference_values_of_the_edges_and_thresholds():
    low, high = bulk_edges(M, N)
    assert (low, high) == (pytest.approx(22.627417, abs=5e-7), pytest.approx(67.882251, abs=5e-7))
    found = [tracy_widom_threshold(M, N, level=level) for level in (0.95, 0.99, 0.999)]
    assert found == pytest.approx([68.0636, 68.2740, 68.5247], abs=5e-5)
    centre = tracy_widom_threshold(M, N, level=0.5) ** 2 + 1.26857 * 27.4698
    assert centre == pytest.approx(4605.7499, abs=2e-3)
    assert tracy_widom_statistic(67.258445, M, N) == pytest.approx(-2.987, abs=5e-4)
    assert tracy_widom_statistic(67.778465, M, N) == pytest.approx(-0.4306, abs=5e-5)


@pytest.mark.parametrize(
    ("aspect", "median"),
    [
        (0.0625, 0.979127),
        (0.1, 0.966565),
        (0.2, 0.932915),
        (0.25, 0.916004),
        (1 / 3, 0.887681),
        (0.5, 0.830466),
        (0.75, 0.742948),
        (1.0, 0.652776),
    ],
)
def test_reference_values_of_the_median(aspect, median):
    assert mp_median(aspect) == pytest.approx(median, abs=6e-7)
    assert mp_median(aspect) == pytest.approx(oracle.median(aspect), abs=1e-9)


@pytest.mark.parametrize(
    ("shape", "ratio"),
    [
        ((768, 768), 1.0119),
        ((768, 2304), 1.0081),
        ((3072, 768), 1.0073),
        ((2048, 5632), 1.0044),
        ((4096, 4096), 1.0040),
        ((4096, 11008), 1.0028),
    ],
)
def test_reference_values_of_the_allowance_above_the_edge(shape, ratio):
    assert tracy_widom_threshold(*shape) / bulk_edges(*shape)[1] == pytest.approx(ratio, abs=6e-5)


def test_reference_values_of_the_scale_error():
    assert median_scale_error(M, N) == pytest.approx(0.0013, abs=5e-5)
    assert median_scale_error(128, 128) == pytest.approx(0.012, abs=5e-4)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_density_and_distribution_equal_the_integral(aspect):
    low, high = (1 - math.sqrt(aspect)) ** 2, (1 + math.sqrt(aspect)) ** 2
    points = low + (high - low) * np.array([0.001, 0.1, 0.37, 0.5, 0.9, 0.999])
    np.testing.assert_allclose(mp_density(points, aspect), [oracle.density(x, aspect) for x in points], rtol=1e-12)
    np.testing.assert_allclose(mp_cdf(points, aspect), [oracle.cdf(x, aspect) for x in points], atol=1e-9)
    np.testing.assert_allclose(mp_cdf([low - 1, low, high, high + 1], aspect), [0, 0, 1, 1], atol=1e-12)
    np.testing.assert_array_equal(mp_density([low - 0.1, high + 0.1], aspect), [0, 0])


def test_edges_of_small_and_empty_shapes():
    assert bulk_edges(0, 0) == (0.0, 0.0)
    assert bulk_edges(4, 3)[1] == pytest.approx(3.7321, abs=5e-5)
    assert bulk_edges(4, 3)[1] / math.sqrt(4) == pytest.approx(1.8660, abs=5e-5)
    assert bulk_edges(3, 4) == bulk_edges(4, 3)
    assert bulk_edges(3, 4)[0] > 0
    assert bulk_edges(9, 9) == (0.0, 6.0)


@pytest.mark.parametrize("aspect", [0.0, -0.5, 1.5, math.nan])
def test_impossible_aspect_ratios_are_refused(aspect):
    with pytest.raises(InputError, match="aspect ratio"):
        mp_cdf(1.0, aspect)


def test_unknown_levels_and_nulls_are_refused():
    with pytest.raises(InputError, match=r"0\.97"):
        tracy_widom_threshold(M, N, level=0.97)
    with pytest.raises(InputError, match="biwhitened, global, signflip"):
        fit_bulk(NOISE, "permuted")


@pytest.mark.parametrize(
    ("theta", "predicted", "observed", "second"),
    [
        (25, 67.882, 67.255, 66.964),
        (32, 67.882, 67.256, 67.068),
        (40, 69.393, 69.048, 67.254),
        (50, 74.023, 73.704, 67.254),
        (67.882, 85.997, 85.602, 67.253),
        (100, 112.538, 112.145, 67.252),
        (150, 158.451, 158.116, 67.252),
        (200, 206.364, 206.073, 67.252),
        (400, 403.195, 402.981, 67.251),
    ],
)
def test_reference_values_of_a_single_spike(theta, predicted, observed, second):
    fit = fit_bulk(NOISE + theta * _spike(), null="global")
    assert observed_spike(theta, M, N) == pytest.approx(predicted, abs=6e-4)
    np.testing.assert_allclose(fit.singular_values[:2], [observed, second], atol=6e-4)
    assert fit.num_spikes == (theta > 32)
    back = true_spike(observed_spike(theta, M, N), M, N)
    assert back is None if theta <= 32 else back == pytest.approx(theta, rel=1e-9)


def test_reference_values_of_three_spikes():
    rng = np.random.default_rng(2)
    left, right = np.linalg.qr(rng.standard_normal((M, 3)))[0], np.linalg.qr(rng.standard_normal((N, 3)))[0]
    fit = fit_bulk(NOISE + (left * [150, 80, 45]) @ right.T, null="global")
    assert [observed_spike(theta, M, N) for theta in (150, 80, 45)] == pytest.approx(
        [158.451, 95.519, 71.434], abs=6e-4
    )
    np.testing.assert_allclose(fit.singular_values[:4], [158.3379, 95.9122, 72.2882, 67.1890], atol=6e-5)
    assert fit.num_spikes == 3


@pytest.mark.parametrize(
    ("theta", "left", "right"), [(100, 0.9413, 0.8213), (200, 0.9867, 0.9507), (50, 0.6908, 0.4575), (32, 0, 0)]
)
def test_reference_values_of_the_alignment(theta, left, right):
    assert spike_alignment(theta, M, N) == pytest.approx((left, right), abs=6e-5)


def test_visibility_scales_with_the_noise():
    assert visible_threshold(M, N) == pytest.approx(32.0)
    assert visible_threshold(M, N, 0.02) == pytest.approx(0.64)
    assert observed_spike(2.0, M, N, 0.02) == pytest.approx(0.02 * observed_spike(100.0, M, N))
    assert spike_alignment(2.0, M, N, 0.02) == pytest.approx(spike_alignment(100.0, M, N))
    assert true_spike(3.0, M, N, 0.0) == 3.0
    assert observed_spike(3.0, M, N, 0.0) == 3.0


# Fits


def test_reference_values_of_the_global_fit():
    fit = fit_bulk(NOISE, null="global")
    assert fit.sigma_mp == pytest.approx(1.000225, abs=6e-7)
    assert (fit.num_spikes, fit.spike_energy) == (0, 0.0)
    assert fit.threshold == pytest.approx(68.5247 * fit.sigma_mp * (1 + 2 * median_scale_error(M, N)), rel=1e-6)
    assert is_pure_bulk(fit)
    spiked = fit_bulk(NOISE + 200 * _spike(), null="global")
    assert spiked.sigma_mp == pytest.approx(1.00154, abs=6e-6)
    assert spiked.num_spikes == 1
    assert spiked.spike_energy == pytest.approx(206.073**2 / np.linalg.norm(NOISE + 200 * _spike()) ** 2, rel=1e-5)
    assert not is_pure_bulk(spiked)


@pytest.mark.parametrize("shape", [(90, 200), (200, 90), (120, 120)])
def test_biwhitened_fit_equals_the_oracle(shape):
    matrix = _heteroscedastic(*shape).double().numpy()
    matrix += 40 * np.outer(_unit(_noise(1, shape[0], "u")[0].numpy()), _unit(_noise(1, shape[1], "v")[0].numpy()))
    fit = fit_bulk(matrix)
    expected = np.linalg.svd(oracle.biwhiten(matrix, 5), compute_uv=False)
    np.testing.assert_allclose(fit.singular_values, expected, rtol=1e-6)
    assert fit.row_scale is not None
    assert fit.col_scale is not None
    whitened = matrix * fit.row_scale.numpy()[:, None] * fit.col_scale.numpy()
    np.testing.assert_allclose((whitened**2).mean(0), 1, rtol=1e-5)
    np.testing.assert_allclose((whitened**2).mean(1), 1, rtol=1e-3)
    sigma = oracle.trimmed_scale(expected, *shape)
    assert fit.sigma_mp == pytest.approx(sigma, rel=1e-6)
    threshold = oracle.spike_threshold(sigma, *shape, 3.27220) * (1 + 2 * median_scale_error(*shape))
    assert fit.threshold == pytest.approx(threshold, rel=1e-6)
    assert fit.num_spikes == (expected > threshold).sum()
    assert fit.ks_distance == pytest.approx(oracle.ks_distance(expected[fit.num_spikes :], sigma, *shape), abs=1e-6)


@pytest.mark.parametrize("shape", [(300, 300), (512, 200), (200, 512)])
def test_unequal_rows_and_columns_are_not_spikes(shape):
    matrix = _heteroscedastic(*shape)
    assert fit_bulk(matrix).num_spikes == 0
    assert is_pure_bulk(fit_bulk(matrix))
    assert fit_bulk(matrix, "signflip").num_spikes == 0
    # What the default protects from.
    assert fit_bulk(matrix, "global").num_spikes > 10


@pytest.mark.parametrize("null", ["biwhitened", "signflip"])
def test_heavy_tails_are_not_spikes(null):
    matrix = np.random.default_rng(4).standard_t(3, (400, 400))
    assert fit_bulk(matrix, null).num_spikes == 0


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("shape", [(400, 400), (256, 700), (700, 256)])
def test_planted_spikes_are_counted(null, shape):
    rng = np.random.default_rng(9)
    strengths = np.linspace(3, 1, 8) * bulk_edges(*shape, 0.02)[1]
    left, right = (np.linalg.qr(rng.standard_normal((size, 8)))[0] for size in shape)
    fit = fit_bulk(0.02 * rng.standard_normal(shape) + (left * strengths) @ right.T, null)
    assert fit.num_spikes == 8
    assert 0 < fit.spike_energy < 1
    assert (fit.null, fit.d_out, fit.d_in) == (null, *shape)
    assert fit.threshold > fit.edge_plus > fit.edge_minus >= 0


def test_many_spikes_do_not_hide_each_other():
    rng = np.random.default_rng(6)
    shape = (900, 300)
    strengths = 6 * bulk_edges(*shape, 0.02)[1] * np.arange(1, 101) ** -0.5
    left, right = (np.linalg.qr(rng.standard_normal((size, 100)))[0] for size in shape)
    matrix = 0.02 * rng.standard_normal(shape) + (left * strengths) @ right.T
    assert fit_bulk(matrix).num_spikes > 60


@pytest.mark.parametrize("null", NULLS)
def test_noise_is_pure_bulk_and_orthogonal_matrices_are_not(null):
    for shape in ((300, 300), (256, 800), (64, 64), (1000, 40)):
        assert is_pure_bulk(fit_bulk(_noise(*shape), null)), shape
    assert not is_pure_bulk(fit_bulk(np.linalg.qr(np.random.default_rng(0).standard_normal((200, 200)))[0], null))


@pytest.mark.parametrize("null", ["biwhitened", "global"])
def test_small_noise_is_pure_bulk_in_every_draw(null):
    """One exception among its matrices, and a fresh model would no longer look untrained."""
    for seed in range(60):
        assert is_pure_bulk(fit_bulk(_noise(128, 128, f"draw {seed}"), null)), seed
        assert is_pure_bulk(fit_bulk(_noise(64, 64, f"draw {seed}"), null)), seed


@pytest.mark.parametrize("null", NULLS)
def test_false_alarms_are_as_rare_as_promised(null):
    assert sum(fit_bulk(_noise(48, 96, f"alarm {seed}"), null).num_spikes for seed in range(100)) <= 2


@pytest.mark.parametrize("null", NULLS)
def test_degenerate_matrices(null):
    zero = fit_bulk(torch.zeros(20, 30), null)
    assert (zero.num_spikes, zero.sigma_mp, zero.edge_plus, zero.spike_energy, zero.ks_distance) == (0, 0, 0, 0, 0)
    assert is_pure_bulk(zero)
    for shape in ((1, 50), (50, 1), (1, 1), (2, 2)):
        fit = fit_bulk(_noise(*shape), null)
        assert fit.num_spikes == 0
        assert math.isfinite(fit.threshold)


@pytest.mark.parametrize("null", ["biwhitened", "global"])
@pytest.mark.parametrize("rank", [1, 3])
def test_an_exactly_low_rank_matrix_is_all_spikes(null, rank):
    fit = fit_bulk(_noise(60, rank) @ _noise(rank, 90), null)
    assert (fit.num_spikes, fit.sigma_mp) == (rank, 0.0)
    assert fit.spike_energy == pytest.approx(1.0)
    assert not is_pure_bulk(fit)


@pytest.mark.parametrize("null", NULLS)
def test_zero_rows_and_columns_leave_the_fit_of_the_rest(null):
    dense = _noise(200, 300)
    padded = torch.zeros(240, 350)
    padded[:200, 50:] = dense
    fit, rest = fit_bulk(padded, null), fit_bulk(dense, null)
    assert fit.num_spikes == rest.num_spikes == 0
    assert fit.aspect_ratio == rest.aspect_ratio
    assert len(fit.singular_values) == 240
    if null != "signflip":
        assert fit.sigma_mp == pytest.approx(rest.sigma_mp, rel=1e-4)
        assert fit.threshold == pytest.approx(rest.threshold, rel=1e-4)


def test_a_change_of_a_zero_row_is_seen_through_the_whitening():
    before = _noise(60, 90)
    before[7] = 0.0
    fit = fit_bulk(before)
    after = before.clone()
    after[7] = 1.0
    assert fit.row_scale is not None
    assert float(fit.row_scale[7]) > 0.5
    change = delta_norm_bound(after, before, key="w", row_scale=fit.row_scale, col_scale=fit.col_scale)
    assert change > 5.0


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_weights_are_refused_by_name(null, value):
    matrix = _noise(30, 40)
    matrix[2, 3] = value
    with pytest.raises(InputError, match=r"h\.3\.mlp"):
        fit_bulk(matrix, null, name="h.3.mlp")


@pytest.mark.parametrize("null", NULLS)
def test_bfloat16_storage_does_not_move_the_fit(null):
    matrix = 0.02 * _noise(200, 500) + torch.outer(_noise(1, 200, "u")[0], _noise(1, 500, "v")[0]) * 0.005
    full, half = fit_bulk(matrix, null), fit_bulk(matrix.bfloat16(), null)
    assert half.num_spikes == full.num_spikes == 1
    assert half.sigma_mp == pytest.approx(full.sigma_mp, rel=1e-3)
    assert half.threshold == pytest.approx(full.threshold, rel=5e-3)


@pytest.mark.parametrize("null", NULLS)
def test_fits_are_deterministic_and_leave_the_input_alone(null):
    matrix = torch.nn.Parameter(_noise(50, 70))
    before, state = matrix.detach().clone(), torch.get_rng_state()
    first, second = fit_bulk(matrix, null), fit_bulk(matrix, null)
    assert torch.equal(first.singular_values, second.singular_values)
    assert first.threshold == second.threshold
    assert torch.equal(matrix, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.singular_values.requires_grad


# Comparisons


def test_weyl_bounds_hold_the_new_count():
    rng = np.random.default_rng(8)
    matrix = NOISE[:200, :500] + (_noise(200, 5).double().numpy() * [9, 7, 5, 4, 3]) @ _noise(5, 500).numpy() / 14
    fit = fit_bulk(matrix)
    assert fit.row_scale is not None
    assert fit.col_scale is not None
    scales = {"row_scale": fit.row_scale, "col_scale": fit.col_scale}
    for size in (0.001, 0.01, 0.1, 0.5):
        after = matrix + size * rng.standard_normal(matrix.shape)
        low, high = bound_num_spikes(fit, delta_norm_bound(after, matrix, key="w", **scales))
        whitened = after * fit.row_scale.numpy()[:, None] * fit.col_scale.numpy()
        count = (np.linalg.svd(whitened, compute_uv=False) > fit.threshold).sum()
        assert low <= count <= high
    assert bound_num_spikes(fit, 0.0) == (fit.num_spikes, fit.num_spikes)
    assert bound_num_spikes(fit, math.inf) == (0, 200)
    with pytest.raises(InputError, match="norm of the change"):
        bound_num_spikes(fit, math.nan)


@pytest.mark.parametrize(
    ("now", "base", "expected"),
    [
        ((2.0, 1.0), (1.0, 1.0), 2.0),
        ((1.05, 1.0), (1.0, 1.0), 1.05),
        ((2.0, 0.0), (1.0, 0.0), 2.0),
        ((2.0, 2.0), (1.0, 1.0), 1.0),
        ((2.0, 1.0), (0.0, 0.0), None),
        ((2.0, 1.0), (1.0, 0.0), None),
        ((2.0, 0.0), (1.0, 1.0), None),
        ((0.0, 0.0), (1.0, 0.0), 0.0),
    ],
)
def test_growth_ratio(now, base, expected):
    fit = fit_bulk(torch.zeros(3, 4))
    fits = [
        replace(fit, singular_values=torch.tensor([top, 0.0, 0.0], dtype=torch.float64), edge_plus=edge)
        for top, edge in (now, base)
    ]
    assert growth_ratio(*fits) == (None if expected is None else pytest.approx(expected))


def test_growth_ratio_refuses_two_nulls():
    with pytest.raises(InputError, match="global"):
        growth_ratio(fit_bulk(torch.eye(3)), fit_bulk(torch.eye(3), "global"))


@pytest.mark.parametrize("null", ["biwhitened", "global", "signflip"])
@pytest.mark.parametrize("shape", [(16, 16), (40, 300), (300, 1)])
def test_a_matrix_decayed_to_subnormal_numbers_is_fitted(shape, null):
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).float()
    for scale in (1e-37, 1e-40, 1e-44):
        fit = fit_bulk(weight * scale, null=null)
        assert bool(torch.isfinite(fit.singular_values).all())
        assert math.isfinite(fit.sigma_mp)
