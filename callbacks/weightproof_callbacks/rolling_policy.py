"""How a guarded run goes back: the one implementation behind `GuardCallback` and `attach`.

It captures the training state of every good state, watches gradients, hands each window to the session, and says
what a rollback restored. The session decides, and holds the good states (`weightproof.transactions.rolling`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from weightproof.collective import Processes
from weightproof.errors import InputError
from weightproof.session import GuardSession
from weightproof.snapshots.ring_stores import KeepWeights, PinnedStore
from weightproof.snapshots.tensor_store import readable
from weightproof.statistics.spikes import MAX_SKIPPED, NORM_RATIO, NORM_Z
from weightproof.statistics.window_reports import noted, words_of_report
from weightproof.transactions.rolling import Rolling, RollingOptions, TrainingPart
from weightproof.transactions.steps import Step
from weightproof.types import Action, HealthReading
from weightproof.weights import unwrap
from weightproof_callbacks.batch_watch import BatchWatch
from weightproof_callbacks.data_place import DataPlace
from weightproof_callbacks.data_position import BatchMemory, ReplayableLoader
from weightproof_callbacks.gradient_watch import GradientWatch
from weightproof_callbacks.learning_rate import LearningRate
from weightproof_callbacks.rolling_folder import RollingFolder
from weightproof_callbacks.state_size import StateSize
from weightproof_callbacks.step_phase import StepPhase
from weightproof_callbacks.training_state import TrainingState, clear_optimizer_state, require_restorable

logger = logging.getLogger("weightproof")

__all__ = ["RollingPolicy", "Run", "require_replayable_run"]

_SKIPPED = "data position: the batches of the window are not given again"


@dataclass(frozen=True, slots=True)
class Run:
    """What a training run consists of beside its model.

    Attributes:
        optimizer: As `accelerator.prepare` returned it, or the torch optimizer inside; None where nobody gave it.
        wrapper: accelerate's wrapper around it, if there is one.
        scheduler: Of the learning rate.
        scaler: `GradScaler`, where it is not in the wrapper.
        loader: `ReplayableLoader` or `BatchMemory`, for `data="replay"`.
        extra: Gives further objects with `state_dict` and `load_state_dict`, by name for people.
        generators: Further random generators.
        device: Where copies of the training state are kept; None: where its tensors are.
        accelerator: The run's `Accelerator`, where it is known: it clips.
        no_data: Why a run that goes on from disk cannot be given the batches that come next, and what to do; None
            where `loader` is there to do it.
    """

    optimizer: Any = None
    wrapper: Any = None
    scheduler: Any = None
    scaler: Any = None
    loader: Any = None
    extra: Callable[[], Mapping[str, Any]] = dict
    generators: tuple[Any, ...] = ()
    device: torch.device | str | None = None
    accelerator: Any = None
    no_data: str | None = None

    @property
    def batches(self) -> BatchMemory | None:
        """What counts the batches of the run."""
        found = self.loader.memory if isinstance(self.loader, ReplayableLoader) else self.loader
        return found if isinstance(found, BatchMemory) else None

    def parts(self, *, with_data: bool) -> dict[str, Any]:
        """Arguments of `TrainingState.capture` and `from_parts`."""
        return {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "loader": self.loader if with_data else None,
            "extra": self.extra(),
            "generators": self.generators,
        }


def require_replayable_run(options: RollingOptions, run: Run, how: str) -> None:
    """Refuse, before the first step, to replay what cannot be given again.

    Args:
        options: What was asked for.
        run: The run.
        how: What its user can do.

    Raises:
        InputError: Naming the loader.
    """
    if options.data != "replay":
        return
    if run.optimizer is None:
        raise InputError('data="replay" needs the optimizer: batches given again to other moments are another run')
    if not isinstance(run.loader, ReplayableLoader | BatchMemory):
        kind = "no loader" if run.loader is None else type(run.loader).__name__
        raise InputError(f'data="replay" gives batches again, which {kind} cannot: {how}; or choose data="skip"')


class RollingPolicy:
    """Judges the windows of one run, and takes it back.

    Args:
        options: How, and how often.
        session: The session.
        run: What there is to take back beside the model.
        acts: Whether violations are acted on (not with `on_violation="monitor"`).

    Raises:
        InputError: The run could not be restored whole; by name.
    """

    def __init__(self, options: RollingOptions, session: GuardSession, run: Run, *, acts: bool) -> None:
        self.options = options
        self.session = session
        self.run, self._weights = _pinned(run) if acts and options.snapshots == "pinned" else (run, None)
        self._acts = acts
        if self._is_full:
            require_restorable(run.optimizer, session.model)
        self._rate = LearningRate(run.optimizer, run.scheduler)
        self.phase = StepPhase(run.wrapper, run.scheduler, run.scaler or getattr(run.wrapper, "scaler", None))
        self._folder: RollingFolder | None = None
        self._gradients = GradientWatch(
            run.optimizer, wrapper=run.wrapper, accelerator=run.accelerator, acts=acts, model=session.model
        )
        self._batches = BatchWatch(session.model, session.processes)

    @property
    def _is_full(self) -> bool:
        return self._acts and self.options.rollback == "full" and self.run.optimizer is not None

    def begin(self, step: int) -> int:
        """Keep the present state as the last good one, and none that is older.

        Where the session has a `snapshot_dir` that holds a later state of this run, that one is put in place first.

        Returns:
            The step that the run goes on from.

        Raises:
            SnapshotError: The folder is in use by another run, or cannot be written.
            RestoreError: The state that it holds was altered.
        """
        folder = self.session.snapshot_dir
        if folder is not None and self._acts:
            keep, budget = self.options.keep, self.options.snapshot_budget
            self._folder = RollingFolder(folder, keep, budget, self.session, self._remade, in_memory=self._replays)
            step = self._folder.resume(step, self._resumed) or step
        # Nobody goes back where nothing is acted on: the one state is what windows are compared with.
        options = self.options if self._acts else replace(self.options, keep=1)
        self._require_room()
        self.session.watch(Rolling(options, self._capture, self._folder, self._weights), step=step)
        return step

    def _require_room(self) -> None:
        """Refuse, before the first step, a budget that holds no state; moments may not be there yet."""
        budget, processes = self.options.snapshot_budget, self.session.processes
        if budget is None or not self._acts:
            return
        sizes = processes.gather("size of a good state", StateSize.of(self.session, self.run.optimizer, self._is_full))
        size = sum(sizes, StateSize()) if self._folder is not None else max(sizes, key=lambda one: one.nbytes)
        if size.nbytes > budget:
            raise InputError(
                f"snapshot_budget={readable(budget)} holds no good state: one takes {readable(size.nbytes)} ({size}). "
                'Raise it, choose rollback="weights", or a folder on a larger disk'
            )

    def remove(self) -> None:
        """Take every hook away, and leave the folder to others."""
        self._gradients.remove()
        self._batches.remove()
        if self._folder is not None:
            self._folder.close()

    def check(
        self,
        step: int,
        losses: tuple[float, ...] | None,
        *,
        in_warmup: bool,
        on_violation: str,
        health: HealthReading | None = None,
    ) -> Step:
        """Judge the window that ends now.

        Args:
            step: Step of the run.
            losses: Raw losses of its steps.
            in_warmup: As in `GuardSession.check_window`.
            on_violation: "monitor" only reports.
            health: As in `GuardSession.check_window`.
        """
        seen = self._gradients.drain()
        # One process may have left out a step that the others took: its loss is then nobody's.
        left_out = {index for index, (_, skipped) in enumerate(seen) if skipped}
        if self._gradients.watches:
            left_out = set().union(*self.session.processes.gather("steps left out", sorted(left_out)))
        norms = tuple(norm for index, (norm, _) in enumerate(seen) if index not in left_out)
        # What nobody stepped with has harmed nothing. Where it was too often, it is the evidence.
        if losses is not None and len(losses) == len(seen) and len(left_out) <= MAX_SKIPPED:
            losses = tuple(loss for index, loss in enumerate(losses) if index not in left_out)
        impossible = self._gradients.impossible_moments()
        judged = self.session.check_window(
            step=step,
            raw_losses=losses,
            grad_norms=norms if self._gradients.watches else None,
            num_skipped=len(left_out),
            impossible_moments=impossible,
            disagreements=self._batches.disagreements(),
            guessing=_guessing(self.session.model),
            update_size=self._gradients.update_size,
            reports=self._gradients.reports(self.session.processes.rank),
            health=health,
            in_warmup=in_warmup,
            on_violation="monitor" if on_violation == "monitor" else "rollback",
        )
        if judged.decision is not None and judged.decision.action is Action.KEEP:
            self._tell(judged, len(left_out), norms)
            self._gradients.learn(norms)
        if judged.applied == "restored":
            self._batches.forget()
        return judged

    def _tell(self, judged: Step, num_left_out: int, norms: tuple[float, ...]) -> None:
        """What was strange in a window that was kept all the same."""
        found: list[str] = []
        if num_left_out:
            words = "optimizer step was" if num_left_out == 1 else "optimizer steps were"
            found.append(
                f"{num_left_out} {words} left out: a gradient was not finite or a hundred times too large, or the "
                "learning rate leapt"
            )
        score = self._gradients.score(norms)
        if score is not None and score.beyond(NORM_Z, NORM_RATIO):
            found.append(f"a gradient norm was {score.ratio:.3g} times the usual, and was stepped with")
        found += [words_of_report(one) for one in noted(judged.decision)]
        if found and self.session.processes.is_main:
            logger.warning("the window that ends at step %d is kept; %s", judged.step, "; ".join(found))

    def forget(self) -> None:
        """Steps since the last check belong to something else: an edit."""
        self._gradients.drain()

    def start_anew(self) -> None:
        """A checkpoint was loaded: moments come from there, and batches may come again."""
        self._gradients.drain()
        self._gradients.trust_moments()
        self._batches.forget()

    def _capture(self) -> TrainingPart | None:
        if not self._acts or self.run.optimizer is None:
            return None
        if not self._is_full:
            return _Cleared(self.run.optimizer, self._rate, self.options, self._place())
        state = TrainingState.capture(**self.run.parts(with_data=self._replays), device=self.run.device)
        return _Full(state, self._rate, self.phase, self.options, self.session.processes, self._place())

    def _place(self) -> DataPlace | None:
        """Where the data stands, where that is to be kept on disk."""
        return None if self._folder is None or self.run.batches is None else self.run.batches.place()

    def _remade(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> _Full:
        """A training state that was kept in files."""
        state = TrainingState.from_parts(tensors, values["state"], **self.run.parts(with_data=False))
        found = _Full(state, self._rate, self.phase, self.options, self.session.processes)
        found.was(values["scale"], tuple(values["phase"]))
        return found

    def _resumed(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> str:
        """Put a training state that was kept in files into a run that begins; says what becomes of its data."""
        remade = self._remade(tensors, values) if self._is_full and "state" in values else None
        if remade is not None:
            remade.go_on()
        batches, kept = self.run.batches, values.get("place")
        reason = self.run.no_data or ("" if kept else "the run that was killed did not count its batches")
        if reason or batches is None or kept is None:
            return f"Its data begins anew, so batches are given twice: {reason or 'nobody counts them'}"
        place = DataPlace.from_parts(tensors, kept)
        batches.places.go_on_at(place, (lambda: None) if remade is None else remade.draw_on)
        return f"Its data goes on after {place.batch} batches of pass {place.epoch + 1}"

    @property
    def _replays(self) -> bool:
        return self.options.data == "replay"


def _guessing(model: torch.nn.Module) -> float | None:
    """Loss of a language model that guesses: the logarithm of the number of symbols that its configuration names.

    Of other models (a few classes, numbers) a loss never comes there: nothing is judged by it.
    """
    config = getattr(unwrap(model), "config", None)
    text = getattr(config, "get_text_config", None)
    size = getattr(text() if callable(text) else config, "vocab_size", None)
    return math.log(size) if isinstance(size, int) and size > 1 else None


def _pinned(run: Run) -> tuple[Run, KeepWeights | None]:
    """The run with its copies in pinned memory; as it is where nothing can be pinned."""
    if torch.cuda.is_available():
        return replace(run, device="cpu"), PinnedStore
    logger.warning('snapshots="pinned" keeps good states in plain memory here: no CUDA is available')
    return run, None


class _Full:
    """A captured training state, and the learning rate's scale at that time."""

    def __init__(  # noqa: PLR0913, PLR0917 - what belongs to one state
        self,
        state: TrainingState,
        rate: LearningRate,
        phase: StepPhase,
        options: RollingOptions,
        processes: Processes,
        place: DataPlace | None = None,
    ) -> None:
        self._state = state
        self._place = place
        self._phase, self._then = phase, phase.now
        self._rate = rate
        self._scale = rate.scale
        self._options = options
        self._processes = processes

    @property
    def nbytes(self) -> int:
        return self._state.nbytes

    def put_back(self) -> Mapping[str, Any]:
        data = self._options.data
        refusal = self._refusal(data)
        if refusal is not None:
            data = "skip"
        self._state.restore(data)
        self._phase.put_back(self._then)
        self._rate.rescale(self._scale, self._options.lr_factor)
        left = list(self._state.uncovered)
        if data == "skip":
            left = [one for one in left if not one.startswith("data position")]
            left.append(_SKIPPED if refusal is None else f"data position: {refusal}")
        return {
            "restored": ["weights and buffers", *self._state.covered],
            "not_restored": left,
            "data": data,
            **self._rate.notes(),
        }

    def _refusal(self, data: str) -> str | None:
        """Why batches cannot be given again after all, on any process: then all of them go on without."""
        if data == "skip":
            return None
        ours = None
        try:
            self._state.require_replayable(data)
        except InputError as error:
            ours = str(error)
        return next((one for one in self._processes.gather("whether batches can be given again", ours) if one), None)

    def parts(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        tensors, values = _parts_of(self._place)
        return {**self._state.tensors(), **tensors}, {
            "state": self._state.values(),
            "scale": self._scale,
            "phase": list(self._then),
            **values,
        }

    def draw_on(self) -> None:
        """Put the random generators back once more."""
        self._state.put_draws_back()

    def go_on(self) -> None:
        """Put it into a run that begins: no rollback, and nothing is lowered again."""
        self._state.restore("skip")
        self._phase.put_back(self._then)
        self._rate.scale = self._scale

    def was(self, scale: float, then: tuple[bool, bool]) -> None:
        """What else was known when it was kept in files."""
        self._scale, self._then = scale, then


class _Cleared:
    """Nothing is kept: moments of the rejected window are cleared, everything else runs on."""

    nbytes = 0

    def __init__(
        self, optimizer: Any, rate: LearningRate, options: RollingOptions, place: DataPlace | None = None
    ) -> None:
        self._optimizer = optimizer
        self._rate = rate
        self._options = options
        self._place = place

    def put_back(self) -> Mapping[str, Any]:
        cleared = clear_optimizer_state(self._optimizer)
        self._rate.rescale(self._rate.scale, self._options.lr_factor)
        return {
            "restored": ["weights and buffers"],
            "not_restored": [
                "optimizer: the state of its parameters is cleared",
                "learning-rate schedule and random generators: they run on",
                _SKIPPED,
            ],
            "optimizer_states_cleared": cleared,
            "data": "skip",
            **self._rate.notes(),
        }

    def parts(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        return _parts_of(self._place)


def _parts_of(place: DataPlace | None) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """A place in the data among the parts of a training state."""
    if place is None:
        return {}, {}
    tensors, values = place.parts()
    return tensors, {"place": values}


def words_of(notes: Mapping[str, Any]) -> str:
    """What a rollback did, in one line for people."""
    if "restored" not in notes:
        return "the last good weights are restored"
    restored: Iterable[str] = notes["restored"]
    cleared = notes.get("optimizer_states_cleared")
    also = f", the optimizer state of {cleared} parameters is cleared" if cleared is not None else ""
    rate = notes.get("learning_rate_scale")
    slower = f"; the learning rate is {rate:g} times what it was" if rate is not None else ""
    return f"restored as of step {notes['back_to_step']}: {'; '.join(restored)}{also}{slower}"
