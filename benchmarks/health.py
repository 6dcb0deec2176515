"""What training health costs a training step at the default cadence, and what its parts cost.

Run `python benchmarks/health.py` (half a minute on one free core); it writes `health.json`. Reports and training steps
are timed in turn, in seconds of processor time of one thread, so that other work on the machine counts little.
`python benchmarks/health.py cases` prints the table of four cases instead: a small Llama at initialisation, trained,
with one matrix scaled until the residual stream explodes, and with its head scaled until gradients are at the floor.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rolling import LENGTH, ROWS, demo_model

from weightproof import HealthCallback, health
from weightproof_callbacks.health_callback import DEFAULT_EVERY

REPEATS = 3


def seconds(act) -> float:
    """Processor time of one call."""
    began = time.process_time()
    act()
    return time.process_time() - began


def tokens(rows: int, seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 4096, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def cases() -> None:
    """The four cases, as a Markdown table."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
    import trained_models

    trained = trained_models.load("llama")
    exploding, floor = copy.deepcopy(trained.model), copy.deepcopy(trained.model)
    with torch.no_grad():
        exploding.model.layers[1].mlp.down_proj.weight.mul_(1e5)
        floor.lm_head.weight.mul_(1e-9)
    named = {
        "healthy, at initialisation": (trained_models.untrained("llama"), True),
        "healthy, trained": (trained.model, False),
        "exploding (one down_proj x 1e5)": (exploding, False),
        "gradient at the floor (head x 1e-9)": (floor, False),
    }
    columns = ("residual_growth", "gradient_floor", "scale_product", "stability")
    print(f"| case | {' | '.join(columns)} | depth_utility (skip) | report |")
    print("| --- " * (len(columns) + 3) + "|")
    for name, (model, in_warmup) in named.items():
        found = health.diagnose(model, trained.heldout, in_warmup=in_warmup, depth="skip", digest=False)
        cells = [found.diagnostics[one] for one in (*columns, "depth_utility")]
        text = [f"{one.value:.2g} {one.status}" for one in cells]
        print(f"| {name} | {' | '.join(text)} | {found.verdict} |")


def main() -> dict[str, object]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = demo_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    sizes = HealthCallback([]).sizes
    batches = [tokens(sizes["rows"], seed) for seed in range(sizes["batches"])]
    training = tokens(ROWS, 100)

    def step() -> None:
        model(**training).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def report() -> None:
        health.diagnose(model, batches, digest=False)

    def plain_passes() -> None:
        """The same passes by hand, with gradients of all weights, and nothing read from them."""
        model.eval()
        for batch in batches:
            torch.autograd.grad(model(**batch).loss, list(model.parameters()))
        model.train()

    def with_depth() -> None:
        health.diagnose(model, batches, digest=False, depth="skip")

    step()
    timed = {"step": [], "report": [], "plain_passes": []}
    for _ in range(REPEATS):
        timed["step"] += [seconds(step), seconds(step)]
        timed["report"].append(seconds(report))
        timed["plain_passes"].append(seconds(plain_passes))
    one_step, one_report = median(timed["step"]), median(timed["report"])
    found = {
        "parameters": sum(one.numel() for one in model.parameters()),
        "tokens_of_a_step": ROWS * LENGTH,
        "tokens_of_a_report": sizes["rows"] * sizes["batches"] * LENGTH,
        "every": DEFAULT_EVERY,
        "step_ms": round(1e3 * one_step, 1),
        "report_ms": round(1e3 * one_report, 1),
        "plain_passes_ms": round(1e3 * median(timed["plain_passes"]), 1),
        "report_with_skipped_blocks_ms": round(1e3 * seconds(with_depth), 1),
        "report_in_steps": round(one_report / one_step, 2),
        "share_of_training_percent": round(100 * one_report / one_step / DEFAULT_EVERY, 3),
        "torch": torch.__version__,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    cases() if sys.argv[1:] == ["cases"] else main()
