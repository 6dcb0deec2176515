"""`weightproof explain`: a certificate in human words."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightproof.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from weightproof.certificate import Certificate
    from weightproof.reporting.directions import Directions
    from weightproof.reporting.foreseen import Foreseen

_SHOWN = 10  # steps and numbers that are listed


def explain(
    certificate: Annotated[Path, typer.Argument(help="Certificate file.")],
    worst: Annotated[int, typer.Option(min=1, help="How many of the worst measurements to show.")] = 10,
    step: Annotated[int | None, typer.Option(help="Number of the step to explain; the last one by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the explanation as JSON.")] = False,
) -> None:
    """Say in words what a certificate decides, why, and what to do next. It is not verified here."""
    from weightproof.certificate import Certificate

    loaded = Certificate.load(certificate)
    steps = loaded.predicate["steps"]
    if not steps:
        raise InputError(f"{certificate} holds no judged step: nothing was decided yet")
    try:
        _explain(loaded, _chosen(steps, step), worst, as_json=as_json)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"{certificate} is not shaped as docs/certificate-format.md says ({type(error).__name__}: {error}); "
            "weightproof verify says more"
        ) from error


def _chosen(steps: Sequence[Any], number: int | None) -> Any:
    """The step that is asked for; of several with its number (a window, then an edit) one that was not kept."""
    if number is None:
        return steps[-1]
    found = [one for one in steps if one["step"] == number]
    if not found:
        known = sorted({one["step"] for one in steps})
        some = ", ".join(map(str, known[:_SHOWN])) + (f", ... {known[-1]}" if len(known) > _SHOWN else "")
        raise InputError(f"no step {number} was judged: this certificate has {some}")
    return next((one for one in found if one["action"] != "KEEP"), found[-1])


def _explain(certificate: Certificate, step: Any, worst: int, *, as_json: bool) -> None:
    from weightproof.cli.decision_view import next_for, open_console, show_decision, worst_table

    predicate = certificate.predicate
    steps = predicate["steps"]
    if as_json:
        fields = ("name", "action", "applied", "situation", "reason", "warned", "assurance", "verdicts")
        found = {name: step[name] for name in fields}
        found |= {"next": next_for(step), "not_tested": _not_tested(predicate, step), "steps": len(steps)}
        if (forecast := _forecast(step, predicate)) is not None:
            ranked = {row.name: row.predicted for row in forecast.rows}
            found |= {"predicted": {"total": forecast.total, "by_matrix": ranked, "factors": forecast.factors}}
        if (new := _directions(step, predicate)) is not None:
            found |= {"new_directions": {"total": new.total, "by_matrix": {row.name: row.count for row in new.rows}}}
        found |= {"subject": certificate.subject_name, "model_digest": certificate.model_digest}
        sys.stdout.write(json.dumps(found, indent=2, allow_nan=False) + "\n")
        return
    console = open_console()
    signed = f"signed with {_keys(certificate)}" if certificate.envelope is not None else "not signed"
    policy = predicate["policy"]
    console.print(
        f"certificate of {certificate.subject_name}, model {certificate.model_digest[:16]}…, against "
        f"{predicate['baseline'].get('name') or 'its baseline'}, under policy {policy['name']}; {signed}",
        markup=False,
    )
    if len(steps) > 1:
        _say_which(console, steps, step)
    show_decision(console, step, _not_tested(predicate, step))
    for advice in (_forecast(step, predicate), _directions(step, predicate)):
        if advice is not None:
            told = filter(None, (advice.sentence, advice.left_out))
            console.print("", " ".join(told), sep="\n", markup=False, soft_wrap=True)
    table = worst_table(step, worst)
    if table is not None:
        console.print("", table)


def _say_which(console: Console, steps: Sequence[Any], step: Any) -> None:
    """Which of several steps is explained, and which others were not kept: they are what a reader looks for."""
    place = "the last one" if step is steps[-1] else f"step {step['step']}, {step['name']}"
    console.print(f"{len(steps)} steps were judged; this is {place}", markup=False)
    others = [one for one in steps if one is not step and one["action"] != "KEEP"]
    for one in others[:_SHOWN]:
        which = f"step {one['step']}, {one['name']}: {one['action']}, {one['applied']}"
        console.print(f"not kept: {which} (explain it with --step {one['step']})", markup=False, soft_wrap=True)
    if len(others) > _SHOWN:
        console.print(f"and {len(others) - _SHOWN} more that were not kept", markup=False)


def _not_tested(predicate: Any, step: Any) -> Sequence[str]:
    """What the decision does not rest on; a certificate says it of the last step alone."""
    if step is predicate["steps"][-1]:
        return predicate["not_tested"]
    return ("the certificate lists it for its last step: see there, without --step",)


def _forecast(step: Any, predicate: Any) -> Foreseen | None:
    """What curvature foretells of a step; None where no factors were given."""
    from weightproof.reporting.foreseen import foreseen

    return foreseen(step, _after(step, predicate))


def _directions(step: Any, predicate: Any) -> Directions | None:
    """Which directions came with a step; None where nothing was merged or steered."""
    from weightproof.reporting.directions import directions

    return directions(step, _after(step, predicate))


def _after(step: Any, predicate: Any) -> Any:
    """Readings of the changed model; empty where the certificate has them no more."""
    return predicate["readings"].get((step.get("judged_on") or {}).get("after")) or {}


def _keys(certificate: Certificate) -> str:
    if certificate.envelope is None:
        return ""
    return ", ".join(f"key {one.keyid[:16]}…" for one in certificate.envelope.signatures)
