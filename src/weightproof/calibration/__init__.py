"""Calibration: limits fitted on random benign edits, with a stated level of false alarms, and where they come from.

    >>> from weightproof.calibration import calibrate                                    # doctest: +SKIP
    >>> found = calibrate(model, retain="text.jsonl", tier="balanced", output="mine.yaml")  # doctest: +SKIP
    >>> GuardSession(model, policy="mine.yaml")                                          # doctest: +SKIP

- `drawing` is the distribution of edits, `value_edits` and `preserving_edits` make them;
- `measuring` carries one out, reads what each limit is compared with, and the truth on data that no guard sees;
- `conformal` says how many draws a promise needs, `fitting` turns draws into limits and judges them on other draws;
- `output` writes the policy and the draws.
"""
