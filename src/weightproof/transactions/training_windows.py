"""Windows of ordinary training: judged against the last good state, and the way back to it.

What moves from one window to the next: the good states (`rolling`), and the raw losses and gradient norms that kept
windows had. A window that is kept becomes the last good state, or waits for the next one where it is in doubt
(`GuardedModel.held`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weightproof.errors import InputError
from weightproof.parallel.placements import settle
from weightproof.probes import State
from weightproof.readings.vector_moves import vector_moves
from weightproof.statistics.spikes import (
    HISTORY,
    is_high,
    is_loss_spike,
    lasting_score,
    norm_score,
    num_near_guessing,
)
from weightproof.statistics.window_reports import Usual, loss_peak, norm_peak, weight_move, worst_reports
from weightproof.transactions.checks import as_losses, common_losses, require_same_call
from weightproof.transactions.edit_records import Subject
from weightproof.transactions.guarded_model import GuardedModel
from weightproof.transactions.rolling import GoodState, Rolling
from weightproof.transactions.steps import Step
from weightproof.transactions.transaction import Recorder, Transaction
from weightproof.types import Action, HealthReading, WindowReading, WindowReport

# Rollbacks for losses near guessing in a run that sets no limit: data that stay so are meant so.
_MAX_FOR_DATA = 3


@dataclass(frozen=True, slots=True)
class Window:
    """What a training loop saw since the last check.

    Attributes:
        raw_losses: Unfiltered losses of the steps, one each; None where nobody saw them.
        grad_norms: Their gradient norms.
        num_skipped: Steps that were left out for their gradients.
        in_warmup: Whether the learning rate is still warming up.
        impossible_moments: States of the optimizer that no gradients could have made, in words.
        disagreements: What is proven to be wrong with what the processes trained on, in words; the same on all of them.
        guessing: Loss of a model that guesses, nats per token, where it is known; the same on all processes.
        update_size: Sum of the learning rates that its steps were taken with; None where nobody saw them.
        reports: What this process reports beside that (`weightproof.statistics.window_reports`).
        health: A report of training health made at its end, the same on all processes; None where there is none.
    """

    raw_losses: Sequence[float] | None = None
    grad_norms: Sequence[float] | None = None
    num_skipped: int = 0
    in_warmup: bool = False
    impossible_moments: Sequence[str] = ()
    disagreements: Sequence[str] = ()
    guessing: float | None = None
    update_size: float | None = None
    reports: Sequence[WindowReport] = ()
    health: HealthReading | None = None


class TrainingWindows:
    """The training of one guarded model, window after window. All ranks make the same calls.

    Args:
        guarded: The model.
        recorder: Who is told of every judged window.

    Attributes:
        rolling: The good states of the run; None while nobody watches.
        losses: Raw losses of the last windows that were kept, oldest first.
    """

    def __init__(self, guarded: GuardedModel, recorder: Recorder) -> None:
        self._guarded = guarded
        self._recorder = recorder
        self.rolling: Rolling | None = None
        self.losses: list[float] = []
        self._norms: list[float] = []
        self._moves, self._gain_moves = Usual(), Usual()  # each relative, and for a unit of `update_size`

    # -- good states ---------------------------------------------------------------------------

    def watch(self, rolling: Rolling | None = None, *, step: int = 0) -> None:
        """Keep the present state as the last good one, and none that is older; see `GuardSession.watch`."""
        if self.rolling is not None:
            self.rolling.restart()
        self.rolling = rolling or self.rolling or Rolling()
        self._remember(self.rolling, step)

    def watch_on(self, step: int) -> None:
        """The same, where anybody watches: after a kept edit or a resume, behind which no rollback may go."""
        if self.rolling is not None:
            self.watch(step=step)

    def _remember(self, rolling: Rolling, step: int) -> None:
        """The present state becomes the last good one (every process its own part)."""
        guarded, processes = self._guarded, self._guarded.processes
        rolling.make_room()
        point = guarded.safe_point(rolling.weights)
        with processes.together("keeping the training state"):
            training = None if rolling.capture is None else rolling.capture()
        state = GoodState(point, training, guarded.current, guarded.baseline, step)
        rolling.push(state, lambda size: max(processes.gather("size of the good states", size)))
        guarded.cost.snapshot_bytes = max(guarded.cost.snapshot_bytes, rolling.nbytes)

    def has_changed(self) -> bool:
        """See `GuardSession.has_changed`."""
        guarded = self._guarded
        with guarded.processes.together("comparing with the last good state"):
            good = self._last_good("has_changed")
            settle(guarded.model)
            ours = bool(good.point.snapshot.changed_names())
        return any(guarded.processes.gather("changed since the last good state", ours))

    def _last_good(self, caller: str) -> GoodState:
        good = None if self.rolling is None else self.rolling.newest
        if good is None:
            raise InputError(f"{caller} needs a last good state: call session.watch() when training begins")
        return good

    def release(self) -> None:
        """Free every good state."""
        if self.rolling is not None:
            self.rolling.restart()
            self.rolling = None

    # -- one window ----------------------------------------------------------------------------

    def judge(self, handle: Step, window: Window, on_violation: str) -> Window:
        """Judge what training did since the last good state; keep it, or go back.

        Args:
            handle: The step that is filled in.
            window: What this process saw of it.
            on_violation: As in `GuardSession.edit`.

        Returns:
            What all processes saw of it together, for `learn`.

        Raises:
            InputError: Nobody watches, or the losses hold what is not a number.
            RestoreError: If a restore could not be proven exact (the decision is then HALT).
        """
        guarded, processes = self._guarded, self._guarded.processes
        with processes.together(f"losses of {handle.name!r}"):
            good = self._last_good("check_window")
            ours, our_norms = as_losses(window.raw_losses), as_losses(window.grad_norms)
        require_same_call(processes, handle, on_violation, in_warmup=window.in_warmup)
        losses = common_losses(ours, processes)
        # Whole gradients have one norm; where one process steps and another does not, the weights show it.
        every = processes.gather("gradient norms", (our_norms, window.num_skipped))
        norms, skipped = every[0][0], max(count for _, count in every)
        with processes.together("moves of biases and gains"):
            gains = vector_moves(guarded.model, good.point.snapshot, processes)
        subject = Subject(
            handle.name,
            handle.kind,
            None,
            raw_losses=losses,
            loss_spike=None if losses is None else is_loss_spike(self.losses, losses),
            in_warmup=window.in_warmup,
            window=self._reading(losses or (), norms, skipped, window, gains),
            health=window.health,
        )
        recorder = self._recorder
        change = Transaction(guarded, handle, good.point, before=guarded.current, subject=subject, recorder=recorder)
        change.judge()
        change.settle(on_violation, keep=lambda: self._keep(change), take_back=lambda: self._go_back(handle))
        if handle.decision is not None and handle.decision.action is Action.KEEP:
            self._learn_moves(handle, gains, window.update_size)
        return Window(losses, norms, skipped, window.in_warmup)

    def learn(self, window: Window) -> None:
        """Remember the losses and norms of a window that passed: what is usual is told by them."""
        self.losses = [*self.losses, *(window.raw_losses or ())][-HISTORY:]
        self._norms = [*self._norms, *(window.grad_norms or ())][-HISTORY:]

    def _learn_moves(self, handle: Step, gains: Mapping[str, float], size: float | None) -> None:
        """How far tensors moved in a window that was kept."""
        moves = {} if handle.record is None else handle.record.relative_delta
        for usual, found in ((self._moves, moves), (self._gain_moves, gains)):
            usual.learn({name: move / (size or 1.0) for name, move in found.items() if move is not None})

    def _reading(
        self,
        losses: Sequence[float],
        norms: tuple[float, ...] | None,
        num_skipped: int,
        seen: Window,
        gains: Mapping[str, float],
    ) -> WindowReading:
        size = seen.update_size or 1.0
        gain = weight_move(self._gain_moves.known(size), gains)
        ours = (
            tuple(seen.impossible_moments),
            (*seen.reports, *((replace(gain, statistic="gain_move"),) if gain else ())),
        )
        every = self._guarded.processes.gather("moments and reports", ours)
        moments = [theirs for theirs, _ in every]
        peaks = (loss_peak(self.losses, losses), norm_peak(self._norms, norms or ()))
        loss, norm = lasting_score(self.losses, losses), norm_score(self._norms, norms or ())
        guessing = seen.guessing if self._may_go_back else None
        guarded, stale = self._guarded, set[str]()
        if guarded.masters is not None:
            for theirs in guarded.processes.gather("stale master weights", sorted(guarded.masters.stale())):
                stale.update(theirs)
        return WindowReading(
            grad_norms=norms,
            num_skipped=num_skipped,
            loss_z=None if loss is None else loss.z,
            loss_ratio=None if loss is None else loss.ratio,
            loss_rise=None if loss is None else loss.rise,
            norm_z=None if norm is None else norm.z,
            norm_ratio=None if norm is None else norm.ratio,
            stale_masters=tuple(sorted(stale)),
            impossible_moments=tuple(dict.fromkeys(one for theirs in moments for one in theirs)),
            disagreements=tuple(seen.disagreements),
            num_steps=len(losses),
            guessing=guessing,
            num_near=num_near_guessing(self.losses, losses, guessing),
            reports=worst_reports([*(one for one in peaks if one), *(one for _, theirs in every for one in theirs)]),
            usual_moves=self._moves.known(size),
        )

    @property
    def _may_go_back(self) -> bool:
        """Whether one more rollback ends no run: data that stay near guessing are meant so, and let pass."""
        if self.rolling is None:
            return False
        most = self.rolling.options.max_rollbacks
        return len(self.rolling.rollbacks) < (_MAX_FOR_DATA if most is None else most)

    # -- keep it -------------------------------------------------------------------------------

    def _keep(self, change: Transaction) -> None:
        guarded, handle, state = self._guarded, change.handle, change.after
        passed = handle.decision is not None and handle.decision.action is Action.KEEP
        if passed and guarded.held is None and (self._grew_untrained(state) or self._ends_high(handle)):
            # Growth of an unlearned matrix proves nothing until a loss has been seen with it, and one high loss
            # may be a batch or the beginning of something: keep the older last good state for one more window.
            guarded.held = state
            return
        guarded.accept(state, as_baseline=True)
        if self.rolling is not None:
            self.rolling.kept()
            self._remember(self.rolling, handle.step)

    def _ends_high(self, handle: Step) -> bool:
        """Whether the last loss of a window that is kept was far too high."""
        losses, window = _losses_of(handle), None if handle.judged is None else handle.judged.after.window
        if not losses:
            return False
        near = num_near_guessing(self.losses, losses[-1:], None if window is None else window.guessing)
        return bool(near) or is_high(self.losses, losses[-1])

    def _grew_untrained(self, state: State) -> bool:
        """Whether a matrix without learned structure changed its norm grossly."""
        before, after = self._guarded.baseline.readings.matrices, state.readings.matrices
        for name in state.readings.untrained & before.keys():
            old, new = before[name].spectral_norm, after[name].spectral_norm
            if old and new is not None and not 0.1 <= new / old <= 10.0:
                return True
        return False

    # -- or go back ----------------------------------------------------------------------------

    def _go_back(self, handle: Step) -> None:
        """Take the run back to a good state, with all that belongs to it.

        HALT where that was done too often, and where it cannot help: the processes train on each other's batches.
        """
        guarded, rolling, decision = self._guarded, self.rolling, handle.decision
        if rolling is None or decision is None:
            raise InputError("nobody watches: there is no good state to go back to")
        # The first loss of a window is that of the state it began with.
        losses = _losses_of(handle)
        doubtful = bool(losses) and is_high(self.losses, losses[0])
        good = rolling.choose(handle.step, decision.reason, doubtful=doubtful)
        guarded.restore(good.point)
        notes: dict[str, Any] = {"back_to_step": good.step, "rollbacks": len(rolling.rollbacks)}
        if good.training is not None and not guarded.processes.lost:
            with guarded.processes.together("restoring the training state"):
                notes.update(good.training.put_back())
        guarded.held, guarded.current, guarded.baseline = None, good.current, good.baseline
        if handle.record is not None:
            handle.record = replace(handle.record, params={**handle.record.params, **notes})
        if handle.judged is not None and (window := handle.judged.after.window) and window.disagreements:
            reason = f"{decision.reason}. The last good state, of step {good.step}, is in place"
            handle.decision = guarded.assessor.halted(decision, reason, situation="inputs_disagree")
        elif rolling.exhausted and decision.action is not Action.HALT:
            reason = f"{decision.reason}. {rolling.tried()}"
            handle.decision = guarded.assessor.halted(decision, reason, situation="rollbacks_exhausted")


def _losses_of(handle: Step) -> tuple[float, ...]:
    return () if handle.judged is None else handle.judged.after.raw_losses or ()
