"""Run a model on prompts and keep what candidates are made from.

Padding is taken off before the model sees it: prompts of one length make a batch, so left padding, right padding and
none give the same activations whatever the model's positions are. Hooks, training flags, gradients and the attention
implementation are afterwards as they were.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from weightproof.activations import forward_outputs, hooked, undisturbed
from weightproof.candidates.captures import Captures, Reading
from weightproof.errors import InputError
from weightproof.families import Block, blocks, clean_name, unwrap
from weightproof.forward.passes import whole

if TYPE_CHECKING:
    from weightproof.deltas import Delta

EVERYTHING = frozenset({"clean", "contrast", "attention", "mlp", "delta"})
# Up, down and gate below the module that holds them; `gate_up_proj` gives the gate, then the up-projection.
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
_ACTIVATIONS = ("hidden_act", "activation_function", "hidden_activation", "dense_act_fn", "activation", "ffn_act")
_STACKED = "its experts are stacked in one tensor: no up-projection is called that could be listened to"
_UNKNOWN_MLP = "it has no MLP of a known kind"
_NOT_CALLED = "its projections are not called as modules, so that nothing could be listened to"
_MLP_KEYS = ("up_input", "up_output", "activated")
_NO_ATTENTION = "its attention does not give weights, not even with attn_implementation='eager'"

Batch = Mapping[str, Tensor]


def capture(  # noqa: PLR0913 - keyword-only options
    model: nn.Module,
    clean: Batch,
    positive: Batch | None = None,
    negative: Batch | None = None,
    *,
    delta: Delta | None = None,
    alphas: tuple[float, float] = (1.0, -1.0),
    block_names: str | Sequence[str] | None = None,
    needs: Collection[str] = EVERYTHING,
    batch_size: int = 8,
    seed: int | None = None,
) -> Captures:
    """Read the activations that candidates are made from.

    Args:
        model: The base model; it is left as it was.
        clean: Tokenised prompts as a tokenizer gives them: `input_ids` (n, T) and, where there is padding on either
            side, `attention_mask`; any other input of (n, T) is cut alike.
        positive: As `clean`, prompts that ask for a behaviour.
        negative: The same prompts asking against it, in the same order.
        delta: A change of the weights whose effect on the clean prompts is read.
        alphas: At which multiples of it: first minus second; (1, 0) is the adapter on and off.
        block_names: Name of the list of blocks, or names of the blocks in their order; None: they are looked for.
        needs: What candidates need: of "clean", "contrast", "attention", "mlp" and "delta".
        batch_size: Prompts of one length in a pass.
        seed: See `Captures.seed`.

    Raises:
        InputError: There are fewer than two prompts, pairs that do not pair up, no list of blocks or several, or the
            model does not run on the prompts.
    """
    chosen = chosen_blocks(model, block_names)
    prompts = _prompts("clean", clean)
    mlp = "mlp" in needs
    read = _Reader(model, chosen, batch_size)
    found = read(prompts, mlp=mlp)
    pair: list[Reading] = []
    if "contrast" in needs and (positive is not None or negative is not None):
        sides = _pairs(positive, negative)
        tokens = "attention" in needs
        with _eager(model) if tokens else contextlib.nullcontext():
            pair = [read(side, mlp=mlp, tokens=tokens) for side in sides]
    steered = None
    if delta is not None and "delta" in needs:
        steered = _steered(read, prompts, delta, alphas)
    return Captures(
        layers=tuple(block.name for block in chosen),
        clean=found,
        positive=pair[0] if pair else None,
        negative=pair[1] if pair else None,
        steered=steered,
        activation=_activation_name(model),
        seed=seed,
    )


def _steered(read: _Reader, prompts: list[dict[str, Tensor]], delta: Delta, alphas: tuple[float, float]) -> Tensor:
    from weightproof.steering import steer

    streams: list[Tensor] = []
    for alpha in alphas:
        with steer(read.model, delta, alpha):
            streams.append(read(prompts).stream[1:])
    return streams[0] - streams[1]


# ---------------------------------------------------------------- prompts


def _prompts(which: str, batch: Batch) -> list[dict[str, Tensor]]:
    """Every prompt by itself, without padding: each input of (n, T) keeps its real tokens."""
    ids = batch.get("input_ids")
    if ids is None or ids.ndim != 2:
        raise InputError(f"the {which} prompts must be tokenised: a mapping with input_ids of (prompts, tokens)")
    if len(ids) < 2:
        raise InputError(
            f"there must be at least two {which} prompts, one to fit and one to score; there is {len(ids)}"
        )
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device) != 0
    if empty := [row for row in range(len(ids)) if not bool(real[row].any())]:
        raise InputError(f"{which} prompt {empty[0]} has no real token: its attention_mask is all zero")
    found: list[dict[str, Tensor]] = []
    for row in range(len(ids)):
        items = {key: value[row] for key, value in batch.items() if key not in ("attention_mask", "labels")}
        found.append({k: v[real[row].to(v.device)] if v.shape == ids.shape[1:] else v for k, v in items.items()})
    return found


def _pairs(positive: Batch | None, negative: Batch | None) -> list[list[dict[str, Tensor]]]:
    if positive is None or negative is None:
        raise InputError("a contrast needs positive and negative prompts, in pairs; one of them is missing")
    sides = [_prompts("positive", positive), _prompts("negative", negative)]
    if len(sides[0]) != len(sides[1]):
        raise InputError(f"prompts must be in pairs: there are {len(sides[0])} positive and {len(sides[1])} negative")
    return sides


def _batches(prompts: Sequence[Batch], size: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Prompts of one length together, with their numbers."""
    lengths: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        lengths.setdefault(prompt["input_ids"].shape[0], []).append(index)
    for _, members in sorted(lengths.items()):
        for start in range(0, len(members), size):
            rows = members[start : start + size]
            yield rows, {key: torch.stack([prompts[row][key] for row in rows]) for key in prompts[rows[0]]}


# ---------------------------------------------------------------- blocks


def chosen_blocks(model: nn.Module, names: str | Sequence[str] | None = None) -> tuple[Block, ...]:
    """The blocks that the residual stream runs through, in their order.

    Raises:
        InputError: There is no list of blocks, there are several and none is named, or a name is not there.
    """
    if names is not None:
        return _named_blocks(model, names)
    found = blocks(model)
    lists = list(dict.fromkeys(block.name.rpartition(".")[0] for block in found))
    if not lists:
        raise InputError(
            f"{type(unwrap(model)).__name__} has no list of repeated blocks that is known: name it, for example "
            "block_names='encoder.layers' (--blocks encoder.layers), or name its blocks in their order"
        )
    if len(lists) > 1:
        raise InputError(
            f"{type(unwrap(model)).__name__} has {len(lists)} lists of blocks ({', '.join(lists)}): name the one to "
            f"look at, for example block_names={lists[-1]!r} (--blocks {lists[-1]})"
        )
    return found


def _named_blocks(model: nn.Module, names: str | Sequence[str]) -> tuple[Block, ...]:
    modules = {clean_name(name): module for name, module in unwrap(model).named_modules() if name}
    wanted = [names] if isinstance(names, str) else list(names)
    if missing := [name for name in wanted if name not in modules]:
        raise InputError(
            f"the model has no module {missing[0]!r}: block_names (--blocks) must name its blocks, or their list"
        )
    if not isinstance(names, str):
        return tuple(Block(name, modules[name]) for name in wanted)
    found = tuple(Block(f"{names}.{child}", module) for child, module in modules[names].named_children())
    if not found:
        raise InputError(f"{names!r} holds no modules: block_names (--blocks) must name the list of the blocks")
    return found


@dataclass(frozen=True)
class _MLP:
    """The modules of one MLP that are listened to."""

    up: nn.Module
    down: nn.Module
    gate: nn.Module | None
    fused: bool


def _mlp_of(block: Block) -> _MLP | str:
    modules: dict[str, nn.Module] = {}
    for path, module in block.module.named_modules():
        modules.setdefault(clean_name(path), module)
    for path, module in modules.items():
        for up, down, gate in _MLPS:
            root = path.removesuffix(up)
            if path != f"{root}{up}" or (root and not root.endswith(".")) or "experts" in path:
                continue
            if f"{root}{down}" in modules and (gate is None or f"{root}{gate}" in modules):
                gating = None if gate is None else modules[f"{root}{gate}"]
                return _MLP(module, modules[f"{root}{down}"], gating, fused=up == "gate_up_proj")
    return _STACKED if any("experts" in path for path in modules) else _UNKNOWN_MLP


def _activation_name(model: nn.Module) -> str | None:
    config = getattr(unwrap(model), "config", None)
    text = getattr(config, "text_config", None) or config
    return next((name for key in _ACTIVATIONS if isinstance(name := getattr(text, key, None), str)), None)


@contextlib.contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Attention computed step by step, so that its weights can be seen; only where the model knows of it."""
    found: list[Any] = [getattr(module, "config", None) for module in unwrap(model).modules()]
    configs = list({id(config): config for config in found if hasattr(config, "_attn_implementation")}.values())
    were = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, was in zip(configs, were, strict=True):
            config._attn_implementation = was


# ---------------------------------------------------------------- one pass after the other


@dataclass
class _Seen:
    """What the hooks saw in one pass, of prompts of one length: all tokens of the stream, or the first and the last."""

    all_tokens: bool
    shape: tuple[int, ...] = ()
    stream: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    mlp: dict[tuple[int, str], Tensor] = field(default_factory=dict[tuple[int, str], Tensor])
    attention: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def begin(self, shape: tuple[int, ...]) -> None:
        """Forget the last pass; the next one is of prompts of this shape."""
        self.shape = shape
        for held in (self.stream, self.mlp, self.attention):
            held.clear()

    def of_stream(self, values: Tensor) -> Tensor:
        """What is kept of a state of the stream; as it came where it is something else."""
        by_token = _by_token(values, self.shape)
        if by_token is None:
            return _kept(values)
        return _kept(by_token if self.all_tokens else by_token[:, [0, -1]])

    def of_mlp(self, values: Tensor) -> Tensor | None:
        """The last token of what was seen in an MLP."""
        by_token = _by_token(values, self.shape)
        return None if by_token is None else _kept(by_token[:, -1])


class _Reader:
    """Reads sets of prompts of one model."""

    def __init__(self, model: nn.Module, chosen: Sequence[Block], batch_size: int) -> None:
        self.model = model
        self._blocks = chosen
        self._size = max(1, batch_size)

    def __call__(self, prompts: Sequence[Batch], *, mlp: bool = False, tokens: bool = False) -> Reading:
        """One pass for each batch."""
        seen = _Seen(all_tokens=tokens)
        mlps = [_mlp_of(block) for block in self._blocks] if mlp else []
        ends: dict[int, tuple[Tensor, Tensor]] = {}
        inner: dict[int, dict[tuple[int, str], Tensor]] = {}
        sequences: dict[int, Tensor] = {}
        attention: dict[int, Tensor] = {}
        with undisturbed(self.model), hooked(*self._hooks(seen, mlps, tokens=tokens)):
            for rows, batch in _batches(prompts, self._size):
                seen.begin(batch["input_ids"].shape)
                forward_outputs(self.model, batch)
                stream = self._stream(seen, rows)
                for place, row in enumerate(rows):
                    ends[row] = stream[:, place, -1].clone(), stream[:, place, 0].clone()
                    inner[row] = {key: values[place] for key, values in seen.mlp.items()}
                    if tokens:
                        sequences[row] = stream[1:, place].clone()
                        if len(seen.attention) == len(self._blocks):
                            attention[row] = torch.stack([seen.attention[i][place] for i in range(len(self._blocks))])
        order = range(len(prompts))
        whys = self._unread_mlps(mlps, inner[0])
        gaps = {"mlp": whys[0]} if whys else {}
        if tokens and len(attention) < len(prompts):
            attention, gaps = {}, {**gaps, "attention": _NO_ATTENTION}
        return Reading(
            stream=torch.stack([ends[row][0] for row in order], 1),
            first=torch.stack([ends[row][1] for row in order], 1),
            sequences=tuple(sequences[row] for row in order) if tokens else (),
            attention=tuple(attention[row] for row in order) if attention else (),
            mlp=_by_layer([inner[row] for row in order], len(self._blocks)) if mlp and not whys else (),
            gaps=gaps,
        )

    def _unread_mlps(self, mlps: Sequence[_MLP | str], read: Mapping[tuple[int, str], Tensor]) -> list[str]:
        """Why something of the MLPs was not read, by block."""
        whys: list[str] = []
        for index, (block, one) in enumerate(zip(self._blocks, mlps, strict=False)):
            if isinstance(one, str):
                whys.append(f"{block.name}: {one}")
            elif any((index, key) not in read for key in _MLP_KEYS):
                whys.append(f"{block.name}: {_NOT_CALLED}")
        return whys

    def _stream(self, seen: _Seen, rows: Sequence[int]) -> Tensor:
        """(L + 1, rows, T or 2, d) of one pass.

        Raises:
            InputError: A block was not called, or its output is no finite stream of this shape.
        """
        found: list[Tensor] = []
        for index in range(len(self._blocks) + 1):
            name = self._blocks[max(0, index - 1)].name
            if index not in seen.stream:
                raise InputError(
                    f"{name} gave no tensor on these prompts: block_names (--blocks) must name blocks that are called"
                )
            values = seen.stream[index]
            if values.ndim != 3 or len(values) != len(rows) or (found and values.shape != found[0].shape):
                raise InputError(
                    f"{name} gives {list(values.shape)} for prompts of {list(seen.shape)}: it is no block of a "
                    "residual stream (prompts, tokens, width)"
                )
            if not bool(torch.isfinite(values).all()):
                raise InputError(f"the activations of {name} are not finite on prompt {rows[0]} or one in its batch")
            found.append(values)
        return torch.stack(found)

    def _hooks(self, seen: _Seen, mlps: Sequence[_MLP | str], *, tokens: bool) -> list[RemovableHandle]:
        """The hooks of one reading; attention is looked for where whole sequences are kept."""
        first = self._blocks[0].module

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (found := _tensor((*args, *kwargs.values()))) is not None:
                seen.stream[0] = seen.of_stream(found)

        handles = [first.register_forward_pre_hook(enter, with_kwargs=True)]
        for index, block in enumerate(self._blocks):
            handles.append(block.module.register_forward_hook(_note_stream(seen, index + 1)))
            if tokens:
                inside = [module for module in block.module.modules() if module is not block.module]
                handles += [module.register_forward_hook(_note_attention(seen, index)) for module in inside]
        for index, one in enumerate(mlps):
            if isinstance(one, _MLP):
                handles += _mlp_hooks(seen, index, one)
        return handles


def _tensor(values: Any) -> Tensor | None:
    """The first floating tensor of what a module was given or gives."""
    if isinstance(values, Tensor):
        return values if values.is_floating_point() else None
    if isinstance(values, (tuple, list)):
        return next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)
    return None


def _kept(values: Tensor) -> Tensor:
    return whole(values).detach().to("cpu", torch.float32)


def _note_stream(seen: _Seen, index: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        if (found := _tensor(output)) is not None:
            seen.stream[index] = seen.of_stream(found)

    return hook


def _note_attention(seen: _Seen, layer: int) -> Callable[..., None]:
    """Attention weights are known by what they are: (rows, heads, T, T), each row a distribution."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        for value in output if isinstance(output, (tuple, list)) else ():
            square = isinstance(value, Tensor) and value.ndim == 4 and value.shape[-1] == value.shape[-2]
            if layer in seen.attention or not square or not value.is_floating_point():
                continue
            last = whole(value)[:, :, -1].detach().to("cpu", torch.float32)
            if bool((last >= 0).all()) and bool(((last.sum(-1) - 1.0).abs() < 0.01).all()):
                seen.attention[layer] = last.mean(1)

    return hook


def _mlp_hooks(seen: _Seen, layer: int, mlp: _MLP) -> list[RemovableHandle]:
    """What an MLP is given, what its projections give, and what its down-projection is given."""

    def note(key: str, values: Any) -> None:
        found = _tensor(values)
        if found is not None and (last := seen.of_mlp(found)) is not None:
            seen.mlp[layer, key] = last

    def given(key: str) -> Callable[..., None]:
        return lambda _module, args: note(key, args)

    def gives(key: str) -> Callable[..., None]:
        return lambda _module, _args, output: note(key, output)

    def split(_module: nn.Module, _args: Any, output: Tensor) -> None:
        for key, values in zip(("gate_output", "up_output"), output.chunk(2, dim=-1), strict=True):
            note(key, values)

    handles = [
        mlp.up.register_forward_pre_hook(given("up_input")),
        mlp.up.register_forward_hook(split if mlp.fused else gives("up_output")),
        mlp.down.register_forward_pre_hook(given("activated")),
    ]
    if mlp.gate is not None:
        handles.append(mlp.gate.register_forward_hook(gives("gate_output")))
    return handles


def _by_layer(prompts: Sequence[Mapping[tuple[int, str], Tensor]], count: int) -> tuple[dict[str, Tensor], ...]:
    """What was read of each MLP, (prompts, width)."""
    found: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for layer, key in prompts[0]:
        found[layer][key] = torch.stack([one[layer, key] for one in prompts])
    return tuple(found)


def _by_token(values: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """(rows, T, width) of values that may have come flattened; None where they are something else."""
    if values.ndim == 3 and values.shape[:2] == shape:
        return values
    return values.reshape(*shape, -1) if values.ndim == 2 and values.shape[0] == math.prod(shape) else None
