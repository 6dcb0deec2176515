"""Every candidate subspace and every ceiling, by name."""

from __future__ import annotations

from weightproof.candidates.activation_side import ACTIVATION_CEILING, ACTIVATION_SIDE
from weightproof.candidates.candidate import Candidate
from weightproof.candidates.compound import COMPOUND
from weightproof.candidates.from_weights import WEIGHT_CEILINGS, WEIGHT_SIDE

CANDIDATES: tuple[Candidate, ...] = (*WEIGHT_SIDE, *ACTIVATION_SIDE, *COMPOUND, *WEIGHT_CEILINGS, ACTIVATION_CEILING)
