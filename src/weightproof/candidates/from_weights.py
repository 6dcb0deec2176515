"""Candidates that need nothing but the weights of the base model.

A matrix that writes to the stream points along its left singular vectors, one that reads from it along its right
ones. Both come from Gram matrices of the width of the stream: those of several matrices together are the sum of
theirs, and the singular vectors of a wide concatenation are never computed as such.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor

from weightproof.candidates.candidate import WEIGHTS, Candidate, Sources
from weightproof.candidates.weight_side import READS, WRITES
from weightproof.errors import InputError
from weightproof.subspace import (
    Target,
    ZeroChangeError,
    balanced,
    oracle_basis,
    signed,
    union,
    weight_target,
    without,
)

Build = Callable[[Sources, int], Tensor | str]
# Below this width all eigenvectors cost less than a few by Lanczos.
_LANCZOS_FROM = 512
_SELF = ("q", "k", "v", "qkv")


def leading(gram: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of a Gram matrix (d, d), (d, <= rank) float64; those of its null space are left out."""
    size = gram.shape[0]
    rank = min(rank, size)
    scale = float(gram.diagonal().max())
    if scale <= 0.0:
        return gram.new_zeros(size, 0)
    values, vectors = _lanczos(gram / scale, rank) if size >= _LANCZOS_FROM and 8 * rank <= size else _all(gram / scale)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    return signed(vectors[:, values > 1e-12 * values[0]])


def _all(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    return values, vectors


def _lanczos(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The last `rank` eigenpairs, ascending, by restarted Lanczos from a fixed start."""
    start = torch.ones(gram.shape[0], dtype=torch.float64).numpy()
    try:
        values, vectors = eigsh(gram.numpy(), k=rank, which="LA", v0=start, ncv=min(gram.shape[0], 4 * rank + 16))
    except ArpackNoConvergence:
        return _all(gram)
    order = values.argsort()
    return torch.from_numpy(values[order]), torch.from_numpy(vectors[:, order].copy())


def directions(found: Tensor | str, rank: int) -> Tensor | str:
    """The leading directions of a Gram matrix, or the reason why there is none."""
    if isinstance(found, str):
        return found
    basis = leading(found, rank)
    return basis if basis.shape[1] else "its matrices are zero"


# ---------------------------------------------------------------- the head


def _head_gram(sources: Sources) -> Tensor | str:
    return sources.once((WEIGHTS, "head gram"), sources.weights.head_gram)


def _head(sources: Sources, layer: int, rank: int) -> Tensor | str:
    if not sources.weights.is_last_stack(layer):
        return f"the head does not read the stream of {sources.weights.layers[layer].name}"
    return sources.once((WEIGHTS, "head", rank), lambda: directions(_head_gram(sources), rank))


def _lm_head_read(sources: Sources, layer: int) -> Tensor | str:
    return _head(sources, layer, sources.rank)


def _logits_null(sources: Sources, layer: int) -> Tensor | str:
    reason = _head(sources, layer, 1)
    if isinstance(reason, str):
        return reason

    def make() -> Tensor | str:
        gram = _head_gram(sources)
        if isinstance(gram, str):
            return gram
        vectors = torch.linalg.eigh(gram).eigenvectors
        return signed(vectors[:, : min(sources.rank, vectors.shape[1])])

    return sources.once((WEIGHTS, "logits_null"), make)


# ---------------------------------------------------------------- one layer


def _read(*parts: str) -> Build:
    def build(sources: Sources, layer: int) -> Tensor | str:
        return directions(sources.weights.read_gram(layer, *parts), sources.rank)

    return build


def _write(*parts: str) -> Build:
    def build(sources: Sources, layer: int) -> Tensor | str:
        return sources.once(
            (WEIGHTS, "write", parts, layer),
            lambda: directions(sources.weights.write_gram(layer, *parts), sources.rank),
        )

    return build


_layer_write = _write(*WRITES)
_input_super = _read(*READS)


def _kv_super(sources: Sources, layer: int) -> Tensor | str:
    if sources.weights.layers[layer].parts.get("qkv"):
        return sources.weights.layers[layer].name + ": queries, keys and values cannot be told apart"
    return directions(sources.weights.read_gram(layer, "k", "v"), sources.rank)


def _attn_ov_write(sources: Sources, layer: int) -> Tensor | str:
    return _of_product(sources, sources.weights.matrix(layer, "o"), sources.weights.by_head(layer, "v"))


def _qk_circuit(sources: Sources, layer: int) -> Tensor | str:
    queries = sources.weights.by_head(layer, "q")
    first = queries if isinstance(queries, str) else [queries.T]
    return _of_product(sources, first, sources.weights.by_head(layer, "k"))


def _of_product(sources: Sources, first: list[Tensor] | str, second: Tensor | str) -> Tensor | str:
    if isinstance(first, str):
        return first
    if isinstance(second, str):
        return second
    product = first[0] @ second
    return directions(product @ product.T, sources.rank)


def _mlp_roundtrip_write(sources: Sources, layer: int) -> Tensor | str:
    """Of every expert where there are several; of one MLP this is the left side of W_down W_up."""
    ups, downs = (sources.weights.parts(layer, part) for part in ("up", "down"))
    if isinstance(ups, str) or isinstance(downs, str):
        return ups if isinstance(ups, str) else str(downs)
    total = torch.zeros(sources.weights.width, sources.weights.width, dtype=torch.float64)
    for up, down in zip(ups, downs, strict=True):
        product = down.load().to("cpu", torch.float64) @ up.load().to("cpu", torch.float64)
        total.addmm_(product, product.T)
    return directions(total, sources.rank)


# ---------------------------------------------------------------- all layers


def _global_write(sources: Sources, layer: int) -> Tensor | str:
    del layer

    def make() -> Tensor | str:
        total = torch.zeros(sources.weights.width, sources.weights.width, dtype=torch.float64)
        for index in range(sources.weights.num_layers):
            gram = sources.weights.write_gram(index, *WRITES)
            if isinstance(gram, str):
                return gram
            total += gram
        return directions(total, sources.rank)

    return sources.once((WEIGHTS, "global_write"), make)


def _reads(sources: Sources) -> dict[int, Tensor] | str:
    """Broad bases: of what later layers and the head read, by layer; of what anything reads, under -1."""
    return sources.once((WEIGHTS, "reads"), lambda: _all_reads(sources))


def _all_reads(sources: Sources) -> dict[int, Tensor] | str:
    """One pass from the last layer to the first: what is downstream of a layer is what has been summed so far.

    Before a decoder, the end of an encoder's stream is read by keys and values of cross-attention in place of a head.
    """
    weights, found = sources.weights, dict[int, Tensor]()
    head = _head_gram(sources)
    crossing = torch.zeros(weights.width, weights.width, dtype=torch.float64)
    total = crossing.clone() if isinstance(head, str) else head.clone()
    running = total.clone()
    for layer in reversed(range(weights.num_layers)):
        if layer + 1 < weights.num_layers and weights.layers[layer].stack != weights.layers[layer + 1].stack:
            running = crossing.clone()
        found[layer] = leading(running, sources.broad_rank)
        gram = weights.read_gram(layer, *READS)
        if isinstance(gram, str):
            return gram
        running += gram
        total += gram
        if weights.layers[layer].parts.get("cross_k"):
            cross = weights.read_gram(layer, "cross_k", "cross_v")
            if isinstance(cross, str):
                return cross
            crossing += cross
            total += cross
    return found | {-1: leading(total, sources.broad_rank)}


def _global_read_broad(sources: Sources, layer: int) -> Tensor | str:
    del layer
    found = _reads(sources)
    return found if isinstance(found, str) else found[-1]


def _global_read(sources: Sources, layer: int) -> Tensor | str:
    found = _global_read_broad(sources, layer)
    return found if isinstance(found, str) else found[:, : sources.rank]


def _downstream_broad(sources: Sources, layer: int) -> Tensor | str:
    found = _reads(sources)
    if isinstance(found, str):
        return found
    return found[layer] if found[layer].shape[1] else "nothing is known to read the stream after the last layer"


# ---------------------------------------------------------------- one without another


def _head_broad(sources: Sources, layer: int) -> Tensor | str:
    return _head(sources, layer, sources.broad_rank)


def _not(first: Build, *removed: Build) -> Build:
    """The columns of one candidate with others projected out."""

    def build(sources: Sources, layer: int) -> Tensor | str:
        basis, others = first(sources, layer), [other(sources, layer) for other in removed]
        for found in (basis, *others):
            if isinstance(found, str):
                return found
        joined = union(*(other for other in others if isinstance(other, Tensor)))
        if joined.shape[1] >= sources.weights.width:
            return f"what is projected out fills all {sources.weights.width} dimensions: choose a smaller broad rank"
        assert isinstance(basis, Tensor)
        rest = without(basis, joined, sources.rank)
        return rest if rest.shape[1] else f"all of it lies in the {joined.shape[1]} dimensions that are projected out"

    return build


# ---------------------------------------------------------------- the change itself


def write_targets(sources: Sources, layer: int) -> dict[str, Target] | str:
    """What the change does to each matrix of a layer that writes to the stream; as text, why there is nothing."""
    return sources.once(("targets", layer), lambda: _write_targets(sources, layer))


def _write_targets(sources: Sources, layer: int) -> dict[str, Target] | str:
    if sources.delta is None:
        return "there is no change to look at"
    parts = sources.delta.parts
    changed = {name: parts[name] for name in sources.weights.writers(layer) if name in parts}
    if not changed:
        return f"the change touches no matrix of {sources.weights.layers[layer].name} that writes to the stream"
    found: dict[str, Target] = {}
    for name, part in changed.items():
        try:
            found[name] = weight_target(part)
        except ZeroChangeError:  # LoRA's B before the first step, or two sides that are the same
            continue
        except InputError as error:
            raise InputError(f"the change of {name} cannot be scored: {error}") from error
    return found or f"the change of {', '.join(changed)} is zero"


def _weight_ceiling(sources: Sources, layer: int) -> Tensor | str:
    targets = write_targets(sources, layer)
    if isinstance(targets, str):
        return targets
    return oracle_basis(balanced(list(targets.values())), sources.rank)


# ---------------------------------------------------------------- the registry's part


def _candidate(name: str, family: str, build: Build, axis_kind: str | None = None) -> Candidate:
    kind = axis_kind or ("read" if family in ("W:read", "W:unembed") else "write")
    return Candidate(name, family, kind, frozenset({WEIGHTS}), build)


_BESIDE = "W:write-not-read"
WEIGHT_SIDE: tuple[Candidate, ...] = (
    _candidate("lm_head_read", "W:unembed", _lm_head_read),
    _candidate("logits_null", "W:unembed", _logits_null),
    _candidate("global_read", "W:read", _global_read),
    _candidate("global_write", "W:write", _global_write),
    _candidate("global_write_not_global_read", _BESIDE, _not(_global_write, _global_read_broad)),
    _candidate("write", "W:write", _layer_write),
    _candidate("attn_write", "W:write", _write("o")),
    _candidate("mlp_write", "W:write", _write("down")),
    _candidate("write_not_lm_head_read", _BESIDE, _not(_layer_write, _head_broad)),
    _candidate("write_not_global_read", _BESIDE, _not(_layer_write, _global_read_broad)),
    _candidate("write_not_downstream_read", _BESIDE, _not(_layer_write, _downstream_broad)),
    _candidate("mlp_up_read", "W:read", _read("up")),
    _candidate("mlp_gate_read", "W:read", _read("gate")),
    _candidate("attn_qkv_read", "W:read", _read(*_SELF)),
    _candidate("attn_ov_write", "W:OV", _attn_ov_write),
    _candidate("mlp_roundtrip_write", "W:MLP", _mlp_roundtrip_write),
    _candidate("qk_circuit", "W:QK", _qk_circuit, "mixed"),
    _candidate("input_super", "W:read", _input_super),
    _candidate("kv_super", "W:read", _kv_super),
    _candidate("causally_isolated", _BESIDE, _not(_layer_write, _input_super, _kv_super, _head_broad)),
    _candidate("input_super_not_lm_read", "W:read", _not(_input_super, _head_broad)),
)

WEIGHT_CEILINGS: tuple[Candidate, ...] = (
    Candidate("dW_left_basis_ceiling", "ceiling", "ceiling", frozenset({WEIGHTS, "delta"}), _weight_ceiling),
)
