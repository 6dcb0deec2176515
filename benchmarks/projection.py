"""What the guard would cost on models and machines that were not measured: formulas over measured constants.

Two machines. "CPU" is the measured one, one of its cores for each process. "GPU" is an estimate of an
H200 in each process: no number of it was measured here (docs/scaling.md says where each comes from).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from weightproof.collective import deal
from weightproof.numerics.gram import needs_float64
from weightproof.numerics.lockstep import ScreenRequest, predicted_bytes
from weightproof.numerics.norms import DELTA_STEPS
from weightproof.parallel.placements import chunk_ranges
from weightproof.parallel.shards import Shard
from weightproof.probes import exact_cost, screen_cost

WORLDS = (8, 64)
ELEMENT_BYTES = 2  # bfloat16

# How often an int8 transaction hashes a tensor: at the snapshot, as planned, as written, against the plan.
INT8_HASHES = 4
# ... and how often it moves a sharded matrix: to be planned, back, then now and before to be held against the contract.
INT8_TRAVELS = 4
# Share of the fits that were taken again after int8 because Weyl's bound left their spikes open (measured: 11 of 49).
REFIT_SHARE = 0.25

# A window of training: steps on the change and on the matrix, where the Frobenius norm of the change does not decide.
WINDOW_STEPS = 8
WINDOW_ROUNDS = 1 + DELTA_STEPS + 1 + WINDOW_STEPS + 2

# Meetings beside those of each round of dealt work.
FIXED_MEETINGS = 15


@dataclass(frozen=True)
class Matrix:
    """A weight matrix by its shape; what `exact_cost` asks for."""

    d_out: int
    d_in: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def elements(self) -> int:
        """How many."""
        return self.d_out * self.d_in

    @property
    def side(self) -> int:
        """The shorter one: that of the Gram matrix."""
        return min(self.d_out, self.d_in)


def decoder(blocks: int, width: int, hidden: int, key_width: int, vocabulary: int = 32000) -> list[Matrix]:
    """The matrices of a Llama decoder: q, o, k, v, gate, up, down in each block, embeddings and head."""
    block = [Matrix(width, width)] * 2 + [Matrix(key_width, width)] * 2
    block += [Matrix(hidden, width)] * 2 + [Matrix(width, hidden)]
    return block * blocks + [Matrix(vocabulary, width)] * 2


MODELS = {"7B": decoder(32, 4096, 11008, 4096), "70B": decoder(80, 8192, 28672, 1024)}


@dataclass(frozen=True)
class Machine:
    """Speeds of one process; seconds per element unless named otherwise."""

    name: str
    gram: Mapping[int, float]  # multiplications per second, by the bits of the Gram matrix
    eigenvalues: Callable[[int, int], float]  # seconds, of a side and its bits
    exact_passes: float
    int8_edit: float
    int8_check: float
    window_passes: float
    lanczos: float  # bytes per second
    hashing: float  # bytes per second
    transfer: float  # bytes per second that one process receives
    meeting: float  # seconds, of two processes; the store answers one request after the other

    def exact_seconds(self, matrix: Matrix) -> float:
        """Two spectra (of the matrix, and whitened), and the passes over its elements."""
        length = max(matrix.d_out, matrix.d_in)
        bits = 64 if needs_float64(matrix.side, length, matrix.dtype) else 32
        spectrum = matrix.elements * matrix.side / self.gram[bits] + self.eigenvalues(matrix.side, bits)
        return 2 * spectrum + matrix.elements * self.exact_passes

    def meetings(self, count: float, size: int) -> float:
        """Seconds of that many meetings."""
        return count * self.meeting * size / 2


def measured_machine(constants: Mapping[str, float]) -> Machine:
    """One core of the machine that `distributed.json` was measured on."""

    def eigenvalues(side: int, bits: int) -> float:
        return constants[f"eigenvalues{bits}_seconds_2048"] * (side / 2048) ** 3

    return Machine(
        name="CPU, one core a process",
        gram={bits: 1e9 * constants[f"gram{bits}_gmac_per_second"] for bits in (32, 64)},
        eigenvalues=eigenvalues,
        exact_passes=1e-9 * constants["exact_passes_seconds_per_gelement"],
        int8_edit=1e-9 * constants["int8_edit_seconds_per_gelement"],
        int8_check=1e-9 * constants["int8_check_seconds_per_gelement"],
        window_passes=2 * 4 / (1e9 * constants["profile_gbyte_per_second"]),
        lanczos=1e9 * constants["lanczos_gbyte_per_second"],
        hashing=1e9 * constants["hash_gbyte_per_second"],
        transfer=1e9 * constants["transfer_gbyte_per_second"],
        meeting=constants["meeting_seconds"],
    )


LAUNCH_SECONDS = 10e-6


def launched(kernels: int, elements: int) -> float:
    """Seconds per element of work that goes in chunks: small kernels on a GPU cost what launching them costs."""
    return kernels * LAUNCH_SECONDS / elements


def estimated_gpu(constants: Mapping[str, float]) -> Machine:
    """An H200 in each process; what runs on the host is as measured, with two threads for hashing."""

    def eigenvalues(side: int, bits: int) -> float:
        # The upper end of what is expected at 4096; a chain of small kernels below, bandwidth beyond.
        return 0.4 * (side / 4096) ** (3 if side > 4096 else 1)

    return Machine(
        name="GPU, estimated",
        gram={32: 2.4e13, 64: 2.4e13},
        eigenvalues=eigenvalues,
        exact_passes=launched(60, 1 << 18),
        int8_edit=launched(8, 1 << 18),
        int8_check=launched(25, 1 << 16) + 1e-9 * constants["levels_seconds_per_gelement"],
        window_passes=launched(20, 1 << 18),
        lanczos=4.3e12,
        hashing=2e9 * constants["hash_gbyte_per_second"],
        transfer=50e9,
        meeting=constants["meeting_seconds"],
    )


@dataclass(frozen=True)
class Load:
    """A model over so many processes, cut by rows."""

    matrices: list[Matrix]
    size: int

    @property
    def elements(self) -> int:
        """Of the whole model."""
        return sum(matrix.elements for matrix in self.matrices)

    @property
    def part_bytes(self) -> float:
        """Weights of one process."""
        return ELEMENT_BYTES * self.elements / self.size

    @property
    def sent(self) -> float:
        """Bytes that one process sends when every matrix goes to its owner once."""
        return self.part_bytes * (self.size - 1) / self.size

    def dealt(self, cost: Callable[[Any], float], seconds: Callable[[Matrix], float]) -> tuple[float, float, int]:
        """Seconds of the busiest process; that over the mean; and how many matrices one process has at most."""
        owners = deal([cost(matrix) for matrix in self.matrices], self.size)
        busy, counts = [0.0] * self.size, [0] * self.size
        for owner, matrix in zip(owners, self.matrices, strict=True):
            busy[owner] += seconds(matrix)
            counts[owner] += 1
        return max(busy), max(busy) / (sum(busy) / self.size), max(counts)


def exact_baseline(load: Load, machine: Machine) -> dict[str, float]:
    """Seconds of reading everything exactly, by what takes them."""
    spectra, imbalance, rounds = load.dealt(exact_cost, machine.exact_seconds)
    return {
        "spectra": spectra,
        "hashing": load.part_bytes / machine.hashing,
        "transfer": load.sent / machine.transfer,
        "meetings": machine.meetings(rounds + FIXED_MEETINGS, load.size),
        "imbalance": imbalance,
    }


def int8_transaction(load: Load, machine: Machine) -> dict[str, float]:
    """Seconds of a checked int8 edit without its forward passes."""
    edit, _, rounds = load.dealt(screen_cost, lambda matrix: matrix.elements * machine.int8_edit)
    check, _, _ = load.dealt(screen_cost, lambda matrix: matrix.elements * machine.int8_check)
    again, _, _ = load.dealt(exact_cost, machine.exact_seconds)
    return {
        "spectra": again * REFIT_SHARE / 2,  # one spectrum of two
        "contract": edit + check,
        "hashing": INT8_HASHES * load.part_bytes / machine.hashing,
        "transfer": (INT8_TRAVELS + REFIT_SHARE) * load.sent / machine.transfer,
        "meetings": machine.meetings(6 * rounds + 3 * FIXED_MEETINGS, load.size),
    }


def training_window(load: Load, machine: Machine) -> dict[str, float]:
    """Seconds of the check of a window whose matrices all need Lanczos steps, with one exact spectrum."""
    share = load.elements / load.size
    reads = 4 * share * (2 * DELTA_STEPS + WINDOW_STEPS)
    return {
        "spectra": max(map(machine.exact_seconds, load.matrices)),
        "screen": share * machine.window_passes + reads / machine.lanczos,
        "hashing": load.part_bytes / machine.hashing,
        "meetings": machine.meetings(WINDOW_ROUNDS + 2 * FIXED_MEETINGS, load.size),
    }


def window_bytes(load: Load) -> float:
    """Bytes that one process sends for the screen of all matrices."""
    total = 0.0
    for matrix in load.matrices:
        shape = (matrix.d_out, matrix.d_in)
        nothing = torch.empty(0, device="meta")
        shard = Shard(shape, matrix.dtype, "rows", chunk_ranges(matrix.d_out, load.size), nothing)
        request = ScreenRequest("projected", shard, limit=(0.0, math.inf))
        total += predicted_bytes(request, load.size, delta=True, norm_steps=WINDOW_STEPS)
    return total


def memory(load: Load) -> dict[str, float]:
    """Bytes of one process: its weights, their snapshot, the owner's peak beside both, and readings on the host."""
    peak = max(2 * 4 * matrix.elements + 3 * 8 * matrix.side**2 for matrix in load.matrices)
    readings = sum(8 * (matrix.side + matrix.d_out + matrix.d_in) for matrix in load.matrices)
    return {"weights": load.part_bytes, "snapshot": load.part_bytes, "owner": float(peak), "readings": float(readings)}


# ---------------------------------------------------------------- the tables


def table(title: str, rows: list[dict[str, str]]) -> str:
    """Markdown."""
    head = list(rows[0])
    lines = [f"**{title}**", "", "| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows), ""])


def duration(seconds: float) -> str:
    """For people."""
    if seconds >= 600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def size_of(count: float) -> str:
    """For people."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def time_rows(machine: Machine, loads: Mapping[tuple[str, int], Load]) -> list[dict[str, str]]:
    rows = []
    works = {
        "exact baseline": exact_baseline,
        "int8 edit, checked": int8_transaction,
        "training window": training_window,
    }
    for what, work in works.items():
        for (name, size), load in loads.items():
            found = work(load, machine)
            imbalance = found.pop("imbalance", None)
            parts = ", ".join(
                f"{part} {duration(value)}" for part, value in sorted(found.items(), key=lambda one: -one[1])
            )
            rows.append(
                {
                    "check": what,
                    "model": name,
                    "processes": str(size),
                    "time": duration(sum(found.values())),
                    "of which": parts,
                    "busiest / mean": "" if imbalance is None else f"{imbalance:.2f}",
                }
            )
    return rows


def held_rows(loads: Mapping[tuple[str, int], Load]) -> list[dict[str, str]]:
    rows = []
    for (name, size), load in loads.items():
        held = memory(load)
        rows.append(
            {"model": name, "processes": str(size)}
            | {part: size_of(value) for part, value in held.items()}
            | {
                "sent: exact": size_of(load.sent),
                "sent: int8": size_of((INT8_TRAVELS + REFIT_SHARE) * load.sent),
                "sent: window": size_of(window_bytes(load)),
            }
        )
    return rows


def print_projection(constants: Mapping[str, float]) -> None:
    """The tables of docs/scaling.md."""
    loads = {(name, size): Load(matrices, size) for name, matrices in MODELS.items() for size in WORLDS}
    print(table("Bytes of one process, held and sent", held_rows(loads)))
    for machine in (measured_machine(constants), estimated_gpu(constants)):
        print(table(f"Time: {machine.name}", time_rows(machine, loads)))
