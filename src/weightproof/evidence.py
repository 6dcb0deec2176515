"""From judged steps to evidence: the certificate's predicate, tracker events, pictures."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

import weightproof
from weightproof.baseline import Baseline
from weightproof.certificate import Certificate
from weightproof.errors import InputError
from weightproof.jsonable import to_jsonable
from weightproof.marchenko_pastur import fit_bulk
from weightproof.plots import spectrum_png
from weightproof.probes import values_of
from weightproof.shards import dealt
from weightproof.trackers import GuardEvent, metric_rows, severity, worst_measurements
from weightproof.types import Assurance, Measurement, Outcome
from weightproof.weights import iter_weight_matrices

if TYPE_CHECKING:
    from torch import nn

    from weightproof.collective import Processes
    from weightproof.divergence import OutputCache
    from weightproof.session import GuardSession
    from weightproof.steps import Step

NEVER_TESTED = (
    "loss and task metrics (this version has no loss guard)",
    "contexts longer than the compared windows",
    "languages, domains and safety behaviour outside the compared windows",
    "the folder written to disk, the serving runtime and its kernels",
    "tokenizer, chat template and generation settings",
)
RESUMED = "drift of the outputs before the resume: they are compared with those of the resumed weights"
# A certificate keeps every measurement that was not a plain PASS, and the worst of the rest.
_KEPT_PASSES = 12


def now() -> str:
    """UTC time, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment(model: nn.Module) -> dict[str, str]:
    """Versions that shape the numbers, and the device that the model is on."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return {
        "weightproof": weightproof.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu" if first is None else first.device.type,
    }


def baseline_bytes(baseline: Baseline, cache: OutputCache | None) -> int:
    """Bytes held beside the model for the baseline: spectra, whitening factors, cached outputs."""
    total = 0 if cache is None else cache.nbytes
    for fit in baseline.fits.values():
        for tensor in (fit.singular_values, fit.row_scale, fit.col_scale):
            total += 0 if tensor is None else tensor.numel() * tensor.element_size()
    return total


def step_json(step: Step) -> dict[str, Any]:
    """One judged step as the certificate carries it."""
    decision = step.decision
    if decision is None:
        raise InputError(f"step {step.name!r} was not judged")
    return {
        "name": step.name,
        "step": step.step,
        "action": str(decision.action),
        "applied": step.applied,
        "situation": decision.situation,
        "reason": decision.reason,
        "warned": decision.warned,
        "monitor": step.monitor,
        "assurance": str(decision.assurance),
        "decision_digest": decision.digest,
        "evidence_digest": decision.evidence_digest,
        "world_size": decision.world_size,
        "seconds": round(step.seconds, 4),
        "record": to_jsonable(step.record),
        "verdicts": [
            {
                "guard": verdict.guard,
                "outcome": str(verdict.outcome),
                "reason": verdict.reason,
                "num_measured": verdict.num_measured,
                "num_eligible": verdict.num_eligible,
                "measurements": [to_jsonable(m) for m in _kept(verdict.measurements)],
                "num_measurements": len(verdict.measurements),
            }
            for verdict in decision.verdicts
        ],
        "reported": [to_jsonable(m) for m in _kept(decision.reported)],
    }


def _kept(measurements: tuple[Measurement, ...]) -> list[Measurement]:
    loud = [m for m in measurements if m.outcome is not Outcome.PASS]
    quiet = sorted((m for m in measurements if m.outcome is Outcome.PASS), key=severity, reverse=True)
    return [*loud, *quiet[:_KEPT_PASSES]]


def certificate_of(session: GuardSession) -> Certificate:
    """The statement over the session's model as it is now.

    The subject is the digest of the last state that the session knows. Whether the model still has it
    is not in the predicate: a verifier recomputes the digest from the weights.
    """
    steps = [*session.resumed_steps, *(step_json(step) for step in session.history)]
    readings, known = session.current.readings, session.baseline.readings.matrices
    last = next((s.decision for s in reversed(session.history) if s.decision is not None), None)
    predicate = {
        "created_at": now(),
        "environment": environment(session.model),
        "world_size": session.processes.size,
        "baseline": {
            "model_digest": session.baseline.model_digest,
            "created_at": session.baseline.created_at,
            "environment": dict(session.baseline.environment),
            "matrices_measured": sum(1 for m in known.values() if m.reason is None),
            "matrices_refused": {m.name: m.reason for m in known.values() if m.reason is not None},
        },
        "policy": {"name": session.policy.name, "digest": session.policy.digest, "resolved": policy_json(session)},
        "windows": [{"name": w.name, "digest": w.digest, "num_tokens": w.num_tokens} for w in session.windows],
        "tensors": {name: reading.digest for name, reading in sorted(readings.tensors.items())},
        "differing_ranks": {
            name: reading.differing_ranks for name, reading in readings.tensors.items() if reading.differing_ranks
        },
        "steps": steps,
        "decision": _last_decision(session),
        "assurance": str(Assurance.NONE if last is None else last.assurance),
        "not_tested": [*NEVER_TESTED, *([RESUMED] if session.resumed_steps else [])],
        "cost": {**to_jsonable(session.cost), "seconds": session.cost.seconds},
    }
    return Certificate.build(
        subject_name=type(session.model).__name__, model_digest=readings.model_digest, predicate=to_jsonable(predicate)
    )


def _last_decision(session: GuardSession) -> dict[str, Any] | None:
    """The newest decision, with the step it was about: after a rollback the subject is the state before that step."""
    for step in reversed(session.history):
        if step.decision is not None:
            found = {"step": step.name, "applied": step.applied}
            return {**found, "action": str(step.decision.action), "reason": step.decision.reason}
    return None


def policy_json(session: GuardSession) -> Mapping[str, Any]:
    """The resolved policy: required guards, every limit and every action."""
    policy = session.policy
    return {
        "required": policy.required,
        "required_training": policy.required_training,
        "limits": policy.limits,
        "actions": policy.actions,
    }


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
        rows=metric_rows(decision.verdicts, decision.reported),
        worst=worst_measurements(decision.verdicts),
        seconds=step.seconds,
    )


def spectrum_of_worst(step: Step, model: nn.Module, baseline: Baseline, processes: Processes) -> bytes | None:
    """Picture of the most changed matrix: baseline spectrum above, changed one below.

    Called on every process while the changed weights are still in place. None when no fitted matrix changed.
    """
    deltas = step.record.relative_delta if step.record is not None else {}
    known = {name: delta for name, delta in deltas.items() if delta is not None and name in baseline.fits}
    if not known:
        return None
    name = max(known, key=lambda key: known[key])
    worst = [matrix for matrix in iter_weight_matrices(model) if matrix.name == name]
    drawn = dealt(
        processes,
        worst,
        cost=lambda matrix: float(matrix.d_out * matrix.d_in),
        parts=(values_of,),
        work=lambda matrix, weight: _draw(matrix.name, baseline, weight),
        operation="the spectrum of the most changed matrix",
    )
    return drawn[0] if drawn else None


def _draw(name: str, baseline: Baseline, weight: torch.Tensor) -> bytes | None:
    try:
        after = fit_bulk(weight, name=name)
    except InputError:
        return None
    return spectrum_png(name, baseline.fits[name], after)
