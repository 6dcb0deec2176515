"""The matrices of a model by what they read from and write to the residual stream, layer by layer.

Layers are the blocks of the trunk, parts come from the circuits: "q", "k", "v", "up" and "gate" read, "o" and "down"
write; cross-attention is kept apart ("cross_q", ...), since its keys and values read another stream. A part may be
several matrices (experts), or some rows of one (fused projections). Weights are taken as they are: gains of norms,
biases and rotary embeddings are left out, as in the definitions of the candidates.

Of a wide matrix only the Gram matrix of the width of the stream is formed, in float64 and piece by piece; those of
the layer that is being looked at are kept, no others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.errors import InputError
from weightproof.families import blocks, clean_name, unwrap
from weightproof.numerics.circuit_products import Reader
from weightproof.readings.circuit_finder import Circuit, find_circuits
from weightproof.types import WeightMatrix
from weightproof.weights import iter_tensors, iter_weight_matrices

READS = ("q", "k", "v", "qkv", "cross_q", "up", "gate")
WRITES = ("o", "cross_o", "down")
_WRITING = frozenset(WRITES)
_CROSS = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn")
_NO_GATE = "its MLP has no gate"
# Elements converted to float64 at a time (64 MiB).
_CHUNK_ELEMENTS = 1 << 23


@dataclass(frozen=True, eq=False)
class Part:
    """A matrix, or some rows of one, that reads from or writes to the stream.

    Attributes:
        matrix: As the walker gives it.
        reader: Which rows of it.
        index: Which MLP or attention of the layer it belongs to.
    """

    matrix: WeightMatrix
    reader: Reader
    index: int

    def load(self) -> Tensor:
        """(d_out, d_in), as stored."""
        whole = self.matrix.load()
        return whole if self.reader.rows is None else self.reader.rows.of(whole)


@dataclass(frozen=True, eq=False)
class Layer:
    """One block of the trunk.

    Attributes:
        name: Of the block.
        stack: Name of the list that the block is in: an encoder's and a decoder's differ.
        parts: By what they are.
        heads: Heads and key-value heads of self-attention; None where they are not known.
        missing: Why a part that looks as if it were there is not among the parts, by module.
    """

    name: str
    stack: str
    parts: Mapping[str, Sequence[Part]]
    heads: tuple[int, int] | None
    missing: Sequence[str]


@dataclass(eq=False)
class WeightSide:
    """The residual stream of a model as its weights see it.

    Attributes:
        width: d_model.
        layers: Blocks in forward order; an encoder's before a decoder's.
        head: What turns the stream into logits, (vocabulary, d_model); as text, why there is none.
    """

    width: int
    layers: tuple[Layer, ...]
    head: WeightMatrix | str
    _recent: tuple[int, dict[str, Tensor | str]] = field(default=(-1, {}), repr=False)

    @classmethod
    def of(cls, model: nn.Module) -> WeightSide:
        """Read the layout of a model; no values are touched.

        Raises:
            InputError: The model has no list of blocks, or nothing in its blocks is known to write to a stream.
        """
        names = [block.name for block in blocks(model)]
        if not names:
            raise InputError(
                f"{type(unwrap(model)).__name__} has no list of blocks (layers of one class, one after the other): "
                "candidate subspaces are defined for the residual stream between blocks"
            )
        matrices = list(iter_weight_matrices(model))
        circuits = _circuits(model, matrices)
        layers = tuple(_layer(name, circuits, {one.name: one for one in matrices}) for name in names)
        widths = Counter(one.matrix.d_out for layer in layers for part in WRITES for one in layer.parts.get(part, ()))
        if not widths:
            why = next((reason for layer in layers for reason in layer.missing), "there is neither attention nor MLP")
            raise InputError(f"nothing is known to write to the residual stream of {names[0]}: {why}")
        width = widths.most_common(1)[0][0]
        return cls(width, tuple(_of_width(layer, width) for layer in layers), _unembedding(model, matrices, width))

    @property
    def num_layers(self) -> int:
        """Blocks of the trunk."""
        return len(self.layers)

    def writers(self, layer: int) -> dict[str, WeightMatrix]:
        """The matrices of a layer that write to the stream, by name: whose change can be looked for in it."""
        found = self.layers[layer]
        return {one.matrix.name: one.matrix for part in WRITES for one in found.parts.get(part, ())}

    def is_last_stack(self, layer: int) -> bool:
        """Whether the head reads the stream of this layer: not that of an encoder before a decoder."""
        return self.layers[layer].stack == self.layers[-1].stack

    def parts(self, layer: int, *names: str) -> list[Part] | str:
        """The parts of these names; as text, why one of them is not there. At least one of them must be there."""
        found = self.layers[layer]
        chosen = [one for name in names for one in found.parts.get(name, ())]
        if not chosen:
            return self._why(found, names)
        refused = next((why for one in chosen if (why := _refusal(one.matrix)) is not None), None)
        return chosen if refused is None else refused

    def _why(self, layer: Layer, names: Sequence[str]) -> str:
        if names == ("gate",) and layer.parts.get("up"):
            return f"{layer.name}: {_NO_GATE}"
        if layer.missing:
            return layer.missing[0]
        return f"{layer.name} has no {' or '.join(names)}"

    def matrix(self, layer: int, name: str) -> list[Tensor] | str:
        """The matrices of one part in float64, (d_out, d_in): one for each MLP or attention of the layer."""
        chosen = self.parts(layer, name)
        return chosen if isinstance(chosen, str) else [one.load().to("cpu", torch.float64) for one in chosen]

    def read_gram(self, layer: int, *names: str) -> Tensor | str:
        """The sum of W'W over parts that read, (d, d) float64."""
        return self._summed(layer, names)

    def write_gram(self, layer: int, *names: str) -> Tensor | str:
        """The sum of W W' over parts that write, (d, d) float64."""
        return self._summed(layer, names)

    def _summed(self, layer: int, names: Sequence[str]) -> Tensor | str:
        found = self.layers[layer]
        there = [name for name in names if found.parts.get(name)]
        if not there or (found.missing and len(there) < len(names)):  # a part that is not known may be one of them
            return self._why(found, tuple(names))
        total: Tensor | None = None
        for name in there:
            one = self._gram(layer, name)
            if isinstance(one, str):
                return one
            total = one.clone() if total is None else total.add_(one)
        assert total is not None
        return total

    def _gram(self, layer: int, name: str) -> Tensor | str:
        """The Gram matrix of one part, kept while the same layer is asked for."""
        if self._recent[0] != layer:
            self._recent = (layer, {})
        known = self._recent[1]
        if name not in known:
            chosen = self.parts(layer, name)
            known[name] = chosen if isinstance(chosen, str) else _gram_of(chosen, name in _WRITING)
        return known[name]

    def head_gram(self) -> Tensor | str:
        """W'W of the unembedding, (d, d) float64."""
        if isinstance(self.head, str):
            return self.head
        return stream_gram(self.head.load(), writes=False)

    def heads(self, layer: int) -> tuple[int, int] | str:
        """Heads and key-value heads of self-attention."""
        found = self.layers[layer]
        return found.heads or self._why(found, ("heads of a known number",))

    def by_head(self, layer: int, name: str) -> Tensor | str:
        """Queries, keys or values with the rows of each head repeated for the queries it serves, float64."""
        heads, found = self.heads(layer), self.matrix(layer, name)
        if isinstance(heads, str):
            return heads
        if isinstance(found, str):
            return found
        (rows,), (count, shared) = found[:1], heads
        if name == "q" or count == shared:
            return rows
        grouped = rows.reshape(shared, -1, rows.shape[1])
        return grouped.repeat_interleave(count // shared, dim=0).reshape(-1, rows.shape[1])


def stream_gram(matrix: Tensor, *, writes: bool) -> Tensor:
    """W W' of a matrix (d, n) that writes to the stream, W'W of one (n, d) that reads: (d, d) float64, in pieces."""
    rows = matrix.detach().t() if writes else matrix.detach()
    height, width = rows.shape
    total = torch.zeros(width, width, dtype=torch.float64)
    for piece in rows.split(max(1, _CHUNK_ELEMENTS // width)) if height else ():
        chunk = piece.to("cpu", torch.float64)
        total.addmm_(chunk.T, chunk)
    return total


def _gram_of(parts: Sequence[Part], writes: bool) -> Tensor:
    grams = [stream_gram(one.load(), writes=writes) for one in parts]
    return torch.stack(grams).sum(0) if len(grams) > 1 else grams[0]


# ---------------------------------------------------------------- layout


def _circuits(model: nn.Module, matrices: Sequence[WeightMatrix]) -> tuple[Circuit, ...]:
    vectors = {one.name: one.shape[0] for one in iter_tensors(model) if not one.is_buffer and len(one.shape) == 1}
    to_dict = getattr(getattr(unwrap(model), "config", None), "to_dict", None)
    config: Any = to_dict() if callable(to_dict) else {}
    return find_circuits(matrices, vectors, config)


def _layer(name: str, circuits: Iterable[Circuit], matrices: Mapping[str, WeightMatrix]) -> Layer:
    parts: dict[str, list[Part]] = {}
    heads, missing = None, []
    for circuit in circuits:
        module = circuit.name.rpartition(":")[0]
        if module != name and not module.startswith(f"{name}."):
            continue
        is_cross = any(word in module.split(".") for word in _CROSS)
        if circuit.kind == "ov" and not is_cross:
            heads = circuit.heads
        if not circuit.readers and circuit.reason:
            missing.append(f"{module}: {circuit.reason}")
        for kind, part in _parts(circuit, matrices):
            known = parts.setdefault(f"cross_{kind}" if is_cross else kind, [])
            if not any(one.matrix is part.matrix and one.reader.rows == part.reader.rows for one in known):
                known.append(Part(part.matrix, part.reader, len(known)))
    return Layer(name, name.rpartition(".")[0], parts, heads, tuple(missing))


def _parts(circuit: Circuit, matrices: Mapping[str, WeightMatrix]) -> Iterator[tuple[str, Part]]:
    for kind, reader in circuit.readers.items():
        yield kind, Part(matrices[reader.matrix], reader, 0)


def _of_width(layer: Layer, width: int) -> Layer:
    """Without what does not touch a stream of this width: a tower of another size beside the trunk."""
    kept = {
        kind: found
        for kind, parts in layer.parts.items()
        if (found := [one for one in parts if _side(kind, one.matrix) == width])
    }
    odd = [
        f"{one.matrix.name} has {_side(kind, one.matrix)} numbers on the side of the stream, which is {width} wide"
        for kind, parts in layer.parts.items()
        for one in parts
        if _side(kind, one.matrix) != width
    ]
    return Layer(layer.name, layer.stack, kept, layer.heads, (*layer.missing, *odd))


def _side(kind: str, matrix: WeightMatrix) -> int:
    return matrix.d_out if kind in _WRITING else matrix.d_in


def _refusal(matrix: WeightMatrix) -> str | None:
    if matrix.refusal is not None:
        return f"{matrix.name}: {matrix.refusal}"
    if matrix.shard is not None:
        return f"{matrix.name} is sharded over processes: load the model in one"
    return None


def _unembedding(model: nn.Module, matrices: Sequence[WeightMatrix], width: int) -> WeightMatrix | str:
    """What turns the stream into logits: what the model says it is, else the last head of that width."""
    named = _output_name(unwrap(model))
    heads = [one for one in matrices if named is not None and named in (one.name, *one.tied_names)]
    if not heads:
        inner = ("pooler", "transform")
        heads = [
            one
            for one in matrices
            if one.family == "head" and not any(word in one.name.split(".") for word in inner)
        ]  # fmt: skip
    heads = [one for one in heads if one.d_in == width]
    if not heads:
        return "the model has no head that turns the stream into logits"
    return _refusal(heads[-1]) or heads[-1]


def _output_name(model: nn.Module) -> str | None:
    ask = getattr(model, "get_output_embeddings", None)
    try:
        output = ask() if callable(ask) else None
    except (NotImplementedError, AttributeError):  # what transformers does in a model without one
        return None
    path = next((name for name, module in model.named_modules() if module is output), None)
    return None if path is None else f"{clean_name(path)}.weight"
