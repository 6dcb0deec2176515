"""`weightproof demo`: the main job on real text, from nothing to evidence.

The procedure is data, `recipes/weightproof_recipes/demo.yaml`: train a small language model on the
standard library's sources under `GuardCallback`, apply INT8 (expected: kept), apply INT2 (expected:
rolled back), and measure held-out bits per byte of every version as the ground truth beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from weightproof.errors import InputError
from weightproof.registry import load_plugin

MARKER = ".weightproof-demo"


def demo(
    output: Annotated[Path, typer.Option(help="Folder for models, certificate, log, picture and W&B run.")] = Path(
        "weightproof-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of initialisation and data order.")] = 0,
    fast: Annotated[bool, typer.Option("--fast", help="A tiny variant of seconds: same path, weaker model.")] = False,
) -> None:
    """Train a small model under guard, keep INT8, roll INT2 back, and write the evidence."""
    recipe = load_recipe("demo", fast=fast)
    prepare_folder(output)
    from weightproof_callbacks.commands.demo_run import run

    failures = run(recipe, output, seed=seed)
    for failure in failures:
        sys.stderr.write(f"not as expected: {failure}\n")
    if failures:
        raise typer.Exit(1)


def load_recipe(name: str, *, fast: bool = False) -> dict[str, Any]:
    """A shipped recipe as a mapping; with `fast`, its `fast` section replaces values.

    Raises:
        InputError: If no recipe has that name.
    """
    shipped: Mapping[str, Traversable] = load_plugin("weightproof.recipes", "weightproof")()
    if name not in shipped:
        raise InputError(f"no recipe {name!r} (known: {', '.join(sorted(shipped))})")
    recipe: dict[str, Any] = yaml.safe_load(shipped[name].read_text(encoding="utf-8"))
    for section, values in recipe.pop("fast", {}).items() if fast else ():
        recipe[section] = {**recipe[section], **values}
    recipe.pop("fast", None)
    return recipe


def prepare_folder(output: Path) -> None:
    """Make the folder, or empty the one of an earlier demo; anything else is left alone.

    Raises:
        InputError: If the folder holds something that no demo wrote, or is a file.
    """
    import shutil

    if output.is_file():
        raise InputError(f"{output} is a file: name a new folder with --output")
    if output.is_dir() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise InputError(f"the folder {output} is not empty and no earlier demo wrote it: choose another with --output")
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).write_text("Written by weightproof demo; the next demo with this --output empties the folder.\n")
    for item in output.iterdir():
        if item.name == MARKER:
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()
