"""Level 1, fields that no guard reads twice but a reader believes: they must agree with the rest of the certificate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from weightproof.certifying.form import Content
from weightproof.types import LossReading, Readings
from weightproof.verification.result import Findings, Value

# A quotient of two sums that were written down exactly.
_RELATIVE = 1e-9


def check_coherence(content: Content, findings: Findings) -> None:
    """Names, means of losses, ranks, and what a comparison of two folders cannot have seen."""
    for name, readings in content.readings.items():
        for where, stated in _misnamed(readings):
            findings.misstated(f"readings {name}, {where}", "name", where, stated)
        for loss in readings.losses:
            _check_loss(f"readings {name}, {loss.metric} on {loss.role} data", loss, findings)
    ranks = {name: one.differing_ranks for name, one in content.subject.tensors.items() if one.differing_ranks}
    findings.require_stated("differing_ranks", "tensors", str(ranks), str(dict(content.predicate.differing_ranks)))
    newest = content.predicate.steps[-1] if content.predicate.steps else None
    if newest is not None and newest.judged_on is not None:
        findings.require_stated("world_size", "of the newest step", newest.world_size, content.predicate.world_size)
    if content.certificate.files:
        for where, what, stated in _only_in_sessions(content):
            findings.differs(where, what, "nothing: two folders have none", stated)


def _misnamed(readings: Readings) -> Iterator[tuple[str, str]]:
    for group in (readings.tensors, readings.matrices, readings.bulks, readings.circuits):
        for key, one in group.items():
            if one.name != key:
                yield key, one.name


def _check_loss(where: str, loss: LossReading, findings: Findings) -> None:
    """Means and counts follow from the sums."""
    weight = loss.sums.get("weight", 0.0)
    if loss.reason is not None:
        for name in ("before", "after", "difference", "lower", "upper"):
            findings.require_stated(where, f"{name} of what was not measured", None, getattr(loss, name))
        return
    if not weight > 0:
        findings.differs(where, "weight", "above 0", weight)
        return
    means = {name: loss.sums.get(name, math.nan) / weight for name in ("before", "after")}
    for name, mean in {**means, "difference": means["after"] - means["before"]}.items():
        stated = getattr(loss, name)
        # What is left of two means that nearly cancel is as exact as they are.
        slack = _RELATIVE * max(abs(means["before"]), abs(means["after"]))
        same = stated is not None and (stated == mean or abs(stated - mean) <= slack)
        if not same and not (stated is not None and math.isnan(mean) and math.isnan(stated)):
            findings.misstated(where, name, mean, stated)
    findings.require_stated(where, "tokens_used", int(weight), loss.tokens_used)
    if not 0 < loss.num_used <= loss.num_groups <= loss.num_windows:
        findings.differs(where, "num_used", f"1 to {loss.num_groups} groups of {loss.num_windows}", loss.num_used)


def _only_in_sessions(content: Content) -> Iterator[tuple[str, str, Value]]:
    """What a certificate of two folders claims although only a session can have seen it."""
    predicate = content.predicate
    if predicate.transient:
        yield "transient", "tensors", ", ".join(predicate.transient)
    for index, step in enumerate(predicate.steps):
        if step.kind == "train":
            yield f"step {index} ({step.name})", "kind", "train: a window of training"
    for name, readings in content.readings.items():
        seen: Mapping[str, object] = {
            "raw_losses": readings.raw_losses,
            "loss_spike": readings.loss_spike,
            "in_warmup": readings.in_warmup or None,
            "window": readings.window,
        }
        yield from ((f"readings {name}", what, str(one)) for what, one in seen.items() if one is not None)
        if readings.edit is None:
            continue
        for what in ("replaced_modules", "stray_names", "corrections", "reverted"):
            if found := getattr(readings.edit, what):
                yield f"readings {name}, edit", what, ", ".join(found)
