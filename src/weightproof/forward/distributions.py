"""How far outputs moved: Kullback-Leibler divergence per token, flips, relative change. Pure arrays.

Base log-probabilities are kept in float32, in full or as the k likeliest entries plus one bucket
for the rest. Merging entries into a bucket can only lower KL (data processing inequality, Cover
and Thomas, Elements of Information Theory, 2.8), so the second form is a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

_CPU_CHUNK_BYTES = 4 * 2**20
_DEVICE_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class BaseScores:
    """The outputs of one batch before any change, on the CPU, for n scored tokens.

    Attributes:
        kind: "logits", "hidden" or "values".
        width: Size of the last axis of the model's output.
        window: (n,) int32, which window a token belongs to.
        values: (n, width) float32: log-probabilities, normalised hidden states or raw values;
            (n, k) log-probabilities when only the likeliest k are kept.
        indices: (n, k) int32, which entries `values` holds; None when it holds all.
        rest: (n,) float32, log-probability of all other entries together; None with `indices`.
        top: (n,) int32 likeliest entry; None unless logits.
    """

    kind: str
    width: int
    window: torch.Tensor
    values: torch.Tensor
    indices: torch.Tensor | None = None
    rest: torch.Tensor | None = None
    top: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory held."""
        parts = (self.window, self.values, self.indices, self.rest, self.top)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


@dataclass
class Tally:
    """Sums over tokens: KL and tokens per window, flips, squared change and size of hidden states."""

    kl: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    flips: int = 0
    squares: tuple[float, float] = (0.0, 0.0)
    finite: bool = True

    @property
    def num_tokens(self) -> int:
        """Scored tokens so far."""
        return sum(self.tokens.values())

    @property
    def mean_kl(self) -> float:
        """Nats per token over everything."""
        return sum(self.kl.values()) / self.num_tokens

    @property
    def max_kl(self) -> float:
        """Nats per token in the window where it is largest."""
        return max(self.kl[window] / count for window, count in self.tokens.items())

    @property
    def relative_change(self) -> float:
        """||now - base|| / ||base||; 1 when the base was all zero and is not any more."""
        change, size = self.squares
        return math.sqrt(change / size) if size else float(change > 0.0)


def merged(tallies: Iterable[Tally]) -> Tally:
    """The sums over all batches, in their order; the windows are numbered through."""
    whole = Tally()
    for tally in tallies:
        offset = 1 + max(whole.tokens, default=-1)
        whole.tokens.update({offset + window: count for window, count in tally.tokens.items()})
        whole.kl.update({offset + window: kl for window, kl in tally.kl.items()})
        whole.flips += tally.flips
        whole.squares = (whole.squares[0] + tally.squares[0], whole.squares[1] + tally.squares[1])
        whole.finite = whole.finite and tally.finite
    return whole


def is_finite(scores: torch.Tensor) -> bool:
    """False with NaN or +inf anywhere; -inf is an entry that the model rules out."""
    return not bool((torch.isnan(scores) | torch.isposinf(scores)).any())


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Log softmax over the last axis, computed in float64, rounded to float32, returned as float64.

    Rounding on both sides makes KL exactly 0 when nothing changed.
    """
    return torch.log_softmax(logits.double(), dim=-1).float().double()


def kl_terms(base: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Terms p log(p / q) - p + q of KL(p || q) from log-probabilities base = log p, now = log q.

    For normalised p and q the extra parts cancel in the sum, each term is >= 0, and rounding of the
    logarithms enters in second order only: with d = log p - log q a term is p (d + exp(-d) - 1).

    Args:
        base: (..., k) float64.
        now: (..., k) float64.
    """
    d = base - now
    terms = base.exp() * (d + torch.expm1(-d.clamp(min=-600.0)))
    ruled_out = d < -600.0  # p vanishes beside q
    if bool(ruled_out.any()):
        terms = torch.where(ruled_out, now.exp(), terms)
    both = torch.isneginf(base) & torch.isneginf(now)
    return terms.masked_fill(both, 0.0) if bool(both.any()) else terms


def bucket_rest(log_probs: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Log of the total probability outside `indices`; (n,) from (n, width) and (n, k)."""
    return log_probs.scatter(-1, indices, -torch.inf).logsumexp(dim=-1).float().double()


def normalise(hidden: torch.Tensor) -> torch.Tensor:
    """Each token to mean 0 and variance 1 over the last axis, float32: what a final norm lets through."""
    values = hidden.double()
    centred = values - values.mean(dim=-1, keepdim=True)
    return (centred / centred.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-30)).float()


def keep(kind: str, scores: torch.Tensor, window: torch.Tensor, budget_bytes: float) -> BaseScores:
    """Keep the base scores (n, width) of n tokens, in at most `budget_bytes` where they are logits."""
    n, width = scores.shape
    window = window.to("cpu", torch.int32)
    if kind != "logits":
        values = normalise(scores) if kind == "hidden" else scores.float()
        return BaseScores(kind, width, window, values.cpu())
    if 4 * n * width <= budget_bytes:
        parts = [log_probabilities(scores[rows]).float() for rows in _chunks(scores)]
        tops = [part.argmax(dim=-1).to("cpu", torch.int32) for part in parts]
        return BaseScores(kind, width, window, torch.cat([p.cpu() for p in parts]), top=torch.cat(tops))
    k = max(1, min(width - 1, int((budget_bytes / max(1, n) - 12) // 8)))
    values, indices, rests, tops = [], [], [], []
    for rows in _chunks(scores):
        log_probs = log_probabilities(scores[rows])
        top_values, top_indices = log_probs.topk(k, dim=-1)
        values.append(top_values.float().cpu())
        indices.append(top_indices.to("cpu", torch.int32))
        rests.append(bucket_rest(log_probs, top_indices).float().cpu())
        tops.append(log_probs.argmax(dim=-1).to("cpu", torch.int32))
    return BaseScores(
        kind, width, window, torch.cat(values), indices=torch.cat(indices), rest=torch.cat(rests), top=torch.cat(tops)
    )


def compare(base: BaseScores, scores: torch.Tensor, tally: Tally) -> None:
    """Add the change from `base` to the scores (n, width) of the same tokens now to `tally`."""
    for window, count in enumerate(torch.bincount(base.window).tolist()):
        if count:
            tally.tokens[window] = tally.tokens.get(window, 0) + int(count)
            tally.kl.setdefault(window, 0.0)
    if not is_finite(scores):
        tally.finite = False
        return
    if base.kind != "logits":
        now = normalise(scores) if base.kind == "hidden" else scores.float()
        kept = base.values.to(now.device)
        change, size = (float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 for x in (now - kept, kept))
        tally.squares = (tally.squares[0] + change, tally.squares[1] + size)
        return
    for rows in _chunks(scores):
        kl, flipped = _divergence(base, scores[rows], rows)
        if not bool(torch.isfinite(kl).all()):
            tally.finite = False
            return
        per_window = torch.bincount(base.window[rows], weights=kl.cpu())
        for window in base.window[rows].unique().tolist():
            tally.kl[window] += float(per_window[window])
        tally.flips += flipped


def _divergence(base: BaseScores, scores: torch.Tensor, rows: slice) -> tuple[torch.Tensor, int]:
    now = log_probabilities(scores)
    kept = base.values[rows].to(now.device, torch.float64)
    top = base.top[rows].to(now.device) if base.top is not None else now.argmax(dim=-1)
    flipped = int(now.argmax(dim=-1).ne(top).sum())
    if base.indices is None or base.rest is None:
        return kl_terms(kept, now).sum(dim=-1), flipped
    indices = base.indices[rows].to(now.device, torch.int64)
    rest = base.rest[rows].to(now.device, torch.float64)
    return kl_terms(kept, now.gather(-1, indices)).sum(dim=-1) + kl_terms(rest, bucket_rest(now, indices)), flipped


def _chunks(scores: torch.Tensor) -> Iterator[slice]:
    """Slices of tokens small enough that float64 copies stay in the cache (on the CPU)."""
    limit = _CPU_CHUNK_BYTES if scores.device.type == "cpu" else _DEVICE_CHUNK_BYTES
    step = max(1, limit // (8 * scores.shape[-1]))
    for start in range(0, scores.shape[0], step):
        yield slice(start, min(start + step, scores.shape[0]))
