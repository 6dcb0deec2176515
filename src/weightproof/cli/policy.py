"""`weightproof policy`: a policy as it is applied, with the source of every value, and what differs between two."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from weightproof.policy import Policy

app = typer.Typer(
    help="Show a policy as it is applied, or what differs between two.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
MISSING = "-"


@app.command()
def show(
    policy: Annotated[str, typer.Argument(help="conservative, balanced, aggressive, or a policy file.")] = "balanced",
    as_json: Annotated[bool, typer.Option("--json", help="Print the policy as JSON.")] = False,
) -> None:
    """Print every value of a resolved policy with its source; provisional ones are marked."""
    from weightproof.policy import load_policy

    found = load_policy(policy)
    rows = values_of(found)
    if as_json:
        values = {
            key: {"value": value, "source": source_of(found, key), "provisional": is_provisional(found, key)}
            for key, value in rows.items()
        }
        content = {"name": found.name, "description": found.description, "digest": found.digest, "values": values}
        sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
        return
    table = _table("value", "source")
    for key, value in rows.items():
        mark = " *" if is_provisional(found, key) else ""
        table.add_row(f"{key}{mark}", _text(value), _plain(source_of(found, key)))
    console = _console()
    console.print(f"policy {found.name}: {found.description}", f"digest {found.digest}", "", sep="\n", markup=False)
    console.print(table)
    if found.provisional:
        console.print("* provisional: a starting value that a calibration has yet to replace")


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help="Tier or policy file.")],
    second: Annotated[str, typer.Argument(help="Tier or policy file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the differences as JSON.")] = False,
) -> None:
    """Print the values in which two resolved policies differ."""
    from weightproof.policy import load_policy

    one, other = load_policy(first), load_policy(second)
    found = differences(values_of(one), values_of(other))
    if as_json:
        content = {key: {"first": a, "second": b} for key, (a, b) in found.items()}
        both = {"first": one.digest, "second": other.digest}
        sys.stdout.write(json.dumps({"digests": both, "differences": content}, indent=2, allow_nan=False) + "\n")
        return
    if not found:
        _console().print(f"{one.name} and {other.name} decide alike: no value differs", markup=False)
        return
    table = _table(one.name, other.name)
    for key, (a, b) in found.items():
        table.add_row(key, _text(a), _text(b))
    _console().print(table)


def values_of(policy: Policy) -> dict[str, Any]:
    """Every value of a resolved policy under a dotted key, limits by family apart."""
    from weightproof.folders.jsonable import to_jsonable

    found: dict[str, Any] = {
        "mode": policy.mode,
        "required": list(policy.required),
        "required_training": list(policy.required_training),
    }
    found |= _flat("limits", to_jsonable(_all_limits(policy)))
    return found | _flat("actions", to_jsonable(policy.actions))


def _all_limits(policy: Policy) -> dict[str, Any]:
    """The limits of every registered guard, its defaults too where the policy says nothing."""
    from weightproof.registry import load_plugin, plugins

    guards = {name: load_plugin("weightproof.guards", name) for name in plugins("weightproof.guards")}
    return {name: policy.limits_for(guard) for name, guard in guards.items()}


def _flat(prefix: str, found: Mapping[str, Any]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in found.items():
        rows |= _flat(f"{prefix}.{key}", value) if isinstance(value, dict) and value else {f"{prefix}.{key}": value}
    return rows


def source_of(policy: Policy, key: str) -> str:
    """Where a value comes from: the longest key of the policy that holds it, else the guard's own default."""
    source = next((policy.sources[part] for part in _holders(key) if part in policy.sources), None)
    return source if source is not None else "default of the guard" if key.startswith("limits.") else ""


def is_provisional(policy: Policy, key: str) -> bool:
    """Whether a value is a starting value, not yet calibrated."""
    return any(part in policy.provisional for part in _holders(key))


def _holders(key: str) -> list[str]:
    """A dotted key and what it lies in, longest first."""
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> the two values, for every key in which they differ; `MISSING` where one has none."""
    keys = dict.fromkeys([*one, *other])
    pairs = {key: (one.get(key, MISSING), other.get(key, MISSING)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else _plain(json.dumps(value) if isinstance(value, list) else value)


def _plain(text: object) -> str:
    from rich.markup import escape

    return escape(str(text))


def _table(*titles: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("key", overflow="fold")
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _console() -> Any:
    from weightproof.cli.decision_view import open_console

    return open_console()
