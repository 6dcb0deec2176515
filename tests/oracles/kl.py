"""Slow, obvious float64 Kullback-Leibler divergence from logits, one token at a time."""

from __future__ import annotations

import math

import numpy as np


def softmax(logits: np.ndarray) -> list[float]:
    """Probabilities of one token's logits."""
    top = float(max(logits))
    weights = [math.exp(float(x) - top) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def kl(base: list[float], now: list[float]) -> float:
    """Sum p log(p / q) of two distributions; entries with p = 0 add nothing."""
    return math.fsum(p * math.log(p / q) for p, q in zip(base, now, strict=True) if p > 0.0)


def bucketed(probabilities: list[float], kept: list[int]) -> list[float]:
    """The kept entries, then everything else in one bucket."""
    rest = math.fsum(p for i, p in enumerate(probabilities) if i not in set(kept))
    return [probabilities[i] for i in kept] + [rest]


def mean_kl(base_logits: np.ndarray, now_logits: np.ndarray) -> float:
    """Nats per token over (n, width) logits."""
    pairs = zip(base_logits, now_logits, strict=True)
    return math.fsum(kl(softmax(b), softmax(n)) for b, n in pairs) / len(base_logits)


def mean_bucketed_kl(base_logits: np.ndarray, now_logits: np.ndarray, k: int) -> float:
    """The same with the base's k likeliest entries and one bucket."""
    total = []
    for b, n in zip(base_logits, now_logits, strict=True):
        p, q = softmax(b), softmax(n)
        kept = sorted(range(len(p)), key=lambda i: -p[i])[:k]
        total.append(kl(bucketed(p, kept), bucketed(q, kept)))
    return math.fsum(total) / len(total)
