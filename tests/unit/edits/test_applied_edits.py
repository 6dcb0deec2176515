"""Edits through a guard session: seen, planned, written, judged, taken back; and what is refused before it begins."""

from __future__ import annotations

import pytest
import torch
import trained_models
from architectures import build
from sharded_models import ToyModel

from weightproof import edits
from weightproof.errors import InputError
from weightproof.registry import load_plugin, plugins
from weightproof.session import GuardSession
from weightproof.snapshots.tensor_store import tensor_digest
from weightproof.types import Action, Outcome
from weightproof.weights import iter_tensors, iter_weight_matrices


@pytest.fixture
def fresh():
    session = GuardSession(trained_models.load("gpt2").model, retain=trained_models.calibration_windows("gpt2"))
    yield session
    session.close()


def digest_of(model):
    return {named.name: tensor_digest(named.tensor) for named in iter_tensors(model)}


HEALTHY = [
    edits.RTN(8, symmetric=False),
    edits.RTN(6, "group", 16, symmetric=False),
    edits.Prune(0.05),
    edits.Prune(0.05, scope="global"),
    edits.SVD(energy=0.999),
    edits.GPTQ(6),
    edits.GPTQ(4, "group", 16, act_order=True),
    edits.TaskArithmetic({"transformer.h.0.mlp.c_fc.weight": torch.full((256, 64), 1e-5)}),
]
DAMAGING = [
    edits.RTN(2, symmetric=False),
    edits.Prune(0.7, scope="global"),
    edits.Prune(pattern="1:4"),
    edits.SVD(rank=2),
    edits.GPTQ(2),
    edits.TaskArithmetic({"transformer.h.0.mlp.c_fc.weight": torch.ones(256, 64)}),
]


def names(edit):
    return edit.name


@pytest.mark.parametrize("edit", HEALTHY, ids=names)
def test_a_healthy_edit_passes_its_contract(fresh, edit):
    step = fresh.apply(edit)
    invariants = next(one for one in step.verdicts if one.guard == "invariants")
    assert invariants.outcome is Outcome.PASS, invariants.reason
    assert step.decision.action is Action.KEEP, step.decision.reason
    assert step.record.kind == edit.kind.name


@pytest.mark.parametrize("edit", DAMAGING, ids=names)
def test_a_damaging_edit_keeps_its_contract_and_is_taken_back_for_its_outputs(fresh, edit):
    digest = digest_of(fresh.model)
    step = fresh.apply(edit)
    invariants = next(one for one in step.verdicts if one.guard == "invariants")
    assert invariants.outcome is not Outcome.FAIL, invariants.reason
    assert step.decision.action is Action.ROLLBACK
    assert digest_of(fresh.model) == digest


REFUSED = [
    (lambda: edits.RTN(8, include=("ffn", "*.no_such_thing.*")), r"'\*\.no_such_thing\.\*' chooses no weight matrix"),
    (lambda: edits.Prune(0.5, include="no.such.*"), "selects no weight matrix"),
    (lambda: edits.GPTQ(4), r"exclude=\('expert',\)"),
    (lambda: edits.TaskArithmetic({"nowhere.weight": torch.ones(2, 2)}), "nowhere.weight, which this model does not"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED)
def test_bad_input_is_refused_before_anything_is_written(make, words):
    model = ToyModel()
    session = GuardSession(model, retain=[{"ids": torch.randint(0, 37, (1, 6))}])
    digest = digest_of(model)
    with pytest.raises(InputError, match=words):
        session.apply(make())
    assert digest_of(model) == digest
    assert not session.history
    session.close()


def test_a_pattern_that_does_not_fit_a_width_is_refused_by_name():
    model = ToyModel()  # down_proj reads 19 inputs
    session = GuardSession(model, retain=[{"ids": torch.randint(0, 37, (1, 6))}])
    with pytest.raises(InputError, match=r"down_proj\.weight has 19 inputs, which is not a multiple of 4"):
        session.apply(edits.Prune(pattern="2:4"))
    session.close()


def test_every_registered_edit_is_one():
    registered = {name: load_plugin("weightproof.edits", name) for name in plugins("weightproof.edits")}
    assert {"rtn", "prune", "svd", "gptq", "task_arithmetic", "lora_merge"} <= set(registered)
    for name, cls in registered.items():
        assert all(hasattr(cls, wanted) for wanted in ("name", "kind", "params", "selects", "plan")), name


def test_a_step_keeps_the_edit_as_it_was_carried_out_but_not_what_it_weighs(fresh):
    step = fresh.apply(edits.Prune(0.05, scope="global"))
    assert step.edit.cut.changed
    matrix = next(m for m in iter_weight_matrices(fresh.model) if m.name in step.edit.cut.ties)
    assert bool((matrix.load()[~step.edit.mask(matrix)] == 0).all())
    step = fresh.apply(edits.GPTQ(8), on_violation="monitor")
    assert step.edit.hessians is None
    assert not step.kind.hessians
    assert step.record.params["method"] == "gptq"


EVERY_KIND = [
    edits.RTN(6, "group", 16, symmetric=False),
    edits.Prune(0.1),
    edits.Prune(0.1, scope="global"),
    edits.SVD(rank=3),
    edits.GPTQ(6, exclude=("expert",)),
]


@pytest.mark.parametrize("edit", EVERY_KIND, ids=names)
@pytest.mark.parametrize("architecture", ["mixtral", "t5", "whisper", "vit"])
def test_stacks_of_experts_and_half_precision_keep_their_contract(architecture, edit):
    torch.manual_seed(0)
    session = GuardSession(build(architecture).to(torch.bfloat16))
    step = session.apply(edit, on_violation="monitor")
    session.close()
    invariants = next(one for one in step.verdicts if one.guard == "invariants")
    assert invariants.outcome is Outcome.PASS, invariants.reason
    contracts = [one for one in invariants.measurements if one.statistic.startswith("contract_")]
    assert {one.family for one in contracts} & {"attn", "ffn", "expert"}


def test_a_weight_that_its_model_uses_past_its_module_is_refused_by_name():
    session = GuardSession(build("mamba"))
    with pytest.raises(InputError, match=r"reaches .*dt_proj\.weight.* it without calling its module"):
        session.apply(edits.GPTQ(6))
    assert session.apply(edits.GPTQ(6, exclude=("*dt_proj*",)), on_violation="monitor").edit is not None
    session.close()
