"""Thousands of crashes while snapshots are saved, and of bits that flip in files at rest: `make test-faults`.

Prints a table; with --write, into `last_run.txt`. Fails unless every case is as it must be. The small versions that run
in `make test` are in tests/unit/test_snapshot_store.py, the cases themselves in tests/support/crash_cases.py.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import crash_cases as cases
import torch
from fault_disks import copy_of, snapshot_is_damaged

from weightproof.snapshots.store_lock import LOCK_FILE

LAST_RUN = Path(__file__).with_name("last_run.txt")


def rows(place: Path, many: int, seed: int) -> list[tuple[str, str, Callable[[], cases.Counts]]]:
    """What is done, what must be found after it, and the function that does it `many` times or so."""
    numbers = random.Random(seed)
    base, work = cases.base_folder(place / "base"), place / "work"
    still = copy_of(base, place / "still")
    files = [path for path in sorted(still.rglob("*")) if path.is_file() and path.name != LOCK_FILE]
    manifests = [path for path in files if path.suffix == ".json"]
    guard = cases.guard_state_folder(place / "guard")
    old_or_new = "the old or the new, exact"

    def snapshot_flips(chosen: list[Path]) -> cases.Counts:
        return cases.flips(chosen, lambda: snapshot_is_damaged(still), many, numbers)

    def guard_flips(pattern: str) -> cases.Counts:
        chosen = sorted(guard.glob(pattern))
        return cases.flips(chosen, lambda: cases.guard_state_is_damaged(guard), many, numbers)

    return [
        (
            "SIGKILL at a random time, real fsync, run after run in one folder",
            "the last whose save returned, or the next",
            lambda: cases.killed_at_random(place / "run", many, numbers),
        ),
        (
            "SIGKILL at every write, rename, fsync and unlink of a save",
            old_or_new,
            lambda: cases.killed_at_every_call_by_signal(base, work),
        ),
        (
            "killed at every call of a save, then at every call of the next start",
            old_or_new,
            lambda: cases.killed_twice(base, work, 1.0, numbers),
        ),
        (
            "power lost before every call of a save and after it; unsynced changes lost in any mixture",
            f"{old_or_new}; the new once save returned",
            lambda: cases.power_lost(base, work, max(1, many // 25), numbers),
        ),
        (
            "the same in the first save, on an empty disk",
            "none or the new; the new once save returned",
            lambda: cases.power_lost_at_first_save(place / "first", max(1, many // 50), numbers),
        ),
        ("a bit flipped anywhere in a snapshot folder", "found", lambda: snapshot_flips(files)),
        ("a bit flipped in a manifest", "found", lambda: snapshot_flips(manifests)),
        ("a bit flipped in a baseline", "found", lambda: guard_flips("*.safetensors")),
        ("a bit flipped in the guard's state", "found", lambda: guard_flips("guard_state.json")),
        (
            "a bit flipped in a policy file",
            "refused, or another digest, or the same policy in other characters",
            lambda: cases.policy_flips(place / "policy", many, numbers),
        ),
    ]


def main() -> int:
    """Run all rows; 1 if one of them has a case that is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--many", type=int, default=1000, help="cases of each random row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help=f"write the table to {LAST_RUN.name}")
    options = parser.parse_args()
    logging.getLogger("weightproof").setLevel(logging.CRITICAL)  # thousands of warnings about what was done to it
    torch.set_num_threads(1)
    lines = [
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}, {os.cpu_count()} cores"
    ]
    lines += [f"seed {options.seed}", "", f"{'cases':>6} {'good':>6} {'s':>5}  what was done -> what was found"]
    print("\n".join(lines), flush=True)
    failed = False
    with tempfile.TemporaryDirectory(prefix="snapshot-faults-") as place:
        for what, wanted, run in rows(Path(place), options.many, options.seed):
            start = time.monotonic()
            total, good = run()
            failed |= good != total or total == 0
            lines.append(f"{total:>6} {good:>6} {time.monotonic() - start:>5.0f}  {what} -> {wanted}")
            print(lines[-1], flush=True)
    lines.append("FAILED" if failed else "every case as it must be")
    print(lines[-1])
    if options.write:
        LAST_RUN.write_text("\n".join(lines) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
