"""The guard that `weightproof.attach` hangs into a training loop: when it judges, and what it does after."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from weightproof.errors import CollectiveError, EditRejectedError, InputError, RestoreError, WeightproofError
from weightproof.session import GuardSession
from weightproof.transactions.steps import Step
from weightproof.types import Action
from weightproof_callbacks.accelerator_checkpoints import GuardedCheckpoints
from weightproof_callbacks.accelerator_trigger import StepTrigger
from weightproof_callbacks.generator_record import GeneratorRecord
from weightproof_callbacks.raw_loss import RawLossRecorder
from weightproof_callbacks.rolling_policy import RollingPolicy, words_of
from weightproof_callbacks.training_state import forget_moments

logger = logging.getLogger("weightproof.accelerate")

# Decisions that end a run whose last good state is in place; after any other HALT nobody can vouch for the model.
STOPS = ("rollbacks_exhausted", "inputs_disagree")
# What `on_violation` means to the session, for an edit; a window is judged first and stopped after.
EDIT_MODES = {"rollback": "rollback", "monitor": "monitor", "stop": "raise"}


class AttachedGuard:
    """A running guard, made by `attach`. Every process calls every method, in the same order.

    As a context manager it detaches itself at the end of the block. An exception that leaves the block
    judges nothing more; the other processes are told of it when they come to the guard next.

    Attributes:
        session: The `GuardSession` behind it.
        step: Optimizer steps so far, those before a resume included.
        put_back: Random generators that the last resume had not restored and the guard put back, in words.
    """

    def __init__(
        self, session: GuardSession, policy: RollingPolicy, *, every: int, on_violation: str, warmup_steps: int
    ) -> None:
        self.session = session
        self._policy = policy
        self.step = 0
        self.put_back: tuple[str, ...] = ()
        self._optimizer = policy.run.optimizer
        self._every = every
        self._on_violation = on_violation
        self._warmup_steps = warmup_steps
        self._recorder = RawLossRecorder()
        self._trigger: StepTrigger | None = None
        self._checkpoints: GuardedCheckpoints | None = None
        self._judged_at = 0
        self._stopped: str | None = None
        self._editing = self._warned = False

    def hang_in(self, accelerator: Accelerator, model: torch.nn.Module) -> None:
        """Hang the hooks into the loop; `attach` calls this once."""
        self._recorder.attach(self.session.model)
        self._trigger = StepTrigger(
            model,
            self._optimizer,
            self._stepped,
            stalled=self._stalled,
            patience=self._every * accelerator.gradient_accumulation_steps,
        )
        self._checkpoints = GuardedCheckpoints(accelerator, self)

    def begin_at(self, step: int) -> None:
        """Count on from a step; `attach` calls this once."""
        self.step = self._judged_at = step

    @property
    def history(self) -> tuple[Step, ...]:
        """Every judged step, oldest first."""
        return self.session.history

    def log_loss(self, loss: torch.Tensor | float) -> None:
        """Tell the guard the raw loss of one micro-batch, in loops that compute it outside of the model.

        From the first call on, losses that the model returns itself are not read.
        """
        self._recorder.add(loss)

    # -- windows of training -------------------------------------------------------------------

    def check(self) -> Step:
        """Judge now what training did since the last check.

        Raises:
            EditRejectedError: With `on_violation="stop"`, after the window was rolled back.
            RestoreError: A restore could not be proven exact.
        """
        self._notice_steps()
        return self._check()

    def judge_rest(self) -> Step | None:
        """Judge what changed since the last check; the window that was taken back now, None if all was kept."""
        before = len(self.history)
        self._notice_steps()
        if self._editing:
            raise InputError("the weights are being edited and not judged yet: save after the edit's block")
        if self.step > self._judged_at or self.session.has_changed():
            self._check()
        return next((step for step in self.history[before:] if step.applied == "restored"), None)

    def _stepped(self) -> None:
        self._require_going()
        self.step += 1
        self._policy.phase.stepped()
        self._recorder.end_step()
        if not self._editing and self.step % self._every == 0:
            with self._policy.phase.inside():
                self._check()

    def _stalled(self) -> None:
        """The gradient scaler skips step after step: are the weights broken?"""
        self._require_going()
        if not self._editing:
            self._recorder.end_step()
            self._check()

    def _check(self) -> Step:
        losses = self._recorder.drain()
        if losses is None and self.step > self._judged_at and not self._warned:
            self._warned = True
            self._log(
                "the model returned no loss in training mode: raw losses are not judged; call guard.log_loss(loss)"
            )
        try:
            step = self._policy.check(
                self.step,
                losses,
                # A window that began in the warm-up belongs to it: its growth is what warming up is for.
                in_warmup=self._judged_at < self._warmup_steps,
                on_violation=self._on_violation,
            )
            self._judged_at = self.step
            self._after_window(step)
        except WeightproofError as error:
            self._stopped = str(error)
            raise
        return step

    def _after_window(self, step: Step) -> None:
        self._report(step)
        if step.applied == "restored" and step.record is not None:
            self._log(f"step {step.step}: {words_of(step.record.params)}")
        self._require_no_halt(step)
        if self._on_violation == "stop" and step.applied == "restored" and step.decision is not None:
            raise EditRejectedError(
                f"training stopped at step {step.step}, the last good weights are restored: {step.decision.reason}"
            )

    # -- edits ---------------------------------------------------------------------------------

    @contextmanager
    def edit(
        self,
        name: str,
        kind: object = None,
        targets: str | Iterable[str] | None = None,
        on_violation: str | None = None,
        *,
        step: int | None = None,
    ) -> Iterator[Step]:
        """Guard the weight changes made in the block; see `GuardSession.edit`.

        The window of training before it is judged first. Optimizer steps inside the block belong to the
        edit: they are judged with it, and their moments are cleared if it is rejected.

        Raises:
            EditRejectedError: With `on_violation="raise"`, or where the guard was attached with "stop".
        """
        with self._judged_as_edit():
            handle, began = None, self.step
            number = self.step if step is None else step
            try:
                with self.session.edit(name, kind, targets, on_violation or self._edit_mode, step=number) as handle:
                    yield handle
            finally:
                if handle is not None and handle.applied != "kept" and self.step > began:
                    forget_moments(handle, self._optimizer)
        if handle is not None:
            self._after_edit(handle)

    def apply(self, edit: Any, *, on_violation: str | None = None, step: int | None = None) -> Step:
        """Plan an edit, write it, and judge it; see `GuardSession.apply`. The window before is judged first."""
        number = self.step if step is None else step
        with self._judged_as_edit():
            handle = self.session.apply(edit, on_violation=on_violation or self._edit_mode, step=number)
        self._after_edit(handle)
        return handle

    def _after_edit(self, step: Step) -> None:
        self._report(step)
        try:
            self._require_no_halt(step)
        except RestoreError as error:
            self._stopped = str(error)
            raise

    @property
    def _edit_mode(self) -> str:
        return EDIT_MODES[self._on_violation]

    @contextmanager
    def _judged_as_edit(self) -> Iterator[None]:
        """Judge the window that ends here; until the block ends, no window is judged."""
        self._notice_steps()
        if self.step > self._judged_at and not self._editing:
            self._check()
        nested, self._editing = self._editing, True
        try:
            yield
        except (RestoreError, CollectiveError) as error:
            self._stopped = str(error)
            raise
        finally:
            self._editing = nested
            self._recorder.drain()
            self._policy.forget()
            self._judged_at = self.step

    # -- checkpoints and the end ---------------------------------------------------------------

    def resume(self, folder: Path, step: int) -> None:
        """Continue from the guard's files in `folder` (accelerate's `load_state` calls this).

        Raises:
            BaselineError: The weights are not those that the files describe. The guard stays stopped.
        """
        self._stopped = f"the weights loaded from {folder} were not proven"
        # Accelerate has loaded them before; the good state that is kept next must hold the right ones.
        processes = self.session.processes
        generators = GeneratorRecord.shared(processes, folder)
        acts = self._on_violation != "monitor"
        differed = () if generators is None else generators.settle(processes, str(folder), acts=acts)
        self.put_back = differed if acts else ()
        self.session.load_state(folder, step=step)
        self._policy.start_anew()
        self._stopped = None
        self.step = self._judged_at = step
        self._recorder.attach(self.session.model)
        if self._trigger is not None:
            self._trigger.forget()

    def detach(self) -> None:
        """Judge the last window, remove every hook, write the certificate, free the snapshot."""
        try:
            if self._trigger is not None and self._stopped is None:
                self.judge_rest()
        finally:
            self._release()

    def _release(self) -> None:
        trigger, self._trigger = self._trigger, None
        if trigger is None:
            return
        trigger.remove()
        self._policy.remove()
        self._recorder.detach()
        if self._checkpoints is not None:
            self._checkpoints.remove()
        self.session.close()

    def __enter__(self) -> AttachedGuard:
        """The guard runs since it was attached."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detach; after an exception without judging what it interrupted."""
        if error is None:
            self.detach()
            return
        try:
            if self._trigger is not None:
                self._tell_others(error)
        finally:
            self._release()

    def _tell_others(self, error: BaseException) -> None:
        """What ends the loop on this process must end it on the others, which may wait for this one."""
        with suppress(type(error)), self.session.processes.together("training under guard"):
            raise error

    # -- helpers -------------------------------------------------------------------------------

    def _notice_steps(self) -> None:
        if self._trigger is None:
            raise InputError("this guard was detached: attach a new one")
        self._require_going()
        self._trigger.catch_up()

    def _require_going(self) -> None:
        if self._stopped is not None:
            raise EditRejectedError(f"the guard has stopped this run and does not vouch for it: {self._stopped}")

    def _require_no_halt(self, step: Step) -> None:
        """Nobody may go on with a model for which the processes found no common verdict."""
        decision = step.decision
        if decision is not None and decision.action is Action.HALT:
            if decision.situation in STOPS:
                raise EditRejectedError(f"training stopped at step {step.step}: {decision.reason}")
            raise RestoreError(f"{step.name} at step {step.step} halts the run: {decision.reason}")

    def _report(self, step: Step) -> None:
        decision = step.decision
        if decision is not None and (decision.action is not Action.KEEP or decision.warned):
            self._log(f"step {step.step}, {step.name}: {decision.action}, {step.applied}: {decision.reason}")

    def _log(self, message: str) -> None:
        if self.session.processes.is_main:
            logger.warning(message)
