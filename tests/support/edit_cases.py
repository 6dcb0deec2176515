"""Matrices on which every edit is held against its oracle, and the oracles themselves."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import matrix_cases
import numpy as np
import torch
from torch import nn

from weightproof.collective import Processes
from weightproof.types import WeightMatrix
from weightproof.weights import iter_weight_matrices

NAME = "layers.0.mlp.up_proj.weight"


def oracle(name: str) -> Any:
    """A module of tests/oracles."""
    path = Path(__file__).parents[1] / "oracles" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"oracle_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def matrix_of(weight: torch.Tensor, name: str = NAME, family: str = "ffn", refusal: str | None = None) -> WeightMatrix:
    """A tensor as a weight matrix."""
    return WeightMatrix(name, family, *weight.shape, weight.dtype, (), name, lambda: weight, refusal=refusal)


def _heavy(rng: np.random.Generator) -> np.ndarray:
    return 0.02 * rng.standard_t(1.5, (24, 40))


def _tied(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(-3, 4, (24, 40)) / 8


MAKERS = {
    "random": lambda rng: 0.02 * rng.standard_normal((24, 40)),
    "spiked": lambda rng: matrix_cases.spiked(rng, 24, 40, np.linspace(8, 2, 4)),
    "low rank": lambda rng: 0.1 * rng.standard_normal((24, 3)) @ rng.standard_normal((3, 40)),
    "heavy tails": _heavy,
    "ties": _tied,
    "positive": lambda rng: rng.random((24, 40)) + 0.5,
    "zero": lambda _: np.zeros((24, 40)),
    "one row": lambda rng: rng.standard_normal((1, 40)),
    "one column": lambda rng: rng.standard_normal((24, 1)),
    "one entry": lambda _: np.array([[-2.5]]),
    "tall": lambda rng: rng.standard_normal((40, 24)),
    "tiny": lambda rng: 1e-30 * rng.standard_normal((24, 40)),
    "huge": lambda rng: 1e30 * rng.standard_normal((24, 40)),
}
CASES = tuple(MAKERS)


def case(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One of the matrices."""
    return torch.from_numpy(MAKERS[name](np.random.default_rng(11))).to(dtype)


def turned(weight: torch.Tensor) -> torch.Tensor:
    """The same values, stored (in, out) and seen through a transposed view, as of transformers' Conv1D."""
    return weight.T.contiguous().T


class Session:
    """What `prepare` needs of a guard session."""

    def __init__(self, model: nn.Module, windows: tuple[Any, ...] = (), processes: Processes | None = None) -> None:
        self.model, self.windows, self.processes = model, windows, processes or Processes.alone()


def matrices(model: nn.Module) -> dict[str, WeightMatrix]:
    """Weight matrices by name."""
    return {matrix.name: matrix for matrix in iter_weight_matrices(model)}


def small_mlp(widths: tuple[int, ...] = (12, 16, 8), seed: int = 0) -> nn.Module:
    """Linear maps named as those of a feed-forward block."""
    torch.manual_seed(seed)
    maps = [nn.Linear(n, m) for n, m in itertools.pairwise(widths)]
    return nn.ModuleDict({"mlp": nn.ModuleList(maps)})
