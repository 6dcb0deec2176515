"""Matrices that are stored another way, and what a quantization left alone: judged by the invariants."""

from __future__ import annotations

from dataclasses import replace

import hand_readings as hand
import pytest

from weightproof.guards.invariants import Invariants
from weightproof.types import Measurement, Outcome, Reach, Readings, TensorReading

ATTN = "blocks.0.attn.q.weight"


def _packed(readings: Readings, storage: str, *parts: str, matrix: str = ATTN, **changes: object) -> Readings:
    """The readings with a matrix that is packed into parts now."""
    tensors = {name: one for name, one in readings.tensors.items() if matrix not in {name, one.part_of}}
    for part in parts:
        name = f"{matrix}{part}"
        plain = TensorReading(name, "int8", (64, 32), storage, False, 0, f"codes {storage}", part_of=matrix)
        tensors[name] = replace(plain, **changes)
    return replace(readings, tensors=tensors)


def _after(kind: str, storage: str, *parts: str, **changes: object) -> Readings:
    return _packed(hand.after(kind), storage, *parts, **changes)


def _found(before: Readings, after: Readings) -> list[Measurement]:
    verdict = Invariants().judge(before, after, Invariants.Limits())
    return [item for item in verdict.measurements if item.outcome is not Outcome.PASS]


@pytest.mark.parametrize(
    ("kind", "storage", "outcome"),
    [
        ("quantize", "torchao", None),
        ("quantize", "prune-mask", Outcome.FAIL),
        ("quantize", "parametrization", Outcome.FAIL),
        ("prune", "prune-mask", None),
        ("prune", "torchao", Outcome.FAIL),
        ("unknown", "torchao", Outcome.WARN),
        ("lora_merge", "torchao", Outcome.FAIL),
        ("train", "torchao", Outcome.FAIL),
    ],
)
def test_a_packed_matrix_is_one_change_of_storage_judged_by_kind(kind, storage, outcome):
    found = _found(hand.baseline(), _after(kind, storage, ".qdata", ".scale"))
    about = [item for item in found if item.target.startswith(ATTN)]
    if outcome is None:
        assert about == []
    else:
        (one,) = about
        assert (one.target, one.statistic, one.outcome) == (ATTN, "changed_storage", outcome)
        assert f"plain became {storage}" in one.reason
    assert not [item for item in found if item.statistic in {"missing_tensor", "added_tensor", "changed_dtype"}]


def test_a_part_under_the_name_of_the_plain_tensor_is_no_change_of_its_shape():
    """bitsandbytes keeps its codes under the name of the weight."""
    found = _found(hand.baseline(), _after("quantize", "bitsandbytes-4bit", "", ".absmax", shape=(1024, 1)))
    assert found == []


def test_packing_another_way_and_unpacking_are_changes_of_storage():
    packed = _packed(hand.baseline(), "torchao", ".qdata")
    regrouped = _packed(hand.after("unknown"), "torchao", ".qdata", shape=(64, 16))
    (one,) = [item for item in _found(packed, regrouped) if item.target == ATTN]
    assert (one.statistic, one.outcome) == ("changed_storage", Outcome.WARN)
    (one,) = [item for item in _found(packed, hand.after("quantize")) if item.target == ATTN]
    assert (one.statistic, one.outcome) == ("changed_storage", Outcome.FAIL)
    assert "torchao became plain" in one.reason


def test_a_packed_matrix_that_is_gone_or_of_another_size_fails():
    packed = _packed(hand.baseline(), "torchao", ".qdata")
    after = hand.after("quantize")
    gone = replace(after, tensors={name: one for name, one in after.tensors.items() if name != ATTN})
    statistics = {item.statistic for item in _found(packed, gone) if item.target.startswith(ATTN)}
    assert statistics == {"missing_tensor"}
    small = _after("quantize", "torchao", ".qdata")
    name = ATTN.removesuffix(".weight")
    sizes = {**small.matrices, ATTN: replace(small.matrices[name], name=ATTN, d_out=32)}
    before = replace(hand.baseline(), matrices={**hand.baseline().matrices, ATTN: hand.matrix(ATTN, "attn")})
    found = [item for item in _found(before, replace(small, matrices=sizes)) if item.target == ATTN]
    assert [(item.statistic, item.outcome) for item in found] == [("changed_shape", Outcome.FAIL)]


def test_a_target_covers_the_parts_of_the_matrix_that_it_names():
    after = _after("quantize", "torchao", ".qdata", ".scale")
    edit = replace(after.edit, targets=(ATTN, "*.mlp.*"), changed_names=(f"{ATTN}.qdata", f"{ATTN}.scale"))
    assert _found(hand.baseline(), replace(after, edit=edit)) == []


def test_packed_matrices_count_once():
    verdict = Invariants().judge(hand.baseline(), _after("quantize", "torchao", ".a", ".b"), Invariants.Limits())
    assert verdict.num_measured == verdict.num_eligible == len(hand.baseline().tensors)


# ---- reach


def _reached(kind: str, reach: Reach, targets: tuple[str, ...] | None = None) -> list[Measurement]:
    after = hand.after(kind)
    found = _found(hand.baseline(), replace(after, edit=replace(after.edit, reach=reach, targets=targets)))
    return [item for item in found if item.statistic == "untouched_fraction"]


LEFT = Reach(
    0.25,
    {"attn": ("blocks.0.attn.q.weight", "blocks.1.attn.q.weight"), "embed": ("embed.weight",)},
    {"attn": 1.0, "embed": 1.0},
)


def test_block_matrices_that_a_quantization_left_alone_are_named_with_their_share():
    (one,) = _reached("quantize", LEFT)
    assert (one.target, one.family, one.value, one.outcome) == ("attn", "attn", 1.0, Outcome.WARN)
    assert "100.0% of the attn parameters" in one.reason
    assert "blocks.0.attn.q.weight, blocks.1.attn.q.weight" in one.reason
    assert "25.0% of all matrix parameters" in one.reason


def test_what_no_declared_target_covers_was_not_meant():
    assert _reached("quantize", LEFT, ("*.mlp.*",)) == []
    (one,) = _reached("quantize", LEFT, ("*.mlp.*", "blocks.1.attn.*"))
    assert "blocks.1.attn.q.weight" in one.reason
    assert "blocks.0.attn.q.weight" not in one.reason


@pytest.mark.parametrize("kind", ["unknown", "prune", "train"])
def test_only_a_quantization_is_expected_to_reach_every_block(kind):
    assert _reached(kind, LEFT) == []
