"""The contract of kind "preserving": kept for what leaves the function alone, broken by everything else."""

from __future__ import annotations

import copy

import pytest
import torch
from anatomy import anatomy
from torch import nn
from trained_models import load
from weight_edits import SMALL, Edit, apply_edit, int8_per_channel, preserving_edits, round_to_bf16

from weightproof import GuardSession
from weightproof.contracts.preserving import preserving_readings
from weightproof.kinds import Plain
from weightproof.probes import read_state
from weightproof.transactions.steps import Step
from weightproof.types import DivergenceReading, Outcome


def rotate_values(model: nn.Module) -> None:
    """Turn the values of every head by an orthogonal matrix, and what reads them back by its inverse."""
    generator = torch.Generator().manual_seed(11)
    for layer in anatomy(model).layers:
        size, shared = layer.v.weight.shape[0] // layer.num_kv_heads, layer.num_heads // layer.num_kv_heads
        turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        for head in range(layer.num_kv_heads):
            rows = slice(head * size, (head + 1) * size)
            layer.v.weight[rows] = (turn @ layer.v.weight[rows].double()).to(layer.v.weight.dtype)
            if layer.v.bias is not None:
                layer.v.bias[rows] = (turn @ layer.v.bias[rows].double()).to(layer.v.bias.dtype)
            for query in range(head * shared, (head + 1) * shared):
                columns = slice(query * size, (query + 1) * size)
                turned = layer.o.weight[:, columns].double() @ turn.T
                layer.o.weight[:, columns] = turned.to(layer.o.weight.dtype)


def flip_a_row(model: nn.Module) -> None:
    anatomy(model).mlps[0].up.weight[3].neg_()


def swap_two_rows(model: nn.Module) -> None:
    weight = anatomy(model).mlps[0].down.weight
    weight[[0, 1]] = weight[[1, 0]]


def one_weight(model: nn.Module) -> None:
    weight = anatomy(model).mlps[0].down.weight
    weight[0, 0] += 0.05 * weight.std()


ROTATION = Edit("values rotated", rotate_values)
OTHERS = (
    Edit("a row's sign", flip_a_row),
    Edit("two rows swapped", swap_two_rows),
    Edit("one weight by 5 % of a standard deviation", one_weight),
    Edit("int8", int8_per_channel),
    Edit("rounding to bfloat16", round_to_bf16),
)


def contract(step: Step) -> dict[str, Outcome]:
    invariants = next(verdict for verdict in step.verdicts if verdict.guard == "invariants")
    found: dict[str, Outcome] = {}
    for item in invariants.measurements:
        if item.statistic in ("contract_circuit_change", "contract_output_change"):
            found[item.statistic] = max(found.get(item.statistic, Outcome.PASS), item.outcome, key=str.__len__)
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_what_preserves_the_function_is_kept_and_what_does_not_is_not(name):
    model = load(name).model
    session = GuardSession(model)
    untouched = copy.deepcopy(model.state_dict())
    for edit in (*preserving_edits(name), ROTATION):
        with session.edit(edit.name, kind="preserving") as step:
            apply_edit(edit, model)
        assert step.applied == "kept", (edit.name, step.decision.reason)
        assert contract(step) == {"contract_circuit_change": Outcome.PASS, "contract_output_change": Outcome.PASS}
        assert any(not torch.equal(now, untouched[key]) for key, now in model.state_dict().items())
    for edit in OTHERS if name in ("llama", "gpt2") else OTHERS[2:3]:
        with session.edit(edit.name, kind="preserving") as step:
            apply_edit(edit, model)
        assert step.applied == "restored", edit.name
        assert "the contract of 'preserving' is broken" in step.decision.reason, edit.name


def test_in_half_precision_rounding_is_let_be_and_gross_changes_are_not():
    model = load("llama").model.to(torch.bfloat16)
    session = GuardSession(model)
    for edit in (*preserving_edits("llama"), ROTATION):
        with session.edit(edit.name, kind="preserving") as step:
            apply_edit(edit, model)
        assert step.applied == "kept", (edit.name, step.decision.reason)
    for edit in OTHERS[:2]:
        with session.edit(edit.name, kind="preserving") as step:
            apply_edit(edit, model)
        assert step.applied == "restored", edit.name


def test_outputs_are_compared_with_those_just_before_and_not_with_the_baseline():
    model = load("llama").model
    session = GuardSession(model)
    with session.edit("int8") as step:
        apply_edit(SMALL[-1], model)
    assert step.applied == "kept"
    with session.edit("heads permuted", kind="preserving") as step:
        apply_edit(preserving_edits("llama")[0], model)
    assert step.applied == "kept", step.decision.reason
    assert step.divergence[0].kl > 1e-6  # against the baseline, int8 included


def test_without_outputs_the_contract_is_not_measured_and_warns():
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
    session = GuardSession(model, policy="aggressive")
    with session.edit("scaled", kind="preserving", on_violation="monitor") as step, torch.no_grad():
        model[0].weight.mul_(2.0)
        model[0].bias.mul_(2.0)
        model[1].weight.div_(2.0)
    invariants = next(verdict for verdict in step.verdicts if verdict.guard == "invariants")
    assert invariants.outcome is Outcome.WARN
    assert "not measured" in invariants.reason


def test_outputs_that_are_not_finite_or_cannot_be_compared_break_or_miss_the_contract():
    state = read_state(load("llama").model).readings

    def reading(**values: object) -> DivergenceReading:
        fields = {"kl": None, "kl_max": None, "top1_flip_rate": None, "hidden_error": None, "finite": True}
        return DivergenceReading("random", "", 8, **(fields | values))  # type: ignore[arg-type]

    def of(*readings: DivergenceReading) -> list[tuple[float | None, bool]]:
        found = [one for one in preserving_readings(state, state, readings, "why") if one.statistic == "output_change"]
        return [(one.value, one.value is not None and one.value <= one.limit) for one in found]

    assert of() == [(None, False)]
    assert of(reading(finite=False)) == [(float("inf"), False)]
    assert of(reading()) == [(None, False)]
    assert of(reading(kl=1e-12), reading(kl=1e-6)) == [(1e-12, True), (1e-6, False)]
    assert of(reading(hidden_error=1e-6), reading(hidden_error=1e-2)) == [(1e-6, True), (1e-2, False)]


def test_the_kind_itself_bounds_no_matrix():
    assert Plain("preserving").measure("w", torch.ones(2, 2), torch.zeros(2, 2)) == ()
