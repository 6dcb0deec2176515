"""Training health: whether the residual stream keeps its scale, gradients arrive, and blocks are of use.

>>> from weightproof import health                                                    # doctest: +SKIP
>>> batches = health.health_batches(held_out, model)                                  # doctest: +SKIP
>>> print(health.diagnose(model, batches))                                            # doctest: +SKIP

What is measured, on held-out batches in eval mode, at every place of the residual stream h_0 ... h_L:

| diagnostic | number | fails |
| --- | --- | --- |
| residual_growth | median token norm after a block over that before it, from unit scale on | above 50 |
| total_growth | the same over all blocks | warns above 1e4 |
| collapse | the smallest growth of a block | below 1/50 |
| gradient_floor | median norm of the summed loss's gradient at a token | below 1e-7 |
| gradient_underflow | share of zeros and subnormal numbers in it | warns above 10 % |
| scale_product | ||h|| ||g||, which no final normalisation changes | reported |
| stability | mean cosine of the gradients of two samples | warns above .0033 (.30 for batches of 128), after warm-up |
| depth_utility | gain over a network without (useful) blocks, paired | interval below .02 |

A number that is not finite is "invalid", a number that is not there "skipped", and neither is a pass. Nothing of a
training is touched: no `.grad`, no optimizer, no random state, no mode, no flag of a parameter.

A network that is trained by a rule of its own (feedback alignment, local losses) is diagnosed like any other, where
its forward pass has a graph; where it has none, a function that returns a `Trace` takes the place of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.collective import Processes
from weightproof.diagnostics.ablation import VARIANTS, frozen_blocks
from weightproof.diagnostics.agreement import Agreement, agreement_of
from weightproof.diagnostics.batches import health_batches, random_batches
from weightproof.diagnostics.capture import Trace
from weightproof.diagnostics.depth import DepthReading, depth_from_means, depth_from_scores
from weightproof.diagnostics.judging import Levels, judged
from weightproof.diagnostics.limits import HealthLimits
from weightproof.diagnostics.numerics import batch_stability, block_growth, per_sample_limit, stability, total_growth
from weightproof.diagnostics.objective import LossFn, loss_of
from weightproof.diagnostics.passes import depth_of, levels_of, read_model, read_traces
from weightproof.diagnostics.picture import health_png
from weightproof.diagnostics.readings import BatchReading, Place
from weightproof.diagnostics.report import Diagnostic, HealthReport, Layers, Provenance, Status
from weightproof.diagnostics.trunks import Blocks, trunks_of
from weightproof.errors import InputError
from weightproof.families import unwrap
from weightproof.snapshots.tensor_store import model_digest, tensor_digests
from weightproof.weights import iter_tensors

__all__ = [
    "Diagnostic",
    "HealthLimits",
    "HealthReport",
    "Status",
    "Trace",
    "batch_stability",
    "block_growth",
    "depth_from_scores",
    "diagnose",
    "from_numbers",
    "frozen_blocks",
    "health_batches",
    "health_png",
    "per_sample_limit",
    "random_batches",
    "stability",
    "total_growth",
]

_NOT_ASKED = "not measured: give depth='skip' or 'reinit', or the scores of a baseline (health.depth_from_scores)"
_SAMPLED = "labels were drawn from the model itself, so its gradients agree on nothing by construction: give data"


def diagnose(  # noqa: PLR0913 - the source and the data, then options that few need
    source: nn.Module | Callable[[Mapping[str, Tensor]], Trace],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    blocks: Blocks = None,
    loss: LossFn | None = None,
    reduction: str | None = None,
    labels: str = "given",
    depth: str | DepthReading | None = None,
    limits: HealthLimits | None = None,
    in_warmup: bool = False,
    step: int | None = None,
    seed: int = 0,
    digest: bool = True,
    method_name: str = "",
    notes: str = "",
    processes: Processes | None = None,
) -> HealthReport:
    """Diagnose one state of a network.

    In a run of several processes all of them call this with the same batches; each reads its share, all get the
    same report.

    Args:
        source: A model; or, where a training rule has a forward and backward pass of its own, a function that makes
            one pass on a batch and returns a `Trace`.
        batches: Held-out batches, dicts of tensors of one size: 8 or more for agreement to be judged.
        blocks: The blocks of a model: a dotted name ("model.layers"), modules, or several such lists. None: found.
        loss: Called with the model and a batch; None: the loss that the model's class is trained with. It returns one
            loss a sample, or (number, count), or one number whose `reduction` is given.
        reduction: "sum", "mean" or "none": how that loss (or that of traces) was reduced.
        labels: "given", or "sampled" from the model's own distribution where the data has none.
        depth: "skip" or "reinit": leave out each block in turn; or what `depth_from_scores` gave for a baseline.
        limits: Thresholds.
        in_warmup: Whether training is in its warm-up (or has not begun): agreement and depth are not judged then.
        step: Of the training, for the record.
        seed: Of sampled labels and of blocks drawn anew.
        digest: Hash the weights for the record, which reads all of them once.
        method_name: Of what trained the network, for the record.
        notes: For the record.
        processes: The processes of a run; None: those of torch.distributed, or this one alone.

    Raises:
        InputError: If there is no batch, no list of blocks, no loss or no known reduction, or a pass fails.
    """
    listed = _listed(batches)
    limits = HealthLimits() if limits is None else limits
    _check_options(source, depth, labels)
    joined = Processes.join() if processes is None else processes
    try:
        if isinstance(source, nn.Module):
            model = unwrap(source)
            trunks, read_loss = trunks_of(model, blocks), loss_of(model, loss, reduction, labels, seed)
            readings = read_model(model, listed, trunks, read_loss, joined)
            found = depth_of(model, listed, trunks, read_loss, joined, depth, seed) if isinstance(depth, str) else depth
        else:
            model, found = None, depth if isinstance(depth, DepthReading) else None
            readings = read_traces(source, listed, reduction, joined)
    finally:
        if processes is None:
            joined.close()
    levels = levels_of(readings)
    agreement: Agreement | str = _SAMPLED if labels == "sampled" else agreement_of(readings)
    provenance = _provenance(readings, model if digest else None, step, seed, labels, reduction)
    entries = judged(levels, agreement, found or _NOT_ASKED, limits, in_warmup=in_warmup, loss=provenance.loss)
    return HealthReport(
        diagnostics=entries,
        layers=levels.names,
        residual_norms=levels.norms,
        residual_maxima=levels.maxima,
        bp_grad_norms=levels.gradients,
        cross_batch=agreement.cross_batch if isinstance(agreement, Agreement) else (),
        limits=limits,
        provenance=provenance,
        method_name=method_name,
        notes=notes,
        headline_acc=None if found is None else found.score,
        frozen_baseline_acc=None if found is None else found.baseline_score,
    )


def from_numbers(  # noqa: PLR0913 - the fields of the first version of the report
    *,
    method_name: str = "",
    residual_norms: Sequence[float] = (),
    bp_grad_norms: Sequence[float] = (),
    cross_batch_stability: float | None = None,
    batch_size: int = 128,
    num_batches: int | None = None,
    headline_acc: float | None = None,
    frozen_baseline_acc: float | None = None,
    num_items: int | None = None,
    limits: HealthLimits | None = None,
    notes: str = "",
) -> HealthReport:
    """A report from numbers that somebody else measured; what is not given is skipped, never passed.

    Args:
        method_name: Of what trained the network.
        residual_norms: (L + 1,) norms of the residual stream.
        bp_grad_norms: (L + 1,) norms of the *summed* loss's gradient at a token.
        cross_batch_stability: Mean cosine between mean gradients of batches, at any layer.
        batch_size: Samples in those batches.
        num_batches: How many there were.
        headline_acc: Accuracy of the network, a share in [0, 1].
        frozen_baseline_acc: That of the same network with frozen random blocks.
        num_items: How many items both were measured on.
        limits: Thresholds.
        notes: For the record.

    Raises:
        InputError: If norms and gradients differ in length, or a number is out of its range.

    Example:
        >>> from_numbers(residual_norms=[1, 2, 60, 66]).diagnostics["residual_growth"].status.value
        'pass'
        >>> from_numbers(residual_norms=[1, 2, 60, 66]).verdict.split(":")[0]
        'incomplete'
        >>> from_numbers(residual_norms=[1, float("nan"), 3]).overall.value
        'invalid'
    """
    norms, gradients = ([float(one) for one in values] for values in (residual_norms, bp_grad_norms))
    if norms and gradients and len(norms) != len(gradients):
        raise InputError(f"{len(norms)} residual norms beside {len(gradients)} gradient norms: give both at each place")
    size = max(len(norms), len(gradients))
    nothing: Layers = (None,) * size
    levels = Levels(
        places=tuple(Place(f"h{index}", 0) for index in range(size)),
        norms=tuple(norms) or nothing,
        maxima=nothing,
        gradients=tuple(gradients) or nothing,
        underflow=nothing,
    )
    depth: DepthReading | str = "the accuracies of the network and of a frozen baseline were not given"
    if headline_acc is not None and frozen_baseline_acc is not None:
        depth = depth_from_means(headline_acc, frozen_baseline_acc, num_items)
    limits = HealthLimits() if limits is None else limits
    agreement, seen = _given_agreement(cross_batch_stability, batch_size, num_batches, size)
    entries = judged(levels, agreement, depth, limits)
    return HealthReport(
        diagnostics=entries,
        layers=levels.names,
        residual_norms=tuple(norms),
        bp_grad_norms=tuple(gradients),
        cross_batch=seen,
        limits=limits,
        provenance=Provenance(rows=batch_size if seen else None, batches=num_batches),
        method_name=method_name,
        notes=notes,
        headline_acc=headline_acc,
        frozen_baseline_acc=frozen_baseline_acc,
    )


def _given_agreement(cosine: float | None, rows: int, batches: int | None, size: int) -> tuple[Agreement | str, Layers]:
    """Agreement at the middle of the network, where nobody says at which place."""
    if cosine is None:
        return "the agreement of batches was not given", ()
    if math.isfinite(cosine) and not -1 <= cosine <= 1:
        raise InputError(f"the agreement of batches is a cosine in [-1, 1], not {cosine:g}")
    if rows < 1:
        raise InputError(f"batch_size must be at least 1, not {rows}")
    size = max(size, 1)
    per_sample = per_sample_limit(cosine, rows)
    here = [index == size // 2 for index in range(size)]
    seen: Layers = tuple(cosine if one else None for one in here)
    if batches is None:
        batches = HealthLimits().min_batches  # nobody says that there were fewer
    return Agreement(tuple(per_sample if one else None for one in here), (None,) * size, seen, batches), seen


def _check_options(source: object, depth: object, labels: str) -> None:
    if not isinstance(source, nn.Module) and not callable(source):
        raise InputError(f"cannot diagnose a {type(source).__name__}: give a model, or a function that returns a Trace")
    if labels not in ("given", "sampled"):
        raise InputError(f"labels must be 'given' or 'sampled' (from the model's distribution), not {labels!r}")
    if isinstance(depth, str) and depth not in VARIANTS:
        raise InputError(f"depth must be one of {', '.join(VARIANTS)}, or what depth_from_scores gave, not {depth!r}")
    if isinstance(depth, str) and labels == "sampled":
        raise InputError("each network would be scored on labels of its own: depth utility needs labels of the data")
    if isinstance(depth, str) and not isinstance(source, nn.Module):
        raise InputError("blocks can be left out of a model alone: give the scores of a baseline (depth_from_scores)")


def _listed(batches: Any) -> tuple[dict[str, Tensor], ...]:
    if isinstance(batches, Mapping | Tensor) or not isinstance(batches, Iterable):
        raise InputError(f"the batches are one {type(batches).__name__}: give a list of dicts of tensors")
    found = []
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise InputError(f"batch {number} is a {type(batch).__name__}, not a dict of tensors")
        found.append({name: value for name, value in batch.items() if isinstance(value, Tensor)})
    if not found:
        raise InputError("there is no batch to diagnose the network on")
    return tuple(found)


def _provenance(  # noqa: PLR0913, PLR0917 - what a reader must know
    readings: Sequence[BatchReading],
    model: nn.Module | None,
    step: int | None,
    seed: int,
    labels: str,
    reduction: str | None,
) -> Provenance:
    sizes = {batch.rows for batch in readings}
    counts = [batch.count for batch in readings]
    known = [one for one in counts if one]
    total = sum(batch.loss for batch in readings)
    notes = [] if len(sizes) == 1 else ["batches differ in size: agreement between them is not that of one size"]
    return Provenance(
        step=step,
        dtype=readings[0].dtype,
        rows=sizes.pop() if len(sizes) == 1 else None,
        batches=len(readings),
        tokens=sum(batch.tokens for batch in readings),
        seed=seed,
        labels=labels,
        reduction=reduction if reduction is not None else "none",
        loss=total / sum(known) if len(known) == len(counts) and known else None,
        model_digest=None if model is None else _digest(model),
        notes=tuple(notes),
    )


def _digest(model: nn.Module) -> str | None:
    tensors = {one.name: one.tensor for one in iter_tensors(model)}
    if any(hasattr(one, "full_tensor") or one.device == torch.device("meta") for one in tensors.values()):
        return None  # the parts of one process say nothing of the whole
    return model_digest(tensor_digests(tensors))
