from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from architectures import build
from hand_readings import verdict
from sharding import shard
from torch import nn
from trained_models import load
from worlds import run_world

from weightproof import GuardSession, InputError, edits, kinds
from weightproof.collective import Processes
from weightproof.errors import RestoreError
from weightproof.parallel.placements import local_of
from weightproof.snapshot import Snapshot, write_matrix
from weightproof.transactions.edit_records import Subject
from weightproof.transactions.partial_revert import (
    MOST_ROUNDS,
    Group,
    breaches,
    group_name,
    ranked,
    relative_changes,
    rounds,
    stored_name,
    without,
)
from weightproof.types import Action, BlockError, ContractReading, Measurement, Outcome
from weightproof.weights import iter_weight_matrices

DAMAGED = "model.layers.1.self_attn.q_proj.weight"
WITH_IT = {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"}


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def quantize_and_break(model: nn.Module, damaged: str = DAMAGED) -> None:
    """Round every matrix to int8, and put noise of the same size into one."""
    eight = edits.RTN(8)
    for matrix in list(iter_weight_matrices(model)):
        planned = eight.plan(matrix, None)
        if matrix.refusal is None and planned is not None:
            write_matrix(matrix, planned)
    with torch.no_grad():
        weight = model.get_parameter(damaged)
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
        weight.copy_(3.0 * noise * weight.std())


# ---- groups and ranking ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (("l.0.attn.q_proj.weight", "l.0.attn.k_proj.bias", "l.0.attn.v_proj.weight"), "l.0.attn.qkv"),
        (("e.0.attention.self.query.weight", "e.0.attention.self.value.bias"), "e.0.attention.self.qkv"),
        (("b.0.SelfAttention.q.weight", "b.0.SelfAttention.k.weight"), "b.0.SelfAttention.qkv"),
        (("l.0.attn.q_proj.lora_A.default.weight", "l.0.attn.q_proj.lora_B.default.weight"), "l.0.attn.qkv"),
        (("l.0.mlp.gate_proj.weight", "l.0.mlp.up_proj.weight"), "l.0.mlp.gate_up"),
        (("b.0.DenseReluDense.wi_0.weight", "b.0.DenseReluDense.wi_1.weight"), "b.0.DenseReluDense.gate_up"),
        (("l.0.mlp.down_proj.weight", "l.0.mlp.down_proj.bias"), "l.0.mlp.down_proj"),
        (("l.0.mlp.down_proj.lora_A.default.weight", "l.0.mlp.down_proj.weight"), "l.0.mlp.down_proj"),
        (("lm_head.weight",), "lm_head"),
        (("l.0.mlp.experts.gate_up_proj",), "l.0.mlp.experts.gate_up_proj"),
    ],
)
def test_what_must_move_together_is_one_group(names, group):
    assert {group_name(name) for name in names} == {group}


def test_rank_is_the_share_of_the_error_of_the_block():
    model = build("llama")
    changes = {
        "model.layers.0.mlp.down_proj.weight": 0.01,
        "model.layers.0.self_attn.q_proj.weight": 0.01,
        "model.layers.1.mlp.down_proj.weight": 0.30,
        "model.layers.1.mlp.up_proj.weight": 0.40,
        "lm_head.weight": 2.0,
    }
    errors = (BlockError("model.layers.0", 0.5), BlockError("model.layers.1", 0.1), BlockError("head", 0.001))
    found = ranked(model, changes, errors, ())
    assert [group.name for group in found] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.qkv",
        "model.layers.1.mlp.gate_up",
        "model.layers.1.mlp.down_proj",
        "lm_head",
    ]
    assert found[2].score == pytest.approx(0.1 * 0.8)
    # Without block errors the distance decides, and an exact breach comes before everything.
    assert ranked(model, changes, (), ())[0].name == "lm_head"
    assert (
        ranked(model, changes, errors, {"model.layers.1.mlp.down_proj.weight"})[0].name
        == "model.layers.1.mlp.down_proj"
    )
    broken = {**changes, "model.layers.1.mlp.up_proj.weight": math.inf}
    assert ranked(model, broken, errors, ())[0].name == "model.layers.1.mlp.gate_up"


@pytest.mark.parametrize(("count", "expected"), [(0, []), (1, []), (2, [1]), (3, [1]), (4, [1, 2]), (8, [1, 2, 4])])
def test_rounds_double_and_leave_something(count, expected):
    groups = [Group(str(index), (str(index),), 0.0, False) for index in range(count)]
    assert [len(chosen) for chosen in rounds(groups)] == expected
    many = [Group(str(index), (str(index),), 0.0, False) for index in range(1000)]
    assert len(list(rounds(many))) == MOST_ROUNDS


def test_breaches_are_the_targets_of_exact_failures():
    failed = Measurement("invariants", "experts.up[3]", "num_nonfinite", 1.0, 0.0, 0.0, outcome=Outcome.FAIL)
    passed = Measurement("invariants", "other", "num_nonfinite", 0.0, 0.0, 0.0)
    exact = verdict("invariants", "FAIL")
    exact = type(exact)(exact.guard, exact.outcome, (failed, passed), "", 2, 2)
    assert breaches([exact, verdict("spectral", "FAIL")]) == {"experts.up"}
    assert stored_name("experts.up[3]") == "experts.up"


def test_relative_changes_of_matrices_vectors_and_what_is_not_finite():
    model = build("llama")
    snapshot = Snapshot.capture(model)
    names = ["model.norm.weight", "lm_head.weight", DAMAGED]
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
        model.lm_head.weight.mul_(0.75)
        model.get_parameter(DAMAGED)[0, 0] = math.nan
    found = relative_changes(model, snapshot, names, Processes.alone())
    assert found == {
        "model.norm.weight": pytest.approx(0.5),
        "lm_head.weight": pytest.approx(0.25),
        DAMAGED: math.inf,
    }


def test_what_is_left_to_judge_forgets_what_went_back():
    contract = tuple(ContractReading(name, "levels", 1.0, 2.0, rigorous=True) for name in ("a.weight", "stack[3]", "b"))
    subject = Subject(
        "e", kinds.parse_kind(None), None, planned={"stack[3]": "x", "b": "y"},
        corrected=("equalise a.weight by 1.1", "scale b"), contract=contract,
    )  # fmt: skip
    left = without(subject, ["stack", "a.weight"])
    assert (left.planned, left.corrected, left.reverted) == ({"b": "y"}, ("scale b",), ("a.weight", "stack"))
    assert left.contract == contract[2:]
    assert without(replace(subject, contract=None), ["b"]).contract is None


# ---- a part of a snapshot -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
def test_some_tensors_go_back_and_the_others_stay(tmp_path, on_disk):
    model = build("gpt2")
    snapshot = Snapshot.capture(model, tmp_path if on_disk else None)
    before = state_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.0).add_(1.0)
    changed = state_of(model)
    snapshot.restore_tensors(["transformer.wte.weight", "transformer.h.0.ln_1.bias"])
    back = {"transformer.wte.weight", "lm_head.weight", "transformer.h.0.ln_1.bias"}  # tied names are one tensor
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (before if name in back else changed)[name]), name
    assert snapshot.restore() == snapshot.model_digest


def test_a_replaced_tensor_and_an_altered_copy_are_refused():
    model = build("llama")
    snapshot = Snapshot.capture(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert snapshot.displaced(["lm_head.weight", DAMAGED, "no.such"]) == ("lm_head.weight", "no.such")
    for name in ("lm_head.weight", "no.such"):
        with pytest.raises(InputError, match="restore the whole snapshot"):
            snapshot.restore_tensors([name])
    assert DAMAGED in snapshot.digests  # taken before the copy is altered
    with torch.no_grad():
        snapshot.original(DAMAGED)[0, 0] += 1.0
    with pytest.raises(RestoreError, match="was altered"):
        snapshot.restore_tensors([DAMAGED])


# ---- in a session ---------------------------------------------------------------------------------------------------


def test_int8_with_one_broken_matrix_is_kept_without_it():
    model = load("llama").model
    before = state_of(model)
    session = GuardSession(model)
    with session.edit("int8, one broken", on_violation="revert-worst") as step:
        quantize_and_break(model)
        quantized = state_of(model)
    assert step.decision is not None
    assert (step.decision.action, step.applied) == (Action.KEEP, "kept"), step.decision.reason
    assert step.record is not None
    assert set(step.record.reverted) == WITH_IT
    assert not WITH_IT & set(step.record.changed_names)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (before if name in WITH_IT else quantized)[name]), name
    assert session.model_digest == step.record.digest_after
    written = session.certificate().statement["predicate"]["steps"][-1]["record"]  # type: ignore[index]
    assert set(written["reverted"]) == WITH_IT


def test_the_same_edit_goes_back_whole_without_being_asked_for_less():
    model = load("llama").model
    before = state_of(model)
    session = GuardSession(model)
    with session.edit("int8, one broken") as step:
        quantize_and_break(model)
    assert (step.applied, step.record.reverted) == ("restored", ())  # type: ignore[union-attr]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("what", ["everything", "a replaced module", "one matrix alone"])
def test_where_no_part_passes_the_whole_edit_goes_back(what):
    model = load("llama").model
    before = state_of(model)
    session = GuardSession(model)
    with session.edit("broken", on_violation="revert-worst") as step, torch.no_grad():
        if what == "everything":
            for parameter in model.parameters():
                parameter.mul_(20.0)
        elif what == "a replaced module":
            model.model.layers[0].mlp.up_proj = nn.Linear(64, 192, bias=False)  # type: ignore[union-attr]
        else:
            model.get_parameter(DAMAGED).neg_().mul_(9.0)
    assert step.decision is not None
    assert (step.decision.action, step.applied) == (Action.ROLLBACK, "restored")
    assert step.record is not None
    assert step.record.reverted == ()
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def test_a_planned_edit_of_ours_can_be_kept_in_part():
    class Mixed(edits.RTN):
        """int8 everywhere but in one matrix, which it rounds to nothing."""

        def plan(self, matrix, context):
            return matrix.load() * -1.0 if matrix.name == DAMAGED else super().plan(matrix, context)

    model = load("llama").model
    session = GuardSession(model)
    step = session.apply(Mixed(8), on_violation="revert-worst")
    assert step.decision is not None
    assert step.decision.action is Action.KEEP, step.decision.reason
    assert set(step.record.reverted) == WITH_IT  # type: ignore[union-attr]


def test_training_is_never_reverted_in_part():
    model = build("llama")
    session = GuardSession(model)
    session.watch()
    with pytest.raises(InputError, match="is for edits"):
        session.check_window(step=1, on_violation="revert-worst")
    with pytest.raises(InputError, match="is for edits"), session.edit("t", kind="train", on_violation="revert-worst"):
        pass


def _on_each(rank: int, size: int) -> list[tuple[str, list[str], bool]]:
    """Action, what was reverted, and whether this process's part of it holds its bits: replicas, then shards."""
    del rank, size
    found: list[tuple[str, list[str], bool]] = []
    for is_sharded in (False, True):
        model = shard(build("llama")) if is_sharded else build("llama")
        broken = model.get_parameter("model.layers.1.mlp.down_proj.weight")
        before = local_of(broken).detach().clone()
        session = GuardSession(model, policy="aggressive")
        with session.edit("one broken", on_violation="revert-worst") as step, torch.no_grad():
            local_of(model.get_parameter("lm_head.weight")).mul_(1.001)
            local_of(broken).fill_(math.nan)
        now = local_of(model.get_parameter("model.layers.1.mlp.down_proj.weight"))
        assert step.record is not None
        found.append((str(step.decision.action), list(step.record.reverted), torch.equal(now, before)))  # type: ignore[union-attr]
        session.close()
    return found


def test_two_processes_take_back_the_same_part_whole_or_sharded():
    first, second = run_world(_on_each, 2)
    assert first == second == [("KEEP", ["model.layers.1.mlp.down_proj.weight"], True)] * 2
