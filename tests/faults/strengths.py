"""Every fault at a harmful and at a mild strength, in two processes: what the guard must act on, and what it must not.

    python tests/faults/strengths.py [--write]      # make drill-table; minutes

`--write` keeps the table beside this file. Exit code 1 where a row is not as it should be.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from architectures import build
from tests.support.accelerate_loop import fresh_accelerate
from torch import nn
from worlds import run_world

from weightproof import GuardSession
from weightproof.snapshots.tensor_store import same_bits
from weightproof.testing import faults, inject
from weightproof.testing.drill import ACTED, CHECKS, HARMFUL, Procedure, Row, table
from weightproof_callbacks.fault_drill import Drill, learnable_windows

RESULT = Path(__file__).with_suffix(".txt")
PROCEDURE = Procedure()
SIZE = 2
# Found exactly, whatever the loss, and by what.
WITNESS = {
    "desynchronised": ("differing_replicas",),
    "loader-skew": ("digest of the batches",),
    "wrong-rng": ("digest of the generators",),
    "stuck-rank": ("rank 1",),
}
# Missed, and said so in docs/faults.md: a number that vanishes among many.
MISSED: tuple[tuple[str, str], ...] = (("weight-bit-flip", "bit=2"),)
# Needs a loop with masters, below.
ELSEWHERE = ("stale-masters",)
# Longer than the guard waits (`Procedure.patience`).
ASLEEP = 25.0


def trained_model() -> tuple[nn.Module, torch.Tensor]:
    """A tiny Llama that has learned the windows' law, the same on every process, and windows it has not seen."""
    torch.manual_seed(0)
    needed = PROCEDURE.batches * PROCEDURE.batch_size * SIZE + 32
    windows = learnable_windows(64, needed + 2000, PROCEDURE.window, 0)
    model = build("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for batch in windows[needed:].split(8):
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), windows[:needed]


def chosen() -> list[tuple[faults.Fault, bool]]:
    """Each fault, and whether it is the mild form."""
    found: list[tuple[faults.Fault, bool]] = []
    for name in faults.REGISTRY:
        if name in ELSEWHERE or name == "stuck-rank":
            continue
        fault = faults.make_fault(name, at=PROCEDURE.fault_at)
        found.append((fault, False))
        if fault.weaker is not None:
            found.append((fault.mild(), True))
    at = PROCEDURE.fault_at
    found.append((faults.Overflow(at=at, where="loss scale", factor=65536.0, steps=3), False))
    found.append((faults.OptimizerBitFlip(at=at, state="exp_avg_sq"), False))
    found.append((faults.WeightBitFlip(at=at, bit=2), False))
    # Last: a process that stops waiting leaves the other one asleep. At a check, where the guard waits, not torch.
    stuck = faults.StuckRank(at=PROCEDURE.check_at, seconds=ASLEEP)
    found += [(stuck.mild(), True), (stuck, False)]
    return found


def all_rows(rank: int, size: int) -> list[tuple[Row, bool]]:
    logging.disable(logging.WARNING)
    fresh_accelerate()
    drill = Drill(Accelerator(cpu=True), *trained_model(), PROCEDURE)
    rows = [(drill.clean_row(), True)]
    for fault, mild in chosen():
        rows.append((drill.row(fault), mild))
        if rank == 0:
            sys.stderr.write(f"{fault.name} {fault.strength}: {rows[-1][0].action}\n")
    return rows


# ---- masters --------------------------------------------------------------------------------------------------------


class Masters:
    """fp32 copies that the optimizer trains, from which every step rewrites a model in bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = dict(model.named_parameters())
        self.copies = {name: nn.Parameter(weight.detach().float()) for name, weight in self.weights.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.copies)

    def refresh(self, names: Any) -> None:
        for name in names:
            self.copies[name].data.copy_(self.weights[name].data.float())

    def stale(self) -> list[str]:
        return [
            name for name, copy in self.copies.items() if not same_bits(copy.data.bfloat16(), self.weights[name].data)
        ]

    def pull(self, *_: Any) -> None:
        for name, weight in self.weights.items():
            self.copies[name].grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None

    def push(self, *_: Any) -> None:
        for name, weight in self.weights.items():
            weight.data.copy_(self.copies[name].data.bfloat16())


def stale_masters() -> tuple[str, str, bool]:
    """(what found it, action, weights and masters are those of the last good state) of a loop with masters."""
    model, windows = trained_model()
    model = model.bfloat16().train()
    masters = Masters(model)
    masters.push()
    optimizer = torch.optim.AdamW(masters.copies.values(), lr=1e-4)
    optimizer.register_step_pre_hook(masters.pull)
    optimizer.register_step_post_hook(masters.push)
    session = GuardSession(model, masters=masters)
    session.watch()
    held: dict[str, torch.Tensor] = {}
    with inject([faults.StaleMasters(at=10)], model, optimizer, masters=masters.copies):
        for number, batch in enumerate(windows[:80].split(8), start=1):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            if number % 5 == 0:
                step = session.check_window(step=number)
                if number == 5:
                    assert step.applied == "kept", step.decision.reason
                    held = {name: weight.detach().clone() for name, weight in masters.weights.items()}
    failed = [one for verdict in step.verdicts for one in verdict.measurements if one.statistic == "stale_master"]
    same = all(same_bits(weight.data, held[name]) for name, weight in masters.weights.items()) and not masters.stale()
    return f"invariants stale_master ({failed[0].target})" if failed else "", str(step.applied), same


# ---- the judgement --------------------------------------------------------------------------------------------------


def wrong(row: Row, *, mild: bool) -> str | None:
    """What of a row is not as it must be."""
    acted = row.action in ACTED
    if mild:
        clean = row.fault == "none"
        faults_of_it = {
            "a mild strength was acted on": acted,
            "the record of a clean run notes something": clean and row.told,
            "the record of the run cannot be told from the clean twin's": not clean and not row.told,
            "it ends worse than the twin": not row.expected,
            "it is not mild": not row.harm <= HARMFUL,
        }
        return next((words for words, holds in faults_of_it.items() if holds), None)
    said = WITNESS.get(row.fault)
    if said is not None and not (acted and any(words in row.by for words in said)):
        return f"not found by {' or '.join(said)}, but by {row.by or 'nothing'}"
    if (row.fault, row.strength) in MISSED:
        return None if not acted else "it is found by now: take it off the list of what is missed"
    if not row.expected:
        return "a harmful strength was not acted on in time, or the run is not as the twin"
    if row.harmful or row.fault in WITNESS or "bit=1" in row.strength:
        late = row.detected is None or row.detected > row.at + CHECKS * PROCEDURE.every
        return None if acted and not late else "not acted on within two checks"
    return None


def main() -> int:
    """Print the table; 1 where a row is wrong."""
    results = run_world(all_rows, SIZE, timeout=3000.0)
    lines, failures = [], []
    for number, (row, mild) in enumerate(results[0]):
        decided = {rows[number][0].decided for rows in results}
        actions = {rows[number][0].action for rows in results}
        reason = wrong(row, mild=mild) if len(decided) == len(actions) == 1 else f"the ranks decided {actions}"
        known = "MISSED, known" if (row.fault, row.strength) in MISSED else "ok"
        lines.append((*table([row])[1][:-1], "mild" if mild else "strong", reason or known))
        failures += [f"{row.fault} {row.strength}: {reason}"] if reason else []
    by, applied, same = stale_masters()
    good = bool(by) and applied == "restored" and same
    state = "weights and masters as in the last good state" if same else "differs from the last good state"
    action = "rolled back" if applied == "restored" else applied
    told = "ok" if good else "wrong"
    lines.append(("stale-masters", "factor=1.01", "-", "10", "10", by, "-", "-", action, state, "-", "strong", told))
    failures += [] if good else ["stale-masters"]
    heads = (*table([])[0][:-1], "is", "")
    widths = [max(len(line[i]) for line in (heads, *lines)) for i in range(len(heads))]
    text = "\n".join(
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (heads, *lines)
    )
    text += (
        f"\n\n{SIZE} processes (gloo, CPU), checks every {PROCEDURE.every} steps. harm: loss {PROCEDURE.after} steps "
        f"after the fault without a guard, above the clean twin's, nats; harmful above {HARMFUL}. loss: the same under "
        "guard. noted: what the record of the run reports within two checks, and the clean twin's value in the same "
        "window; nothing is acted on for it.\n"
    )
    sys.stdout.write(text)
    if "--write" in sys.argv:
        RESULT.write_text(text, encoding="utf-8")
    for failure in failures:
        sys.stderr.write(f"not as it must be: {failure}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
