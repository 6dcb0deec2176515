from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hand_readings import after, baseline, edit, kept_contract, tensor, with_tensor

from weightproof.guards.invariants import Invariants, InvariantsLimits
from weightproof.types import ContractReading, MatrixReading, Outcome, Readings, StructureReading

UP = "blocks.0.mlp.up.weight"


def judge(readings: Readings, before: Readings | None = None):
    return Invariants().judge(before or baseline(), readings, InvariantsLimits())


def without(readings: Readings, name: str) -> Readings:
    return replace(readings, tensors={key: item for key, item in readings.tensors.items() if key != name})


def with_structure(readings: Readings, **changes: object) -> Readings:
    return replace(readings, structure=replace(readings.structure, **changes))  # type: ignore[arg-type]


def test_a_clean_edit_passes_and_counts_every_tensor():
    found = judge(after())
    assert found.outcome is Outcome.PASS
    assert (found.num_measured, found.num_eligible) == (7, 7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: without(r, UP), "missing_tensor"),
        (lambda r: replace(r, tensors={**r.tensors, "extra": tensor("extra")}), "added_tensor"),
        (lambda r: with_tensor(r, UP, shape=(64, 31)), "changed_shape"),
        (lambda r: with_structure(r, embedding_sizes={"embed": 66}), "tokenizer"),
        (lambda r: with_structure(r, ties=frozenset()), "broken_tie"),
        (lambda r: with_tensor(r, "embed.weight", num_nonfinite=1), "NaN or infinite elements in a parameter"),
        (lambda r: with_tensor(r, "bn.running_mean", num_nonfinite=1), "NaN or infinite elements in a buffer"),
        (lambda r: replace(r, raw_losses=(2.0, math.nan, 2.1)), "raw losses: num_nonfinite = 1"),
    ],
    ids=["missing", "added", "reshaped", "embedding 64 -> 66", "untied", "NaN weight", "NaN buffer", "NaN loss"],
)
@pytest.mark.parametrize("kind", ["unknown", "train", "quantize"])
def test_broken_invariant_fails_for_every_kind(change, said, kind):
    found = judge(change(after(kind)))
    assert found.outcome is Outcome.FAIL
    assert said in found.reason


@pytest.mark.parametrize("kind", ["unknown", "train", "quantize"])
def test_copies_of_a_parameter_that_differ_between_processes_fail(kind):
    found = judge(with_tensor(after(kind), UP, differing_ranks=(1, 3)))
    assert found.outcome is Outcome.FAIL
    assert f"{UP}: differing_replicas = 2 (limit 0), the copy of rank 1, 3 is not that of rank 0" in found.reason


@pytest.mark.parametrize(("kind", "outcome"), [("train", Outcome.PASS), ("quantize", Outcome.FAIL)])
def test_copies_of_a_buffer_may_differ_only_by_training(kind, outcome):
    found = judge(with_tensor(after(kind), "bn.running_mean", differing_ranks=(1,)))
    assert found.outcome is outcome
    (reported,) = [m for m in found.measurements if m.statistic == "differing_replicas"]
    assert (reported.target, reported.value) == ("bn.running_mean", 1.0)


def test_a_buffer_that_differed_before_an_edit_is_reported():
    before = with_tensor(baseline(), "bn.running_mean", differing_ranks=(1,))
    found = judge(with_tensor(after("quantize"), "bn.running_mean", differing_ranks=(1,)), before)
    assert found.outcome is Outcome.PASS
    assert "it differed at baseline already" in str([m.reason for m in found.measurements])


def test_the_processes_that_are_not_finite_are_named():
    found = judge(with_tensor(after(), UP, num_nonfinite=3, nonfinite_ranks=(1,), differing_ranks=(1,)))
    assert f"{UP}: num_nonfinite = 3 (limit 0), NaN or infinite elements in a parameter, on rank 1 only" in found.reason


def test_a_larger_tie_group_keeps_the_tie():
    wider = frozenset({("embed.weight", "encoder.embed.weight", "head.weight")})
    assert judge(with_structure(after(), ties=wider)).outcome is Outcome.PASS


@pytest.mark.parametrize("repaired", [False, True])
def test_broken_baseline_is_said_to_be_broken(repaired):
    before = with_tensor(baseline(), UP, num_nonfinite=2)
    now = with_tensor(after(), UP, num_nonfinite=0 if repaired else 2)
    found = judge(now, before)
    assert found.outcome is Outcome.FAIL
    assert "the baseline itself is broken" in found.reason


@pytest.mark.parametrize(
    ("kind", "dtype", "storage", "module_class"),
    [
        ("unknown", "WARN", "WARN", "WARN"),
        ("cast", "FAIL", "FAIL", "FAIL"),
        ("quantize", "FAIL", "FAIL", "WARN"),
        ("prune", "FAIL", "FAIL", "FAIL"),
        ("lora_merge", "FAIL", "FAIL", "PASS"),
        ("preserving", "FAIL", "FAIL", "FAIL"),
        ("train", "FAIL", "FAIL", "FAIL"),
    ],
)
def test_dtype_storage_and_module_class_follow_the_declared_kind(kind, dtype, storage, module_class):
    assert judge(with_tensor(after(kind), UP, dtype="float16")).outcome == dtype
    assert judge(with_tensor(after(kind), UP, storage="AffineQuantizedTensor")).outcome == storage
    modules = baseline().structure.modules | {"norm": "Identity"}
    assert judge(with_structure(after(kind), modules=modules)).outcome == module_class


@pytest.mark.parametrize(("dtype", "outcome"), [("bfloat16", "PASS"), ("torch.bfloat16", "PASS"), ("float16", "FAIL")])
def test_a_cast_may_change_to_the_declared_dtype_only(dtype, outcome):
    record = edit("cast", UP, params={"dtype": "bfloat16"}, contract=kept_contract())
    assert judge(with_tensor(replace(after(), edit=record), UP, dtype=dtype)).outcome == outcome


def test_merging_an_adapter_may_take_its_own_tensors_away():
    name = "blocks.0.mlp.up.lora_A.weight"
    before = replace(baseline(), tensors={**baseline().tensors, name: tensor(name)})
    assert judge(after("lora_merge"), before).outcome is Outcome.PASS
    assert judge(after("unknown"), before).outcome is Outcome.FAIL


@pytest.mark.parametrize(
    ("kind", "targets", "outcome"),
    [
        ("unknown", None, "WARN"),
        ("unknown", ("*.mlp.*",), "FAIL"),
        ("quantize", None, "FAIL"),
        ("cast", None, "FAIL"),
        ("train", None, "PASS"),
    ],
)
def test_no_op_edit(kind, targets, outcome):
    found = judge(replace(baseline(), edit=edit(kind, targets=targets)))
    assert found.outcome == outcome
    if outcome != "PASS":
        assert "no-op" in found.reason or "no tensor" in found.reason


@pytest.mark.parametrize(
    ("targets", "outcome"),
    [
        (None, "PASS"),
        (("*.mlp.up",), "PASS"),
        (("*.mlp.up.weight",), "PASS"),
        (("blocks.0.mlp.up", "blocks.1.mlp.up"), "PASS"),
        (("ffn",), "PASS"),
        (("*",), "PASS"),
        (("blocks.0.*",), "FAIL"),
        (("attn",), "FAIL"),
        (("*.mlp.*", "attn"), "WARN"),
        (("*.mlp.*", "typo.*"), "FAIL"),
    ],
)
def test_changed_tensors_lie_within_the_declared_targets(targets, outcome):
    record = edit("unknown", targets=targets)
    assert judge(replace(after(), edit=record)).outcome == outcome


def test_undeclared_change_is_named():
    found = judge(with_tensor(replace(after(), edit=edit("unknown", targets=("ffn",))), "norm.weight", digest="other"))
    assert found.reason.startswith("norm.weight: undeclared_change")


def test_tied_names_count_as_one_tensor():
    record = edit("unknown", "embed.weight", targets=("head",))
    now = with_tensor(replace(baseline(), edit=record), "embed.weight", digest="other")
    assert judge(now).outcome is Outcome.PASS


def test_one_expert_of_a_stack_is_a_target():
    stack, slices = "experts.up", [f"experts.up[{i}]" for i in range(2)]
    readings = [MatrixReading(name, "expert", 4, 4, 1.0, 1.0, 0.0, 1.0, 0, 0, "exact") for name in slices]
    before = replace(
        baseline(), tensors={stack: tensor(stack)}, matrices={reading.name: reading for reading in readings}
    )
    now = with_tensor(before, stack, digest="other")
    for target, outcome in (("experts.up[1]", "PASS"), ("expert", "PASS"), ("experts.down[1]", "FAIL")):
        assert judge(replace(now, edit=edit("unknown", targets=(target,))), before).outcome == outcome


@pytest.mark.parametrize(
    ("reading", "outcome", "said"),
    [
        (ContractReading("m", "levels", 4.0, 4.0, rigorous=True), "PASS", ""),
        (ContractReading("m", "levels", 5.0, 4.0, rigorous=True), "FAIL", "m: contract_levels = 5 (limit 4)"),
        (ContractReading("m", "relative_error", 0.06, 0.05, rigorous=False), "WARN", "unusual for 'quantize'"),
        (ContractReading("m", "levels", math.inf, 4.0, rigorous=False), "FAIL", "broken"),
        (ContractReading("m", "levels", math.nan, 4.0, rigorous=False), "FAIL", "broken"),
        (ContractReading("m", "levels", None, 4.0, rigorous=True, reason="no scales"), "WARN", "no scales"),
    ],
)
def test_contract_of_the_declared_kind(reading, outcome, said):
    found = judge(replace(after(), edit=edit("quantize", UP, contract=(reading,))))
    assert found.outcome == outcome
    assert said in found.reason


def test_contract_that_nobody_measured_is_not_passed_silently():
    found = judge(replace(after(), edit=edit("prune", UP)))
    assert found.outcome is Outcome.WARN
    assert "not measured" in found.reason


def test_training_may_change_everything_including_buffers():
    now = after("train")
    tensors = {name: replace(item, digest=f"trained {name}") for name, item in now.tensors.items()}
    record = edit("train", *tensors)
    assert judge(replace(now, tensors=tensors, edit=record, raw_losses=(2.0, 1.9))).outcome is Outcome.PASS


def test_readings_without_a_change_are_judged_too():
    assert judge(replace(baseline(), edit=None)).outcome is Outcome.PASS


def test_empty_model_is_not_measured():
    empty = Readings("", {}, StructureReading({}, frozenset(), {}), {}, {}, unmeasured={"tensors": "no tensors"})
    found = judge(empty, empty)
    assert (found.outcome, found.reason) == (Outcome.NOT_MEASURED, "no tensors")


def test_everything_missing_fails_rather_than_not_measured():
    assert judge(replace(after(), tensors={})).outcome is Outcome.FAIL
