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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from weightproof.errors import InputError
from weightproof.session import GuardSession
from weightproof.transactions.checks import require_same
from weightproof.transactions.rolling import RollingOptions, place_of_snapshots
from weightproof_callbacks.accelerator_checks import plain, require_attachable
from weightproof_callbacks.attached_guard import EDIT_MODES, AttachedGuard
from weightproof_callbacks.data_position import ReplayableLoader
from weightproof_callbacks.rolling_policy import RollingPolicy, Run, require_replayable_run
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
    rollback: str = "full",
    data: str = "skip",
    lr_factor: float | None = None,
    max_rollbacks: int | None = 3,
    keep: int = 2,
    cooldown: int = 2,
    snapshots: str | None = None,
    snapshot_budget: int | None = None,
    scheduler: Any = None,
    loader: Any = None,
    extra: Mapping[str, Any] | None = None,
    generators: Sequence[Any] = (),
    timeout: float = 600.0,
    warmup_steps: int = 0,
) -> AttachedGuard:
    """Guard a prepared model: call it on every process, after `accelerator.prepare`.

    On a violation the run goes back to its last good state, bit for bit and in place on every process: weights,
    moments, learning-rate schedule, random generators. The batches of the window are skipped: the run continues as one
    that was never given them. An optimizer step with a gradient that is not finite is left out.

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
        snapshot_dir: Keep snapshots in this folder instead of in memory. A run that was killed goes on from the last
            one: `guard.step` says where, skip that many steps of data.
        rollback: "full": weights and training state. "weights": the weights; moments are cleared, everything else
            runs on. Saves the memory of the moments.
        data: "skip", or "replay": the batches of the window are given again (`loader` must be a `ReplayableLoader`).
        lr_factor: After a rollback the learning rate is multiplied by this; None leaves it.
        max_rollbacks: Rollbacks of a run; the violation after them raises, with the last good state in place.
        keep: Last good states that are kept; the older one is for a violation that comes soon after a rollback.
        cooldown: Checks after a rollback within which another violation goes back to the older one.
        snapshots: Where good states are kept: "memory", "pinned" (host memory, pinned where the model is on CUDA) or
            "disk" (needs `snapshot_dir`). By default on disk where a folder is given, else in memory.
        snapshot_budget: Bytes that the states may take together; older ones are dropped first. One that holds no
            state is refused.
        scheduler: Of the learning rate; found by itself where it was prepared with the optimizer.
        loader: The `ReplayableLoader` that the loop iterates over.
        extra: Further objects with `state_dict` and `load_state_dict` that go back with the run, by name.
        generators: Further random generators that training draws from.
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
        options = RollingOptions(
            rollback=rollback,
            data=data,
            lr_factor=lr_factor,
            max_rollbacks=max_rollbacks,
            keep=keep,
            cooldown=cooldown,
            snapshots=place_of_snapshots(snapshots, snapshot_dir),
            snapshot_budget=snapshot_budget,
        )
        if on_violation not in EDIT_MODES:
            raise InputError(f"on_violation must be one of {', '.join(EDIT_MODES)}, not {on_violation!r}")
        require_attachable(accelerator, model, optimizer)
        masters = find_masters(accelerator, model, optimizer)
        run = Run(
            optimizer=optimizer,
            wrapper=_wrapper_of(accelerator, optimizer),
            accelerator=accelerator,
            scheduler=_scheduler_of(accelerator, optimizer) if scheduler is None else scheduler,
            scaler=accelerator.scaler,
            loader=loader,
            no_data=_no_data(loader),
            extra=lambda: extra or {},
            generators=tuple(generators),
        )
        require_replayable_run(options, run, "wrap it, data = ReplayableLoader(data), and give it as loader=")
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
    policy_of_run: RollingPolicy | None = None
    settings = {"every": str(every), "on_violation": on_violation, "warmup_steps": str(warmup_steps)}
    settings |= {"optimizer": "none" if optimizer is None else type(optimizer).__name__, **options.in_words()}
    try:
        require_same(
            session.processes, "attach: compare the settings", settings, "Give every process the same arguments"
        )
        with session.processes.together("attach: what the run consists of"):
            policy_of_run = RollingPolicy(options, session, run, acts=on_violation != "monitor")
        began = policy_of_run.begin(0)
    except BaseException:
        if policy_of_run is not None:
            policy_of_run.remove()
        session.close()
        raise
    guard = AttachedGuard(session, policy_of_run, every=every, on_violation=on_violation, warmup_steps=warmup_steps)
    guard.begin_at(began)
    guard.hang_in(accelerator, model)
    return guard


def _no_data(loader: Any) -> str | None:
    """Why the guard cannot say where the data of a run begins."""
    if isinstance(loader, ReplayableLoader):
        return None
    kind = "no loader was given" if loader is None else f"{type(loader).__name__} cannot be told where to begin"
    return f"{kind}. Iterate over data = ReplayableLoader(data) and give it as loader=, or skip guard.step steps of it"


def _wrapper_of(accelerator: Accelerator, optimizer: Any) -> Any:
    """The wrapper that accelerate put around an optimizer, whichever of the two was given."""
    wrappers = [
        one for one in accelerator._optimizers if optimizer is one or optimizer is getattr(one, "optimizer", one)
    ]
    return wrappers[0] if wrappers and optimizer is not None else None


def _scheduler_of(accelerator: Accelerator, optimizer: Any) -> Any:
    """The one prepared schedule of an optimizer; None where there is none, or where they are several."""
    inner = getattr(optimizer, "optimizer", optimizer)
    found = [
        one
        for one in accelerator._schedulers
        if inner is not None
        and any(getattr(each, "optimizer", each) is inner for each in getattr(one, "optimizers", ()))
    ]
    return found[0] if len(found) == 1 else None


def _default_trackers(accelerator: Accelerator, output_dir: object) -> tuple[str, ...]:
    mirrored = "accelerate" if accelerator.log_with else "wandb" if live_run() is not None else None
    return (*(("jsonl",) if output_dir is not None else ()), *((mirrored,) if mirrored else ()))
