"""The edits that fooled the strongest existing system: every harmful one goes back, every harmless one stays.

Truth is the model's own held-out loss: an edit is harmful when delta-NLL > 0.02 (NaN counts as harm).
With `loss windows` the loss guard decides, to whom harm is more than its policy allows: log 1.05 nats per token.
`pytest -s` prints the table: delta-NLL, largest KL measured (nats per token), decision, deciding guards.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trained_models import NAMES, Trained, calibration_windows, load
from weight_edits import HARMFUL, NOT_ADMITTED, Edit, apply_edit, harmless_edits

from weightproof import Action, GuardSession, Outcome
from weightproof.edits.rtn import RTN
from weightproof.transactions.steps import Step

HARM = 0.02
LOSS = "loss windows"
RETAIN = {"random tokens": 0, "retain windows": 2, LOSS: 8}
# A few retain windows for the outputs are seen with one model in every run, with the others in the slow one.
SLOW = [(name, "retain windows") for name in NAMES[1:]]
CASES = [
    pytest.param(name, windows, id=f"{name}-{windows}", marks=[pytest.mark.slow] if (name, windows) in SLOW else [])
    for windows in RETAIN
    for name in NAMES  # the inner loop, so that two workers begin with two models
]
# Sixteen tokens a window, three of them scored, never reach the default floor.
POLICY = "name: short-windows\nextends: balanced\nlimits: {loss: {min_tokens: {value: 1000, source: a test}}}\n"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The balanced tier, for windows of a few tokens."""
    path = tmp_path_factory.mktemp("policy") / "short-windows.yaml"
    path.write_text(POLICY, encoding="utf-8")
    return path


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    edit: str
    delta_nll: float
    expected: str
    step: Step

    @property
    def is_right(self) -> bool:
        return self.step.decision is not None and self.step.decision.action == self.expected

    def __str__(self) -> str:
        decision = self.step.decision
        assert decision is not None
        mark = " " if self.is_right else "!"
        numbers = f"{self.delta_nll:>12.5f}{largest_kl(self.step):>12.6f}"
        return f"{mark} {self.edit:<30}{numbers}  {decision.action:<9} {deciding_guards(self.step)}"


def deciding_guards(step: Step) -> str:
    """Return the guards that failed, or those that only warned, or what kept the change."""
    for outcome in (Outcome.FAIL, Outcome.WARN):
        guards = [verdict.guard for verdict in step.verdicts if verdict.outcome is outcome]
        if guards:
            return f"{outcome}: {', '.join(guards)}"
    assert step.decision is not None
    return step.decision.assurance


def largest_kl(step: Step) -> float:
    """Return the largest KL divergence that the guards measured, nats per token; NaN where it is not finite."""
    values = [m.value for verdict in step.verdicts for m in verdict.measurements if m.statistic == "kl"]
    return max((math.nan if value is None else value for value in values), default=math.nan)


def is_harmful(delta_nll: float, most: float) -> bool:
    return not delta_nll <= most


@functools.cache
def trained_model(name: str) -> Trained:
    """Return one trained model for all that is asked of it; whoever edits takes a copy."""
    return load(name)


@functools.cache
def loss_before(name: str) -> float:
    """Return the held-out loss of the model as trained."""
    trained = trained_model(name)
    return trained.loss(trained.model)


@functools.cache
def delta_nll(name: str, edit: Edit) -> float:
    """Return the edit's change of the held-out loss, on a copy that no guard sees."""
    edited = copy.deepcopy(trained_model(name).model)
    apply_edit(edit, edited)
    return trained_model(name).loss(edited) - loss_before(name)


def contents(model: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    """Return the exact bytes of every parameter and buffer by name, with its dtype; tied names included."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {
        name: (tensor.dtype, tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors
    }


def module_objects(model: nn.Module) -> dict[str, int]:
    return {name: id(module) for name, module in model.named_modules()}


def guarded(session: GuardSession, edit: Edit) -> Step:
    with session.edit(edit.name) as step:
        apply_edit(edit, session.model)
    return step


def harmful_rows(name: str, trained: Trained, most: float, **given: Any) -> Iterable[Row]:
    """Judge every harmful edit in one session, proving after each that the model is back."""
    model = copy.deepcopy(trained.model)
    session = GuardSession(model, **given)
    before, objects = contents(model), module_objects(model)
    for edit in HARMFUL:
        harm = delta_nll(name, edit)
        if not is_harmful(harm, most):
            print(f"  {edit.name}: not harmful here (delta-NLL {harm:.5f}), exempt")
            continue
        step = guarded(session, edit)
        yield Row(edit.name, harm, Action.ROLLBACK, step)
        if step.applied == "restored":
            assert contents(model) == before, edit.name
            assert module_objects(model) == objects, edit.name
        else:
            model = copy.deepcopy(trained.model)
            session = GuardSession(model, **given)
            before, objects = contents(model), module_objects(model)


def harmless_rows(name: str, trained: Trained, **given: Any) -> Iterable[Row]:
    """Judge every harmless edit, each against the model as trained: its baseline is read once."""
    given["baseline"] = GuardSession(copy.deepcopy(trained.model), **given).baseline
    for edit in harmless_edits(name):
        session = GuardSession(copy.deepcopy(trained.model), **given)
        yield Row(edit.name, delta_nll(name, edit), Action.KEEP, guarded(session, edit))
    session = GuardSession(copy.deepcopy(trained.model), **given)
    step = session.apply(RTN(8))
    yield Row("RTN(8), declared", trained.loss(session.model) - loss_before(name), Action.KEEP, step)


@pytest.mark.parametrize(("name", "windows"), CASES)
def test_harmful_edits_are_rolled_back_and_harmless_ones_kept(name: str, windows: str, policy: Path) -> None:
    trained = trained_model(name)
    retain = calibration_windows(name, RETAIN[windows]) or None
    given = {"retain": retain, "policy": policy if windows == LOSS else "balanced"}
    most = math.log(1.05) if windows == LOSS else HARM
    print(f"\n{name}, {windows}: held-out loss {loss_before(name):.4f}")
    rows = []
    for row in (*harmful_rows(name, trained, most, **given), *harmless_rows(name, trained, **given)):
        print(row)
        rows.append(row)
    for (architecture, edit), reason in NOT_ADMITTED.items():
        if architecture == name:
            print(f"  {edit}: not admitted ({reason})")

    assert [str(row) for row in rows if not row.is_right] == []
    assurances = {row.step.decision.assurance for row in rows if row.step.decision is not None}
    assert assurances == {"loss"} if windows == LOSS else assurances == {"outputs-only"}
    assert sum(row.expected == Action.ROLLBACK for row in rows) >= len(HARMFUL) - 1
    assert all(math.isfinite(row.delta_nll) and row.delta_nll < HARM for row in rows if row.expected == Action.KEEP)
