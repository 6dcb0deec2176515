"""Scores of windows from the outputs of one batch: sums of negative log-likelihood, accuracy, the user's metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightproof.activations import real_positions
from weightproof.errors import InputError
from weightproof.forward.outputs import Part
from weightproof.loss_data.items import IGNORED, LossItem

ScoreFn = Callable[[Tensor, Mapping[str, Tensor]], float]

_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Metric:
    """One number a window.

    Attributes:
        name: "nll" (a sum over scored tokens, or over one class), "accuracy", or the user's name.
        per_token: Whether the number is a sum over `num_scored` tokens rather than one score.
        higher_is_better: For example accuracy.
        score: The user's function of a window's logits and the window; None for ours.
    """

    name: str
    per_token: bool = False
    higher_is_better: bool = False
    score: ScoreFn | None = None


def metrics_of(task: str) -> tuple[Metric, ...]:
    """What is read for a task when the user names no metric."""
    if task == "classes":
        return Metric("accuracy", higher_is_better=True), Metric("nll")
    return (Metric("nll", per_token=True),)


def batch_scores(
    task: str,
    metrics: Sequence[Metric],
    batch: Mapping[str, Tensor],
    parts: tuple[Part, ...],
    items: Sequence[LossItem],
) -> tuple[tuple[float, ...], ...]:
    """The values of every metric for every window of a batch.

    Args:
        task: See `loss_items.Form`.
        metrics: What is read.
        batch: The inputs of the pass.
        parts: Its outputs, without padding.
        items: The windows of the batch, in its order.

    Raises:
        InputError: If the outputs do not fit the labels.
    """
    main = parts[0]
    if metrics[0].score is not None:
        return tuple(tuple(_own(metric, main, row, item) for metric in metrics) for row, item in enumerate(items))
    if main.kind != "logits":
        raise InputError(f"the model gives {main.kind} where the loss needs logits: give a metric for such a model")
    labels = _labels(task, batch, items)
    if len(labels) != len(main.scores):
        raise InputError(f"the model gives logits for {len(main.scores)} positions and there are {len(labels)} labels")
    kept = labels.ne(IGNORED)
    scores, labels, window = main.scores[kept.to(main.scores.device)], labels[kept], main.window[kept]
    if len(labels) and int(labels.max()) >= scores.shape[-1]:
        raise InputError(f"label {int(labels.max())} is beyond the model's {scores.shape[-1]} outputs")
    found = {"nll": _per_window(negative_log_likelihood(scores, labels), window, len(items))}
    if task == "classes":
        hits = scores.argmax(dim=-1).cpu().eq(labels).double()
        # Outputs that are NaN are no prediction, although argmax names one.
        found["accuracy"] = _per_window(
            hits.masked_fill(scores.isnan().any(dim=-1).cpu(), torch.nan), window, len(items)
        )
    return tuple(tuple(found[metric.name][row] for metric in metrics) for row in range(len(items)))


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] for each of n rows, float64 on the CPU.

    The softmax is computed in float32, whatever the logits are stored in, a few rows at a time.

    Args:
        logits: (n, classes), on any device.
        labels: (n,) int64 in [0, classes).
    """
    found = torch.empty(len(labels), dtype=torch.float64)
    step = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    for start in range(0, len(labels), step):
        rows = slice(start, start + step)
        log_probs = torch.log_softmax(logits[rows].float(), dim=-1)
        picked = log_probs.gather(-1, labels[rows, None].to(logits.device))
        found[rows] = -picked[:, 0].double().cpu()
    return found


def _own(metric: Metric, main: Part, row: int, item: LossItem) -> float:
    """The user's score of one window: from its logits in float32 on the CPU, and its inputs and labels."""
    assert metric.score is not None
    logits = main.scores[main.window.to(main.scores.device) == row].float().cpu()
    example = item.inputs if item.labels is None else {**item.inputs, "labels": item.labels}
    is_one_each = len(logits) == 1 and main.window.bincount().max() == 1
    try:
        return float(metric.score(logits[0] if is_one_each else logits, example))
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"metric {metric.name!r} failed on a window ({type(error).__name__}: {error})") from error


def _labels(task: str, batch: Mapping[str, Tensor], items: Sequence[LossItem]) -> Tensor:
    """One label for each scored position of the batch, in the order of its outputs."""
    labels = torch.stack([_required(item) for item in items])
    if task == "classes":
        return labels
    if task == "causal":
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
    real = real_positions(batch, labels.shape, decoder="decoder_input_ids" in batch)
    return labels.flatten() if real is None else labels[real]


def _required(item: LossItem) -> Tensor:
    if item.labels is None:
        raise InputError("a window without labels has no loss: give labels or a metric")
    return item.labels


def _per_window(values: Tensor, window: Tensor, count: int) -> list[float]:
    """Sums in the order of the positions: the same bits whoever computes them."""
    return torch.bincount(window.long(), weights=values, minlength=count).tolist()
