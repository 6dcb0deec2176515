"""Matrices as data: noise, spikes, low rank, dead rows, extreme sizes, and changes of them. All float32."""

from __future__ import annotations

import math

import numpy as np
import torch


def orthonormal(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((rows, cols)))[0]


def spiked(rng: np.random.Generator, m: int, n: int, strengths: np.ndarray) -> np.ndarray:
    """Noise of standard deviation .02 and singular values of `strengths` times its edge."""
    left, right = orthonormal(rng, m, len(strengths)), orthonormal(rng, n, len(strengths))
    edge = 0.02 * (math.sqrt(m) + math.sqrt(n))
    return 0.02 * rng.standard_normal((m, n)) + edge * (left * strengths) @ right.T


def decaying(rng: np.random.Generator, m: int, n: int, values: np.ndarray) -> np.ndarray:
    """Singular values `values`, of which there are min(m, n), and random singular vectors."""
    return (orthonormal(rng, m, len(values)) * values) @ orthonormal(rng, n, len(values)).T


MAKERS = {
    "tall noise": lambda rng: 0.02 * rng.standard_normal((201, 80)),
    "wide noise": lambda rng: 0.02 * rng.standard_normal((81, 200)),
    "spiked": lambda rng: spiked(rng, 97, 160, np.linspace(3, 1, 8)),
    "power law": lambda rng: spiked(rng, 130, 310, 6 * np.arange(1, 33) ** -0.5),
    "unequal rows": lambda rng: rng.standard_normal((90, 60)) * np.exp(rng.standard_normal((90, 1))),
    "low rank": lambda rng: 0.1 * rng.standard_normal((120, 3)) @ rng.standard_normal((3, 90)),
    "one row": lambda rng: rng.standard_normal((1, 33)),
    "one column": lambda rng: rng.standard_normal((33, 1)),
    "one entry": lambda _: np.array([[-2.5]]),
    "three rows": lambda rng: rng.standard_normal((3, 40)),
    "zero": lambda _: np.zeros((20, 30)),
    "a zero row": lambda rng: rng.standard_normal((40, 60)) * (np.arange(40) != 3)[:, None],
    "zero columns": lambda rng: rng.standard_normal((40, 60)) * (np.arange(60) > 20),
    "tiny": lambda rng: 1e-30 * rng.standard_normal((70, 50)),
    "huge": lambda rng: 1e30 * rng.standard_normal((70, 50)),
    "a tiny row": lambda rng: rng.standard_normal((40, 60)) * np.where(np.arange(40) == 3, 1e-25, 1.0)[:, None],
}


def make(name: str) -> torch.Tensor:
    return torch.from_numpy(MAKERS[name](np.random.default_rng(7))).float()


def ladder_matrices(every: int = 1):
    """(index, matrix): 48 spiked matrices whose spikes are 1.6 to 10 times the edge and decay differently."""
    shapes = [(96, 64), (64, 96), (80, 80), (120, 48)]
    for index in range(0, 48, every):
        m, n = shapes[(index // every) % 4]
        strengths = (1.6 + 8.4 * index / 47) * np.arange(1, 17) ** -(0.25 + 0.55 * (index % 12) / 11)
        yield index, torch.from_numpy(spiked(np.random.default_rng(100 + index), m, n, strengths)).float()


def rounded(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric round-to-nearest with one scale per row, kept in the matrix's dtype."""
    step = matrix.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(step > 0, (matrix / step).round() * step, matrix)


def planted(matrix: torch.Tensor, strength: float, seed: int) -> torch.Tensor:
    """The matrix plus a rank-one term orthogonal to its leading 8 left and right singular vectors."""
    rng = np.random.default_rng(500 + seed)
    left, _, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    u, v = rng.standard_normal(matrix.shape[0]), rng.standard_normal(matrix.shape[1])
    u, v = u - left[:, :8] @ (left[:, :8].T @ u), v - right[:8].T @ (right[:8] @ v)
    return matrix + strength * torch.from_numpy(np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v))).float()
