"""Losses on the same windows before and after a change: read, paired, and stopped as soon as they decide.

`LossProbe` reads the loss of every window once before any change and keeps the numbers; after a change it
reads windows in random order until the limits are decided, and says with what interval. Every process gets
the same readings.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from weightproof.collective import Processes
from weightproof.errors import InputError
from weightproof.families import unwrap
from weightproof.folders.text_data import read_examples
from weightproof.forward.outputs import Part, Place, read_batches
from weightproof.forward.windows import Item, is_encoder_decoder, max_length, stack
from weightproof.loss_data.items import Form, loss_items, task_of
from weightproof.loss_data.scores import Metric, ScoreFn, batch_scores, metrics_of
from weightproof.loss_data.tally import LossTally, reading_without_numbers
from weightproof.loss_data.windows import Chunk, LossWindows
from weightproof.rng import preserved_rng
from weightproof.types import LossReading, Outcome

if TYPE_CHECKING:
    from weightproof.guards.loss import LossLimits

__all__ = ["LossData", "LossProbe", "LossWindows"]

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class LossData:
    """Data with what the loss guard should know about it; pass it as `retain=` or `target=`.

    Attributes:
        data: What `retain=` takes: an iterable of dicts, a `datasets.Dataset`, tensors, lists of token ids, or the
            path of a .txt or .jsonl file.
        encode: Turns text into token ids, for files.
        metric: A score of one example, `metric(logits, example) -> float`: logits (positions, classes) or
            (classes,) in float32 on the CPU; example a dict of input tensors and `labels`. None: the model's own
            loss, and accuracy for a classifier.
        metric_name: Under which the metric is reported and the policy may limit it.
        higher_is_better: Of the metric.
        mask_token_id: What hides a token of a masked language model where labels are not given.
    """

    data: Any
    encode: Encode | None = None
    metric: ScoreFn | None = None
    metric_name: str = "metric"
    higher_is_better: bool = True
    mask_token_id: int | None = None


@dataclass
class _Track:
    """One role: its windows and metrics, and the scores before any change (windows, metrics) on disk."""

    role: str
    windows: LossWindows | None = None
    metrics: tuple[Metric, ...] = ()
    reason: str | None = None
    before: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    unusable: str | None = None


class LossProbe:
    """Paired losses of one model on retain and target windows.

    Args:
        model: The guarded model.
        retain: Data on which it must not get worse; None for none.
        target: Data on which it must get better; None for none.
        limits: Coverage floors, limits and error rates.
        processes: Who takes part; every one of them is given the same data and calls every method alike.
        encode: Turns text into token ids, where the data is the path of a text file.
        tokenizer_digest: What made the token ids, where it is known; it enters the windows' digest.

    Raises:
        InputError: If data cannot be used: empty, binary, text without an encoder, token ids beyond the
            model's vocabulary, labels that do not fit.
    """

    def __init__(  # noqa: PLR0913 - what a session hands over
        self,
        model: nn.Module,
        retain: Any,
        target: Any,
        limits: LossLimits,
        processes: Processes,
        *,
        encode: Encode | None = None,
        tokenizer_digest: str | None = None,
    ) -> None:
        self.model = model
        self.limits = limits
        self.processes = processes
        given = [(role, data) for role, data in (("retain", retain), ("target", target)) if data is not None]
        self._tracks = tuple(self._track(role, data, encode, tokenizer_digest) for role, data in given)
        self._stale = True

    @property
    def windows(self) -> tuple[LossWindows, ...]:
        """Retain windows, then target windows, as far as there are any."""
        return tuple(track.windows for track in self._tracks if track.windows is not None)

    @property
    def is_stale(self) -> bool:
        """Whether the losses before a change have yet to be read."""
        return self._stale

    def moved(self) -> None:
        """The reference changed (training went on): its losses must be read again before the next edit."""
        self._stale = True

    def first(self, count: int) -> list[Item]:
        """The first retain windows with their labels, for whoever shares a one-shot iterable with this probe."""
        return next((track.windows.first(count) for track in self._tracks if track.windows is not None), [])

    def again(self, *, min_gain: float) -> LossProbe:
        """A probe of the retain windows that compares two other states, the second of which must gain.

        It has read nothing: `capture` it before a trial change. It shares the windows; close only this probe.
        """
        trial = copy.copy(self)
        trial.limits = replace(self.limits, min_gain=min_gain)
        trial._tracks = tuple(
            replace(track, role="target", before=np.empty((0, 0)), unusable=None)
            for track in self._tracks
            if track.role == "retain"
        )
        trial._stale = True
        return trial

    def close(self) -> None:
        """Give the disk space of the windows back."""
        for windows in self.windows:
            windows.close()

    # -- windows -----------------------------------------------------------------------------------

    def _track(self, role: str, given: Any, encode: Encode | None, tokenizer_digest: str | None) -> _Track:
        wrapped = given if isinstance(given, LossData) else LossData(given)
        model = unwrap(self.model)
        task, reason = task_of(model)
        if wrapped.metric is None and task is None:
            return _Track(role, reason=reason)
        task = task or "plain"
        limit = max_length(model) or self.limits.length
        form = Form(task, min(self.limits.length, limit), role, _mask_token(model, wrapped))
        with preserved_rng():
            data, is_text = _opened(wrapped, encode, role, encoder_decoder=is_encoder_decoder(model))
            windows = LossWindows(
                loss_items(data, model, form, by_window=is_text),
                form,
                max_windows=self.limits.max_windows,
                tokenizer_digest=tokenizer_digest,
            )
        metrics = metrics_of(task) if wrapped.metric is None else (_own_metric(wrapped),)
        short = self.limits.too_little(
            windows.num_windows, windows.num_tokens if metrics[0].per_token else windows.num_windows
        )
        return _Track(role, windows, metrics, short and f"too little data: {short}")

    # -- before ------------------------------------------------------------------------------------

    def capture(self) -> None:
        """Read the losses of the model as it is now, of every window.

        Where there are too few windows, nothing is run. What the model cannot be run on, or where its loss is
        NaN or infinite, is not measured later, with that reason.

        Raises:
            InputError: If the processes hold different windows.
        """
        self._same_windows()
        for track in self._tracks:
            if track.windows is None or track.reason is not None:
                continue
            track.before = _scratch(track.windows.num_windows, len(track.metrics))
            track.unusable = None
            try:
                for chunk in track.windows.chunks():
                    track.before[chunk.start : chunk.stop] = self._scores(track, chunk, "losses before the change")
            except InputError as error:
                track.unusable = f"the loss cannot be read before the change: {_brief(error)}"
                continue
            broken = int(np.count_nonzero(~np.isfinite(track.before).all(axis=1)))
            if broken:
                track.unusable = f"the loss before the change is NaN or infinite on {broken} windows"
        self._stale = False

    def adopt(self, known: LossProbe) -> None:
        """Take over what another probe captured: of the same windows, and of a model with the same weights.

        For many sessions on copies of one model. That the weights are the same is the caller's to know.

        Raises:
            InputError: If the other has read nothing, or other windows.
        """
        if known.is_stale or [one.digest for one in known.windows] != [one.digest for one in self.windows]:
            raise InputError("these losses are of other windows, or were never read: call capture() instead")
        for ours, theirs in zip(self._tracks, known._tracks, strict=True):
            ours.before, ours.unusable = theirs.before, theirs.unusable
        self._stale = False

    def _same_windows(self) -> None:
        ours = tuple(windows.digest for windows in self.windows)
        every = self.processes.gather("loss windows", ours)
        if any(theirs != every[0] for theirs in every):
            raise InputError(
                "processes hold different loss windows: give every process the same retain and target data (before it "
                "is sharded over processes, for example)"
            )

    def _scores(self, track: _Track, chunk: Chunk, operation: str) -> np.ndarray:
        """The scores of a chunk (windows, metrics), the same on every process."""
        assert track.windows is not None
        task, metrics = track.windows.task, track.metrics
        stacked = stack(track.role, [item.inputs for item in chunk.items], unwrap(self.model))
        sizes = [next(iter(batch.values())).shape[0] for batch in stacked.batches]
        ends = np.cumsum(sizes).tolist()

        def read(place: Place, parts: tuple[Part, ...], is_own: bool) -> tuple[tuple[float, ...], ...]:
            if not is_own:
                return ()
            items = chunk.items[ends[place.batch] - sizes[place.batch] : ends[place.batch]]
            return batch_scores(task, metrics, stacked.batches[place.batch], parts, items)

        found, _ = read_batches(
            self.model, [stacked], self.processes, read, operation=f"{track.role} {operation}", with_taps=False
        )
        return np.array([row for batch in found for row in batch.value], dtype=np.float64)

    # -- after -------------------------------------------------------------------------------------

    def measure(self, *, to_the_end: bool = False) -> tuple[LossReading, ...]:
        """Losses of the model as it is now, against those before: one reading a metric and role.

        Windows are read until every limit of the role is decided, or there are none left. A forward pass that
        fails now, or a loss that is NaN or infinite, is a reading that says so: the same windows ran before.

        Args:
            to_the_end: Read every window, whatever is decided before.
        """
        return tuple(reading for track in self._tracks for reading in self._measured(track, to_the_end=to_the_end))

    def _measured(self, track: _Track, *, to_the_end: bool) -> list[LossReading]:
        reason = track.reason or track.unusable
        if reason is None and self._stale:
            reason = "the losses before the change were not read"
        if track.windows is None or reason is not None:
            names = [metric.name for metric in track.metrics] or ["nll"]
            return [reading_without_numbers(track.role, name, track.windows, str(reason)) for name in names]
        tally = LossTally(track.role, track.windows, track.metrics, self.limits)
        try:
            for chunk in track.windows.chunks():
                scores = self._scores(track, chunk, "losses after the change")
                tally.add(chunk, track.before[chunk.start : chunk.stop], scores)
                if tally.is_broken or chunk.stop == track.windows.num_windows:
                    break
                if not to_the_end and self._is_decided(tally):
                    break
        except InputError as error:
            return tally.failed(track.before, f"the model no longer runs on windows that it ran on: {_brief(error)}")
        return tally.readings()

    def _is_decided(self, tally: LossTally) -> bool:
        """Whether any limit rejects already, or all accept and the coverage floors are reached."""
        outcomes = [self.limits.outcome(reading) for reading in tally.readings_so_far()]
        if not outcomes or Outcome.FAIL in outcomes:
            return bool(outcomes)
        enough = self.limits.too_little(tally.windows_used, tally.tokens_used) is None
        return enough and tally.may_accept_early and all(outcome is Outcome.PASS for outcome in outcomes)


def _opened(given: LossData, encode: Encode | None, role: str, *, encoder_decoder: bool) -> tuple[Any, bool]:
    """The examples of the data, and whether they are pieces of one text (of unknown documents)."""
    data = given.data
    if not isinstance(data, (str, os.PathLike)):
        return data, False
    path = Path(data)
    examples = read_examples(path, given.encode or encode, name=role, encoder_decoder=encoder_decoder)
    return examples, path.suffix.lower() != ".jsonl"


def _mask_token(model: nn.Module, given: LossData) -> int | None:
    if given.mask_token_id is not None:
        return given.mask_token_id
    token = getattr(getattr(model, "config", None), "mask_token_id", None)
    return token if isinstance(token, int) else None


def _own_metric(given: LossData) -> Metric:
    return Metric(given.metric_name, higher_is_better=given.higher_is_better, score=given.metric)


def _scratch(num_windows: int, num_metrics: int) -> np.memmap:
    """An array on disk without a name: the system removes it with its last user."""
    with tempfile.TemporaryFile(prefix="weightproof-losses-") as file:
        return np.memmap(file, dtype=np.float64, mode="w+", shape=(num_windows, num_metrics))


def _brief(error: InputError) -> str:
    """First line of an error, short enough for a reason."""
    return str(error).splitlines()[0][:200]
