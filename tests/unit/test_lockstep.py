"""The sharded screen against float64 oracles and against the screen of whole matrices, on simulated processes."""

import dataclasses
import math

import matrix_cases as cases
import numpy as np
import pytest
import torch
from simulated_processes import cut, simulate
from tests.oracles import spectra as oracle

from weightproof.errors import InputError
from weightproof.numerics.lockstep import ScreenRequest, predicted_bytes, screen
from weightproof.numerics.norms import NormReference
from weightproof.numerics.sharded_lanczos import LocalMatrix, ShardedGolubKahan
from weightproof.spectrum import delta_norm_bound, estimate_norm, profile, track_norm

CUTS = [("rows", False), ("rows", True), ("columns", False), ("columns", True)]
all_cuts = pytest.mark.parametrize(("layout", "turned"), CUTS)


def _screened(size, matrices, layout="rows", turned=False):
    """What every rank finds of `matrices`, a list of (now, before, further arguments of the request)."""

    def body(processes):
        requests = []
        for index, (now, before, known) in enumerate(matrices):
            part = cut(now, size, processes.rank, layout, turned)
            other = None if before is None else cut(before, size, processes.rank, layout, turned)
            requests.append(ScreenRequest(f"w{index}", part, other, **known))
        return screen(processes, requests)

    results, ranks = simulate(size, body)
    assert all(result == results[0] for result in results)
    return results[0], ranks


def _alone(now, size=2, before=None, layout="rows", turned=False, **known):
    return _screened(size, [(now, before, known)], layout, turned)[0][0]


def _band(limit, norm):
    return norm / (1 + limit), norm * (1 + limit)


def _assert_same_profile(found, expected):
    for field in ("num_nonfinite", "zero_rows", "zero_cols"):
        assert getattr(found, field) == getattr(expected, field), field
    for field in ("frobenius_norm", "max_abs", "norm_collapse"):
        value = getattr(expected, field)
        assert getattr(found, field) == (None if value is None else pytest.approx(value, rel=1e-6, abs=0)), field


# ---- profiles


@all_cuts
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_profiles_are_those_of_the_whole_matrices(layout, turned, size, dtype):
    matrices = [cases.make(name).to(dtype) for name in cases.MAKERS]
    found, _ = _screened(size, [(matrix, None, {}) for matrix in matrices], layout, turned)
    for matrix, screened in zip(matrices, found, strict=True):
        _assert_same_profile(screened.profile, profile(matrix))
        assert screened.relative_delta is None
        assert screened.whitened_delta is None


@all_cuts
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_on_one_rank_is_known_to_all(layout, turned, value):
    whole = cases.make("spiked")
    whole[0, 0] = whole[0, 1] = whole[1, 0] = value  # in the first part, however it is cut
    clean = cases.make("spiked")
    known = {"reference": NormReference(1.4), "limit": (1.0, 2.0), "row_scale": torch.ones(97)}
    broken = _alone(whole, 3, clean, layout, turned, **known)
    _assert_same_profile(broken.profile, profile(whole))
    assert broken.profile.num_nonfinite == 3
    assert broken.norm is None
    assert broken.whitened_delta is None
    healed = _alone(clean, 3, whole, layout, turned, **known)
    _assert_same_profile(healed.profile, profile(clean))
    assert healed.norm is None
    assert broken.relative_delta is healed.relative_delta is None
    assert healed.whitened_delta is None


# ---- norms without a reference


@all_cuts
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_bracket_holds_the_norm_or_there_is_none(layout, turned, size):
    matrices = {name: cases.make(name) for name in cases.MAKERS}
    found, _ = _screened(size, [(matrix, None, {}) for matrix in matrices.values()], layout, turned)
    undecided = set()
    for (name, matrix), screened in zip(matrices.items(), found, strict=True):
        if screened.norm is None:
            undecided.add(name)
            assert "gram" in estimate_norm(matrix, key="w").method or min(matrix.shape) < 4
            continue
        true = oracle.spectral_norm(matrix)
        assert abs(screened.norm.value - true) <= screened.norm.error <= 0.3 * true
        assert screened.norm.method.startswith("sharded")
    assert undecided == {"low rank", "one row", "one column", "one entry", "three rows", "tiny", "huge"}


@all_cuts
def test_limits_without_a_reference_are_decided_as_for_the_whole_matrix(layout, turned):
    requests, limits = [], []
    for index, matrix in cases.ladder_matrices(every=4):
        true = oracle.spectral_norm(matrix)
        for factor in (0.5, 0.9, 1.1, 2.0):
            for limit in ((0.0, factor * true), (factor * true, math.inf)):
                limits.append((matrix, true, limit, index))
                requests.append((matrix, None, {"limit": limit}))
    found, _ = _screened(2, requests, layout, turned)
    for screened, (matrix, true, limit, index) in zip(found, limits, strict=True):
        assert screened.norm is not None
        assert abs(screened.norm.value - true) <= screened.norm.error
        inside = limit[0] <= screened.norm.value <= limit[1]
        assert inside == (limit[0] <= true <= limit[1])
        whole = estimate_norm(matrix, key=index, limit=limit)
        assert inside == (limit[0] <= whole.value <= limit[1])


SPECTRA = {
    "equal": lambda i: 1.0 + 0.0 * i,
    "nearly equal": lambda i: 1.0 + 1e-3 / i,
    "slow": lambda i: i**-0.3,
    "fast": lambda i: i**-3.0,
    "geometric": lambda i: 0.3**i,
    "a few": lambda i: np.where(i <= 5, 1.0, 1e-4),
    "one far out": lambda i: np.where(i == 1, 100.0, 1.0 + 0.5 / i),
}


@pytest.mark.parametrize("shape", [(57, 290), (280, 61), (130, 130)])
@pytest.mark.parametrize("values", SPECTRA)
@pytest.mark.parametrize("cut_dim", [0, 1])
def test_bounds_hold_after_any_number_of_steps(values, shape, cut_dim):
    spectrum = SPECTRA[values](np.arange(1, min(shape) + 1))
    matrix = torch.from_numpy(cases.decaying(np.random.default_rng(1), *shape, spectrum)).float()
    true = oracle.spectral_norm(matrix)
    parts = [LocalMatrix(part.contiguous(), cut_dim=cut_dim) for part in matrix.chunk(3, cut_dim)]
    ranks = [ShardedGolubKahan(part, key="w", leads=rank == 0) for rank, part in enumerate(parts)]
    for steps in range(1, 41):
        for rank in ranks:
            rank.reserve(steps)
        total = torch.stack([rank.send() for rank in ranks]).sum(0)
        for rank in ranks:
            rank.receive(total)
        found = ranks[0].coefficients(torch.stack([rank.found() for rank in ranks]).sum(0))
        lower, ritz, upper = found.bounds()
        assert lower <= true <= upper
        assert ritz <= true * (1 + 2e-6)


def test_the_upper_bound_fails_no_more_often_than_promised():
    """At 5 %, at most 20 of 400 starts are expected to fail; 34 is more than 3 deviations above."""
    matrix = torch.randn(40, 60, generator=torch.Generator().manual_seed(3))
    true = oracle.spectral_norm(matrix)
    failures = 0
    for trial in range(400):
        process = ShardedGolubKahan(LocalMatrix(matrix, cut_dim=0), key=trial, leads=True)
        process.reserve(4)
        for _ in range(4):
            process.receive(process.send())
        lower, _, upper = process.coefficients(process.found()).bounds(eps=0.05)
        assert lower <= true
        failures += upper < true
    assert failures <= 34


# ---- the delta ladder


@all_cuts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ladder_decides_as_for_whole_matrices(layout, turned, dtype):
    rows = []
    for index, matrix in cases.ladder_matrices(every=6):
        before = matrix.to(dtype)
        norm = oracle.spectral_norm(before)
        for bits in (8, 4):
            after = cases.rounded(matrix, bits).to(dtype)
            for limit in (0.002, 0.006, 0.05, 0.20):
                rows.append((index, before, after, oracle.spectral_norm(after), norm, _band(limit, norm)))
    requests = [
        (after, before, {"reference": NormReference(norm), "limit": limit}) for _, before, after, _, norm, limit in rows
    ]
    found, _ = _screened(2, requests, layout, turned)
    rungs, undecided = set(), 0
    for screened, (index, before, after, true, norm, limit) in zip(found, rows, strict=True):
        if screened.norm is None:
            undecided += 1
            continue
        value, error = screened.norm.value, screened.norm.error
        rung = screened.norm.method.split(",")[0]
        rungs.add(rung)
        assert abs(value - true) <= error
        inside = limit[0] <= value <= limit[1]
        assert inside == (limit[0] <= true <= limit[1])
        whole = track_norm(after, before, NormReference(norm), limit, key=index)
        assert inside == (limit[0] <= whole.value <= limit[1])
        expected = np.linalg.norm(oracle.to_float64(after) - oracle.to_float64(before))
        assert screened.relative_delta == pytest.approx(expected / np.linalg.norm(oracle.to_float64(before)), rel=1e-5)
    assert {"sharded delta-frobenius", "sharded lanczos-8", "sharded lanczos-12", "sharded lanczos-24"} <= rungs
    assert undecided < len(rows) / 20


@all_cuts
def test_the_second_rung_decides_between_the_two_norms_of_the_change(layout, turned):
    for shape in ((300, 500), (500, 300)):
        strengths = 6 * np.arange(1, 33) ** -0.5
        before = torch.from_numpy(cases.spiked(np.random.default_rng(2), *shape, strengths)).float()
        after = cases.rounded(before, 4)
        norm, change = oracle.spectral_norm(before), float(np.linalg.norm(oracle.to_float64(after - before)))
        limit = (0.0, norm + 0.7 * change)
        found = _alone(after, 2, before, layout, turned, reference=NormReference(norm, 0.01 * change), limit=limit)
        assert found.norm.method.startswith("sharded delta-lanczos-4")
        assert abs(found.norm.value - oracle.spectral_norm(after)) <= found.norm.error <= 0.7 * change


@all_cuts
@pytest.mark.parametrize("limit", [0.02, 0.10, 0.50])
def test_a_new_direction_that_no_old_vector_sees_is_caught(layout, turned, limit):
    requests, highs = [], []
    for index, before in cases.ladder_matrices(every=4):
        norm = oracle.spectral_norm(before)
        after = cases.planted(before, (1 + 1.5 * limit) * norm, index)
        requests.append((after, before, {"reference": NormReference(norm), "limit": _band(limit, norm)}))
        highs.append(norm * (1 + limit))
    found, _ = _screened(3, requests, layout, turned)
    caught = [s.norm is None or s.norm.value - s.norm.error > high for s, high in zip(found, highs, strict=True)]
    assert all(caught)
    assert sum(s.norm is not None for s in found) >= len(found) * 0.6


@pytest.mark.parametrize("factor", [1000.0, 0.001, 0.0, -1.0])
def test_the_ladder_follows_gross_scaling(factor):
    before = cases.make("spiked")
    norm = oracle.spectral_norm(before)
    found = _alone(before * factor, 2, before, reference=NormReference(norm), limit=_band(0.1, norm))
    assert found.norm is not None
    assert found.norm.value == pytest.approx(abs(factor) * norm, rel=0.1)
    assert found.relative_delta == pytest.approx(abs(factor - 1), rel=1e-6)


def test_an_unchanged_matrix_costs_one_sum():
    matrix = cases.make("spiked")
    norm = oracle.spectral_norm(matrix)
    known = {"reference": NormReference(norm, 1e-3), "limit": _band(0.1, norm), "row_scale": torch.ones(97)}
    (found,), ranks = _screened(2, [(matrix, matrix.clone(), known)])
    assert (found.norm.value, found.norm.error, found.norm.method) == (norm, 1e-3, "sharded delta-frobenius")
    assert (found.relative_delta, found.whitened_delta) == (0.0, 0.0)
    assert len(ranks[0].operations) == 1


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_a_cast_is_a_small_change(dtypes):
    exact = torch.from_numpy(cases.MAKERS["spiked"](np.random.default_rng(7)))
    low, high = (exact.to(dtype) for dtype in dtypes)
    norm = oracle.spectral_norm(high)
    change = np.linalg.norm(oracle.to_float64(low) - oracle.to_float64(high), 2)
    for after, before in ((low, high), (high, low)):
        known = {"reference": NormReference(norm, 0.01 * norm), "limit": _band(0.1, norm)}
        found = _alone(after, 2, before, row_scale=torch.ones(97), **known)
        assert found.norm.method == "sharded delta-frobenius"
        assert change <= found.whitened_delta <= 0.01 * norm
    same = _alone(torch.ones(3, 3).bfloat16(), 2, torch.ones(3, 3), row_scale=torch.ones(3))
    assert (same.relative_delta, same.whitened_delta) == (0.0, 0.0)


def test_changes_of_tiny_and_huge_matrices_are_not_lost():
    for scale in (1e-25, 1e25):
        before = cases.make("spiked") * scale
        norm = oracle.spectral_norm(before)
        known = {"reference": NormReference(norm), "limit": _band(0.1, norm)}
        found = _alone(before * 1.01, 3, before, row_scale=torch.ones(97), **known)
        assert found.norm is not None
        assert abs(found.norm.value - 1.01 * norm) <= found.norm.error
        assert found.relative_delta == pytest.approx(0.01, rel=1e-4)
        assert 0.01 * norm <= found.whitened_delta * (1 + 1e-4)
        assert _alone(before * 2, 3, before, **known).norm is None  # only the exact norm can tell


def test_a_zero_matrix_has_a_known_norm():
    matrix = cases.make("spiked")
    norm = oracle.spectral_norm(matrix)
    known = {"reference": NormReference(norm), "limit": _band(0.1, norm)}
    gone = _alone(torch.zeros_like(matrix), 2, matrix, **known)
    assert (gone.norm.value, gone.norm.error, gone.relative_delta) == (0.0, 0.0, 1.0)
    born = _alone(matrix, 2, torch.zeros_like(matrix), reference=NormReference(0.0), limit=(0.0, 10 * norm))
    assert abs(born.norm.value - norm) <= born.norm.error
    assert born.relative_delta is None


# ---- whitened changes


@all_cuts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whitened_bound_holds_and_is_as_tight_as_for_whole_matrices(layout, turned, dtype):
    rng = np.random.default_rng(11)
    requests, expected = [], []
    for name in ("power law", "tall noise", "unequal rows", "low rank", "one row", "one column", "a zero row"):
        before = cases.make(name)
        after = cases.rounded(before, 4).to(dtype)
        rows, cols = (torch.from_numpy(np.exp(rng.standard_normal(side))) for side in before.shape)
        delta = oracle.to_float64(after) - oracle.to_float64(before)
        scaled = delta * rows.numpy()[:, None] * cols.numpy()
        for scales in ({"row_scale": rows, "col_scale": cols}, {"row_scale": rows}, {"col_scale": cols}):
            truth = {2: scaled, 1: delta * (rows.numpy()[:, None] if "row_scale" in scales else cols.numpy())}
            requests.append((after, before, scales))
            expected.append((truth[len(scales)], delta_norm_bound(after, before, key="w", **scales)))
    found, _ = _screened(3, requests, layout, turned)
    for screened, (delta, whole) in zip(found, expected, strict=True):
        bound, norm = screened.whitened_delta, np.linalg.norm(delta, 2)
        assert norm * (1 - 1e-6) <= bound <= 1.0001 * np.linalg.norm(delta) + 1e-30
        assert bound <= 2.5 * whole


# ---- lockstep


def test_all_matrices_share_the_sums():
    """However many matrices, no more sums than the slowest of them needs; the decided ones drop out."""
    matrices = [(cases.make(name), None, {}) for name in ("power law", "spiked", "tall noise", "zero")]
    alone = [_screened(2, [matrix])[1][0].operations for matrix in matrices]
    found, ranks = _screened(2, matrices * 3)
    assert len(ranks[0].operations) == max(len(operations) for operations in alone)
    assert len(alone[0]) < len(alone[1]) < len(alone[2])
    assert len(alone[3]) == 1
    assert "9 vectors" in ranks[0].operations[1]
    assert "3 vectors" in ranks[0].operations[-1]
    assert found[0].profile == found[4].profile


def test_the_result_does_not_depend_on_the_company():
    matrices = [(cases.make(name), None, {}) for name in ("spiked", "power law", "unequal rows")]
    together, _ = _screened(3, matrices)
    for index, (matrix, _, _) in enumerate(matrices):
        results, _ = simulate(3, lambda p, i=index, w=matrix: screen(p, [ScreenRequest(f"w{i}", cut(w, 3, p.rank))]))
        assert results[0] == [together[index]]


def test_all_ranks_go_by_the_numbers_of_the_first(monkeypatch):
    """Ranks whose processors round differently must not part ways."""
    receive = ShardedGolubKahan.receive

    def rounding_otherwise(self, total):
        receive(self, total)
        if not self._leads:
            self._coefficients[self.steps - 1] *= 1 + 1e-3

    monkeypatch.setattr(ShardedGolubKahan, "receive", rounding_otherwise)
    matrices = [(cases.make(name), None, {}) for name in ("spiked", "power law", "tall noise")]
    found, _ = _screened(3, matrices)  # asserts equal results
    assert all(screened.norm is not None for screened in found)


def test_bytes_sent_follow_the_formula():
    before = cases.make("power law")
    norm = oracle.spectral_norm(before)
    after = cases.rounded(before, 4)
    known = {"reference": NormReference(norm), "limit": _band(0.02, norm), "row_scale": torch.ones(130)}
    for size in (2, 3):
        for layout in ("rows", "columns"):
            (found,), ranks = _screened(size, [(after, before, known)], layout)
            steps = int(found.norm.method.removeprefix("sharded lanczos-").split(",")[0])
            request = ScreenRequest("w0", cut(after, size, 0, layout), limit=known["limit"])
            predicted = predicted_bytes(request, size, delta=True, whitened=True, norm_steps=steps)
            assert ranks[0].bytes_sent == pytest.approx(predicted, abs=2 * len(ranks[0].operations))
    assert predicted_bytes(request, 1, norm_steps=8) == 0.0


def test_modes_of_torch_change_nothing():
    matrix = cases.make("power law")
    plain = _alone(matrix, 1)
    with torch.inference_mode():
        assert _alone(matrix, 1) == plain
    with torch.autocast("cpu", dtype=torch.bfloat16):
        requests = [ScreenRequest("w0", cut(matrix.requires_grad_(), 1, 0))]
        assert simulate(1, lambda p: screen(p, requests))[0] == [[plain]]


def test_no_request_needs_no_sum():
    results, ranks = simulate(2, lambda processes: screen(processes, []))
    assert results == [[], []]
    assert ranks[0].operations == []


# ---- bad input


def _refused(request, match):
    with pytest.raises(InputError, match=match):
        simulate(1, lambda processes: screen(processes, [request]))


def test_bad_requests_are_refused_by_name_before_anything_is_sent():
    shard = cut(cases.make("spiked"), 1, 0)
    other = cut(cases.make("tall noise"), 1, 0)
    _refused(ScreenRequest("layer.w", dataclasses.replace(shard, layout="flat")), "'layer.w'.*flat.*assemble")
    _refused(ScreenRequest("layer.w", dataclasses.replace(shard, shape=(97, 16, 10))), "'layer.w'.*assemble")
    _refused(ScreenRequest("layer.w", shard, other), "'layer.w'.*cut both alike")
    _refused(ScreenRequest("layer.w", shard, dataclasses.replace(shard, turned=True)), "cut both alike")
    _refused(ScreenRequest("layer.w", shard, shard, row_scale=torch.ones(160)), r"'layer.w'.*\(97,\)")
    _refused(ScreenRequest("layer.w", shard, limit=(2.0, 1.0)), "low <= high")
