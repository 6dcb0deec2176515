"""The detection benchmark: what is found, what is flagged for nothing, and what is missed.

`python benchmarks/detection/run.py` measures every case that has no row yet (`--models llama-0,bert-1` some of them;
two processes at a time with `--jobs 2`), then scores all rows there are into `results.json`, `points.csv`,
docs/detection.md and its picture. It can be
interrupted at any time and goes on where it was. `--score` only scores. What other tools say of the same edits is
scored beside ours where `make benchmark-detection-peers` has been run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "support"))  # the weight edits that the tests use, too

from detection_models import ARCHITECTURES, Recipe  # noqa: E402
from measure import current_rows, measure_all, rows_of  # noqa: E402
from peers import peers_path  # noqa: E402
from plot import picture  # noqa: E402
from score import points, save, score, write_points  # noqa: E402
from score_peers import by_peers  # noqa: E402
from tables import markdown  # noqa: E402

SEEDS = (0, 1)
BEGIN, END = "<!-- written by benchmarks/detection/run.py: begin -->", "<!-- end -->"
DOCS = HERE.parents[1] / "docs"


def recipes(wanted: str) -> list[Recipe]:
    """The models that are asked for, all by default."""
    every = {recipe.name: recipe for seed in SEEDS for recipe in (Recipe(name, seed) for name in ARCHITECTURES)}
    names = wanted.split(",") if wanted else list(every)
    if unknown := [name for name in names if name not in every]:
        raise SystemExit(f"unknown models {', '.join(unknown)}: there are {', '.join(every)}")
    return [every[name] for name in names]


def measure_in_processes(chosen: list[Recipe], jobs: int) -> None:
    """One process a model, at most `jobs` at a time."""
    waiting, running = list(chosen), []
    while waiting or running:
        while waiting and len(running) < jobs:
            recipe = waiting.pop(0)
            running.append(subprocess.Popen([sys.executable, __file__, "--models", recipe.name, "--only-measure"]))
        running[0].wait()
        if running[0].returncode:
            raise SystemExit(
                f"one of the models failed with exit status {running[0].returncode}; the rows made are kept"
            )
        running.pop(0)


def write_page(path: Path, tables: str) -> None:
    """The tables between the two marks of the page."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{tables.strip()}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    """Measure what is missing, and score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="names such as llama-0, separated by commas")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--score", action="store_true", help="only score the rows there are")
    parser.add_argument("--only-measure", action="store_true")
    given = parser.parse_args()
    chosen = recipes(given.models)
    if not given.score:
        if given.jobs > 1 and len(chosen) > 1:
            measure_in_processes(chosen, given.jobs)
        else:
            for recipe in chosen:
                measure_all(recipe)
    if given.only_measure:
        return
    rows = [row for recipe in chosen for row in current_rows(recipe)]
    if not rows:
        raise SystemExit("there are no rows to score: run without --score first")
    peers = [row for recipe in chosen for row in rows_of(peers_path(recipe))]
    results = score(rows) | {"peers": by_peers(rows, peers)}
    save(results, HERE / "results.json")
    write_points(points(rows), HERE / "points.csv")
    (DOCS / "images" / "detection.png").write_bytes(picture(points(rows), results["tau"]))
    write_page(DOCS / "detection.md", markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
