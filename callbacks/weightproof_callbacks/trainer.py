"""`GuardCallback`: guards the weights of a Hugging Face `Trainer` run.

    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[GuardCallback()])  # doctest: +SKIP
    >>> trainer.train()                                                                  # doctest: +SKIP

What happens at which event, and why there:

| event | what the guard does |
| --- | --- |
| `on_train_begin` | baseline, last good snapshot, hook for the raw loss; on resume the sidecar files |
| `on_step_end` | before log, evaluation and save: judge the window, then a scheduled edit |
| `on_epoch_end` | the same where the strategy is "epoch" |
| `on_save` | sidecar files into the checkpoint folder, only for weights that were judged |
| `on_train_end` | last window, hook removed, certificate |

The guard draws no random numbers from the run's generators, calls no `Trainer` method and fires no
event (`Trainer.log` inside a step would clear the control flags, and with them the loss row). It is
no `ExportableState`: that would re-create the callback on resume and crash on older checkpoints.

With `accelerate launch` or `torchrun` every process runs the callback. They meet at each event, so that
all take one decision and set the same control flags, and what fails on one process ends the training on
all of them. Rank 0 reads and writes the files and speaks for all.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from weightproof.errors import InputError
from weightproof.policy import Policy, load_policy
from weightproof.session import STATE_FILE, GuardSession
from weightproof.transactions.publisher import CERTIFICATE
from weightproof.transactions.rolling import RollingOptions, place_of_snapshots
from weightproof.transactions.steps import Step
from weightproof.types import Action, HealthReading
from weightproof_callbacks.generator_record import GeneratorRecord
from weightproof_callbacks.generator_state import GlobalDraws
from weightproof_callbacks.model_card import write_evidence
from weightproof_callbacks.raw_loss import RawLossRecorder
from weightproof_callbacks.rolling_policy import RollingPolicy, Run, require_replayable_run, words_of
from weightproof_callbacks.sharded import find_masters
from weightproof_callbacks.trainer_checks import (
    begins_an_epoch,
    checked_edits,
    known_to_all,
    require_all_processes,
    require_edits_that_apply,
    require_positive,
    require_same_flags,
    require_same_schedule,
)
from weightproof_callbacks.wandb_tracker import live_run

if TYPE_CHECKING:
    from weightproof.certificate import Certificate
    from weightproof.trackers import Tracker

logger = logging.getLogger("weightproof.trainer")

ON_VIOLATION = ("rollback", "monitor", "stop")
_NO_DATA = "Trainer lets no callback say where its data begins. Train with GuardedTrainer (or GuardedTrainerMixin)"


class GuardCallback(TrainerCallback):
    """Judge every window of training steps, and apply scheduled edits, with rollback.

    On a violation the run goes back to its last good state, bit for bit and in place: weights, moments, learning-rate
    schedule, random generators. The batches of the window are skipped, and `state.global_step` counts on: the run
    continues as one that was never given them. An optimizer step with a gradient that is not finite is left out.

    Args:
        policy: Tier name, path of a policy file, or `Policy`.
        every: Optimizer steps between two checks; evaluations and saves are checked too.
        edits: Edits to apply, by global step: `{500: RTN(8)}`. The window before is judged first.
        retain: Data on which the model must not get worse; see `GuardSession`.
        target: Data on which each edit must gain; see `GuardSession`.
        on_violation: "rollback"; "stop" (roll back, save nothing at this step, end the training);
            "monitor" (only report).
        trackers: Trackers or their registered names. By default the JSONL log, and W&B where a run
            is open or `report_to` names it.
        output_dir: Folder for certificate and log; by default `weightproof` in `args.output_dir`.
        snapshot_dir: Keep snapshots in this folder instead of in memory. A training that was killed goes on from the
            last one, which is later than its last checkpoint.
        rollback: "full": weights and training state. "weights": the weights; moments are cleared, everything else
            runs on. Saves the memory of the moments.
        data: "skip", or "replay": the batches of the window are given again (`GuardedTrainer` can).
        lr_factor: After a rollback the learning rate is multiplied by this; None leaves it.
        max_rollbacks: Rollbacks of a training; the violation after them halts it, with the last good state in place.
        keep: Last good states that are kept; the older one is for a violation that comes soon after a rollback.
        cooldown: Checks after a rollback within which another violation goes back to the older one.
        snapshots: Where good states are kept: "memory", "pinned" (host memory, pinned where the model is on CUDA) or
            "disk" (needs `snapshot_dir`). By default on disk where a folder is given, else in memory.
        snapshot_budget: Bytes that the states may take together; older ones are dropped first. One that holds no
            state is refused.
        timeout: Seconds that a process waits for the others before the run ends with an error. Rank 0 saves
            checkpoints while the others wait: give it more than that takes.
        model_card: Write a section of evidence into `README.md` in `args.output_dir` when training ends.

    Attributes:
        session: The `GuardSession` of the present (or last) training; None before the first.

    Raises:
        InputError: An argument is out of its range (at construction), or differs between processes.
        CollectiveError: Another process failed, or did not come within `timeout`; the message names its rank.
        BaselineError: The model holds NaN or inf when training begins, or the sidecar files belong
            to other weights.
        RestoreError: A restore could not be proven exact. Training ends with it and saves nothing.
    """

    def __init__(  # noqa: PLR0913 - the public signature is the issue's
        self,
        policy: str | Path | Policy = "balanced",
        every: int = 50,
        edits: Mapping[int, Any] | None = None,
        retain: Any = None,
        on_violation: str = "rollback",
        *,
        target: Any = None,
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
        timeout: float = 600.0,
        model_card: bool = False,
    ) -> None:
        require_positive("every", every)
        if on_violation not in ON_VIOLATION:
            raise InputError(f"on_violation must be one of {', '.join(ON_VIOLATION)}, not {on_violation!r}")
        self.rolling = RollingOptions(
            rollback=rollback,
            data=data,
            lr_factor=lr_factor,
            max_rollbacks=max_rollbacks,
            keep=keep,
            cooldown=cooldown,
            snapshots=place_of_snapshots(snapshots, snapshot_dir),
            snapshot_budget=snapshot_budget,
        )
        self.policy = load_policy(policy)
        self.every = every
        self.edits = checked_edits(edits)
        self.retain, self.target = retain, target
        self.on_violation = on_violation
        self.trackers = trackers
        self.output_dir = output_dir
        self.snapshot_dir = snapshot_dir
        self.timeout = timeout
        self.model_card = model_card
        self.session: GuardSession | None = None
        self._recorder = RawLossRecorder()
        self._policy: RollingPolicy | None = None
        self._trainer: Any = None
        self._generators: GeneratorRecord | None = None  # where a resume has to put them
        self._judged_at = self._warmup_steps = 0
        self._stopped = False
        self._health: HealthReading | None = None
        self._warned: set[str] = set()

    @property
    def history(self) -> tuple[Step, ...]:
        """Every judged step of the present (or last) training, oldest first."""
        return self.session.history if self.session is not None else ()

    def bind(self, trainer: Any) -> None:
        """Take what the events do not hand over from the trainer itself; `GuardedTrainer` calls this."""
        self._trainer = trainer

    def note_health(self, reading: HealthReading) -> None:
        """Judge the present window now, with this report of training health; `HealthCallback` calls this."""
        self._health = reading

    def generators_loaded(self) -> None:
        """Trainer has restored the random generators of a checkpoint; `GuardedTrainer` calls this."""
        record, self._generators = self._generators, None
        if record is not None:
            processes = self._required_session.processes
            with processes.together("the random generators after the resume"):
                record.settle(processes, "the checkpoint", acts=self.on_violation != "monitor")

    # -- events --------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Capture the baseline, or continue from the sidecar files of the resumed checkpoint."""
        with self._ending_the_run(control):
            self._open_session(args, kwargs["model"], kwargs.get("optimizer"))
        self._guarded("the beginning of the training", control, lambda: self._begin(args, state, **kwargs))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the generators after a resume, where Trainer restored them right before."""
        if self._generators is None or self._trainer is not None:
            return
        if args.ignore_data_skip or begins_an_epoch(args, state, kwargs.get("train_dataloader")):
            # It did not restore them, or the loader has drawn since.
            self._generators = None
            return
        self._guarded("the random generators after the resume", control, self.generators_loaded)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Judge the window if one is due, then apply the edit scheduled for this step."""
        self._recorder.end_step()
        due = state.global_step in self.edits or state.global_step % self.every == 0
        if due or control.should_evaluate or control.should_save or self._health is not None:
            where = f"step {state.global_step}"
            self._guarded(where, control, lambda: self._step(where, state, control))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge what an "epoch" strategy is about to evaluate or save; veto saves after a stop."""
        if (control.should_evaluate or control.should_save) and state.global_step != self._judged_at:
            where = f"the end of the epoch, step {state.global_step}"
            self._guarded(where, control, lambda: self._judge(where, state, control))
        if self._stopped:
            control.should_save = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the sidecar files into the checkpoint that was just saved."""
        where = f"the save at step {state.global_step}"
        self._guarded(where, control, lambda: self._save(args, state, control))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge the last window, write the certificate, remove the hook, free the snapshot."""
        self._guarded("the end of the training", control, lambda: self._end(args, state, control))
        self._required_session.close()
        if self._is_main:
            tqdm.write(_cost_line(self._required_session, state.global_step), file=sys.stderr)

    # -- what they do --------------------------------------------------------------------------

    def _open_session(self, args: TrainingArguments, model: torch.nn.Module, optimizer: Any) -> None:
        with known_to_all(self.timeout):
            require_all_processes(args)
            require_edits_that_apply(self.edits, model)
            masters = find_masters(None, model, optimizer)
            if self.session is not None:
                self.session.close()
        folder = Path(self.output_dir) if self.output_dir is not None else Path(str(args.output_dir)) / "weightproof"
        self.session = GuardSession(
            model,
            policy=self.policy,
            retain=self.retain,
            target=self.target,
            trackers=self._tracker_names(args),
            output_dir=folder,
            snapshot_dir=self.snapshot_dir,
            timeout=self.timeout,
            masters=masters,
        )

    def _begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: torch.nn.Module,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        session = self._required_session
        settings = {"guard's every": self.every, "guard's on_violation": self.on_violation, **self.rolling.in_words()}
        require_same_schedule(session.processes, args, state, self.edits, settings)
        self._stopped = False
        self._generators = None
        self._warned.clear()
        self._health = None
        self._judged_at = state.global_step
        self._warmup_steps = args.get_warmup_steps(state.max_steps)
        self._warn_of_unreached_edits(state)
        if state.global_step > 0:
            self._resume(args, state)
        run = self._run(optimizer, lr_scheduler)
        require_replayable_run(
            self.rolling, run, "train with GuardedTrainer (or GuardedTrainerMixin) in place of Trainer"
        )
        self._policy = RollingPolicy(self.rolling, session, run, acts=self.on_violation != "monitor")
        began = self._first_good_state(self._policy, state.global_step)
        if began > state.global_step:
            state.global_step = self._judged_at = began
            if self._trainer is not None:
                # Of that state, whatever the older checkpoint says that Trainer is about to read.
                self._generators = GeneratorRecord.now(session.processes)
                self._trainer._globalstep_last_logged = began
        # Trainer divides by the items of all processes, and multiplies again where this hook has passed.
        self._recorder.attach(model, shares=args.world_size if args.average_tokens_across_devices else 1)

    def _first_good_state(self, policy: RollingPolicy, step: int) -> int:
        """Keep it with the generators of the checkpoint that is resumed: Trainer restores those later."""
        if self._generators is None:
            return policy.begin(step)
        present = GlobalDraws.now()
        self._generators.put_back(self._required_session.processes.rank)
        began = policy.begin(step)
        if began == step:
            present.put_back()
        return began

    def _run(self, optimizer: Any, scheduler: Any) -> Run:
        trainer = self._trainer
        if trainer is None:
            return Run(optimizer=optimizer, wrapper=optimizer, scheduler=scheduler, no_data=_NO_DATA)
        return Run(
            optimizer=optimizer,
            wrapper=optimizer,
            scheduler=scheduler,
            accelerator=trainer.accelerator,
            scaler=trainer.accelerator.scaler,
            loader=trainer.batches,
            extra=trainer.training_parts,
            no_data=trainer.data_begins_anew,
        )

    def _tracker_names(self, args: TrainingArguments) -> Sequence[Tracker | str]:
        if self.trackers is not None:
            return self.trackers
        asked = "wandb" in (args.report_to or ())
        return ("jsonl", "wandb") if asked or live_run() is not None else ("jsonl",)

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        session = self._required_session
        folder = _checkpoint_folder(args, state)
        given = args.resume_from_checkpoint
        candidates = [folder, *([Path(given)] if isinstance(given, str) else [])]
        found = next((path for path in candidates if (path / STATE_FILE).is_file()), None)
        # Rank 0 reads the files: a folder may be on its machine only.
        found = session.processes.broadcast("the folder to resume from", found)
        if found is None:
            self._warn_once(
                "resume", f"no {STATE_FILE} in {folder}: the guard starts from a new baseline, the resumed weights"
            )
        else:
            session.load_state(found, step=state.global_step)
            self._generators = GeneratorRecord.shared(session.processes, found)

    def _step(self, where: str, state: TrainerState, control: TrainerControl) -> None:
        self._judge(where, state, control)
        edit = self.edits.get(state.global_step)
        if edit is not None and not self._stopped:
            step = self._required_session.apply(edit, on_violation=self._session_mode, step=state.global_step)
            self._report(step, control)

    def _judge(self, where: str, state: TrainerState, control: TrainerControl) -> None:
        require_same_flags(self._required_session.processes, where, control)
        self._check(state, control)

    def _check(self, state: TrainerState, control: TrainerControl) -> Step:
        """Judge the window that ends now, and stop after a violation if asked to."""
        losses = self._recorder.drain()
        health, self._health = self._health, None
        if losses is None and state.global_step > self._judged_at:
            self._warn_once("loss", "the model returned no loss in training mode: raw losses are not judged")
        step = self._required_policy.check(
            state.global_step,
            losses,
            # A window that began in the warm-up belongs to it: its growth is what warming up is for.
            in_warmup=self._judged_at < self._warmup_steps,
            on_violation=self._session_mode,
            health=health,
        )
        self._judged_at = state.global_step
        self._report(step, control)
        if step.applied == "restored" and step.record is not None:
            self._warn(f"step {state.global_step}: {words_of(step.record.params)}")
        return step

    def _report(self, step: Step, control: TrainerControl) -> None:
        decision = step.decision
        if decision is None or (decision.action is Action.KEEP and not decision.warned):
            return
        self._warn(f"step {step.step}, {step.name}: {decision.action}, {step.applied}: {decision.reason}")
        if decision.action is Action.HALT or (decision.action is Action.ROLLBACK and self.on_violation == "stop"):
            self._stop(control)

    def _save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        folder = _checkpoint_folder(args, state)
        if not self._required_session.processes.broadcast("the checkpoint's folder", folder.is_dir()):
            self._warn_once("save", f"no folder {folder}: the guard's state is not saved with this checkpoint")
            return
        if state.global_step != self._judged_at:  # another callback asked for this save after us
            step = self._check(state, control)
            if step.applied == "restored":
                if self._is_main:
                    logger.error("%s was saved before it was judged and holds rejected weights: do not use it", folder)
                return
        session = self._required_session
        session.save_state(folder)
        generators = GeneratorRecord.now(session.processes)
        if self._is_main:
            generators.save(folder)

    def _end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        session = self._required_session
        # load_best_model_at_end has changed the weights after the last step.
        if state.global_step != self._judged_at or args.load_best_model_at_end or self._health is not None:
            self._check(state, control)
        self._remove_hooks()
        certificate = session.complete()
        if certificate is not None and session.output_dir is not None:
            path = session.output_dir / CERTIFICATE
            if self.model_card:
                self._write_card(Path(str(args.output_dir)), certificate)
            actions = [step.decision.action for step in session.history if step.decision is not None]
            for tracker in session.trackers if actions else ():
                tracker.log_certificate(path, action=actions[-1], step=state.global_step)

    # -- helpers -------------------------------------------------------------------------------

    def _write_card(self, folder: Path, certificate: Certificate) -> None:
        try:
            write_evidence(folder, certificate)
        except InputError as error:  # the training is over and its evidence is on disk
            logger.error("the model card has no evidence: %s", error)

    @property
    def _session_mode(self) -> str:
        return "monitor" if self.on_violation == "monitor" else "rollback"

    @property
    def _required_session(self) -> GuardSession:
        if self.session is None:
            raise InputError("the guard has no baseline: GuardCallback was added after training began; add it before")
        return self.session

    @property
    def _required_policy(self) -> RollingPolicy:
        if self._policy is None:
            raise InputError("the guard has no last good state: GuardCallback was added after training began")
        return self._policy

    def _remove_hooks(self) -> None:
        self._recorder.detach()
        if self._policy is not None:
            self._policy.remove()

    @property
    def _is_main(self) -> bool:
        return self.session is None or self.session.processes.is_main

    def _stop(self, control: TrainerControl) -> None:
        self._stopped = True
        control.should_training_stop = True
        control.should_save = False

    def _guarded(self, where: str, control: TrainerControl, act: Callable[[], object]) -> None:
        """Run `act` on all processes: it ends on all of them, or fails on all of them."""
        with self._ending_the_run(control), self._required_session.processes.together(where):
            act()

    @contextmanager
    def _ending_the_run(self, control: TrainerControl) -> Iterator[None]:
        """A failure in the block ends the training with it: Trainer will not call on_train_end."""
        try:
            yield
        except Exception as error:
            self._remove_hooks()
            self._stop(control)
            logger.error("the guard cannot vouch for this model, training ends and saves nothing: %s", error)
            if self.session is not None:
                with suppress(InputError):  # no certificate can be written: `error` matters more
                    self.session.close()
            raise

    def _warn_of_unreached_edits(self, state: TrainerState) -> None:
        late = sorted(step for step in self.edits if step > state.max_steps)
        if late:
            steps = ", ".join(map(str, late))
            self._warn_once("edits", f"edits at step {steps} will never be reached: training ends at {state.max_steps}")

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warn(message)
        self._warned.add(topic)

    def _warn(self, message: str) -> None:
        """Say it once, though every process knows it."""
        if self._is_main:
            logger.warning("%s", message)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _cost_line(session: GuardSession, steps: int) -> str:
    """What guarding cost, in one line for people."""
    cost = session.cost
    rejected = sum(step.decision is not None and step.decision.action is not Action.KEEP for step in session.history)
    return (
        f"weightproof: {cost.checks} checks over {steps} steps, {rejected} rejected; {cost.seconds:.1f} s "
        f"(baseline {cost.baseline_seconds:.1f} s), {cost.snapshot_bytes / 2**20:.1f} MiB of snapshot, "
        f"{cost.baseline_bytes / 2**20:.1f} MiB of baseline; evidence in {session.output_dir}"
    )
