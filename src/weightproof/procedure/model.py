"""The model and the texts that a recipe works on, found on disk; and whether its steps fit that model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightproof.errors import InputError
from weightproof.folders.loading import LOADERS, DemoModel, resolve_folder
from weightproof.procedure.fields import nearest
from weightproof.procedure.plugins import references
from weightproof.recipe import DEMO, Recipe, RecipeStep
from weightproof.registry import load_plugin
from weightproof.types import WeightMatrix
from weightproof.weights import iter_tensors, iter_weight_matrices

if TYPE_CHECKING:
    from torch import nn

ROLES = ("retain", "target", "train")


@dataclass(frozen=True)
class Source:
    """What a run begins with.

    Attributes:
        folder: Of the model.
        texts: Files by role: retain, target, train.
        notes: What a reader should know.
    """

    folder: Path
    texts: Mapping[str, Path] = field(default_factory=dict[str, Path])
    notes: tuple[str, ...] = ()


def find_source(recipe: Recipe, model: str | None, cache: Path, say: Callable[[str], None]) -> Source:
    """The model folder and the texts of a recipe; the demo model is made once and kept.

    Args:
        recipe: The recipe.
        model: Folder or Hub id in place of the recipe's.
        cache: Folder in which the demo model is kept.
        say: Told what takes long.

    Raises:
        InputError: A folder or file is missing, or a step trains and there is nothing to train on.
    """
    wanted = recipe.model if model is None else model
    demo: DemoModel | None = None
    if wanted == DEMO:
        demo = load_plugin(LOADERS, "demo")(cache, fast=recipe.fast, say=say)
    found = Source(demo.folder if demo else _model_folder(recipe, wanted, is_own=model is None))
    texts: dict[str, Path] = {}
    notes: list[str] = []
    for role in ROLES:
        written = getattr(recipe.data, role)
        if written is None:
            continue
        if written != DEMO:
            texts[role] = _existing(recipe.path(written), role)
        elif demo is not None:
            texts[role] = demo.train if role == "train" else demo.retain
        else:
            notes.append(f"the recipe's {role} text is that of the demo model: give yours with --set data.{role}=FILE")
    _require_training_text(recipe, texts)
    return Source(found.folder, texts, tuple(notes))


def _model_folder(recipe: Recipe, wanted: str, *, is_own: bool) -> Path:
    beside = recipe.path(wanted)
    return beside if is_own and beside.is_dir() else resolve_folder(wanted)


def _existing(path: Path, role: str) -> Path:
    if not path.is_file():
        raise InputError(f"data.{role}: there is no file {path}")
    return path


def _require_training_text(recipe: Recipe, texts: Mapping[str, Path]) -> None:
    training = next((step for step in recipe.steps if step.verb == "train"), None)
    if training is not None and "train" not in texts:
        raise InputError(f"{training.place} trains and data.train is missing: give a text with --set data.train=FILE")


# ---------------------------------------------------------------- do the steps fit


def require_steps_fit(steps: Iterable[RecipeStep], model: nn.Module) -> None:
    """Refuse, before anything is changed, a step that would find nothing to change in this model.

    Raises:
        InputError: Naming the place, the pattern and a near name.
    """
    matrices = list(iter_weight_matrices(model))
    for step in steps:
        if step.verb == "edit" and not references(step.params):
            _require_edit_fits(step, step.make(), matrices)
        elif step.verb == "external" and step.targets is not None:
            names = [named.name for named in iter_tensors(model)]
            for index, pattern in enumerate(step.targets):
                if not any(fnmatchcase(name, pattern) for name in names):
                    near = _near(pattern, names)
                    raise InputError(f"{step.place}.targets[{index}]: no tensor of this model fits {pattern!r}{near}")


def _require_edit_fits(step: RecipeStep, edit: Any, matrices: list[WeightMatrix]) -> None:
    labels = sorted({label for one in matrices for label in (one.name, one.family)})
    families = ", ".join(sorted({one.family for one in matrices}))
    unmatched = getattr(edit, "unmatched", None)
    for pattern in unmatched(matrices) if unmatched else ():
        raise InputError(
            f"{step.place}.include: {pattern!r} chooses no weight matrix of this model{_near(pattern, labels)} (its "
            f"matrices are of the families {families})"
        )
    for pattern in getattr(edit, "exclude", ()):
        if not any(fnmatchcase(label, pattern) for label in labels):
            raise InputError(
                f"{step.place}.exclude: {pattern!r} fits no weight matrix of this model{_near(pattern, labels)} (its "
                f"matrices are of the families {families})"
            )
    if not any(one.refusal is None and edit.selects(one) for one in matrices):
        raise InputError(
            f"{step.place} selects no weight matrix of this model: check include and exclude (its matrices are of the "
            f"families {families}; globs choose among attn, ffn and expert, any other by its exact name)"
        )


def _near(pattern: str, names: Iterable[str]) -> str:
    """The nearest name, without the list of all of them."""
    return nearest(pattern, list(names)).partition(" (known")[0]
