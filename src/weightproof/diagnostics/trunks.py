"""Which blocks the residual stream runs through: found by the walker, or named by the user."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from weightproof.errors import InputError
from weightproof.families import Block, blocks, clean_name, unwrap

__all__ = ["Blocks", "Trunk", "trunks_of"]

Trunk = tuple[Block, ...]
Blocks = str | nn.Module | Sequence[Any] | None
"""Dotted name(s) of block lists, a list of modules, or a list of such lists; None: what the walker finds."""

_ADVICE = "name its list of blocks, as in blocks='model.layers', or give the modules, blocks=[...]"


def trunks_of(model: nn.Module, chosen: Blocks = None) -> tuple[Trunk, ...]:
    """The lists of blocks of a model, each one run of the residual stream (T5: encoder, then decoder).

    Args:
        model: The model.
        chosen: As `Blocks` says.

    Raises:
        InputError: If the model has no list of blocks, or what was chosen is none.
    """
    model = unwrap(model)
    found = _found(model) if chosen is None else _chosen(model, chosen)
    if not found or not all(found):
        what = "has no list of blocks" if chosen is None else "has no block in the list that was chosen"
        raise InputError(f"{type(model).__name__} {what}: {_ADVICE}")
    return found


def _found(model: nn.Module) -> tuple[Trunk, ...]:
    """Blocks by the list that holds them, in forward order."""
    lists: dict[str, list[Block]] = {}
    for block in blocks(model):
        lists.setdefault(block.name.rpartition(".")[0], []).append(block)
    return tuple(tuple(one) for one in lists.values())


def _chosen(model: nn.Module, chosen: Blocks) -> tuple[Trunk, ...]:
    names = {id(module): clean_name(name) for name, module in model.named_modules(remove_duplicate=False)}
    if isinstance(chosen, str):
        chosen = [_by_name(model, chosen)]
    elif isinstance(chosen, nn.ModuleList | nn.Sequential):
        chosen = [chosen]
    elif isinstance(chosen, nn.Module) or not isinstance(chosen, Sequence):
        raise InputError(f"blocks is one {type(chosen).__name__}, not a list of blocks: {_ADVICE}")
    else:
        chosen = [_by_name(model, one) if isinstance(one, str) else one for one in chosen]
    if chosen and not any(isinstance(one, nn.ModuleList | list | tuple) for one in chosen):
        # Modules side by side are the blocks; one Sequential alone is the list of them.
        is_container = len(chosen) == 1 and isinstance(chosen[0], nn.Sequential)
        return (_trunk(chosen[0] if is_container else chosen, names),)
    return tuple(_trunk(one, names) for one in chosen)


def _by_name(model: nn.Module, name: str) -> nn.Module:
    for raw, module in model.named_modules():
        if name in (raw, clean_name(raw)):
            return module
    raise InputError(f"{type(model).__name__} has no module {name!r}: {_ADVICE}")


def _trunk(modules: Any, names: dict[int, str]) -> Trunk:
    listed: list[Any] = list(modules) if isinstance(modules, Iterable) else [modules]
    for one in listed:
        if not isinstance(one, nn.Module):
            raise InputError(f"a list of blocks holds a {type(one).__name__}: {_ADVICE}")
    return tuple(Block(names.get(id(one), f"block.{index}"), one) for index, one in enumerate(listed))
