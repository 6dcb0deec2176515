"""One job of the speed benchmark, in a process of its own: `python speed_rows.py SETTINGS MODEL JOB DEVICE OUT`.

A job measures one row or a few that need each other, and writes them as JSON: wall seconds, processor seconds (all
threads), and how far the resident memory rose above the process after the model was loaded (Linux; on a CUDA device
its allocator's peak, too). Everything is imported and loaded before the clock starts. `speed_peers.py` starts it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before numpy: its BLAS reads this once, when it is loaded.
THREADS = "1"
os.environ.update(OMP_NUM_THREADS=THREADS, OPENBLAS_NUM_THREADS=THREADS, MKL_NUM_THREADS=THREADS, TQDM_DISABLE="1")

import torch  # noqa: E402
from speed_models import BASE, BLOCK, FULL, INT8, SMOKE, Shape, load, load_block, make, put_int8  # noqa: E402
from torch import nn  # noqa: E402

Row = dict[str, Any]
Rows = dict[str, Row]
READS = 5


# ---------------------------------------------------------------- measuring


def _resident(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@dataclass
class Meter:
    """Measures calls against the process as it was when this was made: after the model was loaded."""

    device: str
    start: int | None = field(init=False)

    def __post_init__(self) -> None:
        """Note what is resident now."""
        self._settle()
        self.start = _resident("VmRSS")

    def _settle(self) -> None:
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        if self.device == "cuda":
            torch.cuda.synchronize()

    def measure(self, call: Callable[[], Any], repeats: int = 1, **more: Any) -> tuple[Any, Row]:
        """What the call returned, and its row; the fastest of `repeats`."""
        self._settle()
        if self.start is not None:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak of loading
        held = 0
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        result, timings = None, []
        for _ in range(repeats):
            wall, processor = time.perf_counter(), time.process_time()
            result = call()
            if self.device == "cuda":
                torch.cuda.synchronize()
            timings.append((time.perf_counter() - wall, time.process_time() - processor))
        seconds, processor = min(timings)
        row = {"seconds": seconds, "processor_seconds": processor}
        row["peak_bytes"] = None if self.start is None else max(0, (_resident("VmHWM") or 0) - self.start)
        if self.device == "cuda":
            row["device_peak_bytes"] = torch.cuda.max_memory_allocated() - held
        return result, row | more


@dataclass
class Job:
    """What a job is given: the model's shape, the device, and what it loads from them."""

    shape: Shape
    device: str

    @property
    def times(self) -> int:
        """How many blocks one stands for."""
        return self.shape.blocks_alike

    def model(self) -> tuple[nn.Module, Meter]:
        """The whole model."""
        model = load(self.shape, self.device)
        return model, Meter(self.device)

    def part(self) -> tuple[nn.Module, Meter]:
        """The whole model, or one block where the blocks are alike."""
        model = load_block(self.shape, self.device) if self.times > 1 else load(self.shape, self.device)
        return model, Meter(self.device)

    @property
    def baseline(self) -> Path:
        """What a session saved, for the checks after it."""
        return self.shape.folder / f"baseline-{self.device}.safetensors"

    @property
    def certificate(self) -> Path:
        """What was certified, for the verifications after it."""
        return self.shape.folder / "certificate.json"


def _matrices(model: nn.Module) -> list[Any]:
    from weightproof.weights import iter_weight_matrices

    return list(iter_weight_matrices(model))


def _over(model: nn.Module, function: Callable[[Any, torch.Tensor], object]) -> tuple[Callable[[], None], int]:
    """A call of `function(matrix, weight)` on every matrix, one after the other, and their number."""
    every = _matrices(model)

    def call() -> None:
        with torch.no_grad():
            for matrix in every:
                function(matrix, matrix.load())

    return call, len(every)


# ---------------------------------------------------------------- plain


def folders(job: Job) -> Rows:
    """The model and its int8 version as folders; no row."""
    make(job.shape)
    return {}


def read(job: Job) -> Rows:
    """One pass over every weight."""
    model, meter = job.model()
    weights = [parameter.detach() for parameter in model.parameters()]
    _, row = meter.measure(lambda: [torch.linalg.vector_norm(weight) for weight in weights], repeats=READS)
    row["bytes"] = sum(weight.numel() * weight.element_size() for weight in weights)
    return {"read": row}


def svdvals(job: Job) -> Rows:
    """Every matrix as it is stored."""
    model, meter = job.part()
    call, count = _over(model, lambda _, weight: torch.linalg.svdvals(weight))
    return {"svdvals": meter.measure(call, times=job.times, matrices=count)[1]}


# ---------------------------------------------------------------- ours


def spectra(job: Job) -> Rows:
    """All singular values, with effective rank and the exponent of the power law."""
    from weightproof.spectrum import measure_spectrum

    model, meter = job.part()
    call, count = _over(model, lambda _, weight: measure_spectrum(weight))
    return {"spectra": meter.measure(call, times=job.times, matrices=count)[1]}


def fits(job: Job) -> Rows:
    """The same and the Marchenko-Pastur fit with spikes: what a baseline reads of a matrix."""
    from weightproof.probes import read_whole

    model, meter = job.part()
    call, count = _over(model, read_whole)
    return {"fits": meter.measure(call, times=job.times, matrices=count)[1]}


def baseline(job: Job) -> Rows:
    """A session made: digests, all spectra and fits, circuits, outputs on random tokens."""
    from weightproof import GuardSession

    model, meter = job.model()
    session, row = meter.measure(lambda: GuardSession(model))
    session.baseline.save(job.baseline)
    return {"baseline": row | {"held_bytes": session.cost.baseline_bytes}}


def snapshot(job: Job) -> Rows:
    """A copy of every tensor, in memory."""
    from weightproof.snapshot import Snapshot

    model, meter = job.model()
    return {"snapshot": meter.measure(lambda: Snapshot.capture(model))[1]}


@contextlib.contextmanager
def _clocked(spent: list[tuple[float, float]]) -> Iterator[None]:
    """Note the wall and processor seconds of a block."""
    wall, processor = time.perf_counter(), time.process_time()
    yield
    spent.append((time.perf_counter() - wall, time.process_time() - processor))


def _guarded_edit(job: Job) -> Rows:
    from weightproof import GuardSession
    from weightproof.kinds import Quantize
    from weightproof.transactions.transaction import Transaction

    model, meter = job.model()
    saved = job.baseline if job.baseline.exists() else None
    session = GuardSession(model, baseline=saved)
    editing: list[tuple[float, float]] = []
    judging: list[tuple[float, float]] = []
    judge = Transaction.judge

    def judge_by_the_clock(self: Transaction) -> None:
        with _clocked(judging):
            judge(self)

    def guarded() -> Any:
        with session.edit("int8", kind=Quantize(8), on_violation="monitor") as step, _clocked(editing):
            put_int8(model, job.shape)
        return step

    Transaction.judge = judge_by_the_clock
    try:
        step, row = meter.measure(guarded)
    finally:
        Transaction.judge = judge
    clocks = ("seconds", "processor_seconds")
    whole = row | {clock: row[clock] - editing[0][index] for index, clock in enumerate(clocks)}
    said = {"situation": step.decision.situation, "with_baseline_from_file": saved is not None}
    return {"check": row | said | dict(zip(clocks, judging[0], strict=True)), "edit": whole}


def check_outputs(job: Job) -> Rows:
    """The int8 edit measured and judged, outputs on random tokens too; and the whole transaction around it."""
    found = _guarded_edit(job)
    return {"check_outputs": found["check"], "guarded_edit": found["edit"]}


def check_weights(job: Job) -> Rows:
    """The same for a model whose inputs cannot be guessed: weights alone."""
    from weightproof.judgement import assessment

    assessment.random_windows = lambda _: None
    return {"check_weights": _guarded_edit(job)["check"]}


def certify(job: Job) -> Rows:
    """Two folders compared by their weights, and the certificate written."""
    from weightproof.certifying.certification import Request, certify_folders
    from weightproof.kinds import Quantize
    from weightproof.policy import load_policy

    base, subject = job.shape.folder / BASE, job.shape.folder / INT8
    request = Request(base, subject, load_policy("balanced"), kind=Quantize(8), weights_only=True)
    meter = Meter(job.device)
    certified, row = meter.measure(lambda: certify_folders(request))
    _, written = meter.measure(lambda: certified.certificate.save(job.certificate))
    written["bytes"] = job.certificate.stat().st_size
    return {"certify": row | {"situation": certified.decision.situation}, "certificate": written}


def _verify(job: Job, level: int) -> Row:
    from weightproof.verify import Demands, verify

    if not job.certificate.exists():
        raise FileNotFoundError("no certificate to verify: run the row certify first")
    meter = Meter(job.device)
    demands = Demands(unsigned_ok=True, base=job.shape.folder / BASE)
    found, row = meter.measure(lambda: verify(job.certificate, job.shape.folder / INT8, level, demands))
    if found.status.name != "VALID":
        raise RuntimeError(f"the certificate is {found.status.name}: {[str(one) for one in found.differences[:3]]}")
    return row


def verify_1(job: Job) -> Rows:
    """Digests of every file and tensor."""
    return {"verify_1": _verify(job, 1)}


def verify_2(job: Job) -> Rows:
    """Every reading and verdict again, from both folders."""
    return {"verify_2": _verify(job, 2)}


# ---------------------------------------------------------------- peers

GUARDS = ("invariants", "spectral", "rmt", "variance")


def invarlock(job: Job) -> Rows:
    """Its four guards by its own functions, tier balanced, profile ci, on our random tokens; see detection/peers.py."""
    from invarlock.core.api import RunReport
    from invarlock.core.registry import get_registry
    from invarlock.core.runner import CoreRunner
    from invarlock.core.runner_guards import guard_phase, prepare_guards_phase

    from weightproof.forward.windows import random_windows

    model, registry = load(job.shape, job.device), get_registry()
    windows = random_windows(model)
    assert windows is not None, "both models have a vocabulary in their configuration"
    given = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "window_id": f"preview::{index}"}
        for index, ids in enumerate(row.tolist() for batch in windows.batches for row in batch["input_ids"])
    ]
    meter, report = Meter(job.device), RunReport()
    report.context = {"profile": "ci", "auto": {"tier": "balanced", "enabled": True}}
    guards, adapter = [registry.get_guard(name) for name in GUARDS], registry.get_adapter("hf_causal")
    auto, timings = report.context["auto"], {}
    _, prepare = meter.measure(
        lambda: prepare_guards_phase(CoreRunner(), model, adapter, guards, given, report, auto), windows=len(given)
    )
    put_int8(model, job.shape)
    report.edit = {"name": "int8"}
    answer, check = meter.measure(
        lambda: guard_phase(CoreRunner(), model, adapter, guards, report, guard_timings=timings)
    )
    check["said"] = {name: bool(one["passed"]) for name, one in answer.items()}
    check["seconds_by_guard"] = {name: round(float(value), 3) for name, value in timings.items()}
    return {"invarlock_prepare": prepare, "invarlock_check": check}


# The names that the older guard reads, for those of a Llama.
AS_GPT2 = {
    "q_proj": "attn.c_attn", "k_proj": "attn.c_attn", "v_proj": "attn.c_attn", "o_proj": "attn.c_proj",
    "gate_proj": "mlp.c_fc", "up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj",
}  # fmt: skip


def named_as_gpt2(block: nn.Module) -> nn.Module:
    """The linear maps of a block under names that the older guard reads; the same objects."""
    renamed = nn.Module()
    for name, module in block.named_modules():
        own = name.rpartition(".")[2]
        if own in AS_GPT2:
            inner, _, last = AS_GPT2[own].partition(".")
            side, holder = nn.Module(), nn.Module()
            side.add_module(last, module)
            holder.add_module(inner, side)
            renamed.add_module(own, holder)
    return renamed


def invarlock_rmt(job: Job) -> Rows:
    """The guard of 0.2.0 that decomposes weights: prepare, then after_edit, which measures, and finalize.

    It reads matrices of GPT-2's names alone. On a block of a Llama it is given these names, and the row says so.
    """
    from invarlock.guards.rmt import RMTGuard

    more: Row = {}
    if job.shape.architecture == "gpt2":
        model = load(job.shape, job.device)
        judged, prefix = model, ""
    else:
        model = load_block(job.shape, job.device)
        judged, prefix = named_as_gpt2(model), BLOCK
        more = {"times": job.times, "note": "under GPT-2's names: as it comes it reads no matrix of a Llama"}
    guard, meter = RMTGuard(correct=False), Meter(job.device)
    prepared, row = meter.measure(lambda: guard.prepare(judged))
    if not prepared["ready"]:
        raise RuntimeError(str(prepared.get("error")))
    more["matrices"] = len(guard.baseline_mp_stats)
    put_int8(model, job.shape, prefix)

    def check() -> None:
        guard.after_edit(judged)
        guard.finalize(judged)

    return {"rmt_prepare": row | more, "rmt_check": meter.measure(check)[1] | more}


def weightwatcher(job: Job) -> Rows:
    """analyze() as it comes, once; a comparison takes it before and after."""
    import weightwatcher as tool

    logging.getLogger("weightwatcher").setLevel(logging.CRITICAL)
    model, meter = job.part()
    details, row = meter.measure(lambda: tool.WeightWatcher(model=model).analyze(model=model))
    return {"weightwatcher": row | {"times": job.times, "matrices": len(details)}}


JOBS: dict[str, Callable[[Job], Rows]] = {
    job.__name__: job
    for job in (
        folders, read, svdvals, spectra, fits, baseline, snapshot, check_weights, check_outputs,
        certify, verify_1, verify_2, invarlock, invarlock_rmt, weightwatcher,
    )
}  # fmt: skip


def main(settings: str, model: str, job: str, device: str, out: str) -> None:
    """Run one job; its rows go into the file `out`, what others print goes nowhere."""
    torch.set_num_threads(int(THREADS))
    logging.getLogger("weightproof").setLevel(logging.ERROR)  # the model is random, and it says so
    shape = (SMOKE if settings == "smoke" else FULL)[model]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = JOBS[job](Job(shape, device))
    Path(out).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
