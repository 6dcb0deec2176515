"""`HealthCallback`: training health of a `Trainer` run, every 500 steps, on held-out data.

    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[HealthCallback(held_out)])  # doctest: +SKIP

At the end of every `every`-th step, after optimizer and schedule and before log, evaluation and save, the model is
diagnosed (`weightproof.health`) on the same held-out batches. The training is not disturbed: with and without the
callback it gives the same weights, bit for bit. Each report is appended to `health.jsonl`, its numbers go to
`state.log_history` (through `Trainer.log` where the trainer is bound, which `GuardedTrainer` does) and to the trackers.

With several processes each reads its share of the batches, and all get the same report.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightproof.collective import Processes
from weightproof.errors import InputError
from weightproof.health import Diagnostic, HealthLimits, HealthReport, Status, diagnose, health_batches
from weightproof.trackers import Tracker, log_metrics, open_trackers
from weightproof_callbacks.trainer import GuardCallback
from weightproof_callbacks.trainer_checks import require_positive
from weightproof_callbacks.wandb_tracker import live_run

__all__ = ["DEFAULT_EVERY", "HealthCallback"]

logger = logging.getLogger("weightproof.health")

ACTIONS = ("warn", "stop", "rollback")
DEFAULT_EVERY = 500
"""Steps between two reports: benchmarks/health.py measures what they cost."""
LOG = "health.jsonl"


class HealthCallback(TrainerCallback):
    """Diagnose a training every 500 steps.

    Args:
        data: Held-out examples (with labels where the loss needs them), of which the first `batches * rows` windows
            are kept; see `weightproof.health.health_batches`.
        every: Optimizer steps between two reports.
        batches: Batches that a report reads; 8 or more for agreement to be judged.
        rows: Windows in each.
        length: Tokens in each window at most.
        blocks: The blocks, as `weightproof.health.diagnose` takes them; None: found.
        loss: As there, for models of which no loss is known; with `reduction`.
        reduction: How that loss is reduced.
        depth: "skip" or "reinit": measure depth utility too, which takes one more pass for every block.
        limits: Thresholds.
        action: "warn": log what failed. "stop": also save nothing at that step, and end the training. "rollback": hand
            the report to `guard`, which judges the window at once and goes back to its last good state.
        guard: The `GuardCallback` of the run, for "rollback"; put it behind this callback in the list.
        warmup: Steps in which agreement and depth are not judged; by default those of the learning rate.
        trackers: Trackers or their registered names; by default W&B where a run is open or `report_to` names it.
        output_dir: Folder of `health.jsonl`; by default `weightproof` in `args.output_dir`.
        timeout: Seconds that a process waits for the others.

    Attributes:
        reports: Every report of the present (or last) training, oldest first.
        seconds: What they took together.

    Raises:
        InputError: An argument is out of its range (at construction); the model has no blocks or no known loss, or the
            data is too little (when training begins).
    """

    def __init__(  # noqa: PLR0913 - one option a line
        self,
        data: Any,
        *,
        every: int = DEFAULT_EVERY,
        batches: int = 8,
        rows: int = 8,
        length: int = 128,
        blocks: Any = None,
        loss: Any = None,
        reduction: str | None = None,
        depth: str | None = None,
        limits: HealthLimits | None = None,
        action: str = "warn",
        guard: GuardCallback | None = None,
        warmup: int | None = None,
        trackers: Sequence[Tracker | str] | None = None,
        output_dir: str | Path | None = None,
        timeout: float = 600.0,
    ) -> None:
        require_positive("every", every)
        if action not in ACTIONS:
            raise InputError(f"action must be one of {', '.join(ACTIONS)}, not {action!r}")
        if (action == "rollback") != (guard is not None):
            raise InputError('action="rollback" and guard= (the GuardCallback that goes back) belong together')
        self.guard = guard
        self.held_out, self.every, self.action, self.warmup = data, every, action, warmup
        self.sizes = {"batches": batches, "rows": rows, "length": length}
        self.options = {"blocks": blocks, "loss": loss, "reduction": reduction, "depth": depth, "limits": limits}
        self.given_trackers, self.output_dir, self.timeout = trackers, output_dir, timeout
        self.reports: list[HealthReport] = []
        self.seconds = 0.0
        self._trainer: Any = None
        self._processes: Processes | None = None
        self._batches: Sequence[Any] = ()
        self._trackers: tuple[Tracker, ...] = ()
        self._folder: Path | None = None

    def bind(self, trainer: Any) -> None:
        """Take the trainer, whose `log` reaches every integration; `GuardedTrainer` calls this."""
        self._trainer = trainer

    # -- events --------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the held-out data, and refuse before the first step what could not be diagnosed."""
        self.close()
        self.reports, self.seconds = [], 0.0
        self._processes = Processes.join(self.timeout)
        with self._ending_the_run(control), self._processes.together("the data of training health"):
            self._batches = health_batches(self.held_out, kwargs["model"], **self.sizes)
            self._folder = Path(self.output_dir or Path(str(args.output_dir)) / "weightproof")
            if self._processes.is_main:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._trackers = open_trackers(self._names(args), self._folder)
        self._check(args, state, control, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Diagnose the model where a report is due."""
        if state.global_step % self.every == 0:
            self._check(args, state, control, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Diagnose the model as it is left, and let go of the other processes."""
        last = self.reports[-1].provenance.step if self.reports else None
        if last != state.global_step:
            self._check(args, state, control, kwargs["model"])
        self.close()

    def close(self) -> None:
        """Let go of the other processes and of the trackers."""
        if self._processes is not None:
            self._processes.close()
        for tracker in self._trackers:
            tracker.close()
        self._processes, self._trackers = None, ()

    # -- what they do --------------------------------------------------------------------------

    def _check(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        if self._processes is None:
            raise InputError("HealthCallback was added after training began; add it before")
        warmup = args.get_warmup_steps(state.max_steps) if self.warmup is None else self.warmup
        began = time.perf_counter()
        with self._ending_the_run(control):
            report = diagnose(
                model,
                self._batches,
                # Before the first step nothing was learned, whatever the schedule says.
                in_warmup=state.global_step <= warmup,
                step=state.global_step,
                digest=False,  # reads every weight: as long as the passes
                processes=self._processes,
                **self.options,
            )
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.reports.append(report)
        if self._processes.is_main:
            self._write(report, seconds)
        self._log(report, seconds, state, control)
        self._act(report, state, control)

    def _write(self, report: HealthReport, seconds: float) -> None:
        if self._folder is None:
            return
        row = {"type": "health", "step": report.provenance.step, "seconds": round(seconds, 4), **report.to_dict()}
        with (self._folder / LOG).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row, allow_nan=False) + "\n")

    def _log(self, report: HealthReport, seconds: float, state: TrainerState, control: TrainerControl) -> None:
        rows = {**report.metrics(), "health/seconds": seconds}
        if self._trainer is None:
            # A callback is not given the trainer: its history is, and the trackers are our own.
            state.log_history.append({**rows, "step": state.global_step})
        else:
            flags = {name: value for name, value in vars(control).items() if name.startswith("should_")}
            self._trainer.log(rows)
            vars(control).update(flags)  # Trainer.log clears should_log, and with it the loss of this step
        for tracker in self._trackers:
            log_metrics(tracker, rows, state.global_step)

    def _act(self, report: HealthReport, state: TrainerState, control: TrainerControl) -> None:
        bad = [one for one in report.diagnostics.values() if one.status in (Status.FAIL, Status.INVALID)]
        if self._processes is not None and self._processes.is_main:
            for one in report.diagnostics.values():
                self._say(one, state.global_step)
        if bad and self.guard is not None and state.global_step > 0:  # before the first step nothing lies behind
            self.guard.note_health(report.reading())
        if bad and self.action == "stop":
            control.should_training_stop = True
            control.should_save = False

    def _say(self, one: Diagnostic, step: int) -> None:
        if one.status in (Status.FAIL, Status.INVALID):
            logger.error("step %d, training health: %s: %s", step, one.name, one.message)
        elif one.status is Status.WARN:
            logger.warning("step %d, training health: %s: %s", step, one.name, one.message)

    def _names(self, args: TrainingArguments) -> Sequence[Tracker | str]:
        if self.given_trackers is not None:
            return self.given_trackers
        # Bound, Trainer's own integration writes to W&B.
        asked = "wandb" in (args.report_to or ()) or live_run() is not None
        return ("wandb",) if asked and self._trainer is None else ()

    @contextmanager
    def _ending_the_run(self, control: TrainerControl) -> Iterator[None]:
        """A failure in the block ends the training with it: Trainer will not call on_train_end."""
        try:
            yield
        except Exception:
            control.should_training_stop, control.should_save = True, False
            self.close()
            raise
