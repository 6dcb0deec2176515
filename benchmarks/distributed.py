"""What many processes save and cost: wall time, bytes and memory of a check, against their formulas.

Run `python benchmarks/distributed.py` (Linux, two cores); it prints everything it measured in this one
run and writes it to `distributed.json` beside it. `--project` computes the table of docs/scaling.md
from the constants in that file and measures nothing. See README.md.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pinned  # first of all: it sets the number of BLAS threads
import torch
from constants import constants_of_many, constants_of_one
from decoder import Decoder, Stack, placed
from projection import print_projection
from speed import read_status, versions

from weightproof import GuardSession, edits
from weightproof.digests import tensor_digests_of
from weightproof.numerics.gram import needs_float64
from weightproof.numerics.lockstep import ScreenRequest, predicted_bytes, screen
from weightproof.parallel.placements import local_of
from weightproof.parallel.shards import Shard, dealt, shard_of
from weightproof.probes import exact_cost, read_state, values_of
from weightproof.weights import iter_tensors, iter_weight_matrices

RESULTS = Path(__file__).with_name("distributed.json")

NUM_BLOCKS = 12
EXACT_REPEATS, INT8_REPEATS = 5, 3
AIM = 1.7

BYTE_SHAPES = ((768, 768), (3072, 768), (768, 3072))
MEMORY_SHAPES = ((4096, 1024), (1024, 4096), (2048, 2048))
MATRICES_PER_OWNER = 2

_MMAP_FROM_BYTES = 1 << 18
_M_MMAP_THRESHOLD = -3


# ---------------------------------------------------------------- wall time


def guarded(here: pinned.Here, place: str) -> torch.nn.Module:
    """The model of this process, made once."""
    if place not in here.kept:
        model = here.kept[place] = placed(Decoder(NUM_BLOCKS), place, here.size)
        here.kept[place, "values"] = [local_of(parameter).clone() for parameter in model.parameters()]
        here.kept[place, "baseline"] = None
    return here.kept[place]


def put_back(here: pinned.Here, place: str, model: torch.nn.Module) -> None:
    """The values that the model was made with, part by part."""
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), here.kept[place, "values"], strict=True):
            local_of(parameter).copy_(values)


def time_exact(here: pinned.Here, place: str) -> dict[str, float]:
    """Everything exact: all tensors hashed and counted, all spectra, all fits."""
    model = guarded(here, place)
    return here.timed(lambda: read_state(model, processes=here.processes))


def time_int8(here: pinned.Here, place: str) -> dict[str, float]:
    """A whole int8 transaction as a user sees it: snapshot, edit, readings, outputs, verdict."""
    model = guarded(here, place)
    put_back(here, place, model)
    session = GuardSession(model, baseline=here.kept[place, "baseline"])
    here.kept[place, "baseline"] = session.baseline
    found = here.timed(lambda: session.apply(edits.RTN(bits=8)))
    (step,) = session.history
    session.close()
    assert step.decision is not None
    assert step.decision.world_size == here.size
    return {**found, "check": step.seconds, "kept": float(step.applied == "kept")}


def of_all(found: list[dict[str, float]]) -> dict[str, float]:
    """A repeat, from its ranks: the slowest one counts."""
    return {key: max(one[key] for one in found) for key in found[0]}


def measure_scaling(one: pinned.World, two: pinned.World) -> dict[str, Any]:
    """Repeats of one process and of two in turns, so that a busy moment hits both."""
    worlds = {"one process": (one, "replicated"), "replicated": (two, "replicated"), "rows": (two, "rows")}
    results: dict[str, Any] = {}
    for name, work, repeats in (("exact", time_exact, EXACT_REPEATS), ("int8", time_int8, INT8_REPEATS)):
        runs: dict[str, list[dict[str, float]]] = {key: [] for key in worlds}
        for _ in range(repeats):
            for key, (world, place) in worlds.items():
                runs[key].append(of_all(world.call(work, place)))
        results[name] = {key: summary(found, runs["one process"]) for key, found in runs.items()}
    return results


def summary(runs: list[dict[str, float]], alone: list[dict[str, float]]) -> dict[str, Any]:
    """Medians and best of the repeats, and how many times longer one process takes.

    `ratio_cpu` compares the processor seconds of one process with those of the busiest of two: what
    the wall time ratio would be on free cores without waiting.
    """
    report: dict[str, Any] = {key: [round(run[key], 3) for run in runs] for key in runs[0]}
    for key in ("wall", "cpu", "check"):
        if key in runs[0]:
            median, best = (choose(run[key] for run in runs) for choose in (statistics.median, min))
            report[f"ratio_{key}"] = round(statistics.median(run[key] for run in alone) / median, 3)
            report[f"ratio_best_{key}"] = round(min(run[key] for run in alone) / best, 3)
    return report


# ---------------------------------------------------------------- bytes


def sent_by(here: pinned.Here, work: Callable[[], object]) -> int:
    """Payload bytes that all processes send during `work`."""
    before = here.processes.bytes_sent
    work()
    return sum(here.processes.gather("bytes", here.processes.bytes_sent - before))


def bytes_per_matrix(here: pinned.Here, place: str, shape: tuple[int, int]) -> dict[str, list[float]]:
    """Measured and predicted bytes of each operation on one matrix."""
    processes, size = here.processes, here.size
    (matrix,) = iter_weight_matrices(placed(Stack(shape, 1), place, size))
    shard = matrix.shard
    assert shard is not None
    parameter = {matrix.tensor_name: next(iter(here_parameters(here, place, shape)))}
    owner = sent_by(
        here,
        lambda: dealt(
            processes, [matrix], cost=exact_cost, parts=(values_of,), work=lambda *_: None, operation="one owner"
        ),
    )
    digest = sent_by(here, lambda: tensor_digests_of(processes, parameter))
    request = ScreenRequest(matrix.name, shard)
    steps: list[int] = []

    def screened() -> None:
        norm = screen(processes, [request])[0].norm
        assert norm is not None
        steps.append(int(norm.method.split("-")[1].split(",")[0]))

    screened_bytes = sent_by(here, screened)
    travels = (size - 1) / size
    return {
        "to one owner": [owner, travels * shape[0] * shape[1] * 4],
        "digest": [digest, predicted_digest(shard, size)],
        f"screen of {steps[0]} steps": [screened_bytes, size * predicted_bytes(request, size, norm_steps=steps[0])],
    }


def here_parameters(here: pinned.Here, place: str, shape: tuple[int, int]) -> list[torch.Tensor]:
    """The sharded parameters of a stack of one matrix."""
    return list(placed(Stack(shape, 1), place, here.size).parameters())


def predicted_digest(shard: Shard, size: int) -> float:
    """Bytes that all processes send: 32 a row where rows are cut, else the tensor itself."""
    by_row = shard.layout == "rows" and len(shard.shape) > 1
    whole = 32 * shard.shape[0] if by_row else torch.Size(shard.shape).numel() * shard.dtype.itemsize
    return (size - 1) / size * whole


def bytes_of_a_check(here: pinned.Here, place: str) -> list[float]:
    """Measured and predicted bytes of the exact reading of a whole sharded model."""
    model, size = placed(Decoder(1), place, here.size), here.size
    measured = sent_by(here, lambda: read_state(model, processes=here.processes))
    shards = [shard_of(named.tensor) for named in iter_tensors(model)]
    predicted = sum(predicted_digest(shard, size) for shard in shards if shard is not None)
    predicted += sum((size - 1) / size * m.d_out * m.d_in * 4 for m in iter_weight_matrices(model))
    # Two numbers a tensor, added up: how many elements are not finite, how many of them NaN.
    predicted += 2 * (size - 1) * 16 * len(shards)
    return [measured, predicted]


def measure_bytes(worlds: dict[int, pinned.World]) -> list[dict[str, Any]]:
    """One row for each operation, layout and number of processes."""
    rows: list[dict[str, Any]] = []

    def note(size: int, place: str, what: str, matrix: str, found: list[float]) -> None:
        measured, predicted = found
        rows.append(
            {"processes": size, "cut": place, "matrix": matrix, "what": what}
            | {"bytes": measured, "formula": round(predicted), "ratio": round(measured / predicted, 4)}
        )

    for size, world in worlds.items():
        for place in ("rows", "columns"):
            for shape in BYTE_SHAPES:
                for what, found in world.call(bytes_per_matrix, place, shape)[0].items():
                    note(size, place, what, "x".join(map(str, shape)), found)
            note(size, place, "exact check", "one block and embeddings", world.call(bytes_of_a_check, place)[0])
    return rows


# ---------------------------------------------------------------- memory


def free_at_once(here: pinned.Here) -> None:
    """From now on freed blocks go back to the system, so that the resident size is what is held.

    For a fresh process: what was freed before would be used again and stay resident.
    """
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_FROM_BYTES)


def peak_above_start(here: pinned.Here, work: Callable[[], object]) -> int:
    """Highest resident size of this process during a call beyond the size before it."""
    work()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    here.processes.gather("memory", None)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    start = read_status("VmRSS")
    work()
    return read_status("VmHWM") - start


def memory_of(here: pinned.Here, place: str, shape: tuple[int, int]) -> dict[str, float]:
    """Peaks over the allowance: two float32 copies of one matrix and three Gram matrices in their dtype."""
    model = placed(Stack(shape, MATRICES_PER_OWNER * here.size), place, here.size)
    side, length = sorted(shape)
    allowed = 2 * 4 * side * length + 3 * (8 if needs_float64(side, length, torch.float32) else 4) * side**2
    session = GuardSession(model)
    exact = peak_above_start(here, lambda: read_state(model, processes=here.processes))
    # No outputs can be compared, so that the edit is rolled back each time: planned, written, read, restored, proven.
    whole = peak_above_start(here, lambda: session.apply(edits.RTN(bits=8))) - session.cost.snapshot_bytes
    assert [step.applied for step in session.history] == ["restored"] * 2
    session.close()
    return {"allowed_bytes": allowed, "exact": exact / allowed, "int8": whole / allowed}


def measure_memory(world: pinned.World) -> list[dict[str, Any]]:
    """The worst rank of each case."""
    world.call(free_at_once)
    rows = []
    for place in ("rows", "columns"):
        for shape in MEMORY_SHAPES:
            found = of_all(world.call(memory_of, place, shape))
            rows.append(
                {"cut": place, "matrix": "x".join(map(str, shape))} | {k: round(v, 3) for k, v in found.items()}
            )
    return rows


# ---------------------------------------------------------------- report


def measure() -> dict[str, Any]:
    load = os.getloadavg()[0]
    with pinned.world(1) as one, pinned.world(2) as two:
        report: dict[str, Any] = {"load_average_at_start": round(load, 2), "scaling": measure_scaling(one, two)}
        report["constants"] = one.call(constants_of_one)[0] | two.call(constants_of_many)[0]
        with pinned.world(4) as four:
            report["bytes"] = measure_bytes({2: two, 4: four})
            report["constants"]["meeting_seconds_4"] = four.call(constants_of_many)[0]["meeting_seconds"]
    with pinned.world(2) as fresh:
        report["memory"] = measure_memory(fresh)
    return report | {"load_average_at_end": round(os.getloadavg()[0], 2), "versions": versions()}


def print_rows(rows: list[dict[str, Any]]) -> None:
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in rows[0]}, *rows]:
        print("  ".join(str(row[key]).rjust(width) for key, width in widths.items()))
    print()


def print_report(report: dict[str, Any]) -> None:
    print(f"load average {report['load_average_at_start']} at the start, {report['load_average_at_end']} at the end")
    for name, found in report["scaling"].items():
        print(f"\n{name}: seconds of each repeat, slowest rank; ratios of one process to two, medians and best")
        for place, row in found.items():
            print(f"  {place}: {json.dumps(row)}")
    print("\nbytes that all processes send, against the formula")
    print_rows(report["bytes"])
    print("peak memory of the busiest rank over two float32 copies of a matrix and three Gram matrices")
    print_rows(report["memory"])
    print(f"constants: {json.dumps(report['constants'], indent=2)}\n")


def complaints(report: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    found = []
    for place in ("replicated", "rows"):
        row = report["scaling"]["exact"][place]
        ratio = max(row["ratio_wall"], row["ratio_best_wall"])
        if ratio < AIM:
            found.append(f"exact check, {place}: one process takes {ratio} times as long as two, not {AIM}")
    found += [f"bytes: {row}" for row in report["bytes"] if not 0.99 <= row["ratio"] <= 1.01]
    found += [f"memory: {row}" for row in report["memory"] if max(row["exact"], row["int8"]) > 1]
    return found


def main() -> None:
    if "--project" in sys.argv[1:]:
        print_projection(json.loads(RESULTS.read_text(encoding="utf-8"))["constants"])
        return
    report = measure()
    print_report(report)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_projection(report["constants"])
    wrong = complaints(report)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
