"""From an entry of a recipe to the plug-in that it names, its parameters checked against the constructor."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Collection, Mapping
from typing import Any

from weightproof.errors import InputError
from weightproof.procedure.fields import as_type, nearest
from weightproof.registry import load_plugin, plugins

REFERENCE = "@"
"""`@name` stands for the folder that the step `name` made."""


def require_plugin(group: str, name: str, place: str) -> Any:
    """The object registered under a name.

    Raises:
        InputError: Naming the place; near names are suggested.
    """
    if name not in plugins(group):
        raise InputError(f"{place} is {name!r}, which no plug-in of {group} is called{nearest(name, plugins(group))}")
    try:
        return load_plugin(group, name)
    except ImportError as error:
        raise InputError(f"{place}: {name!r} of {group} cannot be imported: {error}") from error


def checked_params(factory: Any, given: Mapping[str, Any], place: str, *, ours: Collection[str] = ()) -> dict[str, Any]:
    """Parameters of a constructor as its signature asks for them.

    Args:
        factory: A class or function; its annotations say what each parameter is.
        given: As written in the recipe.
        place: Where.
        ours: Names that the recipe itself fills in.

    Raises:
        InputError: A parameter is unknown, missing, or of a wrong type.
    """
    signature = inspect.signature(factory).parameters
    named = {name: one for name, one in signature.items() if one.kind is not one.VAR_KEYWORD and name not in ours}
    takes_all = len(named) + len(set(ours) & signature.keys()) < len(signature)
    hints = _hints(factory)
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in named and not takes_all:
            raise InputError(f"{place}.{name} is unknown{nearest(name, named)}")
        is_reference = isinstance(value, str) and value.startswith(REFERENCE)
        found[name] = value if is_reference else as_type(value, hints.get(name, Any), f"{place}.{name}")
    for name, one in named.items():
        if name not in found and one.default is one.empty and one.kind is not one.VAR_POSITIONAL:
            raise InputError(f"{place}.{name} is missing: give it a value")
    return found


def build(factory: Any, params: Mapping[str, Any], place: str) -> Any:
    """Call a constructor; what it refuses is said with the place.

    Raises:
        InputError: The constructor refuses a value.
    """
    try:
        return factory(**params)
    except (InputError, TypeError, ValueError) as error:
        raise InputError(f"{place}: {error}") from error


def references(params: Mapping[str, Any]) -> dict[str, str]:
    """Parameter -> name of the step whose folder it asks for."""
    return {
        name: value.removeprefix(REFERENCE)
        for name, value in params.items()
        if isinstance(value, str) and value.startswith(REFERENCE)
    }


def _hints(factory: Any) -> dict[str, Any]:
    target = factory.__init__ if isinstance(factory, type) else factory
    try:
        # A class that is a dataclass keeps its hints on itself, in the namespace of its module.
        found = typing.get_type_hints(factory) if isinstance(factory, type) else {}
        return {**found, **typing.get_type_hints(target)}
    except (NameError, TypeError, AttributeError):
        return {}  # names that exist for type checkers only: the constructor checks for itself
