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


class CollectiveError(WeightproofError):
    """The ranks of a run could not do something together; every rank that still runs gets this error.

    Attributes:
        operation: what the ranks were about to do or doing.
        ranks: the ranks at fault (failed, missing, silent); empty where that cannot be told.
        timed_out: whether the ranks at fault did not come within the time limit.
    """

    def __init__(
        self, message: str, *, operation: str = "", ranks: tuple[int, ...] = (), timed_out: bool = False
    ) -> None:
        super().__init__(message)
        self.operation = operation
        self.ranks = ranks
        self.timed_out = timed_out
