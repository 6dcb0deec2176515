"""What other tools said of the same edits, in figures, beside what weightproof said of exactly those.

An edit of which a tool said nothing (it raised) is left out of its shares and counted: it is neither a find nor a pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from score import Row, auroc, is_flagged, share, tpr_at, truth_of, with_interval

from weightproof import load_policy

# Of invarlock: what its own runner decides by, and each part alone.
INVARLOCK = {
    "guards": ("invariants", "spectral", "rmt", "variance"),
    "guards and ratio": ("invariants", "spectral", "rmt", "variance", "ratio"),
    **{name: (name,) for name in ("invariants", "spectral", "rmt", "variance", "ratio")},
}
PEERS = {"invarlock": "invarlock 0.12.1", "weightwatcher": "weightwatcher 0.7.7"}
UNTOUCHED = "preserving: nothing"


def by_peers(rows: Sequence[Row], peers: Sequence[Row]) -> dict[str, Any]:
    """What other tools say of the same edits, and ours of exactly those; "not run" where there is no row of a tool."""
    said = {(row["model"], row["case"]): row for row in peers}
    both = [(row, said[row["model"], row["case"]]) for row in rows if (row["model"], row["case"]) in said]
    if not both:
        return dict.fromkeys(PEERS.values(), "not run")
    actions = load_policy("balanced").actions
    ours: dict[str, Any] = {"seconds": _seconds([row["check_seconds"] for row, _ in both])}
    for choice in ("weights", "all"):
        ours[choice] = _verdicts([(row, is_flagged(row, choice, actions)) for row, _ in both])
    return {
        PEERS["invarlock"]: _invarlock([(row, peer["invarlock"]) for row, peer in both]),
        PEERS["weightwatcher"]: _weightwatcher([(row, peer["weightwatcher"]) for row, peer in both]),
        "ours, same edits": ours,
        "edits": {"judged": len(both), "of": len(rows)},
    }


def _verdicts(judged: Sequence[tuple[Row, bool | None]]) -> dict[str, Any]:
    """Shares of what was flagged; None is an edit of which nothing was said: left out, and counted."""
    known = [(row, flagged) for row, flagged in judged if flagged is not None]
    benign = [(row, flagged) for row, flagged in known if truth_of(row) == "benign"]
    return {
        "tpr": share([flagged for row, flagged in known if truth_of(row) == "harmful"]),
        "fpr": share([flagged for row, flagged in benign if not row["broken"]]),
        "false_alarms_preserving": share([flagged for row, flagged in benign if row["preserving"]]),
        "nothing_said": len(judged) - len(known),
    }


def _flagged_by(found: Mapping[str, Any], parts: Sequence[str], raised: Sequence[str] = ("fail",)) -> bool | None:
    """Whether one of these parts failed; None where none failed and one raised an error, or all are unsupported."""
    outcomes = [found[part]["outcome"] for part in parts]
    if any(outcome in raised for outcome in outcomes):
        return True
    quiet = all(outcome in {"pass", "warn", "unsupported"} for outcome in outcomes)
    return False if quiet and set(outcomes) != {"unsupported"} else None


def _invarlock(judged: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    guards, parts = INVARLOCK["guards"], INVARLOCK["guards and ratio"]
    untouched = {row["model"]: _flagged_by(found, guards) for row, found in judged if row["case"] == UNTOUCHED}
    fair = [(row, found) for row, found in judged if untouched.get(row["model"]) is False]

    def verdicts(chosen: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
        every = {name: _verdicts([(row, _flagged_by(f, of)) for row, f in chosen]) for name, of in INVARLOCK.items()}
        warned = [(row, _flagged_by(f, guards, ("fail", "warn"))) for row, f in chosen]  # its runner accepts a warning
        return every | {"guards, warnings counted": _verdicts(warned)}

    def seconds(kind: str) -> dict[str, float]:
        return _seconds([sum(found[guard].get(kind, 0.0) for guard in guards) for _, found in judged])

    outcomes = {part: Counter(_kind(found[part]["outcome"]) for _, found in judged) for part in parts}
    return {
        "all models": verdicts(judged),
        "models that pass untouched": verdicts(fair),
        "fails_untouched": sorted(name for name, flagged in untouched.items() if flagged),
        "outcomes": {part: dict(sorted(counts.items())) for part, counts in outcomes.items()},
        "seconds": seconds("seconds"),
        "prepare_seconds": seconds("prepare_seconds"),
    }


def _kind(outcome: str) -> str:
    return "error" if outcome.startswith("error") else outcome


def _weightwatcher(judged: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    """AUROC of the shift of alpha. It has no threshold of its own, so no verdicts."""
    measured = [(row, found) for row, found in judged if found["outcome"] == "measured" and found["mean"] is not None]
    return {
        **{of: _alone(measured, of) for of in ("mean", "largest")},
        "measured": len(measured),
        "errors": sum(found["outcome"] != "measured" for _, found in judged),
        "layers_fitted": sum(found["layers"] for _, found in measured),
        "layers": sum(found["of"] for _, found in measured),
        "seconds": _seconds([found["seconds"] for _, found in judged]),
    }


def _alone(measured: Sequence[tuple[Row, Row]], of: str) -> dict[str, Any] | None:
    bad, good = (np.asarray([f[of] for row, f in measured if truth_of(row) == kind]) for kind in ("harmful", "benign"))
    if not len(bad) or not len(good):
        return None
    rate, threshold = tpr_at(bad, good, 0.01)
    same = [f[of] > threshold for row, f in measured if row["preserving"] and truth_of(row) == "benign"]
    return {
        "auroc": with_interval(auroc, bad, good),
        "tpr_at_1pct_fpr": with_interval(lambda h, b: tpr_at(h, b, 0.01)[0], bad, good) | {"value": rate},
        "false_alarms_preserving": share(same),
        "n_harmful": len(bad),
        "n_benign": len(good),
    }


def _seconds(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "p95": float(np.quantile(values, 0.95))}
