"""A network without one of its blocks, for one pass: what the block adds is left out, or made by random weights.

Nothing is written to the model: a hook on the block replaces its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.activations import hooked
from weightproof.errors import InputError
from weightproof.families import Block
from weightproof.numerics.matrices import seeded_generator
from weightproof.parallel.placements import is_dtensor, is_zero3

__all__ = ["VARIANTS", "frozen_blocks", "without_block"]

VARIANTS = {
    "skip": "the same network with that block skipped",
    "reinit": "the same network with that block's matrices drawn anew, of the same scale",
}


@contextmanager
def without_block(block: Block, variant: str, seed: int) -> Iterator[None]:
    """Passes inside run without the block.

    Args:
        block: The block.
        variant: "skip": its output is its input. "reinit": its matrices are replaced by Gaussian ones of the same
            root mean square; gains and biases stay, so that the size of its output does.
        seed: Of the new matrices.

    Raises:
        InputError: If the block's weights are sharded ("reinit"), or its output has another shape than its input.
    """
    replace = _skipping(block) if variant == "skip" else _random(block, seed)
    with hooked(block.module.register_forward_hook(replace, with_kwargs=True)):
        yield


@contextmanager
def frozen_blocks(modules: Any) -> Iterator[None]:
    """Train what is beside the blocks alone, inside: the baseline of depth utility.

    Args:
        modules: The blocks (an `nn.ModuleList`, or modules); their parameters ask for no gradient inside.
    """
    flags = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, needed in flags:
            parameter.requires_grad_(needed)


def _skipping(block: Block) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        values = (*args, kwargs.get("hidden_states"), *kwargs.values())
        hidden = next((one for one in values if isinstance(one, Tensor) and one.is_floating_point()), None)
        return _with_first(output, hidden, block.name)

    return hook


def _random(block: Block, seed: int) -> Any:
    drawn = _drawn(block, seed)
    is_inside = False

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> Any:
        nonlocal is_inside
        if is_inside:  # the pass below runs the module's hooks too
            return None
        is_inside = True
        try:
            return torch.func.functional_call(module, drawn, args, kwargs)
        finally:
            is_inside = False

    return hook


def _drawn(block: Block, seed: int) -> dict[str, Tensor]:
    drawn: dict[str, Tensor] = {}
    for name, parameter in block.module.named_parameters():
        if is_dtensor(parameter) or is_zero3(parameter):
            raise InputError(f"{block.name} is sharded, so it cannot be drawn anew: skip the blocks (depth='skip')")
        if parameter.ndim < 2 or not parameter.is_floating_point():
            continue
        generator = seeded_generator("health blocks", seed, block.name, name)
        scale = float(parameter.detach().double().square().mean().sqrt())
        fresh = torch.randn(parameter.shape, generator=generator) * scale
        drawn[name] = fresh.to(parameter.device, parameter.dtype)
    return drawn


def _with_first(output: Any, hidden: Tensor | None, name: str) -> Any:
    """The output with the hidden state in place of its first tensor."""
    first = output if isinstance(output, Tensor) else next(iter(_values(output)), None)
    if hidden is None or not isinstance(first, Tensor) or first.shape != hidden.shape:
        raise InputError(f"{name} cannot be skipped: its output has not the shape of its input")
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, Mapping):
        key = next(iter(output))
        return type(output)(**{**output, key: hidden})
    return type(output)((hidden, *output[1:]))


def _values(output: Any) -> Any:
    return output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
