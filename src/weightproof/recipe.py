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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightproof.errors import InputError
from weightproof.policy import Policy, load_policy
from weightproof.procedure.fields import Fields, nearest
from weightproof.procedure.plugins import checked_params, require_plugin
from weightproof.procedure.source import DEMO, RecipeText, find_recipe, read_recipe
from weightproof.procedure.steps import GROUPS, RecipeStep, steps_of
from weightproof.registry import plugins

__all__ = ["DEMO", "GROUPS", "Cadence", "Data", "Recipe", "RecipeStep", "load_recipe", "parse_recipe"]

_KEYS = (
    "description", "model", "device", "data", "policy", "guards", "required", "factors", "cadence", "trackers",
    "training", "edits", "chain", "out",
)  # fmt: skip


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
class Recipe:
    """A checked recipe.

    Attributes:
        name: Of the file, or under which it is shipped.
        description: What it is for.
        model: Folder, Hub id, or "demo".
        device: Where the model is put, as torch names it.
        data: Texts.
        policy: The resolved policy.
        factors: File of Kronecker factors of the model: foretell what each edit costs; None for none.
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
    factors: str | None = None

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
        steps=steps_of(top),
        chain=top.get("chain", bool, True),
        out=top.get("out", str, f"weightproof-{text.name}"),
        folder=text.folder,
        content=text.content,
        fast=text.fast,
        factors=top.get("factors", str | None, None),
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
