"""The results as Markdown, for results.md and the documentation."""

from __future__ import annotations

from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """All tables."""
    parts = [
        _models(results),
        _choices(results),
        _statistics(results),
        _groups(results),
        _localisation(results),
        _misses(results),
    ]
    return "\n\n".join(parts) + "\n"


def percent(share: dict[str, Any]) -> str:
    """A share with its interval and its counts."""
    if share.get("value") is None:
        return "none to judge"
    counts = f" ({share['hits']}/{share['of']})" if "of" in share else ""
    return f"{share['value']:.1%} [{share['lower']:.1%}, {share['upper']:.1%}]{counts}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _models(results: dict[str, Any]) -> str:
    kinds = sorted({kind for counts in results["models"].values() for kind in counts})
    rows = [[name, *(str(counts.get(kind, 0)) for kind in kinds)] for name, counts in results["models"].items()]
    return f"**Edits by truth** (tau {results['tau']:.4f} nats per token)\n\n" + _table(["model", *kinds], rows)


def _choices(results: dict[str, Any]) -> str:
    columns = (
        "tpr",
        "tpr_declared_broken",
        "tpr_undeclared",
        "fpr",
        "false_alarms_preserving",
        "broken_declarations_benign",
    )
    header = [
        "guards",
        "harmful found",
        "of these, other than declared",
        "of these, undeclared",
        "benign flagged",
        "preserving flagged",
        "benign but not as declared, flagged",
    ]
    rows = [[name, *(percent(found[key]) for key in columns)] for name, found in results["choices"].items()]
    return "**Decisions of the balanced tier** (95 % Clopper-Pearson)\n\n" + _table(header, rows)


def _statistics(results: dict[str, Any]) -> str:
    ordered = sorted(results["statistics"].items(), key=lambda item: -item[1]["auroc"]["value"])
    rows = [
        [
            name,
            f"{found['auroc']['value']:.3f} [{found['auroc']['lower']:.3f}, {found['auroc']['upper']:.3f}]",
            percent(found["tpr_at_1pct_fpr"]),
            percent(found["false_alarms_preserving"]),
        ]
        for name, found in ordered
    ]
    header = [
        "statistic, largest over its targets",
        "AUROC",
        "harmful found at 1 % of the benign flagged",
        "preserving flagged there",
    ]
    return "**Statistics, each alone** (bootstrap over edits)\n\n" + _table(header, rows)


def _groups(results: dict[str, Any]) -> str:
    rows = [
        [
            name,
            ", ".join(f"{count} {kind}" for kind, count in sorted(found["truth"].items())),
            percent(found["weights harmful"]),
            percent(found["all harmful"]),
            percent(found["all benign"]),
        ]
        for name, found in results["groups"].items()
    ]
    header = [
        "edits",
        "truth",
        "harmful found, weights alone",
        "harmful found, all guards",
        "benign flagged, all guards",
    ]
    return "**By kind of edit**\n\n" + _table(header, rows)


def _localisation(results: dict[str, Any]) -> str:
    found, seconds = results["localisation"], results["seconds"]
    return (
        f"**Harmful faults of one block**: named first {percent(found['top1_block'])}, among the first three "
        f"{percent(found['top3_block'])}, not located {found['not_located']}. "
        f"A check takes {seconds['median']:.2f} s (median; 95 % below {seconds['p95']:.2f} s)."
    )


def _misses(results: dict[str, Any]) -> str:
    found = results["choices"]["all"]
    lines = ["**Missed, by all guards together**", "", *(f"- {name}" for name in found["missed"] or ["none"])]
    lines += ["", "**Flagged though benign**", "", *(f"- {name}" for name in found["false_alarms"] or ["none"])]
    if results["not_preserved"]:
        lines += [
            "",
            "**Meant to preserve the function, and did not** (left out)",
            "",
            *(f"- {n}" for n in results["not_preserved"]),
        ]
    lines += ["", *(f"{peer}: {state}." for peer, state in results["peers"].items())]
    return "\n".join(lines)
