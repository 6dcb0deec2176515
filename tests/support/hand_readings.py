"""Readings built by hand: two attention and two MLP matrices, an embedding, a norm and a buffer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from weightproof.types import (
    BulkReading,
    ContractReading,
    DivergenceReading,
    EditRecord,
    MatrixReading,
    Outcome,
    Readings,
    StructureReading,
    TensorReading,
    Verdict,
)

MATRICES = {
    "embed": "embed",
    "blocks.0.attn.q": "attn",
    "blocks.1.attn.q": "attn",
    "blocks.0.mlp.up": "ffn",
    "blocks.1.mlp.up": "ffn",
}


def matrix(name: str, family: str, **changes: Any) -> MatrixReading:
    plain = MatrixReading(name, family, 64, 32, 10.0, 2.0, 1e-6, 0.5, 0, 0, "gram-eigh-float64")
    return replace(plain, **changes)


def unread_matrix(name: str, family: str, reason: str) -> MatrixReading:
    return MatrixReading(name, family, 64, 32, None, None, None, None, None, None, "refused", reason)


def bulk(name: str, family: str, spikes: int = 10, **changes: Any) -> BulkReading:
    plain = BulkReading(name, family, "global", 0.02, 1.0, spikes, spikes, spikes, 0.3, 0.02, 2.0, False, "exact")
    return replace(plain, **changes)


def tensor(name: str, **changes: Any) -> TensorReading:
    return replace(TensorReading(name, "float32", (64, 32), "Parameter", False, 0, f"digest of {name}"), **changes)


def baseline(**changes: Any) -> Readings:
    tensors = {f"{name}.weight": tensor(f"{name}.weight") for name in MATRICES}
    tensors["norm.weight"] = tensor("norm.weight", shape=(32,))
    tensors["bn.running_mean"] = tensor("bn.running_mean", shape=(32,), is_buffer=True)
    plain = Readings(
        model_digest="before",
        tensors=tensors,
        structure=StructureReading(
            modules=dict.fromkeys(MATRICES, "Linear") | {"norm": "LayerNorm"},
            ties=frozenset({("embed.weight", "head.weight")}),
            embedding_sizes={"embed": 64},
        ),
        matrices={name: matrix(name, family) for name, family in MATRICES.items()},
        bulks={name: bulk(name, family) for name, family in MATRICES.items()},
        second_moments={
            f"random:{block}.{role}": 1.5 for block in ("blocks.0", "blocks.1") for role in ("attn", "mlp")
        },
    )
    return replace(plain, **changes)


def edit(kind: str = "unknown", *changed: str, targets: tuple[str, ...] | None = None, **changes: Any) -> EditRecord:
    plain = EditRecord("edit", kind, {}, targets, changed, (), "before", "after", {})
    return replace(plain, **changes)


def after(kind: str = "unknown", **changes: Any) -> Readings:
    """The baseline again, after an edit of every MLP matrix that these changes are put over."""
    before = baseline()
    names = [name for name in before.tensors if ".mlp." in name]
    tensors = before.tensors | {name: replace(before.tensors[name], digest=f"new {name}") for name in names}
    plain = replace(before, model_digest="after", tensors=tensors, edit=edit(kind, *names, contract=kept_contract()))
    return replace(plain, **changes)


def kept_contract() -> tuple[ContractReading, ...]:
    return (ContractReading("blocks.0.mlp.up", "error_over_half_step", 0.5, 1.0, rigorous=True),)


def with_matrix(readings: Readings, name: str, **changes: Any) -> Readings:
    return replace(readings, matrices={**readings.matrices, name: replace(readings.matrices[name], **changes)})


def with_bulk(readings: Readings, name: str, **changes: Any) -> Readings:
    if "num_spikes" in changes:
        count = changes["num_spikes"]
        changes = {"num_spikes_low": count, "num_spikes_high": count} | changes
    return replace(readings, bulks={**readings.bulks, name: replace(readings.bulks[name], **changes)})


def with_tensor(readings: Readings, name: str, **changes: Any) -> Readings:
    return replace(readings, tensors={**readings.tensors, name: replace(readings.tensors[name], **changes)})


def outputs(kl: float | None = 0.001, windows: str = "random", **changes: Any) -> DivergenceReading:
    plain = DivergenceReading(windows, f"digest of {windows}", 1024, kl, kl, 0.01, None, finite=True)
    return replace(plain, **changes)


def verdict(guard: str, outcome: Outcome | str, reason: str = "as made by hand") -> Verdict:
    return Verdict(guard, Outcome(outcome), (), reason, 1, 1)


NONFINITE = (math.nan, math.inf, -math.inf)
