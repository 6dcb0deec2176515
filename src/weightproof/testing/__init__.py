"""Drills: faults to inject into training, so that a guard can be seen to work before it is needed.

    >>> from weightproof.testing import faults, inject
    >>> with inject([faults.WeightBitFlip(at=30)], model, optimizer):        # doctest: +SKIP
    ...     train(model, optimizer)                                          # doctest: +SKIP

`weightproof drill MODEL_FOLDER` runs all of them on a copy of a model and prints what the guard did.
None of these belongs into a run that anyone needs: faults write weights, gradients and moments.

`check_guard` and `check_edit` hold plug-ins to the rules that our own guards and edits keep to.
"""

from weightproof.testing import faults
from weightproof.testing.conformance import SmallModel, check_edit, check_guard
from weightproof.testing.injection import Fired, Injection, inject

__all__ = ["Fired", "Injection", "SmallModel", "check_edit", "check_guard", "faults", "inject"]
