"""Quantization grids: the step and the zero point of a scale group, and rounding to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Steps(NamedTuple):
    """Levels Delta * (q - zero) for whole q from `lowest` to `highest`; 0 is always one of them.

    `delta` and `zero` broadcast against the values they are for.
    """

    delta: Tensor
    zero: Tensor
    lowest: int
    highest: int

    def nearest(self, values: Tensor) -> Tensor:
        """Each value's nearest level (ties to the even multiple of Delta); NaN where the step is not finite."""
        codes = torch.round(values / self.delta)
        if self.lowest:  # symmetric: there is no zero point
            return codes.clamp_(self.lowest, self.highest).mul_(self.delta)
        codes.add_(self.zero).clamp_(self.lowest, self.highest)
        return codes.sub_(self.zero).mul_(self.delta)


def steps_of(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> Steps:
    """The grid for values between `low` and `high`.

    Symmetric: Delta = max(|low|, |high|) / (2^(bits-1) - 1), 2^bits - 1 levels around 0. Asymmetric:
    Delta = (max(high, 0) - min(low, 0)) / (2^bits - 1) and the whole zero point nearest to -min(low, 0) / Delta,
    so that all 2^bits levels lie in the range. Either step is at most that of the symmetric grid.

    Args:
        low: Smallest value of each group, float32 or float64.
        high: Largest value of each group.
        bits: 2 or more.
        symmetric: Which of the two.
    """
    if symmetric:
        top = 2 ** (bits - 1) - 1
        delta = torch.maximum(low.abs(), high.abs()) / top
        return Steps(torch.where(delta == 0, 1.0, delta), torch.zeros_like(delta), -top, top)
    top = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    # Halved first: the width of a range may overflow where its ends do not.
    delta = (high / 2 - low / 2) * (2 / top)
    delta = torch.where(delta == 0, 1.0, delta)
    return Steps(delta, torch.round(-low / delta), 0, top)


def range_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each row, (rows, 1)."""
    return values.amin(1, keepdim=True), values.amax(1, keepdim=True)  # some forty times faster than aminmax(dim=1)
