"""Reads one policy file: YAML to typed entries, each with its source. Knows neither guards nor tiers.

A wrong file is one sentence that names file, key and what to do; nothing falls back to a default.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from weightproof.errors import InputError, PolicyError
from weightproof.folders.plain_yaml import parse_yaml

LimitValue = float | int | str | None | Mapping[str, float]

KEYS = ("name", "extends", "description", "mode", "required", "required_training", "limits", "actions")
USER = "user"


@dataclass(frozen=True, slots=True)
class Entry:
    """One limit or action with where it comes from; `provisional` until calibrated."""

    value: LimitValue
    source: str = USER
    provisional: bool = False


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """One policy file as written, before the tier that it extends is put under it."""

    name: str
    extends: str | None = None
    description: str = ""
    required: tuple[str, ...] | None = None
    required_training: tuple[str, ...] | None = None
    mode: str | None = None
    limits: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict[str, Mapping[str, Entry]])
    actions: Mapping[str, Entry] = field(default_factory=dict[str, Entry])


def suggest(name: object, known: Collection[str]) -> str:
    """`; did you mean 'x'? (known: ...)` for an error message."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} (known: {', '.join(known)})"


def read_policy_file(path: Path) -> PolicyFile:
    """Read and check the shape of one policy file.

    Raises:
        PolicyError: If it cannot be read, is not YAML, or holds a key or shape that does not belong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PolicyError(f"policy file {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PolicyError(f"policy file {str(path)!r} is not UTF-8 text: save it as such") from error
    return parse_policy(text, origin=f"policy file {str(path)!r}", name=path.stem)


def parse_policy(text: str, *, origin: str, name: str) -> PolicyFile:
    """Parse the YAML text of a policy; `name` serves where the text gives none."""
    try:
        raw = parse_yaml(text, origin)
    except InputError as error:
        raise PolicyError(str(error)) from error
    body = _mapping(raw, origin)
    for key in body:
        if key not in KEYS:
            raise PolicyError(f"{origin} holds an unknown key {key!r}{suggest(key, KEYS)}")
    limits = {
        guard: {key: _entry(item, f"{origin}, limits.{guard}.{key}", "value") for key, item in entries.items()}
        for guard, entries in (
            (guard, _mapping(item, f"{origin}, limits.{guard}"))
            for guard, item in _mapping(body.get("limits", {}), f"{origin}, limits").items()
        )
    }
    actions = {
        situation: _entry(item, f"{origin}, actions.{situation}", "action")
        for situation, item in _mapping(body.get("actions", {}), f"{origin}, actions").items()
    }
    return PolicyFile(
        name=_text(body.get("name", name), f"{origin}, name"),
        extends=None if body.get("extends") is None else _text(body["extends"], f"{origin}, extends"),
        description=" ".join(_text(body.get("description", ""), f"{origin}, description").split()),
        mode=None if body.get("mode") is None else _text(body["mode"], f"{origin}, mode"),
        required=_names(body, "required", origin),
        required_training=_names(body, "required_training", origin),
        limits=limits,
        actions=actions,
    )


def _mapping(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise PolicyError(f"{where} must be a mapping of names to values, not {value!r}")
    items = cast("Mapping[object, object]", value)
    return {_text(key, f"{where}: each key"): item for key, item in items.items()}


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise PolicyError(f"{where} must be text, not {value!r}")
    return value


def _names(body: Mapping[str, object], key: str, origin: str) -> tuple[str, ...] | None:
    if key not in body:
        return None
    value = body[key]
    if not isinstance(value, list):
        raise PolicyError(f"{origin}, {key} must be a list of guard names, not {value!r}")
    return tuple(_text(item, f"{origin}, {key}: each guard") for item in cast("list[object]", value))


def _entry(item: object, where: str, key: str) -> Entry:
    """A plain value, or a mapping with `value` (limits) or `action`, its `source` and `provisional`."""
    if not isinstance(item, Mapping) or key not in item:
        return Entry(_value(cast("object", item), where))
    body = _mapping(cast("object", item), where)
    for name in body:
        if name not in (key, "source", "provisional"):
            raise PolicyError(f"{where} holds an unknown key {name!r}{suggest(name, (key, 'source', 'provisional'))}")
    provisional = body.get("provisional", False)
    if not isinstance(provisional, bool):
        raise PolicyError(f"{where}.provisional must be true or false, not {provisional!r}")
    source = " ".join(_text(body.get("source", USER), f"{where}.source").split())
    return Entry(_value(body[key], where), source, provisional)


def _value(value: object, where: str) -> LimitValue:
    if isinstance(value, Mapping):
        items = _mapping(cast("object", value), where)
        return {key: cast("float", _value(item, f"{where}.{key}")) for key, item in items.items()}
    if value is not None and not isinstance(value, int | float | str):
        raise PolicyError(f"{where} must be a number, a word or a mapping by family, not {value!r}")
    return value
