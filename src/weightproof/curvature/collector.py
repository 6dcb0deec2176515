"""Sums of a a' and g g' of some linear layers, read by hooks while the model runs forward and backward.

For y = W a and a loss that is a sum over tokens, g is the loss's gradient at y, one row a token. Both sums are made
when the gradient arrives, from the input of that very forward pass: so a layer that is called twice counts twice, one
whose gradient never comes counts not at all, and a checkpointed layer counts once although it runs forward twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from weightproof.errors import InputError

__all__ = ["Collector", "CorrectedMoments", "Moments", "Target", "TokenSums"]


@dataclass(frozen=True, slots=True)
class Target:
    """One weight matrix and every module that multiplies by it.

    Attributes:
        name: Of the matrix.
        d_out: Rows.
        d_in: Columns.
        modules: Linear or Conv1D modules that hold it; more than one where it is tied.
    """

    name: str
    d_out: int
    d_in: int
    modules: tuple[nn.Module, ...]


@dataclass
class Moments:
    """Running sums over tokens; additive.

    Attributes:
        activation: (d_in, d_in), sum of a a'.
        gradient: (d_out, d_out), sum of g g'.
        tokens: How many.
    """

    activation: torch.Tensor
    gradient: torch.Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, target: Target, dtype: torch.dtype, device: torch.device) -> Moments:
        """Nothing seen yet."""
        activation = torch.zeros(target.d_in, target.d_in, dtype=dtype, device=device)
        return cls(activation, torch.zeros(target.d_out, target.d_out, dtype=dtype, device=device))

    def add(self, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Account for some tokens: (n, d_in) and (n, d_out)."""
        for total, rows in ((self.activation, inputs), (self.gradient, gradients)):
            # Products of one batch in float32 (float64 for float64 models), their sum over batches in `total.dtype`.
            work = rows if rows.dtype == torch.float64 else rows.float()
            total.add_(work.T @ work)
        self.tokens += len(inputs)

    def sums(self) -> list[torch.Tensor]:
        """What is added up over processes."""
        return [self.activation, self.gradient]


@dataclass
class CorrectedMoments:
    """Running sums of (u_i' g)^2 (v_j' a)^2 over tokens, in given eigenbases; additive.

    Attributes:
        left: (d_out, d_out), eigenvectors u of G in columns.
        right: (d_in, d_in), eigenvectors v of A in columns.
        total: (d_out, d_in).
        tokens: How many.
    """

    left: torch.Tensor
    right: torch.Tensor
    total: torch.Tensor
    tokens: int = 0

    def add(self, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Account for some tokens: (n, d_in) and (n, d_out)."""
        dtype = self.total.dtype
        rotated = (gradients.to(dtype) @ self.left).square_(), (inputs.to(dtype) @ self.right).square_()
        self.total.addmm_(rotated[0].T, rotated[1])
        self.tokens += len(inputs)

    def sums(self) -> list[torch.Tensor]:
        """What is added up over processes."""
        return [self.total]


class TokenSums(Protocol):
    """What takes in the tokens of a layer."""

    tokens: int

    def add(self, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Account for some tokens: (n, d_in) and (n, d_out)."""
        ...

    def sums(self) -> list[torch.Tensor]:
        """What is added up over processes."""
        ...


@dataclass
class Collector:
    """Hooks on the modules of some targets.

    Attributes:
        targets: What is read.
        moments: The sums so far, by matrix.
        masks: Which tokens of the present batch count, by side ("main", "encoder"), each (batch, positions); set
            before each pass. A layer's tokens are those of the mask with the shape of its input without the width.
    """

    targets: tuple[Target, ...]
    moments: Mapping[str, TokenSums]
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    unmatched: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Hook the modules; unhooked on the way out, whatever happens."""
        handles: list[RemovableHandle] = []
        try:
            for target in self.targets:
                for module in target.modules:
                    handles.append(module.register_forward_hook(self._hook(target)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, target: Target) -> Callable[..., None]:
        def watch(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not torch.is_grad_enabled():
                return  # the first run of a checkpointed layer, or a pass without gradients
            if not output.requires_grad:
                output.requires_grad_()  # parameters are frozen: here the graph begins
            inputs = arguments[0].detach()

            def arrived(gradient: torch.Tensor) -> None:
                self._add(target, inputs, gradient.detach())

            output.register_hook(arrived)

        return watch

    def _add(self, target: Target, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        rows, slopes = inputs.reshape(-1, inputs.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        if self.masks:
            leading = tuple(inputs.shape[:-1])
            mask = _mask_for(leading, _in_order(target.name, self.masks))
            if mask is None:
                self.unmatched[target.name] = leading
                return
            rows, slopes = rows[mask.to(rows.device)], slopes[mask.to(slopes.device)]
        self.moments[target.name].add(rows, slopes)

    def require_matched(self) -> None:
        """Refuse to go on where tokens of a layer could not be told from padding.

        Raises:
            InputError: Naming the layer.
        """
        if self.unmatched:
            name, leading = next(iter(self.unmatched.items()))
            shapes = ", ".join(str(list(mask.shape)) for mask in self.masks.values())
            raise InputError(
                f"the inputs of {name} have the shape {list(leading)} (without their width), and no mask of the batch "
                f"does ({shapes}), so padding cannot be left out: leave that matrix out with include=, or give "
                "batches without padding and without an attention mask"
            )


def _in_order(name: str, masks: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The mask of the tokens that a matrix multiplies first: keys and values of cross-attention read the encoder's."""
    parts = name.split(".")
    crosses = any(part in ("EncDecAttention", "encoder_attn", "crossattention") for part in parts)
    reads_encoder = "encoder" in parts or (crosses and any(part in ("k", "v", "k_proj", "v_proj") for part in parts))
    order = ("encoder", "main") if reads_encoder else ("main", "encoder")
    return [masks[side] for side in order if side in masks]


def _mask_for(leading: tuple[int, ...], masks: list[torch.Tensor]) -> torch.Tensor | None:
    """The flattened mask of a layer's tokens; its input may be flattened, or hold one row an example."""
    for mask in masks:
        if leading == tuple(mask.shape) or leading == (mask.numel(),):
            return mask.flatten()
    for mask in masks:
        if mask.ndim == 2 and leading == (mask.shape[0],):
            return torch.ones(mask.shape[0], dtype=torch.bool)  # a pooled summary of each example
        if len(leading) > 2 and math.prod(leading) == mask.numel():
            return mask.flatten()
    return None


def flops_per_token(targets: Mapping[str, Target] | tuple[Target, ...]) -> int:
    """Floating point operations that collecting adds for each token: 2 (d_in^2 + d_out^2) a matrix."""
    chosen = targets.values() if isinstance(targets, Mapping) else targets
    return sum(2 * (one.d_in**2 + one.d_out**2) for one in chosen)
