"""Many short guarded runs, each with one fault on a random process at a random time: `make test-faults-slow`.

A run makes a session and six edits in two or three real processes, on copies or on FSDP2 shards. Somewhere in it,
in an edit, in a measurement, in a restore or in between, one process raises, is interrupted, dies, freezes, stalls,
or finds NaN or other values in a weight. Every run must end within the limit; the sound processes must have judged
the same steps alike and end alike; the error they read must name the faulty process; and the weights of each must
be, bit for bit, those from before the step that was under way, or those that the step made.

Prints one line for each run; with --write, into `fault_storm_last_run.txt`.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import platform
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fault_scenes import WEIGHT, Scene
from sharding import shard
from torch.distributed.tensor import DTensor
from worlds import WorldError, run_world

from weightproof import edits
from weightproof.parallel.placements import settle
from weightproof.snapshots.tensor_store import model_digest, tensor_digest

# Seconds that a process waits for the others, and what it may need beside that to restore and report.
LIMIT = 3.0
SLACK = 6.0

STEPS = (("good", 1.001), ("bad", 1000.0), ("quantized", None), ("better", 1.001), ("worse", 1000.0), ("last", 1.001))
VERDICTS = ["KEEP", "ROLLBACK", "KEEP", "KEEP", "ROLLBACK", "KEEP"]
FAULTS = ("raises", "is interrupted", "dies", "freezes", "stalls", "finds NaN", "finds other values")
LAST_RUN = Path(__file__).with_name("fault_storm_last_run.txt")


@dataclass(frozen=True)
class Plan:
    """One run: who does what, and when (seconds after the start)."""

    number: int
    seed: int
    size: int
    sharded: bool
    victim: int
    fault: str
    at: float
    from_the_start: bool = False
    writes: bool = False

    @classmethod
    def draw(cls, seed: int, number: int, seconds: float) -> Plan:
        """Run `number` of a seed, where a run without a fault takes so many seconds; each fault comes as often."""
        deck = list(FAULTS)
        random.Random(f"{seed} deck {number // len(deck)}").shuffle(deck)
        fault, generator = deck[number % len(deck)], random.Random(f"{seed} {number}")
        size = generator.choice((2, 3))
        return cls(
            number=number,
            seed=seed,
            size=size,
            sharded=fault != "finds other values" and generator.random() < 0.45,  # to a shard they are just its values
            victim=generator.randrange(size),
            fault=fault,
            at=generator.uniform(0.0, seconds),
            from_the_start=generator.random() < 0.25,
            writes=generator.random() < 0.25,
        )

    def __str__(self) -> str:
        kind, since = ("shards" if self.sharded else "copies"), ("start" if self.from_the_start else "baseline")
        return f"{self.size} {kind}: rank {self.victim} {self.fault} {self.at:.3f} s after the {since}"


@dataclass
class Report:
    """How a run ended on one process."""

    steps: list[tuple[str, str, str]] = field(default_factory=list)
    during: str = ""
    error: str = ""
    message: str = ""
    weights: str = ""
    stopped: bool = False
    later: str = ""
    seconds: float = 0.0


# ---------------------------------------------------------------- one process


class Storm:
    """The fault of one run: armed on every process, and over before the process reports."""

    def __init__(self, plan: Plan, scene: Scene, pids: Sequence[int]) -> None:
        self.plan = plan
        self.scene = scene
        self.timers: list[threading.Timer] = []
        self.started = time.monotonic()
        self.is_due = False
        self._arm(pids[plan.victim])

    def _arm(self, pid: int) -> None:
        fault, hit, at = self.plan.fault, self.scene.hit, self.plan.at
        if fault == "freezes" and self.scene.rank == (self.plan.victim + 1) % self.plan.size:
            self._after(at, lambda: os.kill(pid, signal.SIGSTOP))
            self._after(at + LIMIT + 0.7, lambda: os.kill(pid, signal.SIGCONT))
        if fault == "dies" and hit:
            self._after(at, lambda: os.kill(pid, signal.SIGKILL))
        if fault in ("finds NaN", "finds other values") and hit:
            self._after(at, lambda: self.scene.weight()[:1].mul_(float("nan") if fault == "finds NaN" else 1.01))
        if fault in ("stalls", "is interrupted") and hit:
            signal.signal(signal.SIGALRM, self._signalled)
            signal.setitimer(signal.ITIMER_REAL, at)
        self.is_due = fault == "raises" and hit

    def _after(self, seconds: float, do: Callable[[], Any]) -> None:
        self.timers.append(threading.Timer(seconds, do))
        self.timers[-1].start()

    def _signalled(self, *_: Any) -> None:
        if self.plan.fault == "is interrupted":
            raise KeyboardInterrupt
        time.sleep(LIMIT + 0.7)

    def jitter(self, generator: random.Random) -> None:
        """What an edit does beside writing: it takes some time, and may raise."""
        for _ in range(3):
            time.sleep(generator.uniform(0.0, 0.03))
            if self.is_due and time.monotonic() - self.started >= self.plan.at:
                self.is_due = False
                raise ValueError("storm")

    def end(self) -> None:
        """Too late for the fault if it did not come yet, but a process that is to die waits for it."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for timer in self.timers:
            if self.plan.fault not in ("freezes", "dies"):
                timer.cancel()
            timer.join()


class _Seen:
    """Fingerprints of this process's part of the model, around the step under way."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.before = self.after = ""

    def fingerprint(self) -> str:
        settle(self.scene.model)
        return model_digest({name: tensor_digest(tensor) for name, tensor in self.scene.tensors().items()})

    def where(self) -> str:
        now = self.fingerprint()
        return "before" if now == self.before else "after" if now == self.after else "neither"


def run(rank: int, size: int, plan: Plan) -> Report:
    """What every process does."""
    logging.getLogger("weightproof").setLevel(logging.CRITICAL)  # one line for each run is enough
    for module in ("figure", "ticker", "font_manager", "backends.backend_agg"):  # seconds, on a busy machine
        importlib.import_module(f"matplotlib.{module}")
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(rank, size, Path(folder), LIMIT, plan.victim)
        if plan.sharded:
            shard(scene.model)
        assert dist.get_world_size() == size == plan.size
        assert all(isinstance(parameter, DTensor) == plan.sharded for parameter in scene.model.parameters())
        return _live_through(scene, plan)


def _live_through(scene: Scene, plan: Plan) -> Report:
    report, seen = Report(during="start"), _Seen(scene)
    pids: list[Any] = [None] * plan.size
    dist.all_gather_object(pids, os.getpid())
    storm = Storm(plan, scene, pids) if plan.from_the_start else None
    try:
        seen.before = seen.fingerprint()
        scene.begin(output_dir=scene.folder if plan.writes else None)
        storm = storm or Storm(plan, scene, pids)
        _make_the_steps(scene, plan, storm, seen, report)
        report.during = ""
    except BaseException as error:  # noqa: BLE001 - `faulty` says which it may be
        report.error, report.message = type(error).__name__, str(error)
    report.seconds = time.monotonic() - storm.started - plan.at if storm else 0.0
    if storm is not None:
        storm.end()
    report.weights = seen.where()
    if scene.session is not None:
        report.steps = [(s.name, str(s.decision.action), s.decision.digest) for s in scene.guard.history if s.decision]
        report.stopped = scene.guard.processes.lost is not None
        report.later = _later(scene)
    return report


def _make_the_steps(scene: Scene, plan: Plan, storm: Storm, seen: _Seen, report: Report) -> None:
    generator = random.Random(f"{plan.seed} {plan.number} {scene.rank}")
    assess = scene.guard.guarded.assessor.assess

    def noted(*args: Any) -> Any:
        seen.after = seen.fingerprint()
        return assess(*args)

    scene.guard.guarded.assessor.assess = noted
    for name, factor in STEPS:
        report.during, seen.before, seen.after = name, seen.fingerprint(), ""
        if factor is None:
            scene.guard.apply(edits.RTN(8))
            continue
        with scene.guard.edit(name):
            storm.jitter(generator)
            scene.change(factor)
            storm.jitter(generator)


def _later(scene: Scene) -> str:
    """What a further edit gives: the end of the run, at once, where it was stopped."""
    started = time.monotonic()
    try:
        with scene.guard.edit("later"):
            scene.change(1.0)
    except BaseException as error:  # noqa: BLE001 - `faulty` says which it may be
        found = type(error).__name__
    else:
        decision = scene.guard.history[-1].decision
        found = "" if decision is None else str(decision.action)
    return f"late {found}" if scene.guard.processes.lost and time.monotonic() - started > LIMIT + SLACK else found


# ---------------------------------------------------------------- all processes


def faulty(plan: Plan, reports: Sequence[Report | None]) -> list[str]:
    """What of a run is not as it must be."""
    found: list[str] = []
    living = {rank: report for rank, report in enumerate(reports) if report is not None}
    sound = {rank: report for rank, report in living.items() if rank != plan.victim}
    for rank, report in living.items():
        if (report.error and report.seconds > LIMIT + SLACK) or report.later.startswith("late"):
            found.append(f"rank {rank} ended {report.seconds:.1f} s after the fault (later: {report.later})")
        if report.error and rank != plan.victim and not _names(plan, report.message):
            found.append(f"rank {rank} does not name rank {plan.victim}: {report.message}")
        if report.weights == "neither" and not (rank == plan.victim and plan.fault.startswith("finds")):
            found.append(f"the weights of rank {rank} are neither those before nor those after {report.during!r}")
    if not all(_same_steps(first, second) for first in living.values() for second in living.values()):
        found.append("the processes judged the same steps differently")
    # Without its host the store tells no more how far all of them had come.
    if plan.victim == 0 and plan.fault in ("dies", "freezes", "stalls"):
        return found
    ends = {(len(report.steps), report.error, report.during, report.weights, report.later) for report in sound.values()}
    if len(ends) > 1:
        found.append(f"the sound processes ended differently: {ends}")
    return found


def _same_steps(first: Report, second: Report) -> bool:
    """Whether two processes judged alike what both judged; one may have come further, by one step."""
    common = min(len(first.steps), len(second.steps))
    return first.steps[:common] == second.steps[:common] and max(len(first.steps), len(second.steps)) <= common + 1


def _names(plan: Plan, message: str) -> bool:
    """Whether an error says where to look: at the faulty process, or at the tensor that it broke."""
    if re.search(rf"\brank {plan.victim}\b", message) or (plan.fault.startswith("finds") and WEIGHT in message):
        return True
    return any(str(plan.victim) in re.findall(r"\d+", ranks) for ranks in re.findall(r"ranks ([\d, ]+)", message))


def _sound(plan: Plan, reports: Sequence[Report | None]) -> Report:
    return next(report for rank, report in enumerate(reports) if report is not None and rank != plan.victim)


def line(plan: Plan, reports: Sequence[Report | None], wrong: Sequence[str]) -> str:
    """A run in one line."""
    sound, victim = _sound(plan, reports), reports[plan.victim]
    judged = ", ".join(f"{name} {action}" for name, action, _ in sound.steps) or "nothing"
    weights = ", ".join("dead" if report is None else report.weights for report in reports)
    here = "dead" if victim is None else victim.error or "no error"
    columns = [
        f"{plan.number:3} {'WRONG: ' + '; '.join(wrong) if wrong else 'ok'}",
        str(plan),
        f"{outcome(plan, reports)} ({here} there, {sound.error or 'no error'} elsewhere)",
        f"judged: {judged}",
        f"weights: {weights}",
    ]
    if sound.error:
        seconds = max(report.seconds for report in reports if report is not None)
        columns += [f"{seconds:.1f} s after the fault in {sound.during!r}: {sound.message[:140]}"]
    return " | ".join(columns)


def outcome(plan: Plan, reports: Sequence[Report | None]) -> str:
    """How a run ended, in short."""
    sound = _sound(plan, reports)
    if sound.error:
        return "stopped" if sound.stopped else "error on all"
    return "as without a fault" if [step[1] for step in sound.steps] == VERDICTS else "judged"


def calm(sharded: bool) -> float:
    """Seconds that the steps take without a fault."""
    plan = Plan(-1, 0, 2, sharded, 0, "nothing", 0.0)
    reports = run_world(run, 2, plan, timeout=90.0)
    assert not faulty(plan, reports)
    assert outcome(plan, reports) == "as without a fault"
    return reports[0].seconds


def storm(plan: Plan) -> tuple[str, list[str], str, float]:
    """One run: its line, what is wrong with it, how it ended, and the seconds from the fault to an error."""
    try:
        reports = run_world(run, plan.size, plan, timeout=90.0, expect_dead=[plan.victim] * (plan.fault == "dies"))
    except WorldError as error:
        return f"{plan.number:3} WRONG: hang or crash | {plan} | {error}", ["hang or crash"], "hang or crash", 0.0
    wrong = faulty(plan, reports)
    seconds = max(report.seconds if report and report.error else 0.0 for report in reports)
    return line(plan, reports, wrong), wrong, outcome(plan, reports), seconds


def main() -> int:
    """Make the runs; the exit status says whether all of them ended as they must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help=f"write {LAST_RUN.name}")
    options = parser.parse_args()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch prints a stack for each lost connection
    calm(sharded=False)  # what is slow the first time
    seconds = {sharded: calm(sharded=sharded) for sharded in (False, True)}
    lines, bad, counts, slowest = [], 0, Counter[tuple[str, str]](), 0.0
    for number in range(options.first, options.first + options.runs):
        plan = Plan.draw(options.seed, number, max(seconds.values()))
        text, wrong, how, took = storm(plan)
        lines.append(text)
        print(text, flush=True)
        bad += bool(wrong)
        counts[plan.fault, how] += 1
        slowest = max(slowest, took)
    summary = [
        f"{options.runs} runs, seed {options.seed}, a limit of {LIMIT:g} s for every wait: {bad} wrong, hangs included",
        *(f"  {fault:<20} {how:<20} {count:3}" for (fault, how), count in sorted(counts.items())),
        f"  longest from a fault to the last error it caused: {slowest:.1f} s",
        f"  the steps without a fault: {seconds[False]:.1f} s on copies, {seconds[True]:.1f} s on shards",
        f"  torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}",
    ]
    print("", *summary, sep="\n")
    if options.write:
        LAST_RUN.write_text("\n".join([*summary, "", *lines]) + "\n")
    return int(bad > 0)


if __name__ == "__main__":
    import fault_storm  # under its own name, by which the processes find it

    sys.exit(fault_storm.main())
