"""Policies: limits and actions as data, and the one table that turns verdicts into a decision.

A policy holds, for every guard, the limits it is judged by, and for every situation the action; each
with its source. The tiers `conservative`, `balanced` and `aggressive` are YAML files in
`weightproof/data/tiers`; a user's file may extend one and change any cell. The digest covers all of it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

from weightproof.errors import PolicyError
from weightproof.folders.jsonable import json_digest
from weightproof.judgement.policy_file import (
    USER,
    Entry,
    LimitValue,
    PolicyFile,
    parse_policy,
    read_policy_file,
    suggest,
)
from weightproof.judgement.situations import SITUATIONS, Evidence, gather, situation_of
from weightproof.registry import load_plugin, plugins
from weightproof.types import Action, Assurance, Decision, Measurement, Verdict

TIERS = ("conservative", "balanced", "aggressive")
CELLS = ("KEEP", "KEEP_WARNED", "ROLLBACK")
MODES = ("gate", "monitor")
GUARDS = "weightproof.guards"
OVERRIDDEN = ", overridden"


@dataclass(frozen=True, slots=True)
class Policy:
    """A resolved policy: every limit, every action, and where each comes from.

    Attributes:
        name: Name of the tier or of the user's policy.
        description: What it is for, in a sentence.
        required: Guards that must have a verdict for an edit to be kept.
        required_training: The same for a window of ordinary training.
        limits: Guard to limit to value; a mapping where the limit differs by family.
        actions: Situation (see `situations.SITUATIONS`) to KEEP, KEEP_WARNED or ROLLBACK.
        sources: `limits.<guard>.<key>` or `actions.<situation>` to its source, in a sentence.
        provisional: Which of the sources are starting values, not yet calibrated.
        mode: "gate" acts on its decisions; "monitor" only reports them: every change stays.

    Raises:
        PolicyError: On construction, if it names an unknown guard, limit, situation or action, gives
            a value out of range, or leaves a situation without an action.
    """

    name: str
    description: str
    required: tuple[str, ...]
    required_training: tuple[str, ...]
    limits: Mapping[str, Mapping[str, LimitValue]]
    actions: Mapping[str, str]
    sources: Mapping[str, str]
    provisional: tuple[str, ...] = ()
    mode: str = "gate"

    def __post_init__(self) -> None:
        """Check every name and value against the registered guards and the table of situations."""
        where = f"policy {self.name!r}"
        if self.mode not in MODES:
            raise PolicyError(f"{where}: unknown mode {self.mode!r}{suggest(self.mode, MODES)}")
        for guard in (*self.required, *self.required_training):
            if guard not in plugins(GUARDS):
                raise PolicyError(f"{where} requires an unknown guard {guard!r}{suggest(guard, plugins(GUARDS))}")
        for situation, action in self.actions.items():
            if situation not in SITUATIONS:
                raise PolicyError(f"{where} names an unknown situation {situation!r}{suggest(situation, SITUATIONS)}")
            if action not in CELLS:
                raise PolicyError(
                    f"{where}, situation {situation!r}: unknown action {action!r}{suggest(action, CELLS)}"
                )
        missing = [situation for situation in SITUATIONS if situation not in self.actions]
        if missing:
            raise PolicyError(f"{where} gives no action for {', '.join(missing)}; extend a tier or add them")
        for guard in self.limits:
            if guard not in plugins(GUARDS):
                raise PolicyError(f"{where} has limits for an unknown guard {guard!r}{suggest(guard, plugins(GUARDS))}")
            self.limits_for(load_plugin(GUARDS, guard))

    @property
    def digest(self) -> str:
        """Lower-case hex sha256 of the RFC 8785 JSON of the whole resolved policy."""
        return json_digest(self)

    def limits_for(self, guard_class: Any) -> Any:
        """The `Limits` of a guard class, filled with this policy's values.

        Raises:
            PolicyError: If this policy names a limit that the guard has not, or a value out of range.
        """
        values = self.limits.get(guard_class.name, {})
        known = [item.name for item in dataclasses.fields(guard_class.Limits)]
        for key in values:
            if key not in known:
                place = f"policy {self.name!r}, guard {guard_class.name!r}"
                raise PolicyError(f"{place} has no limit {key!r}{suggest(key, known) if known else ''}")
        try:
            return guard_class.Limits(**values)
        except PolicyError as error:
            raise PolicyError(f"policy {self.name!r}, guard {guard_class.name!r}: {error}") from error

    def override(
        self,
        limits: Mapping[str, Mapping[str, LimitValue]] | None = None,
        actions: Mapping[str, str] | None = None,
        *,
        required: Sequence[str] | None = None,
        mode: str | None = None,
        name: str | None = None,
    ) -> Policy:
        """A new policy with some limits, actions, required guards or the mode replaced; their source is `user`.

        A mapping by family changes the families that it names and keeps the others. Without a `name` it is called
        "balanced, overridden" (or whatever it came from), so that no certificate takes it for the tier itself.
        """
        for guard, keys in (limits or {}).items():
            if not isinstance(cast("object", keys), Mapping):
                raise PolicyError(f"limits of guard {guard!r} must be a mapping of names to values, not {keys!r}")
        changes = PolicyFile(
            name or f"{self.name.removesuffix(OVERRIDDEN)}{OVERRIDDEN}",
            required=None if required is None else tuple(required),
            mode=mode,
            limits={guard: {key: Entry(item) for key, item in keys.items()} for guard, keys in (limits or {}).items()},
            actions={situation: Entry(action) for situation, action in (actions or {}).items()},
        )
        found = _layer(self, changes)
        if is_named_like_a_tier(found):
            raise PolicyError(f"an overridden policy cannot be called {name!r}: that is a tier; give another name")
        return found


def load_policy(policy: str | os.PathLike[str] | Policy) -> Policy:
    """Load a tier by name, or a policy file (`.yaml`) by path; a Policy is returned as it is.

    Raises:
        PolicyError: If there is no such tier or file, or it holds anything unknown or out of range.
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(cast("object", policy), (str, os.PathLike)):
        raise PolicyError(f"a policy is a tier ({', '.join(TIERS)}), a path or a Policy, not {policy!r}")
    path = Path(policy)
    is_file = not isinstance(policy, str) or path.suffix in {".yaml", ".yml"} or len(path.parts) > 1
    return _named_apart(_resolve(read_policy_file(path)), path) if is_file else _tier(str(policy))


def _named_apart(policy: Policy, path: Path) -> Policy:
    """The policy of a file, unless it bears the name of a tier that it is not: certificates show the name."""
    if is_named_like_a_tier(policy):
        raise PolicyError(
            f"policy file {str(path)!r} is called {policy.name!r} and is not that tier: give it a name of its own "
            "(name: ...)"
        )
    return policy


def is_named_like_a_tier(policy: Policy) -> bool:
    """Whether a policy bears the name of a tier and asks for something else than the tier of this version."""
    return policy.name in TIERS and policy.digest != _tier(policy.name).digest


def _tier(name: str) -> Policy:
    if name not in TIERS:
        hint = suggest(name, TIERS).replace("known:", "tiers:")
        raise PolicyError(f"unknown policy {name!r}{hint}; a policy file is named by its path ending in .yaml")
    text = resources.files("weightproof").joinpath("data", "tiers", f"{name}.yaml").read_text(encoding="utf-8")
    return _resolve(parse_policy(text, origin=f"tier {name!r}", name=name))


def _resolve(file: PolicyFile) -> Policy:
    """Put the tier that a file extends under it."""
    if file.extends is not None:
        return _layer(_tier(file.extends), file)
    return Policy(
        file.name,
        file.description,
        file.required or (),
        file.required_training or (),
        {guard: {key: entry.value for key, entry in keys.items()} for guard, keys in file.limits.items()},
        {situation: str(entry.value) for situation, entry in file.actions.items()},
        {key: entry.source for key, entry in _entries(file).items()},
        tuple(sorted(key for key, entry in _entries(file).items() if entry.provisional)),
        file.mode or MODES[0],
    )


def _entries(file: PolicyFile) -> dict[str, Entry]:
    limits = {f"limits.{guard}.{key}": entry for guard, keys in file.limits.items() for key, entry in keys.items()}
    return limits | {f"actions.{situation}": entry for situation, entry in file.actions.items()}


def _layer(base: Policy, file: PolicyFile) -> Policy:
    """A policy with a file's entries put over it, families merged one by one."""
    limits = {guard: dict(keys) for guard, keys in base.limits.items()}
    for guard, keys in file.limits.items():
        values = limits.setdefault(guard, {})
        for key, entry in keys.items():
            values[key] = _merge(values.get(key), entry.value)
    entries = _entries(file)
    required = base.required if file.required is None else file.required
    training = base.required_training if file.required_training is None else file.required_training
    provisional = {key for key in base.provisional if key not in entries}
    return Policy(
        file.name,
        file.description or base.description,
        required,
        training,
        limits,
        {**base.actions, **{situation: str(entry.value) for situation, entry in file.actions.items()}},
        {**base.sources, **{key: entry.source for key, entry in entries.items()}},
        tuple(sorted(provisional | {key for key, entry in entries.items() if entry.provisional})),
        file.mode or base.mode,
    )


def _merge(old: LimitValue, new: LimitValue) -> LimitValue:
    return {**old, **new} if isinstance(old, Mapping) and isinstance(new, Mapping) else new


def decide(  # noqa: PLR0913 - keyword-only fields of the Decision it makes
    policy: Policy,
    verdicts: Sequence[Verdict],
    *,
    kind: str,
    step: int,
    reported: Sequence[Measurement] = (),
    world_size: int = 1,
) -> Decision:
    """One decision for one change: the first situation of the table that fits, and its action.

    Args:
        policy: The resolved policy.
        verdicts: One verdict per guard; `loss` PASS accepts, FAIL rejects, WARN is undecided.
        kind: Declared kind of change; `train` is a window of ordinary training.
        step: Step of the session or the global step of the run.
        reported: Measurements that nobody judges.
        world_size: Number of processes that took part.

    Raises:
        InputError: If a verdict comes from a guard that is not registered.
    """
    evidence = gather(verdicts, {name: _tier_of(name) for name in (verdict.guard for verdict in verdicts)})
    required = policy.required_training if kind == "train" else policy.required
    situation, because = situation_of(evidence, required, training=kind == "train")
    cell = policy.actions[situation]
    decision = Decision(
        action=Action.ROLLBACK if cell == "ROLLBACK" else Action.KEEP,
        situation=situation,
        reason=f"policy {policy.name!r}: {SITUATIONS[situation]}: {because}",
        warned=cell == "KEEP_WARNED",
        assurance=_assurance(evidence),
        verdicts=tuple(verdicts),
        reported=tuple(reported),
        step=step,
        world_size=world_size,
        policy_digest=policy.digest,
    )
    return with_digests(decision)


def with_digests(decision: Decision) -> Decision:
    """The decision with both of its digests filled in."""
    return dataclasses.replace(decision, digest=decision_digest(decision), evidence_digest=evidence_digest(decision))


def decision_digest(decision: Decision) -> str:
    """SHA-256 (hex) of the RFC 8785 JSON of what was decided.

    Covered: action, situation, warning, assurance, step, policy, and of every verdict and measurement the target,
    the statistic and the outcome. Not covered: numbers, which differ in their last bits with the number of
    processes that summed them, the sentences that quote them, and that number itself.
    """
    decided = ("action", "situation", "warned", "assurance", "step", "policy_digest")
    verdicts = [
        {
            "guard": verdict.guard,
            "outcome": verdict.outcome,
            "measured": [verdict.num_measured, verdict.num_eligible],
            "measurements": [_without_numbers(item) for item in verdict.measurements],
        }
        for verdict in decision.verdicts
    ]
    reported = [_without_numbers(item) for item in decision.reported]
    return json_digest({**{k: getattr(decision, k) for k in decided}, "verdicts": verdicts, "reported": reported})


def evidence_digest(decision: Decision) -> str:
    """SHA-256 (hex) of the RFC 8785 JSON of every field of a decision but its two digests."""
    fields = {item.name: cast("object", getattr(decision, item.name)) for item in dataclasses.fields(decision)}
    return json_digest({name: value for name, value in fields.items() if name not in ("digest", "evidence_digest")})


def _without_numbers(item: Measurement) -> list[str]:
    return [
        item.guard,
        item.target,
        item.statistic,
        item.family,
        item.outcome,
        "" if item.value is None else "measured",
    ]


def _tier_of(guard: str) -> str:
    return str(load_plugin(GUARDS, guard).tier)


def _assurance(evidence: Evidence) -> Assurance:
    if evidence.has_loss:
        return Assurance.LOSS
    if evidence.has_outputs:
        return Assurance.OUTPUTS_ONLY
    return Assurance.WEIGHTS_ONLY if evidence.has_weights else Assurance.NONE


__all__ = [
    "TIERS",
    "USER",
    "Policy",
    "decide",
    "decision_digest",
    "evidence_digest",
    "is_named_like_a_tier",
    "load_policy",
    "with_digests",
]
