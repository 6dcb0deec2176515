"""From readings to statuses: pure functions, each of one diagnostic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weightproof.diagnostics.agreement import Agreement
from weightproof.diagnostics.depth import DepthReading
from weightproof.diagnostics.limits import HealthLimits
from weightproof.diagnostics.numerics import batch_stability, block_growth, per_sample_limit, total_growth
from weightproof.diagnostics.readings import Place
from weightproof.diagnostics.report import Diagnostic, Layers, Status

__all__ = ["Levels", "judged"]

# A summed loss below this a token is learned by heart: its gradient is small because nothing is left to learn.
NOTHING_LEFT = 1e-4


@dataclass(frozen=True, slots=True)
class Levels:
    """What was read at every place.

    Attributes:
        places: In forward order.
        norms: Median norm of the residual stream at real tokens.
        maxima: The largest.
        gradients: Median norm of the summed loss's gradient at tokens that count; None where none came.
        underflow: Share of exact zeros and subnormal numbers among its entries.
    """

    places: tuple[Place, ...]
    norms: Layers
    maxima: Layers
    gradients: Layers
    underflow: Layers

    @property
    def names(self) -> tuple[str, ...]:
        """Public names of the places."""
        return tuple(place.name for place in self.places)

    def trunks(self) -> list[list[int]]:
        """Indices of the places of each list of blocks."""
        found: dict[int, list[int]] = {}
        for index, place in enumerate(self.places):
            found.setdefault(place.trunk, []).append(index)
        return list(found.values())


def judged(  # noqa: PLR0913 - what is judged, then how
    levels: Levels,
    agreement: Agreement | str,
    depth: DepthReading | str,
    limits: HealthLimits,
    *,
    in_warmup: bool = False,
    loss: float | None = None,
) -> dict[str, Diagnostic]:
    """Every diagnostic.

    Args:
        levels: Norms and gradients.
        agreement: Of gradients, or why there is none.
        depth: Use of the blocks, or why it was not measured.
        limits: The thresholds.
        in_warmup: Whether the network is in the warm-up of its training: agreement and depth are not judged then.
        loss: Mean loss a token.
    """
    found = [
        *_growth(levels, limits),
        _floor(levels, limits, loss),
        _underflow(levels, limits),
        _product(levels),
        _stability(levels, agreement, limits, in_warmup=in_warmup),
        _depth(depth, limits, in_warmup=in_warmup),
    ]
    return {one.name: one for one in found}


# -- growth ------------------------------------------------------------------------------------------------------------


def _growth(levels: Levels, limits: HealthLimits) -> list[Diagnostic]:
    """Growth of blocks and of all together, and the smallest of them.

    Growth counts from unit scale on (a root mean square of 1, which a normalisation gives): language models begin
    with embeddings of .02 a feature, and their first block brings the stream to where it stays, 300 times as large.
    """
    ratios: list[float | None] = [None] * len(levels.places)
    above, totals = list(ratios), list(ratios)
    for trunk in levels.trunks():
        known = [levels.norms[index] for index in trunk if levels.norms[index] is not None]
        norms = [one for one in known if one is not None]
        if len(norms) < 2 or len(norms) < len(trunk):
            continue
        bases = [_at_least_unit(norm, levels.places[index].width) for norm, index in zip(norms, trunk, strict=True)]
        for at, index in enumerate(trunk[1:], start=1):
            [ratios[index]] = block_growth(norms[at - 1 : at + 1])
            [above[index]] = block_growth([bases[at - 1], norms[at]])
        totals[trunk[-1]] = total_growth([bases[0], norms[-1]])
    if not any(one is not None for one in ratios):
        reason = "there are no norms of the residual stream at two places or more"
        return [_skipped(name, levels, reason) for name in ("residual_growth", "total_growth", "collapse")]
    found = [
        _extreme("residual_growth", levels, tuple(above), limits.block_growth, Status.FAIL, max),
        _extreme("total_growth", levels, tuple(totals), limits.total_growth, Status.WARN, max),
        _extreme("collapse", levels, tuple(ratios), limits.collapse, Status.FAIL, min),
    ]
    finite = all(one is None or math.isfinite(one) for one in levels.maxima)
    return found if finite else [_overflowed(one, levels) for one in found]


def _at_least_unit(norm: float, width: int | None) -> float:
    """The norm, or that of a stream of unit scale where it is smaller; NaN and unknown widths as they are."""
    return norm if width is None or not norm < math.sqrt(width) else math.sqrt(width)


def _extreme(  # noqa: PLR0913, PLR0917 - the parts of one diagnostic
    name: str, levels: Levels, values: Layers, limit: float, if_beyond: Status, pick: Callable[..., int]
) -> Diagnostic:
    """The largest (or smallest) number of a kind against its limit."""
    known = [index for index, value in enumerate(values) if value is not None]
    broken = [index for index in known if not math.isfinite(_number(values, index))]
    at = broken[0] if broken else pick(known, key=lambda index: _number(values, index))
    value, where = _number(values, at), levels.names[at]
    if broken:
        message = (
            f"{where}: {_words(name, levels)} is {value}, which is no ratio of two norms: the network has diverged"
        )
        return Diagnostic(name, value, values, limit, Status.INVALID, where, message)
    beyond = value > limit if pick is max else value < limit
    side = "above" if pick is max else "below"
    message = f"{where}: {_words(name, levels)} is {value:.3g}" + (
        f", {side} {limit:g}" if beyond else f" (limit {limit:g})"
    )
    return Diagnostic(name, value, values, limit, if_beyond if beyond else Status.PASS, where, message)


def _overflowed(one: Diagnostic, levels: Levels) -> Diagnostic:
    at = next(i for i, value in enumerate(levels.maxima) if value is not None and not math.isfinite(value))
    message = f"{levels.names[at]}: a token's norm is {levels.maxima[at]}: the network has diverged"
    return Diagnostic(one.name, one.value, one.per_layer, one.threshold, Status.INVALID, levels.names[at], message)


def _words(name: str, levels: Levels) -> str:
    counted = ", from unit scale on," if any(place.width is not None for place in levels.places) else ""
    return {
        "residual_growth": f"growth in one block{counted}",
        "total_growth": f"growth over all blocks{counted}",
        "collapse": "the smallest growth in one block",
    }[name]


# -- gradients ---------------------------------------------------------------------------------------------------------


def _floor(levels: Levels, limits: HealthLimits, loss: float | None) -> Diagnostic:
    name, limit, values = "gradient_floor", limits.gradient_floor, levels.gradients
    known = [index for index, value in enumerate(values) if value is not None]
    if not known:
        return _skipped(name, levels, "no gradient reaches any block: the graph is cut, or none was given")
    broken = [index for index in known if not math.isfinite(_number(values, index))]
    at = broken[0] if broken else min(known, key=lambda index: _number(values, index))
    value, where = _number(values, at), levels.names[at]
    if broken:
        return Diagnostic(name, value, values, limit, Status.INVALID, where, f"{where}: the gradient is {value}")
    message = f"{where}: the gradient of a token is {value:.3g}"
    cut = [levels.names[index] for index in range(len(values)) if values[index] is None]
    status = Status.WARN if cut else Status.PASS
    if value < limit:
        status = Status.WARN if loss is not None and loss < NOTHING_LEFT else Status.FAIL
        message += f", below {limit:g}"
        if status is Status.WARN:
            message += f" (the loss is {loss:.1g} a token: nothing is left to learn)"
        elif (product := _times(levels, at)) is not None:
            message += f"; times its residual norm that is {product:.2g}"
    else:
        message += f" (limit {limit:g})"
    if cut:
        message += f"; none reaches {cut[0]}" + (f" and {len(cut) - 1} more" if len(cut) > 1 else "")
    return Diagnostic(name, value, values, limit, status, where, message)


def _underflow(levels: Levels, limits: HealthLimits) -> Diagnostic:
    name, limit, values = "gradient_underflow", limits.underflow, levels.underflow
    known = [index for index, value in enumerate(values) if value is not None]
    if not known:
        return _skipped(name, levels, "no gradient reaches any block")
    at = max(known, key=lambda index: _number(values, index))
    value, where = _number(values, at), levels.names[at]
    beyond = value > limit
    message = f"{where}: {value:.1%} of the gradient's entries are zero or subnormal"
    message += f", above {limit:.0%}: train in bfloat16 or with loss scaling" if beyond else f" (limit {limit:.0%})"
    return Diagnostic(name, value, values, limit, Status.WARN if beyond else Status.PASS, where, message)


def _product(levels: Levels) -> Diagnostic:
    """||h|| ||g||, which no rescaling of the residual stream under a final normalisation changes; reported."""
    values: Layers = tuple(_times(levels, index) for index in range(len(levels.places)))
    known = [index for index, value in enumerate(values) if value is not None]
    if not known:
        return _skipped("scale_product", levels, "it needs norms and gradients at one place")
    broken = [index for index in known if not math.isfinite(_number(values, index))]
    at = broken[0] if broken else known[-1]
    value, where = _number(values, at), levels.names[at]
    message = f"{where}: residual norm times gradient norm of a token is {value:.3g} (reported, not judged)"
    status = Status.INVALID if broken else Status.PASS
    return Diagnostic("scale_product", value, values, None, status, where, message)


def _times(levels: Levels, index: int) -> float | None:
    norm, gradient = levels.norms[index], levels.gradients[index]
    return None if norm is None or gradient is None else norm * gradient


# -- agreement and depth -----------------------------------------------------------------------------------------------


def _stability(levels: Levels, agreement: Agreement | str, limits: HealthLimits, *, in_warmup: bool) -> Diagnostic:
    """Agreement of samples, which no batch size enters, against the limit for batches of a stated size."""
    name, rows = "stability", limits.stability_rows
    if isinstance(agreement, str):
        return _skipped(name, levels, agreement)
    values, limit = agreement.per_sample, per_sample_limit(limits.stability, rows)
    known = [index for index, value in enumerate(values) if value is not None]
    if not known:
        return _skipped(name, levels, "fewer than two samples have a gradient")
    broken = [index for index in known if not math.isfinite(_number(values, index))]
    at = broken[0] if broken else max(known, key=lambda index: _number(values, index))
    value, where = _number(values, at), levels.names[at]
    if broken:
        return Diagnostic(name, value, values, limit, Status.INVALID, where, f"{where}: the agreement is {value}")
    interval = agreement.intervals[at]
    message = f"{where}: gradients of two samples agree to {value:.2g}{_for_batches(value, rows)}"
    status = Status.SKIPPED
    if agreement.batches < limits.min_batches:
        message += f"; {agreement.batches} batches were read, {limits.min_batches} are needed to judge it"
    elif in_warmup:
        message += "; not judged before the warm-up has ended, when samples share the gradient of token frequencies"
    else:
        status, words = _agreement_status(value, interval, limit)
        message += words
    return Diagnostic(name, value, values, limit, status, where, message, interval)


def _agreement_status(value: float, interval: tuple[float, float] | None, limit: float) -> tuple[Status, str]:
    """A warning only where the whole interval says so: few samples agree by chance."""
    low, high = (value, value) if interval is None else interval
    if low > limit:
        return Status.WARN, f", above {limit:.2g}"
    if interval is not None and high < 0:
        return Status.WARN, ", surely below zero: samples are no independent draws of the data"
    if value > limit:
        return Status.PASS, f", of which the interval from {low:.2g} does not say that it is above {limit:.2g}"
    return Status.PASS, f" (limit {limit:.2g})"


def _for_batches(value: float, rows: int) -> str:
    """The same for batches, in words, where the formula has a value."""
    converted = batch_stability(value, rows)
    return "" if converted is None or converted < 0 else f", those of two batches of {rows} to {converted:.2g}"


def _depth(depth: DepthReading | str, limits: HealthLimits, *, in_warmup: bool) -> Diagnostic:
    name, margin = "depth_utility", limits.depth_margin
    if isinstance(depth, str):
        return Diagnostic(name, None, (), margin, Status.SKIPPED, None, depth)
    values: Layers = tuple(one.estimate for one in depth.intervals)
    if not all(one is None or math.isfinite(one) for one in values):
        return Diagnostic(name, math.nan, values, margin, Status.INVALID, None, "a score is not a number")
    at = max(range(len(values)), key=lambda index: _number(values, index))
    best, where = depth.intervals[at], depth.names[at]
    message = f"{where}: {depth.unit} better by {best.estimate:+.3g}"
    if best.lower is None or best.upper is None:
        return _without_interval(depth, best.estimate, where, message, margin)
    ends = (best.lower, best.upper)
    message += f" [{best.lower:+.3g}, {best.upper:+.3g}] than {depth.baseline}"
    if best.undecided is not None or in_warmup:
        why = best.undecided or "not judged before the warm-up has ended"
        return Diagnostic(name, best.estimate, values, margin, Status.SKIPPED, where, f"{message}; {why}", ends)
    useless = [one for one in depth.intervals if one.upper is not None and one.upper < margin]
    if best.upper < margin:
        status, message = Status.FAIL, f"{message}: less than the margin of {margin:g}"
    elif best.lower < margin:
        status, message = Status.WARN, f"{message}: the interval holds the margin of {margin:g}"
    elif useless:
        status = Status.WARN
        message += f"; {len(useless)} of {len(values)} blocks are not worth the margin of {margin:g}"
    else:
        status, message = Status.PASS, f"{message} (margin {margin:g})"
    return Diagnostic(name, best.estimate, values, margin, status, where, message, ends)


def _without_interval(depth: DepthReading, value: float, where: str, message: str, margin: float) -> Diagnostic:
    status = Status.PASS if value >= margin else Status.FAIL
    message = f"{message} than {depth.baseline} (margin {margin:g}), of two means without the number of items"
    return Diagnostic("depth_utility", value, (value,), margin, status, where, message)


def _skipped(name: str, levels: Levels, reason: str) -> Diagnostic:
    return Diagnostic(name, None, (None,) * len(levels.places), None, Status.SKIPPED, None, reason)


def _number(values: Sequence[float | None], index: int) -> float:
    value = values[index]
    return math.nan if value is None else value
