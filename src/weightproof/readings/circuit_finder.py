"""Which matrices of a model form circuits: attention heads and MLPs by the names of their parts.

Works from names, sizes and the model's config alone, so that a model in memory and a folder on disk give the same
circuits. What looks like attention or an MLP and is laid out in no known way is listed with a reason, never left out.

Gains: that of the norm in front is folded into what reads its output, as far as the architecture is known to be
pre-norm. Folding too little is harmless for everything but the edit that moves a gain into the matrices behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from weightproof.numerics.circuit_products import (
    HeadNorm,
    Reader,
    Rows,
    gate_norms,
    head_product,
    neuron_products,
)
from weightproof.types import WeightMatrix

# Parts by their names below the module that holds them: query, key, value, candidates for the output.
_SEPARATE = (
    ("q_proj", "k_proj", "v_proj", ("o_proj", "out_proj")),
    ("self.query", "self.key", "self.value", ("output.dense",)),
    ("attention.query", "attention.key", "attention.value", ("output.dense",)),
    ("q", "k", "v", ("o",)),
    ("q_lin", "k_lin", "v_lin", ("out_lin",)),
)
# One matrix for the three: its name, candidates for the output.
_FUSED = (
    ("c_attn", ("c_proj",)),
    ("query_key_value", ("dense",)),
    ("Wqkv", ("out_proj",)),
    ("qkv_proj", ("o_proj",)),
)
# How its rows lie, by `model_type`: all queries, all keys, all values; or the three of each head together.
_STACKED = frozenset({"gpt2", "phi3", "mpt"})
_BY_HEAD = frozenset({"gpt_neox", "bloom"})
# Up, down and gate; `gate_up_proj` holds the gate above the up-projection.
_MLPS = (
    ("gate_up_proj", "down_proj", None),
    ("up_proj", "down_proj", "gate_proj"),
    ("c_fc", "c_proj", None),
    ("fc1", "fc2", None),
    ("fc_in", "fc_out", None),
    ("dense_h_to_4h", "dense_4h_to_h", None),
    ("wi_1", "wo", "wi_0"),
    ("wi", "wo", None),
    ("w3", "w2", "w1"),
    ("lin1", "lin2", None),
    ("intermediate.dense", "output.dense", None),
)
_BEFORE_ATTENTION = (
    "input_layernorm", "ln_1", "self_attn_layer_norm", "layernorm_before", "layer_norm", "layer_norm1", "norm_1",
)  # fmt: skip
_BEFORE_CROSS = ("encoder_attn_layer_norm", "layer_norm")
_BEFORE_MLP = (
    "pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "final_layer_norm", "layernorm_after",
    "layer_norm", "layer_norm2", "norm_2",
)  # fmt: skip
# Their norms of these names stand behind a sub-layer and feed the residual stream too.
_POST_NORM = frozenset({"bart", "marian", "blenderbot-small", "openai-gpt", "xlm", "olmo2", "olmo3"})
# Norms that multiply by 1 + weight.
_PLUS_ONE = re.compile(r"(?:gemma[23]?(?:_text)?|recurrent_gemma|qwen3_next|nemotron)")
# f(c x) = c^n f(x) for c > 0.
_DEGREES = {"relu": 1, "leaky_relu": 1, "relu2": 2, "relu_squared": 2}
_STACK = re.compile(r"(.+)(\[\d+\])")
_COUNTS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_HEAD_DIMS = ("head_dim", "d_kv", "attention_head_size")
_ACTIVATIONS = ("hidden_act", "activation_function", "hidden_activation", "dense_act_fn", "activation", "ffn_act")

UNKNOWN = "the layout of its heads or neurons is not known"


@dataclass(frozen=True)
class Circuit:
    """One product of matrices in one layer, and how to compute its values.

    Attributes:
        name: Module and product, such as `model.layers.0.self_attn:qk`.
        kind: "qk", "ov" or "mlp".
        matrices: Names of its weight matrices.
        vectors: Names of the gains folded in.
        compute: From all of these by name to the values, a float64 tensor of any shape; None with a `reason`.
        most: How many numbers are kept of it (see `circuits.summary`); None for the usual number.
        reason: Why it cannot be measured.
        readers: Its parts, as "q", "k", "v", "o", "up", "gate", "down" ("qkv" where the three cannot be told apart).
        heads: Heads, and key-value heads; None for an MLP, or where they are not known.
    """

    name: str
    kind: str
    matrices: tuple[str, ...]
    vectors: tuple[str, ...] = ()
    compute: Any = None
    most: int | None = None
    reason: str | None = None
    readers: Mapping[str, Reader] = field(default_factory=dict[str, Reader])
    heads: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Model:
    """What the finder knows of a model: names without `.weight`, sizes, and its config."""

    names: Mapping[str, WeightMatrix]
    vectors: Mapping[str, int]
    config: Mapping[str, Any]
    used: set[str] = field(default_factory=set)
    roots: set[str] = field(default_factory=set)

    def facts(self, name: str) -> Mapping[str, Any]:
        """The config of the part of a composite model that a module lies in."""
        parts = name.split(".")
        for key, inner in self.config.items():
            stem = key.removesuffix("_config")
            is_part = stem != key and isinstance(inner, Mapping)
            if is_part and any(part == stem or part.startswith(f"{stem}_") for part in parts):
                return {"model_type": "", **inner}
        text = self.config.get("text_config")
        return text if isinstance(text, Mapping) and not _first(self.config, _COUNTS) else self.config

    def gain(self, *names: str) -> str | None:
        """The first of these norms that is there, as the name of its weight."""
        return next((f"{name}.weight" for name in names if f"{name}.weight" in self.vectors), None)


def find_circuits(
    matrices: Sequence[WeightMatrix], vectors: Mapping[str, int], config: Mapping[str, Any]
) -> tuple[Circuit, ...]:
    """Every circuit of a model, in the order of its matrices.

    Args:
        matrices: All of them; refused ones too.
        vectors: Public name of every one-dimensional parameter, and its length.
        config: The model's config as a mapping (`config.to_dict()`, or `config.json`); may be empty.
    """
    names = {one.name.removesuffix(".weight"): one for one in matrices if ".lora_" not in one.name}
    model = _Model(names, vectors, config)
    found = [*_attentions(model), *_mlps(model)]
    circuits = [_with_refusals(one, names) for one in found] + list(_unknown(model))
    order = {one.name: index for index, one in enumerate(matrices)}
    return tuple(sorted(circuits, key=lambda one: (min(order[name] for name in one.matrices), one.name)))


def _with_refusals(circuit: Circuit, names: Mapping[str, WeightMatrix]) -> Circuit:
    for name in circuit.matrices:
        refusal = names[name.removesuffix(".weight")].refusal
        if refusal is not None:
            return Circuit(circuit.name, circuit.kind, circuit.matrices, reason=f"{name}: {refusal}")
    return circuit


def _unknown(model: _Model) -> Iterator[Circuit]:
    """What belongs to attention or an MLP and to no circuit, by the module that holds it."""
    groups: dict[str, list[WeightMatrix]] = {}
    for name, matrix in model.names.items():
        stem = _STACK.fullmatch(name)
        root = (stem.group(1) if stem else name).rpartition(".")[0]
        if matrix.family in ("attn", "ffn", "expert") and name not in model.used and root not in model.roots:
            groups.setdefault(root, []).append(matrix)
    for root, members in groups.items():
        kind = "qk" if members[0].family == "attn" else "mlp"
        yield Circuit(f"{root}:{kind}", kind, tuple(one.name for one in members), reason=UNKNOWN)


# ---------------------------------------------------------------- attention


def _attentions(model: _Model) -> Iterator[Circuit]:
    for name in list(model.names):
        for q, k, v, outputs in _SEPARATE:
            root = name.removesuffix(f".{q}")
            output = _part_of(model, root, outputs)
            if root != name and output and {f"{root}.{k}", f"{root}.{v}"} <= model.names.keys():
                yield from _separate(model, root, (name, f"{root}.{k}", f"{root}.{v}", output))
        for fused, outputs in _FUSED:
            root = name.removesuffix(f".{fused}")
            output = _part_of(model, root, outputs)
            if root != name and output and f"{root}.q_attn" not in model.names:
                yield from _fused(model, root, name, output)


def _part_of(model: _Model, root: str, parts: Sequence[str]) -> str | None:
    return next((f"{root}.{part}" for part in parts if f"{root}.{part}" in model.names), None)


def _separate(model: _Model, root: str, names: tuple[str, str, str, str]) -> Iterator[Circuit]:
    q, k, v, o = (model.names[name] for name in names)
    model.used.update(names)
    model.roots.add(root)
    facts = model.facts(root)
    heads = _head_counts(facts, root)
    if heads is None or not _fits(heads, q, k, v, o):
        yield from _unsized(root, {"q": q, "k": k}, {"o": o, "v": v})
        return
    gains = _attention_gains(model, root, facts)
    readers = [
        Reader(m.name, None, gain, _adds_one(facts)) for m, gain in ((q, gains[0]), (k, gains[1]), (v, gains[1]))
    ]
    norms = [HeadNorm(model.gain(f"{root}.{part}"), _adds_one(facts)) for part in ("q_norm", "k_norm")]
    yield from _heads(root, heads, (readers[0], readers[1], readers[2]), o.name, (norms[0], norms[1]))


def _fused(model: _Model, root: str, name: str, output: str) -> Iterator[Circuit]:
    matrix, o = model.names[name], model.names[output]
    model.used.update((name, output))
    model.roots.add(root)
    facts = model.facts(root)
    heads, model_type = _head_counts(facts, root), facts.get("model_type")
    rows = _fused_rows(matrix, heads, str(model_type))
    if heads is None or rows is None or o.d_in % heads[0]:
        yield from _unsized(root, {"qkv": matrix}, {"o": o, "qkv": matrix})
        return
    gain = _attention_gains(model, root, facts)[0]
    readers = [Reader(matrix.name, part, gain, _adds_one(facts)) for part in rows]
    yield from _heads(root, heads, (readers[0], readers[1], readers[2]), o.name, (HeadNorm(None), HeadNorm(None)))


def _unsized(root: str, reading: Mapping[str, WeightMatrix], writing: Mapping[str, WeightMatrix]) -> Iterator[Circuit]:
    reason = f"{UNKNOWN}: the config does not say how many heads it has"
    for kind, members in (("qk", reading), ("ov", writing)):
        names = tuple(one.name for one in members.values())
        readers = {part: Reader(one.name, None, None, transposed=part == "o") for part, one in members.items()}
        yield Circuit(f"{root}:{kind}", kind, names, reason=reason, readers=readers)


def _heads(
    root: str,
    heads: tuple[int, int],
    readers: tuple[Reader, Reader, Reader],
    output: str,
    norms: tuple[HeadNorm, HeadNorm],
) -> Iterator[Circuit]:
    q, k, v = readers
    vectors = _distinct(q.gain, k.gain, norms[0].gain, norms[1].gain)
    compute = partial(head_product, heads, (q, k), norms)
    names = _distinct(q.matrix, k.matrix)
    yield Circuit(f"{root}:qk", "qk", names, vectors, compute, readers={"q": q, "k": k}, heads=heads)
    o = Reader(output, None, None, transposed=True)
    compute = partial(head_product, heads, (o, v), (HeadNorm(None), HeadNorm(None)))
    names = _distinct(output, v.matrix)
    yield Circuit(f"{root}:ov", "ov", names, _distinct(v.gain), compute, readers={"o": o, "v": v}, heads=heads)


def _distinct(*names: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name is not None))


def _first(facts: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    found = next((facts[key] for key in keys if facts.get(key) is not None), None)
    return found if isinstance(found, int) and found > 0 else None


def _head_counts(facts: Mapping[str, Any], root: str) -> tuple[int, int] | None:
    """Heads, and key-value heads; an encoder-decoder may have other numbers on each side."""
    side = next((part for part in root.split(".") if part in ("encoder", "decoder")), "")
    count = _first(facts, (f"{side}_attention_heads", *_COUNTS))
    shared = _first(facts, _KV_COUNTS) or count
    return None if count is None or shared is None or count % shared else (count, shared)


def _fits(heads: tuple[int, int], q: WeightMatrix, k: WeightMatrix, v: WeightMatrix, o: WeightMatrix) -> bool:
    count, shared = heads
    if q.d_out % count or k.d_out % shared or v.d_out % shared:
        return False
    return q.d_out // count == k.d_out // shared and o.d_in == v.d_out // shared * count


def _fused_rows(matrix: WeightMatrix, heads: tuple[int, int] | None, model_type: str) -> tuple[Rows, Rows, Rows] | None:
    """Where queries, keys and values lie in one matrix."""
    if heads is None:
        return None
    count, shared = heads
    if model_type in _STACKED and matrix.d_out % (count + 2 * shared) == 0:
        size = matrix.d_out // (count + 2 * shared)
        ends = (0, count * size, (count + shared) * size, (count + 2 * shared) * size)
        return Rows(ends[0], ends[1]), Rows(ends[1], ends[2]), Rows(ends[2], ends[3])
    if model_type in _BY_HEAD and matrix.d_out % (3 * count) == 0:
        return Rows(0, 1, num_groups=count), Rows(1, 2, num_groups=count), Rows(2, 3, num_groups=count)
    return None


# ---------------------------------------------------------------- norms


def _adds_one(facts: Mapping[str, Any]) -> bool:
    return _PLUS_ONE.fullmatch(str(facts.get("model_type"))) is not None


def _is_pre_norm(facts: Mapping[str, Any]) -> bool:
    return str(facts.get("model_type")) not in _POST_NORM and facts.get("do_layer_norm_before", True) is not False


def _above(root: str) -> list[str]:
    """Modules above one, the nearest first: its norm is a sibling, or a sibling of what holds it."""
    parts = root.split(".")
    return [".".join(parts[:-cut]) for cut in (1, 2) if cut < len(parts)]


def _attention_gains(model: _Model, root: str, facts: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The gain in front of the queries, and the one in front of keys and values."""
    if not _is_pre_norm(facts):
        return None, None
    is_cross = root.endswith((".encoder_attn", ".EncDecAttention"))
    names = _BEFORE_CROSS if is_cross else _BEFORE_ATTENTION
    own = model.gain(*(f"{above}.{name}" for above in _above(root) for name in names))
    if not is_cross:
        return own, own
    outer = root.partition("decoder.")[0]
    return own, model.gain(f"{outer}encoder.final_layer_norm", f"{outer}encoder.layer_norm")


def _mlp_gain(model: _Model, root: str, facts: Mapping[str, Any]) -> str | None:
    if not _is_pre_norm(facts):
        return None
    places = [root, *_above(root)] if f"{root}.fc1" in model.names else _above(root)
    for place in places:
        names = [f"{place}.{name}" for name in _BEFORE_MLP if name != "post_attention_layernorm"]
        if f"{place}.input_layernorm.weight" in model.vectors:
            names.insert(1, f"{place}.post_attention_layernorm")
        found = model.gain(*names, f"{place}.input_layernorm", f"{place}.ln_1")  # one norm for both sub-layers
        if found is not None:
            return found
    return None


# ---------------------------------------------------------------- MLPs


def _mlps(model: _Model) -> Iterator[Circuit]:
    for name in list(model.names):
        stem = _STACK.fullmatch(name)
        plain, index = (stem.group(1), stem.group(2)) if stem else (name, "")
        for up, down, gate in _MLPS:
            root = plain.removesuffix(f".{up}")
            parts = [f"{root}.{part}{index}" for part in (down, gate) if part is not None]
            if root == plain or name in model.used or not set(parts) <= model.names.keys():
                continue
            gated = parts[1] if gate is not None else None
            yield from _mlp(model, f"{root}{index}", name, parts[0], gated)


def _mlp(model: _Model, root: str, up: str, down: str, gate: str | None) -> Iterator[Circuit]:
    """Up times down for every neuron, and what else of it is fixed: see `docs/guards/circuits.md`."""
    module = root.partition("[")[0]
    facts = model.facts(module)
    model.used.update(name for name in (up, down, gate) if name is not None)
    model.roots.add(module)
    first, last = model.names[up], model.names[down]
    is_fused = up.partition("[")[0].endswith("gate_up_proj")
    if first.d_out != last.d_in * (2 if is_fused else 1) or (is_fused and facts.get("model_type") == "gpt_oss"):
        names = tuple(model.names[name].name for name in (up, down))
        yield Circuit(f"{root}:mlp", "mlp", names, reason=UNKNOWN)
        return
    gain, plus, half = _mlp_gain(model, module, facts), _adds_one(facts), last.d_in
    reader = Reader(first.name, Rows(half, 2 * half) if is_fused else None, gain, plus)
    gating = Reader(first.name, Rows(0, half), gain, plus) if is_fused else None
    if gate is not None:
        gating = Reader(model.names[gate].name, None, gain, plus)
    yield from _neurons(root, reader, gating, last.name, _degree(facts), _share(model, root))


def _neurons(  # noqa: PLR0913, PLR0917 - the parts of one MLP
    root: str, up: Reader, gate: Reader | None, down: str, degree: int | None, most: int | None
) -> Iterator[Circuit]:
    vectors = _distinct(up.gain)
    # The up branch of a gated MLP is linear; without a gate it passes a scale on as its activation does.
    own_degree = 1 if gate is not None else degree or 1
    # A gate under a ReLU can pass its own scale on, too.
    gates = None if gate is None or degree is None else (gate, degree)
    matrices = _distinct(up.matrix, down, None if gates is None else gates[0].matrix)
    compute = partial(neuron_products, (up, own_degree), gates, down)
    parts = {"up": up, "down": Reader(down, None, None, transposed=True)} | ({} if gate is None else {"gate": gate})
    yield Circuit(f"{root}:up*down", "mlp", matrices, vectors, compute, most, readers=parts)
    if degree is None:
        alone = gate or up
        what = "gate" if gate is not None else "up"
        compute = partial(gate_norms, alone)
        yield Circuit(f"{root}:{what}", "mlp", (alone.matrix,), vectors, compute, most)


def _degree(facts: Mapping[str, Any]) -> int | None:
    """The degree of homogeneity of the activation, None where it has none or is not known."""
    name = next((facts[key] for key in _ACTIVATIONS if isinstance(facts.get(key), str)), None)
    if name is None and isinstance(projection := facts.get("feed_forward_proj"), str):
        name = projection.removeprefix("gated-")
    return _DEGREES.get(str(name))


def _share(model: _Model, root: str) -> int | None:
    """Fewer numbers of each expert where there are many of them."""
    stem = _STACK.fullmatch(root)
    if stem is None:
        return None
    members = sum(name.startswith(f"{stem.group(1)}.down_proj[") for name in model.names)
    return max(32, 512 // max(1, members))
