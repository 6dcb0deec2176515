"""Train a model a few steps with a fault in them, with and without a guard: what `weightproof drill` is made of.

Every run begins with a copy of the same model, the same generators and the same batches. Under guard a rejected
window is given again (`data="replay"`), and a fault happens once, so a run that was taken back must end as the
clean twin, bit for bit.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from weightproof.errors import CollectiveError, EditRejectedError, InputError, RestoreError
from weightproof.parallel.run_agreement import batch_digest
from weightproof.readings.tensors import digest_of, read_tensors
from weightproof.testing.drill import PUT_BACK, STOPPED, Life, Procedure, Row, Sighting, reports, row_of, sightings
from weightproof.testing.faults import Fault, StuckRank, WrongRNG
from weightproof.testing.injection import Injection, inject
from weightproof_callbacks.accelerator import attach
from weightproof_callbacks.attached_guard import AttachedGuard
from weightproof_callbacks.training_state import ReplayableLoader, TrainingState

__all__ = ["Drill", "learnable_windows", "text_windows"]


@dataclass
class Drill:
    """Runs of one model over one stretch of data.

    Args:
        accelerator: Of this process; every process makes the same drill.
        model: The model; runs train copies of it.
        windows: Token ids, (num_windows, window): enough for `procedure.batches` batches on every process, then
            at least one more, which is held out.
        procedure: How to train.

    Raises:
        InputError: There are too few windows.
    """

    accelerator: Accelerator
    model: torch.nn.Module
    windows: Tensor
    procedure: Procedure = field(default_factory=Procedure)

    def __post_init__(self) -> None:
        """Part the windows."""
        needed = self.procedure.batches * self.procedure.batch_size * self.accelerator.num_processes
        if len(self.windows) <= needed:
            raise InputError(
                f"the drill needs more than {needed} windows of {self.windows.shape[-1]} tokens, and the data has "
                f"{len(self.windows)}: give a longer file, or fewer steps"
            )
        self._train, self._heldout = self.windows[:needed], self.windows[needed:][: 4 * self.procedure.batch_size]
        self._twins: dict[frozenset[int], Life] = {}
        self._watched: Life | None = None

    def twin(self, without: Collection[int] = ()) -> Life:
        """The clean run; with `without` the one that was never given those batches (positions from 0)."""
        key = frozenset(without)
        if key not in self._twins:
            self._twins[key] = self.live((), guarded=False, without=key)
        return self._twins[key]

    def watched(self) -> Life:
        """The clean run under guard."""
        if self._watched is None:
            self._watched = self.live((), guarded=True)
        return self._watched

    def row(self, fault: Fault) -> Row:
        """Both runs with a fault, held against the clean twin."""
        unguarded = self.live([fault], guarded=False)
        guarded = self.live([fault], guarded=True)
        return row_of(
            fault.name,
            fault.strength,
            self.procedure,
            twin=self.twin(),
            matched=self.twin(guarded.left_out),
            unguarded=unguarded,
            guarded=guarded,
            state=self._state_of(guarded),
            clean=self.watched(),
            at=fault.at,
        )

    def clean_row(self) -> Row:
        """A healthy run under guard, which nothing may act on."""
        guarded = self.watched()
        twin = self.twin()
        return row_of(
            "none",
            "",
            self.procedure,
            twin=twin,
            matched=twin,
            unguarded=twin,
            guarded=guarded,
            state=self._state_of(guarded),
        )

    def _state_of(self, life: Life) -> str:
        if life.error is not None:
            return "stopped before it trained on" if life.seen else f"ended: {life.error}"
        twin = self.twin(life.left_out)
        same = (life.weights, life.training) == (twin.weights, twin.training)
        count = len(life.left_out)
        words = "the clean twin" if not count else f"the twin without {count} batch{'es' if count > 1 else ''}"
        return f"equal to {words}, bit for bit" if same else f"differs from {words}"

    # -- one run -------------------------------------------------------------------------------

    def live(self, faults: Sequence[Fault], *, guarded: bool, without: Collection[int] = ()) -> Life:
        """Train once, and note everything."""
        life = Life()
        with ExitStack() as stack:
            run = stack.enter_context(self._prepared(faults, without, life))
            try:
                guard = stack.enter_context(self._guard(run, faults)) if guarded else None
                self._train_through(run, guard, life, _resumes(faults))
            except (RestoreError, EditRejectedError) as error:
                life.error = str(error)
            except CollectiveError as error:  # a process that did not come: both stop, whoever waited for whom
                life.error = str(error)
                step = 0 if run.guard is None else run.guard.step
                life.seen.append(Sighting(step, f"processes ({str(error).partition(' (')[0]})", STOPPED))
            if guarded and run.guard is not None:
                found = [*sightings(run.guard.history), *life.seen]
                life.seen = sorted(found, key=lambda one: one.step)
                life.reported = reports(run.guard.history)
                life.decisions = [step.decision.digest for step in run.guard.history if step.decision is not None]
            self._measure(run, life)
        return life

    @contextmanager
    def _prepared(self, faults: Sequence[Fault], without: Collection[int], life: Life) -> Iterator[_Run]:
        set_seed(self.procedure.seed)
        model = copy.deepcopy(self.model).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.procedure.learning_rate)
        size = self.procedure.batch_size * self.accelerator.num_processes
        kept = [part for i, part in enumerate(self._train.split(size)) if i not in without]
        rows = [{"input_ids": ids, "labels": ids} for part in kept for ids in part]
        data: Any = DataLoader(rows, batch_size=self.procedure.batch_size)  # pyright: ignore[reportArgumentType]
        model, optimizer, data = self.accelerator.prepare(model, optimizer, data)
        injection = inject(faults, model, optimizer)
        try:
            positions = {batch_digest(batch): i for i, batch in enumerate(data)}
            yield _Run(model, optimizer, ReplayableLoader(injection.loader(data)), injection, positions)
        finally:
            injection.remove()
            life.fired = [(fired.step, fired.what) for fired in injection.fired]
            self.accelerator.free_memory()

    @contextmanager
    def _guard(self, run: _Run, faults: Sequence[Fault]) -> Iterator[AttachedGuard]:
        is_stuck = any(isinstance(one, StuckRank) for one in faults)
        run.guard = attach(
            self.accelerator,
            run.model,
            run.optimizer,
            every=self.procedure.every,
            trackers=[],
            rollback="full",
            data="replay",
            loader=run.batches,
            timeout=self.procedure.patience if is_stuck else 600.0,
        )
        with run.guard:
            yield run.guard

    def _train_through(self, run: _Run, guard: AttachedGuard | None, life: Life, resumes: Collection[int]) -> None:
        for step, batch in enumerate(run.batches, start=1):
            self.accelerator.backward(run.model(**batch).loss)
            if self.procedure.clip is not None:
                self.accelerator.clip_grad_norm_(run.model.parameters(), self.procedure.clip)
            run.optimizer.step()
            self._note_left_out(run, batch, life)
            run.optimizer.zero_grad()
            if step in resumes:
                self._save_and_resume(run)
                if guard is not None and guard.put_back:
                    found = f"digest of the generators ({'; '.join(guard.put_back)})"
                    life.seen.append(Sighting(step, found, PUT_BACK))

    def _save_and_resume(self, run: _Run) -> None:
        """Save the run, and load it again, as a new process would."""
        folder = [tempfile.mkdtemp(prefix="weightproof-drill-") if self.accelerator.is_main_process else ""]
        broadcast_object_list(folder)
        try:
            self.accelerator.save_state(folder[0])
            self.accelerator.wait_for_everyone()
            run.injection.resuming(folder[0])
            self.accelerator.load_state(folder[0])
            self.accelerator.wait_for_everyone()
        finally:
            if self.accelerator.is_main_process:
                shutil.rmtree(folder[0], ignore_errors=True)

    def _note_left_out(self, run: _Run, batch: Any, life: Life) -> None:
        """A batch whose step was left out, until it is given again and its step is taken."""
        position = run.positions.get(batch_digest(batch))
        if position is not None and run.optimizer.step_was_skipped:
            life.left_out.add(position)
        elif position is not None:
            life.left_out.discard(position)

    def _measure(self, run: _Run, life: Life) -> None:
        plain = self.accelerator.unwrap_model(run.model)
        plain.eval()
        with torch.no_grad():
            losses = [plain(input_ids=ids, labels=ids).loss.item() for ids in self._heldout.split(8)]
        life.loss = sum(losses) / len(losses)
        life.weights = digest_of(read_tensors(plain, {}, ()))
        life.training = _moments_digest(run.optimizer)


@dataclass
class _Run:
    model: torch.nn.Module
    optimizer: Any
    batches: ReplayableLoader
    injection: Injection
    positions: dict[str, int]
    guard: AttachedGuard | None = None


def _resumes(faults: Sequence[Fault]) -> set[int]:
    """Steps after which a run is saved and resumed, because a fault hits that."""
    return {one.at for one in faults if isinstance(one, WrongRNG) and one.moment == "resume"}


def _moments_digest(optimizer: Any) -> str:
    """Of everything the optimizer holds and of every generator."""
    state = TrainingState.capture(optimizer=optimizer)
    return hashlib.sha256(state.digest.encode()).hexdigest()


def learnable_windows(vocabulary: int, count: int, length: int, seed: int) -> Tensor:
    """Random tokens with something to learn: each is mostly followed by one and the same other, (count, length)."""
    generator = torch.Generator().manual_seed(seed)
    symbols = min(vocabulary, 64)
    follows = torch.randperm(symbols, generator=generator)
    tokens = torch.randint(symbols, (count, length), generator=generator)
    strays = torch.rand(count, length, generator=generator) < 0.2
    rows = [tokens[:, 0]]
    for place in range(1, length):
        rows.append(torch.where(strays[:, place], tokens[:, place], follows[rows[-1]]))
    return torch.stack(rows, dim=1)


def text_windows(ids: Sequence[int], count: int, length: int) -> Tensor:
    """The first `count` windows of a stream of token ids, fewer where it is shorter, (num_windows, length)."""
    whole = min(count, len(ids) // length)
    return torch.tensor(ids[: whole * length], dtype=torch.long).view(whole, length)
