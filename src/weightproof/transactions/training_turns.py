"""What a window of training reads in turn: everything that is only reported, a share at each check.

Judged at every check are finiteness of weights and outputs, and gross growth of every matrix; both need little. What is
reported beside them (norms and spike counts to a few percent, the divergence of the outputs) takes most of the time of
a check, and hardly changes from one window to the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from weightproof.types import MatrixReading

__all__ = ["TrainingTurns"]

# Exact spectra refreshed in one window: about a quarter of a second of one core.
_FLOPS = 1e10
# Checks in which every norm is read once as closely as after an edit, and the spikes of every small matrix.
_TURNS = 8


class TrainingTurns:
    """Whose turn it is, the same on every process, for any number of them, and after a resume.

    Args:
        state: That of an earlier session, to go on from.
    """

    def __init__(self, state: Sequence[int] = (0, 0, 0)) -> None:
        self._next_bulk, self._next_norm, self._next_outputs = state

    @property
    def state(self) -> tuple[int, int, int]:
        """What a session that goes on must know."""
        return self._next_bulk, self._next_norm, self._next_outputs

    def bulk_names(self, matrices: Mapping[str, MatrixReading], *, is_window: bool) -> list[str]:
        """Matrices whose spikes are counted now: few large ones, or many small ones.

        Args:
            matrices: All matrices.
            is_window: Whether there will be further windows: each counts a share then, however small they are.
        """
        names = sorted(matrices)
        most = math.ceil(len(names) / _TURNS) if is_window else len(names)
        chosen: list[str] = []
        budget = _FLOPS
        while budget > 0 and len(chosen) < most:
            name = names[self._next_bulk % len(names)]
            self._next_bulk += 1
            small, large = sorted((matrices[name].d_out, matrices[name].d_in))
            budget -= 2.0 * small**2 * large + 25.0 * small**3
            chosen.append(name)
        return chosen

    def norm_names(self, matrices: Mapping[str, MatrixReading]) -> frozenset[str]:
        """Matrices whose norms are read closely in this window; of the others it is known that none grew grossly."""
        names = sorted(matrices)
        count = math.ceil(len(names) / _TURNS)
        chosen = frozenset(names[(self._next_norm + i) % len(names)] for i in range(count))
        self._next_norm += count
        return chosen

    def outputs(self) -> int:
        """Number of the turn: which batch of the windows the model is run on."""
        self._next_outputs += 1
        return self._next_outputs - 1
