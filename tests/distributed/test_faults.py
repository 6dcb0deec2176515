"""Whatever goes wrong on one process of a guarded run, all of them end alike: the tables of `fault_tables`.

The weights of every process that lives are afterwards what they were before, bit for bit, or the change was kept
everywhere. `pytest -s` prints the tables with what was seen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import fault_tables
import pytest
import torch.distributed as dist
from fault_scenes import HEADER, Fault, Outcome, Scene, live_through, mistakes, printed
from fault_tables import DIES, SHORT, SLEEPS
from sharding import shard
from torch import nn
from torch.distributed.tensor import DTensor
from worlds import run_world

from weightproof import edits
from weightproof.errors import CollectiveError

# Far more than anything takes here, even on a busy machine: most faults end without any wait.
PATIENT = 60.0

# Faults after which the processes go on together: all of a table happen in one world.
TABLES = {
    "in the edit": fault_tables.IN_THE_EDIT,
    "around the edit": fault_tables.AROUND_THE_EDIT,
    "declared differently": fault_tables.DECLARED_DIFFERENTLY,
    "in a window of training": fault_tables.IN_A_WINDOW,
    "at the start": fault_tables.AT_THE_START,
    "of a sharded model": fault_tables.OF_A_SHARDED_MODEL,
}


def scene_of(rank: int, size: int, folder: Path, limit: float, *, sharded: bool) -> Scene:
    scene = Scene(rank, size, folder / "evidence", limit)
    if sharded:
        shard(scene.model)
    assert dist.get_world_size() == size
    kind = DTensor if sharded else nn.Parameter
    assert all(type(parameter) is kind for parameter in scene.model.parameters())
    return scene


def live(rank: int, size: int, table: str, folder: Path) -> list[Outcome]:
    sharded = table == "of a sharded model"
    scene = scene_of(rank, size, folder, PATIENT, sharded=sharded)
    writes = table in ("around the edit", "of a sharded model")
    if table != "at the start":
        scene.begin(**({"output_dir": scene.folder, "trackers": ["jsonl", fault_tables.TRACKER]} if writes else {}))
    found = []
    for fault in TABLES[table]:
        for scene.victim in fault.victims:
            found.append(live_through(scene, fault, still=lambda: goes_on(scene)))
            assert all(isinstance(parameter, DTensor) == sharded for parameter in scene.model.parameters())
    return found


def goes_on(scene: Scene) -> str:
    if scene.session is not None:
        assert scene.guard.processes.gather("still in step", scene.rank) == list(range(scene.size))
    return ""


def stop(
    rank: int, size: int, table: str, numbers: list[int], victim: int, folder: Path, sharded: bool
) -> list[Outcome]:
    """Faults after which the processes can do nothing together: a session for each."""
    scene = scene_of(rank, size, folder, SHORT, sharded=sharded)
    scene.victim = victim
    scene.begin(timeout=PATIENT).close()  # what is slow the first time is over
    found = []
    for fault in (getattr(fault_tables, table)[number] for number in numbers):
        dist.barrier()  # who slept in the last one is here again
        scene.session = None
        if fault.stops:
            scene.begin()
        found.append(live_through(scene, fault, still=lambda: stopped(scene)))
    return found


def stopped(scene: Scene) -> str:
    """Every further call ends at once, with the error that ended the run."""
    if scene.session is None:
        return ""
    started, said = time.monotonic(), set()
    for call in (scene.edit, scene.guard.watch, lambda: scene.guard.apply(edits.RTN(8))):
        with pytest.raises(CollectiveError) as caught:
            call()
        said.add(str(caught.value))
    assert time.monotonic() - started < SHORT / 2
    assert said == {str(scene.guard.processes.lost)}
    scene.guard.close()
    return said.pop()


def check(rows: Sequence[tuple[Fault, int]], ranks: Sequence[Sequence[Outcome | None]], limit: float) -> None:
    print(f"\n{HEADER}")
    wrong: list[str] = []
    for (fault, victim), outcomes in zip(rows, zip(*ranks, strict=True), strict=True):
        print(printed(fault, victim, outcomes))
        wrong += mistakes(fault, victim, outcomes, limit)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("table", TABLES)
def test_a_fault_on_one_process_ends_alike_on_both(table: str, tmp_path: Path):
    rows = [(fault, victim) for fault in TABLES[table] for victim in fault.victims]
    check(rows, run_world(live, 2, table, tmp_path, timeout=200), PATIENT / 2)


# Who sleeps wakes up again: several of these faults in one world.
@pytest.mark.parametrize(("victim", "sharded"), [(0, False), (1, False), (1, True)])
def test_a_process_that_sleeps_past_the_limit_stops_all_three(victim: int, sharded: bool, tmp_path: Path):
    numbers = [number for number, fault in enumerate(SLEEPS) if victim in fault.victims][: 1 if sharded else None]
    ranks = run_world(stop, 3, "SLEEPS", numbers, victim, tmp_path, sharded, timeout=200)
    check([(SLEEPS[number], victim) for number in numbers], ranks, 2 * SHORT + 2.0)


@pytest.mark.parametrize(
    ("number", "victim", "sharded"),
    [(number, victim, False) for number, fault in enumerate(DIES) for victim in fault.victims]
    + [(0, 0, True), (3, 1, True)],
)
def test_a_process_that_dies_stops_the_others(number: int, victim: int, sharded: bool, tmp_path: Path):
    ranks = run_world(stop, 3, "DIES", [number], victim, tmp_path, sharded, timeout=60, expect_dead={victim})
    check([(DIES[number], victim)], [outcomes or [None] for outcomes in ranks], 2 * SHORT + 2.0)
