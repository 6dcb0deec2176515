"""`weightproof verify`: hold a certificate against the weights that it is said to be about."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightproof.folders.loading import resolve_folder

if TYPE_CHECKING:
    from rich.console import Console

    from weightproof.verify import Verification

STYLES = {"valid": "bold green", "invalid": "bold red", "undecided": "bold yellow"}
CODES = {"valid": 0, "invalid": 1, "undecided": 2}
"""Exit codes; 3 is bad input."""
MEANINGS = {
    "valid": "everything that was asked for was checked, and it is as the certificate says",
    "invalid": "it is not as the certificate says",
    "undecided": "nothing is wrong, but not everything that was asked for could be checked",
}
MOST = 30


def verify(  # noqa: PLR0913, PLR0917 - one option a line
    certificate: Annotated[Path, typer.Argument(help="Certificate, signed or not.")],
    model: Annotated[str, typer.Option("--model", help="Model folder (or Hub id) that it is said to be about.")],
    level: Annotated[
        int, typer.Option(min=1, max=3, help="1 digests and signature; 2 weights and verdicts; 3 outputs and losses.")
    ] = 1,
    key: Annotated[list[Path] | None, typer.Option(help="Public key that must have signed; one of several.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Model folder (or Hub id) before the change; level 3 needs it.")
    ] = None,
    retain: Annotated[Path | None, typer.Option(help="The retain data that the certificate was made with.")] = None,
    target: Annotated[Path | None, typer.Option(help="The target data that the certificate was made with.")] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            help="Adapter that was merged, as PEFT saved it (several in the order of merging), or delta steered by."
        ),
    ] = None,
    parent: Annotated[
        Path | None, typer.Option(help="Certificate of the base, which this one must go on from.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="Policy that must have decided: a tier or a policy file.")] = None,
    resharded: Annotated[
        bool, typer.Option("--resharded", help="Accept weights in other files, tensor for tensor the same.")
    ] = False,
    unsigned_ok: Annotated[
        bool, typer.Option("--unsigned-ok", help="Accept that nobody vouches for the certificate.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where the models are run at level 3, as torch names it.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Verify a certificate. Exit code 0 valid, 1 invalid, 2 undecided; valid does not mean that the change was kept."""
    from weightproof.certificate import Certificate
    from weightproof.certifying.model_pair import Data
    from weightproof.policy import load_policy
    from weightproof.signing import load_public_key
    from weightproof.verify import Demands
    from weightproof.verify import verify as check

    demands = Demands(
        keys=tuple(load_public_key(one) for one in key or ()),
        unsigned_ok=unsigned_ok,
        policy=None if policy is None else load_policy(policy),
        parent=None if parent is None else Certificate.load(parent),
        resharded=resharded,
        base=None if base is None else resolve_folder(base),
        data=Data(retain, target, device),
        adapters=tuple(adapter or ()),
    )
    found = check(certificate, resolve_folder(model), level, demands, progress=True)
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n")
    else:
        show(found)
    if CODES[found.status]:
        raise typer.Exit(CODES[found.status])


def show(found: Verification) -> None:
    """Print the answer for people: the status first, then the differences."""
    from rich.markup import escape

    from weightproof.cli.decision_view import open_console

    console = open_console()
    status = str(found.status)
    console.print(f"[{STYLES[status]}]{status}[/] at level {found.level}: {MEANINGS[status]}")
    decided = found.action or "nothing was decided yet"
    signer = ", ".join(one[:16] for one in found.signed_by) or "nobody that you named"
    console.print(f"the certificate is about {escape(found.subject)}; its decision: {decided}; signed by {signer}")
    _list(console, "differences", [str(one) for one in found.differences])
    _list(console, "not checked", list(found.unchecked))
    _list(console, "checked", list(found.checked))
    _list(console, "note", list(found.notes))


def _list(console: Console, title: str, lines: list[str]) -> None:
    from rich.markup import escape

    if not lines:
        return
    console.print(f"[bold]{title}[/]")
    for line in lines[:MOST]:
        console.print(f"  {escape(line)}", soft_wrap=True)
    if len(lines) > MOST:
        console.print(f"  and {len(lines) - MOST} more (--json lists all)")
