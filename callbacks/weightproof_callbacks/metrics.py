"""Metrics of `evaluate` that compare a change with what was before it, pair by pair, offline.

`evaluate.load` fetches the code of a metric from a hub; these are classes of this package and need no network.
They are filled and combined like any other metric:

    combined = evaluate.combine([PairedLoss(), PairedAccuracy(), users_own_metric])
    combined.add_batch(predictions=..., references=..., baseline_predictions=..., ...)
    combined.compute()

`add_batch` gives each metric the inputs it names; `combined.compute(...)` with inputs would hand all of them to all
metrics, so leave it without.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from typing import Any

import evaluate
from datasets import Features, Value

from weightproof.errors import InputError
from weightproof.statistics.paired import PairedSums, interval, perplexity
from weightproof.statistics.proportions import mcnemar, newcombe, paired_counts

_CITATION = """\
Newcombe, R. G. (1998), Improved confidence intervals for the difference between binomial proportions based on paired
data, Statistics in Medicine 17. Efron, B. (1987), Better bootstrap confidence intervals, JASA 82."""
_LOSS_INPUTS = ("baseline_loss_sums", "loss_sums", "weights")


class _PairedMetric(evaluate.Metric):
    """Keeps its inputs in memory in one process, so that nothing is left on disk.

    `evaluate` makes a cache folder for every metric, in the home by default. Where no `cache_dir` is given and there
    is one process, it is a temporary one that goes with the metric. Several processes share files: they need a
    `cache_dir` and an `experiment_id` of their own, as with every metric.
    """

    def __init__(
        self,
        config_name: str | None = None,
        *,
        keep_in_memory: bool | None = None,
        cache_dir: str | None = None,
        num_process: int = 1,
        **options: Any,
    ) -> None:
        if num_process > 1 and cache_dir is None:
            raise InputError("a metric of several processes needs a cache_dir that all of them can write to")
        folder = cache_dir
        if folder is None:
            folder = tempfile.mkdtemp(prefix="weightproof-metric-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        super().__init__(
            config_name,
            keep_in_memory=num_process == 1 if keep_in_memory is None else keep_in_memory,
            cache_dir=folder,
            num_process=num_process,
            **options,
        )


class PairedLoss(_PairedMetric):
    """Difference of mean losses before and after a change, with its interval; as a perplexity ratio too.

    Inputs, one per group (a document, a window or an example): `loss_sums` after the change, `baseline_loss_sums`
    before it, `weights` (scored tokens). The first two may be any per-example score with weights of 1.

    `compute` takes `confidence` (.95), `method` ("bca", "percentile", "confidence-sequence") and `limit` (the largest
    perplexity ratio allowed; without it `decision` is None), and gives baseline_nll, nll, nll_difference, nll_lower,
    nll_upper, perplexity_ratio, perplexity_ratio_lower, perplexity_ratio_upper, effective_size, decision and
    loss_undecided (why the interval must not decide, or None).
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Paired difference of mean losses, as a ratio of sums, with an interval.",
            citation=_CITATION,
            inputs_description="loss_sums, baseline_loss_sums, weights: one number per group, in the same order.",
            features=Features({name: Value("float64") for name in _LOSS_INPUTS}),
        )

    def _compute(self, *, predictions: Any = None, references: Any = None, **inputs: Any) -> dict[str, Any]:
        sums = PairedSums(*(inputs.pop(name) for name in _LOSS_INPUTS))
        return _losses(sums, **inputs)


class PairedAccuracy(_PairedMetric):
    """Difference of accuracies before and after a change, with Newcombe's interval and McNemar's test.

    Inputs, one per example: `predictions` after the change, `baseline_predictions` before it, `references`; labels are
    integers, -1 for no answer. An example without an answer before is left out, one without an answer after is wrong.

    `compute` takes `confidence` (.95) and gives baseline_accuracy, accuracy, accuracy_difference, accuracy_lower,
    accuracy_upper, mcnemar_p (mid-p), mcnemar_exact_p, lost, gained, excluded and accuracy_undecided.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Paired difference of accuracies with Newcombe's interval and McNemar's test.",
            citation=_CITATION,
            inputs_description="predictions, baseline_predictions, references: a label per example, -1 for no answer.",
            features=Features({name: Value("int64") for name in ("predictions", "baseline_predictions", "references")}),
        )

    def _compute(self, *, predictions: Any = None, references: Any = None, **inputs: Any) -> dict[str, Any]:
        return _accuracies(predictions, references, **inputs)


def _losses(
    sums: PairedSums, confidence: float = 0.95, method: str = "bca", limit: float | None = None
) -> dict[str, Any]:
    if limit is not None and not limit > 0:
        raise InputError(f"limit is a perplexity ratio, such as 1.05, got {limit}")
    found = interval(sums, alpha=1.0 - confidence, method=method)
    total = float(sums.weights.sum())
    ends = (found.lower, found.upper)
    ratios = [None if end is None else perplexity(end) for end in ends]
    return {
        "baseline_nll": float(sums.before.sum()) / total,
        "nll": float(sums.after.sum()) / total,
        "nll_difference": found.estimate,
        "nll_lower": found.lower,
        "nll_upper": found.upper,
        "perplexity_ratio": perplexity(found.estimate),
        "perplexity_ratio_lower": ratios[0],
        "perplexity_ratio_upper": ratios[1],
        "effective_size": found.effective_size,
        "decision": None if limit is None else found.decide(math.log(limit)),
        "loss_undecided": found.undecided,
    }


def _accuracies(
    predictions: list[int], references: list[int], baseline_predictions: list[int], confidence: float = 0.95
) -> dict[str, Any]:
    counts = paired_counts(_answers(baseline_predictions, references), _answers(predictions, references))
    found = newcombe(counts, alpha=1.0 - confidence)
    return {
        "baseline_accuracy": counts.before,
        "accuracy": counts.after,
        "accuracy_difference": found.estimate,
        "accuracy_lower": found.lower,
        "accuracy_upper": found.upper,
        "mcnemar_p": mcnemar(counts),
        "mcnemar_exact_p": mcnemar(counts, method="exact"),
        "lost": counts.lost,
        "gained": counts.gained,
        "excluded": counts.excluded,
        "accuracy_undecided": found.undecided,
    }


def _answers(predictions: list[int], references: list[int]) -> list[str]:
    return [
        "abstained" if found == -1 else "right" if found == expected else "wrong"
        for found, expected in zip(predictions, references, strict=True)
    ]
