"""Recipes: a procedure as data. YAML in, a checked `Recipe` out; `recipe_run` carries it out.

    model: demo                 # a model folder, a Hub id, or the small demo model
    data: {retain: demo}        # text on which the model must not get worse
    policy: balanced
    edits:
      - edit: rtn               # a plug-in of the group weightproof.edits, with its parameters
        bits: 8
        expect: KEEP

A recipe is checked whole before anything is loaded: an unknown key, a value of a wrong type or range, an unknown
edit, guard or tracker is one sentence with its place and the nearest name. It is plain data: a recipe of a stranger
can name installed plug-ins and files, and nothing else can be run by it.

Steps, one mapping each in `edits`:

| key | what it does | plug-in group |
| --- | --- | --- |
| `edit: NAME` | plans new weights, which are written and judged | `weightproof.edits` |
| `external: NAME` | lets other code change the model inside `session.edit()` | `weightproof.externals` |
| `train: NAME` | trains under guard | `weightproof.trainers` |
| `plan: {...}` | has bits chosen within a budget, and the result accepted by the guards | `weightproof.planners` |
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightproof.errors import InputError
from weightproof.kind_words import kind_from_words
from weightproof.policy import Policy, load_policy
from weightproof.recipe_fields import Fields, nearest
from weightproof.recipe_plugins import build, checked_params, references, require_plugin
from weightproof.recipe_source import DEMO, RecipeText, find_recipe, read_recipe
from weightproof.registry import load_plugin, plugins

__all__ = ["DEMO", "Cadence", "Data", "Recipe", "RecipeStep", "load_recipe", "parse_recipe"]

EXPECTED = ("KEEP", "ROLLBACK", "any")
GROUPS: Mapping[str, str] = {
    "edit": "weightproof.edits",
    "external": "weightproof.externals",
    "train": "weightproof.trainers",
    "plan": "weightproof.planners",
}
"""Verb of a step -> group of plug-ins."""
SCHEDULES = "weightproof.schedules"
_KEYS = (
    "description", "model", "device", "data", "policy", "guards", "required", "cadence", "trackers", "training",
    "edits", "chain", "out",
)  # fmt: skip
_STEP_KEYS = ("name", "expect", "on_violation", "save")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
# Names that a training job gets from the recipe, not from the step.
_SCHEDULE = "schedule"


@dataclass(frozen=True)
class Data:
    """Texts: files, or `demo`; None for none."""

    retain: str | None = None
    target: str | None = None
    train: str | None = None


@dataclass(frozen=True)
class Cadence:
    """How training steps are guarded; as the arguments of `GuardCallback` of the same names."""

    every: int = 20
    on_violation: str = "rollback"
    rollback: str = "full"
    lr_factor: float | None = None
    max_rollbacks: int | None = 3


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


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        name: Of the file, or under which it is shipped.
        description: What it is for.
        model: Folder, Hub id, or "demo".
        device: Where the model is put, as torch names it.
        data: Texts.
        policy: The resolved policy.
        cadence: How training is guarded.
        trackers: Names.
        steps: In order.
        chain: Whether every model folder gets a certificate of its own that goes on from the one before.
        out: Folder of the results, where the caller names none.
        folder: Relative paths in the recipe begin here.
        content: All of it as plain values, `--set` and `fast` included.
        fast: Whether the values of its `fast` section were used.
    """

    name: str
    description: str
    model: str
    device: str
    data: Data
    policy: Policy
    cadence: Cadence
    trackers: tuple[str, ...]
    steps: tuple[RecipeStep, ...]
    chain: bool
    out: str
    folder: Path
    content: Mapping[str, Any]
    fast: bool = False

    def path(self, written: str) -> Path:
        """A path of the recipe: relative ones begin where its file lies."""
        return self.folder / Path(written).expanduser()


def load_recipe(source: str | Path, *, sets: Sequence[str] = (), fast: bool = False) -> Recipe:
    """Find, read and check a recipe.

    Args:
        source: A file (`.yaml`), or the name of a recipe that is shipped by weightproof or another package.
        sets: Replacements `key=value`, such as `edits[0].bits=4`; values are YAML.
        fast: Use the values of its `fast` section: a run of seconds that tests the path.

    Raises:
        InputError: Naming recipe, place and what belongs there.

    Example:
        >>> load_recipe("int8").steps[0].name
        'int8'
    """
    return parse_recipe(read_recipe(find_recipe(source), sets, fast=fast))


def parse_recipe(text: RecipeText) -> Recipe:
    """Check what was read.

    Raises:
        InputError: As `load_recipe`.
    """
    try:
        return _parsed(text)
    except InputError as error:
        raise InputError(f"{text.origin}: {error}") from error


def _parsed(text: RecipeText) -> Recipe:
    top = Fields(text.content)
    top.require_known(_KEYS)
    cadence, data = top.fields("cadence"), top.fields("data")
    trackers = top.get("trackers", tuple[str, ...], ("jsonl",))
    for index, tracker in enumerate(trackers):
        require_plugin("weightproof.trackers", tracker, f"trackers[{index}]")
    return Recipe(
        name=text.name,
        description=" ".join(top.get("description", str, "").split()),
        model=top.get("model", str, DEMO),
        device=top.get("device", str, "cpu"),
        data=Data(**checked_params(Data, data.values, "data")),
        policy=_policy(top, text.folder),
        cadence=_cadence(cadence),
        trackers=trackers,
        steps=_steps(top),
        chain=top.get("chain", bool, True),
        out=top.get("out", str, f"weightproof-{text.name}"),
        folder=text.folder,
        content=text.content,
        fast=text.fast,
    )


def _policy(top: Fields, folder: Path) -> Policy:
    """The policy, with the limits of `guards` over it."""
    written = top.get("policy", str, "balanced")
    is_file = written.endswith((".yaml", ".yml"))
    try:
        policy = load_policy(folder / written if is_file else written)
    except InputError as error:
        raise InputError(f"policy: {error}") from error
    guards, required = top.fields("guards"), top.get("required", tuple[str, ...] | None)
    known = plugins("weightproof.guards")
    guards.require_known(known)
    for index, guard in enumerate(required or ()):
        if guard not in known:
            raise InputError(f"required[{index}] is {guard!r}, which is no guard{nearest(guard, known)}")
    limits = {name: dict(guards.fields(name).values) for name in guards.values}
    if not limits and required is None:
        return policy
    try:
        return policy.override(limits, required=required)
    except InputError as error:
        raise InputError(f"guards: {error}") from error


def _cadence(given: Fields) -> Cadence:
    params = checked_params(Cadence, given.values, given.place)
    known = {"on_violation": ("rollback", "stop"), "rollback": ("full", "weights")}
    for key, words in known.items():
        given.choice(key, words, words[0])
    found = Cadence(**params)
    if found.every < 1:
        raise InputError(f"cadence.every must be 1 or more optimizer steps, not {found.every}")
    return found


# ---------------------------------------------------------------- steps


def _steps(top: Fields) -> tuple[RecipeStep, ...]:
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


def _step(entry: Fields, index: int, common: Fields) -> RecipeStep:
    verbs = [verb for verb in GROUPS if verb in entry.values]
    if len(verbs) != 1:
        asked = ", ".join(f"{verb}:" for verb in GROUPS)
        found = " and ".join(verbs) or f"none of them: {', '.join(entry.values) or 'it is empty'}"
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
