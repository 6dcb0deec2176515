"""What the numbers cost: a check, a screen and a baseline of a GPT-2-small-shaped model, on one thread.

Run `python benchmarks/speed.py`; it prints ratios measured in this one run and writes them to
`speed.json` beside it. Repeats are interleaved and the fastest counts. See README.md.
"""

from __future__ import annotations

import collections
import ctypes
import gc
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Before numpy: its BLAS reads this once, when it is loaded.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import numpy as np
import scipy
import torch

from weightproof.marchenko_pastur import NULLS, fit_bulk
from weightproof.spectrum import (
    NormEstimate,
    NormReference,
    delta_norm_bound,
    estimate_norm,
    measure_spectrum,
    profile,
    track_norm,
)

NUM_BLOCKS = 12
# attention in, attention out, MLP in, MLP out: (d_out, d_in) of GPT-2 small
SHAPES = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
LIMITS = (0.02, 0.05, 0.10, 0.50)
FAST_REPEATS, SLOW_REPEATS = 9, 2
NOISE_SCALE = 0.02


@dataclass(frozen=True)
class Weights:
    """The matrices, their int8 and int4 versions (some with a planted rank-one term), exact norms."""

    before: list[torch.Tensor]
    after: dict[str, list[torch.Tensor]]
    references: list[NormReference]


def edge(shape: tuple[int, int]) -> float:
    return NOISE_SCALE * (math.sqrt(shape[0]) + math.sqrt(shape[1]))


def spike_strengths(index: int) -> tuple[np.ndarray, float]:
    """In units of the bulk edge; and the log-normal spread of row and column scales."""
    kind = index % 3
    if kind == 0:
        return np.linspace(3.0, 1.0, 8), 0.0
    ranks = np.arange(1, 257)
    if kind == 1:
        return 6.0 * ranks**-0.5, 0.2
    return (1.6 + 8.4 * index / 47) * ranks ** -(0.25 + 0.55 * (index % 16) / 15), 0.0


def make_matrix(index: int) -> torch.Tensor:
    rng = np.random.default_rng((2026, index))
    shape = SHAPES[index % 4]
    strengths, spread = spike_strengths(index)
    noise = NOISE_SCALE * rng.standard_normal(shape, dtype=np.float32)
    if spread:
        rows, cols = (np.exp(spread * rng.standard_normal(size, dtype=np.float32)) for size in shape)
        noise *= rows[:, None] * cols
    left, right = (np.linalg.qr(rng.standard_normal((size, len(strengths)), dtype=np.float32))[0] for size in shape)
    return torch.from_numpy(noise + (left * (edge(shape) * strengths).astype(np.float32)) @ right.T)


def quantize(matrix: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """Symmetric rounding with one scale per row, or per `group` columns of a row."""
    grouped = matrix if group is None else matrix.reshape(-1, group)
    step = grouped.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((grouped / step).round() * step).reshape(matrix.shape)


def plant(matrix: torch.Tensor, strength: float, index: int) -> torch.Tensor:
    """Add a rank-one term orthogonal to the 8 leading singular vectors on either side."""
    rng = np.random.default_rng((77, index))
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    _, vectors = torch.linalg.eigh(wide @ wide.t())
    left = vectors[:, -8:].numpy()
    right = np.linalg.qr((wide.t() @ vectors[:, -8:]).numpy())[0]
    u, v = (rng.standard_normal(size).astype(np.float32) for size in wide.shape)
    u, v = u - left @ (left.T @ u), v - right @ (right.T @ v)
    term = torch.from_numpy(np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v))) * strength
    return matrix + (term if wide is matrix else term.t())


def exact_norm(matrix: torch.Tensor) -> float:
    """Float64 Gram matrix by torch, independent of the code that is measured."""
    wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()).double()
    return math.sqrt(float(torch.linalg.eigvalsh(wide @ wide.t())[-1]))


def make_weights() -> Weights:
    before = [make_matrix(index) for index in range(NUM_BLOCKS * len(SHAPES))]
    after = {
        "int8 row": [quantize(matrix, 8, None) for matrix in before],
        "int4 group 128": [quantize(matrix, 4, 128) for matrix in before],
    }
    return Weights(before, after, [NormReference(exact_norm(matrix)) for matrix in before])


def climb(weights: Weights, edit: str, limit: float) -> list[NormEstimate]:
    return [
        track_norm(after, before, known, (known.value / (1 + limit), known.value * (1 + limit)), key=(edit, index))
        for index, (after, before, known) in enumerate(
            zip(weights.after[edit], weights.before, weights.references, strict=True)
        )
    ]


def operations(weights: Weights) -> dict[str, tuple[Callable[[], object], int]]:
    """What is timed, over all matrices, with the number of repeats."""
    matrices = weights.before

    def over_all(function: Callable[[torch.Tensor], object]) -> Callable[[], object]:
        return lambda: [function(matrix) for matrix in matrices]

    def capture(matrix: torch.Tensor) -> object:
        return profile(matrix), measure_spectrum(matrix), fit_bulk(matrix)

    return {
        "one_read": (over_all(torch.linalg.vector_norm), 3 * FAST_REPEATS),
        "int8_edit_itself": (lambda: [quantize(matrix, 8, None) for matrix in matrices], FAST_REPEATS),
        "ladder_int8_limit_.10": (lambda: climb(weights, "int8 row", 0.10), FAST_REPEATS),
        "ladder_int8_limit_.05": (lambda: climb(weights, "int8 row", 0.05), FAST_REPEATS),
        "ladder_int4_limit_.10": (lambda: climb(weights, "int4 group 128", 0.10), FAST_REPEATS),
        "profile": (over_all(profile), FAST_REPEATS),
        "screen_without_baseline": (
            lambda: [estimate_norm(matrix, key=index) for index, matrix in enumerate(matrices)],
            FAST_REPEATS,
        ),
        "exact_spectra": (over_all(measure_spectrum), SLOW_REPEATS + 1),
        "baseline_capture": (over_all(capture), SLOW_REPEATS),
        "svdvals": (over_all(torch.linalg.svdvals), SLOW_REPEATS),
        "svdvals_tall": (
            over_all(lambda w: torch.linalg.svdvals(w if w.shape[0] >= w.shape[1] else w.t())),
            SLOW_REPEATS,
        ),
    }


def time_all(todo: dict[str, tuple[Callable[[], object], int]]) -> dict[str, float]:
    """Seconds: the fastest of interleaved repeats, so that a busy moment hits all alike."""
    best = dict.fromkeys(todo, math.inf)
    for repeat in range(max(repeats for _, repeats in todo.values())):
        for name, (function, repeats) in todo.items():
            if repeat < repeats:
                start = time.perf_counter()
                function()
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def rungs(estimates: list[NormEstimate]) -> dict[str, int]:
    return dict(collections.Counter(estimate.method.partition(",")[0] for estimate in estimates).most_common())


def check_decisions(weights: Weights) -> dict[str, object]:
    """Ladder against exact norms: every edit, limit and matrix; then three planted rank-one terms each."""
    cases, wrong, outside = 0, 0, 0
    planted_cases, planted_missed = 0, 0
    for edit, edited in weights.after.items():
        truth = [exact_norm(matrix) for matrix in edited]
        for limit in LIMITS:
            for found, known, true in zip(climb(weights, edit, limit), weights.references, truth, strict=True):
                low, high = known.value / (1 + limit), known.value * (1 + limit)
                cases += 1
                wrong += (low <= found.value <= high) != (low <= true <= high)
                outside += abs(found.value - true) > found.error
            for index in (5, 22, 43):
                known = weights.references[index].value
                after = plant(edited[index], (1 + 1.5 * limit) * known, index)
                bounds = (known / (1 + limit), known * (1 + limit))
                found = track_norm(after, weights.before[index], NormReference(known), bounds, key=("planted", index))
                planted_cases += 1
                planted_missed += found.value <= bounds[1]
    return {
        "cases": cases,
        "wrong_side_of_the_limit": wrong,
        "outside_their_error": outside,
        "planted_rank_one": planted_cases,
        "planted_missed": planted_missed,
    }


def read_status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]


def peak_above_start(function: Callable[[], object]) -> int:
    """Highest resident size during a call beyond the size before it (Linux)."""
    function()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    start = read_status("VmRSS")
    function()
    return read_status("VmHWM") - start


def measure_memory(weights: Weights) -> dict[str, object] | None:
    """Peak bytes of each operation on the largest matrix against the formula; None where unmeasurable."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    results = {}
    for shape in ((3072, 768), (768, 768)):
        index = SHAPES.index(shape)
        before, after = weights.before[index], weights.after["int4 group 128"][index]
        half = before.bfloat16()
        known = weights.references[index].value
        near = (0.0, known * (1 + 1e-9))
        calls: dict[str, Callable[[], object]] = {
            "profile": lambda w=before: profile(w),
            "screen": lambda w=before: estimate_norm(w, key="memory"),
            "screen bfloat16": lambda w=half: estimate_norm(w, key="memory"),
            "ladder to its last rung": lambda a=after, b=before, k=known, n=near: track_norm(
                a, b, NormReference(k), n, key="memory"
            ),
            "delta bound bfloat16": lambda a=after, b=half: delta_norm_bound(a.bfloat16(), b, key="memory"),
            "exact spectrum": lambda w=before: measure_spectrum(w),
            **{f"fit {null}": lambda w=before, n=null: fit_bulk(w, n) for null in NULLS},
        }
        gram_bytes = 8 if min(shape) > 0.8 * max(shape) else 4
        allowed = 2 * 4 * 3072 * 768 + 3 * gram_bytes * min(shape) ** 2
        results["x".join(map(str, shape))] = {
            "allowed_bytes": allowed,
            "peak_over_allowed": {name: round(peak_above_start(call) / allowed, 3) for name, call in calls.items()},
        }
    return results


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }


def summarise(seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    read, svd = seconds["one_read"], seconds["svdvals"]
    return {
        name: {
            "milliseconds": round(1e3 * value, 1),
            "in_reads": round(value / read, 2),
            "svdvals_over_this": round(svd / value, 2),
        }
        for name, value in seconds.items()
    }


def print_report(report: dict) -> None:
    print(f"{report['matrices']} matrices, {report['parameters'] / 1e6:.0f} M parameters, one thread")
    print(f"{'':26}{'ms':>10}{'x one read':>14}{'svdvals / this':>18}")
    for name, row in report["cost"].items():
        print(f"{name:26}{row['milliseconds']:>10}{row['in_reads']:>14}{row['svdvals_over_this']:>18}")
    for name in ("aims", "rungs", "decisions", "memory", "versions"):
        print(f"{name}: {json.dumps(report[name], indent=2)}")


def main() -> None:
    torch.set_num_threads(1)
    weights = make_weights()
    memory = measure_memory(weights)
    cost = summarise(time_all(operations(weights)))
    screened = [estimate_norm(matrix, key=index) for index, matrix in enumerate(weights.before)]
    report = {
        "matrices": len(weights.before),
        "parameters": sum(matrix.numel() for matrix in weights.before),
        "cost": cost,
        "aims": {
            "ladder after int8, in reads (aim <= 6)": cost["ladder_int8_limit_.10"]["in_reads"],
            "ladder after int8, svdvals / ladder (aim >= 100)": cost["ladder_int8_limit_.10"]["svdvals_over_this"],
            "screen without baseline, in reads (aim <= 15)": cost["screen_without_baseline"]["in_reads"],
            "exact spectra, svdvals / exact (aim >= 3)": cost["exact_spectra"]["svdvals_over_this"],
        },
        "rungs": {
            "ladder int8 .10": rungs(climb(weights, "int8 row", 0.10)),
            "ladder int8 .05": rungs(climb(weights, "int8 row", 0.05)),
            "ladder int4 .10": rungs(climb(weights, "int4 group 128", 0.10)),
            "screen": rungs(screened),
        },
        "screen_largest_relative_error_bound": round(max(found.error / found.value for found in screened), 4),
        "decisions": check_decisions(weights),
        "memory": memory,
        "versions": versions(),
    }
    print_report(report)
    target = Path(__file__).with_name("speed.json")
    target.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    decisions = report["decisions"]
    if decisions["wrong_side_of_the_limit"] or decisions["planted_missed"]:
        sys.exit("the ladder decided wrongly: see speed.json")


if __name__ == "__main__":
    main()
