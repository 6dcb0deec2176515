"""The contract of a change that claims to preserve the function: circuits unchanged, outputs equal, to rounding.

Permuted heads or neurons, a scale or a rotation passed between two factors, a norm's gain folded into what reads it:
all of them leave the spectra of every circuit (`weightproof.circuits`) and every output as they were, up to the
rounding of the dtype. Both are asked: sign flips and shuffles leave spectra alone, and an output may be insensitive
to what a circuit shows.

Outputs are compared with those just before the change, not with the baseline's. Limits, by the largest eps of the
dtypes that weights are stored in, and what was measured on four briefly trained models (docs/guards/invariants.md):

- `circuit_change`, of one layer's product: eps / 8, at least 1e-6;
- `output_change`, KL in nats per token: (3 eps)^2, at least 1e-9; of hidden states, relative RMS: the root of that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from weightproof.circuits import spectrum_distance
from weightproof.guards.circuits import pooled
from weightproof.types import CircuitReading, ContractReading, DivergenceReading, Readings, TensorReading

NAME = "preserving"


def preserving_readings(
    before: Readings, after: Readings, outputs: Sequence[DivergenceReading], no_outputs: str
) -> tuple[ContractReading, ...]:
    """The contract on circuits and on outputs.

    Args:
        before: Readings just before the change.
        after: Readings after it.
        outputs: Outputs now against those just before the change.
        no_outputs: Why there are none.
    """
    eps = _eps(after.tensors)
    return (*_circuits(before, after, max(1e-6, eps / 8)), *_outputs(outputs, no_outputs, max(1e-9, (3 * eps) ** 2)))


def _eps(tensors: Mapping[str, TensorReading]) -> float:
    """The largest spacing, relative to 1, of the floating point dtypes of the parameters."""
    names = {one.dtype.removeprefix("torch.") for one in tensors.values() if not one.is_buffer}
    dtypes = [getattr(torch, name, None) for name in names]
    return max(
        (torch.finfo(one).eps for one in dtypes if isinstance(one, torch.dtype) and one.is_floating_point),
        default=torch.finfo(torch.float32).eps,
    )


def _circuits(before: Readings, after: Readings, limit: float) -> Iterator[ContractReading]:
    old, new = pooled(before), pooled(after)
    if not old and not new:
        why = after.unmeasured.get("circuits", "the model has no circuit of a known kind")
        yield ContractReading("model", "circuit_change", None, limit, rigorous=True, reason=why)
    for name in dict.fromkeys([*old, *new]):
        then, now = _values(old.get(name, [])), _values(new.get(name, []))
        if then is None and now is None:
            continue  # it cannot be read at all; the circuits guard says so
        if then is None or now is None or len(then) != len(now):
            why = f"it has {_count(then)} before and {_count(now)} after the change"
            yield ContractReading(name, "circuit_change", None, limit, rigorous=True, reason=why)
            continue
        value = spectrum_distance(then, now)
        why = "what this layer's heads or neurons compute has changed" if value > limit else None
        yield ContractReading(name, "circuit_change", value, limit, rigorous=True, reason=why)


def _values(circuits: Sequence[CircuitReading]) -> list[float] | None:
    """All values of one layer's product; None where one of its circuits was not read."""
    if not circuits or any(one.values is None for one in circuits):
        return None
    return [value for one in circuits for value in one.values or ()]


def _count(values: Sequence[float] | None) -> str:
    return "no values" if values is None else f"{len(values)} values"


def _outputs(readings: Sequence[DivergenceReading], otherwise: str, limit: float) -> Iterator[ContractReading]:
    if not readings:
        yield ContractReading("model", "output_change", None, limit, rigorous=True, reason=otherwise)
    for one in readings:
        target = f"{one.windows} windows"
        if not one.finite:
            why = one.reason or "outputs are NaN or inf"
            yield ContractReading(target, "output_change", float("inf"), limit, rigorous=True, reason=why)
            continue
        value, bound = (one.kl, limit) if one.kl is not None else (one.hidden_error, limit**0.5)
        why = "outputs differ by more than rounding" if value is not None and value > bound else None
        why = "outputs cannot be compared" if value is None else why
        yield ContractReading(target, "output_change", value, bound, rigorous=True, reason=why)
