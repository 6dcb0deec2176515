"""What a recipe hands to whatever trains, and gets back: the library itself knows no trainer.

A trainer is a plug-in of the group `weightproof.trainers`: a frozen dataclass whose fields are its parameters, with

- `changes_weights`: whether the model's own weights are trained (False: an adapter beside them);
- `train(job)`: trains under guard and gives a `Trained`. The model comes back in the classes it came in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn

    from weightproof.policy import Policy
    from weightproof.transactions.steps import Step

__all__ = ["Trained", "Trainer", "TrainingJob"]


@dataclass(frozen=True)
class TrainingJob:
    """One training step of a recipe.

    Attributes:
        name: Of the step.
        model: As it is now, in eval mode.
        encode: Text -> token ids; None where the model's folder holds no tokenizer.
        text: What to train on: .txt or .jsonl.
        policy: What the guard asks for.
        guard: Further arguments of the guard, such as `every`.
        retain: Data on which the model must not get worse, as `GuardSession(retain=)` takes it.
        folder: For evidence, and for what the training makes beside the weights; it exists.
        progress: Whether somebody watches a terminal.
    """

    name: str
    model: nn.Module
    encode: Callable[[str], list[int]] | None
    text: Path
    policy: Policy
    guard: Mapping[str, Any]
    retain: Any
    folder: Path
    progress: bool = False


@dataclass(frozen=True)
class Trained:
    """How a training ended.

    Attributes:
        history: Its judged steps: windows of training and the edits of a schedule.
        steps: Optimizer steps taken.
        halted: Why it was ended before its time; None where it was not.
        adapter: Folder of the adapter that was trained beside the weights, if one was.
        notes: What a reader should know, in sentences.
    """

    history: Sequence[Step]
    steps: int
    halted: str | None = None
    adapter: Path | None = None
    notes: tuple[str, ...] = field(default=())


class Trainer(Protocol):
    """See the module's docstring."""

    @property
    def changes_weights(self) -> bool:
        """Whether the model's own weights are trained."""
        ...

    def train(self, job: TrainingJob) -> Trained:
        """Train under guard."""
        ...
