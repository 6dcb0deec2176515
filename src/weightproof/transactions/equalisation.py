"""Variance equalisation: bring the size of block outputs back to what it was before an edit.

A block whose attention or MLP adds more, or less, than it did (second moment v on the compared windows) gets its
output projection multiplied by alpha = sqrt(v_before / v_now), within limits and for the few that are furthest off.
What the scales do for the loss is measured, paired on the same windows, and they stay only if the interval of the
change lies below -min_effect as a whole. They are taken back bit for bit, never by dividing. Off by default; a scaled
edit is judged by every guard like any other: equalisation accepts nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from weightproof.collective import Processes
from weightproof.judgement.plans import rewrite
from weightproof.losses import LossProbe
from weightproof.parallel.placements import settle
from weightproof.snapshot import MatrixBits
from weightproof.types import LossReading, WeightMatrix
from weightproof.weights import iter_weight_matrices

if TYPE_CHECKING:
    from weightproof.guards.variance import VarianceLimits

# Where a tap is a whole module, the matrices that write its output: experts and the shared one, a state-space mixer.
_WRITERS = re.compile(r"(?:(?:experts|shared_experts?)(?:\.\d+)?\.(?:down_proj|w2)|out_proj)(?:\.weight)?(?:\[\d+\])?")


@dataclass(frozen=True, slots=True)
class Scale:
    """One output projection to scale.

    Attributes:
        tap: The sub-layer whose output is off.
        alpha: The factor.
        matrices: Names of the matrices that write this output.
    """

    tap: str
    alpha: float
    matrices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Equalised:
    """What equalisation did.

    Attributes:
        scales: Those that were tried; in `kept` or not.
        kept: Whether they stay.
        loss: The paired loss with against without them; None where it was not measured.
        reason: In a sentence.
    """

    scales: tuple[Scale, ...]
    kept: bool
    loss: LossReading | None
    reason: str

    @property
    def corrections(self) -> tuple[str, ...]:
        """For `EditRecord.corrections`; empty where nothing stays."""
        if not self.kept:
            return ()
        return tuple(f"equalise {name} by {scale.alpha:.6g}" for scale in self.scales for name in scale.matrices)


def scale_of(before: float, now: float, limits: VarianceLimits) -> float | None:
    """The factor sqrt(before / now) within the clamp; None inside the deadband or without two positive moments."""
    if not (math.isfinite(before) and math.isfinite(now) and before > 0.0 and now > 0.0):
        return None
    alpha = min(max(math.sqrt(before / now), limits.equalise_min_scale), limits.equalise_max_scale)
    return None if abs(alpha - 1.0) <= limits.equalise_deadband else alpha


def helps(reading: LossReading | None, min_effect: float) -> bool:
    """Whether a paired loss shows a gain: one-sided, the whole interval at or below -min_effect.

    Args:
        reading: Loss with the scales minus loss without; the point estimate decides nothing.
        min_effect: In nats per token.
    """
    if reading is None or reading.reason is not None or reading.undecided is not None or reading.upper is None:
        return False
    return math.isfinite(reading.upper) and reading.upper < 0.0 and reading.upper <= -min_effect


def scales_for(
    before: Mapping[str, float],
    now: Mapping[str, float],
    matrices: Iterable[WeightMatrix],
    limits: VarianceLimits,
) -> tuple[Scale, ...]:
    """Which projections to scale, furthest off first, at most `max_equalised` taps.

    Args:
        before: Second moments of the baseline by `windows:tap`. Of several windows the last are used: those of the
            user's data where there are any.
        now: The same of the changed model.
        matrices: Every matrix that may be scaled.
        limits: Clamp, deadband and number.
    """
    known = list(matrices)
    by_tap = {name.rpartition(":")[2]: name for name in before if name in now}
    found: list[Scale] = []
    for tap, name in by_tap.items():
        alpha = scale_of(before[name], now[name], limits)
        written_by = writers(tap, known)
        if alpha is not None and written_by:
            found.append(Scale(tap, alpha, written_by))
    found.sort(key=lambda scale: (-abs(math.log(scale.alpha)), scale.tap))
    return tuple(found[: limits.max_equalised])


def writers(tap: str, matrices: Sequence[WeightMatrix]) -> tuple[str, ...]:
    """Names of the matrices whose scale is that of a tap's output; () where there is none that may be scaled.

    A projection that is tied, cannot be read or has an adapter beside it is left alone: its scale is not only its own.
    """
    prefix = f"{tap}."
    inside = [one for one in matrices if one.name.startswith(prefix)]
    direct = [one for one in inside if one.name == f"{prefix}weight"]
    chosen = direct or [one for one in inside if _WRITERS.fullmatch(one.name.removeprefix(prefix))]
    adapted = any("lora_" in one.name for one in inside)
    sound = all(one.refusal is None and one.is_view and not one.tied_names for one in chosen)
    return tuple(one.name for one in chosen) if chosen and sound and not adapted else ()


def equalise(
    model: torch.nn.Module,
    scales: Sequence[Scale],
    probe: LossProbe,
    min_effect: float,
    processes: Processes,
) -> Equalised:
    """Try scales on a model, and leave them in place only if the loss gains from them.

    Args:
        model: The changed model.
        scales: From `scales_for`.
        probe: Knows the windows; what it has read of the baseline is not touched.
        min_effect: Least gain in nats per token, by the upper end of the interval.
        processes: Who takes part; all call alike.

    Raises:
        RestoreError: If the scales could not be taken back bit for bit.
    """
    trial = probe.again(min_gain=min_effect)
    trial.capture()
    settle(model)  # the passes may have left weights gathered
    asked = {name: scale.alpha for scale in scales for name in scale.matrices}
    matrices = [matrix for matrix in iter_weight_matrices(model) if matrix.name in asked]
    kept = MatrixBits(matrices)
    done = False
    try:
        rewrite(processes, "variance equalisation", matrices, lambda matrix: scaled(matrix.load(), asked[matrix.name]))
        reading = next((one for one in trial.measure() if one.metric == "nll"), None)
        done = helps(reading, min_effect)
    finally:
        settle(model)
        if not done:
            kept.put_back()
    reason = "they help" if done else _why_not(reading, min_effect)
    return Equalised(tuple(scales), done, reading, reason)


def scaled(values: torch.Tensor, alpha: float) -> torch.Tensor:
    """The values times alpha, rounded once to their dtype."""
    return (values.to(torch.float64) * alpha).to(values.dtype)


def _why_not(reading: LossReading | None, min_effect: float) -> str:
    if reading is None:
        return "the scales were not kept: no loss was measured (retain data of a language model is needed)"
    if reading.reason is not None or reading.undecided is not None or reading.upper is None:
        return f"the scales were not kept: {reading.reason or reading.undecided or 'there is no interval'}"
    return (
        f"the scales were not kept: the upper end of the change of the loss, {reading.upper:.4g} nats per token, is "
        f"not at or below -{min_effect:g}"
    )
