"""Merge an adapter into the weights: s B A, computed in float32 or better and rounded once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weightproof import kinds
from weightproof.edits.selection import Selection
from weightproof.errors import InputError
from weightproof.lora.adapters import Adapter, AdapterDelta, is_adapted, read_adapter, require_fits
from weightproof.types import WeightMatrix


@dataclass(frozen=True, eq=False)
class LoraMerge(Selection):
    """W + s B A for every matrix that an adapter changes; rsLoRA, DoRA, biases and `modules_to_save` with it.

    The sum is made in float32 (float64 for float64 weights) and rounded once to the storage dtype, where PEFT rounds
    the delta of factors in half precision first and then the sum. DoRA scales every row of W + s B A to its magnitude.
    Embeddings, heads and stacks of experts that the adapter changes are merged too: nothing of it is left out unless
    `exclude` says so.

    Attributes:
        adapter: A folder that PEFT wrote, a live model with LoRA layers, or an `Adapter`.
        adapter_name: Which of several.
        same_base: False: merge into other weights of the same shapes, too.
        include: Globs on names or families, over every tensor of the adapter.
        exclude: Globs that win over `include`.

    Raises:
        InputError: If the adapter cannot be read.

    Example:
        >>> delta = AdapterDelta("0.weight", torch.ones(1, 3), torch.ones(2, 1), scaling=2.0)
        >>> LoraMerge(Adapter({"0.weight": delta})).name
        'lora-merge'
    """

    adapter: Adapter | Path | str | nn.Module
    adapter_name: str = "default"
    same_base: bool = True
    content: Adapter = field(init=False, repr=False)

    FAMILIES: ClassVar[tuple[str, ...] | None] = None
    touches_vectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Read the adapter."""
        super().__post_init__()
        given = self.adapter
        content = given if isinstance(given, Adapter) else read_adapter(given, self.adapter_name)
        object.__setattr__(self, "content", content)

    @property
    def name(self) -> str:
        """`lora-merge`, with the adapter's name where it is not the default one."""
        return "lora-merge" if self.adapter_name == "default" else f"lora-merge-{self.adapter_name}"

    @property
    def kind(self) -> kinds.LoraMerge:
        """The contract: every matrix grew by its delta, once, within the rounding of its dtype."""
        return kinds.LoraMerge(self.content, same_base=self.same_base)

    def params(self) -> dict[str, Any]:
        """What was merged, ready for JSON."""
        own = {"adapter": self.content.source, "adapter_name": self.adapter_name, "digest": self.content.digest}
        return {**own, "same_base": self.same_base, **self.selection_params()}

    def prepare(self, session: Any) -> LoraMerge:
        """This edit, if its adapter belongs to the model.

        Raises:
            InputError: It was trained on another base, or the model applies LoRA layers already.
        """
        if is_adapted(session.model):
            raise InputError(
                "the model has live LoRA layers, which would be applied on top of what is merged: merge into the base "
                "model, or call merge_and_unload inside session.edit(name, kind=kinds.LoraMerge(model))"
            )
        require_fits(self.content, session.model, same_base=self.same_base)
        return self

    def light(self) -> LoraMerge:
        """This edit without the live model that its adapter was read from."""
        return self.knowing(adapter=self.content)

    def concerns(self, matrix: WeightMatrix) -> bool:
        """Whether the adapter changes this matrix."""
        return self._named(matrix) is not None

    def _named(self, matrix: WeightMatrix) -> str | None:
        """Under which of its names the adapter changes a matrix or vector."""
        known = {*self.content.deltas, *self.content.replaced, *self.content.biases}
        names = (matrix.name, matrix.tensor_name, *matrix.tied_names)
        return next((name for name in names if name in known), None)

    def plan(self, matrix: WeightMatrix, context: object = None) -> Tensor | None:
        """The merged values (d_out, d_in) in the storage dtype; None where the adapter changes nothing. Pure."""
        name = self._named(matrix) if self.selects(matrix) else None
        if name is None:
            return None
        before = matrix.load()
        work = before.to(torch.float64 if before.dtype == torch.float64 else torch.float32)
        if (stored := self.content.replaced.get(name)) is not None:
            work = (stored if matrix.select is None else matrix.select(stored)).to(work)
        if name in self.content.biases:
            work = work + self.content.biases[name].reshape(-1, 1).to(work)
        if name in self.content.deltas:
            work = work + _beside(self.content.deltas[name], work).dense(work)
        return work.to(before.dtype, copy=True)


def _beside(delta: AdapterDelta, work: Tensor) -> AdapterDelta:
    """A delta on the device of the weights, whose products are made in float64 where those are stored so."""
    dtype = torch.float64 if work.dtype == torch.float64 else None
    return replace(delta, a=delta.a.to(work.device, dtype), b=delta.b.to(work.device, dtype))
