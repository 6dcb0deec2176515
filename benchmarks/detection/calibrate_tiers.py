"""Fit the limits of the shipped tiers: random edits of three models, the same code as `weightproof calibrate`.

`python benchmarks/detection/calibrate_tiers.py` draws edits of the models of seed 0 in turn (Llama, GPT-2, BERT), goes
on where it was interrupted, fits every tier and writes `calibration.json`; `--fit` fits from the draws that file holds.
Seed 1 of each architecture is held out: the detection benchmark judges the tiers on it. Windows come from files of the
standard library that neither the training of the models nor the benchmark uses.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
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

from weightproof.calibration.drawing import draw  # noqa: E402
from weightproof.calibration.journal import Journal  # noqa: E402
from weightproof.calibration.measuring import Bench  # noqa: E402
from weightproof.policy import load_policy  # noqa: E402
from weightproof_callbacks.commands.corpus import read_corpus, standard_library  # noqa: E402

SEED = 1
DRAWS = 340
# A window is cut to the position table less what special tokens may take; of BERT a seventh of the tokens is scored.
LENGTH, WINDOWS = 62, {"llama": 640, "gpt2": 640, "bert": 1280}
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
    header = {"calibration": "shipped tiers", "seed": SEED}
    header |= {"models": {name: [one.digest, one.data_digest] for name, one in models.items()}}
    journal = Journal(CACHE / "calibration.jsonl", header)
    done = {(one.model, one.number) for one in journal.draws}
    for index in tqdm(range(number), desc="draws of each model", mininterval=10.0):
        for name, bench in models.items():
            if (name, index) not in done:
                journal.add(replace(bench.measure(draw(SEED, index, bench.choices)), model=name))
    return journal


def main() -> None:
    """Draw what is missing, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=DRAWS, help="of each model")
    given = parser.parse_args()
    journal = draw_all(given.draws)
    print(json.dumps({"draws": len(journal.draws)}))


if __name__ == "__main__":
    main()
