"""Steps that go wrong: the learning rate, the batch, numbers that leave their range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weightproof.errors import InputError
from weightproof.testing.faults.fault import Fault
from weightproof.testing.injection import Injection
from weightproof.testing.tampering import overwrite


@dataclass(frozen=True, kw_only=True)
class LearningRateSpike(Fault):
    """The learning rate is many times what it should be, for some steps."""

    name: ClassVar[str] = "learning-rate"
    hits: ClassVar[str] = "the learning rate"
    weaker: ClassVar[Mapping[str, Any] | None] = {"factor": 1.5, "steps": 1}
    factor: float = 100.0
    steps: int = 5

    def before_step(self, run: Injection) -> None:
        """Raise it for this step only: a schedule computes from what it was."""
        held = [(group, group["lr"]) for group in run.optimizer.param_groups]
        for group, rate in held:
            group["lr"] = rate * self.factor
        run.held[self] = held
        run.note(self, f"learning rate x{self.factor:g}")

    def after_step(self, run: Injection) -> None:
        """Put it back."""
        self.let_go(run)

    def let_go(self, run: Injection) -> None:
        """Put it back, also where the step raised."""
        for group, rate in run.held.pop(self, ()):
            group["lr"] = rate


@dataclass(frozen=True, kw_only=True)
class BadBatch(Fault):
    """Token ids and labels of a batch are replaced by random ones (of other inputs: noise of their own spread)."""

    name: ClassVar[str] = "bad-batch"
    hits: ClassVar[str] = "the batch"
    weaker: ClassVar[Mapping[str, Any] | None] = {"share": 0.2, "steps": 1}
    share: float = 1.0
    steps: int = 14
    vocabulary: int | None = None

    def forward(
        self, run: Injection, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """New tensors: the loader's own are left as they are."""
        # Ranks draw numbers of their own: equal batches on all of them are a fault of another kind.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + run.step + 7919 * run.rank)
        size = self.vocabulary or _vocabulary(run.model)

        def spoiled(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() < 2:
                return value
            hit = torch.rand(value.shape, generator=generator) < self.share
            if value.is_floating_point():
                drawn = value.float().std().cpu() * torch.randn(value.shape, generator=generator)
            else:
                top = size or int(value.max()) + 1
                drawn = torch.randint(top, value.shape, generator=generator)
            return torch.where(hit.to(value.device), drawn.to(value.device, value.dtype), value)

        run.note(self, f"{self.share:.0%} of the batch is random")
        masks = ("attention_mask", "position_ids", "token_type_ids")
        kept = {key: value if key in masks else spoiled(value) for key, value in kwargs.items()}
        return tuple(spoiled(value) for value in args), kept


@dataclass(frozen=True, kw_only=True)
class Overflow(Fault):
    """A number leaves the range that it was meant for: the output of a layer, or the scale of the loss.

    `where="activation"`: a layer's output is multiplied. `where="loss scale"`: gradients reach the optimizer
    multiplied, as when the scale of the loss was not divided out.
    """

    name: ClassVar[str] = "overflow"
    hits: ClassVar[str] = "an activation"
    weaker: ClassVar[Mapping[str, Any] | None] = {"factor": 100.0, "steps": 1}
    factor: float = 1e20
    where: str = "activation"
    module: str | None = None
    steps: int = 2

    def prepare(self, run: Injection) -> None:
        """Hang a hook on the layer: the middle one of the linear layers, or the one that is named."""
        if self.where == "loss scale":
            return
        if self.where != "activation":
            raise InputError(f"{self.name}: where is 'activation' or 'loss scale', not {self.where!r}")
        layers = {name: one for name, one in run.model.named_modules() if type(one).__name__ in ("Linear", "Conv1D")}
        name = self.module if self.module is not None else next(iter([*layers][len(layers) // 2 :]), None)
        layer = dict(run.model.named_modules()).get(name or "")
        if name is None or layer is None:
            raise InputError(f"{self.name}: no layer {name or 'of class Linear or Conv1D'} in this model: name one")

        def multiplied(module: nn.Module, args: Any, output: Any) -> Any:
            if not (module.training and run.due(self) and isinstance(output, Tensor)):
                return None
            run.note(self, f"output of {name} x{self.factor:g}")
            return output * self.factor

        run.until_removed(layer.register_forward_hook(multiplied))

    def before_step(self, run: Injection) -> None:
        """Multiply every gradient, where the scale of the loss is hit."""
        if self.where != "loss scale":
            return
        for parameter in run.parameters().values():
            if parameter.grad is not None:
                overwrite(parameter.grad, lambda values: values * self.factor)
        run.note(self, f"gradients x{self.factor:g}")


def _vocabulary(model: nn.Module) -> int | None:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return size if isinstance(size, int) else None
