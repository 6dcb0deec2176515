"""Plug-ins by entry point: guards, edits, trackers, loaders, recipes, commands, model cards.

The library reaches its own adapters only this way, exactly as it reaches anyone else's.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from weightproof.errors import InputError

GROUPS = (
    "weightproof.guards",
    "weightproof.edits",
    "weightproof.trackers",
    "weightproof.loaders",
    "weightproof.recipes",
    "weightproof.commands",
    "weightproof.cards",
    "weightproof.readers",
    "weightproof.externals",
    "weightproof.trainers",
    "weightproof.schedules",
    "weightproof.planners",
)


@cache
def plugins(group: str) -> dict[str, EntryPoint]:
    """Registered plug-ins of one group by name, in order of name; nothing is imported."""
    if group not in GROUPS:
        raise InputError(f"unknown plug-in group {group!r}; the groups are {', '.join(GROUPS)}")
    return {entry.name: entry for entry in sorted(entry_points(group=group), key=lambda entry: entry.name)}


def load_plugin(group: str, name: str) -> Any:
    """Import and return the object registered as `name` in `group`.

    Raises:
        InputError: If nothing is registered under that name; near names are suggested.
    """
    found = plugins(group)
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(found) or "none: is the package installed (pip install .)?"
        raise InputError(f"no plug-in {name!r} in {group}{hint} (known: {known})")
    return found[name].load()
