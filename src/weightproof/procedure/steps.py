"""The steps of a recipe: which plug-in, with which parameters, and what is expected of it."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightproof.contracts.words import kind_from_words
from weightproof.errors import InputError
from weightproof.procedure.fields import Fields, nearest
from weightproof.procedure.plugins import build, checked_params, references, require_plugin
from weightproof.registry import load_plugin, plugins

EXPECTED = ("KEEP", "ROLLBACK", "any")
GROUPS: Mapping[str, str] = {
    "edit": "weightproof.edits",
    "external": "weightproof.externals",
    "train": "weightproof.trainers",
    "plan": "weightproof.planners",
}
"""Verb of a step -> group of plug-ins."""
SCHEDULES = "weightproof.schedules"
_STEP_KEYS = ("name", "expect", "on_violation", "save")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
# The parameter of a trainer that names a plug-in of its own.
_SCHEDULE = "schedule"


@dataclass(frozen=True)
class RecipeStep:
    """One step.

    Attributes:
        place: Where it stands: `edits[1]`.
        verb: "edit", "external", "train" or "plan".
        plugin: Name of the plug-in.
        name: Of the step; its model folder is called so.
        params: Of the plug-in, checked. A value `@name` stands for the folder that an earlier step made.
        expect: "KEEP", "ROLLBACK", or "any" where both are fine.
        on_violation: As in `GuardSession.edit`.
        save: Whether the model is written after the step.
        kind: What an external step claims to be.
        targets: Globs of the tensors that an external step may change.
    """

    place: str
    verb: str
    plugin: str
    name: str
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    expect: str = "KEEP"
    on_violation: str = "rollback"
    save: bool = True
    kind: Any = None
    targets: tuple[str, ...] | None = None

    def make(self, folders: Mapping[str, Path] | None = None) -> Any:
        """The plug-in with its parameters, references replaced by folders.

        Raises:
            InputError: The plug-in refuses a parameter.
        """
        found = {name: (folders or {}).get(step) for name, step in references(self.params).items()}
        params = {**self.params, **found}
        return build(require_plugin(GROUPS[self.verb], self.plugin, self.place), params, self.place)


def steps_of(top: Fields) -> tuple[RecipeStep, ...]:
    """The steps of `edits`, each with the parameters of its plug-in checked.

    Raises:
        InputError: Naming the place.
    """
    common = top.fields("training")
    _require_trainers(common, top.items("edits"))
    steps: list[RecipeStep] = []
    for index, entry in enumerate(top.items("edits")):
        step = _step(entry, index, common)
        names = [one.name for one in steps]
        if step.name in names:
            raise InputError(f"{entry.at('name')} is {step.name!r}, as in {steps[names.index(step.name)].place}")
        for param, asked in references(step.params).items():
            if asked not in names:
                raise InputError(f"{entry.at(param)} refers to the step {asked!r}, which is none before it"
                                 f"{nearest(asked, names)}")  # fmt: skip
        if not references(step.params) and _is_made_early(step):
            step.make()  # what the plug-in itself refuses, it refuses now
        steps.append(step)
    return tuple(steps)


def _is_made_early(step: RecipeStep) -> bool:
    """Whether making the plug-in does nothing yet: planners, and externals that are functions, act at once."""
    return step.verb in ("edit", "train") or (
        step.verb == "external" and isinstance(load_plugin(GROUPS["external"], step.plugin), type)
    )


def _require_trainers(common: Fields, entries: Sequence[Fields]) -> None:
    """Each value of `training` is a parameter of a trainer of this recipe."""
    names = [entry.get("train", str) for entry in entries if "train" in entry.values]
    if common.values and not names:
        raise InputError("training is given, and no step trains: add one (train: full), or leave it out")
    registered = [name for name in names if name in plugins(GROUPS["train"])]  # others are refused at their step
    common.require_known(sorted({one for name in registered for one in _parameters(GROUPS["train"], name)}))


def _parameters(group: str, plugin: str) -> list[str]:
    return list(inspect.signature(load_plugin(group, plugin)).parameters)


def _misspelt(entry: Fields) -> str:
    near = ((key, difflib.get_close_matches(str(key), list(GROUPS), n=1)) for key in entry.values)
    return next((f"; did you mean {found[0]!r} by {key!r}?" for key, found in near if found), "")


def _step(entry: Fields, index: int, common: Fields) -> RecipeStep:
    verbs = [verb for verb in GROUPS if verb in entry.values]
    if len(verbs) != 1:
        asked = ", ".join(f"{verb}:" for verb in GROUPS)
        found = " and ".join(verbs) or f"none of them: {', '.join(entry.values) or 'it is empty'}{_misspelt(entry)}"
        raise InputError(f"{entry.place} must have one of {asked} and has {found}")
    verb = verbs[0]
    plugin, given, ours = _plugin(entry, verb)
    name = entry.get("name", str, _default_name(index, plugin))
    if not _NAME.fullmatch(name):
        raise InputError(f"{entry.at('name')} is {name!r}: a folder is called so; use letters, digits, '-', '_', '.'")
    if verb == "train" and plugin in plugins(GROUPS[verb]):
        known = _parameters(GROUPS[verb], plugin)
        given = {**{key: value for key, value in common.values.items() if key in known}, **given}
    words = entry.get("kind", str | None) if verb == "external" else None
    return RecipeStep(
        place=entry.place,
        verb=verb,
        plugin=plugin,
        name=name,
        params=_params(GROUPS[verb], plugin, given, entry.place, ours),
        expect=entry.choice("expect", EXPECTED, EXPECTED[0]),
        on_violation=entry.choice("on_violation", ("rollback", "revert-worst"), "rollback"),
        save=entry.get("save", bool, True),
        kind=None if words is None else kind_from_words(words, entry.at("kind")),
        targets=entry.get("targets", tuple[str, ...] | None) if verb == "external" else None,
    )


def _plugin(entry: Fields, verb: str) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Name of the plug-in, the parameters written for it, and the names that it gets from the recipe."""
    reserved = {verb, *_STEP_KEYS}
    if verb == "plan":
        rest = [key for key in entry.values if key not in reserved]
        if rest:
            raise InputError(f"{entry.at(rest[0])} is unknown{nearest(rest[0], sorted(reserved))}")
        return "budget", dict(entry.fields("plan").values), ("session",)
    if verb == "external":
        reserved |= {"kind", "targets"}
    plugin = entry.get(verb, str)
    given = {key: value for key, value in entry.values.items() if key not in reserved}
    return plugin, given, ("model",) if verb == "external" else ()


def _default_name(index: int, plugin: str) -> str:
    return f"{index + 1}-{plugin}"


def _params(group: str, plugin: str, given: Mapping[str, Any], place: str, ours: Sequence[str]) -> dict[str, Any]:
    at = f"{place}.{next(verb for verb, one in GROUPS.items() if one == group)}"
    factory = require_plugin(group, plugin, at)
    try:
        params = checked_params(factory, given, place, ours=ours)
    except InputError as error:
        raise _with_step_keys(error, given, factory, place) from error
    if _SCHEDULE in params and params[_SCHEDULE] is not None:
        params[_SCHEDULE] = _schedule(params[_SCHEDULE], f"{place}.{_SCHEDULE}")
    return params


def _with_step_keys(error: InputError, given: Mapping[str, Any], factory: Any, place: str) -> InputError:
    """Of an unknown key, the nearest among the plug-in's parameters and the keys of every step."""
    known = [*inspect.signature(factory).parameters, *_STEP_KEYS]
    unknown = next((key for key in given if key not in known), None)
    return error if unknown is None else InputError(f"{place}.{unknown} is unknown{nearest(unknown, known)}")


def _schedule(given: Any, place: str) -> Any:
    """`{prune: {...}}` -> the schedule of that name."""
    fields = Fields(given, place)
    if len(fields.values) != 1:
        raise InputError(f"{place} must name one schedule, such as {{prune: {{...}}}}, not {given!r}")
    (name,) = fields.values
    factory = require_plugin(SCHEDULES, name, place)
    params = checked_params(factory, fields.fields(name).values, fields.at(name))
    return build(factory, params, fields.at(name))
