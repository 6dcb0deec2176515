"""Task arithmetic (arXiv:2212.04089): add to the weights what fine-tuning changed elsewhere, or take it away."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from weightproof import kinds
from weightproof.edits.magnitudes import digit_counts, dropped, kth_smallest
from weightproof.edits.selection import VECTOR_FAMILY, Selection
from weightproof.errors import InputError
from weightproof.folders.checkpoints import StoredTensor, open_checkpoint
from weightproof.snapshots.tensor_store import tensor_digest
from weightproof.types import WeightMatrix
from weightproof.weights import iter_tensors, iter_weight_matrices

Task = Path | str | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class TaskArithmetic(Selection):
    """W + sum_i weight_i (W_i - W_base), in float32 (float64 for float64 weights), rounded once.

    A task is a fine-tuned model's folder, read one tensor at a time, or its deltas by name. Folders change every
    tensor of the model: matrices of all families, biases and norms, as far as `include` and `exclude` let them;
    deltas change the tensors that they name. A negative weight takes a task away. With `density` the tasks are joined
    as TIES does (arXiv:2306.01708): of each delta only its largest magnitudes, tensor by tensor; where the sum of
    them is positive the mean of the positive ones, else of the negative ones.

    Attributes:
        tasks: A folder, a mapping of matrix or tensor name -> delta (d_out, d_in) or (n,), or several of either.
        weight: One factor for all tasks, or one for each (with `density` one for all).
        base: Folder of the model that the tasks were fine-tuned from; None: the guarded model as it is.
        density: Share of each delta that TIES keeps, above 0 and at most 1; None: all is added up.
        include: Globs on names or families, over every tensor of the tasks.
        exclude: Globs that win over `include`.

    Raises:
        InputError: If a folder is missing or unsafe, no task is given, or the weights do not fit the tasks.

    Example:
        >>> TaskArithmetic({"0.weight": torch.ones(2, 3)}, weight=.5).name
        'task-arithmetic-0.5'
    """

    tasks: Task | Sequence[Task]
    weight: float | Sequence[float] = 1.0
    base: Path | str | None = None
    density: float | None = None
    sources: tuple[Mapping[str, Tensor] | Folder, ...] = field(init=False, repr=False)
    weights: tuple[float, ...] = field(init=False, repr=False)
    origin: Folder | None = field(init=False, repr=False)

    FAMILIES: ClassVar[tuple[str, ...] | None] = None
    touches_vectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Open the folders; no weight is read yet."""
        super().__post_init__()
        tasks = tuple(self.tasks) if isinstance(self.tasks, (list, tuple)) else (self.tasks,)
        if not tasks:
            raise InputError("tasks is empty: give a model folder, or a mapping of tensor name -> delta")
        object.__setattr__(self, "sources", tuple(_source(task) for task in tasks))
        object.__setattr__(self, "weights", _weights(self.weight, len(tasks)))
        if self.density is not None:
            _require_density(self.density, self.weights)
        object.__setattr__(self, "origin", None if self.base is None else Folder(Path(self.base)))

    @property
    def name(self) -> str:
        """`task-arithmetic-<weights>`, or `ties-...` with a density."""
        method = "task-arithmetic" if self.density is None else "ties"
        return f"{method}-{'+'.join(f'{weight:g}' for weight in dict.fromkeys(self.weights))}"

    @property
    def kind(self) -> kinds.Plain:
        """No contract of its own ("unknown"): what was written is held against the plan, and outputs decide."""
        return kinds.Plain("unknown")

    def params(self) -> dict[str, Any]:
        """Tasks (folders by path, deltas by digest), weights and base, ready for JSON."""
        return {
            "tasks": [str(one.path) if isinstance(one, Folder) else _digests(one) for one in self.sources],
            "weight": list(self.weights),
            "base": None if self.base is None else str(self.base),
            "density": self.density,
            **self.selection_params(),
        }

    def prepare(self, session: Any) -> TaskArithmetic:
        """This edit, if its deltas name tensors of the model.

        Raises:
            InputError: Naming the first that does not, or whose shape is another.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for tensor in iter_tensors(session.model):
            shapes |= dict.fromkeys((tensor.name, *tensor.tied_names), tensor.shape)
        for matrix in iter_weight_matrices(session.model):
            shapes |= dict.fromkeys((matrix.name, *matrix.tied_names), (matrix.d_out, matrix.d_in))
        for source in self.sources:
            for name, delta in () if isinstance(source, Folder) else source.items():
                if name not in shapes:
                    raise InputError(f"a task has a delta for {name}, which this model does not have")
                if tuple(delta.shape) != shapes[name]:
                    raise InputError(
                        f"the delta of {name} is {list(delta.shape)}, the tensor {list(shapes[name])} (d_out, d_in)"
                    )
        return self

    def concerns(self, matrix: WeightMatrix) -> bool:
        """Whether a task changes this matrix."""
        return any(_has(source, matrix) for source in self.sources)

    def plan(self, matrix: WeightMatrix, context: object = None) -> Tensor | None:
        """The new values (d_out, d_in) in the storage dtype; None where no task changes them. Pure.

        Raises:
            InputError: If a folder lacks the tensor, or holds it in another shape.
        """
        if not self.selects(matrix):
            return None
        before = matrix.load()
        work = before.to(torch.float64 if before.dtype == torch.float64 else torch.float32)
        origin = work if self.origin is None else self.origin.read(matrix).to(work)
        deltas = [delta for source in self.sources if (delta := _delta(source, matrix, work, origin)) is not None]
        if self.density is not None:
            return (work + self.weights[0] * _elected(deltas, self.density)).to(before.dtype)
        factors = [weight for source, weight in zip(self.sources, self.weights, strict=True) if _has(source, matrix)]
        total = work.clone()
        for factor, delta in zip(factors, deltas, strict=True):
            total = total + factor * delta
        return total.to(before.dtype)


class Folder:
    """A model folder, its headers read; tensors are read one at a time, named and turned as in memory."""

    def __init__(self, path: Path) -> None:
        opened = open_checkpoint(path)
        self.path = path
        self._matrices = {matrix.name: matrix for matrix in opened.matrices}
        self._tensors = {tensor.name: tensor for tensor in opened.tensors}

    def read(self, matrix: WeightMatrix) -> Tensor:
        """The values of a matrix, or of a vector as n x 1, of the model in memory."""
        found = self._vector(matrix) if matrix.family == VECTOR_FAMILY else self._matrix(matrix)
        if tuple(found.shape) != (matrix.d_out, matrix.d_in):
            raise InputError(
                f"{self.path} holds {matrix.name} as {list(found.shape)} (d_out, d_in), the model as "
                f"{[matrix.d_out, matrix.d_in]}: it is of another architecture"
            )
        return found

    def _matrix(self, matrix: WeightMatrix) -> Tensor:
        stored = next((self._matrices[name] for name in _names(matrix) if name in self._matrices), None)
        if stored is None:
            raise self._lacks(matrix)
        if stored.refusal is not None:
            raise InputError(f"{self.path}: {stored.name} cannot be read: {stored.refusal}")
        return stored.load()

    def _vector(self, matrix: WeightMatrix) -> Tensor:
        stored = next((self._tensors[name] for name in _names(matrix) if name in self._tensors), None)
        if stored is None:
            raise self._lacks(matrix)
        return _whole(stored).reshape(-1, 1)

    def _lacks(self, matrix: WeightMatrix) -> InputError:
        return InputError(
            f"{self.path} holds no {matrix.name}, which the model has: leave it as it is with "
            f"exclude=({matrix.name!r},), or give the folder of a model of the same architecture"
        )


def _whole(stored: StoredTensor) -> Tensor:
    blocks = list(stored.blocks())
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _source(task: object) -> Mapping[str, Tensor] | Folder:
    if isinstance(task, (str, Path)):
        return Folder(Path(task))
    if not isinstance(task, Mapping) or not task or not all(_is_delta(delta) for delta in task.values()):
        raise InputError(
            f"a task is a model folder, or a mapping of tensor name -> delta of 1 or 2 dimensions that holds at least "
            f"one, not {type(task).__name__}{' (empty, or not of tensors)' if isinstance(task, Mapping) else ''}"
        )
    return dict(task)


def _is_delta(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim in (1, 2)


def _weights(given: float | Sequence[float], count: int) -> tuple[float, ...]:
    weights = tuple(given) if isinstance(given, Sequence) else (given,) * count
    if len(weights) != count:
        raise InputError(f"weight must be one number, or one for each of the {count} tasks, not {given!r}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise InputError(f"weight must be a finite number, not {weight!r}")
    return tuple(float(weight) for weight in weights)


def _names(matrix: WeightMatrix) -> tuple[str, ...]:
    return matrix.name, *matrix.tied_names


def _has(source: Mapping[str, Tensor] | Folder, matrix: WeightMatrix) -> bool:
    return isinstance(source, Folder) or _delta_of(source, matrix) is not None


def _delta_of(source: Mapping[str, Tensor], matrix: WeightMatrix) -> Tensor | None:
    return next((source[name] for name in _names(matrix) if name in source), None)


def _delta(source: Mapping[str, Tensor] | Folder, matrix: WeightMatrix, work: Tensor, origin: Tensor) -> Tensor | None:
    """What one task changes of a matrix, in the working dtype."""
    if isinstance(source, Folder):
        return source.read(matrix).to(work) - origin
    delta = _delta_of(source, matrix)
    return None if delta is None else delta.reshape(work.shape).to(work)


def _elected(deltas: Sequence[Tensor], density: float) -> Tensor:
    """TIES: trim each delta, elect a sign for each element, average what agrees with it."""
    kept = torch.stack([_trimmed(delta, density) for delta in deltas])
    agrees = kept * kept.sum(0).sign() > 0
    return torch.where(agrees, kept, 0.0).sum(0) / agrees.sum(0).clamp(min=1)


def _trimmed(delta: Tensor, density: float) -> Tensor:
    """A delta with its smallest magnitudes set to 0, but for one element at least."""
    drop = delta.numel() - max(1, math.floor(density * delta.numel() + 0.5))
    if not drop:
        return delta
    threshold, ties = kth_smallest(drop, delta.dtype, partial(digit_counts, delta, delta.dtype))
    return torch.where(dropped(delta, delta.dtype, threshold, ties), 0.0, delta)


def _require_density(density: object, weights: Sequence[float]) -> None:
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise InputError(f"density must be a share above 0 and at most 1 (not percent), not {density!r}")
    if len(set(weights)) > 1:
        raise InputError("with density= the tasks are averaged: give one weight for all of them")


def _digests(source: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: tensor_digest(delta) for name, delta in sorted(source.items())}
