"""Pictures are valid PNG of the stated size, whatever the spectrum looks like."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from weightproof.marchenko_pastur import fit_bulk
from weightproof.reporting.plots import (
    FLOOR,
    Candidate,
    bulk_density,
    decision_png,
    inspect_png,
    pure_bulk_curve,
    spectrum_png,
)
from weightproof.types import BulkFit


def make_fit(d_out=64, d_in=48, *, spikes=(), null="biwhitened", sigma=0.02, seed=0):
    """A fit of noise with planted spikes (in units of the edge), built without the fitting code."""
    rng = np.random.default_rng(seed)
    high, low = max(d_out, d_in), min(d_out, d_in)
    edge = sigma * (high**0.5 + low**0.5)
    values = np.linalg.svd(rng.standard_normal((d_out, d_in)) * sigma, compute_uv=False)
    values[: len(spikes)] = [edge * spike for spike in spikes]
    threshold = edge * 1.05
    return BulkFit(
        name="m",
        d_out=d_out,
        d_in=d_in,
        sigma_mp=sigma,
        aspect_ratio=low / high,
        edge_minus=sigma * (high**0.5 - low**0.5),
        edge_plus=edge,
        threshold=threshold,
        num_spikes=int((values > threshold).sum()),
        spike_energy=0.0,
        ks_distance=0.05,
        null=null,
        method="test",
        singular_values=torch.from_numpy(values),
    )


def zero_fit():
    """What a fit of an all-zero matrix would carry: no scale, no edge."""
    return BulkFit(
        "zero", 8, 4, 0.0, 0.5, 0.0, 0.0, 0.0, 0, 0.0, 1.0, "global", "test", torch.zeros(4, dtype=torch.float64)
    )


def size_of(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        image.load()
        return image.size


@pytest.mark.parametrize(
    "fit",
    [
        make_fit(),
        make_fit(spikes=(2.0, 1.5)),
        make_fit(spikes=(40.0, 9.0, 1.2)),
        make_fit(32, 32, null="signflip"),
        make_fit(200, 3),
        zero_fit(),
    ],
    ids=["noise", "spiked", "far spikes", "square", "flat", "zero"],
)
def test_spectrum_picture_of_any_shape_has_the_stated_size(fit):
    assert size_of(spectrum_png("layer.weight", fit)) == (962, 442)
    assert size_of(spectrum_png("layer.weight", fit, fit)) == (962, 754)


def test_pictures_are_deterministic():
    assert spectrum_png("w", make_fit(spikes=(2.0,))) == spectrum_png("w", make_fit(spikes=(2.0,)))


def test_decision_picture_survives_a_version_without_a_fit():
    candidates = [
        Candidate("base", make_fit(spikes=(3.0,)), None, 2.0),
        Candidate("INT8 per channel", make_fit(spikes=(3.0,)), 1e-4, 2.001, "KEEP"),
        Candidate("INT2 per channel", None, 3.0, 6.0, "ROLLBACK"),
    ]
    assert size_of(decision_png("layer.weight", candidates, 0.02)) == (1586, 858)


@pytest.mark.parametrize("families", [[], ["attn"], ["attn", "ffn", "embed", "head", "conv"]])
def test_inspect_picture_has_a_panel_per_family(families):
    width, height = size_of(inspect_png("model", [(family, make_fit()) for family in families]))
    assert width > 500
    assert height > 400


@pytest.mark.parametrize(("d_out", "d_in"), [(64, 48), (48, 64), (50, 50)])
def test_bulk_density_integrates_to_one(d_out, d_in):
    fit = make_fit(d_out, d_in)
    grid = np.linspace(0.0, fit.edge_plus, 20_001)
    assert np.trapezoid(bulk_density(fit, grid), grid) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("shape", [(400, 400), (300, 500), (80, 800)])
def test_noise_lies_on_the_curve_of_pure_noise(shape):
    fit = fit_bulk(torch.randn(shape, generator=torch.Generator().manual_seed(0)), "global")
    ranks, values = pure_bulk_curve(fit)
    measured = np.maximum(fit.singular_values.numpy() / fit.edge_plus, FLOOR)
    expected = np.interp((np.arange(len(measured)) + 0.5) / len(measured), ranks, values)
    assert np.abs(measured - expected).max() < 0.02
