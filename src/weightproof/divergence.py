"""Outputs now against outputs at baseline: one forward pass on fixed windows settles most cases.

`capture_outputs` keeps what the unchanged model says; `measure_divergence` says how far the model
is from it now; `locate_damage` names the blocks that changed; `forward_digest` is the bit-exact
fingerprint by which a rollback is proven.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from weightproof.activations import forward_outputs, merged_moments, undisturbed
from weightproof.collective import Processes
from weightproof.errors import BaselineError, InputError
from weightproof.forward.distributions import BaseScores, Tally, compare, is_finite, keep, merged
from weightproof.forward.localisation import BlockTrace, locate_errors, trace_blocks, worst_errors
from weightproof.forward.outputs import BatchRead, Part, Place, read_batches
from weightproof.forward.windows import Item, Windows, raw_bytes
from weightproof.types import BlockError, DivergenceReading

__all__ = [
    "MEMORY_CAP_BYTES",
    "OutputCache",
    "OutputPass",
    "capture_outputs",
    "forward_digest",
    "locate_damage",
    "measure_divergence",
]

MEMORY_CAP_BYTES = 256 * 2**20
_TRACE_TOKENS = 128


@dataclass(frozen=True, slots=True, eq=False)
class OutputCache:
    """What the unchanged model says, on the CPU: this process's share of it.

    Attributes:
        windows: The windows it was asked on.
        scores: Per windows, per batch: the scores and, where there is one, the pooled summary; () for
            the batches of other processes.
        second_moments: "windows:tap" -> mean squared block contribution, over the batches of all.
        forward_digest: Bit-exact hash of the raw output of this process on the first window.
        trace: Inputs and outputs of every block on one window; None with `trace_reason`.
        rank: The process whose share this is.
        num_processes: Among how many the batches were dealt.
    """

    windows: tuple[Windows, ...]
    scores: tuple[tuple[tuple[BaseScores, ...], ...], ...]
    second_moments: Mapping[str, float]
    forward_digest: str
    trace: BlockTrace | None = None
    trace_reason: str | None = None
    rank: int = 0
    num_processes: int = 1

    @property
    def nbytes(self) -> int:
        """Memory held beside the model by this process."""
        held = sum(part.nbytes for batches in self.scores for batch in batches for part in batch)
        return held + (self.trace.nbytes if self.trace is not None else 0)


@dataclass(frozen=True, slots=True)
class OutputPass:
    """One reading of the outputs: a `DivergenceReading` per windows, and the second moments."""

    divergence: tuple[DivergenceReading, ...]
    second_moments: Mapping[str, float] = field(default_factory=dict)


def capture_outputs(
    model: nn.Module,
    windows: Sequence[Windows],
    *,
    processes: Processes | None = None,
    memory_cap_bytes: int = MEMORY_CAP_BYTES,
) -> OutputCache:
    """Keep the outputs of the unchanged model on `windows`.

    Log-probabilities are kept in full where they fit into `memory_cap_bytes` (shared evenly by the
    windows), else as the likeliest k and one bucket, with k as large as fits. One small window is
    also traced through the blocks, within a quarter of the cap.

    Args:
        model: The model; of a sharded one, every process calls this.
        windows: The same on every process.
        processes: Those among which the batches are dealt; None for this one alone.
        memory_cap_bytes: What one process alone would hold. Dealt batches take their share of it: k,
            and with it every reading, does not depend on the number of processes.

    Raises:
        InputError: If there are no windows, or the model's outputs on them cannot be compared.
        BaselineError: If the outputs are already NaN or inf. Both on every process, if on any.
    """
    if not windows:
        raise InputError("no windows to capture outputs on: give retain data, the model's config names no inputs")
    processes = processes or Processes.alone()
    budgets = [memory_cap_bytes / len(windows) / sum(_num_rows(batch) for batch in one.batches) for one in windows]
    kept: dict[Place, tuple[BaseScores, ...]] = {}

    def read(place: Place, parts: tuple[Part, ...], is_own: bool) -> None:
        one = windows[place.windows]
        _require_finite(one, parts)
        if is_own:
            budget = budgets[place.windows] * _num_rows(one.batches[place.batch])
            kept[place] = tuple(keep(part.kind, part.scores, part.window, budget) for part in parts)

    batches, _ = read_batches(model, windows, processes, read, operation="outputs before the change")
    trace, reason = _traced(model, windows, processes, memory_cap_bytes // 4)
    with processes.together("forward digest"):
        digest = forward_digest(model, windows)
    return OutputCache(
        windows=tuple(windows),
        scores=tuple(
            tuple(kept.get(Place(index, batch), ()) for batch in range(len(one.batches)))
            for index, one in enumerate(windows)
        ),
        second_moments=_moments(windows, batches),
        forward_digest=digest,
        trace=trace,
        trace_reason=reason,
        rank=processes.rank,
        num_processes=processes.size,
    )


def measure_divergence(
    model: nn.Module, cache: OutputCache, *, processes: Processes | None = None, turn: int | None = None
) -> OutputPass:
    """Compare the model's outputs now with the cached ones, on the same windows.

    KL(base || now) in nats per token for logits, relative RMS change for hidden states (each token
    normalised first, as the final norm would; the pooled summary apart, the larger is reported) and
    for other values (as they are). Outputs that are NaN or inf, on any process, give `finite=False` and
    no number. The readings have the same bits on every process and for every number of processes.

    Args:
        model: The model; of a sharded one, every process calls this.
        cache: This process's share of the outputs, as `capture_outputs` gave it.
        processes: Those for which it was captured.
        turn: Run only the one batch whose turn it is; None: all. Windows of which none is run have no reading.

    Raises:
        InputError: If the model's forward fails now, or its outputs have another shape; on every
            process, if on any.
    """
    processes = processes or Processes.alone()
    if (cache.rank, cache.num_processes) != (processes.rank, processes.size):
        raise InputError(
            f"the outputs were captured by process {cache.rank} of {cache.num_processes} and are compared by process "
            f"{processes.rank} of {processes.size}: capture them again"
        )

    def read(place: Place, parts: tuple[Part, ...], is_own: bool) -> _Compared:
        if not is_own:  # nothing to compare with, but a broken copy of the model shows
            return _Compared("", tuple(Tally(finite=is_finite(part.scores)) for part in parts))
        bases = cache.scores[place.windows][place.batch]
        _require_same_form(bases, parts)
        tallies = tuple(Tally() for _ in parts)
        for base, part, tally in zip(bases, parts, tallies, strict=True):
            compare(base, part.scores, tally)
        return _Compared(parts[0].kind, tallies)

    what = "outputs after the change"
    batches, spare = read_batches(model, cache.windows, processes, read, operation=what, turn=turn)
    readings: list[DivergenceReading] = []
    for index, one in enumerate(cache.windows):
        own = [batch.value for batch in batches if batch.place.windows == index]
        if not own:
            continue
        tallies = tuple(merged(parts) for parts in zip(*(compared.tallies for compared in own), strict=True))
        others = [tally for batch in spare if batch.place.windows == index for tally in batch.value.tallies]
        finite = all(tally.finite for tally in (*tallies, *others))
        readings.append(_reading(one, own[0].kind, tallies, finite=finite))
    return OutputPass(tuple(readings), _moments(cache.windows, batches))


def locate_damage(
    model: nn.Module, cache: OutputCache, *, processes: Processes | None = None
) -> tuple[BlockError, ...]:
    """Teacher-forced relative output error per block; () where the blocks were not traced.

    Every process runs the same window; of copies that differ, the larger error counts.

    Raises:
        InputError: If the model's forward fails; on every process, if on any.
    """
    if cache.trace is None:
        return ()
    processes = processes or Processes.alone()
    with processes.together("block errors"):
        errors = locate_errors(model, cache.trace)
    return worst_errors(processes.gather("block errors", errors))


def forward_digest(model: nn.Module, windows: Windows | Sequence[Windows]) -> str:
    """SHA-256 of the raw bytes (with dtype and shape) of the model's output on the first window.

    Of this process's copy of the model; of a sharded model every process must call this.

    Raises:
        InputError: If the model's forward fails.
    """
    first = windows if isinstance(windows, Windows) else windows[0]
    with undisturbed(model):
        parts = forward_outputs(model, first.first()).parts
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.dtype} {tuple(part.shape)}\n".encode())
        digest.update(raw_bytes(part))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Compared:
    """What one batch adds to a reading: the kind of its outputs and the sums of each part."""

    kind: str
    tallies: tuple[Tally, ...]


def _traced(
    model: nn.Module, windows: Sequence[Windows], processes: Processes, cap_bytes: int
) -> tuple[BlockTrace | None, str | None]:
    """The block trace, or why there is none; none on every process, if on any."""
    with processes.together("block trace"):
        trace = trace_blocks(model, _small_window(windows), cap_bytes=cap_bytes)
    reasons = processes.gather("block trace", trace if isinstance(trace, str) else None)
    reason = next((reason for reason in reasons if reason is not None), None)
    return (trace, None) if reason is None and isinstance(trace, BlockTrace) else (None, reason)


def _moments(windows: Sequence[Windows], batches: Sequence[BatchRead]) -> dict[str, float]:
    found: dict[str, float] = {}
    for index, one in enumerate(windows):
        moments = merged_moments(batch.taps for batch in batches if batch.place.windows == index)
        found.update({f"{one.name}:{tap}": value for tap, value in moments.items()})
    return found


def _require_finite(windows: Windows, parts: tuple[Part, ...]) -> None:
    if not all(is_finite(part.scores) for part in parts):
        raise BaselineError(
            f"the model's outputs on the {windows.name} windows are NaN or inf before any change: "
            "a broken model cannot be a baseline, load sound weights"
        )


def _num_rows(batch: Mapping[str, torch.Tensor]) -> int:
    first = next(iter(batch.values()))
    return first.shape[0] if first.ndim else 1


def _require_same_form(bases: tuple[BaseScores, ...], parts: tuple[Part, ...]) -> None:
    then = [(base.kind, len(base.window), base.width) for base in bases]
    now = [(part.kind, *part.scores.shape) for part in parts]
    if then != now:
        raise InputError(
            f"the model's outputs are now {now} and were {then} at baseline (kind, tokens, width): "
            "they cannot be compared, capture a new baseline"
        )


def _reading(windows: Windows, kind: str, tallies: tuple[Tally, ...], *, finite: bool) -> DivergenceReading:
    main = tallies[0]
    has_kl = finite and kind == "logits"
    return DivergenceReading(
        windows=windows.name,
        windows_digest=windows.digest,
        num_tokens=main.num_tokens,
        kl=main.mean_kl if has_kl else None,
        kl_max=main.max_kl if has_kl else None,
        top1_flip_rate=main.flips / main.num_tokens if has_kl else None,
        hidden_error=max(t.relative_change for t in tallies) if finite and kind != "logits" else None,
        finite=finite,
    )


def _small_window(windows: Sequence[Windows]) -> Item:
    """The first window, a text one cut to its first tokens."""
    window = windows[0].first()
    ids = window.get("input_ids")
    if ids is None or ids.ndim != 2:
        return window
    length = ids.shape[1]
    is_sequence = {key: value.ndim == 2 and value.shape[1] == length for key, value in window.items()}
    return {k: v[:, :_TRACE_TOKENS] if is_sequence[k] or k.startswith("decoder_") else v for k, v in window.items()}
