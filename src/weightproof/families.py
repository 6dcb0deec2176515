"""Names: public names without wrappers, families of matrices, blocks of the trunk and their taps.

The only table from names to families, and the only place that knows what the modules of an
architecture are called. Families are decided from whole components of a dotted name, nearest to
the weight first (`gate_proj` is ffn, the `mlp.gate` of a mixture of experts is router, `c_proj`
is attn or ffn by its parent), and only where no component is known from the module's class.

Token mixing is `attn` whatever does it: the `mixer` of a state-space block counts as attention.
A dense MLP that runs beside the experts (`shared_expert`) is `ffn`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

_WRAPPER_PREFIX = re.compile(r"^(?:module|base_model\.model)\.")
_WRAPPER_PARTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_SAVED_MODULE = "modules_to_save.default"


def _without_wrappers(name: str, parts: frozenset[str]) -> str:
    name = ".".join(part for part in name.split(".") if part not in parts)
    while stripped := _WRAPPER_PREFIX.match(name):
        name = name[stripped.end() :]
    return name


def clean_name(name: str) -> str:
    """The public name of a module or tensor: no trace of DDP, torch.compile, checkpointing or PEFT.

    `base_layer` and `modules_to_save.default` collapse onto the module they stand for;
    `lora_A.default` and `original_module` stay, they are tensors of their own.

    Example:
        >>> clean_name("module.base_model.model.h.0.attn.c_attn.base_layer.weight")
        'h.0.attn.c_attn.weight'
    """
    name = _without_wrappers(name, _WRAPPER_PARTS | {"base_layer"})
    return name.replace(f".{_SAVED_MODULE}.", ".").removesuffix(f".{_SAVED_MODULE}")


def public_names(raw_names: Iterable[str]) -> dict[str, str]:
    """Raw name -> public name, one to one.

    Where two would meet (a LoRA layer and its `base_layer`), the first keeps the clean name and the
    other keeps its PEFT components, or its whole raw name. No name is taken that is the raw name of another.
    """
    raws = list(raw_names)
    public: dict[str, str] = {}
    taken = set(raws)
    for raw in raws:
        candidates = (clean_name(raw), _without_wrappers(raw, _WRAPPER_PARTS))
        public[raw] = next((name for name in candidates if name == raw or name not in taken), raw)
        taken.add(public[raw])
    return public


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile, however nested.

    A PEFT model is returned as it is: its adapters are part of the model (see `clean_name`).
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


# ---------------------------------------------------------------- families

_CONV_CLASS = re.compile(r"(?:Lazy)?Conv(?:Transpose)?[123]d")
_LEAF = re.compile(r"weight(?:_orig|_[gv])?|bias|original\d*")
_ADAPTER = re.compile(r"lora_\w+|original_module|modules_to_save|parametrizations|ia3_\w+|vera_\w+")

# (family, components), matched whole; the first row that matches a component decides it.
_COMPONENTS = tuple(
    (family, re.compile(pattern))
    for family, pattern in (
        ("conv", r"conv[123]?d?"),
        ("head", r"(?:\w+_)?head|embed_out|proj_out|classifier|score|qa_outputs|predictions|cls|pooler|logits?"),
        (
            "embed",
            r"(?:\w+_)?embed(?:ding)?s?(?:_(?:tokens|in|positions|table|projection))?|(?:\w+_)?embd|wte|wpe|shared"
            r"|embeddings_project|token_embed\w*|positional_embedding",
        ),
        (
            "attn",
            r"[qkvo]_proj|[qkv]_[ab]_proj\w*|kv_[ab]_proj\w*|(?:in_)?qkv(?:_proj)?|query|key|value|query_key_value|[cq]_attn|Wqkv"
            r"|to_[qkv]|to_out|kv_proj|(?:\w+_)?(?:attn|attention)|attn_\w+|\w*[a-z]Attention|crossattention|att"
            r"|mixer|mamba|ssm|time_mix(?:er|ing)?|temporal_block",
        ),
        (
            "ffn",
            r"(?:gate|up|down|gate_up)_proj|c_fc|fc[123]|fc_(?:in|out)|dense_h_to_4h|dense_4h_to_h|lin(?:ear)?[12]"
            r"|(?:\w+_)?(?:mlp|ffn|ff)|feed_?forward(?:_\w+)?|intermediate|Dense\w+Dense|channel_mix(?:ing)?|shared_experts?",
        ),
    )
)
_EXPERT = re.compile(r"experts?(?:_\d+)?")
_ROUTER = re.compile(r"(?:\w+_)?router|gate|shared_expert_gate|gating(?:_network)?|wg")
_BERT_FFN = re.compile(r"layer\.\d+\.output\.dense$")
_CLASSES = (
    ("embed", re.compile(r"\w*Embedding(?:Bag)?")),
    ("router", re.compile(r"\w*(?:Router|Gate)")),
    ("expert", re.compile(r"\w*Experts?")),
    ("attn", re.compile(r"\w*Attention")),
    ("ffn", re.compile(r"\w*(?:MLP|FeedForward|FFN)")),
)


def _components(name: str) -> list[str]:
    """Components of the module that owns a weight: no leaf, no indices, nothing inside an adapter."""
    parts = name.replace("[", ".").replace("]", "").split(".")
    for index, part in enumerate(parts):
        if index and _ADAPTER.fullmatch(part):
            parts = parts[:index]
            break
    if len(parts) > 1 and _LEAF.fullmatch(parts[-1]):
        parts = parts[:-1]
    return [part for part in parts if not part.isdigit()]


def _by_component(parts: list[str]) -> str | None:
    for part in reversed(parts):
        for family, pattern in _COMPONENTS:
            if pattern.fullmatch(part):
                return family
    return None


def family_of(name: str, module_class: str = "") -> str:
    """Family of a matrix: attn, ffn, expert, router, embed, head, conv or other.

    Args:
        name: Public name of the weight; wrapper prefixes and LoRA suffixes do no harm.
        module_class: Class name of the module that owns it, used for convolutions and where no
            component of the name is known.

    Example:
        >>> [family_of(f"h.0.{name}") for name in ("mlp.gate_proj.weight", "mlp.gate.weight", "attn.c_proj.weight")]
        ['ffn', 'router', 'attn']
    """
    name = clean_name(name)
    parts = _components(name)
    if _CONV_CLASS.fullmatch(module_class):
        return "conv"
    if parts and (_ROUTER.fullmatch(parts[-1]) or any(part.endswith("router") for part in parts)):
        return "router"
    if any(_EXPERT.fullmatch(part) for part in parts):
        return "expert"
    family = _by_component(parts)
    if family is None and _BERT_FFN.search(name.removesuffix(".weight")):
        return "ffn"
    if family is None:
        family = next((family for family, pattern in _CLASSES if pattern.fullmatch(module_class)), None)
    return family or "other"


# ---------------------------------------------------------------- blocks and taps


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One repeated layer of the trunk under its public name."""

    name: str
    module: nn.Module


@dataclass(frozen=True, slots=True, eq=False)
class Tap:
    """The module whose output is what one sub-layer adds to the residual stream.

    `block` is the name of its block, `role` "attn" (token mixing) or "ffn". The output of a
    mixture of experts may be a tuple whose first item is the contribution.
    """

    name: str
    block: str
    role: str
    module: nn.Module


_TRUNK_LISTS = frozenset({"h", "layer", "layers", "block", "blocks"})
_TRUNK_SHARE = 0.1

# Paths below a block, matched whole. GPT-2 | Llama, Qwen3, Mixtral | BERT | T5 | ViT | Whisper | Mamba | Bloom, NeoX.
_TAPS = (
    (
        "attn",
        re.compile(
            r"(?:attn|attention|crossattention)\.c_proj|(?:self_attn|cross_attn|attention|attn|encoder_attn)\.(?:o|out)_proj"
            r"|(?:cross)?attention\.output\.dense|layer\.\d+\.(?:SelfAttention|EncDecAttention)\.o"
            r"|mixer|(?:self_attention|attention|self_attn)\.dense|attention\.out_lin"
        ),
    ),
    (
        "ffn",
        re.compile(
            r"mlp\.(?:c_proj|down_proj|fc2|fc_out|dense_4h_to_h)|output\.dense|layer\.\d+\.DenseReluDense\.wo|fc2"
            r"|feed_forward\.(?:down_proj|w2|output_dense)|ffn\.lin2|layer\.\d+\.mlp\.wo"
        ),
    ),
)
_WRITING = "|".join([*(pattern.pattern for _, pattern in _TAPS), r"experts(?:\.\d+)?\.(?:down_proj|w2)"])
_WRITERS = re.compile(rf"(?:^|\.)(?:{_WRITING})(?:\.weight)?(?:\[\d+\])?$")
# The projection inside torch's MultiheadAttention: its weight is read, its forward never runs.
_NEVER_CALLED = frozenset({"NonDynamicallyQuantizableLinear"})
_MOE_BLOCKS = frozenset({"mlp", "block_sparse_moe", "feed_forward", "moe"})


def _num_parameters(module: nn.Module) -> int:
    # A partition of DeepSpeed ZeRO-3 holds no elements of its own; `ds_numel` counts the whole.
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def _is_trunk_list(name: str, module: nn.Module) -> bool:
    """Whether a container holds repeated layers: composite children of one class, or a usual list name."""
    children = list(module.children())
    if not isinstance(module, nn.ModuleList | nn.Sequential) or not children:
        return False
    if any(next(child.children(), None) is None for child in children):
        return False
    same_class = len({type(child) for child in children}) == 1
    if isinstance(module, nn.Sequential):
        return same_class and len(children) > 1
    return same_class or name.rpartition(".")[2] in _TRUNK_LISTS


def blocks(model: nn.Module) -> tuple[Block, ...]:
    """The repeated layers of a model in forward order (T5, Whisper: encoder, then decoder).

    The rule is generic: the outermost lists of composite layers of one class (or under a usual
    name such as `layers`), of these the ones that hold at least a tenth of the largest one's
    parameters. A model without such a list has no blocks.
    """
    trunks: list[tuple[str, nn.Module, int]] = []
    for name, module in unwrap(model).named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer, _, _ in trunks)
        if not inside and _is_trunk_list(name, module):
            trunks.append((name, module, _num_parameters(module)))
    largest = max((size for _, _, size in trunks), default=0)
    return tuple(
        Block(clean_name(f"{name}.{index}" if name else index), unwrap(layer))
        for name, trunk, size in trunks
        if size >= _TRUNK_SHARE * largest
        for index, layer in trunk.named_children()
    )


def _is_mixture(module: nn.Module) -> bool:
    return isinstance(getattr(module, "experts", None), nn.Module)


def _block_taps(block: Block) -> Iterator[Tap]:
    seen: set[str] = set()
    for raw, module in block.module.named_modules():
        path = clean_name(raw)
        if not path or path in seen or "original_module" in path or type(module).__name__ in _NEVER_CALLED:
            continue
        seen.add(path)
        roles = [role for role, pattern in _TAPS if pattern.fullmatch(path)]
        if path in _MOE_BLOCKS and _is_mixture(module):
            roles = ["ffn"]
        for role in roles:
            yield Tap(f"{block.name}.{path}", block.name, role, module)


def writes_to_stream(name: str) -> bool:
    """Whether a matrix of this public name writes to the residual stream: what attention and MLPs give out.

    By its name alone, so that a folder on disk gives the same answer as a model.

    Example:
        >>> [writes_to_stream(f"h.0.{name}.weight") for name in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")]
        [True, True, False]
    """
    return _WRITERS.search(clean_name(name)) is not None


def taps(model: nn.Module) -> tuple[Tap, ...]:
    """The attention and MLP outputs of every block; () where the architecture's names are unknown.

    Llama `self_attn.o_proj` and `mlp.down_proj`, GPT-2 `attn.c_proj` and `mlp.c_proj`, BERT
    `attention.output.dense` and `output.dense`, T5 `SelfAttention.o`, `EncDecAttention.o` and
    `DenseReluDense.wo`, ViT `attention.o_proj` and `mlp.fc2`, Whisper `*_attn.out_proj` and `fc2`,
    Mixtral `self_attn.o_proj` and the whole mixture `mlp`, Mamba the whole `mixer`. Where PEFT
    wraps such a module, the tap is the wrapper: its output includes the adapter.
    """
    return tuple(tap for block in blocks(model) for tap in _block_taps(block))
