from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hand_readings import after, baseline, with_bulk, with_matrix

from weightproof.guards.corrections import Correction, apply_correction, corrections
from weightproof.guards.rmt import RMT, RMTLimits
from weightproof.guards.spectral import Spectral, SpectralLimits
from weightproof.types import Outcome, Readings

NAME = "blocks.0.mlp.up"


def gaussian(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read(readings: Readings, weight: torch.Tensor) -> Readings:
    norm = float(torch.linalg.matrix_norm(weight.double(), 2))
    frobenius = float(torch.linalg.vector_norm(weight.double()))
    return with_matrix(readings, NAME, spectral_norm=norm, frobenius_norm=frobenius, norm_collapse=0.5)


def growth(before: Readings, now: Readings, limits: SpectralLimits) -> Outcome:
    measurements = Spectral().judge(before, now, limits).measurements
    return next(
        item.outcome for item in measurements if item.target == NAME and item.statistic == "log_spectral_norm_ratio"
    )


@pytest.mark.parametrize("mode", ["scale", "clip"])
@pytest.mark.parametrize("factor", [1.2, 3.0, 100.0, 1000.0])
@pytest.mark.parametrize(
    # A limit narrower than the rounding of bf16 cannot be met in bf16.
    ("dtype", "kappa"),
    [(torch.float32, 0.1), (torch.float32, 0.001), (torch.bfloat16, 0.1), (torch.bfloat16, 0.02)],
)
def test_a_corrected_matrix_passes_the_very_limit_that_flagged_it(mode, factor, dtype, kappa):
    limits = SpectralLimits(kappa=kappa, correct=mode)
    weight = gaussian(64, 32)
    before, grown = read(baseline(), weight), weight * factor
    now = read(after(), grown)
    assert growth(before, now, limits) in {Outcome.WARN, Outcome.FAIL}
    (correction,) = corrections(before, now, limits)
    fixed = apply_correction(grown, correction, mode).to(dtype)
    assert correction.name == NAME
    assert growth(before, read(after(), fixed), limits) is Outcome.PASS


def test_off_by_default_and_in_training():
    grown = with_matrix(after(), NAME, spectral_norm=20.0, frobenius_norm=100.0)
    assert corrections(baseline(), grown, SpectralLimits()) == ()
    window = replace(grown, edit=after("train").edit)
    assert corrections(baseline(), window, SpectralLimits(correct="scale")) == ()


def test_a_correction_never_raises_the_top_singular_value():
    shrunk = with_matrix(after(), NAME, spectral_norm=0.1, frobenius_norm=0.5)
    assert corrections(baseline(), shrunk, SpectralLimits(correct="scale")) == ()
    weight = gaussian(6, 4)
    harmless = Correction(NAME, 1e6)
    torch.testing.assert_close(apply_correction(weight, harmless, "scale"), weight)
    torch.testing.assert_close(apply_correction(weight, harmless, "clip"), weight)


def test_clip_cuts_only_the_singular_values_above():
    weight = gaussian(6, 4)
    values = torch.linalg.svdvals(weight)
    clipped = apply_correction(weight, Correction(NAME, float(values[1])), "clip")
    torch.testing.assert_close(torch.linalg.svdvals(clipped), values.clamp_max(values[1]))
    assert float(torch.linalg.svdvals(apply_correction(weight, Correction(NAME, 0.1), "clip")).max()) <= 0.1 + 1e-6


def test_scale_to_half_halves_every_element():
    weight = gaussian(8, 3)
    half = float(torch.linalg.matrix_norm(weight, 2)) / 2
    torch.testing.assert_close(apply_correction(weight, Correction(NAME, half), "scale"), weight * 0.5)


@pytest.mark.parametrize("mode", ["scale", "clip"])
def test_a_matrix_with_nan_comes_back_unchanged(mode):
    weight = gaussian(6, 4)
    weight[0, 0] = math.nan
    kept = weight.clone()
    result = apply_correction(weight, Correction(NAME, 0.1), mode)
    torch.testing.assert_close(result, kept, equal_nan=True)
    torch.testing.assert_close(weight, kept, equal_nan=True)


def test_rmt_clips_to_its_growth_limit_under_the_global_null_only():
    limits = RMTLimits(correct="clip")
    grown = with_bulk(after("quantize"), NAME, top_over_edge=6.0)
    (correction,) = corrections(baseline(), grown, limits)
    assert RMT().judge(baseline(), grown, limits).outcome is Outcome.WARN
    fixed = with_bulk(grown, NAME, top_over_edge=correction.max_singular_value / (grown.bulks[NAME].edge_plus or 1.0))
    assert RMT().judge(baseline(), fixed, limits).outcome is Outcome.PASS
    assert corrections(baseline(), grown, RMTLimits(correct="scale")) == ()
    whitened = with_bulk(grown, NAME, null="biwhitened")
    assert corrections(with_bulk(baseline(), NAME, null="biwhitened"), whitened, limits) == ()
