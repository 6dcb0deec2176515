"""`weightproof explain`: a certificate in human words."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightproof.errors import InputError

if TYPE_CHECKING:
    from weightproof.certificate import Certificate
    from weightproof.reporting.directions import Directions
    from weightproof.reporting.foreseen import Foreseen


def explain(
    certificate: Annotated[Path, typer.Argument(help="Certificate file.")],
    worst: Annotated[int, typer.Option(min=1, help="How many of the worst measurements to show.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print the explanation as JSON.")] = False,
) -> None:
    """Say in words what a certificate decides, why, and what to do next. It is not verified here."""
    from weightproof.certificate import Certificate

    loaded = Certificate.load(certificate)
    steps = loaded.predicate["steps"]
    if not steps:
        raise InputError(f"{certificate} holds no judged step: nothing was decided yet")
    try:
        _explain(loaded, steps, worst, as_json=as_json)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"{certificate} is not shaped as docs/certificate-format.md says ({type(error).__name__}: {error}); "
            "weightproof verify says more"
        ) from error


def _explain(certificate: Certificate, steps: Any, worst: int, *, as_json: bool) -> None:
    from weightproof.cli.decision_view import NEXT, open_console, show_decision, worst_table

    step, predicate = steps[-1], certificate.predicate
    if as_json:
        fields = ("name", "action", "applied", "situation", "reason", "warned", "assurance", "verdicts")
        found = {name: step[name] for name in fields}
        found |= {"next": NEXT.get(step["situation"]), "not_tested": predicate["not_tested"], "steps": len(steps)}
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
        console.print(f"{len(steps)} steps were judged; this is the last one", markup=False)
    show_decision(console, step, predicate["not_tested"])
    for advice in (_forecast(step, predicate), _directions(step, predicate)):
        if advice is not None:
            told = filter(None, (advice.sentence, advice.left_out))
            console.print("", " ".join(told), sep="\n", markup=False, soft_wrap=True)
    table = worst_table(step, worst)
    if table is not None:
        console.print("", table)


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
