"""What an edit says it is, and the contract that this declaration can be held to.

A kind is declared with `session.edit(name, kind=...)`; our own edits declare themselves. Its
contract is a handful of numbers per matrix, read from the weights before and after, without data
and without a forward pass. A reading is within its contract when `value <= limit`.

| kind | statistic | limit | rigorous |
| --- | --- | --- | --- |
| Cast | `cast_error_half_ulp`: max |w' - w| / half an ulp of the target dtype at w | 1 | yes |
| Quantize | `levels_per_group`: distinct values in one scale group | 2^bits | yes |
| Quantize | `error_over_half_step`: max over rows of ||e||_2 / (sum_i min(|w_i|, Delta_g / 2)^2)^(1/2) | 1 | yes |
| Quantize | `relative_error`: ||E||_F / ||W||_F | .05 (8 bits), .5 (4), .8 (3 and below) | no |
| Quantize | `sign_flip_fraction`: weights beyond half a step that came back with the other sign | 0 | no |
| Prune | `altered_fraction`: weights that are neither 0 nor what they were | 0 | yes |
| Prune | `nonzero_fraction` | 1 - sparsity + 1 / d_in | yes |
| LoraMerge | `merge_error`: ||(W' - W) - delta||_F / ||delta||_F | rounding of the dtype | yes |
| LoraMerge | `replaced_fraction`: elements that are not those of the adapter's own copy | 0 | yes |
| LoraMerge | `altered_fraction`: changed weights of a matrix that has no delta | 0 | yes |
| LowRank | `tail_over_rounding`: what lies beyond the rank / what rounding leaves there | 1 | yes |
| LowRank | `error_over_tail`: ||E||_F / that of the best approximation of this rank | 1 | yes |
| all but Cast | `altered_outside_matrices`: a bias, norm or buffer changed | 0 | yes |
| preserving | `circuit_change`, `output_change`: see `weightproof.contracts.preserving` | rounding of the dtype | yes |
| train | `relative_delta` of one window: see `weightproof.guards.contract` | 9, provisional | yes |

`merge_error` is 1 for a delta merged zero times or twice, and 2 for the wrong sign; the reading says in words which
of these it looks like. A value that is undefined (NaN in the weights) is given as inf, because NaN compares with no
limit. What `preserving` and `train` promise concerns more than one matrix: it is not measured by `measure`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from weightproof.contracts.merge_kind import LoraMerge
from weightproof.contracts.quantities import Grid, cast_error, count_altered, incomparable, quantization_statistics
from weightproof.errors import InputError
from weightproof.numerics.low_rank import LowRank
from weightproof.types import ContractReading

GRANULARITIES = ("channel", "tensor", "group")
PLAIN_NAMES = ("unknown", "train", "preserving")

# ||E||_F / ||W||_F above which a quantized matrix deserves a warning; typical of each width.
_TYPICAL_ERROR = {3: 0.8, 4: 0.5, 8: 0.05}


@runtime_checkable
class Kind(Protocol):
    """What a kind must have: a name, JSON-ready parameters, and a measurement of its contract."""

    @property
    def name(self) -> str:
        """Short name, as it stands in policies and certificates."""
        ...

    def params(self) -> dict[str, Any]:
        """The declared parameters, ready for JSON."""
        ...

    def measure(self, name: str, before: torch.Tensor, after: torch.Tensor) -> tuple[ContractReading, ...]:
        """The contract's numbers for one matrix (d_out, d_in); empty where the kind promises nothing."""
        ...


@dataclass(frozen=True)
class Plain:
    """A kind without parameters: `unknown` (no promise), `train`, or `preserving`.

    It bounds no matrix by itself: circuits and outputs, or the rules for training windows, must decide.
    """

    name: str = "unknown"

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if self.name not in PLAIN_NAMES:
            raise InputError(_unknown_name(self.name))

    def params(self) -> dict[str, Any]:
        """No parameters."""
        return {}

    def measure(self, name: str, before: torch.Tensor, after: torch.Tensor) -> tuple[ContractReading, ...]:
        """Nothing to measure."""
        return ()


@dataclass(frozen=True)
class Cast:
    """Every element rounded to `dtype`, and no further (the result may be stored in a wider dtype).

    Attributes:
        dtype: Target floating point dtype, or its torch name, such as "bfloat16".
    """

    dtype: torch.dtype

    name = "cast"

    def __init__(self, dtype: torch.dtype | str) -> None:
        found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise InputError(
                f"Cast needs a floating point dtype such as torch.bfloat16 or 'bfloat16', not {dtype!r}; "
                "for integers declare Quantize(bits)"
            )
        object.__setattr__(self, "dtype", found)

    def params(self) -> dict[str, Any]:
        """The target dtype by name."""
        return {"dtype": _dtype_name(self.dtype)}

    def measure(self, name: str, before: torch.Tensor, after: torch.Tensor) -> tuple[ContractReading, ...]:
        """Largest error in units of half an ulp of the target dtype; limit 1 (round to nearest).

        An element that overflowed to inf, or was saturated instead, is beyond half an ulp. An
        element that was not finite before must be the same after.
        """
        reason = incomparable(before, after)
        value = None if reason else cast_error(self.dtype, before, after)
        return (ContractReading(name, "cast_error_half_ulp", value, 1.0, rigorous=True, reason=reason),)


@dataclass(frozen=True)
class Quantize:
    """Rounded to at most 2^bits levels per scale group, and written back in the model's dtype.

    The error bound is that of rounding to the nearest level of a grid which contains zero and whose
    step is at most that of the symmetric absmax grid, Delta_g = max |w| / (2^(bits-1) - 1) over the
    group as it was *before*: then |e_i| <= min(|w_i|, Delta_g / 2) for every element, so a damaged
    result cannot loosen its own bound. Symmetric and asymmetric (zero-point) grids meet it, and so
    do clipped grids that were searched for a smaller squared error. Methods that push error from one
    weight to the next (GPTQ) meet it at 4 bits and usually at 3; below that, declare "unknown".

    Attributes:
        bits: Width of a stored weight, 2 to 16.
        granularity: What shares one scale: "channel" (a row of (d_out, d_in)), "tensor" or "group".
        group_size: Consecutive inputs per scale for "group"; the last group of a row may be shorter.
    """

    bits: int
    granularity: str = "channel"
    group_size: int | None = None

    name = "quantize"

    def __post_init__(self) -> None:
        """Validate the parameters."""
        check_grid(self.bits, self.granularity, self.group_size, max_bits=16)

    def params(self) -> dict[str, Any]:
        """Bits, granularity and group size."""
        return {"bits": self.bits, "granularity": self.granularity, "group_size": self.group_size}

    def measure(self, name: str, before: torch.Tensor, after: torch.Tensor) -> tuple[ContractReading, ...]:
        """Levels per group, error against the half step, relative error, flipped signs."""
        limits = {
            "levels_per_group": (2.0**self.bits, True),
            "error_over_half_step": (1.0, True),
            "relative_error": (typical_quantization_error(self.bits), False),
            "sign_flip_fraction": (0.0, False),
        }
        reason = incomparable(before, after)
        grid = Grid(self.bits, self.granularity, self.group_size)
        values = {} if reason else quantization_statistics(grid, before, after)
        return tuple(
            ContractReading(name, statistic, values.get(statistic), limit, rigorous, reason)
            for statistic, (limit, rigorous) in limits.items()
        )


@dataclass(frozen=True)
class Prune:
    """Some elements became 0, the others are exactly what they were.

    Attributes:
        sparsity: Declared share of zeros, from 0 to 1.
        scope: "matrix": every matrix reaches the sparsity (per row, N:M or per matrix); "model":
            only all of them together do, so that no share is asked of a single matrix.
    """

    sparsity: float
    scope: str = "matrix"

    name = "prune"

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if isinstance(self.sparsity, bool) or not 0.0 <= self.sparsity <= 1.0:
            raise InputError(f"Prune needs a sparsity between 0 and 1 (a share, not percent), not {self.sparsity!r}")
        if self.scope not in ("matrix", "model"):
            raise InputError(f"Prune's scope is 'matrix' or 'model', not {self.scope!r}")

    def params(self) -> dict[str, Any]:
        """Sparsity and scope."""
        return {"sparsity": self.sparsity, "scope": self.scope}

    def measure(self, name: str, before: torch.Tensor, after: torch.Tensor) -> tuple[ContractReading, ...]:
        """Share of altered elements (limit 0) and of elements that are not zero.

        The number of zeros of a row is a whole number, so one element per row is allowed beside
        the declared share.
        """
        reason = incomparable(before, after)
        rows = before.shape[0] if before.ndim > 1 else 1
        density = min(1.0, 1.0 - self.sparsity + rows / max(1, before.numel()) + 1e-9)
        size = max(1, before.numel())
        _, altered, nonzero = (0, 0, 0) if reason else count_altered(before, after)
        found = [("altered_fraction", altered / size, 0.0)]
        if self.scope == "matrix":
            found.append(("nonzero_fraction", nonzero / size, density))
        return tuple(
            ContractReading(name, statistic, None if reason else value, limit, rigorous=True, reason=reason)
            for statistic, value, limit in found
        )


def parse_kind(kind: object) -> Kind:
    """The kind object for what a user declared.

    Args:
        kind: None (unknown), one of "unknown", "train", "preserving", or an object of this module.

    Raises:
        InputError: For any other name (near names are suggested) or object.
    """
    if kind is None:
        return Plain("unknown")
    if isinstance(kind, str):
        return Plain(kind)
    if isinstance(kind, type):
        raise InputError(f"kind is the class {kind.__name__}; give an object of it, such as kinds.Quantize(bits=8)")
    if isinstance(kind, Kind):
        return kind
    raise InputError(
        f"kind must be one of {', '.join(PLAIN_NAMES)} or an object of weightproof.kinds such as Quantize(bits=8), "
        f"not {type(kind).__name__}"
    )


def expected_names(kind: Kind) -> frozenset[str]:
    """Matrices and tensors that a change of this kind must change: measured although nothing was written there."""
    return kind.expected if isinstance(kind, LoraMerge) else frozenset()


def bound(kind: Kind, model: torch.nn.Module) -> Kind:
    """The kind with what only the model tells: its names of tied tensors; whether an adapter belongs to it.

    Raises:
        InputError: The declaration does not fit the model.
    """
    return kind.bound(model) if isinstance(kind, LoraMerge) else kind


def check_grid(bits: int, granularity: str, group_size: int | None, *, max_bits: int) -> None:
    """Validate the parameters of a quantization grid.

    Raises:
        InputError: Naming the parameter and what is accepted.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= max_bits:
        raise InputError(f"bits must be a whole number from 2 to {max_bits}, not {bits!r}")
    if granularity not in GRANULARITIES:
        near = difflib.get_close_matches(str(granularity), GRANULARITIES, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"granularity must be one of {', '.join(GRANULARITIES)}, not {granularity!r}{hint}")
    if granularity == "group" and (isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1):
        raise InputError(f"granularity 'group' needs group_size >= 1 inputs per scale, not {group_size!r}")
    if granularity != "group" and group_size is not None:
        raise InputError(f"group_size={group_size!r} has no meaning for granularity {granularity!r}: use 'group'")


def typical_quantization_error(bits: int) -> float:
    """Relative Frobenius error that quantization to `bits` seldom exceeds.

    .05 at 8 bits and above, .5 at 4, .8 at 3 and below (docs/guards/invariants.md),
    geometric in between. Below 3 bits nothing tighter than .8 is known to be typical: a correct
    2-bit result exceeds it, which is worth a warning.
    """
    if bits >= 8:
        return _TYPICAL_ERROR[8]
    if bits <= 3:
        return _TYPICAL_ERROR[3]
    share = (bits - 4) / 4
    return _TYPICAL_ERROR[4] ** (1 - share) * _TYPICAL_ERROR[8] ** share


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unknown_name(name: str) -> str:
    classes = {"cast": "Cast(dtype)", "quantize": "Quantize(bits)", "prune": "Prune(sparsity)"}
    classes["lora_merge"] = "LoraMerge(adapter)"
    near = difflib.get_close_matches(name.lower(), [*PLAIN_NAMES, *classes], n=1)
    if near and near[0] in classes:
        return f"kind {name!r} needs parameters: give an object, weightproof.kinds.{classes[near[0]]}"
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown kind {name!r}{hint} (known: {', '.join(PLAIN_NAMES)}, or an object of weightproof.kinds)"


def measure_outside(kind: Kind, name: str, before: torch.Tensor, after: torch.Tensor) -> tuple[ContractReading, ...]:
    """The contract of a changed tensor that is no measured weight matrix (a bias, a norm, a buffer).

    A cast rounds it like any other, a merge adds the bias that its adapter has for it or puts the adapter's copy in
    its place; quantizing, pruning, and a merge that has nothing for it, may not touch it at all.

    Args:
        kind: The declared kind.
        name: Public name of the tensor.
        before: Its values before, any shape.
        after: Its values now, of the same shape.
    """
    if isinstance(kind, Cast):
        return kind.measure(name, before.reshape(1, -1), after.reshape(1, -1))
    own = getattr(kind, "measure_outside", None)
    if own is not None:
        return own(name, before, after)
    if isinstance(kind, Quantize | Prune | LowRank):
        return (ContractReading(name, "altered_outside_matrices", 1.0, 0.0, rigorous=True),)
    return ()
