"""Calibration: limits fitted on random benign edits, with a stated level of false alarms, and where they come from.

    >>> from weightproof.calibration import calibrate, save
    >>> found = calibrate(model, retain="text.jsonl", tier="balanced")  # doctest: +SKIP
    >>> save(found, Path("mine.yaml"))                                  # doctest: +SKIP
    >>> GuardSession(model, policy="mine.yaml")                         # doctest: +SKIP

- `drawing` is the distribution of edits, `value_edits` and `preserving_edits` make them;
- `measuring` carries one out, reads what each limit is compared with, and the truth on data that no guard sees;
- `conformal` says how many draws a promise needs, `fitting` turns draws into limits and judges them on other draws;
- `calibrating` is the whole of it, `journal` keeps what was drawn, `output` writes the policy and the draws.
"""

from __future__ import annotations

from weightproof.calibration.calibrating import Calibration, Provenance, calibrate, default_draws, refit
from weightproof.calibration.fitting import Fit, fit
from weightproof.calibration.output import save

__all__ = ["Calibration", "Fit", "Provenance", "calibrate", "default_draws", "fit", "refit", "save"]
