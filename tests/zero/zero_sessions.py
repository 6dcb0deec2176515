"""What one process does in the tests of guard sessions on DeepSpeed engines, and the same without DeepSpeed."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from trained_models import calibration_windows, load
from zero_engines import Setup, differing, engine_of, join, live_part, named, parts, step
from zero_runs import copies, masters_of

from weightproof import GuardSession, edits
from weightproof.steps import Step

HEAD = "lm_head.weight"


def session_of(model: torch.nn.Module, **options: Any) -> GuardSession:
    return GuardSession(model, policy="balanced", retain=calibration_windows("llama"), timeout=120.0, **options)


def verdict_of(judged: Step) -> dict[str, Any]:
    """What was decided, without the numbers it rests on."""
    decision, record = judged.decision, judged.record
    assert decision is not None
    assert record is not None
    return {
        "action": str(decision.action),
        "applied": judged.applied,
        "guards": {verdict.guard: str(verdict.outcome) for verdict in decision.verdicts},
        "digest": decision.digest,
        "evidence": decision.evidence_digest,
        "changed": record.changed_names,
        "before": record.digest_before,
        "after": record.digest_after,
    }


def numbers_of(session: GuardSession) -> dict[str, dict[str, float | None]]:
    """Every number in the readings of the present state, by kind and name."""
    readings = session.current.readings
    found: dict[str, dict[str, float | None]] = {"matrices": {}, "bulks": {}, "outputs": {}}
    for name, matrix in readings.matrices.items():
        for key in ("frobenius_norm", "spectral_norm", "norm_collapse", "zero_rows", "stable_rank"):
            found["matrices"][f"{name} {key}"] = getattr(matrix, key)
    for name, bulk in readings.bulks.items():
        for key in ("sigma_mp", "edge_plus", "num_spikes", "spike_energy", "ks_distance", "top_over_edge"):
            found["bulks"][f"{name} {key}"] = getattr(bulk, key)
    found["outputs"] |= readings.second_moments
    for reading in readings.divergence:
        found["outputs"] |= {f"{reading.windows} kl": reading.kl, f"{reading.windows} flips": reading.top1_flip_rate}
    return found


def int8_then_int2(session: GuardSession) -> dict[str, Any]:
    facts: dict[str, Any] = {"numbers": numbers_of(session), "model": session.model_digest}
    facts["int8"] = verdict_of(session.apply(edits.RTN(8)))
    facts["int2"] = verdict_of(session.apply(edits.RTN(2)))
    facts["model after"] = session.model_digest
    facts["numbers after"] = numbers_of(session)
    return facts


def alone(setup: Setup) -> dict[str, Any]:
    """The edits on the whole model, in one process, without DeepSpeed."""
    return int8_then_int2(session_of(load("llama").model.to(setup.dtype)))


def guarded(rank: int, size: int, setup: Setup) -> dict[str, Any]:
    """INT8 kept and INT2 rolled back, beside a twin that only ever saw INT8; then both train on."""
    join(size)
    engine, twin = (engine_of(load("llama").model, setup, learning_rate=1e-4) for _ in range(2))
    masters = masters_of(engine)
    session, twins = session_of(engine.module, masters=masters), session_of(twin.module, masters=masters_of(twin))
    facts = int8_then_int2(session)
    twins.apply(edits.RTN(8))
    facts["world"] = session.history[0].decision.world_size
    facts["stale"] = masters.stale()
    facts["unlike the twin"] = {
        "after the rollback": differing(parts(engine), parts(twin)),
        "masters": differing(copies(masters), copies(masters_of(twin))),
    }
    edited = parts(engine)
    step(engine, 1, learning_rate=0.0)
    facts["moved by a step at rate 0"] = differing(parts(engine), edited)
    step(twin, 1, learning_rate=0.0)
    for seed in (2, 3):
        step(engine, seed, learning_rate=1e-4)
        step(twin, seed, learning_rate=1e-4)
    facts["unlike the twin"]["after training on"] = differing(parts(engine), parts(twin))
    facts["still int8"] = {
        name: float((parts(engine)[name].float() - edited[name].float()).abs().max()) for name in edited
    }
    return facts


def other_endings(rank: int, size: int, setup: Setup) -> dict[str, Any]:
    """An edit that raises, a gathered write that is rejected, one that is only monitored, a window that broke."""
    join(size)
    engine = engine_of(load("llama").model, setup, learning_rate=1e-4)
    masters = masters_of(engine)
    session = session_of(engine.module, masters=masters)
    step(engine, 1)
    facts: dict[str, Any] = {}
    before, kept = parts(engine), copies(masters)

    def unlike() -> list[str]:
        return [*differing(parts(engine), before), *differing(copies(masters), kept), *masters.stale()]

    def scale(name: str, factor: float) -> None:
        parameter = named(engine)[name]
        with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=setup.stage == 3):
            if setup.stage < 3 or rank == 0:
                parameter.mul_(factor)

    try:
        with session.edit("breaks off"):
            scale(HEAD, 2.0)
            masters.refresh([HEAD])
            raise RuntimeError("the edit broke off")
    except RuntimeError as error:
        facts["raised"] = str(error)
    facts["unlike after an error"] = unlike()

    with session.edit("times 1000") as judged:
        scale(HEAD, 1000.0)
    facts["times 1000"] = verdict_of(judged)
    facts["unlike after times 1000"] = unlike()
    step(engine, 2, learning_rate=0.0)
    facts["unlike after times 1000 and a step"] = unlike()

    with session.edit("tiny change", on_violation="monitor") as judged:
        scale(HEAD, 1.0 + 2.0**-7)
    facts["tiny change"] = verdict_of(judged)
    facts["stale after a tiny change"] = masters.stale()
    facts["changed by it"] = differing(parts(engine), before)

    session.watch()
    before, kept = parts(engine), copies(masters)
    step(engine, 3, learning_rate=1e-4)
    good = session.check_window(step=3)
    facts["good window"] = verdict_of(good)
    before, kept = parts(engine), copies(masters)
    with torch.no_grad():
        for master in masters.tensors().values():
            master.mul_(float("nan"))  # what a step with NaN gradients leaves behind
    step(engine, 4)
    facts["broken"] = sum(int(live_part(p).isnan().any()) for p in named(engine).values())
    facts["broken window"] = verdict_of(session.check_window(step=4))
    facts["unlike after the broken window"] = unlike()
    return facts
