"""Read what a change should cost by curvature: 1/2 tr(G E A E') of every changed matrix that has factors.

E is the difference to the weights at which the factors were fitted, which are those of the baseline: kept steps add up,
as they do for every other guard. Each matrix is read whole by one process, its owner, and the readings are shared:
they are the same on every process, and the same for sharded weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from weightproof.collective import Processes
from weightproof.curvature.factors import Factor, Factors, load_factors
from weightproof.curvature.prediction import loss_form, require_usable
from weightproof.errors import InputError
from weightproof.parallel.shards import Part, dealt
from weightproof.probes import values_of
from weightproof.types import CurvatureReading, LossForecast, TensorReading, WeightMatrix

__all__ = ["CurvatureProbe", "factors_of"]

MOVED = "the baseline is not of the weights at which the factors were fitted (training moved it): fit them again"


@dataclass(frozen=True, eq=False)
class _Item:
    """A matrix with factors, and what the model has under its name now."""

    factor: Factor
    matrix: WeightMatrix | None
    changed: bool = True

    @property
    def name(self) -> str:
        return self.factor.name

    @property
    def cost(self) -> float:
        """Multiplications of the prediction; the same at each call, so that a matrix keeps its owner."""
        d_out, d_in = len(self.factor.gradient_sum), len(self.factor.activation_sum)
        return float(d_out) * d_in * (d_out + d_in)


@dataclass(frozen=True, eq=False)
class CurvatureProbe:
    """Factors proven to be those of a model, with the weights at which they were fitted.

    Attributes:
        factors: Of some of its matrices.
        digest: Of the factors.
        fitted_at: What gives the weights (d_out, d_in) of a matrix back, by name; on the owner of each.
        processes: Who takes part.
    """

    factors: Factors
    digest: str
    fitted_at: Mapping[str, Callable[[], torch.Tensor]]
    processes: Processes
    _forms: dict[str, Callable[[torch.Tensor], float | None]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, factors: Factors, matrices: Iterable[WeightMatrix], processes: Processes, *, is_live: bool
    ) -> CurvatureProbe:
        """Prove factors against matrices; every process calls this alike.

        Args:
            factors: What was given.
            matrices: Those of the model (or folder) before any change.
            processes: Who takes part.
            is_live: Whether the matrices will change where they lie: the owner of each keeps a copy then, which takes
                less than half of the memory of its factors.

        Raises:
            InputError: The factors are of another model or of other weights, hold NaN or inf, are not symmetric, or are
                of fewer tokens than dimensions.
        """
        factors.require_enough_tokens()
        found = factors.require_matrices(matrices)
        items = [_Item(factors[name], found[name]) for name in factors]
        kept: dict[str, Callable[[], torch.Tensor]] = {}

        def prove(item: _Item, weight: torch.Tensor) -> str | None:
            if (refusal := _refusal(item.factor, weight)) is None:
                kept[item.name] = _copy_of(weight) if is_live else found[item.name].load
            return refusal

        refusals = dealt(
            processes,
            items,
            cost=lambda item: item.cost,
            parts=(_values,),
            work=prove,
            operation="proof of the factors",
        )
        if refusal := next((one for one in refusals if one is not None), None):
            raise InputError(refusal)
        return cls(factors, factors.digest, kept, processes)

    def read(
        self, every: Sequence[WeightMatrix], before: Mapping[str, TensorReading], after: Mapping[str, TensorReading]
    ) -> LossForecast:
        """What the weights as they are now should cost.

        Args:
            every: All matrices as they are now.
            before: Readings of all tensors at the baseline.
            after: Readings of all tensors now.
        """
        found = {one.name: one for one in every}
        changed = {one.name for one in every if _differs(one, before, after)} | (set(self.factors) - found.keys())
        # All of them at each call and in one order, changed or not: so each keeps its owner.
        items = [_Item(factor, found.get(name), name in changed) for name, factor in self.factors.by_name.items()]
        read = dealt(
            self.processes,
            items,
            cost=lambda item: item.cost,
            parts=(lambda item: _values(item) if item.changed else None,),
            work=self._read,
            operation="prediction of the loss change",
        )
        others = tuple(one.name for one in every if one.name in changed and one.name not in self.factors)
        return LossForecast(self.digest, tuple(one for one in read if one is not None), others)

    def _read(self, item: _Item, weight: torch.Tensor | None) -> CurvatureReading | None:
        """One matrix, on its owner; None where it did not change."""
        if not item.changed:
            return None
        family = "other" if item.matrix is None else item.matrix.family
        reading = CurvatureReading(item.name, family, None, None)
        if item.matrix is None:
            return replace(reading, reason="the model has no such matrix any more")
        if weight is None:
            return replace(reading, reason=item.matrix.refusal or "it cannot be read")
        original = self.fitted_at[item.name]()
        if original.shape != weight.shape:
            shapes = f"{list(original.shape)} to {list(weight.shape)}"
            return replace(reading, reason=f"it changed its shape from {shapes}")
        return _predicted(reading, self._form(item.factor, weight.device), original, weight)

    def _form(self, factor: Factor, device: torch.device) -> Callable[[torch.Tensor], float | None]:
        """The quadratic form of one matrix; that of EK-FAC is kept, for it takes a decomposition to make."""
        if factor.name in self._forms:
            return self._forms[factor.name]
        form = loss_form(_on(factor, _place(device)))
        if factor.corrected_sum is not None:
            self._forms[factor.name] = form
        return form


def factors_of(given: Factors | Path | str) -> Factors:
    """Factors as given, or read from their file.

    Raises:
        InputError: If they are neither, or the file cannot be used.
    """
    if isinstance(given, str | Path):
        return load_factors(given)
    if not isinstance(given, Factors):
        raise InputError(f"factors must be Factors (weightproof.fit_factors) or their file, not {type(given).__name__}")
    return given


def _predicted(
    reading: CurvatureReading,
    form: Callable[[torch.Tensor], float | None],
    original: torch.Tensor,
    weight: torch.Tensor,
) -> CurvatureReading:
    place = _place(weight.device)
    before = original.to(place, torch.float64)
    change = weight.detach().to(place, torch.float64) - before
    value = form(change)
    if value is None:
        finite = bool(change.isfinite().all())
        reason = "its factors are no covariances: they foretell a negative change" if finite else "it is not finite"
        return replace(reading, reason=reason)
    norm = float(before.norm())
    return replace(reading, predicted=value, relative_change=float(change.norm()) / norm if norm else None)


def _place(device: torch.device) -> torch.device:
    """Where matrices of this device are multiplied: not every kind of device knows float64."""
    return device if device.type == "cuda" else torch.device("cpu")


def _on(factor: Factor, place: torch.device) -> Factor:
    """The factor on a device."""
    corrected = None if factor.corrected_sum is None else factor.corrected_sum.to(place)
    sums = factor.activation_sum.to(place), factor.gradient_sum.to(place)
    return replace(factor, activation_sum=sums[0], gradient_sum=sums[1], corrected_sum=corrected)


def _refusal(factor: Factor, weight: torch.Tensor) -> str | None:
    """Why a factor cannot be used with these weights; None where it can."""
    try:
        require_usable(factor, weight)
    except InputError as error:
        return str(error)
    return None


def _copy_of(weight: torch.Tensor) -> Callable[[], torch.Tensor]:
    copy = weight.detach().to("cpu", copy=True)
    return lambda: copy


def _values(item: _Item) -> Part:
    """What this process has of a matrix, for `dealt`."""
    return None if item.matrix is None or item.matrix.refusal is not None else values_of(item.matrix)


def _differs(matrix: WeightMatrix, before: Mapping[str, TensorReading], after: Mapping[str, TensorReading]) -> bool:
    """Whether a matrix is not bit for bit what it was at the baseline."""
    pairs = ((before.get(name), after.get(name)) for name in matrix.tensor_names)
    return any(then is None or now is None or then.digest != now.digest for then, now in pairs)
