"""Spectra of products of matrices that stay as they are when the function does: pure numerics.

A head reads its input twice (W_q, W_k) and writes it once (W_o W_v); only these products matter, not their factors. The
singular values of W_q' W_k and W_o W_v come from head_dim x head_dim Gram matrices: those of A' B are the square
roots of the eigenvalues of (A A') (B B'), so nothing of the size of the model's width squared is ever formed. A neuron
is known by the norm of what it reads times the norm of what it writes.

A gain g of the norm in front is folded in (W diag(g)); biases are outside. Everything is in float64, where a Gram
matrix resolves singular values down to about 1e-8 of the largest.

Reference: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from weightproof.numerics.matrices import full_precision, row_chunks, row_major

# What is kept of one circuit of a layer: a baseline file holds four or so of them for every layer.
MOST_VALUES = 512
# Of which so many of the largest are kept one by one; the rest as root mean squares of equal groups.
TOP_SHARE = 0.25


@full_precision
def head_grams(matrix: torch.Tensor, num_heads: int, gain: torch.Tensor | None = None) -> torch.Tensor:
    """W_h diag(gain)^2 W_h' of every head.

    Args:
        matrix: (num_heads * head_dim, d), the rows of each head together; `W_o.t()` for an output projection.
        num_heads: Number of heads.
        gain: (d,) factors of the input; None for ones.

    Returns:
        (num_heads, head_dim, head_dim) float64.
    """
    head_dim = matrix.shape[0] // num_heads
    factor = None if gain is None else gain.to(matrix.device, torch.float64)
    grams = torch.empty(num_heads, head_dim, head_dim, dtype=torch.float64, device=matrix.device)
    for head in range(num_heads):
        rows = matrix[head * head_dim : (head + 1) * head_dim].to(torch.float64)
        if factor is not None:
            rows = rows * factor
        grams[head] = rows @ rows.t()
    return grams


def normalised_grams(grams: torch.Tensor, norm_gain: torch.Tensor) -> torch.Tensor:
    """Grams of heads whose output is normalised before it is used (Qwen3, OLMo2): their own scale does not matter.

    Args:
        grams: (num_heads, head_dim, head_dim).
        norm_gain: Gain of the norm behind the projection, (head_dim,) for one norm per head, or
            (num_heads * head_dim,) for one over all of them.

    Returns:
        diag(g) G diag(g) / trace, (num_heads, head_dim, head_dim); zero heads stay zero.
    """
    num_heads, head_dim, _ = grams.shape
    gain = norm_gain.to(grams).reshape(-1, head_dim)
    traces = grams.diagonal(dim1=1, dim2=2).sum(1)
    size = traces if gain.shape[0] == 1 else traces.sum().expand(num_heads)
    scaled = grams * gain[:, :, None] * gain[:, None, :]
    return scaled / torch.where(size > 0, size, torch.ones_like(size))[:, None, None]


@full_precision
def product_spectra(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Singular values of A_h' B_h of every head from the Grams A_h A_h' and B_h B_h'.

    Args:
        left: (num_heads, head_dim, head_dim).
        right: (num_kv_heads, head_dim, head_dim); each is shared by consecutive heads of `left`.

    Returns:
        (num_heads, head_dim) float64, descending; NaN where a Gram is not finite.
    """
    shared = right.repeat_interleave(left.shape[0] // right.shape[0], dim=0)
    if not bool(torch.isfinite(left).all() and torch.isfinite(shared).all()):
        return torch.full(left.shape[:2], math.nan, dtype=torch.float64)
    # Brought to size one first: the fourth power of an entry must neither overflow nor vanish.
    sizes = [gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=torch.finfo(torch.float64).tiny) for gram in (left, shared)]
    root = _root(left / sizes[0][:, None, None])
    squares = torch.linalg.eigvalsh(root.mT @ (shared / sizes[1][:, None, None]) @ root)
    scale = sizes[0].sqrt() * sizes[1].sqrt()
    return (squares.flip(1).clamp(min=0.0).sqrt() * scale[:, None]).cpu()


def _root(grams: torch.Tensor) -> torch.Tensor:
    """Any R with R R' = G, of every G."""
    factor, failed = torch.linalg.cholesky_ex(grams)
    if not bool(failed.any()):
        return factor
    values, vectors = torch.linalg.eigh(grams)  # some are of lower rank
    return vectors * values.clamp(min=0.0).sqrt()[:, None, :]


@full_precision
def row_norms(matrix: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
    """||W_i diag(gain)|| of every row, (rows,) float64."""
    factor = None if gain is None else gain.to(matrix.device, torch.float64)
    stored, turned = row_major(matrix)
    squares = torch.zeros(matrix.shape[0], dtype=torch.float64, device=matrix.device)
    for part in row_chunks(*stored.shape):
        chunk = stored[part].to(torch.float64)
        if factor is not None:
            chunk = chunk * (factor[part, None] if turned else factor)
        if turned:
            squares += chunk.square().sum(0)
        else:
            squares[part] = torch.linalg.vector_norm(chunk, dim=1).square()
    return squares.sqrt().cpu()


def summary(values: torch.Tensor, most: int = MOST_VALUES) -> tuple[float, ...]:
    """At most `most` numbers for a multiset of values, descending.

    A quarter are the largest values, one by one; the others are root mean squares of consecutive groups of the sorted
    rest, as equal in size as they can be. Up to `most` values are given as they are.
    """
    ordered = values.flatten().sort(descending=True).values
    if len(ordered) <= most:
        return tuple(ordered.tolist())
    top = int(most * TOP_SHARE)
    groups = ordered[top:].tensor_split(most - top)
    return (*ordered[:top].tolist(), *(float(group.square().mean().sqrt()) for group in groups))


def spectrum_distance(before: Sequence[float], after: Sequence[float]) -> float:
    """||sort(after) - sort(before)|| / ||before||: how far a multiset of singular values moved, in either direction.

    It is the 2-Wasserstein distance between the two multisets over the root mean square of the first: no assignment of
    values to one another makes it smaller. 0 for two zero spectra, inf from a zero one.

    Raises:
        ValueError: If the two differ in length.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} values before and {len(after)} after")
    size, moved = math.hypot(*before), math.dist(sorted(before), sorted(after))  # sums of squares would underflow
    if size == 0.0:
        return 0.0 if moved == 0.0 else math.inf
    return moved / size


def log_size_ratio(before: Sequence[float], after: Sequence[float]) -> float | None:
    """log(||after|| / ||before||); None from a zero spectrum, -inf to one."""
    old, new = (math.hypot(*values) for values in (before, after))
    if old == 0.0:
        return None
    return math.log(new / old) if new > 0.0 else -math.inf
