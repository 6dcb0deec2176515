"""Fit the limits of the shipped tiers: random edits of three models, the same code as `weightproof calibrate`.

`python benchmarks/detection/calibrate_tiers.py` draws edits of the models of seed 0 in turn (Llama, GPT-2, BERT), goes
on where it was interrupted, fits every tier and writes `calibration.json`; `--fit` fits the draws of that file again.
Seed 1 of each architecture is held out: the detection benchmark judges the tiers on it. Windows come from files of the
standard library that neither the training of the models nor the benchmark uses.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "support"))

from detection_models import (  # noqa: E402
    ARCHITECTURES,
    CACHE,
    CORPUS_BYTES,
    HELDOUT_SHARE,
    NOT_TEXT,
    Recipe,
    as_inputs,
    load,
    windows_of,
)
from tqdm import tqdm  # noqa: E402

from weightproof.calibration.conformal import share_supported  # noqa: E402
from weightproof.calibration.drawing import WORDS, draw  # noqa: E402
from weightproof.calibration.draws import Draw, Truth  # noqa: E402
from weightproof.calibration.fitting import LEVEL, Fit, fit, role_of  # noqa: E402
from weightproof.calibration.journal import Journal  # noqa: E402
from weightproof.calibration.measuring import Bench  # noqa: E402
from weightproof.folders.files import write_atomically  # noqa: E402
from weightproof.policy import TIERS, load_policy  # noqa: E402
from weightproof_callbacks.commands.corpus import read_corpus, standard_library  # noqa: E402

# Of each model its own: the same edits on all of them would be fewer independent draws.
SEEDS = {"llama": 11, "gpt2": 12, "bert": 13}
DRAWS, FALSE_ALARMS = 272, 0.05
RESULT = HERE / "calibration.json"
# A window is cut to the position table less what special tokens may take; of BERT a seventh of the tokens is scored.
LENGTH, WINDOWS = 62, {"llama": 512, "gpt2": 512, "bert": 960}
EVERY_FILE = 60_000_000


def unused_windows(architecture: str) -> list[dict[str, Any]]:
    """Windows of files that no model was trained or judged on; a file is a document."""
    used = read_corpus(standard_library(), NOT_TEXT, CORPUS_BYTES, HELDOUT_SHARE)
    every = read_corpus(standard_library(), NOT_TEXT, EVERY_FILE, HELDOUT_SHARE)
    known = used.train.keys() | used.heldout.keys()
    texts = dict(sorted((name, text) for part in (every.train, every.heldout) for name, text in part.items()))
    ids, files = windows_of(
        {name: text for name, text in texts.items() if name not in known}, WINDOWS[architecture], 71
    )
    return [
        {**as_inputs(architecture, row[None, :LENGTH], 9_000 + index), "document": str(file)}
        for index, (row, file) in enumerate(zip(ids, files, strict=True))
    ]


def benches() -> dict[str, Bench]:
    """The three models of seed 0, each read once."""
    policy = load_policy("balanced").override(limits={"loss": {"max_windows": 4096}})
    return {name: Bench(load(Recipe(name, 0)).model, policy, unused_windows(name)) for name in ARCHITECTURES}


def draw_all(number: int) -> Journal:
    """So many draws of each model, in turn; those made are kept."""
    models = benches()
    header = {"calibration": "shipped tiers", "seeds": SEEDS}
    header |= {"models": {name: [one.digest, one.data_digest] for name, one in models.items()}}
    journal = Journal(CACHE / "calibration.jsonl", header)
    done = {(one.model, one.number) for one in journal.draws}
    for index in tqdm(range(number), desc="draws of each model", mininterval=10.0):
        for name, bench in models.items():
            if (name, index) not in done:
                journal.add(replace(bench.measure(draw(SEEDS[name], index, bench.choices)), model=name))
    return journal


def packed(draws: Sequence[Draw]) -> dict[str, Any]:
    """Draws as a table: short enough to be kept with the code. Numbers to three digits."""
    names = sorted({name for one in draws for name in one.statistics})
    rows = []
    for one in draws:
        assert one.truth is not None
        truth = [_short(value) for value in (one.truth.delta, one.truth.lower, one.truth.upper)]
        values = [_short(one.statistics[name]) if name in one.statistics else None for name in names]
        rows.append([one.model, one.number, one.edit, int(one.preserving), *truth, *values])
    return {"columns": ["model", "number", "edit", "preserving", "delta", "lower", "upper", *names], "rows": rows}


def unpacked(table: dict[str, Any]) -> list[Draw]:
    """The draws of a table."""
    names, found = table["columns"][7:], []
    for model, number, edit, preserving, delta, lower, upper, *values in table["rows"]:
        statistics = {name: float(value) for name, value in zip(names, values, strict=True) if value is not None}
        truth = Truth(float(delta), float(lower), float(upper))
        found.append(Draw(number, edit, bool(preserving), truth, statistics, model))
    return found


def _short(value: float) -> float | str:
    return float(f"{value:.3g}") if math.isfinite(value) else "Infinity"


def fitted(draws: Sequence[Draw], false_alarms: float) -> dict[str, Fit]:
    """Every tier, at the level that is asked for, or the lowest that its benign draws support."""
    found = {}
    for tier in TIERS:
        policy = load_policy(tier)
        tau = policy.limits["loss"]["tau"]
        level = [one for one in draws if role_of(one.number) == LEVEL and one.label(tau) == "benign"]
        least = math.ceil(share_supported(len(level)) * 1000) / 1000
        found[tier] = fit(draws, policy, false_alarms=max(false_alarms, least))
    return found


def show(fits: dict[str, Fit]) -> None:
    """Limits as they are put into the tiers, and how the draws that fixed none judge them."""
    for tier, one in fits.items():
        present = load_policy(tier).limits
        print(f"{tier}: {dict(one.counts)}; {one.in_words}; groups {one.groups}")
        for guard, keys in one.limits.items():
            for key, value in keys.items():
                print(f"  {guard}.{key}: {present[guard][key]} -> {value}")
        for judged in one.judged:
            print(
                f"  {judged.guard}: {judged.flagged} of {judged.benign} benign flagged, "
                f"{judged.found} of {judged.harmful} harmful found"
            )


def write(content: dict[str, Any], draws: Sequence[Draw], fits: dict[str, Fit]) -> None:
    """The draws as a table, a draw a line, and what was fitted."""
    table = packed(draws)
    content = content | {"distribution": WORDS, "fits": {tier: asdict(one) for tier, one in fits.items()}}
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in table["rows"])
    told = f'{{"columns": {json.dumps(table["columns"])}, "rows": [\n{rows}\n]}}'
    write_atomically(RESULT, f'{json.dumps(content, indent=1)[:-2]},\n"draws": {told}\n}}\n'.encode())


def main() -> None:
    """Draw what is missing, fit, write; or only fit and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=DRAWS, help="of each model")
    parser.add_argument("--false-alarms", type=float, default=FALSE_ALARMS)
    parser.add_argument("--fit", action="store_true", help="fit the draws of calibration.json and show, write nothing")
    given = parser.parse_args()
    if given.fit:
        show(fitted(unpacked(json.loads(RESULT.read_text(encoding="utf-8"))["draws"]), given.false_alarms))
        return
    journal = draw_all(given.draws)
    header = json.loads(journal.path.read_text(encoding="utf-8").partition("\n")[0])
    draws = unpacked(packed([one for one in journal.draws if one.number < given.draws]))
    fits = fitted(draws, given.false_alarms)
    show(fits)
    write(header, draws, fits)


if __name__ == "__main__":
    main()
