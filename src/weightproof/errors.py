"""The errors a user of weightproof can meet: one base class and a few children.

Every message says what happened, to which tensor or file, and what to do about it.
"""


class WeightproofError(Exception):
    """Base of every error that weightproof raises on purpose."""


class InputError(WeightproofError, ValueError):
    """An argument, file or folder given by the user cannot be used."""


class PolicyError(InputError):
    """A policy names an unknown key, tier or value."""


class BaselineError(WeightproofError):
    """A baseline cannot be captured, read, or belongs to another model."""


class SnapshotError(WeightproofError):
    """A snapshot could not be taken (for example: no room for it). The model is untouched."""


class RestoreError(WeightproofError):
    """A restore could not be proven exact: the model must not be used (the decision is HALT)."""


class EditRejectedError(WeightproofError):
    """Raised on request (`on_violation="raise"`) after a rejected edit was rolled back."""
