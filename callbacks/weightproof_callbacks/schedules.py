"""Schedules of edits in a `Trainer` run: gradual pruning and quantization-aware training, each step guarded.

    >>> guard = GuardCallback(every=50, retain=data)                                   # doctest: +SKIP
    >>> pruning = GradualPruning(final_sparsity=0.5, begin=100, end=800, every=50)     # doctest: +SKIP
    >>> trainer = Trainer(model, args, callbacks=[guard, pruning.attach(guard)])       # doctest: +SKIP

A schedule gives its edits to the guard, which judges the window before each, applies it, judges it, and takes it back
if it is bad; so an edit that fails leaves the run where it was, and the next one is tried at its time. What a schedule
does between its edits (holding pruned weights at 0, showing rounded weights to the forward pass) is a callback of its
own. It needs no meeting of processes: copies that are equal stay equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightproof.edits import RTN, Prune
from weightproof.errors import InputError
from weightproof.snapshot import MatrixBits, write_matrix, write_part
from weightproof.types import WeightMatrix
from weightproof.weights import iter_weight_matrices

if TYPE_CHECKING:
    from weightproof_callbacks.trainer import GuardCallback

__all__ = ["FakeQuantization", "FakeWeights", "GradualPruning", "HeldMasks", "Schedule"]

MODES = ("fake", "round")


class Schedule(Protocol):
    """What `attach` of a schedule does: its edits go to the guard, and it gives the callback that belongs to them."""

    end: int

    @property
    def edits(self) -> dict[int, Any]:
        """Edits by global step."""
        ...

    def attach(self, guard: GuardCallback) -> TrainerCallback:
        """Give the edits to a guard; put the callback beside it."""
        ...


@dataclass(frozen=True)
class GradualPruning:
    """Magnitude pruning from an initial to a final sparsity, fast at first and slowly at the end.

    At step t in {begin, begin + every, ..., end} the sparsity is
    s_f + (s_i - s_f) (1 - (t - begin) / (end - begin))^3 (Zhu and Gupta, arXiv:1710.01878). Between and after
    the edits pruned weights stay exactly 0: they are put back to 0 after every optimizer step.

    Attributes:
        final_sparsity: Share of zeros at the end, above 0 and below 1.
        begin: Global step of the first edit, 1 or more.
        end: Of the last.
        every: Optimizer steps between two edits; divides end - begin.
        initial_sparsity: Share of zeros at `begin`.
        scope: As in `Prune`: "matrix" or "global".
        include: Which matrices, as in `Prune`.
        exclude: Likewise.

    Raises:
        InputError: If a parameter is out of range.

    Example:
        >>> GradualPruning(0.5, begin=10, end=30, every=10).sparsity_at(20)
        0.4375
    """

    final_sparsity: float
    begin: int
    end: int
    every: int
    initial_sparsity: float = 0.0
    scope: str = "matrix"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the parameters."""
        _require_steps(self.begin, self.end, self.every)
        if not 0.0 <= self.initial_sparsity < self.final_sparsity < 1.0:
            raise InputError(
                "sparsities are shares, 0 <= initial_sparsity < final_sparsity < 1, not "
                f"{self.initial_sparsity!r} and {self.final_sparsity!r}"
            )
        self._edit(self.final_sparsity)

    def sparsity_at(self, step: int) -> float:
        """Share of zeros that the edit at a step asks for."""
        left = 1.0 - (step - self.begin) / (self.end - self.begin)
        return self.final_sparsity + (self.initial_sparsity - self.final_sparsity) * left**3

    @property
    def edits(self) -> dict[int, Any]:
        """The pruning of each step; the first is left out where it would prune nothing."""
        steps = range(self.begin, self.end + 1, self.every)
        return {step: self._edit(self.sparsity_at(step)) for step in steps if self.sparsity_at(step) > 0.0}

    def attach(self, guard: GuardCallback) -> HeldMasks:
        """Give the edits to a guard; put the callback that is returned beside it, in any order."""
        edits = self.edits
        _give(guard, edits)
        return HeldMasks(guard, edits)

    def _edit(self, sparsity: float) -> Prune:
        return Prune(round(sparsity, 6), scope=self.scope, include=self.include, exclude=self.exclude)


@dataclass(frozen=True)
class FakeQuantization:
    """Training for a grid: "fake" shows rounded weights to the forward pass, "round" rounds the weights for good.

    "fake": at every `every`-th step from `begin` on, forward and backward pass see RTN(W), and the optimizer moves W
    by that gradient (straight-through estimator, Bengio et al., arXiv:1308.3432). "round": W itself is rounded every
    `every` steps, and training goes on from there. Either way W is rounded for good at `end`, guarded; train no longer
    than that, or the weights leave the grid again.

    Attributes:
        bits: As in `RTN`, and so are granularity, group_size, include and exclude.
        begin: Global step from which on it is done, 1 or more.
        end: Of the last rounding.
        every: Optimizer steps from one to the next.
        mode: "fake" or "round".

    Raises:
        InputError: If a parameter is out of range.
    """

    bits: int
    begin: int
    end: int
    every: int = 1
    mode: str = "fake"
    granularity: str = "channel"
    group_size: int | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.mode not in MODES:
            raise InputError(f"mode must be one of {', '.join(MODES)}, not {self.mode!r}")
        _require_steps(self.begin, self.end, self.every if self.mode == "round" else 1)
        if self.every < 1:
            raise InputError(f"every must be 1 or more optimizer steps, not {self.every!r}")
        self.edit()

    def edit(self) -> RTN:
        """The rounding."""
        return RTN(self.bits, self.granularity, self.group_size, include=self.include, exclude=self.exclude)

    @property
    def edits(self) -> dict[int, Any]:
        """The roundings that stay."""
        steps = range(self.begin, self.end + 1, self.every) if self.mode == "round" else (self.end,)
        return {step: self.edit() for step in steps}

    def attach(self, guard: GuardCallback) -> TrainerCallback:
        """Give the edits to a guard; put the callback that is returned beside it, in any order."""
        _give(guard, self.edits)
        return TrainerCallback() if self.mode == "round" else FakeWeights(self)


def _require_steps(begin: int, end: int, every: int) -> None:
    for name, value in (("begin", begin), ("end", end), ("every", every)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} must be a whole number of optimizer steps, 1 or more, not {value!r}")
    if end <= begin:
        raise InputError(f"end ({end}) must come after begin ({begin})")
    if (end - begin) % every:
        raise InputError(f"every ({every}) must divide end - begin ({end - begin}), so that the last edit is at end")


def _give(guard: GuardCallback, edits: Mapping[int, Any]) -> None:
    """Add edits to those of a guard.

    Raises:
        InputError: It has one at the same step already.
    """
    if both := sorted(guard.edits.keys() & edits.keys()):
        raise InputError(f"the guard has an edit at step {both[0]} already: two cannot be judged apart")
    guard.edits.update(edits)


class HeldMasks(TrainerCallback):
    """Holds what a kept pruning set to 0 at exactly 0, after every optimizer step.

    What is held are the zeros of the matrices that the last kept pruning chose; of a pruning that was taken back
    nothing is held. A rollback of a window goes to a state that the last kept pruning made or a later one, so that
    masks and weights fit each other at any time. Of sharded matrices each process holds its part.
    """

    def __init__(self, guard: GuardCallback, edits: Mapping[int, Prune]) -> None:
        self._guard = guard
        self._edits = dict(edits)
        self._held: list[tuple[WeightMatrix, Tensor]] = []
        self._seen = 0

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Matrix name -> True where a weight may live; of a sharded matrix this process's part."""
        return {matrix.name: mask for matrix, mask in self._held}

    def in_words(self) -> str:
        """How much is held at 0, for people."""
        zeros = sum(int((~mask).sum()) for _, mask in self._held)
        size = sum(mask.numel() for _, mask in self._held)
        share = f": {100 * zeros / size:.1f} % of their weights" if size else ""
        return f"{len(self._held)} matrices are pruned{share}"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hold nothing yet; in a resumed run what the checkpoint had pruned."""
        self._held, self._seen = [], 0
        done = [step for step in self._edits if step <= state.global_step]
        if done:
            self._hold(self._edits[max(done)], kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up what the guard kept since."""
        history = self._guard.history
        for step in history[self._seen :]:
            edit = self._edits.get(step.step)
            if edit is not None and step.name == edit.name and step.applied == "kept":
                self._hold(edit, kwargs["model"])
        self._seen = len(history)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put pruned weights back to 0."""
        for matrix, mask in self._held:
            part = _part(matrix)
            values = torch.where(mask, part, torch.zeros((), dtype=part.dtype, device=part.device))
            write_matrix(matrix, values) if matrix.shard is None else write_part(matrix, values)
        session = self._guard.session
        if self._held and session is not None and session.masters is not None:
            session.masters.refresh([matrix.tensor_name for matrix, _ in self._held])

    def _hold(self, edit: Prune, model: nn.Module) -> None:
        chosen = [one for one in iter_weight_matrices(model) if one.refusal is None and edit.selects(one)]
        # A matrix of zeros was never pruned (an adapter before its first step): it must be free to learn.
        pairs = [(one, _part(one) != 0) for one in chosen]
        self._held = [(one, mask) for one, mask in pairs if not mask.all() and mask.any()]


def _part(matrix: WeightMatrix) -> Tensor:
    """What this process holds of a matrix, on live storage."""
    return (matrix.load() if matrix.shard is None else matrix.shard.local).detach()


class FakeWeights(TrainerCallback):
    """Shows rounded weights to forward and backward pass, and gives the optimizer the weights themselves."""

    def __init__(self, schedule: FakeQuantization) -> None:
        self._schedule = schedule
        self._edit = schedule.edit()
        self._matrices: Sequence[WeightMatrix] = ()
        self._own: MatrixBits | None = None
        self.steps_shown = 0

    def in_words(self) -> str:
        """How often rounded weights were shown, for people."""
        return f"{len(self._matrices)} matrices were shown rounded in {self.steps_shown} steps"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the matrices.

        Raises:
            InputError: If one of them is sharded.
        """
        chosen = [
            one for one in iter_weight_matrices(kwargs["model"]) if one.refusal is None and self._edit.selects(one)
        ]
        sharded = next((one.name for one in chosen if one.shard is not None), None)
        if sharded is not None:
            raise InputError(
                f"{sharded} is sharded: no process can round its part alone; use mode: round, or train with DDP"
            )
        self._matrices = chosen

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put rounded weights in place of the weights."""
        since = state.global_step - self._schedule.begin
        if since < 0 or since % self._schedule.every or state.global_step >= self._schedule.end:
            return
        self._own = MatrixBits(self._matrices)
        for matrix in self._matrices:
            rounded = self._edit.plan(matrix)
            if rounded is not None:
                write_matrix(matrix, rounded)
        self.steps_shown += 1

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the weights back, bit for bit, before they are moved."""
        self._put_back()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The same where no optimizer step was taken."""
        self._put_back()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The same."""
        self._put_back()

    def _put_back(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            own.put_back()
