"""What the candidates of a subspace report cost, against writing them out: `benchmarks/candidates.py --write`.

Two Llama blocks of width 1024 (16 heads of 128, 8 key-value heads, MLP of 3072) and a head of 16384 rows, float32
noise, one thread. Each line runs in a process of its own; time is what the processor spent on it (other work on the
machine does not count), memory the most that it adds to what the model takes.
Written out means: the matrices side by side in float64 and their singular value decomposition; a dense change; a null
of 120 random frames. Memory is read from /proc (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from weightproof.candidates.candidate import Sources
from weightproof.candidates.from_weights import WEIGHT_SIDE
from weightproof.candidates.weight_side import WeightSide
from weightproof.deltas import LowRank
from weightproof.subspace import orthonormal, recovery, weight_target

RESULT = Path(__file__).with_name("candidates.json")
WIDTH, RANK, BROAD, LORA, FRAMES = 1024, 8, 64, 32, 120
READ, WRITE = ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"), ("o_proj", "down_proj")
BY_NAME = {one.name: one for one in WEIGHT_SIDE}


def model() -> nn.Module:
    """Two blocks and a head, in noise."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16384, hidden_size=WIDTH, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def named(base: nn.Module, *endings: str, layer: int | None = None) -> list[Tensor]:
    """The weights whose modules end like this, of one layer or of all, (d_out, d_in) float64."""
    return [
        parameter.detach().double()
        for name, parameter in base.named_parameters()
        if name.removesuffix(".weight").endswith(endings) and (layer is None or f".{layer}." in name)
    ]


def written_out(base: nn.Module, what: str) -> Tensor:
    """A candidate by the full decomposition of its matrices side by side."""
    if what == "write":
        return torch.linalg.svd(torch.cat(named(base, *WRITE, layer=0), dim=1), full_matrices=False).U[:, :RANK]
    if what == "input_super":
        return torch.linalg.svd(torch.cat(named(base, *READ, layer=0)), full_matrices=False).Vh[:RANK].T
    both = [*named(base, *READ), base.get_input_embeddings().weight.detach().double()]  # pyright: ignore
    return torch.linalg.svd(torch.cat(both), full_matrices=False).Vh[:RANK].T


def change(*, dense: bool) -> tuple[LowRank | Tensor, Tensor]:
    """A LoRA of rank 32 on a down-projection, and a basis to score."""
    generator = torch.Generator().manual_seed(1)
    part = LowRank(torch.randn(WIDTH, LORA, generator=generator), torch.randn(LORA, 3072, generator=generator))
    basis = orthonormal(torch.randn(WIDTH, RANK, generator=generator))
    return part.dense() if dense else part, basis


def sampled_null() -> None:
    """R of a dense change against as many random frames as it takes for a rough standard deviation."""
    delta, basis = change(dense=True)
    assert isinstance(delta, Tensor)
    work = delta.double()
    for frame in [basis, *(torch.linalg.qr(torch.randn(WIDTH, RANK).double()).Q for _ in range(FRAMES))]:
        float((frame.T @ work).square().sum() / work.square().sum())


def closed_null() -> None:
    """The same score with its null in closed form, from the factors."""
    delta, basis = change(dense=False)
    recovery(weight_target(delta), basis)


def by_grams(base: nn.Module, what: str) -> None:
    """A candidate as the report makes it."""
    Sources(WeightSide.of(base), rank=RANK, broad_rank=BROAD).basis(BY_NAME[what], 0)


def everything(base: nn.Module) -> None:
    """All candidates from weights, of both layers."""
    sources = Sources(WeightSide.of(base), rank=RANK, broad_rank=BROAD)
    for layer in range(2):
        for one in WEIGHT_SIDE:
            sources.basis(one, layer)


def jobs(base: nn.Module) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    found: dict[str, Callable[[], object]] = {}
    for what in ("write", "input_super", "global_read"):
        found[f"{what}, written out"] = lambda what=what: written_out(base, what)
        found[f"{what}, by Gram matrices"] = lambda what=what: by_grams(base, what)
    found[f"all {len(WEIGHT_SIDE)} candidates from weights, two layers"] = lambda: everything(base)
    found[f"score, dense with {FRAMES} random frames"] = sampled_null
    found["score, factored with its null in closed form"] = closed_null
    return found


def resident() -> int:
    """What this process holds in memory, bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch(threading.Thread):
    """Looks every few milliseconds how much memory the process holds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.stop = resident(), threading.Event()

    def run(self) -> None:
        """Until told to stop."""
        while not self.stop.wait(0.003):
            self.most = max(self.most, resident())


def one(name: str) -> dict[str, float]:
    """Processor seconds and added memory of one job, in this process."""
    torch.set_num_threads(1)
    base = model()
    torch.linalg.eigh(torch.eye(8, dtype=torch.float64))  # libraries are loaded before the clock runs
    job, before, watch = jobs(base)[name], resident(), Watch()
    watch.start()
    start = time.process_time()
    job()
    seconds = time.process_time() - start
    watch.stop.set()
    watch.join()
    return {"cpu_seconds": round(seconds, 4), "added_mib": round((watch.most - before) / 2**20, 1)}


def main() -> None:
    """Run every job in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one)))
        return
    found: dict[str, dict[str, float]] = {}
    for name in jobs(nn.Identity()):
        command = [sys.executable, __file__, "--one", name]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found[name] = json.loads(run.stdout.splitlines()[-1])
        print(f"{name:52} {found[name]['cpu_seconds']:9.3f} s  {found[name]['added_mib']:8.1f} MiB", flush=True)
    if arguments.write:
        RESULT.write_text(json.dumps({"torch": torch.__version__, "threads": 1, "jobs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
