"""Invariants guard (T0): structure, finiteness, what was declared, and the contract of the declared kind.

No number here is a tuned limit: each is exact. In the order in which they are reported:

- the edit happened: nothing changed although a kind or targets were declared is FAIL;
- structure: a missing or added tensor, a changed shape or embedding size, a broken tie is FAIL; a
  changed dtype, storage or module class is FAIL where the declared kind forbids it, else WARN;
- replicas: a tensor of which two processes hold different copies is FAIL, and names tensor and ranks;
- finiteness of every parameter and buffer, and of the raw losses of a window of training;
- what else a window of training showed: too many steps without a usable gradient, masters that hold other weights,
  moments that no gradients could have made, processes that were given each other's batches,
  a loss that rose and stayed there, losses of a model that guesses (limits in `weightproof.statistics.spikes`; these
  two are no exact facts). Beside them stands what is only reported (`weightproof.statistics.window_reports`);
- scope: a changed tensor that no declared target covers is FAIL;
- reach: block matrices that a declared quantization left as they were are WARN, with their share;
- contract: a breach of a rigorous bound is FAIL, of a typical size WARN, an unmeasured one WARN (`guards.contract`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from weightproof.guards.conclude import conclude, unmeasured
from weightproof.guards.contract import judge_contract, no_op_words
from weightproof.guards.reach import judge_reach
from weightproof.guards.scope import Scope, changed_tensors
from weightproof.guards.structure import judge_structure
from weightproof.statistics.spikes import LASTING_RATIO, MAX_SKIPPED, Score, is_lasting, is_witnessed, most_near
from weightproof.statistics.window_reports import FAMILY, measurement_of, weight_move, worst_reports
from weightproof.types import EditRecord, Measurement, Outcome, Readings, Verdict

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class InvariantsLimits:
    """The invariants are exact: there is nothing to tune."""


@final
class Invariants:
    """Exact facts about every tensor, before and after."""

    name: ClassVar[str] = "invariants"
    tier: ClassVar[str] = "T0"
    needs: ClassVar[frozenset[str]] = frozenset({"tensors", "structure"})
    Limits: ClassVar[type[InvariantsLimits]] = InvariantsLimits

    def judge(self, before: Readings, after: Readings, limits: InvariantsLimits) -> Verdict:
        """Judge every parameter and buffer; see the module's docstring."""
        then, now = (_stored_names(readings) for readings in (before, after))
        names, both = then | now, len(then & now)
        measurements = [
            *_judge_finite(before, after),
            *_judge_replicas(before, after),
            *_judge_losses(after),
            *_judge_window(after),
            *_report_window(after),
            *judge_structure(before, after),
            *_judge_edit(before, after),
            *judge_reach(before, after),
            *judge_contract(before, after),
        ]
        nothing = unmeasured(after, "tensors", "no tensor was read both before and after the change")
        return conclude(self.name, measurements, coverage=(both, len(names)), nothing=nothing)


def _stored_names(readings: Readings) -> frozenset[str]:
    """Names of the tensors; a packed matrix counts once, whatever it consists of."""
    return frozenset(reading.part_of or name for name, reading in readings.tensors.items())


def _judge_finite(before: Readings, after: Readings) -> Iterator[Measurement]:
    """Every parameter and buffer is finite, the baseline's too; unchanged masks of -inf in a buffer are let be."""
    masks = {
        name
        for name, tensor in before.tensors.items()
        if tensor.is_infinite_by_design and name in after.tensors and after.tensors[name].digest == tensor.digest
    }
    for name, tensor in after.tensors.items():
        if tensor.num_nonfinite and name not in masks:
            then = before.tensors.get(name)
            reference = None if then is None else float(then.num_nonfinite)
            reason = f"NaN or infinite elements in a {'buffer' if tensor.is_buffer else 'parameter'}"
            reason += f", on rank {', '.join(map(str, tensor.nonfinite_ranks))} only" if tensor.nonfinite_ranks else ""
            reason += "; the baseline itself is broken" if reference else ""
            yield _broken(name, "num_nonfinite", float(tensor.num_nonfinite), reference, reason)
    for name, tensor in before.tensors.items():
        now = after.tensors.get(name)
        if tensor.num_nonfinite and not tensor.is_infinite_by_design and not (now is not None and now.num_nonfinite):
            count = float(tensor.num_nonfinite)
            yield _broken(name, "baseline_num_nonfinite", count, count, "the baseline itself is broken")
    total = sum(tensor.num_nonfinite for name, tensor in after.tensors.items() if name not in masks)
    yield Measurement("invariants", "model", "num_nonfinite", float(total), 0.0, None if total else 0.0)


def _judge_replicas(before: Readings, after: Readings) -> Iterator[Measurement]:
    """Processes that hold a tensor whole hold the same bits.

    Only reported: buffers that differed before, and those that training moves. Batch normalisation has every
    process count its own share of the data; DDP makes the copies equal again at its next forward pass.
    """
    training = after.edit is not None and after.edit.kind == "train"
    for name, tensor in after.tensors.items():
        if not tensor.differing_ranks:
            continue
        ranks = ", ".join(map(str, tensor.differing_ranks))
        then = before.tensors.get(name)
        count = float(len(tensor.differing_ranks))
        if tensor.is_buffer and (training or (then is not None and then.differing_ranks)):
            why = "processes train on data of their own" if training else "it differed at baseline already"
            reason = f"a buffer of which the copy of rank {ranks} is not that of rank 0: {why}"
            yield Measurement("invariants", name, "differing_replicas", count, None, None, reason=reason)
        else:
            yield _broken(name, "differing_replicas", count, 0.0, f"the copy of rank {ranks} is not that of rank 0")


def _judge_losses(after: Readings) -> Iterator[Measurement]:
    if after.raw_losses is None:
        return
    bad = sum(not _is_finite(loss) for loss in after.raw_losses)
    yield Measurement(
        "invariants",
        "raw losses",
        "num_nonfinite",
        float(bad),
        None,
        0.0,
        outcome=Outcome.FAIL if bad else Outcome.PASS,
        reason=f"of {len(after.raw_losses)} steps in this window" if bad else None,
    )


def _judge_window(after: Readings) -> Iterator[Measurement]:
    """What a window of training showed beside its losses; nothing where nobody looked."""
    window = after.window
    if window is None:
        return
    if window.loss_z is not None and window.loss_ratio is not None and window.loss_rise is not None:
        score = Score(window.loss_z, window.loss_ratio, window.loss_rise)
        norm = None
        if window.norm_z is not None and window.norm_ratio is not None:
            norm = Score(window.norm_z, window.norm_ratio, 0.0)
        lasting, witnessed = is_lasting(score), is_witnessed(score, norm)
        why = f"the last losses lie {score.z:.3g} spreads above what was usual"
        why += f", with a gradient norm {norm.ratio:.3g} times the usual" if norm is not None and witnessed else ""
        yield Measurement(
            "invariants", "raw losses", "lasting_rise", score.ratio, 1.0, LASTING_RATIO,
            outcome=Outcome.FAIL if lasting or witnessed else Outcome.PASS,
            reason=why if lasting or witnessed else None,
        )  # fmt: skip
    if window.num_near is not None and window.guessing is not None:
        limit = most_near(window.num_steps)
        bad = window.num_near > limit
        why = f"steps whose loss is that of a model that guesses ({window.guessing:.3g}), or worse"
        yield Measurement(
            "invariants", "raw losses", "num_near_guessing", float(window.num_near), 0.0, float(limit),
            outcome=Outcome.FAIL if bad else Outcome.PASS,
            reason=why if bad else None,
        )  # fmt: skip
    if window.grad_norms is not None or window.num_skipped:
        many = window.num_skipped > MAX_SKIPPED
        yield Measurement(
            "invariants", "gradients", "num_steps_skipped", float(window.num_skipped), 0.0, float(MAX_SKIPPED),
            outcome=Outcome.FAIL if many else Outcome.PASS,
            reason="steps left out: gradients were not finite or a hundred times too large, or the learning rate leapt",
        )  # fmt: skip
    for name in window.stale_masters:
        yield _broken(name, "stale_master", 1.0, 0.0, "the optimizer's master weights hold something else")
    for found in window.impossible_moments:
        reason = f"{found}: no gradients of this run could have made that"
        yield _broken("optimizer", "impossible_moment", 1.0, 0.0, reason)
    for found in window.disagreements:
        yield _broken("batches", "inputs_disagree", 1.0, 0.0, f"{found}: going back to older weights repairs no loader")


def _report_window(after: Readings) -> Iterator[Measurement]:
    """What is reported of a window of training; `judgement.judging` puts it beside the verdicts."""
    if after.window is None:
        return
    moves = {} if after.edit is None else after.edit.relative_delta
    move = weight_move(after.window.usual_moves, moves)
    reports = worst_reports([*after.window.reports, *([move] if move else [])])
    for report in reports:
        yield measurement_of(report)
    if reports:
        count = float(sum(report.is_noted for report in reports))
        yield Measurement("invariants", "window", "num_noted", count, 0.0, None, FAMILY)


def _is_finite(value: float) -> bool:
    return value - value == 0.0


def _broken(target: str, statistic: str, value: float, reference: float | None, reason: str) -> Measurement:
    return Measurement("invariants", target, statistic, value, reference, 0.0, outcome=Outcome.FAIL, reason=reason)


def _judge_edit(before: Readings, after: Readings) -> Iterator[Measurement]:
    """The edit happened, and only where it was declared."""
    edit = after.edit
    if edit is None:
        return
    changed = changed_tensors(before, after, edit)
    yield Measurement("invariants", "model", "num_changed_tensors", float(len(changed)), None, None)
    if edit.replaced_modules:
        yield Measurement(
            "invariants", "model", "num_replaced_modules", float(len(edit.replaced_modules)), None, None,
            reason=f"another object, or another class: {_few(edit.replaced_modules)}",
        )  # fmt: skip
    if edit.stray_names:
        shown = ", ".join(edit.stray_names[:3])
        reason = f"changed outside of any guarded edit before this one began, and judged with it: {shown}"
        count = float(len(edit.stray_names))
        yield Measurement("invariants", "model", "num_stray_tensors", count, 0.0, 0.0, "model", Outcome.WARN, reason)
    if _is_no_op(before, after, edit, changed):
        yield _judge_no_op(edit)
    if edit.targets is None:
        return
    scope = Scope(before)
    for name in (name for name in changed if not scope.covers(name, edit.targets)):
        yield _broken(name, "undeclared_change", 1.0, 0.0, f"{edit.name!r} declared {', '.join(edit.targets)} only")
    known = tuple(dict.fromkeys([*before.tensors, *after.tensors]))
    for target in edit.targets:
        if not any(scope.covers(name, (target,)) for name in changed):
            yield _unmet(target, exists=any(scope.covers(name, (target,)) for name in known))


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name or "the model itself" for name in names[:_SHOWN]) + more


def _is_no_op(before: Readings, after: Readings, edit: EditRecord, changed: Collection[str]) -> bool:
    """Whether nothing changed; of a merge, whether nothing did but the adapter's own tensors, which it takes away."""
    if edit.kind == "lora_merge":
        return not any(name in before.tensors and name in after.tensors for name in changed)
    return not changed and not edit.replaced_modules


def _judge_no_op(edit: EditRecord) -> Measurement:
    if edit.kind == "train":
        return Measurement("invariants", edit.name, "no_op", 1.0, 0.0, None, reason="no tensor changed in this window")
    declared = edit.kind != "unknown" or edit.targets is not None
    return Measurement(
        "invariants",
        edit.name,
        "no_op",
        1.0,
        0.0,
        0.0,
        outcome=Outcome.FAIL if declared else Outcome.WARN,
        reason=no_op_words(edit) if declared else "no-op edit: no tensor changed",
    )


def _unmet(target: str, *, exists: bool) -> Measurement:
    """A declared target that matches no tensor is FAIL; one that changed nothing is WARN."""
    reason = "no tensor that this target covers was changed" if exists else "this target matches no tensor"
    outcome = Outcome.WARN if exists else Outcome.FAIL
    return Measurement("invariants", target, "unmet_target", 1.0, 0.0, 0.0, outcome=outcome, reason=reason)
