"""Level 3: outputs and losses in the certificate against those of the models run here, on the same windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightproof.certifying.certification import Certified
from weightproof.certifying.form import Content, WindowsForm
from weightproof.judgement.judging import GUARDS
from weightproof.registry import load_plugin
from weightproof.types import Action, DivergenceReading, LossReading, Outcome, Readings, StructureReading
from weightproof.verification.readings import Tolerance
from weightproof.verification.result import Findings

_HALF = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
# Of numbers of outputs and losses: other kernels and batches sum in another order.
_FULL_PRECISION = Tolerance(1e-3, 1e-5)
_HALF_PRECISION = Tolerance(5e-2, 2e-3)
# A token whose two best answers are nearly equal may flip.
_FLIPS = Tolerance(0.0, 2e-2)
# Of counts and rates that follow from the windows alone.
_EXACT = Tolerance(1e-9)
_DIVERGENCES = ("kl", "kl_max", "hidden_error")
_MEANS = ("before", "after")
Pair = tuple[float | None, float | None]


def tolerance_of(readings: Readings) -> Tolerance:
    """What outputs of a model may differ by: more where it computes in half precision."""
    half = any(tensor.dtype in _HALF for tensor in readings.tensors.values())
    return _HALF_PRECISION if half else _FULL_PRECISION


def compare_outputs(content: Content, certified: Certified, findings: Findings) -> None:
    """Hold stated outputs and losses against those computed here.

    Args:
        content: The certificate.
        certified: The same change, certified here.
        findings: Where differences go.
    """
    before, after = certified.case.baseline.readings, certified.case.current
    tolerance = tolerance_of(after)
    same = _divergences(content.subject.divergence, after.divergence, tolerance, findings)
    relative = Tolerance(tolerance.relative)
    for side, stated, found in (("baseline", content.baseline, before), ("subject", content.subject, after)):
        taps = [name for name in stated.second_moments if name.partition(":")[0] in same]
        for name in (name for name in taps if name in found.second_moments):
            pair = stated.second_moments[name], found.second_moments[name]
            _number(f"{side} {name}", "second moment", pair, relative, findings)
        taken = [name for name in found.second_moments if name.partition(":")[0] in same]
        for name in (name for name in taken if name not in stated.second_moments):
            findings.misstated(f"{side} {name}", "second moment", found.second_moments[name], None)
        if content.certificate.files:
            _structure(side, stated.structure, found.structure, findings)
    limits = certified.case.policy.limits_for(load_plugin(GUARDS, "loss"))
    _losses(content.subject.losses, after.losses, _Losses(tolerance, limits.outcome), findings)
    _windows(content.predicate.windows, certified.case.windows, findings)
    _left_out(content, certified, findings)


def _divergences(
    stated: Sequence[DivergenceReading], found: Sequence[DivergenceReading], tolerance: Tolerance, findings: Findings
) -> set[str]:
    """Compare outputs window set by window set; the names of the sets that are the same here and there."""
    ours = {reading.windows: reading for reading in found}
    same: set[str] = set()
    for theirs in stated:
        mine = ours.get(theirs.windows)
        where = f"outputs on {theirs.windows} windows"
        if mine is None or mine.windows_digest != theirs.windows_digest:
            what = "could not be made here" if mine is None else "made here are others"
            findings.unchecked.append(
                f"{where}: these windows {what}: give the data that the certificate was made with"
            )
            continue
        same.add(theirs.windows)
        findings.require_stated(where, "finite", mine.finite, theirs.finite)
        findings.require_stated(where, "measured", mine.reason is None, theirs.reason is None)
        findings.require_stated(where, "num_tokens", mine.num_tokens, theirs.num_tokens)
        for name in _DIVERGENCES:
            _number(where, name, _pair(theirs, mine, name), tolerance, findings)
        _number(where, "top1_flip_rate", _pair(theirs, mine, "top1_flip_rate"), _FLIPS, findings)
        findings.checked.append(where)
    return same


def _pair(stated: object, found: object, name: str) -> Pair:
    return getattr(stated, name), getattr(found, name)


def _number(where: str, name: str, pair: Pair, tolerance: Tolerance, findings: Findings) -> None:
    """Hold what is stated, the first of the pair, against what was found."""
    stated, found = pair
    if stated is None or found is None:
        if stated is not found:
            findings.misstated(where, name, found, stated)
    elif not tolerance.allows(stated, found):
        findings.misstated(where, name, found, stated)


def _structure(side: str, stated: StructureReading, found: StructureReading, findings: Findings) -> None:
    """Classes of modules, ties and embedding sizes of the loaded model."""
    pairs = {"modules": (stated.modules, found.modules), "sizes": (stated.embedding_sizes, found.embedding_sizes)}
    for what, (theirs, ours) in pairs.items():
        for name in sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name)):
            where = f"{side}, {'class' if what == 'modules' else 'embedding size'} of {name or 'the model'}"
            findings.misstated(where, what, ours.get(name), theirs.get(name))
    findings.require_stated(f"{side}, ties", "ties", str(found.ties), str(stated.ties))


def _windows(stated: Sequence[WindowsForm], found: Sequence[Mapping[str, Any]], findings: Findings) -> None:
    """How windows were made that are the same here and there."""
    ours = {one["digest"]: one for one in found}
    for theirs in (one for one in stated if one.digest in ours):
        mine = ours[theirs.digest]
        where = f"windows {theirs.name}"
        findings.require_stated(where, "name", mine["name"], theirs.name)
        findings.require_stated(where, "num_tokens", mine["num_tokens"], theirs.num_tokens)
        findings.require_stated(where, "made", str(sorted(mine["made"].items())), str(sorted(theirs.made.items())))


def _left_out(content: Content, certified: Certified, findings: Findings) -> None:
    """Outputs and losses that could be measured here and are not in the certificate.

    A certificate may honestly hold less than could be known; what it does not hold must not be what would have
    rejected the change.
    """
    subject, after, here = content.subject, certified.case.current, certified.decision
    sets = {one.windows for one in subject.divergence}
    metrics = {(one.role, one.metric) for one in subject.losses}
    lacking = [f"outputs on {one.windows} windows" for one in after.divergence if one.windows not in sets]
    lacking += [f"{one.metric} on {one.role} data" for one in after.losses if (one.role, one.metric) not in metrics]
    if not lacking:
        return
    decision = content.predicate.decision
    if decision is not None and decision.action is Action.KEEP and here.action is not Action.KEEP:
        findings.unchecked.append(
            f"the certificate holds no {' and no '.join(lacking)}; with them the decision is {here.action} here: "
            f"{here.reason}"
        )
    else:
        findings.notes.append(
            f"the certificate holds no {' and no '.join(lacking)}; measured here, they change nothing"
        )


@dataclass(frozen=True)
class _Losses:
    """How losses are compared: numbers, and what the policy's limits make of a reading."""

    tolerance: Tolerance
    outcome: Callable[[LossReading], Outcome]


def _losses(stated: Sequence[LossReading], found: Sequence[LossReading], by: _Losses, findings: Findings) -> None:
    ours = {(reading.role, reading.metric): reading for reading in found}
    for theirs in stated:
        mine = ours.get((theirs.role, theirs.metric))
        where = f"{theirs.metric} on {theirs.role} data"
        if mine is None:
            findings.unchecked.append(f"{where}: give --{theirs.role} with the data that the certificate was made with")
        elif mine.windows_digest != theirs.windows_digest:
            findings.unchecked.append(
                f"{where}: the data given here makes other windows ({mine.windows_digest[:16]}) than those of the "
                f"certificate ({theirs.windows_digest[:16]})"
            )
        else:
            _loss(where, theirs, mine, by, findings)


def _loss(where: str, stated: LossReading, found: LossReading, by: _Losses, findings: Findings) -> None:
    tolerance = by.tolerance
    for name in ("num_windows", "num_groups", "num_tokens"):
        findings.require_stated(where, name, getattr(found, name), getattr(stated, name))
    findings.require_stated(where, "measured", found.reason is None, stated.reason is None)
    findings.checked.append(where)
    if found.num_used != stated.num_used:
        # A sequential test that is close may stop one chunk earlier or later: its intervals must still meet.
        _meet(where, stated, found, findings)
        if by.outcome(stated) is not by.outcome(found):
            findings.unchecked.append(
                f"{where}: read to another end here ({found.num_used} of {found.num_groups} groups, stated "
                f"{stated.num_used}), where it is {by.outcome(found)} and not {by.outcome(stated)}"
            )
        return
    findings.require_stated(where, "method", found.method, stated.method)
    findings.require_stated(where, "decides", found.undecided is None, stated.undecided is None)
    for name in ("effective_size", "confidence"):
        _number(where, name, _pair(stated, found, name), _EXACT, findings)
    for name in _MEANS:
        _number(where, name, _pair(stated, found, name), tolerance, findings)
    # A difference of two means is as exact as the means are, not as exact as itself.
    size = max([abs(value) for value in (found.before, found.after) if value is not None], default=0.0)
    allowed = Tolerance(tolerance.relative, tolerance.absolute + tolerance.relative * size)
    for name in ("difference", "lower", "upper"):
        _number(where, name, _pair(stated, found, name), allowed, findings)
    for name in sorted(stated.sums.keys() | found.sums.keys()):
        _number(where, f"sum {name}", (stated.sums.get(name), found.sums.get(name)), tolerance, findings)


def _meet(where: str, stated: LossReading, found: LossReading, findings: Findings) -> None:
    if stated.lower is None or stated.upper is None or found.lower is None or found.upper is None:
        findings.misstated(where, "num_used", found.num_used, stated.num_used)
    elif stated.upper < found.lower or found.upper < stated.lower:
        ours, theirs = (f"{one.lower:.6g} to {one.upper:.6g}" for one in (found, stated))
        findings.misstated(where, "interval", ours, theirs)
