"""Whether a delta belongs to a model: strict names, shapes, finite values, and the weights it was made for."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from weightproof.deltas import Delta
from weightproof.differences.factors import LowRank, Part, largest_element
from weightproof.errors import InputError
from weightproof.snapshots.tensor_store import tensor_digest
from weightproof.types import WeightMatrix


class Target(NamedTuple):
    """A matrix of the model, and what a delta adds to it."""

    matrix: WeightMatrix
    part: Part


def fitted(delta: Delta, matrices: Iterable[WeightMatrix]) -> tuple[Target, ...]:
    """Each part with its matrix, in the order of the model; nothing is read but the delta itself.

    Raises:
        InputError: A name that the model does not have (near names are suggested), one matrix under two names, one
            that cannot be changed, another shape, or NaN or inf in the delta.
    """
    known = {name: one for one in matrices for name in (one.name, *one.tied_names)}
    if missing := [name for name in delta.parts if name not in known]:
        near = difflib.get_close_matches(missing[0], known, n=1)
        raise InputError(
            f"the delta changes {missing[0]!r}, which this model does not have "
            f"({len(missing)} of {len(delta.parts)} names are unknown)"
            f"{f'; did you mean {near[0]!r}?' if near else ''}. Nothing was written"
        )
    found: dict[str, Target] = {}
    for name, part in delta.parts.items():
        matrix = known[name]
        if matrix.name in found:
            raise InputError(
                f"the delta changes {matrix.name} twice, under the names of two tied tensors ({name} is the same "
                "storage): leave one of them out"
            )
        _require_fits(delta, name, part, matrix)
        found[matrix.name] = Target(matrix, part)
    order = {name: place for place, name in enumerate(dict.fromkeys(one.name for one in known.values()))}
    return tuple(found[name] for name in sorted(found, key=order.__getitem__))


def _require_fits(delta: Delta, name: str, part: Part, matrix: WeightMatrix) -> None:
    if matrix.refusal is not None:
        raise InputError(f"the delta changes {name}, which cannot be changed: {matrix.refusal}")
    if tuple(part.shape) != (matrix.d_out, matrix.d_in):
        made = delta.metadata["base"].get("name")
        raise InputError(
            f"the delta of {name} is {list(part.shape)} (d_out, d_in), the matrix {[matrix.d_out, matrix.d_in]}: it "
            f"was made for another base{f' ({made})' if made else ''}. Nothing was written"
        )
    if not math.isfinite(largest_element(part)):
        raise InputError(f"the delta of {name} holds NaN or inf: nothing was written")


def require_base(delta: Delta, targets: Iterable[Target], original: Callable[[WeightMatrix], Tensor]) -> None:
    """Refuse weights that the delta was not made for, where their digests are known and the matrix is plain and whole.

    Args:
        delta: With `base_digests`.
        targets: As `fitted` gave them.
        original: Of a matrix, the values to compare.

    Raises:
        InputError: Naming the matrix and both digests.
    """
    digests = delta.base_digests
    for matrix, _ in targets:
        then = next((digests[name] for name in (matrix.name, *matrix.tied_names) if name in digests), None)
        if then is None or matrix.shard is not None or matrix.storage is not None:
            continue
        if (now := tensor_digest(original(matrix))) != then:
            made = delta.metadata["base"].get("name")
            raise InputError(
                f"the delta was made for another base: {matrix.name} had the digest {then[:16]} then"
                f"{f' ({made})' if made else ''} and has {now[:16]} here. Nothing was written. Load that base in its "
                "own dtype, or pass same_base=False (--other-base) to add it to these weights all the same"
            )


def require_alpha(alpha: object) -> float:
    """The factor as a number.

    Raises:
        InputError: It is none, or not finite.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise InputError(f"alpha must be a finite number, not {alpha!r}")
    return float(alpha)


def moved(weight: Tensor, part: Part, alpha: float) -> Tensor:
    """W + alpha D (d_out, d_in), in float32 (float64 for float64 weights), on the device of the weights.

    The one place where the sum is made: what writes it casts it once.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    work = weight.detach().to(dtype, copy=True)
    if isinstance(part, LowRank):
        left, right = (factor.to(work.device, dtype) for factor in (part.left, part.right))
        return work.addmm_(left, right, alpha=alpha)
    return work.add_(part.to(work.device, dtype), alpha=alpha)


def require_range(targets: Iterable[Target], weights: Mapping[str, Tensor], alpha: float) -> None:
    """Refuse an alpha at which finite weights would leave the range of their dtype.

    Raises:
        InputError: Naming the matrix.
    """
    for matrix, part in targets:
        weight, reach = weights[matrix.name], abs(alpha) * largest_element(part)
        facts = torch.finfo(weight.dtype)
        if not weight.numel() or reach <= facts.eps * facts.max / 4:
            continue  # less than half a step of the largest number: the sum rounds to it at most
        peak = float(weight.detach().abs().max())
        if not math.isfinite(peak) or peak + reach <= facts.max:
            continue  # weights that are not finite were so before: guards tell
        if float(moved(weight, part, alpha).abs().max()) > facts.max:
            raise InputError(
                f"alpha={alpha:g} takes {matrix.name} out of the range of {weight.dtype}: nothing was written"
            )
