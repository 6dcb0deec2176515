"""Bursts of bad batches: what they do to a run without a guard, and what the guard makes of them.

    PYTHONPATH=tests/support:. python tests/faults/bursts.py [MODEL_FOLDER TEXT...] [--write]      # minutes

Without a folder the Llama and the GPT-2 of the tests, on generated windows. `--write` adds the rows to the table beside
this file. Exit code 1 where more than `HARMFUL` nats are let pass, or a single bad batch is acted on.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tests.support import trained_models

from weightproof.folders.loading import load_model, resolve_folder
from weightproof.testing.drill import ACTED, HARMFUL, Procedure
from weightproof.testing.faults import BadBatch
from weightproof_callbacks.fault_drill import Drill, learnable_windows, text_windows

RESULT = Path(__file__).with_suffix(".txt")
PROCEDURE = Procedure(learning_rate=5e-4)
LENGTHS = (1, 2, 3, 5, 9, 14)
SHARES = (1.0, 0.3)


def windows_of(vocabulary: int) -> torch.Tensor:
    """Windows with something to learn."""
    return learnable_windows(vocabulary, (PROCEDURE.batches + 4) * PROCEDURE.batch_size, PROCEDURE.window, 0)


def text_of(loaded: Any, paths: list[str]) -> torch.Tensor:
    """Windows of files, shuffled."""
    ids: list[int] = []
    for path in paths:
        found = loaded.encode(Path(path).read_text(encoding="utf-8", errors="replace"))
        ids += [int(one) for one in (found["input_ids"] if isinstance(found, dict) else found)]
    whole = text_windows(ids, len(ids), PROCEDURE.window)
    return whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))]


def rows_of(name: str, model: torch.nn.Module, windows: torch.Tensor) -> tuple[list[str], bool]:
    """A line for every burst, and whether all are as they should be."""
    drill = Drill(Accelerator(cpu=True), model, windows, PROCEDURE)
    lines, good = [], drill.clean_row().action == "nothing"
    for share in SHARES:
        for steps in LENGTHS:
            row = drill.row(BadBatch(at=PROCEDURE.fault_at, share=share, steps=steps))
            fine = row.expected and row.told and not (steps == 1 and row.action in ACTED)
            good = good and fine
            where = "-" if row.loss is None else f"{row.loss:+.3f}"
            found = (row.action, str(row.detected or "-"), where, "ok" if fine else "WRONG")
            lines.append(f"{name:<14} | {share:<5g} | {steps:>5} | {row.harm:+.3f} | " + " | ".join(found))
            sys.stderr.write(f"{lines[-1]}\n")
    return lines, good


def main() -> int:
    """Print the rows; 1 where one is wrong."""
    logging.disable(logging.WARNING)
    asked = [one for one in sys.argv[1:] if not one.startswith("--")]
    lines, good = [], True
    if asked:
        loaded = load_model(resolve_folder(asked[0]))
        name = f"{Path(asked[0]).parent.name}/{Path(asked[0]).name}"
        lines, good = rows_of(name[-14:], loaded.model, text_of(loaded, asked[1:]))
    else:
        for name in ("llama", "gpt2"):
            model = trained_models.load(name).model
            more, fine = rows_of(name, model, windows_of(model.config.vocab_size))
            lines, good = lines + more, good and fine
    if "--write" in sys.argv:
        head = (
            f"Random tokens in so many batches in a row. harm: loss {PROCEDURE.after} steps after the first, without a "
            f"guard, above the clean twin's, nats; harmful above {HARMFUL}. loss: the same under guard, checks every "
            f"{PROCEDURE.every} steps, batches replayed.\n\n"
            "model          | share | steps |  harm  | action | found | loss\n"
        )
        held = RESULT.read_text(encoding="utf-8") if asked and RESULT.exists() else head
        RESULT.write_text(held + "\n".join(lines) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
