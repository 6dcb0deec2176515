"""Words and numbers of a report: what a stranger reads for an action, a statistic, a value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MINUS, TIMES, DASH = "\u2212", "\u00d7", "\u2013"
_SUPERSCRIPT = str.maketrans("0123456789-", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b")

ASSURANCE: Mapping[str, str] = {
    "loss": "The loss was measured before and after, on the same data: the strongest evidence there is here.",
    "outputs-only": (
        "Outputs were compared before and after. No loss was measured: this is evidence of sameness, not of quality."
    ),
    "weights-only": "Only the weights were read. Nothing was computed with the model: this is weak evidence.",
    "none": "Nothing that could carry a decision was measured.",
}

OUTCOMES: Mapping[str, str] = {
    "PASS": "pass",
    "WARN": "warning",
    "FAIL": "fail",
    "NOT_MEASURED": "not measured",
}

GUARDS: Mapping[str, str] = {
    "invariants": "exact facts about every tensor, and what the change declared itself to be",
    "spectral": "norms and rank of each weight matrix",
    "rmt": "learned structure above the random-matrix noise",
    "circuits": "products of matrices that symmetries cannot move",
    "curvature": "loss change foreseen from the curvature of each matrix; advice, it decides nothing",
    "subspace": "directions that came with a merge or with steering; advice, it decides nothing",
    "health": "training health: scale of the residual stream, gradients, use of the blocks",
    "variance": "size of what each block contributes",
    "divergence": "distance of the outputs from the baseline\u2019s",
    "loss": "loss before and after on the same data",
}

STATISTICS: Mapping[str, str] = {
    "harm_upper_bound": "how much worse at most (upper end of the interval)",
    "harm_lower_bound": "how much worse at least (lower end of the interval)",
    "relative_distance": "distance of the circuits\u2019 spectra",
    "log_size_ratio": "size of the circuits, log ratio",
    "kl": "distance of the outputs (KL, nats per token)",
    "predicted_loss_change": "loss change foreseen from curvature (nats per token)",
    "num_intruder_dimensions": "leading directions that were not there before",
    "least_direction_cosine": "least agreement of a leading direction with those before",
    "stored_direction_cosine": "how far the change writes into a stored direction",
    "kl_max": "largest distance at one token (KL, nats)",
    "top1_flip_rate": "share of tokens with another first choice",
    "hidden_error": "relative change of the last hidden state",
    "num_nonfinite": "elements that are NaN or infinite",
    "num_structural_changes": "changes of structure",
    "num_changed_tensors": "changed tensors",
    "num_stray_tensors": "tensors changed outside of the guard",
    "log_spectral_norm_ratio": "largest singular value, log ratio",
    "log_stable_rank_ratio": "stable rank, log ratio",
    "log_norm_collapse_ratio": "weakest row or column, log ratio",
    "log_growth_ratio": "largest singular value over the noise edge, log ratio",
    "log_second_moment_ratio": "mean square of the contribution, log ratio",
    "num_spikes_gained": "singular values that rose above the noise",
    "num_spikes_lost": "singular values lost to the noise",
    "num_spikes": "singular values above the noise",
    "contract_relative_error": "relative error of the rounding",
    "contract_error_over_half_step": "error in units of half a rounding step",
    "contract_levels_per_group": "different values per scale group",
    "contract_sign_flip_fraction": "share of flipped signs",
    "became_zero": "matrices that became zero",
    "loss_peak": "largest raw loss of a step",
    "norm_peak": "largest gradient norm of a step",
    "rate_peak": "largest learning rate of a step",
    "moment_growth": "largest growth of an optimizer moment, times the usual",
    "weight_move": "largest change of a matrix, times the usual",
    "gain_move": "largest change of a gain or bias, times the usual",
    "slowest_step": "seconds of the slowest step",
}

APPLIED: Mapping[str, str] = {
    "kept": "kept",
    "restored": "taken back",
    "not restored": "could not be taken back",
    "rejected": "rejected",
}


def number(value: Any, digits: int = 3) -> str:
    """A value as it is typeset: three digits, powers of ten for what is very small or large.

    Example:
        >>> number(6.96e-06), number(-0.296), number(198), number(None), number("NaN")
        ('6.96\u00d710\u207b\u2076', '\u22120.296', '198', '\u2013', 'NaN')
    """
    if value is None:
        return DASH
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {"Infinity": "\u221e", "-Infinity": f"{MINUS}\u221e"}.get(str(value), str(value))
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("\u221e" if value > 0 else f"{MINUS}\u221e")
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return f"{int(value):,}".replace("-", MINUS).replace(",", "\u202f")
    if not 1e-4 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}{TIMES}10{str(int(exponent)).translate(_SUPERSCRIPT)}".replace("-", MINUS)
    return f"{value:.{digits}g}".replace("-", MINUS)


def percent(value: float, digits: int = 2) -> str:
    """A fraction in per cent, with sign kept by a true minus.

    Example:
        >>> percent(0.0123), percent(-0.5), percent(0.00001)
        ('1.2\u202f%', '\u221250\u202f%', '0.001\u202f%')
    """
    shown = 100 * value
    text = f"{shown:.0f}" if abs(shown) >= 99.5 else f"{shown:.{digits}g}"
    if "e" in text:
        text = f"{shown:.6f}".rstrip("0").rstrip(".") or "0"
    return f"{text}\u202f%".replace("-", MINUS)


def seconds(value: Any) -> str:
    """A duration for people.

    Example:
        >>> seconds(0.0042), seconds(12.34), seconds(754)
        ('4 ms', '12.3 s', '12 min 34 s')
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return DASH
    if value < 1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.1f} s" if value < 100 else f"{int(value) // 60} min {int(value) % 60} s"


def size(value: Any) -> str:
    """A number of bytes for people.

    Example:
        >>> size(14558464), size(900)
        ('13.9 MiB', '900 B')
    """
    if not isinstance(value, int | float):
        return DASH
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:.0f} B"


def date(text: Any) -> str:
    """`2026-01-31T10:20:30+00:00` as `2026-01-31 10:20 UTC`; any other text as it is."""
    plain = str(text)
    return f"{plain[:10]} {plain[11:16]} UTC" if plain.endswith("+00:00") and len(plain) >= 19 else plain


def statistic(name: str) -> str:
    """What a statistic is, in words; its own name where there are none."""
    return STATISTICS.get(name, name.replace("_", " "))


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """`1 matrix`, `3 matrices`."""
    return f"{number(count)} {noun if count == 1 else (nouns or noun + 's')}"
