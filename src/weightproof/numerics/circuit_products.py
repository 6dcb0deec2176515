"""From the tensors of one circuit to its values: which rows of which matrix, with which gain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from weightproof.circuits import head_grams, normalised_grams, product_spectra, row_norms

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows `start` to `end` of a matrix; with `num_groups`, in such units of each of so many groups of three."""

    start: int
    end: int
    num_groups: int | None = None

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """The rows of a (d_out, d_in) matrix, in order."""
        if self.num_groups is None:
            return matrix[self.start : self.end]
        grouped = matrix.reshape(self.num_groups, 3, -1, matrix.shape[1])
        return grouped[:, self.start].reshape(-1, matrix.shape[1])


@dataclass(frozen=True, slots=True)
class Reader:
    """A linear map, or some rows of one, with the gain of the norm that it reads.

    Attributes:
        matrix: Name of the matrix.
        rows: Which of its rows; None for all.
        gain: Name of the gain of its input.
        adds_one: The norm multiplies by 1 + gain.
        transposed: It is taken as (d_in, d_out): an output projection, whose columns belong to heads.
    """

    matrix: str
    rows: Rows | None
    gain: str | None
    adds_one: bool = False
    transposed: bool = False

    def of(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rows and the factors of their input."""
        matrix = tensors[self.matrix]
        chosen = matrix if self.rows is None else self.rows.of(matrix)
        gain = None if self.gain is None else tensors[self.gain].to(torch.float64)
        return chosen.t() if self.transposed else chosen, gain + 1.0 if gain is not None and self.adds_one else gain


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """The norm behind a projection (Qwen3's `q_norm`), by the name of its gain; None where there is none."""

    gain: str | None
    adds_one: bool = False


def head_product(
    heads: tuple[int, int], factors: tuple[Reader, Reader], norms: tuple[HeadNorm, HeadNorm], tensors: Tensors
) -> torch.Tensor:
    """Singular values of A_h' B_h of every head, (num_heads, head_dim) float64.

    Args:
        heads: Heads of the first factor, and of the second, each of which serves several of the first.
        factors: A and B; rows of each head together.
        norms: What their outputs pass before they meet.
        tensors: Everything by name.
    """
    grams: list[torch.Tensor] = []
    for count, factor, norm in zip(heads, factors, norms, strict=True):
        matrix, gain = factor.of(tensors)
        found = head_grams(matrix, count, gain)
        if norm.gain is not None:
            behind = tensors[norm.gain].to(torch.float64)
            found = normalised_grams(found, behind + 1.0 if norm.adds_one else behind)
        grams.append(found)
    return product_spectra(grams[0], grams[1])


def neuron_products(
    up: tuple[Reader, int], gate: tuple[Reader, int] | None, down: str, tensors: Tensors
) -> torch.Tensor:
    """||up row||^n ||down column||, with ||gate row||^m where the gate passes a scale on, (neurons,) float64."""
    values = row_norms(tensors[down].t())
    for part in (up, gate):
        if part is not None:
            values = values * row_norms(*part[0].of(tensors)) ** part[1]
    return values


def gate_norms(reader: Reader, tensors: Tensors) -> torch.Tensor:
    """Norm of what each neuron reads in front of an activation that passes no scale on, (neurons,) float64."""
    return row_norms(*reader.of(tensors))
