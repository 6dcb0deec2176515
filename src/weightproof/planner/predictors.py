"""How much harm a width does to a matrix, before anything is decided: a small interface, and the measured answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from weightproof.collective import Processes
from weightproof.divergence import OutputCache, capture_outputs, measure_divergence
from weightproof.errors import InputError
from weightproof.forward.windows import Windows
from weightproof.judgement.plans import rewrite
from weightproof.parallel.placements import settle
from weightproof.planner.sizes import Grid
from weightproof.snapshot import MatrixBits
from weightproof.types import WeightMatrix


class Predictor(Protocol):
    """Predicted harm of quantizing some matrices and nothing else.

    Predictions are added over a model, so they must be in nats per token and, for small harm, additive. One that has
    `passes` says with it how many passes over the windows it made; else each prediction counts as one.
    """

    @property
    def name(self) -> str:
        """What is measured, in a few words."""
        ...

    def predict(self, matrices: Sequence[WeightMatrix], bits: int) -> float:
        """Nats per token by which these matrices at this width make the model worse; inf where it breaks.

        The model is as it was afterwards. Every process calls this alike and gets the same number.
        """
        ...


@dataclass(frozen=True)
class Scene:
    """What a plan is made for; a predictor that must see it first has `prepare(scene) -> Predictor`.

    Attributes:
        model: As it is now.
        matrices: All that get a width.
        widths: Smallest first.
        grid: How matrices are quantized.
        processes: Who takes part.
        windows: The windows to run the model on; called only where a predictor runs it.
    """

    model: nn.Module
    matrices: tuple[WeightMatrix, ...]
    widths: tuple[int, ...]
    grid: Grid
    processes: Processes
    windows: Callable[[], Sequence[Windows]]


class Unprepared(Protocol):
    """Makes a predictor for a plan."""

    def prepare(self, scene: Scene) -> Predictor:
        """The predictor for this plan. Every process calls this alike."""
        ...


class MeasuredDivergence:
    """KL(base || now) of the outputs with these matrices quantized alone, in nats per token.

    The base's outputs are read once; a prediction is one pass over the same windows. KL is never negative and hardly
    noisy. The paired change of the loss, which it foretells, is both: on few windows its noise hides what one matrix
    does, and a plan then picks the matrices that were lucky (docs/planner.md).

    Args:
        model: The model as it is now.
        windows: What it is run on.
        grid: How matrices are quantized.
        processes: Who takes part.

    Raises:
        InputError: There are no windows, or the model has no logits to compare.
    """

    def __init__(self, model: nn.Module, windows: Sequence[Windows], grid: Grid, processes: Processes) -> None:
        self.model, self.grid, self.processes, self.passes = model, grid, processes, 0
        self._cache: OutputCache = capture_outputs(model, windows, processes=processes)
        self._read()  # refuses a model without logits before anything long

    @property
    def name(self) -> str:
        """KL, and on which windows."""
        return f"KL on {' and '.join(one.name for one in self._cache.windows)} windows"

    def predict(self, matrices: Sequence[WeightMatrix], bits: int) -> float:
        """See `Predictor`; the mean over the windows of all kinds."""
        edit = self.grid.edit({matrix.name: bits for matrix in matrices})
        with trial(self.model, matrices, edit, self.processes):
            self.passes += 1
            return self._read()

    def _read(self) -> float:
        readings = measure_divergence(self.model, self._cache, processes=self.processes).divergence
        if any(reading.hidden_error is not None for reading in readings):
            raise InputError(
                "the model has no logits, so that neither a perplexity nor a KL is defined and no budget can be "
                "planned for: give a model with a language head"
            )
        if any(reading.kl is None or not math.isfinite(reading.kl) for reading in readings):
            return math.inf
        tokens = sum(reading.num_tokens for reading in readings)
        return sum((reading.kl or 0.0) * reading.num_tokens for reading in readings) / tokens


@contextmanager
def trial(model: nn.Module, matrices: Sequence[WeightMatrix], edit: Any, processes: Processes) -> Iterator[None]:
    """Inside, the matrices hold what an edit makes of them; afterwards the bits that they held before.

    Whatever is raised inside, the bits come back.

    Args:
        model: The model that they are of.
        matrices: From `iter_weight_matrices`, after `settle`.
        edit: Plans them; not judged.
        processes: Who takes part.

    Raises:
        RestoreError: If a matrix does not hold its earlier bits afterwards.
    """
    kept = MatrixBits(matrices)
    try:
        rewrite(processes, f"trial of {edit.name}", matrices, edit.plan)
        yield
    finally:
        settle(model)  # a pass may have left weights gathered
        try:
            kept.put_back()
        except KeyboardInterrupt:
            kept.put_back()
            raise
