"""`weightproof.attach`: guards a training loop of your own on Accelerate.

    >>> model, optimizer, data = accelerator.prepare(model, optimizer, data)  # doctest: +SKIP
    >>> with attach(accelerator, model, optimizer, every=50) as guard:         # doctest: +SKIP
    ...     for batch in data:
    ...         with accelerator.accumulate(model):
    ...             accelerator.backward(model(**batch).loss)
    ...             optimizer.step()
    ...             optimizer.zero_grad()

What happens at which event, on every process alike:

| event | what the guard does |
| --- | --- |
| `attach` | baseline, last good snapshot, hooks |
| after a step of the torch optimizer | count it; every `every` steps judge the window |
| `accelerator.save_state` | judge what is not judged yet, then write the guard's files beside the weights |
| `accelerator.load_state` | refuse a folder without these files; prove that the weights are those they describe |
| `detach`, end of the `with` block | judge the last window, remove every hook, write the certificate |

The trigger runs inside `optimizer.step()`, when the parameters are written and nothing else of the
step is left to do but the gradient scaler's update: a rollback there is a rollback between two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from weightproof.errors import InputError
from weightproof.session import GuardSession
from weightproof_callbacks.accelerator_checks import plain, require_attachable
from weightproof_callbacks.attached_guard import EDIT_MODES, AttachedGuard
from weightproof_callbacks.sharded import find_masters
from weightproof_callbacks.trainer_checks import known_to_all, require_positive
from weightproof_callbacks.wandb_tracker import live_run

if TYPE_CHECKING:
    from weightproof.policy import Policy
    from weightproof.trackers import Tracker

__all__ = ["AttachedGuard", "attach"]


def attach(  # noqa: PLR0913 - one call holds all that a run decides
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: Any = None,
    *,
    policy: str | Path | Policy = "balanced",
    every: int = 50,
    retain: Any = None,
    target: Any = None,
    on_violation: str = "rollback",
    trackers: Sequence[Tracker | str] | None = None,
    output_dir: str | Path | None = None,
    snapshot_dir: str | Path | None = None,
    timeout: float = 600.0,
    warmup_steps: int = 0,
) -> AttachedGuard:
    """Guard a prepared model: call it on every process, after `accelerator.prepare`.

    On a violation the weights go back to the last good snapshot, bit for bit and in place on every
    process, and the optimizer's per-parameter state is cleared. Learning rate, generators and data
    order run on: the data of the window is skipped.

    Args:
        accelerator: The run's `Accelerator`.
        model: The model, as `accelerator.prepare` returned it.
        optimizer: The optimizer, as `prepare` returned it (or the torch optimizer inside). Without one
            nothing is judged by itself: call `check()`.
        policy: Tier name, path of a policy file, or `Policy`.
        every: Optimizer steps between two checks; what is saved is checked, too.
        retain: Data on which the model must not get worse; see `GuardSession`.
        target: Data on which each edit must gain; see `GuardSession`.
        on_violation: "rollback"; "stop" (roll back and raise `EditRejectedError` on every process);
            "monitor" (only report).
        trackers: Trackers or their registered names. By default the JSONL log where there is a folder for
            it, "accelerate" where the Accelerator was made with `log_with=`, else W&B where a run is open.
        output_dir: Folder for certificate and log; by default `weightproof` in the Accelerator's
            `project_dir`. Without either, only checkpoints get a certificate.
        snapshot_dir: Keep snapshots in this folder instead of in memory.
        timeout: Seconds that a process waits for the others before it says who is missing.
        warmup_steps: Optimizer steps of learning-rate warm-up: gross growth rejects nothing in them.

    Returns:
        The guard, running.

    Raises:
        InputError: An argument is out of its range or differs between processes, the model was not
            prepared, the optimizer trains another one, or a guard is attached already.
        BaselineError: The model holds NaN or inf, or its copies differ between processes.
        CollectiveError: Not every process came to attach.
    """
    with known_to_all(timeout):
        require_positive("every", every)
        if on_violation not in EDIT_MODES:
            raise InputError(f"on_violation must be one of {', '.join(EDIT_MODES)}, not {on_violation!r}")
        require_attachable(accelerator, model, optimizer)
        masters = find_masters(accelerator, model, optimizer)
    if output_dir is None and accelerator.project_dir is not None:
        output_dir = Path(accelerator.project_dir) / "weightproof"
    session = GuardSession(
        plain(accelerator, model),
        policy=policy,
        retain=retain,
        target=target,
        accelerator=accelerator,
        trackers=_default_trackers(accelerator, output_dir) if trackers is None else trackers,
        output_dir=output_dir,
        snapshot_dir=snapshot_dir,
        timeout=timeout,
        masters=masters,
    )
    settings = (every, on_violation, warmup_steps, optimizer is None)
    try:
        if any(others != settings for others in session.processes.gather("attach: compare the settings", settings)):
            raise InputError("every, on_violation, warmup_steps and optimizer must be the same on every process")
        session.watch()
    except BaseException:
        session.close()
        raise
    guard = AttachedGuard(session, optimizer, every=every, on_violation=on_violation, warmup_steps=warmup_steps)
    guard.hang_in(accelerator, model)
    return guard


def _default_trackers(accelerator: Accelerator, output_dir: object) -> tuple[str, ...]:
    mirrored = "accelerate" if accelerator.log_with else "wandb" if live_run() is not None else None
    return (*(("jsonl",) if output_dir is not None else ()), *((mirrored,) if mirrored else ()))
