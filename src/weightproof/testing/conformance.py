"""What every guard and edit must keep to, as one call each in a plug-in's own tests; ours go through it, too.

    >>> from weightproof.edits import RTN
    >>> from weightproof.testing import check_edit
    >>> check_edit(RTN(bits=8))

A check raises AssertionError with the rule that is broken. It runs on a small model made here (or one that is given)
and needs no data, no network and a second or two.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.errors import PolicyError
from weightproof.folders.jsonable import to_jsonable
from weightproof.judgement.judging import Judged, judge_one
from weightproof.judgement.plans import prepared, selected
from weightproof.session import GuardSession
from weightproof.snapshots.tensor_store import tensor_digest
from weightproof.types import Outcome, Readings, Verdict

TIERS = ("T0", "T1", "T2", "T3", "advice")
RAISED = (Outcome.WARN, Outcome.FAIL)
# Fields of Readings by what they hold when nothing was read.
_NOTHING: Mapping[str, Any] = {
    "tensors": {}, "matrices": {}, "bulks": {}, "circuits": {}, "second_moments": {}, "divergence": (), "losses": (),
    "raw_losses": None, "window": None, "curvature": None, "subspace": None,
}  # fmt: skip


class SmallModel(nn.Module):
    """Embedding, two blocks of a gated MLP with a norm, and a head: `model(input_ids) -> logits`."""

    def __init__(self, width: int = 32, vocabulary: int = 48, seed: int = 0) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocabulary)  # so that random tokens can be drawn for it
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(vocabulary, width)
            self.blocks = nn.ModuleList(_Block(width) for _ in range(2))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        """Logits, (rows, tokens, vocabulary)."""
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(self.norm(hidden))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.gate_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.norm(hidden)
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


# ---------------------------------------------------------------- guards


def check_guard(guard: type, model: Callable[[], nn.Module] = SmallModel) -> None:
    """Hold a guard class to the rules of `weightproof.guards`.

    - It has `name`, `tier`, `needs` and a frozen dataclass `Limits` whose docstring speaks of every field; the limits
      refuse NaN with a PolicyError.
    - `judge` gives the same verdict twice, leaves its readings as they are, and its verdict adds up: a name, a reason,
      measurements that are finite or None with a reason, and nothing raised without one.
    - A change by a millionth raises nothing, and readings without what it needs are NOT_MEASURED: never PASS.

    Args:
        guard: The class, as an entry point of `weightproof.guards` names it.
        model: Makes a model to read, `model(input_ids)`.

    Raises:
        AssertionError: A rule is broken; the message says which.
    """
    _check_class(guard)
    limits = guard.Limits()  # type: ignore[attr-defined]
    for what, judged in _changes(model()):
        verdict = _judged_twice(guard, limits, judged, what)
        _check_verdict(guard, verdict, what)
        if what == "next to nothing":
            calm = verdict.outcome not in RAISED
            _rule(calm, guard, f"raises {verdict.outcome} where a matrix moved by a millionth: {verdict.reason}")
        nothing = judge_one(guard(), limits, _without(judged, guard.needs))  # type: ignore[attr-defined]
        read = [one for one in nothing.measurements if one.outcome is not Outcome.NOT_MEASURED]
        _rule(
            nothing.outcome is not Outcome.PASS or bool(read),
            guard,
            f"passes ({what}) without what it needs ({', '.join(sorted(guard.needs))}): that is NOT_MEASURED",  # type: ignore[attr-defined]
        )


def _check_class(guard: type) -> None:
    for attribute in ("name", "tier", "needs", "Limits", "judge"):
        _rule(hasattr(guard, attribute), guard, f"has no `{attribute}`")
    _rule(guard.tier in TIERS, guard, f"is of tier {guard.tier!r}; tiers are {', '.join(TIERS)}")  # type: ignore[attr-defined]
    known = {item.name for item in dataclasses.fields(Readings)}
    unknown = sorted(set(guard.needs) - known)  # type: ignore[attr-defined]
    _rule(not unknown, guard, f"needs {', '.join(unknown)}, which Readings has not")
    form: Any = guard.Limits  # type: ignore[attr-defined]
    _rule(
        _is_frozen(form),
        guard,
        "has Limits that are no frozen dataclass",
    )
    text = form.__doc__ or ""
    for item in dataclasses.fields(form):
        _rule(
            f"{item.name}:" in text,
            guard,
            f"says nothing of where its limit {item.name!r} comes from (docstring of Limits)",
        )
        if isinstance(item.default, float):
            _rule(
                _refuses(form, item.name),
                guard,
                f"takes NaN for its limit {item.name!r}: raise PolicyError in __post_init__",
            )


def _is_frozen(form: Any) -> bool:
    return bool(getattr(getattr(form, "__dataclass_params__", None), "frozen", False))


def _refuses(form: Any, field: str) -> bool:
    try:
        form(**{field: math.nan})
    except PolicyError:
        return True
    return False


def _changes(model: nn.Module) -> Iterator[tuple[str, Judged]]:
    """Readings of three changes as a session makes them."""
    session = GuardSession(model, policy="balanced")
    try:
        for what in ("next to nothing", "a small change", "a zeroed matrix"):
            with session.edit(what, on_violation="rollback") as step, torch.no_grad():
                for parameter in [p for p in model.parameters() if p.ndim == 2][1:2]:
                    _write(parameter, what)
            assert step.judged is not None
            yield what, step.judged
    finally:
        session.close()


def _write(parameter: nn.Parameter, what: str) -> None:
    if what == "next to nothing":
        parameter.mul_(1 + 2**-20)
    elif what == "a small change":
        parameter.mul_(1.001)
    elif what == "a zeroed matrix":
        parameter.zero_()


def _judged_twice(guard: Any, limits: Any, judged: Judged, what: str) -> Verdict:
    known = repr(judged)
    first, second = (judge_one(guard(), limits, judged) for _ in range(2))
    _rule(first == second, guard, f"gives two verdicts on the same readings ({what})")
    _rule(repr(judged) == known, guard, f"changes the readings that it judges ({what})")
    return first


def _check_verdict(guard: Any, verdict: Verdict, what: str) -> None:
    _rule(verdict.guard == guard.name, guard, f"signs its verdict as {verdict.guard!r} ({what})")
    _rule(bool(verdict.reason), guard, f"gives no reason ({what})")
    _rule(0 <= verdict.num_measured <= verdict.num_eligible, guard, f"measured more than there was ({what})")
    for one in verdict.measurements:
        _rule(one.guard == guard.name, guard, f"signs a measurement as {one.guard!r} ({what})")
        said = one.value is not None or bool(one.reason)
        _rule(said, guard, f"gives {one.target} {one.statistic} no value and no reason ({what})")
    raised = [one for one in verdict.measurements if one.outcome in RAISED]
    _rule(
        verdict.outcome not in RAISED or bool(raised),
        guard,
        f"raises {verdict.outcome} and no measurement does ({what})",
    )
    _rule(
        verdict.outcome is not Outcome.PASS or verdict.num_measured > 0, guard, f"passes and measured nothing ({what})"
    )
    json.dumps(to_jsonable(verdict), allow_nan=False)


def _without(judged: Judged, needs: frozenset[str]) -> Judged:
    """The readings as if what a guard needs had not been read."""
    empty = {field: value for field, value in _NOTHING.items() if field in needs}
    reasons = dict.fromkeys(needs, "left out by a check")
    return Judged(
        *(replace(one, **empty, unmeasured=reasons) for one in (judged.before, judged.reference, judged.after))
    )


# ---------------------------------------------------------------- edits


def check_edit(edit: Any, model: Callable[[], nn.Module] = SmallModel) -> None:
    """Hold an edit to the rules of `weightproof.edits`.

    - It is a frozen dataclass with `name`, `kind`, `params()` (ready for JSON), `selects` and `plan`.
    - Planning writes nothing: every tensor of the model is the same, bit for bit; what it plans is fresh memory of the
      matrix's shape and dtype, finite, and the same when it is planned again.
    - Carried out under guard it is written as planned, its own contract holds, and a rollback gives the model back.

    Args:
        edit: The edit.
        model: Makes a model that it can edit.

    Raises:
        AssertionError: A rule is broken; the message says which.
    """
    kind = type(edit)
    _rule(_is_frozen(kind), kind, "is no frozen dataclass")
    for attribute in ("name", "kind", "params", "selects", "plan"):
        _rule(hasattr(edit, attribute), kind, f"has no `{attribute}`")
    json.dumps(edit.params(), allow_nan=False)
    subject = model()
    session = GuardSession(subject, policy="balanced")
    try:
        _check_plan(edit, subject, session)
        _check_session(edit, subject, session)
    finally:
        session.close()


def _digests(model: nn.Module) -> dict[str, str]:
    return {name: tensor_digest(value) for name, value in model.state_dict().items()}


def _check_plan(edit: Any, model: nn.Module, session: GuardSession) -> None:
    kind, before = type(edit), _digests(model)
    ready = prepared(edit, session)
    planned = 0
    for matrix in selected(model, ready):
        first, second = ready.plan(matrix, session), ready.plan(matrix, session)
        _rule((first is None) == (second is None), kind, f"plans {matrix.name} once and leaves it once")
        if first is None or second is None:
            continue
        planned += 1
        _rule(first.data_ptr() != matrix.load().data_ptr(), kind, f"plans {matrix.name} in the model's own memory")
        _rule(
            tuple(first.shape) == (matrix.d_out, matrix.d_in),
            kind,
            f"plans {matrix.name} of shape {tuple(first.shape)}",
        )
        _rule(bool(first.isfinite().all()), kind, f"plans values of {matrix.name} that are not finite")
        _rule(torch.equal(first, second), kind, f"plans {matrix.name} differently the second time")
    _rule(planned > 0, kind, "plans nothing on this model: give check_edit a model= that it can edit")
    _rule(_digests(model) == before, kind, "writes to the model while it plans")


def _check_session(edit: Any, model: nn.Module, session: GuardSession) -> None:
    kind, before = type(edit), _digests(model)
    step = session.apply(edit)
    broken = [
        one for verdict in step.verdicts if verdict.guard == "invariants" for one in verdict.measurements
        if one.outcome is Outcome.FAIL
    ]  # fmt: skip
    _rule(not broken, kind, f"breaks its own contract: {broken[0].target} {broken[0].statistic}" if broken else "")
    if step.applied == "restored":
        _rule(_digests(model) == before, kind, "was taken back, and the model is not as it was")
    else:
        _rule(_digests(model) != before, kind, "was kept, and changed nothing")


def _rule(holds: bool, of: type, otherwise: str) -> None:
    if not holds:
        raise AssertionError(f"{of.__name__} {otherwise}")
