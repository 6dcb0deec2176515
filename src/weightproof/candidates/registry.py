"""Every candidate subspace and every ceiling, by name."""

from __future__ import annotations

from weightproof.candidates.candidate import Candidate
from weightproof.candidates.from_weights import WEIGHT_CEILINGS, WEIGHT_SIDE

CANDIDATES: tuple[Candidate, ...] = (*WEIGHT_SIDE, *WEIGHT_CEILINGS)
