"""Crashes while snapshots are saved, and bits that flip in files at rest: each function gives (cases, survived)."""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import signal
import struct
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from fault_disks import (
    QUICK,
    DyingDisk,
    ForgetfulDisk,
    Killed,
    WatchedDisk,
    after_restart,
    copy_of,
    flip,
    is_exact,
    save_steps,
)

from weightproof.errors import BaselineError, PolicyError
from weightproof.folders.jsonable import json_digest
from weightproof.policy import Policy, load_policy
from weightproof.probes import State
from weightproof.session import GuardSession
from weightproof.snapshots.store import SnapshotFolder
from weightproof.transactions.guard_state import GuardState

Counts = tuple[int, int]


def base_folder(path: Path) -> Path:
    """A folder with the snapshots of steps 1 and 2; with `keep=2` the next save prunes the first."""
    with SnapshotFolder(path, files=QUICK) as folder:
        save_steps(folder, (1, 2))
    return path


def calls_of_a_save(base: Path, work: Path) -> tuple[int, list[str]]:
    """How many changes opening makes, and the kinds of those that saving step 3 makes then."""
    disk = WatchedDisk()
    with SnapshotFolder(copy_of(base, work), files=disk) as folder:
        opened = len(disk.calls)
        save_steps(folder, (3,))
    return opened, disk.calls[opened:]


def killed_at_every_call(base: Path, work: Path) -> Counts:
    """The process stops at each change of a save in turn (the disk refuses all that its handlers try)."""
    opened, calls = calls_of_a_save(base, work)
    good = 0
    for at in range(opened, opened + len(calls)):
        with contextlib.suppress(Killed), SnapshotFolder(copy_of(base, work), files=DyingDisk(at)) as folder:
            save_steps(folder, (3,))
        good += after_restart(work) in (2, 3)
    return len(calls), good


def killed_at_every_call_by_signal(base: Path, work: Path) -> Counts:
    """The same with forked processes that end by SIGKILL."""
    opened, calls = calls_of_a_save(base, work)
    good = 0
    for at in range(opened, opened + len(calls)):
        copy_of(base, work)

        def save(at: int = at) -> None:
            with SnapshotFolder(work, files=DyingDisk(at, really=True)) as folder:
                save_steps(folder, (3,))

        _, status = os.waitpid(_forked(save), 0)
        good += os.WTERMSIG(status) == signal.SIGKILL and after_restart(work) in (2, 3)
    return len(calls), good


def killed_twice(base: Path, work: Path, share: float, random_numbers: random.Random) -> Counts:
    """Killed in a save, then again in the clearing up of the next start; a share of all pairs."""
    opened, calls = calls_of_a_save(base, work)
    cases = good = 0
    for first in range(opened, opened + len(calls)):
        for second in range(opened + 8):
            if random_numbers.random() >= share:
                continue
            copy_of(base, work)
            with contextlib.suppress(Killed), SnapshotFolder(work, files=DyingDisk(first)) as folder:
                save_steps(folder, (3,))
            with contextlib.suppress(Killed), SnapshotFolder(work, files=DyingDisk(second)):
                pass
            cases += 1
            good += after_restart(work) in (2, 3)
    return cases, good


def power_lost(base: Path, work: Path, tries: int, random_numbers: random.Random) -> Counts:
    """The power fails before each change of a save, and after the last: what was not synced is lost in part."""
    _, calls = calls_of_a_save(base, work)
    cases = good = 0
    for at in range(len(calls) + 1):
        disk = ForgetfulDisk.of(copy_of(base, work))
        with contextlib.suppress(Killed), SnapshotFolder(work, files=disk) as folder:
            disk.dies_at = disk.calls + at
            save_steps(folder, (3,))
        for _ in range(tries):
            found = work.with_name("found")
            shutil.rmtree(found, ignore_errors=True)
            step = after_restart(disk.after_power_loss(found, random_numbers))
            cases += 1
            good += step == 3 if at == len(calls) else step in (2, 3)
    return cases, good


def power_lost_at_first_save(work: Path, tries: int, random_numbers: random.Random) -> Counts:
    """The same from an empty disk: folders may be lost, too. There is nothing old, so None or the first."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    whole = ForgetfulDisk.of(work)
    with SnapshotFolder(work / "run", files=whole) as folder:
        save_steps(folder, (1,))
    cases = good = 0
    for at in range(whole.calls + 1):
        shutil.rmtree(work)
        work.mkdir()
        disk = ForgetfulDisk.of(work)
        disk.dies_at = at
        with contextlib.suppress(Killed), SnapshotFolder(work / "run", files=disk) as folder:
            save_steps(folder, (1,))
        for _ in range(tries):
            found = work.with_name("found")
            shutil.rmtree(found, ignore_errors=True)
            step = after_restart(disk.after_power_loss(found, random_numbers) / "run")
            cases += 1
            good += step == 1 if at == whole.calls else step in (None, 1)
    return cases, good


def killed_at_random(path: Path, kills: int, random_numbers: random.Random, longest: float = 0.06) -> Counts:
    """A process saves as fast as it can and gets SIGKILL; the next starts from what it left.

    The newest snapshot must be the last one whose save had returned, or the one under way.
    """
    good, newest = 0, 0
    for _ in range(kills):
        reader, writer = os.pipe()

        def run(start: int = newest, writer: int = writer) -> None:
            with SnapshotFolder(path) as folder:
                os.write(writer, struct.pack("q", start))
                for step in range(start + 1, start + 1_000_000):
                    save_steps(folder, (step,))
                    os.write(writer, struct.pack("q", step))

        child = _forked(run)
        os.close(writer)
        select.select([reader], [], [], 60)
        time.sleep(random_numbers.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as pipe:
            told = pipe.read()
        last = struct.unpack_from("q", told, len(told) - 8)[0]
        newest = _newest(path)
        good += newest in (last, last + 1)
    return kills, good


def _newest(path: Path) -> int:
    """The step of the newest snapshot, 0 for none, after all of them were checked."""
    with SnapshotFolder(path) as folder:
        found = [folder.load(number) for number in folder.ids]
        assert all(map(is_exact, found))
        return found[-1].step if found else 0


def _forked(body: Callable[[], None]) -> int:
    """Run `body` in a forked child, which then ends without any clearing up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads: the child uses none of theirs
        child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        body()
    finally:
        os._exit(1)


def flips(files: Iterable[Path], check: Callable[[], bool], count: int, random_numbers: random.Random) -> Counts:
    """Flip one random bit of all bits of these files, ask `check` whether it finds damage, and flip it back."""
    ends, found, total = {}, 0, 0
    for path in files:
        total += path.stat().st_size * 8
        ends[path] = total
    for _ in range(count):
        bit = random_numbers.randrange(total)
        path = next(path for path, end in ends.items() if bit < end)
        within = bit - ends[path] + path.stat().st_size * 8
        flip(path, within)
        found += check()
        flip(path, within)
    assert not check(), "damage is seen where there is none"
    return count, found


def guard_state_folder(folder: Path) -> Path:
    """The files of a guard's state after a change was kept: the state, the baseline, and later readings."""
    torch.manual_seed(0)
    block = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(12, 20), "down_proj": torch.nn.Linear(20, 12)})
    model = torch.nn.ModuleDict({"mlp": block})
    before = GuardSession(model).baseline
    with torch.no_grad():
        block["up_proj"].weight.mul_(1.01)
    after = GuardSession(model).baseline
    step = {"name": "scale", "decision": "KEEP", "measurements": [{"target": "mlp.up_proj", "value": 0.00995}]}
    current = State(after.readings, after.fits)
    GuardState(before, current, (2.25, 2.125), False, (step,), json_digest("a policy")).save(folder)
    return folder


def guard_state_is_damaged(folder: Path) -> bool:
    """Whether reading the state or either baseline finds damage."""
    try:
        GuardState.load(folder)
    except BaselineError:
        return True
    return False


POLICY = """extends: balanced
name: ours
description: Eight bits and no loss
actions:
  loss_accepts_warned: {action: ROLLBACK, source: a warning is enough for us}
limits:
  spectral:
    kappa:
      value: {default: 0.05, attn: 0.025}
      source: measured on our models
  divergence:
    kl:
      value: 0.0125
      source: measured on our models
"""


def policy_file_is_damaged(path: Path, original: Policy) -> bool:
    """Whether reading a policy file finds damage: refused, or another policy by its digest.

    A file that says the same in other characters (1e-3 and 1E-3) is not damaged: nothing of the policy may differ then.
    """
    try:
        found = load_policy(path)
    except PolicyError:
        return True
    return found.digest != original.digest or found == original


def policy_flips(folder: Path, count: int, random_numbers: random.Random) -> Counts:
    """Flip one random bit of a policy file, again and again."""
    folder.mkdir(parents=True)
    path = folder / "policy.yaml"
    path.write_text(POLICY)
    original = load_policy(path)
    size, good = path.stat().st_size * 8, 0
    for _ in range(count):
        bit = random_numbers.randrange(size)
        flip(path, bit)
        good += policy_file_is_damaged(path, original)
        flip(path, bit)
    assert load_policy(path).digest == original.digest
    return count, good
