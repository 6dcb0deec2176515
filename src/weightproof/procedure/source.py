"""Where a recipe's text comes from: a file, or a package that ships some; with replacements put in."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from weightproof.errors import InputError
from weightproof.folders.plain_yaml import parse_yaml
from weightproof.procedure.fields import Fields, nearest
from weightproof.registry import load_plugin, plugins

GROUP = "weightproof.recipes"
DEMO = "demo"
"""Stands for the small demo model, and for its text."""
SUFFIXES = (".yaml", ".yml")
_PART = re.compile(r"([A-Za-z_][\w-]*)|\[(\d+)\]|(?<=\.)(\d+)")


@dataclass(frozen=True)
class Found:
    """The text of a recipe, its name, where relative paths in it begin, and how errors call it."""

    text: str
    name: str
    folder: Path
    origin: str


@dataclass(frozen=True)
class RecipeText:
    """A recipe as plain values, with the replacements in it."""

    content: Mapping[str, Any]
    name: str
    folder: Path
    origin: str
    fast: bool = False


def shipped_recipes() -> dict[str, Traversable]:
    """Every recipe that an installed package ships, by name.

    Where two packages ship one of the same name, each is called `package/name`, and weightproof's own also by its
    plain name.

    Raises:
        InputError: If a package's entry point cannot be loaded.
    """
    by_source = {source: _of(source) for source in plugins(GROUP)}
    count = [name for recipes in by_source.values() for name in recipes]
    found: dict[str, Traversable] = {}
    for source, recipes in by_source.items():
        for name, file in recipes.items():
            is_own = source == "weightproof"
            if count.count(name) == 1 or is_own:
                found[name] = file
            if count.count(name) > 1 and not is_own:
                found[f"{source}/{name}"] = file
    return dict(sorted(found.items()))


def _of(source: str) -> Mapping[str, Traversable]:
    try:
        return load_plugin(GROUP, source)()
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(f"the recipes of {source!r} cannot be listed: {error}; reinstall the package") from error


def find_recipe(source: str | Path) -> Found:
    """The text of a recipe.

    Args:
        source: A file, or the name of a shipped recipe.

    Raises:
        InputError: If there is neither; near names are suggested.
    """
    path = Path(source).expanduser()
    if path.suffix in SUFFIXES:
        return _read(path)
    shipped = shipped_recipes()
    name = str(source)
    if name not in shipped:
        raise InputError(f"no recipe is called {name!r}{nearest(name, shipped)}; a file is named by its path (.yaml)")
    return Found(shipped[name].read_text(encoding="utf-8"), name.rpartition("/")[2], Path(), f"recipe {name!r}")


def _read(path: Path) -> Found:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"the recipe {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the recipe {str(path)!r} is not UTF-8 text: save it as such") from error
    return Found(text, path.stem, path.parent, f"recipe {str(path)!r}")


def read_recipe(found: Found, sets: Sequence[str] = (), *, fast: bool = False) -> RecipeText:
    """The plain values of a recipe: its own, then those of its `fast` section if asked for, then `sets`.

    Raises:
        InputError: If the text is no YAML, or a replacement does not fit.
    """
    raw = parse_yaml(found.text, found.origin)
    try:
        content = copy.deepcopy(dict(Fields(raw).values))
        if "verb" in content:
            raise InputError(f"this procedure has a verb of its own: weightproof {content['verb']}")
        quick = Fields(content.pop("fast", None) or {}, "fast")
        for key, value in quick.values.items() if fast else ():
            _put(content, key, value, f"fast, {key}")
        for one in sets:
            key, given, value = one.partition("=")
            if not given or not key.strip():
                raise InputError(f"--set {one}: write it as key=value, such as edits[0].bits=4")
            _put(content, key.strip(), _from_here(key.strip(), parse_yaml(value, f"--set {key}")), f"--set {key}")
    except InputError as error:
        raise InputError(f"{found.origin}: {error}") from error
    return RecipeText(content, found.name, found.folder, found.origin, fast)


def _from_here(key: str, value: Any) -> Any:
    """A file that is named on the command line lies where the caller is, not where the recipe lies."""
    is_path = key.startswith("data.") or (key == "policy" and str(value).endswith(SUFFIXES))
    is_path = is_path or (key == "model" and Path(str(value)).expanduser().is_dir())
    names_demo = key != "policy" and value == DEMO
    return str(Path(value).expanduser().absolute()) if is_path and isinstance(value, str) and not names_demo else value


def _put(content: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Replace one value, named by its place; the last name may be new, and so may mappings on the way."""
    *parents, last = _parts(key, where)
    holder: Any = content
    for part in parents:
        holder = _inside(holder, part, where)
    if isinstance(last, int):
        _require_entry(holder, last, where)
        holder[last] = value
    elif isinstance(holder, dict):
        holder[last] = value
    else:
        raise InputError(f"{where}: there is no mapping that could hold {last!r}")


def _inside(holder: Any, part: str | int, where: str) -> Any:
    if isinstance(part, int):
        _require_entry(holder, part, where)
        return holder[part]
    if not isinstance(holder, dict):
        raise InputError(f"{where}: there is no mapping that could hold {part!r}")
    if holder.get(part) is None:
        holder[part] = {}
    return holder[part]


def _require_entry(holder: Any, index: int, where: str) -> None:
    if not isinstance(holder, list) or index >= len(holder):
        count = len(holder) if isinstance(holder, list) else 0
        raise InputError(f"{where}: there is no entry {index}; the recipe has {count} there, counted from 0")


def _parts(key: str, where: str) -> list[str | int]:
    """`edits[0].bits` -> "edits", 0, "bits"."""
    parts: list[str | int] = []
    rest = key
    while rest:
        match = _PART.match(key, len(key) - len(rest))
        if match is None:
            raise InputError(f"{where}: {key!r} is no place in a recipe; write it as edits[0].bits")
        parts.append(match[1] if match[1] is not None else int(match[2] or match[3]))
        rest = key[match.end() :]
        if rest.startswith("."):
            rest = rest[1:]
            if not rest:
                raise InputError(f"{where}: {key!r} ends with a point")
    return parts
