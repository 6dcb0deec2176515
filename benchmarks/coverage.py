"""How often the intervals of the loss guard hold the truth, and what early stopping costs and saves.

Run `python benchmarks/coverage.py` (6 to 8 minutes on one core); it prints tables, writes `coverage.json` beside
it and, with `--write`, puts the tables into docs/coverage.md. Simulated windows with a known truth; no model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from weightproof.statistics.paired import (
    MIN_EFFECTIVE_SIZE,
    MIN_GROUPS_TO_ACCEPT,
    MIN_SEQUENTIAL_SIZE,
    SEQUENTIAL_SHARE,
    PairedSums,
    Sequential,
    interval,
)

Array = NDArray[np.float64]

ALPHA = 0.05
LIMIT = math.log(1.05)  # the balanced tier's
NUM_COVERAGE, NUM_TEST, NUM_PEEKS = 50, 200, 400
PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"

WEIGHTS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "equal": lambda rng, n: np.full(n, 128.0),
    "lognormal": lambda rng, n: np.ceil(128 * np.exp(rng.normal(size=n))),
    "lognormal, sigma 1.5": lambda rng, n: np.ceil(128 * np.exp(1.5 * rng.normal(size=n))),
    # one window in ten has 81 times the tokens: with n = 50, five hold 90 %
    "5 of 50 hold 90 %": lambda rng, n: 16.0 * rng.permutation(np.where(np.arange(n) % 10 == 0, 81.0, 1.0)),
}
# Mean 0, variance 1.
NOISE: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "realistic": lambda rng, n: 0.8 * rng.standard_t(5, n) * math.sqrt(3 / 5) + 0.6 * (rng.exponential(size=n) - 1),
    "heavy": lambda rng, n: rng.standard_t(3, n) / math.sqrt(3),
    "skewed": lambda rng, n: rng.exponential(size=n) - 1,
    "lognormal": lambda rng, n: (np.exp(rng.normal(size=n)) - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e),
    "rare": lambda rng, n: 0.2 * rng.normal(size=n) + math.sqrt(0.96 / (0.03 * 0.97)) * ((rng.random(n) < 0.03) - 0.03),
}
NOISE_WORDS = {
    "realistic": "0.8 Student t (5) + 0.6 exponential: skewness 0.4, excess kurtosis 3",
    "heavy": "Student t (3): no fourth moment",
    "skewed": "exponential: skewness 2",
    "lognormal": "lognormal: skewness 6",
    "rare": "3 % of the windows hold all the harm",
}


@dataclass(frozen=True)
class Windows:
    """Of a simulated change whose true difference per token is `truth`."""

    weights: str
    noise: str
    truth: float = 0.0
    spread: float = 0.02

    def draw(self, rng: np.random.Generator, num_windows: int) -> tuple[Array, Array, Array]:
        """Sums before and after, and tokens, of windows in random order.

        A window's change grows with its loss (slope .01 per nat) and so does its noise; half of the noise's
        variance belongs to the window, half is an average over its tokens.
        """
        weight = WEIGHTS[self.weights](rng, num_windows)
        loss = np.clip(3.0 + 0.6 * rng.normal(size=num_windows), 1.2, 4.8)  # symmetric: its mean stays 3
        scale = self.spread * loss / 3.0 * np.sqrt(0.5 + 0.5 * 128.0 / weight)
        change = self.truth + 0.01 * (loss - 3.0) + scale * NOISE[self.noise](rng, num_windows)
        return loss * weight, (loss + change) * weight, weight

    def trials(self, num_trials: int, num_windows: int) -> Iterator[tuple[Array, Array, Array]]:
        """Seeded by what the windows are, so that a row does not depend on the others."""
        rng = np.random.default_rng(zlib.crc32(repr(asdict(self)).encode()))
        for _ in range(num_trials):
            yield self.draw(rng, num_windows)


def coverage(windows: Windows, num_trials: int, num_windows: int) -> dict:
    """How often the 95 % interval holds the truth, where it may decide and where it may not."""
    rows = []
    for sums in (PairedSums(*groups) for groups in windows.trials(num_trials, num_windows)):
        found = interval(sums, alpha=ALPHA)
        below, above = found.upper < windows.truth, found.lower > windows.truth
        rows.append((found.undecided is None, below, above, sums.effective_size, _by_token_share(sums, windows.truth)))
    table = np.array(rows, dtype=np.float64)
    decided = table[table[:, 0] == 1]
    return {
        "weights": windows.weights,
        "noise": windows.noise,
        "windows": num_windows,
        "trials": num_trials,
        "median_effective_size": round(float(np.median(table[:, 3])), 1),
        "undecided": round(1.0 - len(decided) / len(table), 4),
        "coverage": round(1.0 - float(decided[:, 1:3].sum(axis=1).mean()), 4) if len(decided) else None,
        "truth_above": round(float(decided[:, 1].mean()), 4) if len(decided) else None,
        "truth_below": round(float(decided[:, 2].mean()), 4) if len(decided) else None,
        "coverage_without_the_rule": round(1.0 - float(table[:, 1:3].sum(axis=1).mean()), 4),
        "coverage_by_token_share": round(float(table[:, 4].mean()), 4),
    }


def _by_token_share(sums: PairedSums, truth: float) -> bool:
    """Whether the scheme that draws windows by their token share and averages them plainly holds the truth."""
    rng = np.random.default_rng(sums.num_groups)
    share, per_token = sums.weights / sums.weights.sum(), sums.difference / sums.weights
    draws = rng.choice(per_token, size=(800, sums.num_groups), p=share).mean(axis=1)
    below = np.clip(np.mean(draws < sums.estimate), 1e-3, 1 - 1e-3)
    left_out = (per_token.sum() - per_token) / (sums.num_groups - 1)
    deviation = left_out.mean() - left_out
    acceleration = (deviation**3).sum() / (6 * (deviation**2).sum() ** 1.5)
    bias = stats.norm.ppf(below)
    shifted = bias + stats.norm.ppf((ALPHA / 2, 1 - ALPHA / 2))
    lower, upper = np.quantile(draws, stats.norm.cdf(bias + shifted / (1 - acceleration * shifted)))
    return bool(lower <= truth <= upper)


def false_accepts(windows: Windows, num_trials: int) -> dict:
    """Share of wrong acceptances with the truth at the limit: peeking at every window, whole test, fixed test."""
    accepted = {"peeking": 0, "peeking_from_the_start": 0, "whole_test": 0, "fixed_test": 0}
    rejected = 0
    for groups in windows.trials(num_trials, NUM_PEEKS):
        peeking = peek(groups, ALPHA)
        accepted["peeking"] += peeking.decision == "accept"
        rejected += peeking.decision == "reject"
        accepted["peeking_from_the_start"] += peek(groups, ALPHA, 0).decision == "accept"
        first = tuple(array[:NUM_TEST] for array in groups)
        accepted["whole_test"] += whole_test(first)[0] == "accept"
        accepted["fixed_test"] += interval(PairedSums(*first), alpha=ALPHA).decide(LIMIT) == "accept"
    rates = {name: round(count / num_trials, 4) for name, count in accepted.items()}
    return (
        {"weights": windows.weights, "noise": windows.noise, "trials": num_trials}
        | rates
        | {"peeking_rejects": round(rejected / num_trials, 4)}
    )


def peek(groups: tuple[Array, ...], alpha: float, accept_from: int = MIN_GROUPS_TO_ACCEPT) -> Sequential:
    """Look after every window until decided."""
    test = Sequential(LIMIT, alpha, accept_from=accept_from)
    for before, after, weight in zip(*(array.tolist() for array in groups), strict=True):
        if test.add(before, after, weight) is not None:
            break
    return test


def whole_test(groups: tuple[Array, ...], accept_from: int = MIN_GROUPS_TO_ACCEPT) -> tuple[str | None, float]:
    """What a guard does: stop early or look once more at the end. Decision and share of the tokens read."""
    test = peek(groups, SEQUENTIAL_SHARE * ALPHA, accept_from)
    if test.decision is not None:
        return test.decision, test.total_weight / groups[2].sum()
    return interval(PairedSums(*groups), alpha=(1 - SEQUENTIAL_SHARE) * ALPHA).decide(LIMIT), 1.0


def rare_harm(num_trials: int, accept_from: int) -> dict:
    """False acceptances of the whole test on 400 windows when few windows carry all the harm."""
    windows, right = Windows("equal", "rare", LIMIT), Windows("equal", "realistic")
    wrong = [whole_test(groups, accept_from)[0] == "accept" for groups in windows.trials(num_trials, NUM_PEEKS)]
    shares = [whole_test(groups, accept_from)[1] for groups in right.trials(num_trials // 10, NUM_PEEKS)]
    return {
        "accept_from": accept_from,
        "trials": num_trials,
        "false_accepts": round(sum(wrong) / num_trials, 4),
        "share_of_tokens_without_harm": round(float(np.mean(shares)), 4),
    }


def savings(windows: Windows, num_trials: int) -> dict:
    """Tokens read by the whole test as a share of those of the fixed test, and what both decide."""
    right = "accept" if windows.truth < LIMIT else "reject"
    found = [
        (*whole_test(groups), interval(PairedSums(*groups), alpha=ALPHA).decide(LIMIT))
        for groups in windows.trials(num_trials, NUM_TEST)
    ]
    shares = np.array([share for _, share, _ in found])
    wrong = [decision not in (right, None) for decision, _, _ in found]
    return {
        "weights": windows.weights,
        "true_ratio": round(math.exp(windows.truth), 3),
        "spread": windows.spread,
        "trials": num_trials,
        "mean_share_of_tokens": round(float(shares.mean()), 4),
        "95_percent_of_cases_below": round(float(np.quantile(shares, 0.95)), 4),
        "right": round(sum(decision == right for decision, _, _ in found) / num_trials, 4),
        "wrong": round(sum(wrong) / num_trials, 4),
        "right_of_fixed_test": round(sum(fixed == right for _, _, fixed in found) / num_trials, 4),
    }


def measure(num_trials: int) -> dict:
    required = ("equal", "lognormal", "5 of 50 hold 90 %")
    cover = [Windows(weights, "realistic") for weights in WEIGHTS]
    stress = [Windows(weights, noise) for noise in ("skewed", "lognormal", "rare") for weights in required[:2]]
    peeks = [Windows(weights, "realistic", LIMIT) for weights in required]
    peeks += [Windows(weights, noise, LIMIT) for noise in list(NOISE)[1:] for weights in required[:2]]
    clear = [
        Windows(weights, "realistic", math.log(ratio), spread)
        for ratio, spread in ((1.0, 0.02), (1.02, 0.05), (1.08, 0.05), (1.2, 0.05), (1.04, 0.05))
        for weights in required[:2]
    ]
    return {
        "confidence": 1 - ALPHA,
        "limit": LIMIT,
        "min_effective_size": MIN_EFFECTIVE_SIZE,
        "min_groups_to_accept": MIN_GROUPS_TO_ACCEPT,
        "min_sequential_size": MIN_SEQUENTIAL_SIZE,
        "sequential_share_of_the_error": SEQUENTIAL_SHARE,
        "versions": {"numpy": np.__version__, "python": sys.version.split()[0]},
        "coverage": [coverage(windows, num_trials, NUM_COVERAGE) for windows in cover],
        "coverage_under_stress": [coverage(windows, num_trials, NUM_COVERAGE) for windows in stress]
        + [coverage(Windows("equal", "realistic"), num_trials, n) for n in (16, 25, 200)],
        "false_accepts": [false_accepts(windows, num_trials) for windows in peeks],
        "rare_harm": [rare_harm(num_trials, accept_from) for accept_from in (0, 50, 100, 200, 400)],
        "savings": [savings(windows, num_trials) for windows in clear],
    }


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Markdown; columns are heading -> key. Shares are printed in percent where the heading says so."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for row in rows:
        cells = (percent(row[key]) if heading.endswith("%") else str(row[key]) for heading, key in columns.items())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(report: dict) -> dict[str, str]:
    """The tables of docs/coverage.md by name."""
    cover = {
        "weights": "weights",
        "noise": "noise",
        "windows": "windows",
        "effective size (median)": "median_effective_size",
        "undecided, %": "undecided",
        "coverage where decided, %": "coverage",
        "truth above, %": "truth_above",
        "truth below, %": "truth_below",
        "without the rule, %": "coverage_without_the_rule",
        "windows drawn by token share, %": "coverage_by_token_share",
    }
    accepts = {
        "weights": "weights",
        "noise": "noise",
        "peeking at each of 400 windows, %": "peeking",
        "the same, accepting before window 50 too, %": "peeking_from_the_start",
        "whole test of 200 windows, %": "whole_test",
        "fixed test of 200 windows, %": "fixed_test",
    }
    saved = {
        "weights": "weights",
        "true perplexity ratio": "true_ratio",
        "spread of windows": "spread",
        "tokens read, mean %": "mean_share_of_tokens",
        "95 in 100 cases below, %": "95_percent_of_cases_below",
        "right, %": "right",
        "wrong, %": "wrong",
        "right by the fixed test, %": "right_of_fixed_test",
    }
    return {
        "coverage": table(report["coverage"], cover),
        "stress": table(report["coverage_under_stress"], cover),
        "noise": table([{"name": k, "words": v} for k, v in NOISE_WORDS.items()], {"noise": "name", "what": "words"}),
        "false accepts": table(report["false_accepts"], accepts),
        "rare harm": table(
            report["rare_harm"],
            {
                "accepting from window": "accept_from",
                "false acceptances, %": "false_accepts",
                "tokens read without harm, %": "share_of_tokens_without_harm",
            },
        ),
        "savings": table(report["savings"], saved),
    }


def with_tables(page: str, made: dict[str, str]) -> str:
    """The page with each table put between its two marks."""
    for name, text in made.items():
        begin, end = f"<!-- {name}: benchmarks/coverage.py -->", "<!-- end -->"
        head, rest = page.split(begin)
        page = f"{head}{begin}\n{text}\n{rest[rest.index(end) :]}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/coverage.md")
    options = parser.parse_args()
    report = measure(options.trials)
    made = tables(report)
    print("\n\n".join(f"{name}\n\n{text}" for name, text in made.items()))
    Path(__file__).with_name("coverage.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
