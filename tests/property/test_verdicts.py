"""Monotone verdicts: more damage never looks better, wider limits never look worse."""

from __future__ import annotations

import math
from dataclasses import replace

from hand_readings import MATRICES, after, baseline, outputs, with_bulk, with_matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from weightproof.guards.conclude import SEVERITY
from weightproof.guards.divergence import Divergence, DivergenceLimits
from weightproof.guards.multiple_testing import benjamini_hochberg
from weightproof.guards.rmt import RMT, RMTLimits
from weightproof.guards.spectral import Spectral, SpectralLimits
from weightproof.guards.variance import Variance, VarianceLimits
from weightproof.types import Readings

steady = settings(derandomize=True, deadline=None, max_examples=60)
names = st.sampled_from(sorted(MATRICES))
log_ratio = st.floats(-4.0, 4.0)
more = st.floats(1.0, 3.0)
kinds = st.sampled_from(["unknown", "quantize", "prune", "train", "preserving"])


def severity(guard: type, now: Readings, limits: object) -> int:
    return SEVERITY[guard().judge(baseline(), now, limits).outcome]


def scaled(kind: str, ratios: dict[str, float]) -> Readings:
    """Matrices multiplied by e^ratio: top singular value and Frobenius norm move together."""
    now = after(kind)
    for name, ratio in ratios.items():
        size = math.exp(ratio)
        now = with_matrix(now, name, spectral_norm=2.0 * size, frobenius_norm=10.0 * size)
    return now


@steady
@given(st.dictionaries(names, log_ratio, min_size=1), names, more, kinds)
def test_larger_growth_or_shrinkage_never_improves_the_spectral_verdict(ratios, name, factor, kind):
    ratio = ratios.get(name, 0.05)
    worse = ratios | {name: ratio * factor}
    before = ratios | {name: ratio}
    limits = SpectralLimits(null_scale=0.05)
    assert severity(Spectral, scaled(kind, worse), limits) >= severity(Spectral, scaled(kind, before), limits)


@steady
@given(st.floats(0.02, 1.0), st.floats(0.1, 1.0), st.floats(0.05, 0.95), kinds)
def test_lost_rank_and_collapse_never_improve_the_spectral_verdict(rank, collapse, factor, kind):
    def read(share: float) -> Readings:
        frobenius = max(2.0, 10.0 * math.sqrt(rank * share))
        return with_matrix(after(kind), "embed", frobenius_norm=frobenius, norm_collapse=0.5 * collapse * share)

    assert severity(Spectral, read(factor), SpectralLimits()) >= severity(Spectral, read(1.0), SpectralLimits())


@steady
@given(log_ratio, st.floats(0.0, 1.9), st.floats(1.0, 4.0), kinds)
def test_a_wider_interval_never_improves_the_spectral_verdict(ratio, error, factor, kind):
    def read(width: float) -> Readings:
        now = scaled(kind, {"embed": ratio})
        return with_matrix(now, "embed", spectral_norm_error=width)

    assert severity(Spectral, read(error * factor), SpectralLimits()) >= severity(
        Spectral, read(error), SpectralLimits()
    )


@steady
@given(st.dictionaries(names, log_ratio, min_size=1), st.floats(0.0, 1.0), more, kinds)
def test_larger_spectral_limits_never_worsen_the_verdict(ratios, kappa, factor, kind):
    now = scaled(kind, ratios)
    narrow = SpectralLimits(kappa=kappa, gross_growth=1.0 + 5 * kappa + 1e-3)
    wide = SpectralLimits(kappa=kappa * factor, gross_growth=(1.0 + 5 * kappa + 1e-3) * factor)
    assert severity(Spectral, now, wide) <= severity(Spectral, now, narrow)
    assert severity(Spectral, now, replace(narrow, null_scale=0.01)) <= severity(Spectral, now, narrow)


def spiky(kind: str, spikes: dict[str, int]) -> Readings:
    now = after(kind)
    for name, count in spikes.items():
        now = with_bulk(now, name, num_spikes=count)
    return now


counts = st.dictionaries(names, st.integers(0, 30), min_size=1)
epsilon = st.floats(0.0, 2.0)


@steady
@given(counts, epsilon, st.integers(0, 5), kinds)
def test_doubling_every_epsilon_never_turns_pass_into_fail(spikes, eps, floor, kind):
    now = spiky(kind, spikes)
    once, twice = (RMTLimits(epsilon=value, floor=floor) for value in (eps, 2 * eps))
    assert severity(RMT, now, twice) <= severity(RMT, now, once)


@steady
@given(st.integers(0, 10), st.integers(0, 10), kinds)
def test_losing_more_outliers_never_improves_the_verdict(lost, extra, kind):
    some, many = (spiky(kind, {"blocks.0.mlp.up": 10 - n}) for n in (lost, min(10, lost + extra)))
    assert severity(RMT, many, RMTLimits()) >= severity(RMT, some, RMTLimits())


@steady
@given(st.integers(0, 30), st.integers(0, 30), kinds)
def test_gaining_more_outliers_never_improves_the_verdict(gained, extra, kind):
    some, many = (spiky(kind, {"blocks.0.mlp.up": 10 + n}) for n in (gained, gained + extra))
    assert severity(RMT, many, RMTLimits()) >= severity(RMT, some, RMTLimits())


@steady
@given(st.floats(0.0, 10.0), more, st.floats(0.0, 1.0), kinds)
def test_divergence_is_monotone_in_value_and_limit(kl, factor, limit, kind):
    here, there = (replace(after(kind), divergence=(outputs(value),)) for value in (kl, kl * factor))
    narrow, wide = DivergenceLimits(kl=limit), DivergenceLimits(kl=limit * factor)
    assert severity(Divergence, there, narrow) >= severity(Divergence, here, narrow)
    assert severity(Divergence, here, wide) <= severity(Divergence, here, narrow)


@steady
@given(log_ratio, more, st.floats(0.0, 2.0), kinds)
def test_variance_is_monotone_in_value_and_limit(ratio, factor, band, kind):
    tap = "random:blocks.0.attn"

    def read(value: float) -> Readings:
        moments = {**baseline().second_moments, tap: 1.5 * math.exp(value)}
        return replace(after(kind), second_moments=moments)

    narrow = VarianceLimits(band=band, gross_band=2 * band)
    wide = VarianceLimits(band=band * factor, gross_band=2 * band * factor)
    assert severity(Variance, read(ratio * factor), narrow) >= severity(Variance, read(ratio), narrow)
    assert severity(Variance, read(ratio), wide) <= severity(Variance, read(ratio), narrow)


@steady
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12), st.integers(0, 11), st.floats(0.0, 1.0))
def test_a_smaller_p_value_never_loses_a_rejection(p_values, index, share):
    index %= len(p_values)
    smaller = [*p_values[:index], p_values[index] * share, *p_values[index + 1 :]]
    before, now = benjamini_hochberg(p_values, 0.05), benjamini_hochberg(smaller, 0.05)
    assert all(new >= old for old, new in zip(before, now, strict=True))
