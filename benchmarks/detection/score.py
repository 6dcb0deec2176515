"""From rows to figures, each with its interval: how much of what is harmful is found, and what is flagged for nothing.

Truth of a row (tau: nats per token that the policy allows): "harmful" where the 95 % interval of the change lies above
tau, "benign" where it lies below tau / 2, "grey" between: counted, never scored. An edit that preserves the function
must also leave every logit within 1e-4; one that does not is listed, and left out. An edit that was declared to be
something else is rightly taken back though it does no harm: such are counted apart, not as false alarms.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from weightproof import load_policy
from weightproof.judgement.situations import gather, situation_of
from weightproof.registry import load_plugin, plugins
from weightproof.types import Outcome, Verdict

Row = dict[str, Any]

TAU = math.log(1.05)
SAME_LOGITS = 1e-4
TIER_OF = {name: load_plugin("weightproof.guards", name).tier for name in plugins("weightproof.guards")}
OUTPUTS = ("T0", "T1", "T2")
SETS = {"weights", "outputs", "all"}
# The statistic of weights that is asked what it finds alone: how far the circuits of all layers moved, on average.
WEIGHT_STATISTIC = "circuits/relative_distance, rms"
TIER_STATISTICS = {"T0 and T1": WEIGHT_STATISTIC, "T0 to T2": "divergence/kl", "T0 to T3": "loss/difference"}
# Groups of edits of which `weightproof calibrate` draws some; all others are new to the calibrated limits.
CALIBRATED_GROUPS = {"preserving", "quantize", "prune", "low rank", "cast", "noise"}
PLOTTED = (
    "spectral/log_spectral_norm_ratio",
    "circuits/relative_distance",
    "divergence/kl, random windows",
    "loss/difference",
)
REPLICATES = 1000
# With the weights alone nothing is accepted without a warning by policy; what is found is what raises one.
QUIET = {"no_forward_weights_pass", "nothing_measured"}
# That an edit changed nothing is told as a warning, which is true, and no claim of harm.
WEIGHTS_ALONE = {"weights", "invariants", "invariants and circuits"}


def truth_of(row: Row, tau: float = TAU) -> str:
    """One of harmful, benign, grey, and, where an edit meant to preserve the function moved a logit, not preserved."""
    if row["preserving"]:
        return "benign" if row["truth"]["max_logit"] < SAME_LOGITS else "not preserved"
    if row["truth"]["lower"] > tau:
        return "harmful"
    return "benign" if row["truth"]["upper"] < tau / 2 else "grey"


def situation_without(row: Row, left: str, tiers: Sequence[str]) -> str:
    """What a policy would be asked to act on without one guard, from the outcomes of the others of these tiers."""
    verdicts = [
        Verdict(name, Outcome(outcome), (), "", 0, 0)
        for name, outcome in row["outcomes"].items()
        if name != left and TIER_OF[name] in tiers
    ]
    return situation_of(gather(verdicts, TIER_OF), (), training=False)[0]


def with_ablations(rows: Sequence[Row]) -> list[Row]:
    """The rows with a situation for T0 to T2 without each guard that spoke."""
    spoke = {name for row in rows for name, outcome in row["outcomes"].items() if outcome != "NOT_MEASURED"}
    judging = sorted(name for name in spoke if TIER_OF[name] in OUTPUTS)
    return [
        row
        | {
            "situations": {
                name: one for name, one in row["situations"].items() if name.rpartition(" ")[2] in spoke | SETS
            }
            | {f"outputs without {left}": situation_without(row, left, OUTPUTS) for left in judging}
        }
        for row in rows
    ]


def is_flagged(row: Row, choice: str, actions: Mapping[str, str]) -> bool:
    """Whether these guards would have the change taken back (weights alone: whether they raise anything)."""
    situation = row["situations"][choice]
    if choice in WEIGHTS_ALONE:
        return situation not in QUIET and not row["statistics"].get("invariants/no_op")
    return actions[situation] == "ROLLBACK"


def share(hits: Sequence[bool]) -> dict[str, float | int | None]:
    """A share with its 95 % Clopper-Pearson interval."""
    k, n = int(sum(hits)), len(hits)
    if not n:
        return {"value": None, "lower": None, "upper": None, "hits": 0, "of": 0}
    lower = float(stats.beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    upper = float(stats.beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    return {"value": k / n, "lower": lower, "upper": upper, "hits": k, "of": n}


def auroc(harmful: np.ndarray, benign: np.ndarray) -> float:
    """Probability that a harmful edit scores above a benign one, ties one half (Mann-Whitney)."""
    ranks = stats.rankdata(np.concatenate([harmful, benign]))
    above = ranks[: len(harmful)].sum() - len(harmful) * (len(harmful) + 1) / 2
    return float(above / (len(harmful) * len(benign)))


def tpr_at(harmful: np.ndarray, benign: np.ndarray, rate: float) -> tuple[float, float]:
    """Share of the harmful above the least threshold that flags at most this share of the benign; the threshold."""
    allowed = math.floor(rate * len(benign))
    threshold = float(np.sort(benign)[::-1][allowed]) if allowed < len(benign) else -math.inf
    return float((harmful > threshold).mean()), threshold


def with_interval(measure: Callable[..., float], harmful: np.ndarray, benign: np.ndarray) -> dict[str, float]:
    """A figure and its 95 % bootstrap interval over edits."""
    generator = np.random.default_rng(0)
    drawn = [
        measure(generator.choice(harmful, len(harmful)), generator.choice(benign, len(benign)))
        for _ in range(REPLICATES)
    ]
    lower, upper = np.quantile(drawn, (0.025, 0.975))
    return {"value": measure(harmful, benign), "lower": float(lower), "upper": float(upper)}


def scores_of(rows: Sequence[Row], statistic: str) -> np.ndarray:
    """A statistic of each row; inf is a finite number above all others.

    What was not measured is no evidence of change, but where every benign edit has the statistic and its guard
    fails without it: the outputs or the loss are not finite any more.
    """
    always = all(statistic in row["statistics"] for row in rows if truth_of(row) == "benign")
    values = np.asarray(
        [_or_broken(row, statistic) if always else row["statistics"].get(statistic, 0.0) for row in rows], dtype=float
    )
    finite = values[np.isfinite(values)]
    return np.where(np.isfinite(values), values, (finite.max(initial=0.0) + 1.0) * 10)


def by_statistic(rows: Sequence[Row]) -> dict[str, Any]:
    """AUROC, TPR at 1 % FPR and false alarms on preserving edits of every statistic."""
    harmful, benign = ([row for row in rows if truth_of(row) == kind] for kind in ("harmful", "benign"))
    preserving = [row for row in benign if row["preserving"]]
    found: dict[str, Any] = {}
    for statistic in sorted({key for row in rows for key in row["statistics"]}):
        every = scores_of([*harmful, *benign, *preserving], statistic)
        bad, good = every[: len(harmful)], every[len(harmful) : len(harmful) + len(benign)]
        same = every[len(harmful) + len(benign) :]
        if every.max() == every.min():
            continue
        rate, threshold = tpr_at(bad, good, 0.01)
        found[statistic] = {
            "auroc": with_interval(auroc, bad, good),
            "tpr_at_1pct_fpr": with_interval(lambda h, b: tpr_at(h, b, 0.01)[0], bad, good) | {"value": rate},
            "threshold": threshold,
            "false_alarms_preserving": share(list(same > threshold)),
            "n_preserving": len(same),
            "n_harmful": len(bad),
            "n_benign": len(good),
        }
    return found


def by_tier(rows: Sequence[Row]) -> dict[str, Any]:
    """Each tier as one number, its best statistic above which a broken contract stands; with the tiers below it.

    Benign edits that are not what they declare are left out: they are rightly taken back.
    """
    harmful = [row for row in rows if truth_of(row) == "harmful"]
    benign = [row for row in rows if truth_of(row) == "benign" and not row["broken"]]
    found: dict[str, Any] = {}
    for name, statistic in TIER_STATISTICS.items():
        every = scores_of([*harmful, *benign], statistic)
        broken = np.asarray([row["outcomes"]["invariants"] == "FAIL" for row in (*harmful, *benign)])
        every = np.where(broken, every.max() + 1.0, every)
        bad, good = every[: len(harmful)], every[len(harmful) :]
        same = good[[row["preserving"] for row in benign]]
        threshold = tpr_at(bad, good, 0.01)[1]
        found[name] = {
            "statistic": statistic,
            "auroc": with_interval(auroc, bad, good),
            "tpr_at_1pct_fpr": with_interval(lambda h, b: tpr_at(h, b, 0.01)[0], bad, good),
            "false_alarms_preserving": share(list(same > threshold)),
            "n_preserving": len(same),
            "top1_block": localisation(rows)["undeclared"]["top1_block"] if name != "T0 and T1" else None,
        }
    return found


def by_choice(rows: Sequence[Row], policy: str = "balanced") -> dict[str, Any]:
    """Of each choice of guards, as the policy acts: how much is found, and what is flagged for nothing."""
    actions = load_policy(policy).actions
    found: dict[str, Any] = {}
    for choice in rows[0]["situations"]:
        flagged = {id(row): is_flagged(row, choice, actions) for row in rows}

        def of(kind: str, *, flagged: dict[int, bool] = flagged, **wanted: Any) -> dict[str, Any]:
            chosen = [r for r in rows if truth_of(r) == kind and all(r[key] == value for key, value in wanted.items())]
            return share([flagged[id(row)] for row in chosen])

        found[choice] = {
            "tpr": of("harmful"),
            "tpr_declared_broken": of("harmful", broken=True),
            "tpr_undeclared": of("harmful", declared=False),
            "fpr": of("benign", broken=False),
            "broken_declarations_benign": of("benign", broken=True),
            "false_alarms_preserving": of("benign", preserving=True),
            "missed": sorted(
                f"{r['model']}: {r['case']}" for r in rows if truth_of(r) == "harmful" and not flagged[id(r)]
            ),
            "false_alarms": sorted(
                f"{r['model']}: {r['case']}"
                for r in rows
                if truth_of(r) == "benign" and not r["broken"] and flagged[id(r)]
            ),
        }
    return found


def by_group(rows: Sequence[Row], policy: str = "balanced") -> dict[str, Any]:
    """Of each group of edits: how many there are of each truth, and how many all guards and the weights alone flag."""
    actions = load_policy(policy).actions
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["group"]].append(row)
    return {
        name: {
            "truth": dict(Counter(truth_of(row) for row in of)),
            **{
                f"{choice} {kind}": share([is_flagged(row, choice, actions) for row in of if truth_of(row) == kind])
                for choice in ("weights", "outputs", "all")
                for kind in ("harmful", "benign")
            },
        }
        for name, of in sorted(groups.items())
    }


def localisation(rows: Sequence[Row]) -> dict[str, Any]:
    """Of harmful faults of one block: whether it is the first of those named, or among the first three.

    A tensor that is not finite is named by the invariants itself, so its block is. What is located by nobody counts as
    wrong.
    """
    chosen = [r for r in rows if r["block"] is not None and truth_of(r) == "harmful"]
    found: dict[str, Any] = {}
    for name, declared in (("undeclared", False), ("in a declared int8", True)):
        of = [row for row in chosen if row["declared"] == declared]
        found[name] = {
            "top1_block": share([row["block"] in _named(row)[:1] for row in of]),
            "top3_block": share([row["block"] in _named(row)[:3] for row in of]),
            "not_located": sorted(f"{r['model']}: {r['case']}" for r in of if not _named(r)),
            "wrong": sorted(f"{r['model']}: {r['case']}" for r in of if _named(r) and _named(r)[0] != r["block"]),
        }
    return found


def _named(row: Row) -> list[int]:
    return [row["block"]] if row["statistics"].get("invariants/num_nonfinite") else row["blamed"]


def weights_alone(rows: Sequence[Row]) -> dict[str, Any]:
    """Contracts and one statistic of weights, no forward pass: what is found where nothing benign is flagged.

    The threshold is the largest value of any benign edit of the same architecture, of those that declare a kind and
    those that do not apart; a broken contract counts as found. Held out: the threshold of the models of seed 0, judged
    on the others.
    """
    found: dict[str, Any] = {}
    for declared in (True, False):
        chosen = [row for row in rows if row["declared"] == declared]
        limits, own = _limits(chosen), _limits([row for row in chosen if _seed(row) == "0"])
        others = [row for row in chosen if _seed(row) != "0" and _architecture(row) in own]
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in chosen:
            if truth_of(row) == "harmful":
                groups[row["group"]].append(row)
                groups[f"all of {_architecture(row)}"].append(row)
        found["declared" if declared else "undeclared"] = {
            "thresholds": limits,
            "tpr": _shares(chosen, limits, "harmful"),
            "fpr": _shares(chosen, limits, "benign"),
            "by_kind": {name: _shares(of, limits, "harmful") for name, of in sorted(groups.items())},
            "held_out": {
                "tpr": _shares(others, own, "harmful"),
                "fpr": _shares(others, own, "benign"),
            },
        }
    return found


def _architecture(row: Row) -> str:
    return row["model"].partition("-")[0]


def _seed(row: Row) -> str:
    return row["model"].partition("-")[2]


def _limits(rows: Sequence[Row]) -> dict[str, float]:
    limits: dict[str, float] = {}
    for row in rows:
        if truth_of(row) == "benign" and not row["broken"]:
            name = _architecture(row)
            limits[name] = max(limits.get(name, 0.0), row["statistics"].get(WEIGHT_STATISTIC, 0.0))
    return limits


def _shares(rows: Sequence[Row], limits: Mapping[str, float], kind: str) -> dict[str, Any]:
    """Share of the harmful, or of the benign that are as declared, that these thresholds flag."""
    chosen = [row for row in rows if truth_of(row) == kind and not (kind == "benign" and row["broken"])]
    return share(
        [
            row["outcomes"]["invariants"] == "FAIL"
            or row["statistics"].get(WEIGHT_STATISTIC, 0.0) > limits[_architecture(row)]
            for row in chosen
        ]
    )


def held_out(rows: Sequence[Row]) -> dict[str, Any]:
    """All guards on what no calibration saw: models of other seeds, and of those the kinds that it never drew."""
    models = [row for row in rows if not row["model"].endswith("-0")]
    kinds = [row for row in models if row["group"] not in CALIBRATED_GROUPS]
    chosen = {"models": models, "models and kinds of edits": kinds}
    return {name: by_choice(of)["all"] for name, of in chosen.items() if of}


def points(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the plot shows of each edit."""
    return [
        {
            "model": row["model"],
            "case": row["case"],
            "group": row["group"],
            "truth": truth_of(row),
            "delta": _plain(row["truth"]["delta"]),
            "lower": _plain(row["truth"]["lower"]),
            "upper": _plain(row["truth"]["upper"]),
            "action": row["action"],
            **{name: _plain(_or_broken(row, name)) for name in PLOTTED},
        }
        for row in rows
    ]


def _or_broken(row: Row, statistic: str) -> float:
    """The statistic; inf where its guard fails without it, as it does on outputs that are not finite."""
    failed = row["outcomes"].get(statistic.partition("/")[0]) == "FAIL"
    return row["statistics"].get(statistic, math.inf if failed else 0.0)


def _plain(value: float) -> float | str:
    return float(f"{value:.4g}") if math.isfinite(value) else "inf"


def score(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that the tables show, from the rows of all models."""
    rows = with_ablations(rows)
    counts = Counter((row["model"], truth_of(row)) for row in rows)
    models = sorted({row["model"] for row in rows})
    return {
        "tau": TAU,
        "models": {model: {kind: n for (name, kind), n in sorted(counts.items()) if name == model} for model in models},
        "not_preserved": sorted(f"{r['model']}: {r['case']}" for r in rows if truth_of(r) == "not preserved"),
        "choices": by_choice(rows),
        "tiers": by_tier(rows),
        "statistics": by_statistic(rows),
        "groups": by_group(rows),
        "weights_alone": weights_alone(rows),
        "held_out": held_out(rows),
        "localisation": localisation(rows),
        "seconds": {
            "median": float(np.median([row["check_seconds"] for row in rows])),
            "p95": float(np.quantile([row["check_seconds"] for row in rows], 0.95)),
        },
    }


def save(results: dict[str, Any], path: Any) -> None:
    """JSON without NaN or infinity, a line a field."""
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_points(found: Sequence[dict[str, Any]], path: Path) -> None:
    """One line an edit."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
