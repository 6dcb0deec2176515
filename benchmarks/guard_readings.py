"""What each guard reads of rounding, on the four briefly trained models of the tests: the tables of docs/guards/*.md.

    PYTHONPATH=tests/support python benchmarks/guard_readings.py --write

All attention and MLP matrices rounded to nearest, one scale a row, tried under `balanced` and taken back. Of each guard
the statistic that its page is about, the worst over all layers and over random tokens and the task's own windows. No
limit of the policy plays a part but this: what is known well enough to be judged is not read more sharply (a norm that
is proven within its limit stands as no change, a count at the worst end of its interval). A minute; the models are
trained once, in another two.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from trained_models import RECIPES, calibration_windows, load

from weightproof import GuardSession, edits
from weightproof.types import Verdict

RESULT = Path(__file__).with_name("guard_readings.json")
PAGES = Path(__file__).parents[1] / "docs" / "guards"
BITS = (8, 6, 4, 3, 2)
# Guard -> statistic, and what is said of it.
STATISTICS = {
    "spectral": ("log_spectral_norm_ratio", "largest |log(s1' / s1)| of a matrix"),
    "rmt": ("num_spikes_lost", "outliers lost by a family, of those it had"),
    "circuits": ("relative_distance", "largest relative distance of a layer's product"),
    "divergence": ("kl", "largest KL of a set of windows, nats per token"),
    "variance": ("log_second_moment_ratio", "largest |log(v' / v)| of a tap"),
}


def worst(verdict: Verdict, statistic: str) -> str:
    """The reading farthest from no change, and what it is counted from."""
    found = [one for one in verdict.measurements if one.statistic == statistic and one.value is not None]
    most = max(found, key=lambda one: abs(one.value or 0.0))
    if statistic == "num_spikes_lost":
        return f"{most.value:.0f} of {most.reference:.0f}"
    return f"{abs(most.value or 0.0):.2g}".replace("0.", ".").replace("e-0", "e-")


def read(name: str) -> dict[str, dict[str, str]]:
    """Edit -> guard -> worst reading, of one model."""
    session = GuardSession(load(name).model, retain=calibration_windows(name))
    rows = {}
    for edit in [edits.RTN(bits=bits, include=("attn", "ffn")) for bits in BITS]:
        step = session.trial(edit)
        verdicts = {verdict.guard: verdict for verdict in step.verdicts}
        rows[f"int{edit.bits}"] = {g: worst(verdicts[g], statistic) for g, (statistic, _) in STATISTICS.items()}
    session.close()
    return rows


def table(result: Mapping[str, Any], guard: str) -> str:
    """One guard's readings, a row an edit, a column a model."""
    models = result["models"]
    words = STATISTICS[guard][1].replace("|", "\\|")
    lines = [f"| {words} | {' | '.join(models)} |", f"| --- |{' --- |' * len(models)}"]
    for edit in next(iter(models.values())):
        lines.append(f"| {edit} | {' | '.join(rows[edit][guard] for rows in models.values())} |")
    return "\n".join(lines)


def with_table(page: str, result: Mapping[str, Any], guard: str) -> str:
    """The page with its table put between the two marks."""
    begin, end = "<!-- readings: begin -->\n", "\n<!-- readings: end -->"
    head, _, rest = page.partition(begin)
    return head + begin + table(result, guard) + end + rest.partition(end)[2]


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write guard_readings.json and the tables of docs/guards")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    result = {"torch": torch.__version__, "models": {name: read(name) for name in RECIPES}}
    for guard in STATISTICS:
        print(f"{guard}\n\n{table(result, guard)}\n")
    if write:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for guard in STATISTICS:
            path = PAGES / f"{guard}.md"
            path.write_text(with_table(path.read_text(encoding="utf-8"), result, guard), encoding="utf-8")


if __name__ == "__main__":
    main()
