"""Read which directions of its matrices came with a merge or with steering; the same on every process.

Each changed matrix meets its original, as it was just before, on its owner. What earlier changes brought since the
baseline is carried on from reading to reading: an adapter merged after another adds to the count.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weightproof.collective import Processes
from weightproof.errors import InputError
from weightproof.guards.subspace import SubspaceLimits
from weightproof.judgement.stored_directions import StoredDirections
from weightproof.numerics.intruders import EXACT_SIDE, largest_cosines
from weightproof.parallel.shards import Part, dealt
from weightproof.probes import values_of
from weightproof.readings.changed_matrices import Originals
from weightproof.types import DirectionsReading, Readings, StoredCosine, SubspaceReading, WeightMatrix

KINDS = ("lora_merge",)
"""Declared kinds that are read of themselves: merges of adapters, and steering, which declares itself as one."""
# Cosines above this are nobody's intruders under any sensible limit: they are not carried on.
_NOTABLE = 0.95
_BULK = "none of its singular values stands out of the noise: their vectors are not determined"


@dataclass(frozen=True)
class SubspaceProbe:
    """What is looked at.

    Attributes:
        top: Leading left singular vectors of each changed matrix.
        max_side: Of matrices with a longer shorter side none.
        directions: Directions that the user keeps, or None.
        processes: Who takes part.
    """

    top: int
    max_side: int
    directions: StoredDirections | None
    processes: Processes

    @classmethod
    def of(cls, limits: SubspaceLimits, processes: Processes) -> SubspaceProbe:
        """What a policy asks for; stored directions are read from their file.

        Raises:
            InputError: The file of stored directions cannot be used.
        """
        with processes.together("stored directions"):
            stored = None if limits.directions is None else StoredDirections.load(limits.directions)
        return cls(limits.top, limits.max_side, stored, processes)

    def concerns(self, kind: str) -> bool:
        """Whether a change of this kind is read: merges and steering, any edit where directions were given."""
        return kind in KINDS or (self.directions is not None and kind != "train")

    def read(  # noqa: PLR0913, PLR0917 - what changed, from what to what
        self,
        every: Sequence[WeightMatrix],
        touched: Collection[str],
        originals: Originals,
        baseline: Readings,
        current: Readings,
        after: Readings,
    ) -> SubspaceReading:
        """Read every matrix that changed, and carry on what is known of the others.

        Args:
            every: All matrices as they are now.
            touched: Names of the tensors that differ from the originals.
            originals: The matrices before the change.
            baseline: Readings at the baseline.
            current: Readings just before the change.
            after: Readings now.
        """
        carried = carry(current.subspace, baseline, after)
        known = {} if carried is None else {one.name: one for one in carried.matrices}
        changed = [one for one in every if not set(touched).isdisjoint(one.tensor_names)]

        def before(matrix: WeightMatrix) -> Part:
            if matrix.refusal is not None:
                return None
            if matrix.shard is not None:
                return originals.original_shard(matrix)
            return lambda: originals.original_matrix(matrix)

        def work(matrix: WeightMatrix, weight: Tensor | None, original: Tensor | None) -> DirectionsReading:
            spikes = after.bulks[matrix.name].num_spikes_high if matrix.name in after.bulks else None
            return self._read(matrix, weight, original, spikes)

        read = dealt(
            self.processes,
            changed,
            cost=_cost,
            parts=(lambda matrix: None if matrix.refusal is not None else values_of(matrix), before),
            work=work,
            operation="directions of the changed matrices",
        )
        found = {one.name: replace(one, earlier=_before_now(known.get(one.name))) for one in read}
        names = [one.name for one in every if one.name in found or one.name in known]
        return SubspaceReading(
            tuple(found[name] if name in found else known[name] for name in names),
            None if self.directions is None else self.directions.digest,
            self._not_compared(read),
        )

    def _read(
        self, matrix: WeightMatrix, weight: Tensor | None, original: Tensor | None, spikes: int | None
    ) -> DirectionsReading:
        """One matrix, on its owner."""
        reading = DirectionsReading(matrix.name, matrix.family, None, (), (), "none")
        if weight is None or original is None or original.shape != weight.shape:
            return replace(reading, reason=_unreadable(matrix, weight, original))
        original = original.to(weight.device)
        reading = replace(reading, stored=self._stored(matrix, weight, original))
        if (side := min(weight.shape)) > self.max_side:
            reason = f"its shorter side is {side}, more than the policy lets be looked at (max_side {self.max_side})"
            return replace(reading, reason=reason)
        if spikes == 0:
            return replace(reading, reason=_BULK)
        try:
            found = largest_cosines(original, weight, self.top if spikes is None else min(self.top, spikes))
        except InputError as error:
            return replace(reading, reason=str(error))
        return replace(reading, cosines=found.values, method=found.method)

    def _stored(self, matrix: WeightMatrix, weight: Tensor, original: Tensor) -> tuple[StoredCosine, ...]:
        if self.directions is None or not self.directions.applies_to(matrix.name, matrix.d_out):
            return ()
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        change = weight.to(dtype) - original.to(dtype)
        return self.directions.cosines(matrix.name, change) if bool(torch.isfinite(change).all()) else ()

    def _not_compared(self, read: Sequence[DirectionsReading]) -> tuple[str, ...]:
        if self.directions is None:
            return ()
        used = {cosine.direction for one in read for cosine in one.stored}
        return tuple(sorted(self.directions.names() - used))


def _unreadable(matrix: WeightMatrix, weight: Tensor | None, original: Tensor | None) -> str:
    if weight is None:
        return matrix.refusal or "it cannot be read"
    if original is None:
        return "there was no such matrix before the change"
    return f"it changed its shape from {list(original.shape)} to {list(weight.shape)}"


def carry(known: SubspaceReading | None, baseline: Readings, after: Readings) -> SubspaceReading | None:
    """What is known of earlier changes, without matrices that are as they were at the baseline; None for nothing."""
    if known is None:
        return None
    kept = tuple(
        DirectionsReading(one.name, one.family, (), _before_now(one), (), "carried on")
        for one in known.matrices
        if one.name in after.matrices and not _is_as_at(baseline, after, one.name)
    )
    return SubspaceReading(kept) if any(one.earlier for one in kept) else None


def _before_now(one: DirectionsReading | None) -> tuple[float, ...]:
    """The low cosines of a reading: of its own change, and of those before."""
    return () if one is None else (*one.earlier, *(value for value in one.cosines or () if value < _NOTABLE))


def _is_as_at(baseline: Readings, after: Readings, name: str) -> bool:
    """Whether the tensors of a matrix have the digests that they had at the baseline."""
    stored: Mapping[str, str] = {
        key: one.digest for key, one in baseline.tensors.items() if key == name.partition("[")[0] or one.part_of == name
    }
    return bool(stored) and all(
        key in after.tensors and after.tensors[key].digest == digest for key, digest in stored.items()
    )


def _cost(matrix: WeightMatrix) -> float:
    """Multiplications: two decompositions of a small matrix, so many products with a large one."""
    side, length = sorted((matrix.d_out, matrix.d_in))
    return 2.0 * side * side * (length + 10.0 * side) if side <= EXACT_SIDE else 1500.0 * side * length
