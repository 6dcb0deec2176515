"""The report: one certificate as a page for people (HTML) or as a section of a document (Markdown).

The page is one file that needs nothing else: no script, no address outside of itself, pictures drawn inline. It
is made from the certificate alone, so it can be made by anyone, at any time.

    >>> from weightproof import Certificate
    >>> from weightproof.report import html
    >>> page = html(Certificate.load("certificate.json"))  # doctest: +SKIP
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from markupsafe import Markup
from markupsafe import escape as markup_escape

from weightproof.errors import InputError
from weightproof.folders.files import write_atomically
from weightproof.reporting import words
from weightproof.reporting.facts import WORST, Facts, StepFacts, facts_of, loss_sentence
from weightproof.reporting.pictures import loss_interval, meter, metric_words, spectrum

if TYPE_CHECKING:
    from jinja2 import Environment

    from weightproof.certificate import Certificate

T = TypeVar("T")

MARKS = {"html": '<meta name="generator" content="weightproof report">', "markdown": "[//]: # (weightproof report)"}
"""What the first lines of a report hold, so that one is known when it is to be replaced."""
FORESEEN, DIRECTIONS = "foreseen", "directions"
_SECTIONS = (
    ("why", "Why"),
    ("loss", "Loss"),
    (FORESEEN, "Predicted loss"),
    (DIRECTIONS, "Directions"),
    ("where", "Layers"),
    ("spectra", "Spectra"),
    ("guards", "Guards"),
)
_ALWAYS = (("untested", "Not tested"), ("policy", "Policy"), ("identity", "Digests and signer"))


@dataclass(frozen=True)
class _Group:
    """The worst measurement of one statistic, and how many others of it break their limit."""

    worst: Mapping[str, Any]
    others: int


def html(certificate: Certificate) -> str:
    """The report of a certificate as one self-contained page.

    Raises:
        InputError: If the certificate's predicate is not shaped as docs/certificate-format.md says.
    """
    return _rendered(certificate, _page)


def markdown(certificate: Certificate) -> str:
    """The same in brief, as Markdown without HTML: decision, why, verdicts, what was not tested, digests.

    Raises:
        InputError: If the certificate's predicate is not shaped as docs/certificate-format.md says.
    """
    return _rendered(certificate, _markdown)


def save(certificate: Certificate, path: Path) -> Path:
    """Write the page of a certificate; the old file is kept if this fails.

    Raises:
        InputError: If the file cannot be written, or the certificate is misshapen.
    """
    write_atomically(path, html(certificate).encode())
    return path


def section(certificate: Certificate) -> str:
    """A few lines of Markdown for a model card: decision, verdicts, what was not tested, digests.

    Raises:
        InputError: If the certificate's predicate is not shaped as docs/certificate-format.md says.
    """
    return _rendered(certificate, _section)


def summary(certificate: Certificate) -> dict[str, str]:
    """Decision, assurance and digests in a few words, for machines and for labels.

    Raises:
        InputError: If the certificate's predicate is not shaped as docs/certificate-format.md says.
    """
    return _rendered(certificate, _summary)


def _rendered(certificate: Certificate, render: Callable[[Facts], T]) -> T:
    try:
        return render(facts_of(certificate))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"cannot report on this certificate: its predicate is not of the shape that docs/certificate-format.md "
            f"describes ({type(error).__name__}: {error}); was it edited by hand?"
        ) from error


def _page(facts: Facts) -> str:
    predicate = facts.predicate
    policy = predicate.get("policy") or {}
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            mark=Markup(MARKS["html"]),
            facts=facts,
            predicate=predicate,
            policy=policy,
            assurance=assurance_of(facts),
            signer=signer_of(facts.certificate),
            created=words.date(predicate["created_at"]) if predicate.get("created_at") else "",
            sections=_sections(facts),
            identity=_identity(facts),
            files=tuple(sorted(facts.certificate.files.items())),
            cost=_cost(predicate),
            knows_sources="sources" in (policy.get("resolved") or {}),
        )
    )


def _summary(facts: Facts) -> dict[str, str]:
    return {
        "decision": facts.word,
        "status": facts.status,
        "change": facts.main.name if facts.main else "",
        "assurance": assurance_of(facts),
        "model_sha256": facts.certificate.model_digest,
        "certificate_sha256": facts.certificate.digest,
    }


@cache
def _environment() -> Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("weightproof", "data"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.ChainableUndefined,
        finalize=lambda value: value.translate(_TURNING) if isinstance(value, str) else value,
    )
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    environment.filters["breakable"] = _breakable
    environment.globals.update(
        words=words,
        groups=worst_of_each,
        meter=meter,
        metric=metric_words,
        loss_interval=loss_interval,
        loss_sentence=loss_sentence,
        spectrum=spectrum,
    )
    return environment


def _breakable(name: object) -> Markup:
    """A name that may break after its dots and underscores, as names of tensors have to on a phone."""
    return Markup(_BREAK.sub(r"\1<wbr>", str(markup_escape(str(name).translate(_TURNING)))))


def worst_of_each(step: StepFacts) -> tuple[_Group, ...]:
    """The worst measurement of every statistic of a step, worst first; at most `WORST`."""
    loud = Counter((m["guard"], m["statistic"]) for m in step.worst if m["outcome"] in ("WARN", "FAIL"))
    first: dict[tuple[str, str], _Group] = {}
    for item in step.worst:
        key = (item["guard"], item["statistic"])
        first.setdefault(key, _Group(item, max(loud[key] - 1, 0)))
    return tuple(first.values())[:WORST]


def assurance_of(facts: Facts) -> str:
    """Assurance level of the decision that the report is about."""
    return str(facts.main.raw.get("assurance") if facts.main else facts.predicate.get("assurance", "none"))


def signer_of(certificate: Certificate) -> str:
    """Who signed, in words; unsigned is said plainly."""
    keys = certificate.signatures
    if not keys:
        return "Not signed: anyone could have written this certificate."
    return f"Signed with key {', '.join(keys)}. Whether it is valid, and whose key it is, weightproof verify tells."


def _sections(facts: Facts) -> tuple[tuple[str, str], ...]:
    optional = (FORESEEN, DIRECTIONS)
    known = [one for one in _SECTIONS if one[0] not in optional or getattr(facts.main, one[0], None) is not None]
    return (
        *(known if facts.main else ()),
        *((("steps", "All changes"),) if facts.steps else ()),
        *_ALWAYS,
    )


def _identity(facts: Facts) -> list[tuple[str, str, bool]]:
    """Label, value, and whether it is a digest."""
    predicate, certificate = facts.predicate, facts.certificate
    baseline = predicate.get("baseline") or {}
    rows = [
        ("Model", facts.subject, False),
        ("Model, SHA-256", certificate.model_digest, True),
        ("Tensors", f"{words.number(len(certificate.tensors))}, each with its digest in the certificate", False),
        ("Baseline, SHA-256", baseline.get("model_digest"), True),
        ("Baseline read", words.date(baseline.get("created_at") or words.DASH), False),
        ("Policy, SHA-256", (predicate.get("policy") or {}).get("digest"), True),
    ]
    if facts.main is not None:
        rows += [
            ("Decision, SHA-256", facts.main.raw.get("decision_digest"), True),
            ("Evidence, SHA-256", facts.main.raw.get("evidence_digest"), True),
        ]
    parent = (predicate.get("parent") or {}).get("sha256")
    rows += [
        ("Certificate, SHA-256", certificate.digest, True),
        ("Parent certificate", parent or "none: this is the first of its chain", bool(parent)),
        ("Signature", signer_of(certificate), False),
    ]
    return [(label, str(value), digest) for label, value, digest in rows if value]


def _cost(predicate: Mapping[str, Any]) -> list[tuple[str, str]]:
    cost, environment = predicate.get("cost") or {}, predicate.get("environment") or {}
    checks = f" in {words.plural(cost['checks'], 'check')}" if cost.get("checks") else ""
    held = [
        f"{name} {words.size(cost[f'{name}_bytes'])}" for name in ("snapshot", "baseline") if f"{name}_bytes" in cost
    ]
    rows = [("Guarding took", f"{words.seconds(cost.get('seconds'))}{checks}")]
    rows += [("Memory beside the model", ", ".join(held))] if held else []
    rows += [("Processes", words.number(predicate.get("world_size")))]
    differing = predicate.get("differing_ranks") or {}
    if differing:
        rows.append(("Copies that differ", "; ".join(f"{name} on ranks {ranks}" for name, ranks in differing.items())))
    return [*rows, ("Versions", ", ".join(f"{name} {value}" for name, value in sorted(environment.items())))]


# -- Markdown --------------------------------------------------------------------------------------

# Characters that turn the direction of what follows could make a digest or a name read as another one.
_TURNING = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")
_SPECIAL = {**str.maketrans({char: f"\\{char}" for char in "\\`*_{}[]<>#|~"}), **_TURNING}
_BREAK = re.compile(r"(?<=\w)([._])(?=[A-Za-z])")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def escape(text: object) -> str:
    """Text as Markdown shows it: nothing in it is markup, HTML or a new line."""
    return " ".join(str(text).translate(_SPECIAL).split())


def _markdown(facts: Facts) -> str:
    lines = [
        MARKS["markdown"],
        "",
        f"# {escape(facts.title)}",
        "",
        f"**{escape(facts.word)}.** {escape(facts.lead)}",
        "",
    ]
    assurance = assurance_of(facts)
    lines += [f"Assurance: {escape(assurance)}. {words.ASSURANCE.get(assurance, '')}", ""]
    if facts.main is not None:
        lines += _why_lines(facts.main)
    if len(facts.steps) > 1:
        lines += _step_lines(facts)
    lines += ["## Not tested", ""]
    lines += [f"- {escape(item)}" for item in facts.predicate.get("not_tested") or ()]
    lines += ["", "## Digests and signer", ""]
    lines += [f"- {label}: {f'`{v}`' if _DIGEST.fullmatch(v) else escape(v)}" for label, v, _ in _identity(facts)]
    return "\n".join(lines) + "\n"


def _section(facts: Facts) -> str:
    certificate, assurance = facts.certificate, assurance_of(facts)
    lines = ["## Evidence", "", f"**{escape(facts.word)}.** {escape(facts.lead)}", ""]
    lines += [f"Assurance: {escape(assurance)}. {words.ASSURANCE.get(assurance, '')}", ""]
    if facts.main is not None:
        lines += _verdict_lines(facts.main)
    untested = "; ".join(escape(item) for item in facts.predicate.get("not_tested") or ())
    lines += [f"Not tested: {untested or 'the certificate does not say'}.", ""]
    lines += [f"- Model, SHA-256 over its tensors: `{certificate.model_digest}`"]
    lines += [f"- Certificate, SHA-256: `{certificate.digest}`"]
    lines += [f"- {escape(signer_of(certificate))}", ""]
    return "\n".join([*lines, "`weightproof verify` recomputes this from the weights."]) + "\n"


def _verdict_lines(step: StepFacts) -> list[str]:
    lines = ["| guard | outcome | measured | what it found |", "| --- | --- | --- | --- |"]
    for verdict in step.verdicts:
        measured = f"{verdict['num_measured']} of {verdict['num_eligible']}"
        outcome = words.OUTCOMES.get(verdict["outcome"], verdict["outcome"])
        lines.append(f"| {' | '.join(map(escape, (verdict['guard'], outcome, measured, verdict['reason'])))} |")
    return [*lines, ""]


def _why_lines(step: StepFacts) -> list[str]:
    lines = ["## Why", "", f"{escape(step.situation)}: {escape(step.because)}.".capitalize(), ""]
    lines += ["| measured | where | value | limit | outcome |", "| --- | --- | --- | --- | --- |"]
    for group in worst_of_each(step):
        item = group.worst
        more = f" and {group.others} more" if group.others else ""
        cells = (
            f"{item['guard']}: {item['statistic']}",
            f"{item['target']}{more}",
            words.number(item["value"]),
            words.number(item["limit"]),
            words.OUTCOMES.get(item["outcome"], item["outcome"]),
        )
        lines.append(f"| {' | '.join(map(escape, cells))} |")
    for item in step.losses:
        about = f"{metric_words(item.reading)} on the {item.reading.get('role')} data"
        lines += ["", f"{escape(about)}: {escape(loss_sentence(item))}"]
    for advice in (step.foreseen, step.directions):
        if advice is not None:
            lines += ["", escape(" ".join(filter(None, (advice.sentence, advice.left_out))))]
    return [*lines, "", *_verdict_lines(step)]


def _step_lines(facts: Facts) -> list[str]:
    lines = ["## All judged changes", "", "| step | change | decision | situation |", "| --- | --- | --- | --- |"]
    for group in facts.timeline:
        first, last = group[0], group[-1]
        steps = str(first.raw.get("step")) + (f" to {last.raw.get('step')}" if len(group) > 1 else "")
        name = first.name + (f" x{len(group)}" if len(group) > 1 else "")
        lines.append(f"| {' | '.join(map(escape, (steps, name, first.word, first.situation)))} |")
    return [*lines, ""]
