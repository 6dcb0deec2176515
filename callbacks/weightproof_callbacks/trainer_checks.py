"""What `GuardCallback` refuses, with the sentence it refuses it with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from weightproof.collective import Processes
from weightproof.errors import InputError, WeightproofError
from weightproof.transactions.checks import require_same
from weightproof.weights import iter_weight_matrices

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments


def require_positive(name: str, value: object) -> None:
    """Refuse anything but a whole number of steps."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a whole number of steps, 1 or more, not {value!r}")


def checked_edits(edits: Mapping[int, Any] | None) -> dict[int, Any]:
    """The schedule as a dict, after refusing what is no step and what is no edit."""
    if edits is None:
        return {}
    if not isinstance(edits, Mapping):
        raise InputError(f"edits must map a global step to an edit, such as {{500: RTN(8)}}, not {edits!r}")
    for step, edit in edits.items():
        require_positive("a step in edits", step)
        missing = [name for name in ("plan", "selects") if not callable(getattr(edit, name, None))]
        if missing:
            raise InputError(
                f"edits[{step}] has no {missing[0]}(): {edit!r} is no edit, use one such as weightproof.edits.RTN"
            )
    return dict(edits)


def require_edits_that_apply(edits: Mapping[int, Any], model: nn.Module) -> None:
    """Refuse, before any training, an edit that would find nothing to change."""
    matrices = [matrix for matrix in iter_weight_matrices(model) if matrix.refusal is None]
    for step, edit in edits.items():
        if not any(edit.selects(matrix) for matrix in matrices):
            raise InputError(
                f"edits[{step}] ({edit.name}) selects no weight matrix of this model: check its include= and exclude="
            )


def begins_an_epoch(args: TrainingArguments, state: TrainerState, loader: Any) -> bool:
    """Whether the step that begins now is the first of an epoch, as Trainer counts them."""
    try:
        batches = len(loader)
    except TypeError:  # streamed data: one epoch without end
        return state.global_step == 0
    steps = max(1, -(-batches // args.gradient_accumulation_steps))
    return state.global_step % steps == 0


# ---- what must be the same on every process -------------------------------------------------------------------------


@contextmanager
def known_to_all(timeout: float) -> Iterator[None]:
    """Work before the processes meet in a session: who fails in it tells the others, who wait there.

    Args:
        timeout: Seconds to wait for processes that have not come to their session yet.
    """
    try:
        yield
    except Exception as error:
        # What the meeting itself raises here matters less than what went wrong on this process.
        with suppress(WeightproofError):
            _tell(error, timeout)
        raise


def _tell(error: Exception, timeout: float) -> None:
    processes = Processes.join(timeout)
    try:
        with processes.together("preparing the guard"):
            raise error
    finally:
        processes.close()


def require_all_processes(args: TrainingArguments) -> None:
    """Refuse processes of which each would train a model of its own, over the checkpoints of the others."""
    distributed = torch.distributed
    joined = distributed.is_available() and distributed.is_initialized()
    launched = distributed.get_world_size() if joined else 1
    if args.world_size != launched:
        raise InputError(
            f"{launched} processes were launched but TrainingArguments sees {args.world_size}: each would train a "
            "model of its own. On a machine without GPU pass use_cpu=True, or export ACCELERATE_USE_CPU=true"
        )


def require_same_schedule(
    processes: Processes,
    args: TrainingArguments,
    state: TrainerState,
    edits: Mapping[int, Any],
    settings: Mapping[str, object],
) -> None:
    """Refuse processes that would come to the guard at different steps, and wait there for the others.

    Args:
        processes: Who takes part.
        args: As Trainer gives it to a callback.
        state: Likewise, when training begins.
        edits: The schedule of edits.
        settings: Further settings of the callback, by name.

    Raises:
        InputError: On every process, naming two ranks and what differs between them.
    """
    ours = {
        **settings,
        "schedule of edits": ", ".join(f"{step}: {edits[step].name}" for step in sorted(edits)) or "none",
        "step at which training begins": state.global_step,
        "step at which training ends": state.max_steps,
        "schedule of evaluations": f"{IntervalStrategy(args.eval_strategy).value} {state.eval_steps}",
        "schedule of saves": f"{SaveStrategy(args.save_strategy).value} {state.save_steps}",
        "load_best_model_at_end": args.load_best_model_at_end,
    }
    in_words = {name: str(value) for name, value in ours.items()}
    advice = "Start every process with the same arguments, from the same checkpoint"
    require_same(processes, "schedule of the guard", in_words, advice)


def require_same_flags(processes: Processes, where: str, control: TrainerControl) -> None:
    """Refuse control flags that differ between processes: some would save or evaluate, and wait there for the others.

    Raises:
        InputError: On every process, naming the flag and two ranks.
    """
    flags = {
        f"flag {name} at {where}": str(value) for name, value in vars(control).items() if name.startswith("should_")
    }
    advice = "A callback that asks Trainer for something must ask on every process"
    require_same(processes, f"control flags at {where}", flags, advice)
