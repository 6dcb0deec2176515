"""Contracts of declared kinds: correct edits pass, wrong ones break them, damage cannot hide."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from weightproof.contracts import quantities as contracts
from weightproof.edits import RTN
from weightproof.errors import InputError
from weightproof.kinds import (
    Cast,
    Kind,
    LoraMerge,
    Plain,
    Prune,
    Quantize,
    measure_outside,
    parse_kind,
    typical_quantization_error,
)
from weightproof.lora.adapters import Adapter, AdapterDelta
from weightproof.types import WeightMatrix

_SPEC = importlib.util.spec_from_file_location("oracle_rtn", Path(__file__).parents[1] / "oracles" / "rtn.py")
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)

GRIDS = [("channel", None), ("tensor", None), ("group", 16), ("group", 23)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def gaussian(rows=40, cols=96, seed=0):
    return torch.randn(rows, cols, generator=generator(seed)) * 0.02


def heavy_tailed(rows=40, cols=96, seed=1):
    """Student t with 3 degrees of freedom."""
    chi = torch.randn(3, rows, cols, generator=generator(seed)).square().mean(0).sqrt()
    return gaussian(rows, cols, seed + 1) / chi


def with_zero_rows(rows=40, cols=96, seed=2):
    weight = gaussian(rows, cols, seed)
    weight[::7] = 0
    weight[:, ::11] = 0
    return weight


MATRICES = {"gaussian": gaussian, "heavy-tailed": heavy_tailed, "zero rows": with_zero_rows}


def quantized(weight, bits, granularity="channel", group_size=None):
    matrix = WeightMatrix("w", "ffn", *weight.shape, weight.dtype, (), "w", lambda: weight)
    return RTN(bits, granularity, group_size).plan(matrix)


def readings(kind, before, after, name="w"):
    return {reading.statistic: reading for reading in kind.measure(name, before, after)}


def broken(kind, before, after, name="w"):
    """Statistics of rigorous bounds that are exceeded."""
    found = kind.measure(name, before, after)
    assert all(reading.value is not None and not math.isnan(reading.value) for reading in found)
    return {reading.statistic for reading in found if reading.rigorous and reading.value > reading.limit}


# -- quantize ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("granularity", "size"), GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("matrix", MATRICES)
def test_correct_rounding_keeps_the_contract(bits, granularity, size, dtype, matrix):
    weight = MATRICES[matrix]().to(dtype)
    after = quantized(weight, bits, granularity, size)
    found = readings(Quantize(bits, granularity, size), weight, after)
    assert broken(Quantize(bits, granularity, size), weight, after) == set()
    assert found["sign_flip_fraction"].value == 0
    assert found["levels_per_group"].value == oracle.count_levels(after.double().numpy(), granularity, size)


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_correct_rounding_of_gaussian_weights_is_of_typical_size(bits, granularity):
    size = 32 if granularity == "group" else None
    found = readings(
        Quantize(bits, granularity, size), gaussian(64, 256), quantized(gaussian(64, 256), bits, granularity, size)
    )
    assert found["relative_error"].value <= found["relative_error"].limit


def double_scale(weight, bits):
    return quantized(weight, bits) * 1000


def flip_signs(weight, bits):
    return -quantized(weight, bits)


def flip_one_row(weight, bits):
    after = quantized(weight, bits)
    after[5] = -after[5]
    return after


def shuffle_rows(weight, bits):
    return quantized(weight, bits)[torch.randperm(len(weight), generator=generator(9))]


def swap_two_rows(weight, bits):
    after = quantized(weight, bits)
    after[[3, 4]] = after[[4, 3]]
    return after


def zero_all(weight, bits):
    return torch.zeros_like(weight)


def zero_one_row(weight, bits):
    after = quantized(weight, bits)
    after[5] = 0
    return after


def halve(weight, bits):
    return quantized(weight, bits) / 2


def one_nan(weight, bits):
    after = quantized(weight, bits)
    after[1, 1] = math.nan
    return after


def one_inf(weight, bits):
    after = quantized(weight, bits)
    after[1, 1] = math.inf
    return after


FAULTS = (double_scale, flip_signs, flip_one_row, shuffle_rows, swap_two_rows, one_nan, one_inf)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("matrix", MATRICES)
def test_damage_beside_correct_rounding_breaks_the_contract(bits, fault, matrix):
    weight = MATRICES[matrix]()
    assert "error_over_half_step" in broken(Quantize(bits), weight, fault(weight, bits))


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize("fault", [zero_all, zero_one_row, halve])
def test_lost_weights_break_the_contract_from_three_bits_on(bits, fault):
    assert "error_over_half_step" in broken(Quantize(bits), gaussian(), fault(gaussian(), bits))


@pytest.mark.parametrize("declared", range(2, 9))
@pytest.mark.parametrize("done", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_bits_than_declared_break_the_contract(declared, done, dtype):
    if dtype is torch.bfloat16 and (declared, done) == (8, 7):
        pytest.skip("rounding to bfloat16 is as coarse as the step of 8 bits: one lost bit is within its allowance")
    weight = gaussian(40, 700).to(dtype)
    statistics = broken(Quantize(declared), weight, quantized(weight, done))
    wanted = set() if declared == done else {"levels_per_group"} if done > declared else {"error_over_half_step"}
    assert statistics == wanted


def test_weights_that_were_not_quantized_break_the_contract():
    assert broken(Quantize(4), gaussian(), gaussian()) == {"levels_per_group"}
    assert broken(Quantize(4, "tensor"), gaussian(), quantized(gaussian(), 4, "channel")) == {"levels_per_group"}


def test_one_flipped_sign_is_reported_by_share():
    weight = gaussian()
    after = quantized(weight, 8)
    row = int(after[0].abs().argmax())
    after[0, row] = -after[0, row]
    found = readings(Quantize(8), weight, after)["sign_flip_fraction"]
    assert 0 < found.value < 0.001
    assert not found.rigorous


def test_an_asymmetric_grid_that_contains_zero_keeps_the_contract():
    weight = gaussian(64, 256).abs() + 0.001
    weight[::2] -= 0.01
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True)
    delta = (high - low) / 15
    zero = torch.round(-low / delta)
    after = (torch.clamp(torch.round(weight / delta) + zero, 0, 15) - zero) * delta
    assert broken(Quantize(4), weight, after) == set()


def test_chunks_of_rows_do_not_change_the_readings(monkeypatch):
    weight = heavy_tailed()
    after = quantized(weight, 4, "tensor")
    whole = [[r.value for r in Quantize(4, g, s).measure("w", weight, after)] for g, s in GRIDS]
    monkeypatch.setattr(contracts, "_CHUNK_ELEMENTS", 96 * 3)
    parts = [[r.value for r in Quantize(4, g, s).measure("w", weight, after)] for g, s in GRIDS]
    assert parts == [pytest.approx(values, rel=1e-12) for values in whole]


def test_typical_error_joins_the_stated_points_geometrically():
    assert [typical_quantization_error(bits) for bits in (2, 3, 4, 8, 16)] == [0.8, 0.8, 0.5, 0.05, 0.05]
    assert typical_quantization_error(6) == pytest.approx(math.sqrt(0.5 * 0.05))


# -- cast --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("stored", ["target", "float32"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 30.0])
def test_a_cast_is_within_half_an_ulp_of_its_dtype(dtype, stored, scale):
    weight = gaussian() * scale
    after = weight.to(dtype)
    kind = Cast(dtype)
    assert broken(kind, weight, after if stored == "target" else after.float()) == set()
    assert broken(kind, after, after) == set()


CAST_FAULTS = {
    "two roundings down": lambda w: w.to(torch.float8_e4m3fn).float(),
    "truncated": lambda w: (w.view(torch.int32) & -65536).view(torch.float32),
    "x1000": lambda w: w.bfloat16() * 1000,
    "sign": lambda w: -w.bfloat16(),
    "one ulp": lambda w: (w.bfloat16().view(torch.int16) + 1).view(torch.bfloat16),
    "zero": torch.zeros_like,
}


@pytest.mark.parametrize("fault", CAST_FAULTS)
def test_anything_beyond_rounding_breaks_a_cast(fault):
    assert broken(Cast("bfloat16"), gaussian(), CAST_FAULTS[fault](gaussian())) == {"cast_error_half_ulp"}


@pytest.mark.parametrize("work", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_half_an_ulp_is_half_the_distance_to_the_next_number(work, dtype):
    bits = torch.arange(1, 120, dtype=torch.uint8).view(dtype) if dtype.itemsize == 1 else None
    if bits is None:
        bits = torch.arange(1, 31000, 7, dtype=torch.int16).view(dtype)
    codes = torch.uint8 if dtype.itemsize == 1 else torch.int16
    above = (bits.view(codes) + 1).view(dtype)
    assert torch.equal(contracts.half_ulp(bits.to(work), dtype), (above.to(work) - bits.to(work)) / 2)


def test_overflow_and_saturation_break_a_cast():
    weight = gaussian()
    weight[0, 0] = 1e6
    overflowed = weight.half()
    assert torch.isinf(overflowed[0, 0])
    assert readings(Cast(torch.float16), weight, overflowed)["cast_error_half_ulp"].value == math.inf
    saturated = weight.clamp(-65504, 65504).half()
    assert broken(Cast(torch.float16), weight, saturated) == {"cast_error_half_ulp"}


def test_values_that_were_not_finite_must_stay_what_they_were():
    weight = gaussian()
    weight[0, 0], weight[0, 1] = math.nan, math.inf
    assert broken(Cast("bfloat16"), weight, weight.bfloat16()) == set()
    assert broken(Cast("bfloat16"), weight, weight.bfloat16().nan_to_num()) == {"cast_error_half_ulp"}


# -- prune -------------------------------------------------------------------------------------


def prune_rows(weight, sparsity):
    keep = weight.shape[1] - int(weight.shape[1] * sparsity)
    cut = weight.abs().topk(keep, dim=1).values[:, -1:]
    return torch.where(weight.abs() >= cut, weight, 0)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_correct_pruning_keeps_the_contract(sparsity, dtype):
    weight = gaussian()
    after = prune_rows(weight, sparsity) if sparsity < 1 else torch.zeros_like(weight)
    mask = after != 0
    weight = weight.to(dtype)
    assert broken(Prune(sparsity), weight, torch.where(mask, weight, 0)) == set()


def test_pruning_by_mask_may_leave_negative_zero():
    weight = gaussian()
    assert broken(Prune(0.5), weight, weight * (prune_rows(weight, 0.5) != 0)) == set()


PRUNE_FAULTS = {
    "too few zeros": (lambda w: prune_rows(w, 0.4), {"nonzero_fraction"}),
    "kept weights moved": (lambda w: prune_rows(w, 0.5) * 1.0001, {"altered_fraction"}),
    "kept weights rounded": (lambda w: prune_rows(w, 0.5).bfloat16(), {"altered_fraction"}),
    "one weight moved": (lambda w: prune_rows(w, 0.5).index_fill(1, torch.tensor([4]), 0.5), {"altered_fraction"}),
    "not a number": (lambda w: prune_rows(w, 0.5).index_fill(1, torch.tensor([4]), math.nan), {"altered_fraction"}),
    "nothing": (lambda w: w, {"nonzero_fraction"}),
}


@pytest.mark.parametrize("fault", PRUNE_FAULTS)
def test_wrong_pruning_breaks_the_contract(fault):
    change, statistics = PRUNE_FAULTS[fault]
    assert broken(Prune(0.5), gaussian(), change(gaussian())) == statistics


def test_model_wide_sparsity_asks_no_share_of_one_matrix():
    assert broken(Prune(0.5, scope="model"), gaussian(), prune_rows(gaussian(), 0.1)) == set()


# -- LoRA merge --------------------------------------------------------------------------------


def low_rank(seed=5, scale=0.02):
    left, right = torch.randn(40, 4, generator=generator(seed)), torch.randn(4, 96, generator=generator(seed + 1))
    return left @ right * scale * 0.1


MERGES = {
    "once": (lambda w, d: w + d, 0.0, False),
    "twice": (lambda w, d: w + 2 * d, 1.0, True),
    "not at all": (lambda w, d: w, 1.0, True),
    "wrong sign": (lambda w, d: w - d, 2.0, True),
    "without scaling": (lambda w, d: w + d / 2, 0.5, True),
    "not a number": (lambda w, d: w + d * math.nan, math.inf, True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merge", MERGES)
def test_a_delta_must_be_merged_exactly_once(dtype, merge):
    change, value, breaks = MERGES[merge]
    weight, delta = gaussian().to(dtype), low_rank()
    after = change(weight.float(), delta).to(dtype)
    kind = LoraMerge({"w": delta})
    found = readings(kind, weight, after)["merge_error"]
    assert found.value == pytest.approx(value, abs=0.1)
    assert (broken(kind, weight, after) != set()) is breaks


def test_a_product_taken_in_bfloat16_is_within_rounding():
    left = torch.randn(40, 4, generator=generator(1)).bfloat16()
    right = (torch.randn(4, 96, generator=generator(2)) * 0.01).bfloat16()
    weight = gaussian().bfloat16()
    kind = LoraMerge({"w": left.float() @ right.float()})
    assert broken(kind, weight, weight + left @ right) == set()


def test_matrices_without_a_delta_must_not_change():
    kind = LoraMerge({"w": low_rank()})
    assert broken(kind, gaussian(), gaussian(), name="v") == set()
    assert broken(kind, gaussian(), gaussian() + 1e-6, name="v") == {"altered_fraction"}


def test_a_delta_below_the_rounding_of_the_dtype_is_not_measurable():
    weight = gaussian().bfloat16()
    (found,) = LoraMerge({"w": low_rank() * 1e-4}).measure("w", weight, weight)
    assert found.value is None
    assert "rounding" in found.reason
    (found,) = LoraMerge({"w": low_rank() * 1e-4}).measure("w", weight, weight * 1000)
    assert found.value > found.limit


def test_an_empty_delta_means_no_change():
    kind = LoraMerge({"w": torch.zeros(40, 96)})
    assert broken(kind, gaussian(), gaussian()) == set()
    assert broken(kind, gaussian(), gaussian() * 2) == {"merge_error"}


WORDS = {
    "twice": "merged twice",
    "not at all": "byte-identical to the base",
    "wrong sign": "wrong sign",
    "without scaling": "0.5 times its scaling",
    "not a number": "NaN or inf",
}


@pytest.mark.parametrize("merge", WORDS)
def test_a_broken_merge_says_what_it_looks_like(merge):
    weight, delta = gaussian(), low_rank()
    found = readings(LoraMerge({"w": delta}), weight, MERGES[merge][0](weight, delta))["merge_error"]
    assert WORDS[merge] in found.reason


def test_other_broken_merges_say_what_they_look_like():
    weight, delta, other = gaussian(), low_rank(), gaussian(seed=9)
    kind = LoraMerge({"w": delta})

    def said(after):
        return readings(kind, weight, after)["merge_error"].reason

    assert said(weight + 10 * delta) == "the delta was merged 10 times over, or with 10 times its scaling"
    assert said(weight - 3 * delta) == "the delta was merged with the wrong sign and 3 times its scaling"
    assert "something else than this adapter's delta changed: " in said(weight + delta + other)
    assert said(weight + delta) is None
    zero = readings(LoraMerge({"w": torch.zeros(40, 96)}), weight, weight + other)["merge_error"]
    assert zero.reason == "the adapter's delta is zero here, yet the matrix changed"
    (found,) = kind.measure("v", weight, weight + other)
    assert found.reason == "the adapter has no delta for it"


def test_a_merge_that_was_rounded_to_the_levels_of_four_bits_says_so():
    step = 0.1
    weight = (gaussian(40) / step).round().clamp(-7, 7) * step
    merged = ((weight + low_rank()) / step).round().clamp(-7, 7) * step
    found = readings(LoraMerge({"w": low_rank()}), weight, merged)["merge_error"]
    assert found.value > found.limit
    assert "lost in rounding" in found.reason
    merged = ((weight + 3 * low_rank()) / step).round().clamp(-7, 7) * step
    found = readings(LoraMerge({"w": 3 * low_rank()}), weight, merged)["merge_error"]
    assert "the base is stored in 4 bits" in found.reason


def dora() -> AdapterDelta:
    a, b = torch.randn(4, 96, generator=generator(1)) * 0.1, torch.randn(40, 4, generator=generator(2)) * 0.1
    return AdapterDelta("w", a, b, 2.0, magnitude=1.1 * gaussian().norm(dim=1))


DORA = {
    "twice": (lambda w, d: w + d.dense(w) + d.dense(w + d.dense(w)), "merged twice"),
    "wrong sign": (lambda w, d: w + replace(d, scaling=-2.0).dense(w), "wrong sign"),
    "ten times": (lambda w, d: w + replace(d, scaling=20.0).dense(w), "10 times its scaling"),
    "as plain LoRA": (lambda w, d: w + replace(d, magnitude=None).dense(), "without DoRA's magnitudes"),
    "not at all": (lambda w, d: w, "byte-identical"),
    "something else": (lambda w, d: gaussian(seed=12), "something else than this adapter's delta"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_merged_once_keeps_its_contract(dtype):
    weight = gaussian().to(dtype)
    kind = LoraMerge(Adapter({"w": dora()}))
    assert broken(kind, weight, (weight.float() + dora().dense(weight)).to(dtype)) == set()
    in_steps = (weight.float() + replace(dora(), magnitude=None).dense()).to(dtype)  # as PEFT merges in half precision
    factor = (dora().magnitude.to(dtype) / in_steps.norm(dim=1).to(dtype))[:, None]
    assert broken(kind, weight, factor * in_steps) == set()


@pytest.mark.parametrize("merge", DORA)
def test_dora_merged_wrongly_is_named(merge):
    change, words = DORA[merge]
    kind = LoraMerge(Adapter({"w": dora()}))
    found = readings(kind, gaussian(), change(gaussian(), dora()))["merge_error"]
    assert found.value > found.limit
    assert words in found.reason


def test_replaced_tensors_and_added_biases_must_be_the_adapters_own():
    head, bias = gaussian(seed=21), torch.ones(40)
    kind = LoraMerge(Adapter({"w": dora()}, replaced={"head": head, "norm": bias}, biases={"bias": bias}))
    assert kind.expected == {"w", "head", "norm", "bias"}
    assert broken(kind, gaussian(), head, name="head") == set()
    assert broken(kind, gaussian().bfloat16(), head.bfloat16(), name="head") == set()
    (found,) = kind.measure("head", gaussian(), gaussian())
    assert (found.value, found.statistic) == (1.0, "replaced_fraction")
    assert "byte-identical to the base" in found.reason
    (found,) = kind.measure("head", gaussian(), head * 2)
    assert found.reason == "it is not the adapter's own copy (modules_to_save)"

    def outside(name, before, after):
        (one,) = measure_outside(kind, name, before, after)
        return one

    assert outside("bias", bias, 2 * bias).value == 0.0
    assert outside("bias", bias, 3 * bias).reason == "the delta was merged twice"
    assert outside("bias", bias, bias).reason == "the delta was not merged: the matrix is byte-identical to the base"
    assert outside("norm", 3 * bias, bias).value == 0.0
    assert outside("norm", 3 * bias, 2 * bias).value == 1.0
    assert outside("other", bias, 2 * bias).statistic == "altered_outside_matrices"


def test_what_is_taken_out_again_is_held_to_the_merge_the_other_way_round():
    merged = gaussian() + dora().dense(gaussian())
    kind = LoraMerge(Adapter({"w": dora()}), reverse=True)
    assert kind.params()["reverse"] is True
    assert broken(kind, merged, gaussian()) == set()
    assert broken(kind, merged, merged) == {"merge_error"}


# -- every kind --------------------------------------------------------------------------------

KINDS = [Cast("bfloat16"), Quantize(8), Quantize(4, "group", 16), Prune(0.5), LoraMerge({"w": low_rank()})]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_changed_shape_is_not_measured_and_says_why(kind):
    for reading in kind.measure("w", gaussian(), gaussian(41)):
        assert reading.value is None
        assert "shape" in reading.reason


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_integer_codes_are_not_measured_as_weights(kind):
    for reading in kind.measure("w", gaussian(), torch.ones(40, 96, dtype=torch.int8)):
        assert reading.value is None
        assert "int8" in reading.reason


@pytest.mark.parametrize("kind", KINDS[:4], ids=lambda kind: kind.name)
def test_vectors_stacks_and_empty_tensors_are_measured_too(kind):
    for shape in [(7,), (3, 4, 5), (0,), (0, 4), (4, 0)]:
        for reading in kind.measure("w", torch.zeros(shape), torch.zeros(shape)):
            assert reading.value <= reading.limit


@pytest.mark.parametrize("kind", [*KINDS, Plain("train")], ids=lambda kind: kind.name)
def test_parameters_are_ready_for_json_and_measuring_changes_nothing(kind):
    assert isinstance(kind, Kind)
    assert parse_kind(kind) is kind
    json.dumps(kind.params(), allow_nan=False)
    before, after = gaussian(), gaussian(seed=8)
    kind.measure("w", before, after)
    assert torch.equal(before, gaussian())
    assert torch.equal(after, gaussian(seed=8))


@pytest.mark.parametrize("name", ["unknown", "train", "preserving"])
def test_plain_kinds_are_given_by_name_and_promise_nothing(name):
    kind = parse_kind(name)
    assert (kind.name, kind.params(), kind.measure("w", gaussian(), gaussian() * 9)) == (name, {}, ())


def test_no_kind_means_unknown():
    assert parse_kind(None) == Plain("unknown")


BAD_KINDS = [
    ("trian", "did you mean 'train'"),
    ("quantize", r"kinds.Quantize\(bits\)"),
    ("lora-merge", "kinds.LoraMerge"),
    ("zzz", "known: unknown, train, preserving"),
    (Quantize, "class Quantize"),
    (8, "not int"),
]


@pytest.mark.parametrize(("kind", "words"), BAD_KINDS, ids=str)
def test_an_unusable_kind_is_refused_in_words(kind, words):
    with pytest.raises(InputError, match=words):
        parse_kind(kind)


BAD_PARAMETERS = [
    (lambda: Cast("int8"), "floating point"),
    (lambda: Cast("bfloat17"), "bfloat17"),
    (lambda: Cast(None), "floating point"),
    (lambda: Quantize(1), "bits"),
    (lambda: Quantize(4, "group"), "group_size"),
    (lambda: Quantize(4, "row"), "granularity"),
    (lambda: Prune(50), "not percent"),
    (lambda: Prune(0.5, scope="layer"), "scope"),
    (lambda: LoraMerge({}), "empty"),
    (lambda: LoraMerge({"w": torch.ones(3)}), "2-D"),
]


@pytest.mark.parametrize(("make", "words"), BAD_PARAMETERS)
def test_bad_parameters_are_refused_in_words(make, words):
    with pytest.raises(InputError, match=words):
        make()
