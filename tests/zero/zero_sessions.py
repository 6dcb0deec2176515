"""What one process does in the tests of guard sessions on DeepSpeed engines, and the same without DeepSpeed."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from trained_models import calibration_windows, load
from zero_engines import Setup, differing, engine_of, join, live_part, named, parts, step
from zero_runs import copies, masters_of

from weightproof import GuardSession, edits
from weightproof.errors import InputError
from weightproof.transactions.steps import Step

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


class Watched:
    """An engine with a session, and the state that its weights and masters are compared with."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.engine = engine_of(load("llama").model, setup, learning_rate=1e-4)
        self.masters = masters_of(self.engine)
        self.session = session_of(self.engine.module, masters=self.masters)
        self.remember()

    def remember(self) -> None:
        self.weights, self.kept = parts(self.engine), copies(self.masters)

    def unlike(self) -> list[str]:
        """What is not as remembered, and what the next step would undo."""
        weights, masters = differing(parts(self.engine), self.weights), differing(copies(self.masters), self.kept)
        return [*weights, *masters, *self.masters.stale()]

    def scale(self, factor: float) -> None:
        """Multiply the head the way DeepSpeed documents it."""
        head, is_3 = named(self.engine)[HEAD], self.setup.stage == 3
        with torch.no_grad(), deepspeed.zero.GatheredParameters([head], modifier_rank=0, enabled=is_3):
            if not is_3 or torch.distributed.get_rank() == 0:
                head.mul_(factor)


def ends_of_edits(rank: int, size: int, setup: Setup) -> dict[str, Any]:
    """An edit that raises, one that replaces a parameter, one that is rejected, one that is only monitored."""
    join(size)
    run = Watched(setup)
    engine, session = run.engine, run.session
    step(engine, 1)
    run.remember()
    facts: dict[str, Any] = {}
    try:
        with session.edit("breaks off"):
            run.scale(2.0)
            run.masters.refresh([HEAD])
            raise RuntimeError("the edit broke off")
    except RuntimeError as error:
        facts["raised"] = str(error)
    facts["unlike after an error"] = run.unlike()

    # Nothing is wrong with the values, so that it is the master that refuses. In stage 3 a parameter that is not
    # DeepSpeed's can be neither gathered nor compared.
    trained = engine.module.lm_head.weight
    values = torch.zeros(40, 64, dtype=setup.dtype) if setup.stage == 3 else trained.detach() * (1 + 2.0**-7)
    try:
        with session.edit("replaced"):
            engine.module.lm_head.weight = torch.nn.Parameter(values)
    except (AttributeError, InputError) as error:
        facts["replaced"] = str(error)
    facts["put back"] = engine.module.lm_head.weight is trained
    facts["unlike after replacing"] = run.unlike()

    with session.edit("times 1000") as judged:
        run.scale(1000.0)
    facts["times 1000"] = verdict_of(judged)
    facts["unlike after times 1000"] = run.unlike()
    step(engine, 2, learning_rate=0.0)
    facts["unlike after times 1000 and a step"] = run.unlike()

    with session.edit("tiny change", on_violation="monitor") as judged:
        run.scale(1.0 + 2.0**-7)
    facts["tiny change"] = verdict_of(judged)
    facts["stale after a tiny change"] = run.masters.stale()
    facts["changed by it"] = differing(parts(engine), run.weights)
    return facts


def ends_of_windows(rank: int, size: int, setup: Setup) -> dict[str, Any]:
    """A window of training that is kept, and one that broke."""
    join(size)
    run = Watched(setup)
    run.session.watch()
    step(run.engine, 1)
    facts: dict[str, Any] = {"good window": verdict_of(run.session.check_window(step=1))}
    facts["moved"] = len(differing(parts(run.engine), run.weights))
    run.remember()
    with torch.no_grad():
        for master in run.masters.tensors().values():
            master.mul_(float("nan"))  # what a step with NaN gradients leaves behind
    step(run.engine, 2)
    facts["broken"] = sum(int(live_part(parameter).isnan().any()) for parameter in named(run.engine).values())
    facts["broken window"] = verdict_of(run.session.check_window(step=2))
    facts["unlike after the broken window"] = run.unlike()
    return facts
