"""What planning an edit costs, in units of one read of the matrix: `benchmarks/edits.py --write`.

One 1024 x 4096 matrix in float32, noise with 16 planted directions, one torch thread. A read is
`torch.linalg.vector_norm` over it. Each row is the fastest of its repeats, all rows in one run, interleaved.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from weightproof.collective import Processes
from weightproof.edits import GPTQ, RTN, SVD, LoraMerge, Prune, TaskArithmetic
from weightproof.edits.gptq import inverse_factor
from weightproof.lora.adapters import Adapter, AdapterDelta
from weightproof.types import WeightMatrix

RESULT = Path(__file__).with_name("edits.json")
D_OUT, D_IN, TOKENS, RANK = 1024, 4096, 4096, 16
NAME = "up_proj.weight"
REPEATS = {"fast": 7, "slow": 2}


def matrix() -> WeightMatrix:
    """The matrix that every edit plans."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(D_OUT, 16, generator=generator), torch.randn(16, D_IN, generator=generator)
    weight = 0.02 * torch.randn(D_OUT, D_IN, generator=generator) + 0.01 * left @ right
    return WeightMatrix(NAME, "ffn", D_OUT, D_IN, torch.float32, (), NAME, lambda: weight)


def one_map(weight: torch.Tensor) -> SimpleNamespace:
    """What `Prune.prepare` needs of a session: a model of this one matrix."""
    model = nn.ModuleDict({"up_proj": nn.Linear(D_IN, D_OUT, bias=False)})
    with torch.no_grad():
        model["up_proj"].weight.copy_(weight)
    return SimpleNamespace(model=model, processes=Processes.alone())


def rows(subject: WeightMatrix) -> dict[str, tuple[str, Callable[[], object]]]:
    """Row -> (how often it is repeated, what is timed)."""
    weight = subject.load()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(TOKENS, D_IN, generator=generator) @ (torch.randn(D_IN, D_IN, generator=generator) / D_IN**0.5)
    moments = 2 * inputs.T @ inputs / TOKENS
    factors = torch.randn(RANK, D_IN, generator=generator), torch.randn(D_OUT, RANK, generator=generator)
    delta = AdapterDelta(NAME, *factors, scaling=1e-3)
    arithmetic, merge = TaskArithmetic({NAME: weight}), LoraMerge(Adapter({NAME: delta}))
    session = one_map(weight)
    fast = {
        "one read": lambda: torch.linalg.vector_norm(weight),
        "RTN 8 bits, channel": lambda: RTN(8).plan(subject),
        "RTN 4 bits, groups of 64": lambda: RTN(4, "group", 64).plan(subject),
        "RTN 4 bits, groups of 64, zero points": lambda: RTN(4, "group", 64, symmetric=False).plan(subject),
        "prune 50 %": lambda: Prune(0.5).plan(subject),
        "prune 2:4": lambda: Prune(pattern="2:4").plan(subject),
        "prune 50 %, global: finding the threshold": lambda: Prune(0.5, scope="global", include="*").prepare(session),
        "task arithmetic, one delta": lambda: arithmetic.plan(subject),
        "merging LoRA of rank 16": lambda: merge.plan(subject),
    }
    slow = {
        "SVD, rank 128": lambda: SVD(rank=128).plan(subject),
        "torch.linalg.svd": lambda: torch.linalg.svd(weight, full_matrices=False),
        "GPTQ: second moments of 4096 tokens": lambda: inputs.T @ inputs,
        "GPTQ: inverse of the second moments": lambda: inverse_factor(moments.double(), 0.01),
        "GPTQ 4 bits, channel": lambda: GPTQ(4).knowing(hessians={NAME: moments}).plan(subject),
    }
    return {name: ("fast", work) for name, work in fast.items()} | {name: ("slow", work) for name, work in slow.items()}


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print a table, and write it with --write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = rows(matrix())
    fastest = {name: float("inf") for name in work}
    for turn in range(max(REPEATS.values())):
        for name, (speed, call) in work.items():
            if turn < REPEATS[speed]:
                fastest[name] = min(fastest[name], seconds(call))
    read = fastest["one read"]
    result = {name: {"ms": round(1e3 * time_, 2), "reads": round(time_ / read, 1)} for name, time_ in fastest.items()}
    for name, numbers in result.items():
        print(f"{name:<45}{numbers['ms']:>12} ms{numbers['reads']:>12} reads")
    if options.write:
        facts = {"d_out": D_OUT, "d_in": D_IN, "dtype": "float32", "threads": 1, "torch": torch.__version__}
        RESULT.write_text(json.dumps({**facts, "rows": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
