"""The nouns of a guarded change: the step, the state it can be taken back to, and what guarding cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from weightproof.judgement.judging import Judged
from weightproof.kinds import Kind
from weightproof.snapshot import Snapshot
from weightproof.types import Decision, DivergenceReading, EditRecord, LossReading, Verdict


class MasterWeights(Protocol):
    """Copies of the weights from which an optimizer rewrites the model at its next step (DeepSpeed ZeRO)."""

    def tensors(self) -> Mapping[str, Tensor]:
        """This process's part of the copies, by a stable name; kept and restored with every snapshot."""
        ...

    def refresh(self, names: Collection[str]) -> None:
        """Write the present weights of these tensors into the copies."""
        ...

    def stale(self) -> Collection[str]:
        """Names of the weights that the optimizer's next step would undo: their copies hold something else."""
        ...


@dataclass
class Cost:
    """What guarding cost so far: seconds of wall time, bytes held beside the model."""

    baseline_seconds: float = 0.0
    check_seconds: float = 0.0
    snapshot_seconds: float = 0.0
    checks: int = 0
    snapshot_bytes: int = 0
    baseline_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Total wall time spent guarding."""
        return self.baseline_seconds + self.check_seconds + self.snapshot_seconds


@dataclass(frozen=True)
class SafePoint:
    """A state to which the model can be taken back, and the digest of what it computed there."""

    snapshot: Snapshot
    forward: str | None

    def put_back(self) -> None:
        """Restore the snapshot; one interrupt does not leave the model half restored."""
        try:
            self.snapshot.restore()
        except KeyboardInterrupt:
            self.snapshot.restore()
            raise


class Step:
    """One guarded change: filled in when its block ends.

    Attributes:
        name: The edit's name.
        step: Its number: the global step in training, else a count of edits.
        kind: What the edit declared itself to be, or what was found that it is where it declared nothing.
        declared: Whether a kind was declared.
        decision: What the policy says (`.action` KEEP, ROLLBACK or HALT); None until judged.
        applied: What was done: "kept" or "restored".
        record: What changed, by declaration and by measurement.
        seconds: Wall time of measurement and judgement.
        judged: The readings that the decision was made from; a session keeps those of its newest steps.
        divergence: Outputs of the changed model against those of the baseline.
        losses: Losses before and after.
        edit: The edit of `session.apply` after it saw the model (a pruning knows its masks); None for a block of code.
        spectra: Sketches of the spectra of the most changed matrices (`spectrum_sketch`); only for the eye.
    """

    def __init__(self, name: str, step: int, kind: Kind) -> None:
        self.name = name
        self.step = step
        self.kind = kind
        self.declared = True
        self.decision: Decision | None = None
        self.applied: str | None = None
        self.record: EditRecord | None = None
        self.seconds = 0.0
        self.monitor = False
        self.planned: dict[str, str] = {}
        self.left_alone: frozenset[str] = frozenset()
        self.edit: Any = None
        self.judged: Judged | None = None
        self.divergence: tuple[DivergenceReading, ...] = ()
        self.losses: tuple[LossReading, ...] = ()
        self.spectra: tuple[Mapping[str, Any], ...] = ()

    def settle(self, decision: Decision, judged: Judged) -> None:
        """Fill in what was decided, and from what."""
        self.decision, self.judged = decision, judged
        self.record, self.divergence, self.losses = judged.after.edit, judged.after.divergence, judged.after.losses

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The verdict of each guard; empty until judged."""
        return self.decision.verdicts if self.decision else ()

    def __repr__(self) -> str:
        """Name, number, action and what was done."""
        action = self.decision.action if self.decision else "not judged"
        return f"Step({self.name!r}, step={self.step}, {action}, {self.applied})"
