"""The speeds of one core that a projection needs, measured; each is the best of a few repeats."""

from __future__ import annotations

import math
import pickle
import statistics
import time
from collections.abc import Callable

import pinned
import torch
from decoder import Stack, placed
from speed import quantize

from weightproof.contracts.quantities import levels_per_group
from weightproof.kinds import Quantize
from weightproof.numerics.gram import _eigenvalues, gram
from weightproof.numerics.lanczos import GolubKahan
from weightproof.parallel.shards import assemble
from weightproof.probes import read_state
from weightproof.readings.changed_matrices import relative_delta
from weightproof.readings.matrices import fit_reading, no_bulk, read_exactly, read_tracked
from weightproof.snapshots.tensor_store import leaf_digests
from weightproof.spectrum import delta_norm_bound, profile
from weightproof.types import WeightMatrix
from weightproof.weights import iter_weight_matrices

REPEATS = 3
SHAPE = (4096, 1024)
EIGENVALUE_SIDES = (1024, 2048)
TRANSFER_SHAPE = (4096, 4096)
MEETINGS = 200
TINY_MATRICES = 40


def best_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Processor seconds: what other jobs on the machine take does not count."""
    best = math.inf
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def constants_of_one(here: pinned.Here) -> dict[str, float]:
    """Rates of one core on matrices that do not fit its second-level cache."""
    matrix = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02
    elements, side = matrix.numel(), min(SHAPE)
    found: dict[str, float] = {}
    for dtype, bits in ((torch.float32, 32), (torch.float64, 64)):
        seconds = best_seconds(lambda dtype=dtype: gram(matrix, dtype))
        found[f"gram{bits}_gmac_per_second"] = elements * side / seconds / 1e9
        for order in EIGENVALUE_SIDES:
            product = gram(torch.randn(2 * order, order, generator=torch.Generator().manual_seed(1)), dtype)
            seconds = best_seconds(lambda product=product: _eigenvalues(product))
            found[f"eigenvalues{bits}_seconds_{order}"] = seconds
    spectra = best_seconds(lambda: gram(matrix, torch.float32)) + found["eigenvalues32_seconds_1024"]
    (described,) = iter_weight_matrices(Stack(SHAPE, 1))
    exact = best_seconds(lambda: (read_exactly(described, matrix), fit_reading(described, matrix)))
    found["exact_passes_seconds_per_gelement"] = (exact - 2 * spectra) / elements * 1e9
    found |= _check_constants(described, matrix)
    found["python_seconds_per_matrix"] = _loop_seconds()
    return {name: round(value, 6) for name, value in found.items()}


def _check_constants(described: WeightMatrix, matrix: torch.Tensor) -> dict[str, float]:
    """Reading an int8 edit, a Lanczos step, a screen's pass, and hashing."""
    elements, edited = matrix.numel(), quantize(matrix, 8, None)
    known, (_, fit) = read_exactly(described, matrix), fit_reading(described, matrix)
    assert fit is not None
    assert known.spectral_norm is not None
    limit = (known.spectral_norm / 1.1, known.spectral_norm * 1.1)

    def check() -> None:
        Quantize(8).measure(described.name, matrix, edited)
        read_tracked(described, edited, matrix, known, limit)
        delta_norm_bound(edited, matrix, key="bound", row_scale=fit.row_scale, col_scale=fit.col_scale)
        relative_delta(edited, matrix)

    lanczos = best_seconds(lambda: GolubKahan(matrix, key="speed", max_steps=8).extend(8))
    return {
        "int8_check_seconds_per_gelement": best_seconds(check) / elements * 1e9,
        "levels_seconds_per_gelement": best_seconds(lambda: levels_per_group(edited, None)) / elements * 1e9,
        "int8_edit_seconds_per_gelement": best_seconds(lambda: quantize(matrix, 8, None)) / elements * 1e9,
        "lanczos_gbyte_per_second": 16 * matrix.nbytes / lanczos / 1e9,
        "profile_gbyte_per_second": matrix.nbytes / best_seconds(lambda: profile(matrix)) / 1e9,
        "hash_gbyte_per_second": matrix.nbytes / best_seconds(lambda: leaf_digests(matrix)) / 1e9,
        "reading_bytes_over_8_k_m_n": len(pickle.dumps((known, no_bulk(described, ""), fit)))
        / (8 * (min(SHAPE) + sum(SHAPE))),
    }


def _loop_seconds() -> float:
    """Of one matrix that is too small to count."""
    model = Stack((32, 32), TINY_MATRICES)
    return best_seconds(lambda: read_state(model)) / TINY_MATRICES


def constants_of_many(here: pinned.Here) -> dict[str, float]:
    """Wall seconds of a meeting, and the rate at which a matrix comes together on its owner."""
    processes = here.processes
    meetings = [_wall(lambda: processes.gather("meeting", None)) for _ in range(MEETINGS)]
    (matrix,) = iter_weight_matrices(placed(Stack(TRANSFER_SHAPE, 1), "rows", here.size))
    assert matrix.shard is not None
    shard = matrix.shard
    transfers = [_wall(lambda: assemble(processes, "transfer", [(0, shard)])) for _ in range(REPEATS + 1)]
    travelled = (here.size - 1) / here.size * 4 * matrix.d_out * matrix.d_in
    return {
        "meeting_seconds": round(statistics.median(meetings), 6),
        "transfer_gbyte_per_second": round(travelled / min(transfers) / 1e9, 3),
    }


def _wall(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
