"""`weightproof certify`: state with evidence whether one model folder may take the place of another."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightproof.contracts.words import KINDS, kind_from_words
from weightproof.errors import InputError
from weightproof.folders.loading import resolve_folder

if TYPE_CHECKING:
    from weightproof.certificate import Certificate
    from weightproof.certifying.certification import Certified

CERTIFICATE = "certificate.json"
REPORT = "report.html"
OUTCOMES = (
    "[bold green]kept[/]: the subject may take the place of the base",
    "[bold red]rejected[/]: the subject must not take the place of the base",
    "[bold yellow]undecided[/]: too little was measured for the subject to take the place of the base",
)


def certify(  # noqa: PLR0913, PLR0917 - one option a line
    base: Annotated[str, typer.Argument(help="Model folder (or Hub id) before the change.")],
    subject: Annotated[str, typer.Argument(help="Model folder (or Hub id) after it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the certificate and the report.")],
    retain: Annotated[Path | None, typer.Option(help="Text or JSONL on which the model must not get worse.")] = None,
    target: Annotated[Path | None, typer.Option(help="Text or JSONL on which the model must get better.")] = None,
    policy: Annotated[str, typer.Option(help="conservative, balanced, aggressive, or a policy file.")] = "balanced",
    kind: Annotated[str | None, typer.Option(help=f"What the change claims to be: {KINDS}.")] = None,
    targets: Annotated[list[str] | None, typer.Option(help="Glob of tensors that may change; may be repeated.")] = None,
    factors: Annotated[
        Path | None, typer.Option(help="Factors of the base (weightproof factors fit): foretell the loss by matrix.")
    ] = None,
    sign: Annotated[Path | None, typer.Option(help="Private key (weightproof keygen) to sign with.")] = None,
    parent: Annotated[Path | None, typer.Option(help="Certificate of the base: the new one refers to it.")] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Run no model: tiers T0 and T1.")] = False,
    model_card: Annotated[
        bool, typer.Option("--model-card", help="Write a section of evidence into the subject's README.md.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where the models are run, as torch names it.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Certify a change from one model folder to another. Exit code 0 kept, 1 rejected, 2 undecided."""
    declared = parse_kind_option(kind)
    check_output(output)
    if model_card and not Path(subject).expanduser().is_dir():
        raise InputError(f"--model-card writes into the subject's folder, and {subject} is no local folder")
    from weightproof.certifying.certification import Request, certify_folders
    from weightproof.certifying.model_pair import Data
    from weightproof.policy import load_policy

    key = None
    if sign is not None:
        from weightproof.signing import load_private_key

        key = load_private_key(sign)
    request = Request(
        base=resolve_folder(base),
        subject=resolve_folder(subject),
        policy=load_policy(policy),
        kind=declared,
        targets=tuple(targets) if targets else None,
        weights_only=weights_only,
        data=Data(retain, target, device, _say),
        parent=_parent(parent),
        factors=factors,
    )
    certified = certify_folders(request, progress=True)
    paths = write_evidence(certified.certificate, output, key)
    if model_card:
        from weightproof.certificate import Certificate
        from weightproof.registry import load_plugin

        load_plugin("weightproof.cards", "readme")(request.subject, Certificate.load(paths[0]))
    _show(certified, paths, as_json=as_json)
    if certified.code:
        raise typer.Exit(certified.code)


def parse_kind_option(text: str | None) -> object:
    """The kind of change that an option declares.

    Example:
        >>> parse_kind_option("int8")
        Quantize(bits=8, granularity='channel', group_size=None)

    Raises:
        InputError: If it is none of the kinds that can be declared in words.
    """
    return None if text is None else kind_from_words(text, "--kind")


def check_output(output: Path) -> None:
    """Refuse a folder that cannot be written, before anything long."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: name a folder with -o")
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        raise InputError(f"{output} cannot be written: choose a folder that you may write to with -o")


def write_evidence(certificate: Certificate, output: Path, key: Any) -> tuple[Path, Path]:
    """Write certificate and report into a folder; each file is the old one or the new one, never a part."""
    from weightproof.certificate import Certificate
    from weightproof.folders.files import write_atomically
    from weightproof.report import html

    path = certificate.save(output / CERTIFICATE, key)
    page = html(Certificate.load(path))  # of the file: with its signature
    write_atomically(output / REPORT, page.encode())
    return path, output / REPORT


def _parent(path: Path | None) -> Certificate | None:
    if path is None:
        return None
    from weightproof.certificate import Certificate

    return Certificate.load(path)


def _say(words: str) -> None:
    """What is being done, where somebody watches a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{words} ...\n")


def _show(certified: Certified, paths: tuple[Path, Path], *, as_json: bool) -> None:
    predicate = certified.certificate.predicate
    step = predicate["steps"][-1]
    if as_json:
        fields = ("action", "situation", "reason", "warned", "assurance", "verdicts")
        content = {
            "exit_code": certified.code,
            **{name: step[name] for name in fields},
            "not_tested": predicate["not_tested"],
            "certificate": paths[0].as_posix(),
            "report": paths[1].as_posix(),
            "digest": certified.certificate.digest,
        }
        sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
        return
    from weightproof.cli.decision_view import open_console, show_decision

    console = open_console()
    console.print(OUTCOMES[certified.code])
    show_decision(console, step, predicate["not_tested"])
    console.print("", f"certificate {paths[0]}, report {paths[1]}", sep="\n", soft_wrap=True, markup=False)
