"""Spectra against float64 oracles, certified norms, the delta ladder, and the profile."""

import math

import numpy as np
import pytest
import torch
from tests.oracles import spectra as oracle
from torch.utils._python_dispatch import TorchDispatchMode

from weightproof.errors import InputError
from weightproof.numerics import gram, lanczos, matrices, norms
from weightproof.numerics.matrices import seeded_generator
from weightproof.spectrum import (
    NormEstimate,
    NormReference,
    delta_norm_bound,
    effective_rank,
    estimate_norm,
    measure_spectrum,
    power_law_alpha,
    profile,
    track_norm,
)

NOISE = np.random.default_rng(0).standard_normal((512, 2048))


def _orthonormal(rng, rows, cols):
    return np.linalg.qr(rng.standard_normal((rows, cols)))[0]


def _with_spikes(rng, m, n, strengths):
    left, right = _orthonormal(rng, m, len(strengths)), _orthonormal(rng, n, len(strengths))
    edge = 0.02 * (math.sqrt(m) + math.sqrt(n))
    return 0.02 * rng.standard_normal((m, n)) + edge * (left * strengths) @ right.T


def _case(name):
    rng = np.random.default_rng(7)
    ramp = np.arange(1, 33) ** -0.5
    makers = {
        "random tall": lambda: 0.02 * rng.standard_normal((200, 80)),
        "random wide": lambda: 0.02 * rng.standard_normal((80, 200)),
        "random square": lambda: rng.standard_normal((120, 120)),
        "large wide": lambda: 0.02 * rng.standard_normal((300, 900)),
        "spiked": lambda: _with_spikes(rng, 96, 160, np.linspace(3, 1, 8)),
        "power law": lambda: _with_spikes(rng, 300, 700, 6 * ramp),
        "low rank": lambda: rng.standard_normal((300, 3)) @ rng.standard_normal((3, 500)),
        "rank one": lambda: np.outer(rng.standard_normal(40), rng.standard_normal(70)),
        "heavy tailed": lambda: rng.standard_t(3, (150, 90)),
        "orthogonal": lambda: _orthonormal(rng, 90, 60),
        "identity": lambda: np.eye(50),
        "one row": lambda: rng.standard_normal((1, 33)),
        "one column": lambda: rng.standard_normal((33, 1)),
        "one entry": lambda: np.array([[-2.5]]),
        "zero": lambda: np.zeros((20, 30)),
        "a zero row": lambda: rng.standard_normal((40, 60)) * (np.arange(40) != 3)[:, None],
        "tiny": lambda: 1e-30 * rng.standard_normal((300, 500)),
        "huge": lambda: 1e30 * rng.standard_normal((300, 500)),
    }
    return makers[name]()


CASES = (
    "random tall",
    "random wide",
    "random square",
    "large wide",
    "spiked",
    "power law",
    "low rank",
    "rank one",
    "heavy tailed",
    "orthogonal",
    "identity",
    "one row",
    "one column",
    "one entry",
    "zero",
    "a zero row",
    "tiny",
    "huge",
)
FORMS = {
    "float64 array": lambda matrix: matrix,
    "float32 tensor": lambda matrix: torch.from_numpy(matrix).float(),
    "transposed view": lambda matrix: torch.from_numpy(np.ascontiguousarray(matrix.T)).float().t(),
    "bfloat16 tensor": lambda matrix: torch.from_numpy(matrix).bfloat16(),
    "strided view": lambda matrix: torch.from_numpy(np.repeat(matrix, 2, axis=1)).float()[:, ::2],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_exact_spectrum_equals_the_svd(case, form):
    matrix = FORMS[form](_case(case))
    spectrum = measure_spectrum(matrix, name=case)
    expected = oracle.singular_values(matrix)
    top = expected[0]
    assert spectrum.singular_values is not None
    found = spectrum.singular_values.numpy()
    assert found.dtype == np.float64
    assert (np.diff(found) <= 0).all()
    assert abs(spectrum.spectral_norm - top) <= max(spectrum.spectral_norm_error, 1e-11 * top)
    # float64 Gram: 1e-7 s1 absolute at zero; float32 is used only where every value is large.
    np.testing.assert_allclose(found, expected, atol=2e-7 * top, rtol=1e-3 if "32" in spectrum.method else 1e-6)
    assert spectrum.frobenius_norm == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    assert spectrum.stable_rank == pytest.approx(oracle.stable_rank(matrix), rel=1e-4)
    assert (spectrum.d_out, spectrum.d_in) == tuple(matrix.shape)
    if top:
        assert spectrum.effective_rank == pytest.approx(oracle.effective_rank(expected), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_lanczos_bracket_holds_the_norm(case, form):
    matrix = FORMS[form](_case(case))
    expected = oracle.spectral_norm(matrix)
    for key in ("a", ("b", 3)):
        estimate = estimate_norm(matrix, key=key)
        assert abs(estimate.value - expected) <= estimate.error
        assert estimate.error <= 0.3 * expected


def test_screen_spectrum_has_no_bulk_statistics():
    spectrum = measure_spectrum(_case("spiked"), exact=False, name="w")
    assert spectrum.singular_values is None
    assert spectrum.effective_rank is None
    assert spectrum.alpha is None
    assert "lanczos" in spectrum.method
    assert spectrum.stable_rank == pytest.approx(oracle.stable_rank(_case("spiked")), rel=0.05)


def test_float32_gram_only_where_every_value_survives_it():
    assert measure_spectrum(torch.from_numpy(_case("large wide")).float()).method == "gram-eigh-float32"
    assert measure_spectrum(torch.from_numpy(_case("low rank")).float()).method == "gram-eigh-float64"
    square = torch.randn(300, 300, generator=seeded_generator("square"))
    spectrum = measure_spectrum(square)
    assert spectrum.method == "gram-eigh-float64"
    assert spectrum.singular_values is not None
    assert float(spectrum.singular_values[-1]) == pytest.approx(oracle.singular_values(square)[-1], rel=1e-5)


def test_reference_values_of_gaussian_noise():
    spectrum = measure_spectrum(NOISE)
    values = spectrum.singular_values
    assert values is not None
    np.testing.assert_allclose(values[:3], [67.258445, 66.959035, 66.809061], atol=5e-7)
    assert float(values[-1]) == pytest.approx(22.879513, abs=5e-7)
    assert float(values.quantile(0.5)) == pytest.approx(43.322291, abs=5e-7)
    assert spectrum.frobenius_norm == pytest.approx(1024.833894, abs=5e-7)
    assert spectrum.stable_rank == pytest.approx(232.1739, abs=5e-5)
    assert spectrum.effective_rank == pytest.approx(451.7902, abs=5e-5)


def test_reference_value_of_uniform_noise():
    noise = np.random.default_rng(3).uniform(-math.sqrt(3), math.sqrt(3), (512, 2048))
    assert measure_spectrum(noise).spectral_norm == pytest.approx(67.778465, abs=5e-7)


def test_reference_values_of_a_power_law():
    eigenvalues = (1 - np.random.default_rng(0).random(2000)) ** -0.5
    fit = power_law_alpha(np.sqrt(eigenvalues))
    assert fit is not None
    assert fit.alpha == pytest.approx(2.992119, abs=5e-7)
    assert fit.error == pytest.approx((fit.alpha - 1) / math.sqrt(fit.tail), rel=1e-12)
    alpha, xmin, distance, tail = oracle.power_law_alpha(eigenvalues)
    assert (alpha, xmin, distance, tail) == (
        pytest.approx(2.990491, abs=5e-7),
        pytest.approx(1.007797, abs=5e-7),
        pytest.approx(0.008196, abs=5e-7),
        1957,
    )
    assert fit.alpha == pytest.approx(alpha, abs=0.02)
    assert fit.ks >= distance


@pytest.mark.parametrize("values", [np.ones(50), np.zeros(50), np.arange(1.0, 5.0), np.r_[3.0, np.zeros(60)]])
def test_power_law_needs_a_spread_spectrum(values):
    assert power_law_alpha(values) is None


def test_effective_rank_counts_equal_values():
    assert effective_rank(np.array([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(np.zeros(4)) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_refused_by_name_but_profiled(value):
    matrix = torch.randn(30, 40, generator=seeded_generator("non-finite"))
    matrix[3, 5] = value
    clean = torch.ones(30, 40)
    for measure in (
        lambda: measure_spectrum(matrix, name="h.0.attn"),
        lambda: measure_spectrum(matrix, exact=False, name="h.0.attn"),
        lambda: estimate_norm(matrix, key="h.0.attn"),
        lambda: track_norm(matrix, clean, NormReference(1.0), (0.5, 2.0), key="h.0.attn"),
        lambda: track_norm(clean, matrix, NormReference(1.0), (0.5, 2.0), key="h.0.attn"),
        lambda: delta_norm_bound(matrix, clean, key="h.0.attn"),
    ):
        with pytest.raises(InputError, match=r"h\.0\.attn.*NaN or infinite"):
            measure()
    matrix[4] = 0.0
    reading = profile(matrix)
    assert reading.num_nonfinite == 1
    assert reading.frobenius_norm is None
    assert reading.zero_rows == 1


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (torch.zeros(3), "2-D"),
        (torch.zeros(2, 2, 2), "2-D"),
        (torch.zeros(0, 4), "not empty"),
        (torch.zeros(3, 3, dtype=torch.int8), "dequantize"),
        (np.zeros((3, 3), dtype=np.int64), "float64 array"),
        (torch.zeros(3, 3, device="meta"), "no dense data"),
    ],
)
def test_what_is_not_a_matrix_is_refused(matrix, words):
    with pytest.raises(InputError, match=words):
        measure_spectrum(matrix, name="w")
    with pytest.raises(InputError, match=words):
        profile(matrix)


def test_limits_in_the_wrong_order_and_shapes_that_differ_are_refused():
    matrix = torch.eye(4)
    with pytest.raises(InputError, match="low <= high"):
        estimate_norm(matrix, key="w", limit=(2.0, 1.0))
    with pytest.raises(InputError, match=r"\(4, 4\) and \(5, 5\)"):
        track_norm(torch.eye(5), matrix, NormReference(1.0), (0.0, 2.0), key="w")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_profile_equals_the_oracle(case, form):
    matrix = FORMS[form](_case(case))
    dense = oracle.to_float64(matrix)
    reading = profile(matrix)
    assert reading.frobenius_norm == pytest.approx(np.linalg.norm(dense), rel=1e-6)
    assert reading.max_abs == pytest.approx(np.abs(dense).max(), rel=1e-6)
    assert reading.norm_collapse == pytest.approx(oracle.norm_collapse(matrix), rel=1e-5, abs=1e-12)
    assert reading.num_nonfinite == 0
    assert reading.zero_rows == (~dense.any(1)).sum()
    assert reading.zero_cols == (~dense.any(0)).sum()


def test_a_faint_row_is_not_a_zero_row():
    matrix = torch.randn(50, 60, generator=seeded_generator("faint"))
    matrix[7] *= 1e-30
    reading = profile(matrix)
    assert reading.zero_rows == 0
    assert reading.norm_collapse is not None
    assert 0 < reading.norm_collapse < 1e-28


def test_profile_sees_the_last_chunk(monkeypatch):
    monkeypatch.setattr(matrices.row_chunks, "__defaults__", (64,))
    matrix = torch.randn(33, 20, generator=seeded_generator("chunks"))
    matrix[32, 19] = 100.0
    assert profile(matrix).max_abs == 100.0
    assert measure_spectrum(matrix).spectral_norm >= 100.0


def test_gram_reads_scaled_chunks(monkeypatch):
    monkeypatch.setattr(gram, "GRAM_CHUNK_ELEMENTS", 500)
    rng = np.random.default_rng(5)
    for shape in ((90, 40), (40, 90)):
        matrix = rng.standard_normal(shape)
        rows, cols = rng.random(shape[0]) + 0.5, rng.random(shape[1]) + 0.5
        scaled = rows[:, None] * matrix * cols
        found, _ = gram.exact_singular_values(
            torch.from_numpy(matrix).float(), row_scale=torch.from_numpy(rows), col_scale=torch.from_numpy(cols)
        )
        np.testing.assert_allclose(found, oracle.singular_values(scaled), rtol=1e-5)


def test_measurements_are_deterministic_and_leave_the_input_alone():
    matrix = torch.nn.Parameter(torch.randn(32, 16, generator=seeded_generator("input")))
    before = matrix.detach().clone()
    state = torch.get_rng_state()
    first, second = estimate_norm(matrix, key="w"), estimate_norm(matrix, key="w")
    assert first == second
    assert first.value == pytest.approx(oracle.spectral_norm(matrix), rel=0.15)
    values = [measure_spectrum(matrix).singular_values for _ in range(2)]
    assert values[0] is not None
    assert values[1] is not None
    assert torch.equal(values[0], values[1])
    assert not values[0].requires_grad
    profile(matrix)
    track_norm(matrix, before, NormReference(first.value, first.error), (0.0, 1e9), key="w")
    assert torch.equal(matrix, before)
    assert matrix.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_measurements_work_in_inference_mode_and_are_not_downcast_by_autocast():
    matrix = torch.randn(300, 700, generator=seeded_generator("modes"))
    plain = estimate_norm(matrix, key="w")
    exact = measure_spectrum(matrix).spectral_norm
    with torch.inference_mode():
        assert estimate_norm(matrix, key="w") == plain
        assert measure_spectrum(matrix * 1).spectral_norm == exact
        assert profile(matrix).num_nonfinite == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert estimate_norm(matrix, key="w") == plain
        assert measure_spectrum(matrix).spectral_norm == exact


def test_read_only_and_reversed_arrays_are_accepted():
    matrix = _case("spiked")
    matrix.flags.writeable = False
    assert measure_spectrum(matrix[::-1]).spectral_norm == pytest.approx(oracle.spectral_norm(matrix), rel=1e-9)
    assert profile(matrix).num_nonfinite == 0


def test_probe_seeds_are_salted_by_content():
    draw = [torch.randn(4, generator=seeded_generator(*parts)) for parts in (("a", 1), ("a", 1), ("a", 2), ("b", 1))]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert not torch.equal(draw[0], draw[3])
    assert not torch.equal(draw[0], torch.randn(4, generator=torch.Generator().manual_seed(0)))


def test_the_upper_bound_fails_no_more_often_than_promised():
    """At 5 %, at most 20 of 400 starts are expected to fail; 34 is more than 3 deviations above."""
    matrix = torch.randn(40, 60, generator=seeded_generator("certificate"))
    expected = oracle.spectral_norm(matrix)
    failures = 0
    for trial in range(400):
        process = lanczos.GolubKahan(matrix, key=trial, max_steps=4)
        process.extend(4)
        lower, _, upper = process.bounds(eps=0.05)
        assert lower <= expected
        failures += upper < expected
    assert failures <= 34


def _decaying(rng, m, n, values):
    size = min(m, n)
    return (_orthonormal(rng, m, size) * values(np.arange(1, size + 1))) @ _orthonormal(rng, n, size).T


@pytest.mark.parametrize("shape", [(57, 290), (280, 61), (130, 130), (180, 150)])
@pytest.mark.parametrize(
    "values",
    [
        lambda i: 1.0 + 0.0 * i,
        lambda i: 1.0 + 1e-3 / i,
        lambda i: i**-0.3,
        lambda i: i**-1.0,
        lambda i: i**-3.0,
        lambda i: 0.8**i,
        lambda i: 0.3**i,
        lambda i: np.where(i <= 5, 1.0, 1e-4),
        lambda i: np.where(i == 1, 100.0, 1.0 + 0.5 / i),
    ],
)
def test_bounds_hold_after_any_number_of_steps(values, shape):
    """Without care for orthogonality the Ritz value runs away by orders of magnitude after 20 steps."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        matrix = torch.from_numpy(_decaying(rng, *shape, values)).float()
        expected = oracle.spectral_norm(matrix)
        process = lanczos.GolubKahan(matrix, key=seed, max_steps=40)
        for steps in range(1, 41):
            process.extend(steps)
            lower, ritz, upper = process.bounds()
            assert lower <= expected <= upper
            assert ritz <= expected * (1 + 2e-6)


def test_an_exhausted_krylov_space_gives_the_norm_without_nan():
    for rank in (1, 2, 3):
        rng = np.random.default_rng(rank)
        matrix = torch.from_numpy(rng.standard_normal((50, rank)) @ rng.standard_normal((rank, 80))).float()
        process = lanczos.GolubKahan(matrix, key="w", max_steps=8)
        process.extend(8)
        assert process.exhausted
        assert len(process.alphas) <= rank + 1
        assert process.ritz_value() == pytest.approx(oracle.spectral_norm(matrix), rel=1e-5)


# The ladder


def _bounds(limit, norm):
    return norm / (1 + limit), norm * (1 + limit)


def _rounded(matrix, bits):
    step = matrix.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(step > 0, (matrix / step).round() * step, matrix)


def _ladder_matrices():
    shapes = [(96, 64), (64, 96), (80, 80), (120, 48)]
    for index in range(48):
        rng = np.random.default_rng(100 + index)
        m, n = shapes[index % 4]
        strengths = (1.6 + 8.4 * index / 47) * np.arange(1, 17) ** -(0.25 + 0.55 * (index % 12) / 11)
        yield index, torch.from_numpy(_with_spikes(rng, m, n, strengths)).float()


def _plant(matrix, strength, index):
    """Add a rank-one term orthogonal to the leading 8 left and right singular vectors."""
    rng = np.random.default_rng(500 + index)
    left, _, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    u, v = rng.standard_normal(matrix.shape[0]), rng.standard_normal(matrix.shape[1])
    u, v = u - left[:, :8] @ (left[:, :8].T @ u), v - right[:8].T @ (right[:8] @ v)
    return matrix + strength * torch.from_numpy(np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v))).float()


def test_the_ladder_is_never_on_the_wrong_side_of_a_limit():
    wrong, decided = [], 0
    for index, before in _ladder_matrices():
        norm = oracle.spectral_norm(before)
        for bits in (8, 4):
            after = _rounded(before, bits)
            true = oracle.spectral_norm(after)
            for limit in (0.002, 0.02, 0.05, 0.10):
                low, high = _bounds(limit, norm)
                found = track_norm(after, before, NormReference(norm), (low, high), key=index)
                decided += 1
                assert abs(found.value - true) <= found.error
                if (low <= found.value <= high) != (low <= true <= high):
                    wrong.append((index, bits, limit, found))
    assert decided == 384
    assert not wrong


def test_the_ladder_decides_limits_a_hair_from_the_norm():
    for index, before in list(_ladder_matrices())[::6]:
        after = _rounded(before, 4)
        norm, true = oracle.spectral_norm(before), oracle.spectral_norm(after)
        for factor in (1 - 1e-3, 1 - 1e-6, 1 + 1e-6, 1 + 1e-3):
            for limit in ((0.0, true * factor), (true * factor, math.inf)):
                found = track_norm(after, before, NormReference(norm), limit, key=index)
                alone = estimate_norm(after, key=index, limit=limit)
                for estimate in (found, alone):
                    assert (limit[0] <= estimate.value <= limit[1]) == (limit[0] <= true <= limit[1])


@pytest.mark.parametrize("limit", [0.02, 0.05, 0.10, 0.50])
def test_the_ladder_catches_a_new_direction_that_no_old_vector_sees(limit):
    for index, before in list(_ladder_matrices())[::4]:
        norm = oracle.spectral_norm(before)
        after = _plant(before, (1 + 1.5 * limit) * norm, index)
        found = track_norm(after, before, NormReference(norm), _bounds(limit, norm), key=index)
        assert found.value > norm * (1 + limit)


@pytest.mark.parametrize("factor", [1000.0, 0.001, 0.0, -1.0])
def test_the_ladder_follows_gross_scaling(factor):
    before = torch.from_numpy(_case("spiked")).float()
    norm = oracle.spectral_norm(before)
    found = track_norm(before * factor, before, NormReference(norm), _bounds(0.1, norm), key="w")
    inside = norm / 1.1 <= found.value <= norm * 1.1
    assert inside == (abs(factor) == 1.0)


def test_an_unchanged_matrix_costs_one_comparison():
    matrix = torch.from_numpy(_case("spiked")).float()
    norm = oracle.spectral_norm(matrix)
    found = track_norm(matrix.clone(), matrix, NormReference(norm, 1e-3), _bounds(0.1, norm), key="w")
    assert found == NormEstimate(norm, 1e-3, "delta-frobenius", 2)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_a_cast_is_a_small_change(dtypes):
    low, high = (torch.from_numpy(_case("spiked")).to(dtype) for dtype in dtypes)
    norm = oracle.spectral_norm(high)
    delta = np.linalg.norm(oracle.to_float64(low) - oracle.to_float64(high), 2)
    for after, before in ((low, high), (high, low)):
        found = track_norm(after, before, NormReference(norm, 0.01 * norm), _bounds(0.1, norm), key="w")
        assert found.method == "delta-frobenius"
        assert delta <= delta_norm_bound(after, before, key="w") <= 0.01 * norm
    assert delta_norm_bound(torch.ones(3, 3).bfloat16(), torch.ones(3, 3), key="w") == 0.0


def test_a_tiny_change_of_a_tiny_matrix_is_not_lost_to_underflow():
    before = torch.from_numpy(_case("spiked")).float() * 1e-25
    norm = oracle.spectral_norm(before)
    found = track_norm(before * 2, before, NormReference(norm), _bounds(0.1, norm), key="w")
    assert found.value == pytest.approx(2 * norm, rel=0.2)
    assert delta_norm_bound(before * 2, before, key="w") >= norm


@pytest.mark.parametrize("form", FORMS)
def test_delta_bound_holds_with_and_without_scales(form):
    rng = np.random.default_rng(11)
    before = FORMS[form](_case("power law"))
    after = before + 1e-3 * rng.standard_normal(before.shape) if isinstance(before, np.ndarray) else before * 1.01
    delta = oracle.to_float64(after) - oracle.to_float64(before)
    rows, cols = rng.random(before.shape[0]) + 0.1, rng.random(before.shape[1]) + 0.1
    scaled = rows[:, None] * delta * cols
    cases = [
        (delta, {}),
        (scaled, {"row_scale": torch.from_numpy(rows), "col_scale": torch.from_numpy(cols)}),
        (rows[:, None] * delta, {"row_scale": torch.from_numpy(rows)}),
        (delta * cols, {"col_scale": torch.from_numpy(cols)}),
    ]
    for expected, scales in cases:
        bound = delta_norm_bound(after, before, key="w", **scales)
        assert np.linalg.norm(expected, 2) <= bound <= 1.0001 * np.linalg.norm(expected)
    assert delta_norm_bound(before, before, key="w") == 0.0


class _Subtractions(TorchDispatchMode):
    """Sizes of the differences that are formed."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.sub:
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["random tall", "random wide", "large wide"])
def test_a_large_difference_is_bounded_without_being_held(form, case, monkeypatch):
    before = FORMS[form](_case(case))
    after = before * 1.01
    scales = {"row_scale": torch.linspace(0.5, 2.0, before.shape[0]), "col_scale": torch.ones(before.shape[1])}
    held = [delta_norm_bound(after, before, key="w"), delta_norm_bound(after, before, key="w", **scales)]
    monkeypatch.setattr(norms, "UNFORMED_ELEMENTS", 1)
    monkeypatch.setattr(norms, "row_chunks", lambda rows, cols, _=None: matrices.row_chunks(rows, cols, 1000))
    with _Subtractions() as seen:
        found = [delta_norm_bound(after, before, key="w"), delta_norm_bound(after, before, key="w", **scales)]
    assert found == pytest.approx(held, rel=1e-4)
    assert 0 < max(seen.sizes) <= 1000
