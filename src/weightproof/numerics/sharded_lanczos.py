"""Golub-Kahan-Lanczos on a matrix of which every process holds a part, with one sum per step.

A is cut along one side over the processes. The left vectors u live on the cut side, each process
with its part; the right vectors v live on the other side, on every process. A step from v_k is

    p      = A v_k - beta_{k-1} u_{k-1}                 each process its part, nothing sent
    sum of   [ A_loc' p_loc  |  p_loc' p_loc  |  U_loc' p_loc ]       n + 1 + k numbers, one buffer
    q      = p - U (U'p),   alpha_k^2 = p'p - |U'p|^2,   u_k = q / alpha_k
    r      = A'q / alpha_k - alpha_k v_k,  re-orthogonalised,   beta_k = |r|,   v_{k+1} = r / beta_k

The product is sent before p is normalised and orthogonalised: both are made up for afterwards, for
A'q = A'p - (A'U)(U'p) and A'u_j = alpha_j v_j + beta_j v_{j+1} is known. Nothing but vectors is
sent. A difference W - W_before is formed chunk by chunk in each product, never as a whole, and not
as a difference of two products: for a change of 1 % that would lose 3 of 7 digits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from weightproof.numerics.lanczos import Bidiagonal
from weightproof.numerics.matrices import CHUNK_ELEMENTS, row_chunks, row_major, seeded_generator
from weightproof.numerics.norms import delta_dtype

# 64 MiB of float32: an accelerator has no use for chunks that fit a cache, and each costs it a launch.
DEVICE_CHUNK_ELEMENTS = 1 << 24


class LocalMatrix:
    """This process's part of diag(r) W diag(c), or of diag(r) (W - W_before) diag(c), never formed.

    Args:
        now: The part that lies here, 2-D as stored; either side may be empty.
        before: The same part of the state before, on any device; None for the matrix itself.
        cut_dim: 0 when the rows of the stored matrix are cut, 1 when its columns are.
        cut_scale: This part of the scale of the cut side, or None.
        free_scale: The whole scale of the other side, or None.

    Half precision and float64 are read as float32; a difference is taken before that.
    """

    def __init__(
        self,
        now: torch.Tensor,
        before: torch.Tensor | None = None,
        *,
        cut_dim: int,
        cut_scale: torch.Tensor | None = None,
        free_scale: torch.Tensor | None = None,
    ) -> None:
        self.cut_size, self.free_size = now.shape[cut_dim], now.shape[1 - cut_dim]
        self.device = now.device
        self._now, turned = row_major(now.detach())
        self._before = None if before is None else before.detach().t() if turned else before.detach()
        self._cut_first = (cut_dim == 0) != turned
        self._cut_scale, self._free_scale = (
            None if scale is None else scale.to(device=self.device, dtype=torch.float32)
            for scale in (cut_scale, free_scale)
        )

    @property
    def reads(self) -> int:
        """How often `product` reads the elements (of a difference: of both matrices together)."""
        return (1 if self._cut_first else 2) * (1 if self._before is None else 2)

    def product(self, vector: torch.Tensor, minus: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(p, A_loc' p) for p = A_loc vector - minus.

        Args:
            vector: (free_size,) float32.
            minus: (cut_size,) float32, or None for zero.
        """
        if self._free_scale is not None:
            vector = vector * self._free_scale
        left, right = (self._in_one_pass if self._cut_first else self._in_two_passes)(vector, minus)
        return left, right if self._free_scale is None else right * self._free_scale

    def _in_one_pass(self, vector: torch.Tensor, minus: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of A_loc lie together: each chunk serves both products."""
        left = torch.zeros(self.cut_size, dtype=torch.float32, device=self.device)
        right = torch.zeros(self.free_size, dtype=torch.float32, device=self.device)
        for part, chunk in self._chunks():
            left[part] = self._finished(torch.mv(chunk, vector), minus, part)
            right.addmv_(chunk.t(), self._weighted(left[part], part))
        return left, right

    def _in_two_passes(self, vector: torch.Tensor, minus: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of A_loc lie together: p is complete only after all of them."""
        total = torch.zeros(self.cut_size, dtype=torch.float32, device=self.device)
        right = torch.zeros(self.free_size, dtype=torch.float32, device=self.device)
        for part, chunk in self._chunks():
            total.addmv_(chunk.t(), vector[part])
        left = self._finished(total, minus, slice(None))
        weighted = self._weighted(left, slice(None))
        for part, chunk in self._chunks():
            torch.mv(chunk, weighted, out=right[part])
        return left, right

    def _finished(self, product: torch.Tensor, minus: torch.Tensor | None, part: slice) -> torch.Tensor:
        """This part of p, of a product with the matrix as stored."""
        if self._cut_scale is not None:
            product = product * self._cut_scale[part]
        return product if minus is None else product - minus[part]

    def _weighted(self, left: torch.Tensor, part: slice) -> torch.Tensor:
        """What the transpose of the matrix as stored is to be multiplied with."""
        return left if self._cut_scale is None else left * self._cut_scale[part]

    def _chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of the stored rows with their values, or their change, in float32."""
        if self._before is None:
            for part in _slices(self._now):
                yield part, self._now[part].to(torch.float32)
            return
        dtype = delta_dtype(self._now, self._before)
        for part, new, old in paired_chunks(self._now, self._before, dtype):
            yield part, torch.sub(new, old).to(torch.float32)


def _slices(matrix: torch.Tensor) -> Iterator[slice]:
    """Slices of consecutive rows; none of an empty part."""
    if matrix.numel() == 0:
        return iter(())
    rows, cols = matrix.shape
    return row_chunks(rows, cols, CHUNK_ELEMENTS if matrix.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS)


def paired_chunks(
    now: torch.Tensor, before: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Slices of consecutive rows with both values in `dtype`, on the device of `now`."""
    for part in _slices(now):
        yield part, now[part].to(dtype), before[part].to(device=now.device, dtype=dtype)


class ShardedGolubKahan:
    """A growing bidiagonalisation whose products are summed over the processes by the caller.

    `send` gives the buffer of one step, `receive` takes its sum over all processes; `found` gives the
    buffer of the coefficients, `coefficients` takes its sum. No step waits for the device: where the
    Krylov space is exhausted the steps go on with zeros or noise, and `Bidiagonal.from_steps` cuts them off.

    Args:
        matrix: The part that lies here.
        key: Salt of the start vector, the same on every process, for example (name, step).
        leads: Whether this is the process whose coefficients all go by.

    Memory in float32 after k steps: (k + 1) free_size for the right, k cut_size for the left vectors.
    """

    def __init__(self, matrix: LocalMatrix, *, key: object, leads: bool) -> None:
        self.matrix, self._leads = matrix, leads
        generator = seeded_generator("golub-kahan", key)
        start = torch.randn(matrix.free_size, generator=generator, dtype=torch.float32, device="cpu")
        self._right = (start / torch.linalg.vector_norm(start)).to(matrix.device)[None]
        self._left = torch.empty(0, matrix.cut_size, dtype=torch.float32, device=matrix.device)
        self._coefficients = torch.empty(0, 2, dtype=torch.float32, device=matrix.device)
        self._pending = torch.empty(0)
        self.steps = 0

    @property
    def reads(self) -> int:
        """How often the elements have been read."""
        return self.matrix.reads * self.steps

    def reserve(self, steps: int) -> None:
        """Make room for `steps` steps in all."""
        self._right = _grown(self._right, steps + 1)
        self._left = _grown(self._left, steps)
        self._coefficients = _grown(self._coefficients, steps)

    def send(self) -> torch.Tensor:
        """(free_size + 1 + steps,): this process's part of what the next step needs of all."""
        taken = self.steps
        minus = self._left[taken - 1] * self._coefficients[taken - 1, 1] if taken else None
        self._pending, product = self.matrix.product(self._right[taken], minus)
        square = torch.dot(self._pending, self._pending)
        return torch.cat([product, square[None], torch.mv(self._left[:taken], self._pending)])

    def receive(self, total: torch.Tensor) -> None:
        """Take the step, given the sum over all processes of what they sent."""
        taken, size = self.steps, self.matrix.free_size
        product, square, overlaps = total[:size], total[size], total[size + 1 :]
        alpha = (square - torch.dot(overlaps, overlaps)).clamp(min=0.0).sqrt()
        scale = _inverse(alpha)
        left = torch.addmv(self._pending, self._left[:taken].t(), overlaps, alpha=-1.0)
        torch.mul(left, scale, out=self._left[taken])
        basis = self._right[: taken + 1]
        # What is known goes first: what the basis then removes is of the size of rounding, so that a
        # departure of the basis from orthogonality is not amplified from step to step.
        known = torch.cat([self._coefficients[:taken, 0] * overlaps, (alpha * alpha)[None]])
        known[1:].addcmul_(self._coefficients[:taken, 1], overlaps)
        right = torch.addmv(product, basis.t(), known, alpha=-1.0) * scale
        right = torch.addmv(right, basis.t(), torch.mv(basis, right), alpha=-1.0)
        beta = torch.linalg.vector_norm(right)
        torch.mul(right, _inverse(beta), out=self._right[taken + 1])
        self._coefficients[taken, 0], self._coefficients[taken, 1] = alpha, beta
        self.steps += 1

    def found(self) -> torch.Tensor:
        """(2 steps,): alphas, then betas; zeros where another process leads, so that the sum is the leader's.

        The betas were computed here, from equal sums, but not every processor rounds alike.
        """
        found = self._coefficients[: self.steps].t().flatten()
        return found if self._leads else torch.zeros_like(found)

    def coefficients(self, total: torch.Tensor) -> Bidiagonal:
        """What the steps prove, given the sum over all processes of what they found."""
        numbers = total.tolist()
        return Bidiagonal.from_steps(numbers[: self.steps], numbers[self.steps :], size=self.matrix.free_size)


def _inverse(value: torch.Tensor) -> torch.Tensor:
    """1 / value, and 0 for 0 and NaN."""
    return torch.where(value > 0.0, 1.0 / value, torch.zeros_like(value))


def _grown(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The same rows in memory for at least `count` of them."""
    if rows.shape[0] >= count:
        return rows
    grown = torch.empty(count, rows.shape[1], dtype=rows.dtype, device=rows.device)
    grown[: rows.shape[0]] = rows
    return grown
