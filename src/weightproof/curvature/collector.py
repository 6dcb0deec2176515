"""Sums of a a' and g g' of some linear layers, read by hooks while the model runs forward and backward.

For y = W a and a loss that is a sum over tokens, g is the loss's gradient at y, one row a token. An input counts for
a layer when the gradient of that very call arrives: so a layer that is called twice counts twice, one whose gradient
never comes counts not at all, and a checkpointed layer counts once although it runs forward twice. Layers that read
one tensor (gate and up; query, key and value) share the sum of its products, which is made once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from weightproof.curvature.moments import TokenSums
from weightproof.errors import InputError

__all__ = ["Collector", "Target"]


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


@dataclass(eq=False)
class _Reading:
    """One input tensor of one pass, and the layers that multiply it.

    Attributes:
        key: Under which it is found while the forward pass goes on.
        inputs: (..., d_in), detached; the rows that count, (n, d_in), once the first gradient arrived.
        version: Of the tensor when it was read: raised by every change in place.
        readers: Names of the matrices, one for each call.
        arrived: Those of which the gradient arrived.
    """

    key: Hashable
    inputs: torch.Tensor
    version: int
    readers: list[str] = field(default_factory=list)
    arrived: list[str] = field(default_factory=list)


@dataclass
class Collector:
    """Hooks on the modules of some targets.

    Attributes:
        targets: What is read.
        sums: Takes in the tokens of every matrix.
        masks: Which tokens of the present batch count, by side ("main", "encoder"), each (batch, positions); set
            before each pass. A layer's tokens are those of the mask with the shape of its input without the width.
        unmatched: Layers of which no mask has the shape of the input.
    """

    targets: tuple[Target, ...]
    sums: TokenSums
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    unmatched: dict[str, tuple[int, ...]] = field(default_factory=dict)
    # Held by the hooks of the graph alone: an input is let go with the last layer that may still need it.
    _readings: WeakValueDictionary[Hashable, _Reading] = field(default_factory=WeakValueDictionary)
    _begun: dict[int, _Reading] = field(default_factory=dict)

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
            reading = self._reading(target, arguments[0].detach())

            def arrived(gradient: torch.Tensor | None) -> None:
                if gradient is not None:  # nothing behind this layer reaches the loss
                    self._add(target, reading, gradient.detach())

            output.register_hook(arrived)

        return watch

    def _reading(self, target: Target, inputs: torch.Tensor) -> _Reading:
        """The record of an input; the same for every layer that multiplies this very tensor in this pass."""
        place = (inputs.device, inputs.dtype, inputs.data_ptr(), tuple(inputs.shape), inputs.stride())
        key = (*place, inputs._version, _reads_encoder(target.name))
        reading = self._readings.get(key)
        if reading is None:
            self._readings[key] = reading = _Reading(key, inputs, inputs._version)
        reading.readers.append(target.name)
        return reading

    def _add(self, target: Target, reading: _Reading, gradient: torch.Tensor) -> None:
        slopes = gradient.reshape(-1, gradient.shape[-1])
        mask = None
        if self.masks:
            leading = tuple(gradient.shape[:-1])
            mask = _mask_for(leading, _in_order(target.name, self.masks))
            if mask is None:
                self.unmatched[target.name] = leading
                return
            slopes = slopes[mask.to(slopes.device)]
        if not reading.arrived:
            self._begin(target, reading, mask)
        reading.arrived.append(target.name)
        self.sums.add(target.name, reading.inputs, slopes)
        if len(reading.arrived) == len(reading.readers):
            self._finish(reading)

    def _begin(self, target: Target, reading: _Reading, mask: torch.Tensor | None) -> None:
        """Keep the rows that count until every layer had its gradient."""
        if reading.inputs._version != reading.version:
            raise InputError(
                f"the input of {target.name} was changed in place after that layer read it, so it is gone when the "
                "gradient arrives: leave that matrix out with include=, or switch in-place activations off"
            )
        rows = reading.inputs.reshape(-1, reading.inputs.shape[-1])
        reading.inputs = rows if mask is None else rows[mask.to(rows.device)]
        self._readings.pop(reading.key, None)  # the tensor itself may be let go, and its address given to another
        self._begun[id(reading)] = reading

    def _finish(self, reading: _Reading) -> None:
        self.sums.add_inputs(tuple(sorted(reading.arrived)), reading.inputs)
        del self._begun[id(reading)]

    def end_pass(self) -> None:
        """Account for inputs of which some layer had no gradient; to be called when the backward pass is over.

        Raises:
            InputError: Where tokens of a layer could not be told from padding, naming the layer.
        """
        for reading in list(self._begun.values()):
            self._finish(reading)
        self._readings.clear()
        if self.unmatched:
            name, leading = next(iter(self.unmatched.items()))
            shapes = ", ".join(str(list(mask.shape)) for mask in self.masks.values())
            raise InputError(
                f"the inputs of {name} have the shape {list(leading)} (without their width), and no mask of the batch "
                f"does ({shapes}), so padding cannot be left out: leave that matrix out with include=, or give "
                "batches without padding and without an attention mask"
            )


def _reads_encoder(name: str) -> bool:
    """Whether a matrix multiplies the encoder's tokens: its own, or as keys and values of cross-attention."""
    parts = name.split(".")
    crosses = any(part in ("EncDecAttention", "encoder_attn", "crossattention") for part in parts)
    return "encoder" in parts or (crosses and any(part in ("k", "v", "k_proj", "v_proj") for part in parts))


def _in_order(name: str, masks: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The mask of the tokens that a matrix multiplies first."""
    order = ("encoder", "main") if _reads_encoder(name) else ("main", "encoder")
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
