"""Level 2, the judgement: every verdict and decision again, from the readings in the certificate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from weightproof.certifying.form import Content, StepForm, VerdictForm
from weightproof.errors import InputError, WeightproofError
from weightproof.folders.jsonable import json_digest
from weightproof.judgement.evidence import not_tested
from weightproof.judgement.judging import GUARDS, Judged, decide_on, is_asked, judge_one
from weightproof.policy import Policy, decide, is_named_like_a_tier
from weightproof.registry import load_plugin, plugins
from weightproof.types import Action, Measurement, Readings, Verdict
from weightproof.verification.result import Findings, Value

# The same arithmetic on the same numbers; other builds of libm may differ in the last bits.
_RELATIVE = 1e-9
_MOST = 10


def policy_of(content: Content) -> Policy:
    """The policy in the certificate, checked as any policy is.

    Raises:
        PolicyError: If this version cannot use it.
        InputError: If it has not the form of a policy.
    """
    found = dict(content.predicate.policy.resolved)
    try:
        for name in ("required", "required_training", "provisional"):
            found[name] = tuple(cast("Sequence[str]", found[name]))
        return Policy(**cast("dict[str, Any]", found))
    except (KeyError, TypeError) as error:
        raise InputError(f"predicate.policy.resolved is no policy that this version knows ({error})") from error


def check_verdicts(content: Content, findings: Findings) -> None:
    """Judge every step again whose readings are in the certificate, and decide every complete one again."""
    try:
        policy = policy_of(content)
    except WeightproofError as error:
        findings.differs("policy", "resolved", "a policy that this version can use", str(error))
        return
    findings.require_stated("policy", "digest", policy.digest, content.predicate.policy.digest)
    if is_named_like_a_tier(policy):
        findings.notes.append(
            f"the policy is called {policy.name!r} and is not the tier of that name in this version: demand one with "
            "--policy"
        )
    judged = short = 0
    for index, step in enumerate(content.predicate.steps):
        where = f"step {index} ({step.name})"
        if step.policy_digest != policy.digest:
            findings.notes.append(f"{where} was judged by another policy: it was not judged again")
        elif step.judged_on is not None:
            _judge_again(content, policy, where, step, findings)
            judged += 1
        elif step.complete:
            _decide_again(policy, where, step, step.verdicts, findings)
            short += 1
    _require_newest(content, findings)
    _require_untested(content, findings)
    findings.checked.append(f"verdicts of {judged} steps from their readings, decisions of {judged + short} steps")
    brief = sum(not step.complete for step in content.predicate.steps)
    if brief:
        findings.notes.append(f"{brief} windows of training are recorded in brief: they cannot be judged again")


def _require_newest(content: Content, findings: Findings) -> None:
    """The decision on top must have been judged again, and from this baseline, or it was taken on trust."""
    steps = content.predicate.steps
    if not steps:
        return
    newest = steps[-1]
    where = f"step {len(steps) - 1} ({newest.name})"
    if newest.judged_on is None:
        findings.unchecked.append(
            f"{where}: what it was judged from is not in the certificate: its verdicts stand alone"
        )
    if newest.kind == "train" and content.predicate.decision is not None:
        findings.notes.append(f"{where} is a window of training, of which less is asked than of an edit")
    for index, step in enumerate(steps):
        if step.judged_on is None or step.kind == "train" or not (step is newest or step.judged_on.after == "subject"):
            continue
        named = {side: content.readings[getattr(step.judged_on, side)] for side in ("before", "reference")}
        for side, readings in named.items():
            if side == "before" or readings.model_digest == content.baseline.model_digest:
                _require_baseline(f"step {index} ({step.name})", side, readings, content.baseline, findings)


def _require_baseline(where: str, side: str, readings: Readings, baseline: Readings, findings: Findings) -> None:
    """Readings that a verdict calls those of the baseline are those, but for the outputs, which a step reads anew."""
    for name in ("model_digest", "tensors", "structure", "matrices", "bulks", "circuits", "untrained"):
        if side == "reference" and name not in ("tensors", "structure"):
            continue  # read by the bounds that a session had at hand; exact guards alone look at it
        if json_digest(getattr(readings, name)) != json_digest(getattr(baseline, name)):
            findings.differs(where, f"{name} judged against ({side})", "those of the baseline", "others")


def _require_untested(content: Content, findings: Findings) -> None:
    """What was not measured is said in `not_tested`."""
    steps = content.predicate.steps
    decision = steps[-1].decision if steps and steps[-1].judged_on is not None else None
    for sentence in not_tested(content.subject, decision):
        if sentence not in content.predicate.not_tested:
            findings.misstated("not_tested", "sentence", sentence, None)


def _judge_again(content: Content, policy: Policy, where: str, step: StepForm, findings: Findings) -> None:
    assert step.judged_on is not None
    sides = (content.readings[name] for name in (step.judged_on.before, step.judged_on.reference, step.judged_on.after))
    judged = Judged(*sides)
    names = [name for name in _guards(step, findings, where) if is_asked(load_plugin(GUARDS, name), judged.after)]
    found = {name: _verdict(policy, name, judged) for name in names}
    if judged.after.curvature is not None:
        known = judged.after.curvature.factors[:12]
        findings.notes.append(
            f"{where}: what curvature foretold (factors {known}) was not computed again; it is advice"
        )
    if judged.after.subspace is not None:
        findings.notes.append(f"{where}: the directions of the change were not read again; they are advice")
    kind = judged.after.edit.kind if judged.after.edit is not None else step.kind
    again = decide_on(policy, found, kind=kind, step=step.step, world_size=step.world_size)
    stated = {one.guard: one for one in step.verdicts}
    for verdict in again.verdicts:
        _compare_verdict(where, verdict, stated.pop(verdict.guard, None), findings)
    for name, extra in stated.items():
        findings.misstated(f"{where}, {name}", "verdict", None, str(extra.outcome))
    _compare_measurements(f"{where}, reported", again.reported, step.reported, findings)
    if step.action is Action.HALT:
        findings.notes.append(f"{where} was halted: {step.reason}")
        return
    for name in ("action", "situation", "warned", "assurance", "reason"):
        findings.require_stated(where, name, _value(getattr(again, name)), _value(getattr(step, name)))


def _guards(step: StepForm, findings: Findings, where: str) -> list[str]:
    """Guards to judge by: those of this package, and those of others that the certificate names, in order."""
    named = {verdict.guard for verdict in step.verdicts} | {one.guard for one in step.reported}
    installed = plugins(GUARDS)
    ours = [name for name, entry in installed.items() if entry.value.startswith("weightproof.")]
    for name in sorted(named - installed.keys()):
        findings.unchecked.append(f"{where}: guard {name!r} is not installed here, so that its verdict was not checked")
    return sorted({*ours, *(named & installed.keys())})


def _verdict(policy: Policy, name: str, judged: Judged) -> Verdict:
    guard = load_plugin(GUARDS, name)()
    return judge_one(guard, policy.limits_for(type(guard)), judged)


def _decide_again(
    policy: Policy, where: str, step: StepForm, verdicts: Sequence[VerdictForm], findings: Findings
) -> None:
    if step.action is Action.HALT:
        findings.notes.append(f"{where} was halted: {step.reason}")
        return
    stated = tuple(one.verdict for one in verdicts)
    again = decide(policy, stated, kind=step.kind, step=step.step, reported=step.reported, world_size=step.world_size)
    for name in ("action", "situation", "warned", "assurance", "reason"):
        findings.require_stated(where, name, _value(getattr(again, name)), _value(getattr(step, name)))


def _value(value: object) -> Value:
    return value if isinstance(value, bool) or value is None else str(value)


def _compare_verdict(where: str, again: Verdict, stated: VerdictForm | None, findings: Findings) -> None:
    at = f"{where}, {again.guard}"
    if stated is None:
        findings.misstated(at, "verdict", f"{again.outcome}: {again.reason}", None)
        return
    _compare_measurements(at, again.measurements, stated.measurements, findings)
    findings.require_stated(at, "outcome", str(again.outcome), str(stated.outcome))
    findings.require_stated(at, "num_measured", again.num_measured, stated.num_measured)
    findings.require_stated(at, "num_eligible", again.num_eligible, stated.num_eligible)
    if again.outcome is stated.outcome:
        findings.require_stated(at, "reason", again.reason, stated.reason)


def _compare_measurements(
    where: str, again: Sequence[Measurement], stated: Sequence[Measurement], findings: Findings
) -> None:
    ours, theirs = _by_name(again), _by_name(stated)
    differing = [key for key in {**ours, **theirs} if not _same(ours.get(key), theirs.get(key))]
    for key in differing[:_MOST]:
        target, statistic, place = key
        _compare_one(
            f"{where}, {target}" + (f" ({place})" if place else ""), statistic, ours.get(key), theirs.get(key), findings
        )
    if len(differing) > _MOST:
        findings.notes.append(f"{where}: {len(differing) - _MOST} more measurements differ")


def _by_name(measurements: Sequence[Measurement]) -> Mapping[tuple[str, str, int], Measurement]:
    """Measurements by guard and target, statistic and place among those of the same name."""
    found: dict[tuple[str, str, int], Measurement] = {}
    for one in measurements:
        place = 0
        while (one.target, one.statistic, place) in found:
            place += 1
        found[one.target, one.statistic, place] = one
    return found


def _same(one: Measurement | None, other: Measurement | None) -> bool:
    if one is None or other is None:
        return False
    numbers = all(_close(getattr(one, name), getattr(other, name)) for name in ("value", "reference", "limit"))
    return numbers and (one.outcome, one.family, one.reason) == (other.outcome, other.family, other.reason)


def _close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return math.isclose(one, other, rel_tol=_RELATIVE)


def _compare_one(
    where: str, statistic: str, again: Measurement | None, stated: Measurement | None, findings: Findings
) -> None:
    """The first way in which a measurement is not what the readings give."""
    if again is None or stated is None:
        findings.misstated(where, statistic, _brief(again), _brief(stated))
        return
    for name in ("value", "limit", "reference"):
        if not _close(getattr(again, name), getattr(stated, name)):
            what = statistic if name == "value" else f"{statistic} ({name})"
            findings.misstated(where, what, getattr(again, name), getattr(stated, name))
            return
    for name in ("outcome", "family", "reason"):
        findings.require_stated(
            where, f"{statistic} ({name})", _value(getattr(again, name)), _value(getattr(stated, name))
        )


def _brief(one: Measurement | None) -> Value:
    return None if one is None else one.value if one.value is not None else str(one.outcome)
