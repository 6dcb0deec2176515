"""From a model and a change to a report: the change is checked, prompts are read, everything is scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from weightproof.alpha.fitting import fitted, require_base
from weightproof.candidates.candidate import Sources
from weightproof.candidates.captures import Captures
from weightproof.candidates.capturing import EVERYTHING, capture
from weightproof.candidates.registry import CANDIDATES
from weightproof.candidates.weight_side import WeightSide
from weightproof.delta_report.page import Report
from weightproof.delta_report.prompts import require_enough
from weightproof.delta_report.stability import Stability, stability
from weightproof.delta_report.table import Table, measure
from weightproof.deltas import Delta
from weightproof.errors import InputError
from weightproof.lora.folders import is_adapter_folder
from weightproof.weights import iter_weight_matrices

Batch = Mapping[str, Tensor]
Around = Callable[[Sequence[int], str], Iterable[int]]
_BROAD = 64


def read_change(path: Path, model: nn.Module) -> Delta:
    """The delta of an adapter's folder, or of a saved delta, proven to be one of this model.

    Raises:
        InputError: There is none, it holds no LoRA weights, or it is of another base.
    """
    delta = Delta.from_adapter(path, base=model) if is_adapter_folder(path) else Delta.load(path)
    require_base(delta, fitted(delta, iter_weight_matrices(model)), lambda matrix: matrix.load())
    return delta


def in_float32(model: nn.Module, changes: Iterable[Delta]) -> list[Delta]:
    """Turn a model into float32, in place, and changes that were proven to be of it into changes of the turned one.

    Of two half-precision activations the difference is mostly rounding.
    """
    model.float()
    return [Delta(one.parts, {**one.metadata, "base": {**one.metadata["base"], "digests": {}}}) for one in changes]


def make_report(  # noqa: PLR0913 - keyword-only options
    model: nn.Module,
    delta: Delta,
    prompts: Batch | None = None,
    positive: Batch | None = None,
    negative: Batch | None = None,
    *,
    title: str,
    others: Sequence[Delta] = (),
    splits: int = 0,
    rank: int = 8,
    broad_rank: int | None = None,
    batch_size: int = 8,
    block_names: str | None = None,
    around: Around = lambda layers, what: layers,
) -> Report:
    """Score every candidate on a change.

    Args:
        model: The base model; it is left as it was.
        delta: The change.
        prompts: Clean prompts, tokenised; None: the weights alone.
        positive: Prompts that ask for a behaviour.
        negative: The same ones asking against it, in the same order.
        title: What the change is, and of which model.
        others: The same change trained from other seeds.
        splits: How many further ways to halve the prompts.
        rank: Columns of a candidate.
        broad_rank: Columns of what is projected out; None: 64, at most a quarter of the width.
        batch_size: Prompts in a pass.
        block_names: Name of the list of blocks whose stream is read, for a model with several.
        around: Wraps the layers of one table and what it is of, for a progress bar.

    Raises:
        InputError: No list of blocks, too few prompts for the rank, a contrast without clean prompts, or nothing that
            can be scored.
    """
    weights = WeightSide.of(model)
    _require_ranks(rank, broad_rank, weights.width)
    _require_prompts(prompts, positive, negative, rank)
    if batch_size < 1:
        raise InputError(f"the batch size must be 1 or more, not {batch_size}")
    if splits < 0 or (splits and prompts is None):
        raise InputError(f"{splits} further halves of the prompts: a number from 0 is needed, and prompts to halve")

    def captured(change: Delta) -> Captures | None:
        if prompts is None:
            return None
        return capture(
            model, prompts, positive, negative,
            delta=change, needs=EVERYTHING, batch_size=batch_size, block_names=block_names,
        )  # fmt: skip

    broad = min(_BROAD, weights.width // 4) if broad_rank is None else broad_rank
    sources = Sources(weights, captured(delta), delta, rank, max(1, broad))
    table = measure(sources, CANDIDATES, lambda layers: around(layers, "scoring"))
    found: list[Stability] = []
    if splits and sources.captures is not None:
        captures = sources.captures
        halves = [sources.again(captures.with_seed(seed), delta) for seed in range(splits)]
        found.append(stability([table, *_tables(halves, around, "halves")], "halves of the prompts"))
    if others:
        changes = [sources.again(captured(other), other) for other in others]
        found.append(stability([table, *_tables(changes, around, "seeds")], "changes of different seeds"))
    return Report(title, table, about(delta), tuple(found))


def _tables(several: Sequence[Sources], around: Around, what: str) -> list[Table]:
    return [
        measure(one, CANDIDATES, lambda layers, number=number: around(layers, f"{what} {number}"))
        for number, one in enumerate(several, 1)
    ]


def _require_ranks(rank: int, broad_rank: int | None, width: int) -> None:
    for value, name in ((rank, "rank"), (broad_rank, "broad rank")):
        if value is not None and not 1 <= value < width:
            raise InputError(f"the {name} must be at least 1 and below the width of the stream, {width}; it is {value}")


def _require_prompts(prompts: Batch | None, positive: Batch | None, negative: Batch | None, rank: int) -> None:
    if (positive is None) != (negative is None):
        raise InputError("positive and negative prompts go together: give both, in pairs, or neither")
    if prompts is None and positive is not None:
        raise InputError("positive and negative prompts need clean ones beside them, on which the change is scored")
    for batch, name in ((prompts, "prompts"), (positive, "positive prompts"), (negative, "negative prompts")):
        if batch is not None:
            require_enough(batch, rank, name)


def about(delta: Delta) -> dict[str, Any]:
    """What a delta says of itself, without the digests of its base."""
    metadata = delta.metadata
    base = metadata["base"].get("name")
    kept = {key: metadata[key] for key in ("mode", "source", "contrast", "sides", "notes", "norms") if key in metadata}
    norm = math.sqrt(sum(value**2 for value in metadata["norms"].values()))
    return {"notes": [], **kept, "base": base, "norm": norm, "digest": delta.digest}
