"""What a guard session accepts from its caller, and the sentences it refuses the rest with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from weightproof.baseline import Baseline
from weightproof.collective import Processes
from weightproof.errors import BaselineError, InputError
from weightproof.judgement.assessment import Assessor
from weightproof.readings.tensors import require_finite
from weightproof.transactions.steps import MasterWeights, Step
from weightproof.types import TensorReading
from weightproof.weights import iter_tensors, unwrap

T = TypeVar("T")


def processes_of(accelerator: Any, timeout: float) -> Processes:
    """The processes of this run, whoever launched them."""
    processes = Processes.join(timeout)
    expected = processes.size if accelerator is None else accelerator.num_processes
    if expected != processes.size:
        processes.close()
        raise InputError(
            f"the accelerator has {expected} processes and torch.distributed {processes.size}: make the Accelerator "
            "before the guard session, in every process"
        )
    return processes


def settings_of(assessor: Assessor, masters: MasterWeights | None) -> dict[str, str]:
    """What must be the same on every process, in words."""
    model, policy = assessor.model, assessor.policy
    return {
        "policy": f"{policy.name} ({policy.digest[:12]})",
        "windows": ", ".join(f"{w.name} ({w.digest[:12]})" for w in assessor.all_windows) or "none",
        "model class": type(unwrap(model)).__name__,
        "number of tensors": str(sum(1 for _ in iter_tensors(model))),
        "master weights": "none" if masters is None else type(masters).__name__,
        "factors": "none" if assessor.factors is None else assessor.factors.digest[:12],
    }


def require_same(processes: Processes, operation: str, ours: Mapping[str, str], advice: str) -> None:
    """Refuse processes that were given different things: they would judge by other rules, look at other data.

    Args:
        processes: Who takes part.
        operation: What is compared, in errors of the comparison itself.
        ours: What this process was given, in words.
        advice: What to do about a difference.

    Raises:
        InputError: On every process, naming two ranks and what differs between them.
    """
    every = processes.gather(operation, dict(ours))
    for rank, theirs in enumerate(every):
        for what, value in theirs.items():
            if value != every[0][what]:
                raise InputError(
                    f"{what}: not the same on every process (rank 0 has {_short(every[0][what])}, rank {rank} has "
                    f"{_short(value)}). {advice}"
                )


def require_same_call(processes: Processes, step: Step, on_violation: str, **declared: object) -> None:
    """Refuse processes that declare a step differently: they would judge it, or carry the verdict out, differently.

    Raises:
        InputError: On every process, naming two ranks and what differs between them.
    """
    ours = {
        "kind": f"{step.kind.name} {step.kind.params() or ''}".strip(),
        "step number": str(step.step),
        "on_violation": on_violation,
        **{what: str(value) for what, value in declared.items()},
    }
    named = {f"{what} of {step.name!r}": value for what, value in ours.items()}
    require_same(processes, f"declaration of {step.name!r}", named, "Make the same call on every process")


def _short(value: str) -> str:
    return value if len(value) <= 200 else f"{value[:200]}..."


def loaded(given: Baseline | Path | str) -> Baseline:
    """A baseline as given, or read from its file."""
    return given if isinstance(given, Baseline) else Baseline.load(given)


def from_main(processes: Processes, what: str, read: Callable[[], T]) -> T:
    """What rank 0 read, on every rank: a folder may exist on its machine only."""
    with processes.together(f"reading {what}"):
        found = read() if processes.is_main else None
    return cast("T", processes.broadcast(what, found))


def as_losses(raw_losses: Sequence[float] | None) -> tuple[float, ...] | None:
    """The losses as numbers."""
    try:
        return None if raw_losses is None else tuple(float(loss) for loss in raw_losses)
    except (TypeError, ValueError) as error:
        raise InputError(f"raw_losses must be one number a step: {error}") from error


def common_losses(ours: tuple[float, ...] | None, processes: Processes) -> tuple[float, ...] | None:
    """The mean over processes of the loss of each step; None where no process saw one.

    Raises:
        InputError: If processes give losses of different numbers of steps.
    """
    every = processes.gather("raw losses", ours)
    seen = [losses for losses in every if losses is not None]
    if not any(seen):
        return seen[0] if len(seen) == len(every) else None
    if len({len(losses or ()) for losses in every}) > 1:
        counts = ", ".join(f"rank {rank}: {len(losses or ())}" for rank, losses in enumerate(every))
        raise InputError(f"every process must give the losses of the same steps, not {counts}")
    return tuple(sum(of_step) / len(of_step) for of_step in zip(*seen, strict=True))


def parse_targets(targets: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """One glob or several as a tuple; None where nothing was declared."""
    if targets is None or isinstance(targets, str):
        return None if targets is None else (targets,)
    found: tuple[object, ...] = tuple(targets) if isinstance(targets, Iterable) else (targets,)
    names = tuple(target for target in found if isinstance(target, str))
    if len(names) != len(found):
        raise InputError(f"targets must be a glob or a list of globs such as 'model.layers.*', not {targets!r}")
    return names


def require_sound(tensors: Mapping[str, TensorReading]) -> None:
    """Refuse a model that is broken, or not one model: a parameter of which processes hold different copies."""
    torn = [reading for reading in tensors.values() if reading.differing_ranks and not reading.is_buffer]
    if torn:
        shown = "; ".join(f"{one.name} on rank {', '.join(map(str, one.differing_ranks))}" for one in torn[:3])
        raise BaselineError(
            f"the processes do not hold the same model: {len(torn)} tensors differ from those of rank 0: {shown}. Load "
            "the same weights on every rank, or prepare the model (accelerator.prepare, DDP) before it is guarded"
        )
    require_finite(tensors, "the baseline", "repair or reload it first")
