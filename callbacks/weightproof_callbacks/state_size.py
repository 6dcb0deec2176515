"""How large a good state of a run is, also before its optimizer has made the moments that it will hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightproof.parallel.placements import local_of
from weightproof.session import GuardSession
from weightproof.snapshots.tensor_store import readable
from weightproof.weights import iter_tensors
from weightproof_callbacks.optimizer_state import stepped_alike
from weightproof_callbacks.state_values import is_composed, plain_parts

__all__ = ["StateSize"]

# Side of the weight on which a trial step is taken: large enough that a block of an 8-bit state is full.
_SIDE = 64


@dataclass(frozen=True, slots=True)
class StateSize:
    """Bytes of one good state on one process.

    Attributes:
        weights: Weights and buffers, with the optimizer's masters.
        moments: What the optimizer keeps of them, once it has stepped.
    """

    weights: int = 0
    moments: int = 0

    @classmethod
    def of(cls, session: GuardSession, optimizer: Any, with_moments: bool) -> StateSize:
        """Measure a run; of moments that are not there yet as much as a trial step of the optimizer's class makes."""
        kept = [local_of(named.tensor) for named in iter_tensors(session.model)]
        masters = session.masters.tensors().values() if session.masters is not None else ()
        weights = sum(tensor.nbytes for tensor in (*kept, *masters))
        return cls(weights, _moments(getattr(optimizer, "optimizer", optimizer)) if with_moments else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.weights + self.moments

    def __add__(self, other: StateSize) -> StateSize:
        """Of two processes together."""
        return StateSize(self.weights + other.weights, self.moments + other.moments)

    def __str__(self) -> str:
        """For people."""
        moments = f", {readable(self.moments)} of moments" if self.moments else ""
        return f"{readable(self.weights)} of weights{moments}"


def _moments(inner: torch.optim.Optimizer) -> int:
    total, known = 0.0, dict[tuple[int, torch.dtype, str], float]()
    for number, group in enumerate(inner.param_groups):
        for parameter in group["params"]:
            if state := inner.state.get(parameter):
                total += _nbytes(state.values())
                continue
            local = local_of(parameter.data)
            key = number, local.dtype, local.device.type
            if key not in known:
                known[key] = _trial(inner, group, local) / _SIDE**2
            total += known[key] * local.numel() if parameter.requires_grad else 0.0
    return round(total)


def _trial(inner: torch.optim.Optimizer, group: dict[str, Any], like: Tensor) -> int:
    """Bytes of the state that a step makes for a small weight; 0 where a step of its own cannot be taken."""
    values = torch.ones(_SIDE, _SIDE, dtype=like.dtype, device=like.device)
    try:
        trial = stepped_alike(inner, values, group)
    except Exception:  # noqa: BLE001 - any class may raise anything: the size is not known then
        return 0
    return _nbytes(value for state in trial.state.values() for value in state.values())


def _nbytes(values: Iterable[Any]) -> int:
    """Bytes of tensors, without the numbers that are kept once for each weight."""
    tensors = [part for value in values if isinstance(value, Tensor) for part in _plain(value)]
    return sum(tensor.nbytes for tensor in tensors if tensor.numel() > 1)


def _plain(tensor: Tensor) -> list[Tensor]:
    return [part for _, one in plain_parts(tensor) for part in _plain(one)] if is_composed(tensor) else [tensor]
