"""What fitting factors and an edit by them cost: `make benchmark-factors`. One torch thread.

Fitting is timed against one forward and backward pass on the same tokens with gradients of all parameters: a training
step without the optimizer. The model is a Llama of 8 layers, 768 wide, hidden layers of 2048; gate and up of its last
three layers get factors. All rows are interleaved in one run, each is the median of its repeats. kronfluence takes
part where it is installed (`make test-kronfluence` makes such an environment), with the same labels and matrices.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch_memory import peak_bytes
from transformers import LlamaConfig, LlamaForCausalLM

from weightproof.curvature.eigenbasis import Eigenbasis
from weightproof.curvature.fitting import fit_factors
from weightproof.curvature.mask import staircase
from weightproof.curvature.projection import FactorBases, project

RESULT = Path(__file__).with_name("factors.json")
PAGE = Path(__file__).parents[1] / "docs" / "kfac.md"
MARKS = "<!-- cost: begin -->\n", "\n<!-- cost: end -->"
LAYERS, WIDTH, HIDDEN, VOCABULARY = 8, 768, 2048, 8192
BATCHES, WINDOWS, LENGTH = 2, 4, 512
INCLUDE = {
    "gate and up of 3 layers": tuple(f"*layers.{one}.mlp.{name}_proj*" for one in (5, 6, 7) for name in ("gate", "up")),
    "gate, up and down of 3 layers": tuple(f"*layers.{one}.mlp.*" for one in (5, 6, 7)),
    "gate and up of all 8 layers": ("*.mlp.gate_proj*", "*.mlp.up_proj*"),
}
REPEATS = 3
MASK = (11008, 4096)
EDIT = (4096, 1024)


def model() -> nn.Module:
    """Untrained: what is timed does not depend on the weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=12, num_key_value_heads=12, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def data() -> list[dict[str, torch.Tensor]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=generator)} for _ in range(BATCHES)]


def forward_and_backward(subject: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    """What a training step computes."""
    for batch in batches:
        subject(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        subject.zero_grad(set_to_none=True)


def fitting_rows(subject: nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, Callable[[], object]]:
    """What is timed, by its name."""

    def fit(include: tuple[str, ...], labels: str) -> Callable[[], object]:
        return lambda: fit_factors(subject, batches, include, labels, progress=False, require_full_rank=False)

    rows: dict[str, Callable[[], object]] = {"forward and backward": lambda: forward_and_backward(subject, batches)}
    rows |= {f"fit {name}": fit(include, "sampled") for name, include in INCLUDE.items()}
    first = next(iter(INCLUDE))
    rows[f"fit {first}, labels of the data"] = fit(INCLUDE[first], "empirical")
    if find_spec("kronfluence") is not None:
        rows[f"kronfluence, {first}"] = kronfluence(subject, batches, 3)
    return rows


def kronfluence(subject: nn.Module, batches: list[dict[str, torch.Tensor]], layers: int) -> Callable[[], object]:
    """The same factors by kronfluence, with labels of the data: a copy of the model, since it wraps the modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task

    names = [f"model.layers.{one}.mlp.{name}_proj" for one in range(LAYERS - layers, LAYERS) for name in ("gate", "up")]

    class Language(Task):
        """Causal loss, summed."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> torch.Tensor:
            """Labels of the data."""
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1)
            return nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> torch.Tensor:
            """Not used here."""
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            """Gate and up of the last layers."""
            return names

    rows = [{"input_ids": row} for batch in batches for row in batch["input_ids"]]
    task = Language()
    prepared = prepare_model(copy.deepcopy(subject), task)
    folder = tempfile.mkdtemp()

    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            analyzer = Analyzer("benchmark", prepared, task, cpu=True, disable_tqdm=True, output_dir=folder)
            analyzer.fit_covariance_matrices(
                "timed", rows, per_device_batch_size=WINDOWS, overwrite_output_dir=True,
                factor_args=FactorArguments(strategy="kfac", use_empirical_fisher=True),
            )  # fmt: skip

    return run


def medians(rows: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Processor seconds of each row, interleaved."""
    found: dict[str, list[float]] = {name: [] for name in rows}
    for repeat in range(REPEATS):
        for name, work in rows.items():
            begin = time.process_time()
            work()
            found[name].append(time.process_time() - begin)
            print(f"repeat {repeat}: {name}: {found[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in found.items()}


def spectrum(size: int, power: float) -> torch.Tensor:
    """Eigenvalues of a power law, in descending order."""
    return torch.arange(1, size + 1, dtype=torch.float64) ** -power


def mask_row() -> dict[str, Any]:
    """Milliseconds of the mask of the largest matrix, for each share, and the largest memory that it takes."""
    lam, mu = spectrum(MASK[0], 1.1), spectrum(MASK[1], 0.8)
    shares = (0.5, 0.6, 0.9, 0.99)
    found = {}
    for share in shares:
        times = []
        for _ in range(2 * REPEATS + 1):
            begin = time.process_time()
            staircase(lam, mu, share)
            times.append(time.process_time() - begin)
        found[str(share)] = round(1e3 * statistics.median(times), 2)
    peak = peak_bytes(lambda: staircase(lam, mu, 0.6))
    return {"shape": list(MASK), "ms": found, "peak_bytes": peak, "bytes_of_a_boolean_mask": MASK[0] * MASK[1]}


def edit_row() -> dict[str, Any]:
    """Memory of an edit over that of the matrix; eigenbases are counted apart, being made before and kept."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*EDIT, generator=generator)
    bases = FactorBases(
        *(
            Eigenbasis(
                spectrum(size, 1.0), torch.linalg.qr(torch.randn(size, size, generator=generator))[0].double(), 1.0
            )
            for size in EDIT
        )
    )
    found = {
        formula: round(peak_bytes(lambda formula=formula: project(weight, bases, 0.9, formula)) / weight.nbytes, 2)
        for formula in ("original", "modified")
    }
    basis = sum(one.nbytes for one in (bases.gradient, bases.activation)) / weight.nbytes
    return {
        "shape": list(EDIT),
        "dtype": "float32",
        "peak_in_matrices": found,
        "eigenbases_in_matrices": round(basis, 2),
    }


def table(result: dict[str, Any]) -> str:
    """Rows of `fit` for docs/kfac.md."""
    rows = [f"| {name} | {one['s']:.1f} | {one['ratio']:.2f} |" for name, one in result["fit"].items()]
    return "\n".join(["| | s | multiple |", "| --- | --- | --- |", *rows])


def write(result: dict[str, Any]) -> None:
    """The numbers, and the table of the page."""
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    PAGE.write_text(before + MARKS[0] + table(result) + MARKS[1] + rest.split(MARKS[1])[1], encoding="utf-8")


def main() -> None:
    """Measure, show, and write with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write factors.json and the table of docs/kfac.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    subject, batches = model(), data()
    seconds = medians(fitting_rows(subject, batches))
    base = seconds["forward and backward"]
    result = {
        "model": {"layers": LAYERS, "width": WIDTH, "hidden": HIDDEN, "vocabulary": VOCABULARY},
        "tokens": BATCHES * WINDOWS * LENGTH,
        "threads": 1,
        "torch": version("torch"),
        "kronfluence": version("kronfluence") if find_spec("kronfluence") else None,
        "fit": {name: {"s": round(one, 3), "ratio": round(one / base, 3)} for name, one in seconds.items()},
        "mask": mask_row(),
        "edit": edit_row(),
    }
    print(json.dumps(result, indent=1))
    if given.write:
        write(result)


if __name__ == "__main__":
    main()
