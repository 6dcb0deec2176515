"""Trying K-FAC edits: every energy and formula on the same model, measured, with the weights put back in between.

>>> rows = sweep(model, factors, [0.9, 0.8, 0.6], metrics={"recall": recall(sequences, 8)})    # doctest: +SKIP
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from weightproof.activations import forward_outputs, undisturbed
from weightproof.curvature.factors import Factors
from weightproof.edits.kfac import DEFAULT_TARGETS, KFAC, chosen_by
from weightproof.edits.kfac_controls import KFACControl
from weightproof.errors import InputError
from weightproof.snapshot import MatrixBits, write_matrix
from weightproof.types import WeightMatrix

__all__ = ["Metric", "SweepRow", "clean_nll", "recall", "sweep"]

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class SweepRow:
    """One edit of a sweep.

    Attributes:
        edit: "base" for the model as it is, a formula, or a control ("random", "inverse", "svd").
        energy: Share of the curvature that the K-FAC edit keeps.
        kept_pairs: Share of the pairs (for a control: of the edit that it stands beside), over all its matrices.
        predicted: Predicted loss change, nats per token; None for a control.
        metrics: Each measured number by name.
    """

    edit: str
    energy: float
    kept_pairs: float
    predicted: float | None
    metrics: Mapping[str, float]


def sweep(  # noqa: PLR0913 - each is one axis of the sweep
    model: nn.Module,
    factors: Factors,
    energies: Sequence[float],
    formulas: Sequence[str] = ("original",),
    *,
    metrics: Mapping[str, Metric],
    include: str | Sequence[str] = DEFAULT_TARGETS,
    controls: Sequence[str] = (),
    progress: bool = True,
) -> list[SweepRow]:
    """Apply each edit in turn, measure, and put the weights back bit for bit; also when something is raised.

    Eigendecompositions are made once for all energies and formulas.

    Args:
        model: Left as it was.
        factors: Fitted at its weights.
        energies: Shares to keep.
        formulas: Of `weightproof.curvature.projection.FORMULAS`.
        metrics: Functions of the edited model by name, such as `recall` and `clean_nll` give.
        include: Globs on matrix names.
        controls: Of `weightproof.edits.kfac_controls.CONTROLS`, beside the first formula.
        progress: Show a progress bar.

    Returns:
        The model as it is first, then every edit.

    Raises:
        InputError: If the factors are of other weights, nothing is selected, or a parameter is out of range.
    """
    if not energies or not metrics:
        raise InputError("a sweep needs at least one energy and one metric")
    patterns = (include,) if isinstance(include, str) else tuple(include)
    edits = [KFAC(factors, energy, formula, include=patterns) for energy in energies for formula in formulas]
    chosen = chosen_by(edits[0], model)
    beside = [KFACControl(edit, one) for edit in edits if edit.formula == formulas[0] for one in controls]
    kept = MatrixBits(chosen)
    rows = [SweepRow("base", 1.0, 1.0, 0.0, {name: metric(model) for name, metric in metrics.items()})]
    try:
        for edit in tqdm([*edits, *beside], desc="sweep", unit="edit", disable=None if progress else True, leave=False):
            rows.append(_row(model, edit, chosen, metrics))
            kept.put_back()
    finally:
        kept.put_back()
    return rows


def _row(
    model: nn.Module, edit: KFAC | KFACControl, chosen: Sequence[WeightMatrix], metrics: Mapping[str, Metric]
) -> SweepRow:
    base = edit if isinstance(edit, KFAC) else edit.edit
    readings = [base.read(matrix) for matrix in chosen]
    sizes = [matrix.d_out * matrix.d_in for matrix in chosen]
    for matrix in chosen:
        plan = edit.plan(matrix)
        if plan is not None:
            write_matrix(matrix, plan)
    pairs = sum(one.kept_pairs * size for one, size in zip(readings, sizes, strict=True)) / sum(sizes)
    predicted = None
    if isinstance(edit, KFAC):
        values = [one.predicted_loss_change for one in readings]
        predicted = None if any(value is None for value in values) else sum(value or 0.0 for value in values)
    label = edit.formula if isinstance(edit, KFAC) else edit.control
    return SweepRow(label, base.energy, pairs, predicted, {name: metric(model) for name, metric in metrics.items()})


def recall(sequences: Tensor | Sequence[Sequence[int]], prefix: int, *, suffix: int | None = None) -> Metric:
    """How many sequences a causal model recites: greedy continuation equal to the text, token for token.

    Args:
        sequences: Token ids, each longer than `prefix`.
        prefix: Tokens that are given.
        suffix: Tokens that must follow; None: all that are left.

    Returns:
        A metric: the share that is recited, 0 to 1.

    Raises:
        InputError: If there is no sequence, or one is too short.
    """
    rows = [list(map(int, one))[: None if suffix is None else prefix + suffix] for one in sequences]
    if not rows or prefix < 1 or any(len(row) <= prefix for row in rows):
        raise InputError(f"recall needs sequences of more than {prefix} tokens each, and a prefix of at least 1")

    def measure(model: nn.Module) -> float:
        by_length: dict[int, list[list[int]]] = {}
        for row in rows:
            by_length.setdefault(len(row), []).append(row)
        hits = 0
        with undisturbed(model):
            for group in by_length.values():
                hits += _recited(model, torch.tensor(group), prefix)
        return hits / len(rows)

    return measure


def _recited(model: nn.Module, rows: Tensor, prefix: int) -> int:
    text = rows[:, :prefix]
    alive = torch.ones(len(rows), dtype=torch.bool)
    for position in range(prefix, rows.shape[1]):
        scores = forward_outputs(model, {"input_ids": text}).scores[:, -1]
        alive &= scores.argmax(-1).cpu() == rows[:, position]
        if not alive.any():
            return 0
        # A sequence that has gone astray is lost; the others have said what is written.
        text = rows[:, : position + 1]
    return int(alive.sum())


def clean_nll(batches: Iterable[Mapping[str, Tensor]]) -> Metric:
    """Mean negative log-likelihood of the next token of a causal model, nats per token, over batches that are kept.

    Raises:
        InputError: If there is no batch.
    """
    held = [dict(batch) for batch in batches]
    if not held:
        raise InputError("there is no text to measure the loss on")

    def measure(model: nn.Module) -> float:
        total, count = 0.0, 0
        with undisturbed(model):
            for scores, labels in _scored(model, held):
                total += float(cross_entropy(scores.float(), labels.to(scores.device), reduction="sum"))
                count += len(labels)
        return total / max(1, count)

    return measure


def _scored(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        scores = forward_outputs(model, inputs).scores[:, :-1]
        labels = batch.get("labels", batch["input_ids"])[:, 1:]
        mask = batch.get("attention_mask")
        real = labels.ne(-100) if mask is None else labels.ne(-100) & mask[:, 1:].ne(0)
        yield scores[real.to(scores.device)], labels[real]


def best_at(rows: Sequence[SweepRow], metric: str, most: float, cost: str) -> dict[str, SweepRow]:
    """Of each kind of edit the cheapest one that brings a metric down to `most`: for comparisons at equal recall."""
    found: dict[str, SweepRow] = {}
    edits = [row for row in rows if row.edit != "base" and row.metrics[metric] <= most]
    for label, group in itertools.groupby(sorted(edits, key=lambda row: row.edit), key=lambda row: row.edit):
        found[label] = min(group, key=lambda row: row.metrics[cost])
    return found
