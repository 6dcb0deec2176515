"""What a recipe led to, step by step, and the exit code of a program that ran it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightproof.edits.mixed import QuantizeEach
from weightproof.folders.jsonable import to_jsonable
from weightproof.kinds import Quantize
from weightproof.transactions.steps import Step
from weightproof.types import Action, WeightMatrix
from weightproof.weights import iter_tensors, iter_weight_matrices

if TYPE_CHECKING:
    from torch import nn

KEPT, UNEXPECTED = 0, 1
NOT_RUN = "not run"
# A scale of a group is stored in half precision.
_SCALE_BITS = 16


@dataclass(frozen=True)
class StepResult:
    """One row of the table.

    Attributes:
        name: Of the step.
        verb: edit, external, train or plan.
        expect: What the recipe expects.
        action: KEEP, ROLLBACK or HALT, or "not run".
        reason: Why, in a sentence.
        situation: Of the policy's table.
        assurance: What the decision rests on.
        kl: Largest KL divergence of a set of windows, nats per token; None where none was measured.
        loss_ratio: Perplexity on the retain data over that before the first step since training, None likewise.
        size: Bytes of the weights at their declared widths.
        model: Folder of the model, relative to the results; None where none was written.
        certificate: Digest of that folder's own certificate.
        certified: What that certificate decides, from the files alone.
        reverted: Tensors that were taken back from an edit that was kept in part.
        windows: Judged steps inside a training.
        seconds: Wall time.
        notes: What a reader should know.
    """

    name: str
    verb: str
    expect: str
    action: str
    reason: str = ""
    situation: str = ""
    assurance: str = ""
    kl: float | None = None
    loss_ratio: float | None = None
    size: int | None = None
    model: str | None = None
    certificate: str | None = None
    certified: str | None = None
    reverted: tuple[str, ...] = ()
    windows: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def as_expected(self) -> bool:
        """Whether it ended as the recipe expects, and the files say the same."""
        fits = self.action == self.expect or (self.expect == "any" and self.action in ("KEEP", "ROLLBACK"))
        return fits and self.certified in (None, "KEEP")


@dataclass(frozen=True)
class RecipeResult:
    """A recipe that was run.

    Attributes:
        recipe: Its name.
        out: Folder of the results.
        steps: One row each, in order.
        base: Folder of the model that it began with.
        base_size: Bytes of its weights.
        model: Folder of the last model that was kept and written; None where none was.
        texts: Files of the data by role.
        notes: What a reader should know.
    """

    recipe: str
    out: Path
    steps: tuple[StepResult, ...]
    base: Path
    base_size: int
    model: Path | None
    texts: Mapping[str, Path] = field(default_factory=dict[str, Path])
    notes: tuple[str, ...] = ()

    @property
    def code(self) -> int:
        """0: every step ended as the recipe expects; 1: one did not."""
        return KEPT if all(step.as_expected for step in self.steps) else UNEXPECTED

    def to_json(self) -> dict[str, Any]:
        """Everything but paths outside the results, ready for JSON."""
        rows = [{**to_jsonable(step), "as_expected": step.as_expected} for step in self.steps]
        return {
            "recipe": self.recipe,
            "code": self.code,
            "base_size": self.base_size,
            "model": None if self.model is None else self.model.name,
            "steps": rows,
            "notes": list(self.notes),
        }


def row_of(step: Step, **fields: Any) -> StepResult:
    """The row of a judged step of a session."""
    decision = step.decision
    assert decision is not None
    found = [one.kl for one in step.divergence if one.kl is not None]
    reverted = step.record.reverted if step.record is not None else ()
    return StepResult(
        action=str(decision.action),
        reason=decision.reason,
        situation=decision.situation,
        assurance=str(decision.assurance),
        kl=max(found, default=None),
        loss_ratio=loss_ratio(step),
        reverted=tuple(reverted) if decision.action is Action.KEEP else (),
        seconds=round(step.seconds, 3),
        **fields,
    )


def loss_ratio(step: Step) -> float | None:
    """Perplexity after over before on the retain data; None where it was not measured."""
    for loss in step.losses:
        if loss.role == "retain" and loss.metric == "nll" and loss.difference is not None:
            return math.exp(min(loss.difference, 700.0))
    return None


class Sizes:
    """Bytes of a model's weights at the widths that its edits declared: simulated quantization writes the same files.

    Of a quantized matrix: bits, and a scale in half precision for each group. Everything else as the model stores it,
    what a quantizer packed too.
    """

    def __init__(self, model: nn.Module) -> None:
        plain = [one for one in iter_weight_matrices(model) if one.storage is None]
        self._stored = {one.name: one.d_out * one.d_in * one.dtype.itemsize for one in plain}
        self._now = dict(self._stored)
        total = sum(named.tensor.nbytes for named in iter_tensors(model) if named.persistent or named.part_of)
        self._others = total - sum(self._stored.values())

    @property
    def bytes(self) -> int:
        """Of the present state."""
        return self._others + sum(self._now.values())

    def quantized(self, matrices: Iterable[WeightMatrix], kind: object, left: Iterable[str] = ()) -> None:
        """An edit of this kind was kept on these matrices, but for those of the tensors `left`."""
        if not isinstance(kind, Quantize):
            return
        untouched = set(left)
        for one in matrices:
            has_width = not isinstance(kind, QuantizeEach) or one.name in kind.widths
            if has_width and one.name in self._now and one.tensor_name not in untouched:
                self._now[one.name] = -(-_bits_of(one, kind) // 8)

    def as_stored(self) -> None:
        """Training moved the weights off every grid."""
        self._now = dict(self._stored)


def _bits_of(matrix: WeightMatrix, kind: Quantize) -> int:
    groups = {"tensor": 1, "channel": matrix.d_out}.get(kind.granularity)
    if groups is None:
        groups = matrix.d_out * -(-matrix.d_in // (kind.group_size or matrix.d_in))
    bits = kind.widths[matrix.name] if isinstance(kind, QuantizeEach) else kind.bits
    return matrix.d_out * matrix.d_in * bits + groups * _SCALE_BITS
