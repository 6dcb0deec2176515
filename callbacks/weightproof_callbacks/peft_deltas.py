"""What an adapter of any method changes, by PEFT itself: merged minus base, in float32.

The library reads LoRA and DoRA without PEFT. Everything else (IA3, LoHa, BOFT, ...) has a rule of its own for its
delta; merging a copy and subtracting is right for all of them.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from weightproof.errors import InputError
from weightproof.weights import iter_tensors, iter_weight_matrices


def merged_minus_base(
    source: Path | str | nn.Module, adapter_name: str = "default", base: nn.Module | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What merging an adapter changes; the models given are left as they are.

    Args:
        source: A folder, or a live `PeftModel`.
        adapter_name: Which of several.
        base: The base model, for a folder.

    Returns:
        Matrix name -> change (d_out, d_in), float32, of those that change; and what else changes -> why it is no part.

    Raises:
        InputError: PEFT cannot merge this method, or `base` is missing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about layers that are tied or turned
        adapted, plain = _copies(source, adapter_name, base)
        try:
            merged = adapted.merge_and_unload(safe_merge=True, adapter_names=[adapter_name])
        except (AttributeError, NotImplementedError, ValueError, TypeError) as error:
            raise InputError(f"PEFT cannot merge {source}, so that it has no delta of weights: {error}") from error
    before = {one.name: one for one in iter_weight_matrices(plain) if one.refusal is None}
    changes: dict[str, Tensor] = {}
    for matrix in iter_weight_matrices(merged):
        if matrix.name in before:
            change = matrix.load() - before[matrix.name].load()
            if bool((change != 0).any()):
                changes[matrix.name] = change
    return changes, _vectors_that_differ(plain, merged)


def _copies(
    source: Path | str | nn.Module, adapter_name: str, base: nn.Module | None
) -> tuple[peft.PeftModel, nn.Module]:
    """An adapted copy in float32, and a plain one."""
    if isinstance(source, nn.Module):
        if not isinstance(source, peft.PeftModel):
            raise InputError(f"{type(source).__name__} is no PeftModel: PEFT cannot say what its adapters change")
        return copy.deepcopy(source).float(), copy.deepcopy(source).float().unload()
    if base is None:
        raise InputError(f"{source}: what its method changes is known only beside the base model: give base=")
    plain: Any = copy.deepcopy(base).float()
    adapted = peft.PeftModel.from_pretrained(plain, str(source), adapter_name=adapter_name)
    return adapted, copy.deepcopy(base).float()


def _vectors_that_differ(before: nn.Module, after: nn.Module) -> dict[str, str]:
    old = {one.name: one.tensor for one in iter_tensors(before) if not one.is_buffer and len(one.shape) < 2}
    new = {one.name: one.tensor for one in iter_tensors(after) if not one.is_buffer and len(one.shape) < 2}
    return {
        name: "a bias or a norm: a delta holds matrices"
        for name in old.keys() & new.keys()
        if not torch.equal(old[name], new[name])
    }
