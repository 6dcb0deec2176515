"""What a guard adds to `accelerator.save_state` and asks of `accelerator.load_state`.

Accelerate calls three things, in this order: when saving, the pre-hook (the weights of plain and DDP
models are collected by then, those of FSDP and DeepSpeed are written) and `state_dict` of every
registered object; when loading, the pre-hook, and after models and optimizers are loaded
`load_state_dict` of every registered object.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, save_fsdp_model, save_fsdp_optimizer

from weightproof.errors import EditRejectedError, InputError
from weightproof.session import STATE_FILE, GuardSession
from weightproof.transactions.steps import Step
from weightproof_callbacks.generator_record import GeneratorRecord

STATE_FORMAT = "weightproof-attached-v1"
CERTIFICATE_FILE = "certificate.json"


class Guarded(Protocol):
    """What checkpoints need of the guard that they belong to."""

    session: GuardSession
    step: int

    def judge_rest(self) -> Step | None:
        """Judge what changed since the last check; the window that was taken back now, None if all was kept."""
        ...

    def resume(self, folder: Path, step: int) -> None:
        """Continue from the guard's files in `folder`."""
        ...


class GuardedCheckpoints:
    """Hooks into the checkpoints of one `Accelerator`, and the object that is registered with it.

    Args:
        accelerator: The run's `Accelerator`.
        guard: The guard whose state travels with the checkpoints.
    """

    guards_checkpoints = True

    def __init__(self, accelerator: Accelerator, guard: Guarded) -> None:
        self._accelerator = accelerator
        self._guard = guard
        self._folder: Path | None = None
        self._handles = (
            accelerator.register_save_state_pre_hook(self._before_save),
            accelerator.register_load_state_pre_hook(self._before_load),
        )
        accelerator.register_for_checkpointing(self)

    def remove(self) -> None:
        """Take the hooks and the registered object away: later checkpoints are accelerate's own."""
        for handle in self._handles:
            handle.remove()
        held = self._accelerator._custom_objects
        held[:] = [one for one in held if one is not self]

    # -- what accelerate calls -----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The count of steps; everything else is in the guard's own files."""
        return {"format": STATE_FORMAT, "step": self._guard.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Prove that the weights just loaded are those of the guard's files, and continue from there.

        Raises:
            InputError: If the state is not this guard's.
            BaselineError: If the weights differ, or a file is missing or altered.
        """
        folder, self._folder = self._folder, None
        with self._guard.session.processes.together("load_state: prove the weights"):
            if folder is None or not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
                raise InputError(
                    "the state that accelerate loads for the guard is another object's: attach the guard and call "
                    "register_for_checkpointing in the same order as in the run that saved the checkpoint"
                )
            self._guard.resume(folder, int(state["step"]))

    def _before_save(self, models: list[torch.nn.Module], weights: list[dict[str, Any]], output_dir: str) -> None:
        session, folder = self._guard.session, Path(output_dir)
        rejected = self._guard.judge_rest()
        if rejected is not None:
            self._save_again(models, weights, folder, rejected)
        session.save_state(folder)
        generators = GeneratorRecord.now(session.processes)  # accelerate saves them next, and nothing draws before
        certificate = session.certificate()
        with session.processes.together("save_state: write the certificate"):
            if session.processes.is_main:
                generators.save(folder)
                certificate.save(folder / CERTIFICATE_FILE)

    def _save_again(
        self, models: list[torch.nn.Module], weights: list[dict[str, Any]], folder: Path, rejected: Step
    ) -> None:
        """Replace what accelerate collected, or wrote, before the rollback."""
        accelerator = self._accelerator
        if accelerator.distributed_type == DistributedType.FSDP:
            plugin = accelerator.state.fsdp_plugin
            for index, model in enumerate(models):
                save_fsdp_model(plugin, accelerator, model, str(folder), index)
            for index, optimizer in enumerate(accelerator._optimizers):
                save_fsdp_optimizer(plugin, accelerator, optimizer, models[index], str(folder), index)
        elif len(weights) == len(models):
            for model, held in zip(models, weights, strict=True):
                held.update(accelerator.get_state_dict(model, unwrap=False))
        else:
            reason = "" if rejected.decision is None else f" ({rejected.decision.reason})"
            raise EditRejectedError(
                f"{folder} holds rejected weights: do not use it. {accelerator.distributed_type.value} writes weights "
                f"before the guard is asked, and the window up to step {rejected.step} was rolled back{reason}. The "
                "weights in memory are the last good ones. Call guard.check() before accelerator.save_state()"
            )

    def _before_load(self, models: list[torch.nn.Module], input_dir: str) -> None:
        folder, processes = Path(input_dir), self._guard.session.processes
        with processes.together("load_state: find the guard's files"):
            if processes.is_main and not (folder / STATE_FILE).is_file():
                raise InputError(
                    f"{folder} was saved without a guard: it has no {STATE_FILE}, so nothing proves its weights. To "
                    "start guarding from it, call accelerator.load_state() first and weightproof.attach() after it"
                )
        self._folder = folder
