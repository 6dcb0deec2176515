"""Reading one batch: hidden states by hooks on the blocks, gradients by `torch.autograd.grad` at the hooked tensors.

Nothing is added to `.grad`, no optimizer is touched, no parameter's flag is changed: the graph begins at what enters
the first block, and gradients are asked for at hidden states alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.activations import hooked, real_positions
from weightproof.diagnostics.objective import LossOf, Read, summed
from weightproof.diagnostics.readings import BatchReading, Place, read_gradient, token_norms
from weightproof.diagnostics.trunks import Trunk
from weightproof.errors import InputError
from weightproof.forward.passes import whole

__all__ = ["Capture", "Trace", "read_batch", "read_trace"]

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What a pass of a network with a training rule of its own hands over, in place of hooks.

    Attributes:
        hidden: What enters the first block, then what leaves each: (rows, d) or (rows, tokens, d) each, in one graph.
        loss: One loss a sample, (number, count), or one number whose reduction `diagnose` is told.
        gradients: The gradient of the summed loss at each of `hidden`; None: by autograd. A rule that cuts the graph
            (detached blocks) gives what a backward pass would have given.
        real: (rows, tokens) bool, False where a token is padding; None where all are real.
        names: Of the places, one each; None: h0, h1, ...
    """

    hidden: Sequence[Tensor]
    loss: Any
    gradients: Sequence[Tensor | None] | None = None
    real: Tensor | None = None
    names: Sequence[str] | None = None


@dataclass
class Capture:
    """Hooks on lists of blocks that hold on to the hidden states of one pass."""

    trunks: tuple[Trunk, ...]
    _held: list[list[tuple[str, Tensor]]] = field(default_factory=list)
    _is_open: bool = False

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """The hooks, for as many passes as are made inside."""
        handles = [
            self.trunks[number][0].module.register_forward_pre_hook(self._entering(number), with_kwargs=True)
            for number in range(len(self.trunks))
        ]
        handles += [
            block.module.register_forward_hook(self._leaving(number, block.name))
            for number, trunk in enumerate(self.trunks)
            for block in trunk
        ]
        with hooked(*handles):
            yield

    def states(self, run: Callable[[], Read]) -> tuple[Read, list[tuple[Place, Tensor]]]:
        """Make one pass; the hidden states by place, in forward order, still in its graph.

        Raises:
            InputError: If a list of blocks was not run.
        """
        self._held = [[] for _ in self.trunks]
        self._is_open = True
        try:
            read = run()
        finally:
            self._is_open = False  # a checkpointed block runs once more in the backward pass
        found = [
            (Place(name, number, _width(tensor)), tensor)
            for number, held in enumerate(self._held)
            for name, tensor in _numbered(held)
        ]
        for number, held in enumerate(self._held):
            if len(held) < 2:
                raise InputError(f"the blocks from {self.trunks[number][0].name} on are not run in a forward pass")
        self._held = []
        return read, found

    def _entering(self, number: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self._is_open or self._held[number]:
                return None
            name = f"{self.trunks[number][0].name} input"
            place, value = _first_tensor(args, kwargs, name)
            if not value.requires_grad and torch.is_grad_enabled():
                # Frozen embeddings (adapters), or none: the graph begins here.
                value = value.detach().requires_grad_()
                if isinstance(place, int):
                    args = (*args[:place], value, *args[place + 1 :])
                else:
                    kwargs = {**kwargs, place: value}
            self._held[number].append((name, value))
            return args, kwargs

        return hook

    def _leaving(self, number: int, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._is_open:
                self._held[number].append((name, _output_tensor(output, name)))

        return hook


def read_batch(capture: Capture, model: nn.Module, batch: Batch, loss_of: LossOf, number: int) -> BatchReading:
    """One pass forward and back; call it inside `undisturbed`, with gradients enabled, and `capture.hooks()`.

    Raises:
        InputError: If the pass fails, or gives no loss.
    """
    read, found = capture.states(lambda: loss_of(model, batch, number))
    places = tuple(place for place, _ in found)
    tensors = [tensor for _, tensor in found]
    reals = [_real(place, tensor, read.batch) for place, tensor in found]
    norms = [token_norms(_features_last(whole(tensor)), real) for tensor, real in zip(tensors, reals, strict=True)]
    gradients = _gradients(read.total, tensors)
    points = []
    for place, norm, gradient, real in zip(places, norms, gradients, reals, strict=True):
        scored = None if _side(place.name) == "encoder" and "decoder_input_ids" in read.batch else read.scored
        points.append(read_gradient(norm, None if gradient is None else _features_last(gradient), real, scored))
    return BatchReading(
        places=places,
        points=tuple(points),
        rows=len(tensors[-1]),
        tokens=max(len(norm) for norm in norms),
        dtype=str(tensors[-1].dtype).removeprefix("torch."),
        loss=float(read.total.detach()),
        count=read.count,
    )


def read_trace(trace: Trace, reduction: str | None) -> BatchReading:
    """The same from a pass that somebody else made.

    Raises:
        InputError: If the trace does not fit together.
    """
    total, count, _ = summed(trace.loss, reduction)
    hidden = list(trace.hidden)
    if len(hidden) < 2:
        raise InputError(f"a trace needs what enters the first block and what leaves each, not {len(hidden)} tensors")
    gradients = _gradients(total, hidden) if trace.gradients is None else list(trace.gradients)
    names = [f"h{index}" for index in range(len(hidden))] if trace.names is None else list(trace.names)
    if not len(hidden) == len(gradients) == len(names):
        raise InputError(f"a trace has {len(hidden)} hidden states, {len(gradients)} gradients and {len(names)} names")
    points = []
    for name, state, gradient in zip(names, hidden, gradients, strict=True):
        if gradient is not None and gradient.shape != state.shape:
            raise InputError(f"the gradient at {name} is {tuple(gradient.shape)}, its state {tuple(state.shape)}")
        norms = token_norms(_features_last(state), trace.real)
        points.append(read_gradient(norms, None if gradient is None else _features_last(gradient), trace.real, None))
    return BatchReading(
        places=tuple(Place(name, 0, _width(state)) for name, state in zip(names, hidden, strict=True)),
        points=tuple(points),
        rows=len(hidden[-1]),
        tokens=len(points[-1].norms),
        dtype=str(hidden[-1].dtype).removeprefix("torch."),
        loss=float(total.detach()),
        count=count,
    )


def _gradients(total: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Derivatives of the total by each tensor, None where the graph does not lead there."""
    wanted = [index for index, tensor in enumerate(tensors) if tensor.requires_grad]
    found: list[Tensor | None] = [None] * len(tensors)
    if not wanted or not total.requires_grad:
        return found
    try:
        grads = torch.autograd.grad(total, [tensors[index] for index in wanted], allow_unused=True)
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
        raise InputError(
            "the blocks are checkpointed in the old way, which gives no gradients at hidden states: pass "
            "use_reentrant=False to torch.utils.checkpoint"
        ) from error
    for index, grad in zip(wanted, grads, strict=True):
        found[index] = None if grad is None else whole(grad)
    return found


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> tuple[int | str, Tensor]:
    """Where the hidden state is among the arguments of a block."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), ("hidden_states", kwargs.get("hidden_states"))]
    for place, value in (*named, *kwargs.items()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return place, value
    raise InputError(f"{name}: the block is called without a floating point tensor, so it has no hidden state")


def _output_tensor(output: Any, name: str) -> Tensor:
    """The hidden state among what a block returns: the tensor, or the first in a tuple or mapping."""
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    )
    found = next((one for one in values if isinstance(one, Tensor) and one.is_floating_point()), None)
    if found is None or found.ndim < 2:
        raise InputError(f"{name} returns {type(output).__name__} without a hidden state (rows, ..., features)")
    return found


def _width(hidden: Tensor) -> int:
    return hidden.shape[1] if hidden.ndim > 3 else hidden.shape[-1]


def _features_last(hidden: Tensor) -> Tensor:
    """(rows, d) and (rows, tokens, d) as they are; images (rows, channels, height, width) as tokens of channels."""
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim > 3 else hidden


def _numbered(held: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """A block that is run several times gets a number behind its name from the second time on."""
    seen: dict[str, int] = {}
    found = []
    for name, tensor in held:
        seen[name] = seen.get(name, 0) + 1
        found.append((name if seen[name] == 1 else f"{name} #{seen[name]}", tensor))
    return found


def _side(name: str) -> str:
    return next((part for part in name.split(".") if part in ("encoder", "decoder")), "")


def _real(place: Place, hidden: Tensor, batch: Batch) -> Tensor | None:
    """Which tokens of this place are real; None: all of them."""
    if hidden.ndim != 3:
        return None
    decoder = "decoder_input_ids" in batch and _side(place.name) != "encoder"
    real = real_positions(batch, hidden.shape[:-1], decoder=decoder)
    return None if real is None else real.to(hidden.device)
