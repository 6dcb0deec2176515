"""Outputs now against outputs at baseline: one forward pass on fixed windows settles most cases.

`capture_outputs` keeps what the unchanged model says; `measure_divergence` says how far the model
is from it now; `locate_damage` names the blocks that changed; `forward_digest` is the bit-exact
fingerprint by which a rollback is proven.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from weightproof.activations import TapMoments, forward_outputs, tap_moments, undisturbed
from weightproof.distributions import BaseScores, Tally, compare, is_finite, keep
from weightproof.errors import BaselineError, InputError
from weightproof.localisation import BlockTrace, locate_errors, trace_blocks
from weightproof.types import BlockError, DivergenceReading
from weightproof.windows import Item, Windows, raw_bytes

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
    """What the unchanged model says, on the CPU.

    Attributes:
        windows: The windows it was asked on.
        scores: Per windows, per batch: the scores and, where there is one, the pooled summary.
        second_moments: "windows:tap" -> mean squared block contribution.
        forward_digest: Bit-exact hash of the raw output on the first window.
        trace: Inputs and outputs of every block on one window; None with `trace_reason`.
    """

    windows: tuple[Windows, ...]
    scores: tuple[tuple[tuple[BaseScores, ...], ...], ...]
    second_moments: Mapping[str, float]
    forward_digest: str
    trace: BlockTrace | None = None
    trace_reason: str | None = None

    @property
    def nbytes(self) -> int:
        """Memory held beside the model."""
        held = sum(part.nbytes for batches in self.scores for batch in batches for part in batch)
        return held + (self.trace.nbytes if self.trace is not None else 0)


@dataclass(frozen=True, slots=True)
class OutputPass:
    """One reading of the outputs: a `DivergenceReading` per windows, and the second moments."""

    divergence: tuple[DivergenceReading, ...]
    second_moments: Mapping[str, float] = field(default_factory=dict)


def capture_outputs(
    model: nn.Module, windows: Sequence[Windows], *, memory_cap_bytes: int = MEMORY_CAP_BYTES
) -> OutputCache:
    """Keep the outputs of the unchanged model on `windows`.

    Log-probabilities are kept in full where they fit into `memory_cap_bytes` (shared evenly by the
    windows), else as the likeliest k and one bucket, with k as large as fits. One small window is
    also traced through the blocks, within a quarter of the cap.

    Raises:
        InputError: If there are no windows, or the model's outputs on them cannot be compared.
        BaselineError: If the outputs are already NaN or inf.
    """
    if not windows:
        raise InputError("no windows to capture outputs on: give retain data, the model's config names no inputs")
    scores: list[tuple[tuple[BaseScores, ...], ...]] = []
    moments: dict[str, float] = {}
    for one in windows:
        budget = memory_cap_bytes / len(windows) / sum(_num_rows(batch) for batch in one.batches)
        with undisturbed(model), tap_moments(model) as taps:
            scores.append(
                tuple(
                    tuple(_keep_part(one, part, budget * _num_rows(batch)) for part in parts)
                    for batch, parts in zip(one.batches, _outputs(model, one, taps), strict=True)
                )
            )
        moments.update({f"{one.name}:{tap}": value for tap, value in taps.moments().items()})
    trace = trace_blocks(model, _small_window(windows), cap_bytes=memory_cap_bytes // 4)
    return OutputCache(
        windows=tuple(windows),
        scores=tuple(scores),
        second_moments=moments,
        forward_digest=forward_digest(model, windows),
        trace=trace if isinstance(trace, BlockTrace) else None,
        trace_reason=trace if isinstance(trace, str) else None,
    )


def measure_divergence(model: nn.Module, cache: OutputCache) -> OutputPass:
    """Compare the model's outputs now with the cached ones, on the same windows.

    KL(base || now) in nats per token for logits, relative RMS change for hidden states (each token
    normalised first, as the final norm would; the pooled summary apart, the larger is reported) and
    for other values (as they are). Outputs that are NaN or inf give `finite=False` and no number.

    Raises:
        InputError: If the model's forward fails now, or its outputs have another shape.
    """
    readings: list[DivergenceReading] = []
    moments: dict[str, float] = {}
    for one, batches in zip(cache.windows, cache.scores, strict=True):
        tallies = tuple(Tally() for _ in batches[0])
        with undisturbed(model), tap_moments(model) as taps:
            for bases, parts in zip(batches, _outputs(model, one, taps), strict=True):
                _require_same_form(bases, parts)
                for base, part, tally in zip(bases, parts, tallies, strict=True):
                    compare(base, part.scores, tally)
        readings.append(_reading(one, batches[0][0].kind, tallies))
        moments.update({f"{one.name}:{tap}": value for tap, value in taps.moments().items()})
    return OutputPass(tuple(readings), moments)


def locate_damage(model: nn.Module, cache: OutputCache) -> tuple[BlockError, ...]:
    """Teacher-forced relative output error per block; () where the blocks were not traced.

    Raises:
        InputError: If the model's forward fails.
    """
    return locate_errors(model, cache.trace) if cache.trace is not None else ()


def forward_digest(model: nn.Module, windows: Windows | Sequence[Windows]) -> str:
    """SHA-256 of the raw bytes (with dtype and shape) of the model's output on the first window.

    Raises:
        InputError: If the model's forward fails.
    """
    first = windows if isinstance(windows, Windows) else windows[0]
    with undisturbed(model):
        parts = forward_outputs(model, first.first()).parts
    whole = hashlib.sha256()
    for part in parts:
        whole.update(f"{part.dtype} {tuple(part.shape)}\n".encode())
        whole.update(raw_bytes(part))
    return whole.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Scores (n, width) of the real tokens of one batch, and the window (n,) of each token."""

    kind: str
    scores: torch.Tensor
    window: torch.Tensor


def _outputs(model: nn.Module, windows: Windows, taps: TapMoments) -> Iterator[tuple[_Part, ...]]:
    """One forward pass per batch; windows are numbered through."""
    offset = 0
    for batch in windows.batches:
        taps.batch = batch
        output = forward_outputs(model, batch)
        main = _flat(output.kind, output.scores, output.real, offset)
        yield (main,) if output.pooled is None else (main, _flat(output.kind, output.pooled, None, offset))
        offset += output.scores.shape[0]


def _flat(kind: str, scores: torch.Tensor, real: torch.Tensor | None, offset: int) -> _Part:
    scores = scores if scores.ndim > 1 else scores[None]
    rows = torch.arange(scores.shape[0]).reshape(-1, *[1] * (scores.ndim - 2)).expand(scores.shape[:-1]) + offset
    if real is None:
        return _Part(kind, scores.reshape(-1, scores.shape[-1]), rows.flatten())
    return _Part(kind, scores[real.to(scores.device)], rows[real])


def _keep_part(windows: Windows, part: _Part, budget_bytes: float) -> BaseScores:
    if not is_finite(part.scores):
        raise BaselineError(
            f"the model's outputs on the {windows.name} windows are NaN or inf before any change: "
            "a broken model cannot be a baseline, load sound weights"
        )
    return keep(part.kind, part.scores, part.window, budget_bytes)


def _num_rows(batch: Mapping[str, torch.Tensor]) -> int:
    first = next(iter(batch.values()))
    return first.shape[0] if first.ndim else 1


def _require_same_form(bases: tuple[BaseScores, ...], parts: tuple[_Part, ...]) -> None:
    then = [(base.kind, len(base.window), base.width) for base in bases]
    now = [(part.kind, *part.scores.shape) for part in parts]
    if then != now:
        raise InputError(
            f"the model's outputs are now {now} and were {then} at baseline (kind, tokens, width): "
            "they cannot be compared, capture a new baseline"
        )


def _reading(windows: Windows, kind: str, tallies: tuple[Tally, ...]) -> DivergenceReading:
    main = tallies[0]
    finite = all(tally.finite for tally in tallies)
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
