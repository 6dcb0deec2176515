"""From judged steps to evidence: the certificate's predicate, tracker events, pictures."""

from __future__ import annotations

import inspect
import itertools
import platform
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

import weightproof
from weightproof.baseline import Baseline
from weightproof.certificate import Certificate
from weightproof.errors import InputError
from weightproof.folders.jsonable import to_jsonable
from weightproof.forward.calibration import calibration_windows
from weightproof.forward.windows import random_windows
from weightproof.judgement.case_file import Base, CaseFile, statement_of
from weightproof.judgement.judging import Judged
from weightproof.marchenko_pastur import fit_bulk
from weightproof.numerics.spectrum_sketch import sketch, spectrum_cost, worst_changed
from weightproof.parallel.shards import dealt
from weightproof.probes import values_of
from weightproof.reporting.plots import spectrum_png
from weightproof.statistics.window_reports import is_noted
from weightproof.trackers import GuardEvent, metric_rows, severity, worst_measurements
from weightproof.types import Decision, Measurement, Outcome, Readings, WeightMatrix
from weightproof.weights import iter_tensors, iter_weight_matrices, unwrap

if TYPE_CHECKING:
    from torch import nn

    from weightproof.collective import Processes
    from weightproof.divergence import OutputCache
    from weightproof.session import GuardSession
    from weightproof.transactions.steps import Step

NEVER_TESTED = (
    "contexts longer than the compared windows",
    "languages, domains and safety behaviour outside the compared windows",
    "text that the model writes by itself: only given tokens were scored",
    "the serving runtime and its kernels",
    "tokenizer, chat template and generation settings",
)
RESUMED = "drift of the outputs before the resume: they are compared with those of the resumed weights"
# Of a window of training a certificate keeps every measurement that was not a plain PASS, and the worst of the rest.
_KEPT_PASSES = 12
_SHOWN = 5


def now() -> str:
    """UTC time, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment(on: nn.Module | str) -> dict[str, str]:
    """Versions that shape the numbers, and the device: its name, or that of the device that a model is on."""
    if not isinstance(on, str):
        first = next(itertools.chain(on.parameters(), on.buffers()), None)
        on = "cpu" if first is None else first.device.type
    return {
        "weightproof": weightproof.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": on,
    }


def baseline_bytes(baseline: Baseline, cache: OutputCache | None) -> int:
    """Bytes held beside the model for the baseline: spectra, whitening factors, cached outputs."""
    total = 0 if cache is None else cache.nbytes
    for fit in baseline.fits.values():
        for tensor in (fit.singular_values, fit.row_scale, fit.col_scale):
            total += 0 if tensor is None else tensor.numel() * tensor.element_size()
    return total


def step_json(step: Step) -> dict[str, Any]:
    """One judged step as the certificate carries it.

    An edit is written with all of its measurements (`complete`), so that both digests of its decision can be
    computed from them. There may be thousands of windows of training: of these only the newest, whose readings
    are still at hand, and else what is worth a look.
    """
    decision = step.decision
    if decision is None:
        raise InputError(f"step {step.name!r} was not judged")
    complete = step.kind.name != "train" or step.judged is not None

    def rows(measurements: tuple[Measurement, ...]) -> list[Any]:
        return [to_jsonable(m) for m in (measurements if complete else _kept(measurements))]

    return {
        "name": step.name,
        "step": step.step,
        "kind": step.kind.name,
        "action": str(decision.action),
        "applied": step.applied,
        "situation": decision.situation,
        "reason": decision.reason,
        "warned": decision.warned,
        "monitor": step.monitor,
        "assurance": str(decision.assurance),
        "policy_digest": decision.policy_digest,
        "decision_digest": decision.digest,
        "evidence_digest": decision.evidence_digest,
        "world_size": decision.world_size,
        "seconds": round(step.seconds, 4),
        "complete": complete,
        "record": to_jsonable(step.record),
        "divergence": to_jsonable(step.divergence),
        "losses": to_jsonable(step.losses),
        "verdicts": [
            {
                "guard": verdict.guard,
                "outcome": str(verdict.outcome),
                "reason": verdict.reason,
                "num_measured": verdict.num_measured,
                "num_eligible": verdict.num_eligible,
                "measurements": rows(verdict.measurements),
                "num_measurements": len(verdict.measurements),
            }
            for verdict in decision.verdicts
        ],
        "reported": rows(decision.reported),
        "spectra": list(step.spectra),
    }


def _kept(measurements: tuple[Measurement, ...]) -> list[Measurement]:
    loud = [m for m in measurements if m.outcome is not Outcome.PASS or is_noted(m)]
    quiet = sorted((m for m in measurements if m not in loud), key=severity, reverse=True)
    return [*loud, *quiet[:_KEPT_PASSES]]


def certificate_of(session: GuardSession, parent: str | None = None) -> Certificate:
    """The statement over the session's model as it is now.

    The subject is the digest of the last state that the session knows. Whether the model still has it
    is not in the predicate: a verifier recomputes the digest from the weights.

    Args:
        session: The session.
        parent: Digest of the certificate of the model that the session began with.
    """
    return statement_of(case_of(session, parent))


def case_of(session: GuardSession, parent: str | None = None) -> CaseFile:
    """Everything that a session knows of its model."""
    resumed = len(session.resumed_steps)
    judged = {resumed + index: _shared(s.judged) for index, s in enumerate(session.history) if s.judged is not None}
    current, baseline = session.current.readings, session.baseline
    name = type(unwrap(session.model)).__name__
    last = session.history[-1] if session.history else None
    return CaseFile(
        subject_name=name,
        tensors={tensor: reading.digest for tensor, reading in current.tensors.items()},
        baseline=Base(
            readings=_with_outputs(baseline.readings, judged.values()),
            created_at=baseline.created_at,
            environment=baseline.environment,
            name=name,
        ),
        current=current,
        policy=session.policy,
        windows=windows_json(session.windows),
        steps=[*session.resumed_steps, *(step_json(step) for step in session.history)],
        judged=judged,
        environment=environment(session.model),
        created_at=now(),
        ties={named.name: named.tied_names for named in iter_tensors(session.model) if named.tied_names},
        transient=[named.name for named in iter_tensors(session.model) if not named.persistent],
        world_size=session.processes.size,
        differing_ranks={n: r.differing_ranks for n, r in current.tensors.items() if r.differing_ranks},
        cost={**to_jsonable(session.cost), "seconds": session.cost.seconds},
        not_tested=[
            *not_tested(current, last.decision if last else None),
            "the folder written to disk: `weightproof verify` compares one with this certificate",
            *([RESUMED] if resumed else []),
        ],
        parent=parent,
    )


def _shared(judged: Judged) -> Judged:
    """The same with one reading for baseline and reference where they are of one state, so that it is written once.

    What was read of the baseline's outputs is not in the readings of the state; exact guards do not look at it.
    """
    alike = replace(judged.reference, second_moments=judged.before.second_moments)
    return replace(judged, reference=judged.before) if alike == judged.before else judged


def _with_outputs(baseline: Readings, judged: Iterable[Judged]) -> Readings:
    """The baseline's readings with what was read of its outputs, where a step was judged from them."""
    return next((one.before for one in judged if one.before.model_digest == baseline.model_digest), baseline)


def windows_json(windows: Iterable[Any]) -> list[dict[str, Any]]:
    """Sets of windows as the certificate carries them, with how to make them again."""
    return [{"name": w.name, "digest": w.digest, "num_tokens": w.num_tokens, "made": _made(w)} for w in windows]


def _made(windows: Any) -> dict[str, Any]:
    if windows.name == "random":
        return {"source": "random tokens", **_defaults(random_windows)}
    if windows.name == "calibration":
        return {"source": "the first windows of the retain data", **_defaults(calibration_windows)}
    return {"source": f"the {windows.name} data"}


def _defaults(function: Callable[..., Any]) -> dict[str, int]:
    """The numbers that a function uses where nobody gives others."""
    defaults = ((p.name, p.default) for p in inspect.signature(function).parameters.values())
    return {name: value for name, value in defaults if isinstance(value, int)}


def not_tested(readings: Readings, decision: Decision | None) -> list[str]:
    """What this very decision does not rest on, then what no certificate rests on."""
    found: list[str] = []
    measured = [loss for loss in readings.losses if loss.reason is None]
    if not any(loss.role == "retain" for loss in measured):
        found.append("the loss on text that must stay as good: no loss was measured on retain data")
    if not any(loss.role == "target" for loss in measured):
        found.append("whether the model got better at anything: no target data")
    if not readings.divergence:
        found.append("the outputs of the model: none were compared")
    elif all(reading.windows == "random" for reading in readings.divergence):
        found.append("outputs on real text: they were compared on random tokens only")
    if unread := sorted(m.name for m in readings.matrices.values() if m.reason is not None):
        more = f" and {len(unread) - _SHOWN} more" if len(unread) > _SHOWN else ""
        found.append(f"statistics of the weight matrices {', '.join(unread[:_SHOWN])}{more}: not measured")
    for verdict in decision.verdicts if decision else ():
        if verdict.outcome is Outcome.NOT_MEASURED:
            found.append(f"guard {verdict.guard}: {verdict.reason}")
    return [*found, *NEVER_TESTED]


def event_of(step: Step) -> GuardEvent:
    """What trackers get to see of one judged step."""
    decision = step.decision
    if decision is None:
        raise InputError(f"step {step.name!r} was not judged")
    return GuardEvent(
        name=step.name,
        step=step.step,
        kind=step.kind.name,
        action=str(decision.action),
        applied=step.applied or "",
        situation=decision.situation,
        reason=decision.reason,
        warned=decision.warned,
        monitor=step.monitor,
        rows={**metric_rows(decision.verdicts, decision.reported), **_rollback_rows(step)},
        worst=worst_measurements(decision.verdicts),
        seconds=step.seconds,
    )


def _rollback_rows(step: Step) -> dict[str, float]:
    """Where a run was taken back: to which step, how often by now, and what became of its learning rate."""
    notes = step.record.params if step.record is not None and step.kind.name == "train" else {}
    names = ("rollbacks", "back_to_step", "learning_rate_scale")
    return {f"guard/{name}": float(value) for name in names if isinstance(value := notes.get(name), int | float)}


def spectrum_of_worst(
    step: Step, model: nn.Module, baseline: Baseline, processes: Processes
) -> tuple[bytes | None, tuple[dict[str, Any], ...]]:
    """Spectra of the most changed matrices against the baseline: a picture of the first, sketches of up to three.

    Called on every process while the changed weights are still in place. Nothing where no fitted matrix changed.
    """
    deltas = step.record.relative_delta if step.record is not None else {}
    chosen = worst_changed(iter_weight_matrices(model), deltas, baseline.fits)
    drawn = dealt(
        processes,
        chosen,
        cost=spectrum_cost,
        parts=(values_of,),
        work=lambda matrix, weight: _draw(matrix, baseline, weight, with_picture=matrix is chosen[0]),
        operation="the spectra of the most changed matrices",
    )
    measured = [item for item in drawn if item is not None]
    return next((picture for _, picture in measured if picture is not None), None), tuple(s for s, _ in measured)


def _draw(
    matrix: WeightMatrix, baseline: Baseline, weight: torch.Tensor, *, with_picture: bool
) -> tuple[dict[str, Any], bytes | None] | None:
    before = baseline.fits[matrix.name]
    try:
        after = fit_bulk(weight, name=matrix.name)
    except InputError:
        return None
    picture = spectrum_png(matrix.name, before, after) if with_picture else None
    return sketch(matrix.name, matrix.family, before, after), picture
