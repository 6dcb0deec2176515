from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from architectures import build
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles.circuits import ov_values, qk_values

from weightproof import GuardSession
from weightproof.baseline import Baseline
from weightproof.circuits import (
    MOST_VALUES,
    head_grams,
    log_size_ratio,
    normalised_grams,
    product_spectra,
    row_norms,
    spectrum_distance,
    summary,
)
from weightproof.collective import Processes
from weightproof.probes import State, read_state
from weightproof.readings.changes import kept_circuits
from weightproof.readings.circuit_finder import UNKNOWN, find_circuits
from weightproof.readings.circuits import config_of, read_circuits, vectors_of
from weightproof.types import Outcome, WeightMatrix
from weightproof.weights import iter_weight_matrices

ALONE = Processes.alone()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def circuits(model):
    return read_circuits(list(iter_weight_matrices(model)), vectors_of(model, ALONE), config_of(model), ALONE)


def values(model, name: str) -> torch.Tensor:
    found = circuits(model)[name].values
    assert found is not None
    return torch.tensor(found, dtype=torch.float64)


# ---- numerics against explicit products -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e18])
def test_spectra_of_heads_are_those_of_the_products(dtype, heads, shared, scale):
    q, k = (draw(8 * heads, 40, dtype=dtype) * scale, draw(8 * shared, 40, seed=1, dtype=dtype))
    gain = draw(40, seed=2).abs()
    found = product_spectra(head_grams(q, heads, gain), head_grams(k, shared, gain)).flatten().sort(descending=True)
    expected = qk_values(q, k, heads, shared, gain)
    torch.testing.assert_close(found.values, expected, rtol=1e-7, atol=1e-7 * float(expected[0]))

    o, v = draw(48, 8 * heads, seed=3, dtype=dtype), draw(8 * shared, 40, seed=4, dtype=dtype) * scale
    found = product_spectra(head_grams(o.t(), heads), head_grams(v, shared, gain)).flatten().sort(descending=True)
    expected = ov_values(o, v, heads, shared, gain)
    torch.testing.assert_close(found.values, expected, rtol=1e-7, atol=1e-7 * float(expected[0]))


def test_low_rank_zero_and_non_finite_heads():
    q, k = draw(16, 24), draw(16, 24, seed=1)
    q[8:] = torch.outer(draw(8, seed=2), draw(24, seed=3))
    found = product_spectra(head_grams(q, 2), head_grams(k, 2))
    assert int((found[1] > 1e-6 * found[1, 0]).sum()) == 1
    assert product_spectra(head_grams(q * 0, 2), head_grams(k, 2)).abs().max() == 0.0
    k[3, 5] = math.inf
    assert product_spectra(head_grams(q, 2), head_grams(k, 2)).isnan().all()


def test_a_norm_behind_the_projection_takes_its_scale_away():
    grams, gain = head_grams(draw(16, 24), 2), draw(8, seed=1)
    torch.testing.assert_close(normalised_grams(grams * 49.0, gain), normalised_grams(grams, gain))
    assert not torch.allclose(normalised_grams(grams, gain * 2), normalised_grams(grams, gain))
    assert normalised_grams(grams * 0, gain).abs().max() == 0.0
    # One norm over all heads (OLMo2): the heads keep their sizes relative to each other.
    uneven = grams * torch.tensor([1.0, 4.0])[:, None, None].double()
    whole = normalised_grams(uneven, torch.ones(16))
    assert float(whole.diagonal(dim1=1, dim2=2).sum()) == pytest.approx(1.0)
    ratio = whole[1].trace() / whole[0].trace()
    assert float(ratio) == pytest.approx(float(uneven[1].trace() / uneven[0].trace()))


def test_row_norms_are_those_of_numpy_over_several_chunks():
    matrix, gain = draw(300, 1000), draw(1000, seed=1)
    expected = np.linalg.norm(matrix.double().numpy() * gain.double().numpy(), axis=1)
    np.testing.assert_allclose(row_norms(matrix, gain).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(row_norms(matrix.t()).numpy(), np.linalg.norm(matrix.double().numpy(), axis=0))


def test_a_long_spectrum_is_kept_as_its_largest_values_and_root_mean_squares():
    spectrum = draw(5000).double().abs()
    kept = summary(spectrum)
    assert len(kept) == MOST_VALUES
    assert list(kept) == sorted(kept, reverse=True)
    assert kept[:128] == tuple(spectrum.sort(descending=True).values[:128].tolist())
    assert summary(spectrum[:MOST_VALUES]) == tuple(spectrum[:MOST_VALUES].sort(descending=True).values.tolist())
    permuted = spectrum[torch.randperm(5000, generator=torch.Generator().manual_seed(1))]
    assert summary(permuted) == kept


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 1e6), st.floats(0.0, 1e6)), min_size=1, max_size=12), st.randoms())
def test_distance_is_that_of_multisets_and_the_least_over_assignments(pairs, random):
    before, after = ([pair[side] for pair in pairs] for side in (0, 1))
    found = spectrum_distance(before, after)
    shuffled = random.sample(after, len(after))
    assert spectrum_distance(before, shuffled) == found
    if (size := math.hypot(*before)) > 0.0:
        assert found <= math.dist(before, shuffled) / size * (1 + 1e-9) + 1e-9
        assert spectrum_distance(before, before) == 0.0


def test_distance_of_scaled_and_zero_spectra():
    before = (4.0, 3.0, 1.0)
    assert spectrum_distance(before, tuple(1.5 * value for value in before)) == pytest.approx(0.5)
    assert spectrum_distance(before, tuple(0.5 * value for value in before)) == pytest.approx(0.5)
    assert spectrum_distance(before, (0.0,) * 3) == pytest.approx(1.0)
    assert (spectrum_distance((0.0,), (0.0,)), spectrum_distance((0.0,), (1.0,))) == (0.0, math.inf)
    with pytest.raises(ValueError, match="3 values before and 2 after"):
        spectrum_distance(before, (1.0, 2.0))
    assert log_size_ratio(before, tuple(100 * value for value in before)) == pytest.approx(math.log(100))
    assert (log_size_ratio(before, (0.0,) * 3), log_size_ratio((0.0,), (1.0,))) == (-math.inf, None)


# ---- which matrices of which architecture ---------------------------------------------------------------------------

# Circuits of the first layer that has them, and how many there are in the two-layer model.
FOUND = {
    "gpt2": ("transformer.h.0", {"attn:qk", "attn:ov", "mlp:up", "mlp:up*down"}, 8),
    "llama": ("model.layers.0", {"self_attn:qk", "self_attn:ov", "mlp:gate", "mlp:up*down"}, 8),
    "qwen3": ("model.layers.0", {"self_attn:qk", "self_attn:ov", "mlp:gate", "mlp:up*down"}, 8),
    "bert": ("bert.encoder.layer.0", {"attention:qk", "attention:ov", ":up", ":up*down"}, 8),
    "t5": ("decoder.block.0", {
        "layer.0.SelfAttention:qk", "layer.0.SelfAttention:ov", "layer.1.EncDecAttention:qk",
        "layer.1.EncDecAttention:ov", "layer.2.DenseReluDense:up*down"}, 16),
    "mixtral": ("model.layers.0", {"self_attn:qk", "self_attn:ov"} | {
        f"mlp.experts[{e}]:{what}" for e in range(4) for what in ("gate", "up*down")}, 20),
    "vit": ("vit.layers.0", {"attention:qk", "attention:ov", "mlp:up", "mlp:up*down"}, 8),
    "whisper": ("model.decoder.layers.0", {
        "self_attn:qk", "self_attn:ov", "encoder_attn:qk", "encoder_attn:ov", ":up", ":up*down"}, 20),
}  # fmt: skip


@pytest.mark.parametrize("architecture", FOUND)
def test_every_circuit_of_the_known_architectures_is_read(architecture):
    layer, expected, number = FOUND[architecture]
    found = circuits(build(architecture))
    names = {name.removeprefix(layer).removeprefix(".") for name in found if name.startswith(layer)}
    assert names == expected
    assert len(found) == number
    assert all(one.values is not None and one.reason is None for one in found.values())


def test_values_are_those_of_the_named_products():
    llama = build("llama")
    layer, torch_gain = llama.model.layers[0], draw(32, seed=5).abs()
    with torch.no_grad():
        layer.input_layernorm.weight.copy_(torch_gain)
        layer.post_attention_layernorm.weight.copy_(torch_gain.flip(0))
    attn, mlp, gain = layer.self_attn, layer.mlp, torch_gain.flip(0).double()
    expected = qk_values(attn.q_proj.weight.detach(), attn.k_proj.weight.detach(), 4, 2, torch_gain)
    torch.testing.assert_close(values(llama, "model.layers.0.self_attn:qk"), expected, rtol=1e-6, atol=1e-9)
    expected = ov_values(attn.o_proj.weight.detach(), attn.v_proj.weight.detach(), 4, 2, torch_gain)
    torch.testing.assert_close(values(llama, "model.layers.0.self_attn:ov"), expected, rtol=1e-6, atol=1e-9)
    products = (mlp.up_proj.weight.double() * gain).norm(dim=1) * mlp.down_proj.weight.double().norm(dim=0)
    found = values(llama, "model.layers.0.mlp:up*down")
    torch.testing.assert_close(found, products.detach().sort(descending=True).values)


def test_fused_projections_are_cut_where_the_architecture_cuts_them():
    gpt2 = build("gpt2")
    attn, gain = gpt2.transformer.h[0].attn, draw(32, seed=5).abs()
    with torch.no_grad():
        gpt2.transformer.h[0].ln_1.weight.copy_(gain)
    q, k, v = attn.c_attn.weight.detach().t().split(32)
    torch.testing.assert_close(
        values(gpt2, "transformer.h.0.attn:qk"), qk_values(q, k, 4, 4, gain), atol=1e-9, rtol=1e-6
    )
    o = attn.c_proj.weight.detach().t()
    torch.testing.assert_close(
        values(gpt2, "transformer.h.0.attn:ov"), ov_values(o, v, 4, 4, gain), atol=1e-9, rtol=1e-6
    )


def test_the_three_of_each_head_lie_together_in_neox():
    import transformers

    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, num_attention_heads=4))
    attn = model.gpt_neox.layers[0].attention
    q, k, v = (part.reshape(32, 32) for part in attn.query_key_value.weight.detach().reshape(4, 3, 8, 32).unbind(1))
    found = values(model, "gpt_neox.layers.0.attention:qk")
    torch.testing.assert_close(found, qk_values(q, k, 4, 4), atol=1e-9, rtol=1e-6)
    found = values(model, "gpt_neox.layers.0.attention:ov")
    torch.testing.assert_close(found, ov_values(attn.dense.weight.detach(), v, 4, 4), atol=1e-9, rtol=1e-6)


def test_what_is_laid_out_in_no_known_way_is_named():
    mamba = circuits(build("mamba"))
    assert {name: one.reason for name, one in mamba.items()} == {
        f"backbone.layers.{layer}.mixer:qk": UNKNOWN for layer in range(2)
    }
    matrices = list(iter_weight_matrices(build("llama")))
    unsized = find_circuits(matrices, {}, {})
    attention = [one for one in unsized if one.kind != "mlp"]
    assert len(attention) == 4
    assert all(one.reason is not None and "does not say how many heads" in one.reason for one in attention)
    assert all(one.reason is None for one in unsized if one.kind == "mlp")
    assert circuits(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))) == {}


def test_a_refused_matrix_is_the_reason_of_its_circuit():
    matrices = [
        WeightMatrix(**{**{f: getattr(one, f) for f in WeightMatrix.__slots__}, "refusal": "on the meta device"})
        if one.name.endswith("layers.0.self_attn.k_proj.weight")
        else one
        for one in iter_weight_matrices(build("llama"))
    ]
    found = {
        one.name: one.reason
        for one in find_circuits(matrices, {}, {"num_attention_heads": 4, "num_key_value_heads": 2})
    }
    assert found["model.layers.0.self_attn:qk"] == "model.layers.0.self_attn.k_proj.weight: on the meta device"
    assert found["model.layers.0.self_attn:ov"] is None


def test_nan_in_a_gain_is_the_reason_of_its_circuits():
    llama = build("llama")
    with torch.no_grad():
        llama.model.layers[1].input_layernorm.weight[3] = math.nan
    unread = {name for name, one in circuits(llama).items() if one.values is None}
    assert unread == {"model.layers.1.self_attn:qk", "model.layers.1.self_attn:ov"}
    assert "NaN or inf" in str(circuits(llama)["model.layers.1.self_attn:qk"].reason)


# ---- in the readings of a model -------------------------------------------------------------------------------------


def test_a_baseline_file_keeps_the_circuits(tmp_path):
    state = read_state(build("llama"))
    assert len(state.readings.circuits) == 8
    saved = Baseline(state.readings, state.fits, {}, "").save(tmp_path)
    assert Baseline.load(saved).readings.circuits == state.readings.circuits


def test_only_circuits_with_a_changed_part_are_read_again():
    from types import SimpleNamespace
    from typing import Any, cast

    llama = build("llama")
    state = read_state(llama)
    changed = "model.layers.1.self_attn.v_proj.weight"
    with torch.no_grad():
        llama.model.layers[1].self_attn.v_proj.weight.mul_(2.0)
    now = read_state(llama)
    scope = cast("Any", SimpleNamespace(changed=frozenset({changed})))
    kept = kept_circuits(now.readings.tensors, state, state, scope)
    read_again = []

    def asked(circuit, stored):
        reading = kept(circuit, stored)
        if reading is None:
            read_again.append(circuit.name)
        return reading

    matrices = list(iter_weight_matrices(llama))
    found = read_circuits(matrices, vectors_of(llama, ALONE), config_of(llama), ALONE, asked)
    assert read_again == ["model.layers.1.self_attn:ov"]
    assert found == now.readings.circuits
    # Undone, though the state last read had it changed: the baseline's reading holds.
    undone = kept_circuits(state.readings.tensors, State(now.readings), state, scope)
    read_again.clear()
    assert read_circuits(matrices, vectors_of(llama, ALONE), config_of(llama), ALONE, undone) == (
        state.readings.circuits
    )


def test_windows_of_training_do_not_read_them_and_the_next_edit_does():
    llama = build("llama")
    session = GuardSession(llama)
    session.watch()
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight.mul_(1.001)
    window = session.check_window(step=1, raw_losses=[1.0])
    assert window.applied == "kept"
    assert session.current.readings.circuits == {}
    assert "training" in session.current.readings.unmeasured["circuits"]
    with session.edit("nothing much") as step, torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight.mul_(1.0001)
    verdict = next(one for one in step.verdicts if one.guard == "circuits")
    assert (verdict.outcome, verdict.num_measured) == (Outcome.PASS, 8)
    assert session.current.readings.circuits == circuits(llama)
