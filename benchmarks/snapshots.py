"""What a snapshot on disk costs, in units of copying the same bytes in memory: `benchmarks/snapshots.py --write`.

128 MiB of float32 in 32 tensors, one torch thread. Each row is the fastest of five, all rows in one run, interleaved.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from weightproof.folders.files import FileSystem
from weightproof.snapshots.store import SnapshotFolder
from weightproof.snapshots.tensor_store import tensor_digests

RESULT = Path(__file__).with_name("snapshots.json")
REPEATS = 5


class NoSync(FileSystem):
    """Leaves the bytes in the page cache: what is left is our own work."""

    def sync(self, handle: int) -> None:
        """Nothing."""

    def sync_folder(self, folder: Path) -> None:
        """Nothing."""


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def round_of(place: Path, tensors: dict[str, torch.Tensor], number: int) -> dict[str, float]:
    """Every row once; `number` makes the tensors new."""
    for tensor in tensors.values():
        tensor.add_(number + 1)
    found = {"memcpy": copying(tensors)}
    found["digests"] = seconds(lambda: tensor_digests(tensors))
    raw = place / "raw"
    found["write and fsync"] = seconds(lambda: write_plainly(raw, tensors))
    raw.unlink()
    for row, files in (("save", FileSystem()), ("save, no fsync", NoSync())):
        with SnapshotFolder(place / "run", keep=1, files=files) as folder:
            found[row] = seconds(lambda folder=folder: folder.save(1, tensors))
            if row == "save":
                found["load"] = seconds(folder.latest)
                found["save again, nothing changed"] = seconds(lambda folder=folder: folder.save(2, tensors))
                tensors["0"].add_(1)
                found["save again, 1 of 32 changed"] = seconds(lambda folder=folder: folder.save(3, tensors))
        shutil.rmtree(place / "run")
    return found


def copying(tensors: dict[str, torch.Tensor]) -> float:
    """Seconds to copy all of them into memory that was touched before."""
    copies = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    return seconds(lambda: [copies[name].copy_(tensor) for name, tensor in tensors.items()])


def write_plainly(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The same bytes into one file, with nothing proven."""
    files = FileSystem()
    handle = files.create(path)
    for tensor in tensors.values():
        left = memoryview(tensor.numpy()).cast("B")
        while len(left):
            left = left[files.write(handle, left) :]
    files.sync(handle)
    files.close(handle)


def main() -> None:
    """Measure, print a table, and write it with --write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tensors = {str(number): torch.randn(1024, 1024) for number in range(32)}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with tempfile.TemporaryDirectory(prefix="snapshots-") as place:
        rounds = [round_of(Path(place), tensors, number) for number in range(REPEATS)]
    fastest = {row: min(found[row] for found in rounds) for row in rounds[0]}
    result = {
        row: {
            "seconds": round(time_, 4),
            "GB/s": round(nbytes / time_ / 1e9, 2),
            "memcpys": round(time_ / fastest["memcpy"], 1),
        }
        for row, time_ in fastest.items()
    }
    for row, numbers in result.items():
        print(f"{row:<30}" + "".join(f"{name} {value:<10}" for name, value in numbers.items()))
    if options.write:
        RESULT.write_text(json.dumps({"bytes": nbytes, "torch": torch.__version__, "rows": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
