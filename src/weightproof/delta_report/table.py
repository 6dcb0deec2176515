"""One row a candidate: means over the layers that the change touches, and why a number is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from weightproof.candidates.candidate import Candidate, Sources
from weightproof.candidates.from_weights import write_targets
from weightproof.delta_report.cells import NO_PROMPTS, Cell, Ground, Score, cell, ground
from weightproof.errors import InputError
from weightproof.statistics.paired import PairedSums, interval
from weightproof.subspace import (
    Factored,
    Recovery,
    ZeroChangeError,
    activation_weight_gap,
    joint_score,
    weight_target,
)

ACTIVATION_CEILING = "TaskDiff_lora_ceiling"
REPLICATES = 2000
"""Bootstrap resamples of each interval."""


@dataclass(frozen=True)
class Row:
    """One candidate. Every number is a mean over layers, and None where it was not measured (see `reasons`).

    Attributes:
        name: Of the candidate.
        family: Of the candidate.
        axis_kind: write, mixed, read or ceiling.
        rank: Columns of its basis, the most of any layer.
        layers: At how many layers it is defined.
        r_act: R of what the change does to the stream.
        r_act_low: Lower end of the 95 % bootstrap interval over prompts.
        r_act_high: Upper end.
        z_act: Mean z of it.
        r_tensors: R of the change of each matrix that writes, by its name below the block.
        r_weights: R of all of them, balanced.
        z_weights: Mean z of it.
        null_weights: Mean standard deviation of R by chance.
        percent_act: R_act in percent of the best subspace for the same prompts.
        percent_act_ceiling: R_act in percent of the ceiling that was fitted on the other prompts.
        percent_weights: Balanced R_w in percent of its oracle.
        percent_tensors: R_w in percent of the oracle of each matrix.
        joint: Geometric mean of R_act and balanced R_w.
        gap: log2 R_act - log2 R_w.
        specific_act: R_act in what is left without the directions that clean prompts use.
        specific_act_z: Mean z of it.
        specific_weights: The same of balanced R_w.
        specific_weights_z: Mean z of it.
        cosine: Mean cosine of the principal angles with the leading directions of the change.
        reasons: Why numbers are missing, by column; "basis" where the candidate is not defined in this model.
    """

    name: str
    family: str
    axis_kind: str
    rank: int
    layers: int
    r_act: float | None = None
    r_act_low: float | None = None
    r_act_high: float | None = None
    z_act: float | None = None
    r_tensors: Mapping[str, float] = field(default_factory=dict[str, float])
    r_weights: float | None = None
    z_weights: float | None = None
    null_weights: float | None = None
    percent_act: float | None = None
    percent_act_ceiling: float | None = None
    percent_weights: float | None = None
    percent_tensors: Mapping[str, float] = field(default_factory=dict[str, float])
    joint: float | None = None
    gap: float | None = None
    specific_act: float | None = None
    specific_act_z: float | None = None
    specific_weights: float | None = None
    specific_weights_z: float | None = None
    cosine: float | None = None
    reasons: Mapping[str, str] = field(default_factory=dict[str, str])

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Table:
    """All candidates of one change.

    Attributes:
        rows: In the order of the registry.
        layers: Names of the layers over which means were taken.
        tensors: Names below the block of the matrices that write and were changed.
        width: d_model.
        rank: Columns asked of a candidate.
        broad_rank: Columns of what is projected out.
        num_prompts: Prompts that were scored on; 0 without.
    """

    rows: tuple[Row, ...]
    layers: tuple[str, ...]
    tensors: tuple[str, ...]
    width: int
    rank: int
    broad_rank: int
    num_prompts: int

    @property
    def most(self) -> float:
        """The largest that R can be at this rank: d / r."""
        return self.width / self.rank

    def of(self, *axis_kinds: str) -> list[Row]:
        """The rows of these kinds that are defined, the best first: by joint score, else balanced R_w, else R_act."""
        chosen = [row for row in self.rows if row.axis_kind in axis_kinds and "basis" not in row.reasons]
        return sorted(chosen, key=lambda row: (-_rank_by(row), row.name))

    @property
    def undefined(self) -> list[Row]:
        """The rows that are not defined in this model, or need prompts that were not given."""
        return [row for row in self.rows if "basis" in row.reasons]


def _rank_by(row: Row) -> float:
    return next((value for value in (row.joint, row.r_weights, row.r_act) if value is not None), -1.0)


def layers_of(sources: Sources) -> list[int]:
    """The layers over which means are taken: where the change touches a matrix that writes to the stream.

    Where it touches none of those, all layers from the first that it touches on, for what it does to activations. Of
    several stacks (encoder, decoder) only the one whose activations were read.

    Raises:
        InputError: It touches no layer; or nothing that writes, and there are no prompts.
    """
    weights, delta = sources.weights, sources.delta
    assert delta is not None
    layers = [index for index, layer in enumerate(weights.layers) if _is_read(sources, layer.name)]
    writing = [index for index in layers if not isinstance(write_targets(sources, index), str)]
    if writing:
        return writing
    if all(_is_zero(part) for part in delta.parts.values()):
        raise InputError(
            f"the change is zero in all {len(delta.parts)} matrices: was the adapter trained, and do the sides differ?"
        )
    why = str(write_targets(sources, 0))
    inside = [any(name.startswith(f"{layer.name}.") for name in delta.parts) for layer in weights.layers]
    touched = [index for index, is_touched in enumerate(inside) if is_touched]
    if not touched:
        raise InputError(f"the change touches none of the {weights.num_layers} blocks of the model: {why}")
    if sources.captures is None:
        raise InputError(
            f"nothing can be measured on the weights ({why}, and so on for every layer): give --prompts to measure "
            "what it does to activations"
        )
    if not (after := [index for index in layers if index >= touched[0]]):
        raise InputError(
            f"activations were read of no layer from {weights.layers[touched[0]].name} on, which it touches"
        )
    return after


def _is_zero(part: Tensor | Factored) -> bool:
    try:
        weight_target(part)
    except ZeroChangeError:
        return True
    return False


def _is_read(sources: Sources, block: str) -> bool:
    """Whether activations of a block are known, where any are: both sides are means over the same layers."""
    return sources.captures is None or block in sources.captures.layers


def measure(
    sources: Sources,
    candidates: Iterable[Candidate],
    around: Callable[[Sequence[int]], Iterable[int]] = lambda layers: layers,
) -> Table:
    """Every score of every candidate, layer by layer, and the means.

    Args:
        sources: With the change, and with activations where there are prompts.
        candidates: Which ones.
        around: Wraps the layers, for a progress bar.
    """
    layers, chosen = layers_of(sources), list(candidates)
    cells: dict[str, list[Cell]] = {one.name: [] for one in chosen}
    grounds: list[Ground] = []
    for layer in around(layers):
        held = ground(sources, layer)
        grounds.append(held)
        for candidate in chosen:
            cells[candidate.name].append(cell(sources, candidate, held))
    rows = [_row(candidate, cells[candidate.name], grounds) for candidate in chosen]
    ceiling = next((row.r_act for row in rows if row.name == ACTIVATION_CEILING), None)
    tensors = dict.fromkeys(role for held in grounds for role in held.tensors)
    prompts = {len(held.samples) for held in grounds if held.samples is not None}
    return Table(
        rows=tuple(_with_ceiling(row, ceiling) for row in rows),
        layers=tuple(sources.weights.layers[index].name for index in layers),
        tensors=tuple(tensors),
        width=sources.weights.width,
        rank=sources.rank,
        broad_rank=sources.broad_rank,
        num_prompts=max(prompts, default=0),
    )


# ---------------------------------------------------------------- one row


def _row(candidate: Candidate, found: Sequence[Cell], grounds: Sequence[Ground]) -> Row:
    cells = [one for one in found if one.reason is None]
    grounds = [held for held, one in zip(grounds, found, strict=True) if one.reason is None]
    about = (candidate.name, candidate.family, candidate.axis_kind)
    if not cells:
        return Row(*about, rank=0, layers=0, reasons={"basis": str(found[0].reason)})
    reasons = _missing(grounds)
    act = [one.activations for one in cells if one.activations is not None]
    weights = [one.weights for one in cells if one.weights is not None]
    specific_act = _specific([one.specific_activations for one in cells], "specific_act", reasons)
    specific_weights = _specific([one.specific_weights for one in cells], "specific_weights", reasons)
    tensors = _tensors(cells)
    r_act, r_weights = _mean(one.found.ratio for one in act), _mean(one.found.ratio for one in weights)
    low, high = _bootstrap(cells, grounds, reasons)
    return Row(
        *about,
        rank=max(one.rank for one in cells),
        layers=len(cells),
        r_act=r_act,
        r_act_low=low,
        r_act_high=high,
        z_act=_mean(one.found.z for one in act),
        r_tensors={role: fmean(one.found.ratio for one in scores) for role, scores in tensors.items()},
        r_weights=r_weights,
        z_weights=_mean(one.found.z for one in weights),
        null_weights=_mean(one.found.null_std for one in weights),
        percent_act=_percent(act),
        percent_weights=_percent(weights),
        percent_tensors={role: value for role, scores in tensors.items() if (value := _percent(scores)) is not None},
        joint=_both(joint_score, r_act, r_weights, "joint", reasons),
        gap=_both(activation_weight_gap, r_act, r_weights, "gap", reasons),
        specific_act=_mean(one.ratio for one in specific_act),
        specific_act_z=_mean(one.z for one in specific_act),
        specific_weights=_mean(one.ratio for one in specific_weights),
        specific_weights_z=_mean(one.z for one in specific_weights),
        cosine=_mean(one.cosine for one in cells),
        reasons=reasons,
    )


def _missing(grounds: Sequence[Ground]) -> dict[str, str]:
    """Why whole sides were not measured."""
    reasons: dict[str, str] = {}
    sides = (("r_act", [one.activations for one in grounds]), ("r_weights", [one.weights for one in grounds]))
    for name, found in sides:
        if all(isinstance(one, str) for one in found):
            reasons[name] = str(found[0])
    return reasons


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _percent(scores: Sequence[Score]) -> float | None:
    """The mean over layers in percent of the mean of the oracles."""
    most = sum(one.oracle.ratio for one in scores)
    return 100.0 * sum(one.found.ratio for one in scores) / most if most > 0.0 else None


def _tensors(cells: Sequence[Cell]) -> dict[str, list[Score]]:
    found: dict[str, list[Score]] = {}
    for one in cells:
        for role, score in one.tensors.items():
            found.setdefault(role, []).append(score)
    return found


def _specific(found: Sequence[Recovery | str], name: str, reasons: dict[str, str]) -> list[Recovery]:
    known = [one for one in found if isinstance(one, Recovery)]
    if not known:
        reasons[name] = str(found[0])
    return known


def _both(
    score: Callable[[float, float], float | str],
    act: float | None,
    weights: float | None,
    name: str,
    reasons: dict[str, str],
) -> float | None:
    if act is None or weights is None:
        reasons[name] = reasons.get("r_act") or reasons.get("r_weights") or NO_PROMPTS
        return None
    found = score(act, weights)
    if isinstance(found, str):
        reasons[name] = found
        return None
    return found


def _bootstrap(
    cells: Sequence[Cell], grounds: Sequence[Ground], reasons: dict[str, str]
) -> tuple[float | None, float | None]:
    """The 95 % interval of R_act over prompts: prompts are drawn with all of their layers."""
    moved = {one.layer: one.samples.any(1).double() for one in grounds if one.samples is not None}
    measured = [(one.ratios, moved[one.layer]) for one in cells if one.ratios is not None]
    if not measured:
        return None, None
    scores, counts = (torch.stack(list(values)).sum(0) for values in zip(*measured, strict=True))
    if not bool(counts.any()):
        return None, None
    sums = PairedSums(torch.zeros_like(scores).numpy(), scores.numpy(), counts.numpy())
    found = interval(sums, replicates=REPLICATES)
    if found.undecided:
        reasons["r_act_low"] = found.undecided
    return found.lower, found.upper


def _with_ceiling(row: Row, ceiling: float | None) -> Row:
    if row.r_act is None or not ceiling:
        return row
    return replace(row, percent_act_ceiling=100.0 * row.r_act / ceiling)
