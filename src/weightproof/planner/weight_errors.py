"""Predictions from the error of the weights alone, without running the model: by curvature, and by Frobenius norm.

`Curvature` needs factors (`weightproof.fit_factors`), fitted once on some data; then all widths of all matrices cost
a few matrix products. `Frobenius` needs nothing and knows nothing of what the weights are for: a baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from weightproof.curvature.factors import Factors
from weightproof.curvature.prediction import loss_form, require_usable
from weightproof.errors import InputError
from weightproof.planner.predictors import MeasuredDivergence, Predictor, Scene
from weightproof.types import WeightMatrix

__all__ = ["PREDICTORS", "Curvature", "Frobenius", "WeightErrors", "predictor_named"]

PREDICTORS = ("measured", "curvature", "frobenius")


@dataclass(frozen=True)
class WeightErrors:
    """Harm told from E = W' - W of each matrix alone; sums over matrices.

    Rank 0 computes, all get its number. No forward pass is made but those of a calibration.

    Attributes:
        name: What is predicted, in a few words.
        scene: What is planned for.
        harm: Of one matrix with its change (d_out, d_in); inf where it breaks.
        scales: Width -> factor on its predictions; 1 where there is none.
        passes: Forward passes that were made over the windows.
    """

    name: str
    scene: Scene
    harm: Callable[[WeightMatrix, Tensor], float]
    scales: Mapping[int, float] = field(default_factory=dict)
    passes: int = 0

    def predict(self, matrices: Sequence[WeightMatrix], bits: int) -> float:
        """See `Predictor`."""
        edit = self.scene.grid.edit({one.name: bits for one in matrices})
        processes, total = self.scene.processes, 0.0
        with processes.together("predicting from the error of the weights"):
            if processes.is_main:
                total = sum(self._of(one, edit.plan(one)) for one in matrices)
        scaled = self.scales.get(bits, 1.0) * processes.broadcast("predicted harm", total)
        return scaled if math.isfinite(scaled) else math.inf

    def _of(self, matrix: WeightMatrix, planned: Tensor | None) -> float:
        if planned is None:
            return 0.0
        change = planned.to(torch.float64) - matrix.load().to(torch.float64)
        return self.harm(matrix, change) if bool(torch.isfinite(change).all()) else math.inf

    def calibrated(self) -> WeightErrors:
        """The same in units of measured KL: of each width, with all matrices at it, one pass over the windows."""
        scene, scales = self.scene, {}
        measured = MeasuredDivergence(scene.model, scene.windows(), scene.grid, scene.processes)
        for width in scene.widths:
            told, found = self.predict(scene.matrices, width), measured.predict(scene.matrices, width)
            is_usable = 0.0 < told < math.inf and 0.0 < found < math.inf
            scales[width] = self.scales.get(width, 1.0) * (found / told if is_usable else 1.0)
        name = f"{self.name}, scaled to {measured.name}"
        return WeightErrors(name, scene, self.harm, scales, self.passes + len(scene.widths))


@dataclass(frozen=True)
class Curvature:
    """Predict by 1/2 tr(G E A E') of factors fitted at the present weights, in nats per token.

    Attributes:
        factors: Of every matrix that is planned for.
    """

    factors: Factors

    def prepare(self, scene: Scene) -> Predictor:
        """The predictor for one plan.

        Raises:
            InputError: If a matrix has no factors, is sharded, or is not that at which they were fitted, or they are no
                covariances or were fitted on fewer tokens than they have dimensions.
        """
        with scene.processes.together("comparing factors with the model"):
            _require_whole(scene)
            self.factors.require_enough_tokens()
            for matrix in scene.matrices:
                factor = self.factors[matrix.name]
                if scene.processes.is_main:
                    require_usable(factor, matrix.load())
        source = self.factors.source
        tokens = max((self.factors[one.name].tokens for one in scene.matrices), default=0)
        name = f"curvature, {source.labels} labels of {tokens:,} tokens, factors {self.factors.digest[:12]}"
        # All widths of a matrix are asked for one after the other: its form is made once.
        form = lru_cache(maxsize=4)(lambda name: loss_form(self.factors[name]))
        return WeightErrors(name, scene, lambda matrix, change: _finite(form(matrix.name)(change)))


@dataclass(frozen=True)
class Frobenius:
    """Predict by ||E||_F^2, scaled so that its sum at each width is the KL measured there.

    A norm is not in nats: without that one pass a width it could serve no budget. It is a baseline.

    Attributes:
        calibrate: False leaves it as it is: for comparisons at equal size only.
    """

    calibrate: bool = True

    def prepare(self, scene: Scene) -> Predictor:
        """The predictor for one plan.

        Raises:
            InputError: If a matrix is sharded.
        """
        with scene.processes.together("looking for sharded matrices"):
            _require_whole(scene)
        found = WeightErrors("squared Frobenius error", scene, _squared)
        return found.calibrated() if self.calibrate else found


def predictor_named(name: str, factors: Factors | None) -> Curvature | Frobenius | None:
    """A predictor by one of `PREDICTORS`, for `plan`; None is the measured one.

    Raises:
        InputError: If there is none of that name, or factors are missing or not used.
    """
    if name not in PREDICTORS:
        raise InputError(f"predictor must be {', '.join(PREDICTORS[:-1])} or {PREDICTORS[-1]}, not {name!r}")
    if name != "curvature":
        if factors is not None:
            raise InputError(f"the {name} predictor uses no factors: leave them out, or choose curvature")
        return None if name == "measured" else Frobenius()
    if factors is None:
        raise InputError(
            "the curvature predictor needs factors: fit them (weightproof factors fit) and name their file"
        )
    return Curvature(factors)


def _require_whole(scene: Scene) -> None:
    for matrix in scene.matrices:
        if matrix.shard is not None:
            raise InputError(
                f"{matrix.name} is sharded over processes, and this predictor needs all of it: plan in one process, or "
                "with the measured predictor"
            )


def _finite(value: float | None) -> float:
    return math.inf if value is None else value


def _squared(matrix: WeightMatrix, change: Tensor) -> float:
    return float(torch.linalg.vector_norm(change) ** 2)
