"""Which matrices of a model can have Kronecker factors, in how many passes over the data, and what that takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from weightproof.curvature.collector import Target
from weightproof.errors import InputError
from weightproof.snapshots.tensor_store import readable
from weightproof.types import WeightMatrix
from weightproof.weights import iter_tensors, iter_weight_matrices, storage_identity, unwrap

__all__ = ["FitCost", "dealt_passes", "find_targets", "fit_cost", "too_large"]

DEFAULT_FAMILIES = ("attn", "ffn")

# A factor of this many dimensions takes 16 GiB in float32; heads of large vocabularies have such outputs.
LARGEST_DIMENSION = 65536

_STACKED = "its experts are stacked in one parameter that no linear layer multiplies by: no hook sees their inputs"

# Sisters that read one input wherever they stand side by side. For estimates: fitting sees which tensors are the same.
_SISTERS = (
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
    frozenset({"wi_0", "wi_1"}),
    frozenset({"q_proj", "k_proj", "v_proj"}),
)


@dataclass(frozen=True)
class FitCost:
    """What fitting would take.

    Attributes:
        matrices: Names of the matrices.
        refused: Why others that the patterns name have no factors.
        passes: How often the data is read.
        bytes_of_factors: Memory of all factors together.
        bytes_at_once: Memory of the largest pass.
        flops_per_token: Floating point operations beside the model's own forward and backward pass, at most.
    """

    matrices: tuple[str, ...]
    refused: Mapping[str, str]
    passes: int
    bytes_of_factors: int
    bytes_at_once: int
    flops_per_token: int

    def __str__(self) -> str:
        """In words."""
        return (
            f"{len(self.matrices)} matrices in {self.passes} pass{'es' * (self.passes > 1)} over the data, "
            f"{readable(self.bytes_of_factors)} of factors ({readable(self.bytes_at_once)} at once), "
            f"{self.flops_per_token:.3g} operations a token beside the model's own"
        )


def fit_cost(model: nn.Module, include: str | Sequence[str] | None = None, *, max_bytes: int = 8 << 30) -> FitCost:
    """What `fit_factors` would take, without running the model.

    Raises:
        InputError: As `fit_factors`.
    """
    targets, refused = find_targets(model, include)
    passes = [_bytes(chosen) for chosen in dealt_passes(targets, max_bytes)]
    operations = 2 * sum(_elements(targets).values())
    return FitCost(tuple(one.name for one in targets), refused, len(passes), sum(passes), max(passes), operations)


def find_targets(model: nn.Module, include: str | Sequence[str] | None) -> tuple[tuple[Target, ...], dict[str, str]]:
    """The matrices to fit with the modules that multiply by them, and why others that were asked for are not."""
    patterns = None if include is None else (include,) if isinstance(include, str) else tuple(include)
    matrices = list(iter_weight_matrices(model))
    modules = _linear_modules(model)
    names = {named.name: storage_identity(named.tensor) for named in iter_tensors(model)}
    targets, refused = [], {}
    for matrix in matrices:
        if not _is_chosen(matrix, patterns):
            continue
        owners = modules.get(names.get(matrix.tensor_name), ())
        reason = _refusal(matrix, owners)
        if reason is None:
            targets.append(Target(matrix.name, matrix.d_out, matrix.d_in, tuple(owners)))
        else:
            refused[matrix.name] = reason
    for pattern in patterns or ():
        if not any(_matches(matrix, pattern) for matrix in matrices):
            raise InputError(f"{pattern!r} matches no weight matrix of this model: see `weightproof inspect` for names")
    if not targets:
        name, reason = next(iter(refused.items()), ("the model", "it has no linear layer of a known family"))
        raise InputError(f"no matrix can have factors; {name}: {reason}")
    return tuple(targets), refused


def _refusal(matrix: WeightMatrix, owners: Sequence[nn.Module]) -> str | None:
    if matrix.refusal is not None:
        return matrix.refusal
    if not owners:
        return _STACKED if matrix.name != matrix.tensor_name else "no linear layer multiplies by it"
    if matrix.shard is not None:
        return "it is sharded over processes: fit the factors on a whole copy of the model"
    return too_large(matrix.d_out, matrix.d_in)


def _is_chosen(matrix: WeightMatrix, patterns: tuple[str, ...] | None) -> bool:
    if patterns is None:
        return matrix.family in DEFAULT_FAMILIES or (matrix.family == "expert")
    return any(_matches(matrix, pattern) for pattern in patterns)


def _matches(matrix: WeightMatrix, pattern: str) -> bool:
    labels = (matrix.name, matrix.name.removesuffix(".weight"), matrix.family)
    return any(fnmatchcase(label, pattern) for label in labels)


def _linear_modules(model: nn.Module) -> dict[Any, list[nn.Module]]:
    """Modules of which the output is input times weight, by the storage of that weight."""
    found: dict[Any, list[nn.Module]] = {}
    for module in unwrap(model).modules():
        is_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        if (isinstance(module, nn.Linear) or is_conv1d) and isinstance(module.weight, Tensor):
            found.setdefault(storage_identity(module.weight), []).append(module)
    return found


def dealt_passes(targets: tuple[Target, ...], max_bytes: int) -> list[tuple[Target, ...]]:
    """Matrices that are fitted together, in their order.

    Raises:
        InputError: If the factors of one matrix alone take more.
    """
    passes: list[list[Target]] = [[]]
    for target in targets:
        size = _bytes([target])
        if size > max_bytes:
            raise InputError(
                f"the factors of {target.name} ({target.d_out} x {target.d_in}) take {readable(size)}, more than the "
                f"{readable(max_bytes)} allowed: give more memory (max_bytes=) or leave it out (include=)"
            )
        if _bytes([*passes[-1], target]) > max_bytes:
            passes.append([])
        passes[-1].append(target)
    return [tuple(chosen) for chosen in passes]


def too_large(d_out: int, d_in: int) -> str | None:
    """Why a matrix is too large to have factors; None if it is not."""
    largest = max(d_out, d_in)
    if largest <= LARGEST_DIMENSION:
        return None
    return f"a factor of {largest} x {largest} would take {readable(4 * largest**2)}"


def _bytes(targets: Iterable[Target]) -> int:
    return 8 * sum(_elements(targets).values())


def _elements(targets: Iterable[Target]) -> dict[str, int]:
    """Elements of the sums: of g g' by matrix, and of a a' by the input that it reads."""
    found = {}
    for target in targets:
        found[f"gradient {target.name}"] = target.d_out**2
        found[f"activation {_input_of(target.name)} {target.d_in}"] = target.d_in**2
    return found


def _input_of(name: str) -> str:
    """A name for what a matrix reads: the same for sisters."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    return next((f"{parent}.{min(sisters)}" for sisters in _SISTERS if leaf in sisters), name)
