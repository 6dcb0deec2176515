"""Where the damage is: each block, fed what it was fed at baseline, against its baseline output.

Teacher forcing: what enters and what leaves every block is replaced by the tensors of the
baseline, so an error never travels and the blocks that are off are the blocks that changed. What
is computed outside the blocks is compared where it enters them: as "embedding" (hidden states
before a trunk, tables shared by all blocks such as rotary ones) or "encoder_output" (what the
decoder reads from the encoder). What follows the last block is "head".

It says where, never whether: an edit that preserves the function but moves something across a
block's border (heads permuted together with a shared position bias, a gain folded into the
decoder's cross-attention) shows an error here and none in the outputs.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from weightproof.activations import forward_outputs, hooked, undisturbed
from weightproof.families import Block, blocks
from weightproof.forward.windows import Item
from weightproof.types import BlockError

EMBEDDING, ENCODER_OUTPUT, HEAD = "embedding", "encoder_output", "head"
_TOO_LARGE = "the inputs and outputs of its blocks on one window take more than {:.0f} MiB"
_NOT_WHOLE = "its blocks hand on tensors that are divided among processes (tensor parallelism)"


@dataclass(frozen=True, slots=True, eq=False)
class BlockTrace:
    """What entered and left every block on one window at baseline.

    Attributes:
        window: The inputs, one row.
        tensors: Distinct floating tensors, on the CPU, in the model's dtype.
        places: (block call, "in" or "out", path of the argument or output) -> index into `tensors`.
        sources: Places of tensors that no block made -> "embedding" or "encoder_output".
        scores: What the model returned (logits, or hidden state and pooled summary).
    """

    window: Mapping[str, torch.Tensor]
    tensors: tuple[torch.Tensor, ...]
    places: Mapping[tuple[str, str, str], int]
    sources: Mapping[tuple[str, str, str], str]
    scores: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.tensors, *self.scores))


@dataclass
class _Store:
    """Clones each tensor once: blocks hand on the same object, and shared tables reach every block."""

    cap_bytes: int
    refusal: str | None = None  # why the trace is given up; the pass goes on, other processes may be in it
    clones: list[torch.Tensor] = field(default_factory=list)
    nbytes: int = 0
    _index: dict[tuple[int, int], int] = field(default_factory=dict)
    _alive: list[torch.Tensor] = field(default_factory=list)  # an id is unique among living objects only

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return (id(tensor), tensor._version) in self._index

    def put(self, tensor: torch.Tensor) -> int:
        """Index of the clone of this tensor; -1 once the trace was given up."""
        if self.refusal is None and hasattr(tensor, "full_tensor"):
            return self._give_up(_NOT_WHOLE)
        if self.refusal is not None:
            return -1
        key = (id(tensor), tensor._version)  # changed in place, it is another tensor
        if key not in self._index:
            self.nbytes += tensor.numel() * tensor.element_size()
            if self.nbytes > self.cap_bytes:
                return self._give_up(_TOO_LARGE.format(self.cap_bytes / 2**20))
            self._index[key] = len(self.clones)
            self.clones.append(tensor.detach().to("cpu", copy=True))
            self._alive.append(tensor)
        return self._index[key]

    def _give_up(self, reason: str) -> int:
        self.refusal = reason
        for held in (self.clones, self._alive, self._index):
            held.clear()
        return -1


def trace_blocks(model: nn.Module, window: Item, *, cap_bytes: int) -> BlockTrace | str:
    """Run one window and keep what enters and leaves every block; a reason where that cannot be done."""
    store = _Store(cap_bytes)
    places: dict[tuple[str, str, str], int] = {}
    sources: dict[tuple[str, str, str], str] = {}

    def record(place: tuple[str, str, str], tensor: torch.Tensor) -> torch.Tensor:
        if place[1] == "in" and tensor not in store:
            sources[place] = ENCODER_OUTPUT if place[2].startswith("encoder_hidden_states") else EMBEDDING
        places[place] = store.put(tensor)
        return tensor

    scores = _run(model, window, record)
    for part in scores:
        store.put(part)
    if store.refusal is not None:
        return store.refusal
    if not places:
        return "the model has no repeated blocks that are known"
    return BlockTrace(window, tuple(store.clones), places, sources, tuple(part.cpu() for part in scores))


def locate_errors(model: nn.Module, trace: BlockTrace) -> tuple[BlockError, ...]:
    """Relative Frobenius error of every block's output, teacher-forced, in forward order.

    Beside the blocks: "embedding", "encoder_output" and "head" (module docstring). The error is
    ||now - base||_F / ||base||_F, inf where the output is not finite.

    Raises:
        InputError: If the model's forward fails.
    """
    errors: dict[str, float] = {}

    def force(place: tuple[str, str, str], tensor: torch.Tensor) -> torch.Tensor:
        index = trace.places.get(place)
        if index is None:
            return tensor
        base = trace.tensors[index].to(tensor.device)
        call, side, path = place
        if side == "out" and path == _MAIN_OUTPUT:
            _note(errors, call.partition("@")[0], relative_error(tensor, base))
        elif place in trace.sources:
            _note(errors, trace.sources[place], relative_error(tensor, base))
        return base.to(tensor.dtype) if base.shape == tensor.shape else tensor

    scores = _run(model, dict(trace.window), force)
    for part, base in zip(scores, trace.scores, strict=False):
        _note(errors, HEAD, relative_error(part, base.to(part.device)))
    return tuple(BlockError(name, error) for name, error in errors.items())


def worst_errors(processes: Sequence[tuple[BlockError, ...]]) -> tuple[BlockError, ...]:
    """Of every block the largest error that a process found, in forward order."""
    errors: dict[str, float] = {}
    for error in itertools.chain.from_iterable(processes):
        _note(errors, error.block, error.relative_error)
    return tuple(BlockError(name, error) for name, error in errors.items())


def relative_error(now: torch.Tensor, base: torch.Tensor) -> float:
    """||now - base||_F / ||base||_F in float64; inf when not finite or of another shape, 1 from zero."""
    if now.shape != base.shape:
        return math.inf
    if now.dtype == base.dtype and torch.equal(now, base):
        return 0.0
    change = float(torch.linalg.vector_norm(now.double() - base.double()))
    size = float(torch.linalg.vector_norm(base.double()))
    if not math.isfinite(change):
        return math.inf
    return change / size if size else float(change > 0.0)


def _note(errors: dict[str, float], name: str, error: float) -> None:
    errors[name] = max(errors.get(name, 0.0), error)


_Visit = Callable[[tuple[str, str, str], torch.Tensor], torch.Tensor]
_MAIN_OUTPUT = "0"


def _run(model: nn.Module, window: Item, visit: _Visit) -> tuple[torch.Tensor, ...]:
    """One forward pass in which `visit` sees, and may replace, every floating tensor at a block's border."""
    calls: Counter[str] = Counter()

    def enter(block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls[block.name] += 1
        call = f"{block.name}@{calls[block.name]}"
        names = [*inspect.signature(module.forward).parameters, *(f"arg{i}" for i in range(len(args)))]
        seen = tuple(
            _walk(value, name, partial(_at, visit, call, "in")) for name, value in zip(names, args, strict=False)
        )
        return seen, {name: _walk(value, name, partial(_at, visit, call, "in")) for name, value in kwargs.items()}

    def leave(block: Block, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        call = f"{block.name}@{calls[block.name]}"
        if isinstance(output, torch.Tensor):
            return _walk(output, _MAIN_OUTPUT, partial(_at, visit, call, "out"))
        if type(output) in (tuple, list):
            return type(output)(
                _walk(value, str(i), partial(_at, visit, call, "out")) for i, value in enumerate(output)
            )
        return output

    handles = []
    for block in blocks(model):
        handles.append(block.module.register_forward_pre_hook(partial(enter, block), with_kwargs=True))
        handles.append(block.module.register_forward_hook(partial(leave, block)))
    with undisturbed(model), hooked(*handles):
        return forward_outputs(model, window).parts


def _at(visit: _Visit, call: str, side: str, path: str, tensor: torch.Tensor) -> torch.Tensor:
    return visit((call, side, path), tensor)


def _walk(value: Any, path: str, visit: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
    """Apply `visit` to every floating tensor in nested tuples and lists; anything else passes through."""
    if isinstance(value, torch.Tensor):
        return visit(path, value) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_walk(item, f"{path}.{i}", visit) for i, item in enumerate(value))
    return value
