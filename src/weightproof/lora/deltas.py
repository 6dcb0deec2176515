"""What an adapter changes: low-rank deltas, replaced tensors, added biases, under public names.

LoRA (arXiv 2106.09685): W' = W + s B A. DoRA (arXiv 2402.09353): the same, then every row of the sum is scaled to
the length that its magnitude says. Factors are kept as they were stored; products are made in float32 or better.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from weightproof.errors import InputError
from weightproof.snapshots.tensor_store import tensor_digest


@dataclass(frozen=True, eq=False)
class AdapterDelta:
    """The change of one weight matrix.

    Attributes:
        name: Public name of the matrix; one expert of a stack is `...gate_up_proj[3]`.
        a: (r, d_in).
        b: (d_out, r).
        scaling: s: alpha / r, or alpha / sqrt(r) of a rank-stabilised adapter (arXiv 2312.03732).
        magnitude: (d_out,) lengths of the merged rows, of DoRA; None for plain LoRA.
    """

    name: str
    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse factors that do not belong together."""
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise InputError(
                f"the factors of {self.name} do not fit: A is {list(self.a.shape)}, B is {list(self.b.shape)}; "
                "they must be (r, d_in) and (d_out, r)"
            )
        if self.magnitude is not None and self.magnitude.shape != (self.b.shape[0],):
            raise InputError(
                f"the DoRA magnitude of {self.name} has shape {list(self.magnitude.shape)}, not one length for each "
                f"of the {self.b.shape[0]} rows"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the matrix."""
        return self.b.shape[0], self.a.shape[1]

    def dense(self, base: Tensor | None = None) -> Tensor:
        """W' - W, (d_out, d_in), in float32 (float64 where the factors are) on the device of the factors.

        Args:
            base: W, (d_out, d_in): needed for DoRA only.

        Raises:
            InputError: For a DoRA delta without its base.
        """
        dtype = torch.float64 if torch.float64 in (self.a.dtype, self.b.dtype) else torch.float32
        update = self.b.detach().to(dtype) @ self.a.detach().to(self.b.device, dtype)
        update *= self.scaling
        if self.magnitude is None:
            return update
        if base is None:
            raise InputError(
                f"{self.name}: what DoRA changes depends on the weights that it is merged into: give base="
            )
        weight = base.detach().to(update.device, dtype)
        merged = update.add_(weight)
        lengths = torch.linalg.vector_norm(merged, dim=1, keepdim=True)
        return merged.mul_(self.magnitude.detach().to(update.device, dtype)[:, None] / lengths).sub_(weight)


@dataclass(frozen=True, eq=False)
class Adapter:
    """Everything that merging one adapter changes.

    Attributes:
        deltas: Matrix name -> its delta.
        replaced: Tensor name -> the values that take the place of the base model's (`modules_to_save`, and biases
            that were trained with the adapter). As stored in the model, not turned.
        biases: Name of a bias -> what is added to it (`lora_bias`), already scaled.
        base: Name or path of the base model, as the adapter tells it; None where it does not.
        digest: SHA-256 over everything that is merged.
        source: Where it was read from, for messages.
        base_digests: Matrix name -> digest of the base model's, where that was noted (`adapters.record_base`).
    """

    deltas: Mapping[str, AdapterDelta]
    replaced: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    biases: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    base: str | None = None
    digest: str = ""
    source: str = "an adapter"
    base_digests: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        """Digest what is merged."""
        if not self.digest:
            object.__setattr__(self, "digest", _digest(self))

    @property
    def names(self) -> tuple[str, ...]:
        """Every matrix and tensor that merging it changes, sorted."""
        return tuple(sorted({*self.deltas, *self.replaced, *self.biases}))


def _digest(adapter: Adapter) -> str:
    whole = hashlib.sha256()
    for name, delta in sorted(adapter.deltas.items()):
        parts = [delta.a, delta.b, *([] if delta.magnitude is None else [delta.magnitude])]
        whole.update(f"{name} {delta.scaling!r} {' '.join(map(tensor_digest, parts))}\n".encode())
    for word, tensors in (("replaced", adapter.replaced), ("bias", adapter.biases)):
        for name, tensor in sorted(tensors.items()):
            whole.update(f"{word} {name} {tensor_digest(tensor)}\n".encode())
    return whole.hexdigest()


def combine(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter that changes what several do, merged one after the other.

    Raises:
        InputError: If two of them replace a tensor, or change a matrix of which one is DoRA: then their order counts.
    """
    first, *others = adapters
    for other in others:
        first = _joined(first, other)
    return first


def _joined(first: Adapter, second: Adapter) -> Adapter:
    deltas = dict(first.deltas)
    for name, delta in second.deltas.items():
        known = deltas.get(name)
        if known is not None and (known.magnitude is not None or delta.magnitude is not None):
            raise InputError(f"{name} is changed by two adapters, one of them DoRA: merge one after the other")
        deltas[name] = delta if known is None else _sum(known, delta)
    if both := sorted(first.replaced.keys() & second.replaced.keys()):
        raise InputError(f"{both[0]} is replaced by two adapters: merge one after the other")
    added = {name: first.biases[name] + second.biases[name] for name in first.biases.keys() & second.biases.keys()}
    return Adapter(
        deltas=deltas,
        replaced={**first.replaced, **second.replaced},
        biases={**first.biases, **second.biases, **added},
        base=first.base or second.base,
        source=f"{first.source} and {second.source}",
        base_digests={**first.base_digests, **second.base_digests},
    )


def _sum(first: AdapterDelta, second: AdapterDelta) -> AdapterDelta:
    dtype = torch.promote_types(torch.float32, torch.promote_types(first.b.dtype, second.b.dtype))
    parts = [
        (delta.a.to(first.a.device, dtype), delta.b.to(first.b.device, dtype) * delta.scaling)
        for delta in (first, second)
    ]
    a, b = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)
    return replace(first, a=a, b=b, scaling=1.0)
