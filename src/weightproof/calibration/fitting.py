"""From draws to limits: one level for all limits together, judged on draws that fixed none of them.

What a draw is used for follows from its number alone, before anything is measured. Of the benign draws

- one part fixes the shape, where a limit has a value for each family: of each the largest value and the spread of the
  tail below it (a family with few draws counts as the default);
- the largest part fixes the level: a value scores by how many spreads it lies above that largest value in logarithms
  (below: negative), and each limit is put at the score of its worst family that `conformal.tolerance_limits` allows. So
  with the stated confidence at most the stated share of such edits breaks any of the limits, whatever the shapes are;
  good shapes make the limits tight. With too few draws to bound every limit by itself, those that only warn share one
  score; with fewer still all do. Two thirds of the draws that may lie beyond a
  limit go to the divergence: it rejects, and where it is wide harm passes; the others only warn;
- the rest judges: how many benign and harmful draws the limits flag.

What a guard compares with a limit is what is calibrated, at the worst end that a session may leave open:

- `spectral`, `rmt`: of edits of values only. A statistic of one matrix cannot see that W_v times c is paid back in W_o;
  the circuits guard does. The ladder may leave s1 anywhere within kappa, so the stable rank is allowed
  2 (kappa + the largest change of the Frobenius norm). Null scales make a value at its limit as likely as one in
  all the values seen. Weyl bounds may leave half of the band of a spike count open, so epsilon is twice what is moved.
- `circuits`, `variance`, `divergence`: of every draw. A divergence breaks its limit when it rejects; half of it warns.

Limits are rounded up to two digits. Gross limits, tau, alpha and floors are no nulls and stay as the tier has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightproof.calibration.conformal import (
    CONFIDENCE,
    draws_needed,
    rank_allowed,
    share_supported,
    tolerance_limits,
)
from weightproof.calibration.draws import Draw
from weightproof.calibration.targets import DIVISIONS, SIZE, TARGETS, Tail, Target, Values
from weightproof.errors import InputError
from weightproof.guards.limits import DEFAULT, for_family
from weightproof.policy import Policy

SHAPE, LEVEL, JUDGE = "shape", "level", "judge"
# Of six draws in a row: one for the shape, four for the level, which needs most of them, one to judge.
ROLES = (SHAPE, LEVEL, LEVEL, JUDGE, LEVEL, LEVEL)
# A family that fewer shape draws moved than this is judged by the default.
MIN_FAMILY = 20
LEVEL_SHARE = ROLES.count(LEVEL) / len(ROLES)


def role_of(number: int) -> str:
    """What a draw is used for.

    Example:
        >>> [role_of(number) for number in range(7)]
        ['shape', 'level', 'level', 'judge', 'level', 'level', 'shape']
    """
    return ROLES[number % len(ROLES)]


@dataclass(frozen=True)
class Judged:
    """What one guard's limits say of the draws that judge.

    Attributes:
        guard: Its name; "any" for all of them together.
        flagged: Benign draws beyond a limit.
        benign: Benign draws.
        found: Harmful draws beyond a limit.
        harmful: Harmful draws.
    """

    guard: str
    flagged: int
    benign: int
    found: int
    harmful: int


@dataclass(frozen=True)
class Fit:
    """Limits for one tier.

    Attributes:
        tier: Name of the tier.
        tau: Its largest perplexity ratio: what benign and harmful mean.
        limits: Guard to limit to value, by family where the tier has it so; what could not be fitted is not in it.
        false_alarms: At most this share of benign edits breaks any of the limits,
        confidence: with this confidence,
        num_level: from so many benign draws,
        ranks: of which so many lie at or beyond the limits of each group.
        groups: Statistics whose limits are put at one score together.
        counts: Draws by label.
        judged: By guard.
    """

    tier: str
    tau: float
    limits: Mapping[str, Mapping[str, Any]]
    false_alarms: float
    confidence: float
    num_level: int
    ranks: tuple[int, ...]
    groups: tuple[tuple[str, ...], ...]
    counts: Mapping[str, int]
    judged: tuple[Judged, ...] = field(default=())

    @property
    def in_words(self) -> str:
        """What the fit promises, for the source of a limit."""
        return (
            f"at most {self.false_alarms:g} of such edits break any of these limits with confidence "
            f"{self.confidence:g}, from {self.num_level} benign draws of which {sum(self.ranks)} lie at or beyond one"
        )


def fit(draws: Iterable[Draw], policy: Policy, *, false_alarms: float, confidence: float = CONFIDENCE) -> Fit:
    """Fit the limits of a tier.

    Args:
        draws: Of one model, or as many each of several.
        policy: The tier: its tau says what is benign, its other limits stay.
        false_alarms: Share of benign edits that may break a limit.
        confidence: That it is no more.

    Raises:
        InputError: If there are too few benign draws for that promise; it says for which they would do.
    """
    draws = list(draws)
    tau = float(policy.limits["loss"]["tau"])  # pyright: ignore[reportArgumentType] - checked by the guard's limits
    label = {id(one): one.label(tau) for one in draws}
    benign = [one for one in draws if label[id(one)] == "benign"]
    by_role = {role: [one for one in benign if role_of(one.number) == role] for role in (SHAPE, LEVEL, JUDGE)}
    _require_enough(by_role, len(draws), false_alarms, confidence)
    values = Values(policy)
    shapes = {target: _shape(target, by_role[SHAPE], values) for target in TARGETS}
    rank = rank_allowed(len(by_role[LEVEL]), false_alarms, confidence)
    groups = next(groups for groups in DIVISIONS if len(groups) <= rank)
    scores = [tuple(_score(one, shapes, values, group) for group in groups) for one in by_role[LEVEL]]
    ranks = _dealt(rank, len(groups))
    levels = dict(zip(groups, tolerance_limits(scores, ranks), strict=True))
    bounds: dict[Target, dict[str, float]] = {}
    for group, level in levels.items():
        if level == math.inf:
            raise InputError(f"no finite limit of {', '.join(group)} bounds the benign draws: draw more of them")
        members = [target for target in TARGETS if target.statistic in group]
        found = {target: {name: tail.at(level) for name, tail in shapes[target].items()} for target in members}
        bounds |= found if level > -math.inf else {}
    limits = _limits(bounds, values, _num_values(by_role))
    judging = [one for one in draws if role_of(one.number) == JUDGE]
    return Fit(
        tier=policy.name,
        tau=tau,
        limits=limits,
        false_alarms=false_alarms,
        confidence=confidence,
        num_level=len(scores),
        ranks=ranks,
        groups=groups,
        counts={name: list(label.values()).count(name) for name in ("benign", "harmful", "grey")},
        judged=_judged([(one, label[id(one)]) for one in judging], limits, values),
    )


def _dealt(rank: int, num_groups: int) -> tuple[int, ...]:
    """How many draws may lie beyond each group's limits: two thirds for the first, at least one for each other."""
    others = num_groups - 1
    first = min(math.ceil(2 * rank / 3), rank - others) if others else rank
    rest = rank - first
    return (first, *(rest // others + (index < rest % others) for index in range(others)))


def _require_enough(
    by_role: Mapping[str, Sequence[Draw]], num_draws: int, false_alarms: float, confidence: float
) -> None:
    needed, there = draws_needed(false_alarms, confidence), len(by_role[LEVEL])
    if there < needed or not by_role[SHAPE]:
        total = sum(len(part) for part in by_role.values())
        would = f"--false-alarms {math.ceil(share_supported(there, confidence) * 1000) / 1000:g}" if there else "none"
        raise InputError(
            f"too few benign draws: {there} of {num_draws} draws are benign and fix the level ({total} benign in all), "
            f"and {needed} are needed for false alarms of at most {false_alarms:g} with confidence {confidence:g}. "
            f"Make more draws (--draws), or ask for less: these would do for {would}"
        )


def _shape(target: Target, draws: Sequence[Draw], values: Values) -> dict[str, Tail]:
    """The tail of each family that enough draws moved, and of all as the default; {} where none moved."""
    seen: dict[str, list[float]] = {}
    for draw in draws:
        for family, value in values.of(draw, target).items():
            if math.isfinite(value) and value > 0.0:
                seen.setdefault(family, []).append(value)
    if not seen:
        return {}
    every = Tail.of([value for found in seen.values() for value in found])
    own = {family: Tail.of(found) for family, found in sorted(seen.items()) if len(found) >= MIN_FAMILY}
    return {DEFAULT: every} | (own if target.by_family else {})


def _score(draw: Draw, shapes: Mapping[Target, Mapping[str, Tail]], values: Values, statistics: Sequence[str]) -> float:
    """The worst score of a draw by these statistics; -inf where it moved none of them."""
    return max(
        (
            shape.get(family, shape[DEFAULT]).score(value)
            for target, shape in shapes.items()
            if shape and target.statistic in statistics
            for family, value in values.of(draw, target).items()
        ),
        default=-math.inf,
    )


# ---------------------------------------------------------------- limits


def _limits(bounds: Mapping[Target, Mapping[str, float]], values: Values, num_values: int) -> dict[str, dict[str, Any]]:
    policy, found = values.policy, dict[str, dict[str, Any]]()
    for target, bound in bounds.items():
        if bound and target.key:
            cap = values.cap(target)
            rounded = {family: min(round_up(value), round_up(cap, 4)) for family, value in bound.items()}
            if target.by_family:
                rounded = _every_family(rounded, policy.limits[target.guard].get(target.key))
            found.setdefault(target.guard, {})[target.key] = rounded if target.by_family else rounded[DEFAULT]
    sizes, spectral = bounds.get(SIZE, {}), found.get("spectral", {})
    if "kappa" in spectral:
        kappa: Mapping[str, float] = spectral["kappa"]
        allowed = {name: 2.0 * (value + for_family(sizes or {DEFAULT: 0.0}, name)) for name, value in kappa.items()}
        rank = _every_family({name: round_up(value) for name, value in allowed.items()}, kappa)
        spectral["kappa_stable_rank"] = rank
    _add_nulls(spectral, num_values)
    if "kl" in found.get("divergence", {}) and "hidden_error" not in found["divergence"]:
        # KL is about (h s)^2 / 2 for a relative error h of logits of standard deviation s, and s = 2.
        found["divergence"]["hidden_error"] = round_up(math.sqrt(2.0 * found["divergence"]["kl"]) / 2.0)
    return found


def _every_family(found: Mapping[str, float], present: Any) -> dict[str, float]:
    """Limits with a default that is tighter than none, and with every family that the tier names.

    A policy is put over its tier family by family: one that is left out would keep the tier's limit.
    """
    default = max(found.values())
    named = list(present) if isinstance(present, Mapping) else []
    return {DEFAULT: default} | {
        name: found.get(name, default) for name in dict.fromkeys([*found, *named]) if name != DEFAULT
    }


def _add_nulls(spectral: dict[str, Any], num_values: int) -> None:
    """Scales of exponential tails in which a value at its limit is one in all the values that were seen."""
    if num_values < 3 or "kappa" not in spectral:
        return
    spectral["null_n"] = num_values
    for key, name in (("kappa", "null_scale"), ("kappa_stable_rank", "null_scale_stable_rank")) + (
        (("kappa_collapse", "null_scale_collapse"),) if "kappa_collapse" in spectral else ()
    ):
        spectral[name] = {family: round_up(value / math.log(num_values)) for family, value in spectral[key].items()}


def _num_values(by_role: Mapping[str, Sequence[Draw]]) -> int:
    """Matrices changed by the value edits that shape and level rest on."""
    used = [one for role in (SHAPE, LEVEL) for one in by_role[role] if not one.preserving]
    return int(sum(one.statistics.get("num_matrices", 0.0) for one in used))


def round_up(value: float, digits: int = 2) -> float:
    """The next number of so many significant digits that is not smaller.

    Example:
        >>> round_up(0.03412), round_up(0.034), round_up(12.1)
        (0.035, 0.034, 13.0)
    """
    if value <= 0.0 or not math.isfinite(value):
        return value
    unit = digits - 1 - math.floor(math.log10(value))
    return float(f"{math.ceil(round(value * 10.0**unit, 6)) / 10.0**unit:.{digits}g}")


# ---------------------------------------------------------------- judging


def _judged(
    draws: Sequence[tuple[Draw, str]], limits: Mapping[str, Mapping[str, Any]], values: Values
) -> tuple[Judged, ...]:
    flags = [(label, _flags(draw, limits, values)) for draw, label in draws]
    guards = [*limits, "any"]
    sizes = {name: sum(label == name for label, _ in flags) for name in ("benign", "harmful")}

    def count(name: str, guard: str) -> int:
        return sum(label == name and (guard in found or (guard == "any" and bool(found))) for label, found in flags)

    return tuple(
        Judged(guard, count("benign", guard), sizes["benign"], count("harmful", guard), sizes["harmful"])
        for guard in guards
    )


def _flags(draw: Draw, limits: Mapping[str, Mapping[str, Any]], values: Values) -> frozenset[str]:
    """Guards with a limit that a draw breaks."""
    return frozenset(
        target.guard
        for target in TARGETS
        if target.key in limits.get(target.guard, {})
        for family, value in values.of(draw, target).items()
        if value > _limit(limits[target.guard][target.key], family)
    )


def _limit(value: Any, family: str) -> float:
    return for_family(value, family) if isinstance(value, Mapping) else float(value)
