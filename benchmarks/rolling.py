"""What the rolling guard costs a training step: the watch of the gradients, checks, and good states in memory.

Run `python benchmarks/rolling.py [demo|124m]... [--copies]`; it writes `rolling.json` (`--copies`: these alone, a
minute). Every part is timed where it happens and put in relation to a training step of the same run at the default
cadence (a check every 50 steps). Before each check the weights move as far as in 50 steps.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from weightproof import attach
from weightproof.snapshot import Snapshot
from weightproof_callbacks.gradient_watch import gradient_norm
from weightproof_callbacks.training_state import TrainingState

EVERY = 50
RATE = 1e-4
# Tokens of a step: small for a CPU; every share falls with more of them.
ROWS, LENGTH = 16, 128


def demo_model() -> torch.nn.Module:
    """As `weightproof demo` trains: about 5 million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            use_cache=False,
        )
    )


def gpt2_small() -> torch.nn.Module:
    """GPT-2 small: 124 million parameters."""
    return GPT2LMHeadModel(GPT2Config(use_cache=False, loss_type="ForCausalLM"))


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], int, int]] = {
    "demo": (demo_model, ROWS, 12),
    "124m": (gpt2_small, 4, 3),
}  # name: (model, rows of a step, steps that are timed)


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(name: str) -> dict[str, Any]:
    build, rows, count = MODELS[name]
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.randint(0, 4096, (rows, LENGTH))

    def forward_and_backward() -> None:
        accelerator.backward(model(input_ids=ids, labels=ids).loss)

    def step() -> None:
        forward_and_backward()
        optimizer.step()
        optimizer.zero_grad()

    def window() -> None:
        """Move the weights as far as the steps between two checks would: what is read depends on it."""
        rate(EVERY * RATE)
        step()
        rate(RATE)

    def rate(value: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = value

    step()
    step_seconds = median(timed(step) for _ in range(count))
    forward_and_backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm_seconds = median(timed(lambda: gradient_norm(gradients)) for _ in range(max(3, count)))
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    source = torch.empty(weight_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)
    copy_seconds = median(timed(lambda: target.copy_(source)) for _ in range(5))
    checks: dict[str, Any] = {}
    for rollback in ("weights", "full"):
        guard = attach(accelerator, model, optimizer, every=10**9, rollback=rollback)
        seconds, kept_seconds = [], []
        for _ in range(4):
            window()
            before = guard.session.cost.snapshot_seconds
            state: list[float] = []
            capture = guard.session.rolling.capture
            guard.session.rolling.capture = lambda capture=capture, state=state: _timed_capture(capture, state)
            seconds.append(timed(guard.check))
            guard.session.rolling.capture = capture
            kept_seconds.append(guard.session.cost.snapshot_seconds - before + sum(state))
        checks[rollback] = {
            "check_ms": round(1e3 * median(seconds), 2),
            "good_state_ms": round(1e3 * median(kept_seconds), 2),
            "good_states_MiB": round(guard.session.rolling.nbytes / 2**20, 1),
            "share_of_a_step_percent": round(1e2 * median(seconds) / (EVERY * step_seconds), 3),
            "screen_share_percent": round(1e2 * (median(seconds) - median(kept_seconds)) / (EVERY * step_seconds), 3),
            "good_state_share_percent": round(1e2 * median(kept_seconds) / (EVERY * step_seconds), 3),
        }
        guard.detach()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_of_a_step": rows * LENGTH,
        "step_ms": round(1e3 * step_seconds, 2),
        "gradient_norm_ms": round(1e3 * norm_seconds, 3),
        "gradient_norm_percent": round(1e2 * norm_seconds / step_seconds, 3),
        "copy_of_the_weights_ms": round(1e3 * copy_seconds, 2),
        "weights_MiB": round(weight_bytes / 2**20, 1),
        "rollback": checks,
    }


def copies(name: str) -> dict[str, float]:
    """How fast the copies of a good state are made, beside plain copies of as many bytes into fresh memory."""
    build, *_ = MODELS[name]
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    nbytes = Snapshot.capture(model).nbytes + TrainingState.capture(optimizer=optimizer).nbytes
    source = torch.ones(nbytes, dtype=torch.uint8)

    def good_state() -> tuple[Any, Any]:
        return Snapshot.capture(model), TrainingState.capture(optimizer=optimizer)

    # In turn, and the fastest of each: others use the machine, too.
    each = [(timed(good_state), timed(source.clone)) for _ in range(7)]
    ours, plain = (min(seconds) for seconds in zip(*each, strict=True))
    return {
        "MiB": round(nbytes / 2**20, 1),
        "good_state_GB_per_s": round(nbytes / ours / 1e9, 2),
        "memcpy_GB_per_s": round(nbytes / plain / 1e9, 2),
        "times_memcpy": round(ours / plain, 2),
    }


def _timed_capture(capture: Callable[[], Any], seconds: list[float]) -> Any:
    began = time.perf_counter()
    found = capture()
    seconds.append(time.perf_counter() - began)
    return found


def main() -> None:
    """Measure the chosen models and write the file."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    path = Path(__file__).with_suffix(".json")
    found = json.loads(path.read_text()) if path.exists() else {}
    only_copies = "--copies" in sys.argv
    for name in [name for name in sys.argv[1:] if name in MODELS] or list(MODELS):
        found[name] = found.get(name, {}) if only_copies else measure(name)
        found[name]["copies"] = copies(name)
        print(name, json.dumps(found[name], indent=1))
    found["every"], found["torch"] = EVERY, torch.__version__
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
