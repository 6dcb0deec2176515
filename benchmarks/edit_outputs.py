"""What rounding, GPTQ and truncation do to the outputs of the two small trained models: numbers of docs/edits.md.

    PYTHONPATH=tests/support python benchmarks/edit_outputs.py --write

Every matrix of attention and MLP, one scale a row; KL to the unedited model, nats per token, on windows of the models'
task that GPTQ did not see, and on random tokens: what the guard `divergence` reads in a session. A minute.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from trained_models import RECIPES, calibration_windows, load, make_windows

from weightproof import GuardSession, edits

RESULT = Path(__file__).with_name("edit_outputs.json")
PAGE = Path(__file__).parents[1] / "docs" / "edits.md"
BEGIN, END = "<!-- outputs: begin -->\n", "\n<!-- outputs: end -->"
MODELS = {"llama": "Llama", "gpt2": "GPT-2"}
WINDOWS = {"calibration windows": "task windows", "random windows": "random tokens"}


def read(name: str) -> dict[str, dict[str, float]]:
    """Edit -> windows -> KL, of one model."""
    session = GuardSession(load(name).model, retain=calibration_windows(name))
    data = make_windows(RECIPES[name], 2, seed=50_000)
    tried: dict[str, Any] = {}
    for bits in (4, 3):
        tried[f"RTN, {bits} bits"] = edits.RTN(bits)
        tried[f"GPTQ, {bits} bits"] = edits.GPTQ(bits, data=data)
    tried |= {"SVD, 99 % of the energy": edits.SVD(energy=0.99), "SVD, rank 8 of 64": edits.SVD(rank=8)}
    rows = {}
    for words, edit in tried.items():
        verdict = next(one for one in session.trial(edit).verdicts if one.guard == "divergence")
        kls = {one.target: one.value for one in verdict.measurements if one.statistic == "kl"}
        rows[words] = {WINDOWS[target]: float(f"{value:.2g}") for target, value in kls.items() if value is not None}
    session.close()
    return rows


def table(result: dict[str, Any]) -> str:
    """A row an edit, a column a model and its windows."""
    columns = [(name, windows) for name in MODELS for windows in WINDOWS.values()]
    titles = " | ".join(f"{MODELS[name]}, {windows}" for name, windows in columns)
    lines = [f"| | {titles} |", f"| --- |{' --- |' * len(columns)}"]
    for edit in result["models"]["llama"]:
        cells = [f"{result['models'][name][edit][windows]:g}".removeprefix("0") for name, windows in columns]
        lines.append(f"| {edit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(page: str, result: dict[str, Any]) -> str:
    """The page with the table put between its two marks."""
    head, _, rest = page.partition(BEGIN)
    return head + BEGIN + table(result) + END + rest.partition(END)[2]


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write edit_outputs.json and the table of docs/edits.md")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    result = {"torch": torch.__version__, "models": {name: read(name) for name in MODELS}}
    print(table(result))
    if write:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
