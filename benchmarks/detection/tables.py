"""The results as Markdown, for the documentation."""

from __future__ import annotations

from typing import Any

# Area from which on a statistic stands in the table.
TELLING = 0.6


def markdown(results: dict[str, Any]) -> str:
    """All tables."""
    parts = [
        _in_short(results),
        _models(results),
        _tiers(results),
        _choices(results),
        _statistics(results),
        _groups(results),
        _weights_alone(results),
        _held_out(results),
        _localisation(results),
        _peers(results),
        _misses(results),
    ]
    return "\n\n".join(parts) + "\n"


def _in_short(results: dict[str, Any]) -> str:
    choices, alone, where = results["choices"], results["weights_alone"], results["localisation"]
    random = results["statistics"]["divergence/kl, random windows"]["auroc"]
    held = results["held_out"]["models"]
    lines = [
        f"- **All guards, with data**: harmful found {percent(choices['all']['tpr'])}, benign flagged "
        f"{percent(choices['all']['fpr'])}, preserving flagged {percent(choices['all']['false_alarms_preserving'])}. "
        f"On models that the calibration never saw: {percent(held['tpr'])} and {percent(held['fpr'])}.",
        f"- **Without data** (weights, and outputs on random tokens and a few windows): "
        f"{percent(choices['outputs']['tpr'])} and {percent(choices['outputs']['fpr'])}. KL on random "
        f"tokens alone: AUROC {random['value']:.3f} "
        f"[{random['lower']:.3f}, {random['upper']:.3f}].",
        "- **Without a forward pass** (contracts, circuits), where no benign edit is flagged: "
        f"{percent(alone['declared']['tpr'])} of what declares a kind, {percent(alone['undeclared']['tpr'])} of what "
        "declares none.",
        f"- **Where**: the damaged block is named first in {percent(where['undeclared']['top1_block'])}.",
    ]
    return "\n".join(lines)


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


def _tiers(results: dict[str, Any]) -> str:
    rows = [
        [
            name,
            one["statistic"],
            f"{one['auroc']['value']:.3f} [{one['auroc']['lower']:.3f}, {one['auroc']['upper']:.3f}]",
            percent(one["tpr_at_1pct_fpr"]),
            percent(one["false_alarms_preserving"]),
            "not located by weights" if one["top1_block"] is None else percent(one["top1_block"]),
        ]
        for name, one in results["tiers"].items()
    ]
    header = [
        "tiers", "by contracts and", "AUROC", "harmful found at 1 % of the benign flagged", "preserving flagged there",
        "damaged block named first",
    ]  # fmt: skip
    return "**Each tier as one number** (whatever the limits; with the tiers below it)\n\n" + _table(header, rows)


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
    rows = [
        [name, *(percent(found[key]) for key in columns)]
        for name, found in results["choices"].items()
        if not name.startswith("all without") or name == "all without invariants"
    ]
    return "**Decisions of the balanced tier** (95 % Clopper-Pearson)\n\n" + _table(header, rows)


def _statistics(results: dict[str, Any]) -> str:
    told = {name: one for name, one in results["statistics"].items() if _tells(name, one)}
    ordered = sorted(told.items(), key=lambda item: -item[1]["auroc"]["value"])
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


def _tells(name: str, one: dict[str, Any]) -> bool:
    """Statistics that tell something, or that somebody decides by; results.json has all."""
    return one["auroc"]["value"] > TELLING or name.startswith(("simple/", "spectral/log_"))


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


def _weights_alone(results: dict[str, Any]) -> str:
    found = results["weights_alone"]
    rows = [
        [
            name,
            *(percent(one[key]) for key in ("tpr", "fpr")),
            *(percent(one["held_out"][key]) for key in ("tpr", "fpr")),
        ]
        for name, one in found.items()
    ]
    kinds = [[name, group, percent(one)] for name, of in found.items() for group, one in of["by_kind"].items()]
    header = ["edits", "harmful found", "benign flagged", "found, held-out models", "flagged, held-out models"]
    return (
        "**Contracts and weights alone, no forward pass** (a broken contract, or circuits further off, as a root mean "
        "square over the model, than in any benign edit of that architecture; held out: thresholds of seed 0 on seed 1)"
        "\n\n" + _table(header, rows) + "\n\n" + _table(["edits", "kind", "harmful found"], kinds)
    )


def _held_out(results: dict[str, Any]) -> str:
    rows = [
        [name, percent(one["tpr"]), percent(one["fpr"]), percent(one["false_alarms_preserving"])]
        for name, one in results["held_out"].items()
    ]
    header = ["new to the calibration", "harmful found", "benign flagged", "preserving flagged"]
    return "**The calibrated limits on what they were not made from** (all guards)\n\n" + _table(header, rows)


def _localisation(results: dict[str, Any]) -> str:
    rows = [
        [name, percent(found["top1_block"]), percent(found["top3_block"]), str(len(found["not_located"]))]
        for name, found in results["localisation"].items()
    ]
    header = [
        "harmful faults of one block",
        "block named first",
        "among the first three",
        "not located (counted as wrong)",
    ]
    seconds = results["seconds"]
    return (
        "**Where**\n\n" + _table(header, rows) + f"\n\nA check took {seconds['median']:.2f} s (median; 95 % below "
        f"{seconds['p95']:.2f} s), on a machine with other work."
    )


def _misses(results: dict[str, Any]) -> str:
    choices = results["choices"]
    lists = [
        ("Missed by all guards together", choices["all"]["missed"]),
        ("Flagged by all guards together, though benign", choices["all"]["false_alarms"]),
        ("Missed without data, by weights and outputs", choices["outputs"]["missed"]),
        ("Meant to preserve the function, and did not (left out)", results["not_preserved"]),
    ]
    parts = [f"**{title}**\n\n" + "\n".join(f"- {name}" for name in names or ["none"]) for title, names in lists]
    flagged = len(choices["outputs"]["false_alarms"])
    return "\n\n".join([*parts, f"The {flagged} benign edits flagged without data are in results.json."])


def _peers(results: dict[str, Any]) -> str:
    found = results["peers"]
    missing = [f"{peer}: {state}." for peer, state in found.items() if state == "not run"]
    if missing:
        return "**Other tools on the same edits**\n\n" + "\n".join(missing)
    return "\n\n".join([_peers_verdicts(found), _peers_shift(found)])


def _peers_verdicts(found: dict[str, Any]) -> str:
    invarlock, ours = found["invarlock 0.12.1"], found["ours, same edits"]
    judged = [
        *((f"weightproof, {name}", ours[name], ours["seconds"]) for name in ("all", "weights")),
        *(
            (f"invarlock 0.12.1, {name}{where}", verdicts, invarlock["seconds"] if name == "guards" else None)
            for part, where in (("all models", ""), ("models that pass untouched", ", models that it passes untouched"))
            for name, verdicts in invarlock[part].items()
            if part == "all models" or name.startswith("guards")
        ),
    ]
    rows = [
        [
            name,
            percent(verdicts["tpr"]),
            percent(verdicts["fpr"]),
            percent(verdicts["false_alarms_preserving"]),
            str(verdicts["nothing_said"]),
            f"{seconds['median']:.2f}" if seconds else "",
        ]
        for name, verdicts, seconds in judged
    ]
    header = ["tool", "harmful found", "benign flagged", "preserving flagged", "nothing said", "seconds (median)"]
    edits = found["edits"]
    outcomes = [
        f"{part} {', '.join(f'{count} {kind}' for kind, count in counts.items())}"
        for part, counts in invarlock["outcomes"].items()
    ]
    return (
        f"**Other tools on the same edits** ({edits['judged']} of {edits['of']}; own thresholds, tier balanced)\n\n"
        + _table(header, rows)
        + f"\n\ninvarlock 0.12.1, outcomes: {'; '.join(outcomes)}. Failed untouched: "
        + f"{', '.join(invarlock['fails_untouched']) or 'none'}. Its guards are prepared in "
        + f"{invarlock['prepare_seconds']['median']:.2f} s (median): not counted, as our baseline is not."
    )


def _peers_shift(found: dict[str, Any]) -> str:
    one = found["weightwatcher 0.7.7"]
    rows = [
        [
            f"{name} change of alpha",
            f"{shift['auroc']['value']:.3f} [{shift['auroc']['lower']:.3f}, {shift['auroc']['upper']:.3f}]",
            percent(shift["tpr_at_1pct_fpr"]),
            percent(shift["false_alarms_preserving"]),
        ]
        for name in ("mean", "largest")
        if (shift := one[name]) is not None
    ]
    header = ["weightwatcher 0.7.7", "AUROC", "harmful found at 1 % of the benign flagged", "preserving flagged there"]
    return (
        (_table(header, rows) if rows else "weightwatcher 0.7.7: too few edits to score.")
        + f"\n\nMeasured {one['measured']} edits, {one['errors']} errors; {one['layers_fitted']} of {one['layers']} "
        + f"layers had an alpha before and after; {one['seconds']['median']:.2f} s (median)."
    )
