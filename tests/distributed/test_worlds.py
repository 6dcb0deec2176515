"""The test worlds themselves: what a rank raises is shown, and nothing hangs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import worlds
from worlds import WorldError, run_world


@dataclass(frozen=True)
class Note:
    """Travels to the ranks and back although this module cannot be imported by name."""

    text: str


def greet(rank: int, size: int, note: Note) -> tuple[Note, torch.Tensor]:
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    assert size == dist.get_world_size()
    return Note(f"{note.text} from {rank}"), total


def test_every_rank_returns_its_result():
    results = run_world(greet, 3, Note("hello"))
    assert [note for note, _ in results] == [Note(f"hello from {rank}") for rank in range(3)]
    assert all(total.item() == 3 for _, total in results)


def stumble(rank: int, size: int) -> None:
    if rank == 1:
        raise ValueError("rank one stumbled")
    dist.barrier()


def test_a_traceback_of_a_rank_is_shown_and_the_waiting_rank_is_ended():
    started = time.monotonic()
    with pytest.raises(WorldError, match=r"(?s)rank 1 raised.*in stumble.*rank one stumbled.*rank 0 was still running"):
        run_world(stumble, 2)
    assert time.monotonic() - started < 30


def wait_in_vain(rank: int, size: int) -> None:
    if rank == 0:
        time.sleep(100)


def test_a_world_ends_at_its_limit_and_says_where_it_was():
    with pytest.raises(WorldError, match=r"(?s)did not end within 2 s.*rank 0 was still running.*in wait_in_vain"):
        run_world(wait_in_vain, 2, timeout=2)


def die(rank: int, size: int) -> int:
    if rank == 1:
        os._exit(7)
    return rank


def test_a_death_is_an_error_unless_it_was_expected():
    assert run_world(die, 2, expect_dead={1}) == [0, None]
    with pytest.raises(WorldError, match="rank 1 ended with exit code 7"):
        run_world(die, 2)
    with pytest.raises(WorldError, match=re.escape("rank 0 was to die, but: result 0")):
        run_world(die, 2, expect_dead={0, 1})


SCRIPT = """
import sys
sys.path.insert(0, {support!r})
from worlds import run_world
from weightproof.collective import Processes

def body(rank, size):
    processes = Processes.join(20.0)
    return processes.gather("ranks", rank), Processes.join(20.0).size

if __name__ == "__main__":
    print(run_world(body, 2))
"""


def test_a_world_leaves_nothing_behind_on_stderr(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(support=str(Path(worlds.__file__).parent)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("[([0, 1], 2), ([0, 1], 2)]\n", "", 0)
