"""The edits, as data: what is changed, how it was declared, and where.

`Case.expected` is set only where the function is preserved by construction; of every other edit the truth is measured
(see `measure`). A case writes in place. Everything random is drawn from a generator seeded by the case's name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import weight_edits
from adversarial import deceiving, others
from anatomy import Anatomy, Part, anatomy
from case import Case
from detection_models import Trained
from torch import Tensor, nn
from writes import (
    Write,
    along,
    block_matrices,
    duplicate_shard,
    eps,
    exchange,
    flip_bit,
    flip_signs,
    fold,
    fp8,
    noise,
    noise_all,
    norms,
    on_part,
    one_value,
    overwrite,
    permute_heads,
    permute_neurons,
    rank_one_off,
    rank_one_on,
    redraw,
    reload,
    rescale_mlp,
    rescale_scores,
    rescale_values,
    rotate_scores,
    rotate_values,
    round_to,
    same_spectrum,
    scale,
    shuffle_rows,
    together,
)

from weightproof import iter_weight_matrices, kinds
from weightproof.edits import GPTQ, RTN, SVD, Prune


def preserving(trained: Trained) -> Iterator[Case]:
    """Edits after which the model computes the same function, up to rounding."""
    architecture = trained.recipe.architecture

    def case(name: str, write: Write) -> Case:
        return Case(f"preserving: {name}", "preserving", write, preserving=True)

    yield case("nothing", lambda model, generator: None)
    yield case("reload", reload)
    for seed in range(6):
        yield case(f"heads permuted {seed}", permute_heads)
        yield case(f"neurons permuted {seed}", permute_neurons)
        yield case(f"values rotated {seed}", rotate_values)
        if architecture != "llama":
            yield case(f"scores rotated {seed}", rotate_scores)
    for factor in (0.05, 0.3, 0.7, 1.4, 3.0, 20.0):
        yield case(f"W_q*{factor}", partial(rescale_scores, factor=factor))
        yield case(f"W_v*{factor}", partial(rescale_values, factor=factor))
        if architecture == "llama":
            yield case(f"W_up*{factor}", partial(rescale_mlp, factor=factor))
    for block in range(len(anatomy(trained.model).layers)):
        yield case(f"neurons permuted in {block}", partial(permute_neurons, only=block))
        yield case(f"W_v*10 in {block}", partial(rescale_values, factor=10.0, only=block))
        if architecture == "llama":
            yield case(f"W_up*10 in {block}", partial(rescale_mlp, factor=10.0, only=block))
    if architecture != "bert":
        yield case("norms folded", fold)
    for seed in range(8):
        every = [permute_heads, permute_neurons, rotate_values, partial(rescale_values, factor=8.0)]
        every += [partial(rescale_scores, factor=0.2)] if architecture == "llama" else [rotate_scores]
        yield case(f"all at once {seed}", together(*every))


# ---------------------------------------------------------------- everything else


def compression(trained: Trained) -> Iterator[Case]:
    """Quantization, pruning, low rank, casts: as declared, and with nothing declared."""
    own: list[tuple[str, str, Any]] = [
        *((f"rtn int{bits} channel", "quantize", RTN(bits=bits)) for bits in (8, 6, 4, 3, 2)),
        *((f"rtn int{bits} tensor", "quantize", RTN(bits=bits, granularity="tensor")) for bits in (8, 6, 4, 3, 2)),
        *((f"rtn int{bits} group 32", "quantize", grouped(bits)) for bits in (4, 3, 2)),
        *((f"gptq int{bits}", "quantize", GPTQ(bits=bits)) for bits in (4, 3)),
        *((f"prune {share:.0%}", "prune", Prune(sparsity=share)) for share in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)),
        ("prune 2:4", "prune", Prune(sparsity=0.5, pattern="2:4")),
        *((f"svd energy {energy}", "low rank", SVD(energy=energy)) for energy in (0.999, 0.99, 0.95, 0.75, 0.5, 0.25)),
    ]  # fmt: skip
    for name, group, edit in own:
        yield Case(name, group, edit=edit, kind="its own")
        if not isinstance(edit, GPTQ):
            yield Case(f"{name}, undeclared", group, edit=edit)
    for dtype in (torch.bfloat16, torch.float16):
        label = str(dtype).removeprefix("torch.")
        yield Case(f"rounded to {label}", "cast", partial(round_to, dtype=dtype), kind=kinds.Cast(dtype))
        yield Case(f"rounded to {label}, undeclared", "cast", partial(round_to, dtype=dtype))
    yield Case("fp8 e4m3 by rows", "cast", partial(fp8, dtype=torch.float8_e4m3fn, scaled=True))
    yield Case("fp8 e5m2 by rows", "cast", partial(fp8, dtype=torch.float8_e5m2, scaled=True))
    yield Case("fp8 e4m3 unscaled", "cast", partial(fp8, dtype=torch.float8_e4m3fn, scaled=False))


def grouped(bits: int) -> RTN:
    """One scale for 32 inputs."""
    return RTN(bits=bits, granularity="group", group_size=32)


def merges(trained: Trained) -> Iterator[Case]:
    """A low-rank delta of a real fine-tune, merged rightly and wrongly; task vectors; old checkpoints."""
    way = {name: trained.finetuned[name] - value.detach() for name, value in trained.model.named_parameters()}
    delta = low_rank_delta(trained, rank=4)

    def merged(alpha: float) -> Write:
        def write(model: nn.Module, generator: torch.Generator) -> None:
            for matrix in iter_weight_matrices(model):
                if matrix.name in delta:
                    matrix.load().add_(alpha * delta[matrix.name])  # a view of live storage

        return write

    kind = kinds.LoraMerge(delta)
    yield Case("lora merged", "merge", merged(1.0), kind=kind)
    yield Case("lora merged, undeclared", "merge", merged(1.0))
    for name, alpha in (("x3", 3.0), ("x10", 10.0), ("x30", 30.0), ("sign", -1.0), ("twice", 2.0), ("sign x10", -10.0)):
        yield Case(f"lora merged {name}, declared as it should be", "merge", merged(alpha), kind=kind, tags=("broken",))
        yield Case(f"lora merged {name}, undeclared", "merge", merged(alpha))
    for alpha in (0.5, 1.0, 3.0, -1.0, -3.0):
        yield Case(f"task vector x{alpha}", "task vector", partial(along, way=way, alpha=alpha))
    yield Case("stale checkpoint", "checkpoint", partial(overwrite, values=trained.stale))
    for block in range(len(anatomy(trained.model).layers)):
        prefix = next(
            name for name, one in trained.model.named_modules() if one is anatomy(trained.model).blocks[block]
        )
        yield Case(
            f"stale block {block}",
            "checkpoint",
            partial(overwrite, values=trained.stale, part=f"{prefix}."),
            block=block,
        )


def low_rank_delta(trained: Trained, rank: int) -> dict[str, Tensor]:
    """What fine-tuning changed in the matrices of the blocks, cut to a rank: public name -> (d_out, d_in)."""
    other = copy.deepcopy(trained.model)
    with torch.no_grad():
        overwrite(other, torch.Generator(), trained.finetuned)
    after = {matrix.name: matrix.load() for matrix in iter_weight_matrices(other)}
    found: dict[str, Tensor] = {}
    for matrix in iter_weight_matrices(trained.model):
        if any(part.isdigit() for part in matrix.name.split(".")):
            change = (after[matrix.name] - matrix.load()).detach()
            U, S, Vh = torch.linalg.svd(change, full_matrices=False)
            found[matrix.name] = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return found


def _places(parts: Anatomy) -> list[tuple[str, int, Callable[[Anatomy], Part]]]:
    """One matrix of each role in turn over the blocks: name, block, and how to find it in a copy."""
    last = len(parts.layers) - 1
    return [
        ("q of the first block", 0, lambda p: p.layers[0].q),
        ("o of the second block", 1, lambda p: p.layers[1].o),
        ("v of the third block", min(2, last), lambda p: p.layers[2].v),
        ("up of the second block", 1, lambda p: p.mlps[1].up),
        ("down of the first block", 0, lambda p: p.mlps[0].down),
        ("down of the last block", last, lambda p: p.mlps[-1].down),
    ]


def single_matrix(trained: Trained) -> Iterator[Case]:
    """Faults of one matrix; the block that holds it is what localisation should name."""
    hows: list[tuple[str, Any]] = [
        *((f"noise {decibels} dB", partial(noise, decibels=decibels)) for decibels in (30.0, 20.0, 10.0, 0.0)),
        *((f"x{factor}", partial(scale, factor=factor)) for factor in (1.02, 1.2, 3.0, 0.0, -1.0)),
        ("re-drawn", redraw),
        ("same spectrum, random vectors", same_spectrum),
        ("largest pair off", rank_one_off),
        ("rank one x0.5", partial(rank_one_on, size=0.5)),
        ("rank one x5", partial(rank_one_on, size=5.0)),
        ("rows shuffled", shuffle_rows),
        ("half twice", duplicate_shard),
    ]
    for place, block, which in _places(anatomy(trained.model)):
        for how, write in hows:
            yield Case(f"{place}: {how}", "one matrix", partial(on_part, which=which, how=write), block=block)


def bits(trained: Trained) -> Iterator[Case]:
    """Flipped bits, flipped signs, NaN and inf."""
    for place, block, which in _places(anatomy(trained.model))[::2]:
        for bit in (30, 29, 28, 25, 23, 22, 10):
            how = partial(flip_bit, bit=bit)
            yield Case(f"{place}: bit {bit}", "bit", partial(on_part, which=which, how=how), block=block)
        for count in (1, 16, 256):
            how = partial(flip_signs, count=count)
            yield Case(f"{place}: {count} signs", "bit", partial(on_part, which=which, how=how), block=block)
        for value in (float("nan"), float("inf")):
            how = partial(one_value, value=value)
            yield Case(f"{place}: {value}", "not finite", partial(on_part, which=which, how=how), block=block)


def whole_model(trained: Trained) -> Iterator[Case]:
    """What goes wrong in more than one place, or outside the blocks."""
    for decibels in (60.0, 50.0, 40.0, 30.0, 20.0, 10.0, 5.0):
        for seed in range(2):
            yield Case(f"noise {decibels} dB everywhere {seed}", "noise", partial(noise_all, decibels=decibels))
    yield Case("blocks 0 and 3 swapped", "structure", partial(exchange, first=0, second=3))
    yield Case("blocks 1 and 2 swapped", "structure", partial(exchange, first=1, second=2))
    for factor in (1.02, 1.1, 3.0):
        yield Case(f"norms x{factor}", "norms", partial(norms, factor=factor, last_only=False))
    for factor in (0.3, 0.9, 1.1, -1.0):
        yield Case(f"last norm x{factor}", "norms", partial(norms, factor=factor, last_only=True))
    yield Case("eps of the norms", "configuration", eps)
    for edit in weight_edits.HARMFUL:
        if edit.name not in {"one NaN", "linear replaced by another", "two layers swapped (modules)"}:
            yield Case(f"gross: {edit.name}", "gross", lambda model, generator, edit=edit: edit.apply(model))


def faults_inside_int8(trained: Trained) -> Iterator[Case]:
    """An int8 edit, declared as such, in which something else went wrong as well."""
    int8 = weight_edits.int8_per_channel
    kind = kinds.Quantize(8, "channel")
    hows: list[tuple[str, Any]] = [
        ("noise 10 dB", partial(noise, decibels=10.0)),
        ("x3", partial(scale, factor=3.0)),
        ("x1.2", partial(scale, factor=1.2)),
        ("x0", partial(scale, factor=0.0)),
        ("x-1", partial(scale, factor=-1.0)),
        ("re-drawn", redraw),
        ("same spectrum, random vectors", same_spectrum),
        ("rows shuffled", shuffle_rows),
        ("half twice", duplicate_shard),
        ("bit 30", partial(flip_bit, bit=30)),
        ("256 signs", partial(flip_signs, count=256)),
    ]

    def quantize(model: nn.Module, generator: torch.Generator) -> None:
        int8(model)

    yield Case("int8, declared", "quantize", quantize, kind=kind)
    for place, block, which in _places(anatomy(trained.model)):
        for how, write in hows:
            both = together(quantize, partial(on_part, which=which, how=write))
            yield Case(f"int8 and {place}: {how}", "declared int8", both, kind=kind, block=block, tags=("broken",))
    for level in (4, 3, 2):
        less = partial(_coarse, bits=level)
        yield Case(f"int{level} declared as int8", "declared int8", less, kind=kind, tags=("broken",))
    yield Case(
        "int8 and blocks 1 and 2 swapped",
        "declared int8",
        together(quantize, partial(exchange, first=1, second=2)),
        kind=kind,
        tags=("broken",),
    )
    for name, edit in (
        ("head re-drawn", weight_edits.redraw_head),
        ("head rows permuted", weight_edits.permute_head_rows),
    ):
        other = together(quantize, lambda model, generator, edit=edit: edit(model))
        yield Case(f"int8 and {name}", "declared int8", other, kind=kind, tags=("broken",))


def _coarse(model: nn.Module, generator: torch.Generator, bits: int) -> None:
    for weight in block_matrices(model):
        step = weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        weight.copy_(torch.round(weight / step) * step)


def wrongly_preserving(trained: Trained) -> Iterator[Case]:
    """Declared to preserve the function, and one half of the pair was forgotten."""

    def only_q(model: nn.Module, generator: torch.Generator) -> None:
        for layer in anatomy(model).layers:
            layer.q.weight.copy_(layer.q.weight.roll(layer.q.weight.shape[0] // layer.num_heads, dims=0))

    def only_v(model: nn.Module, generator: torch.Generator) -> None:
        for layer in anatomy(model).layers:
            layer.v.weight.mul_(3.0)

    def only_down(model: nn.Module, generator: torch.Generator) -> None:
        for mlp in anatomy(model).mlps:
            order = torch.randperm(mlp.down.weight.shape[1], generator=generator)
            mlp.down.weight.copy_(mlp.down.weight[:, order])

    for name, write in (("q heads without k", only_q), ("W_v*3 alone", only_v), ("down permuted alone", only_down)):
        yield Case(f"declared preserving: {name}", "declared preserving", write, kind="preserving", tags=("broken",))
    for name, write in (("heads permuted", permute_heads), ("values rotated", rotate_values)):
        yield Case(f"preserving: {name}, declared", "preserving", write, kind="preserving", preserving=True)


def catalogue(trained: Trained) -> list[Case]:
    """Every case of one model, in a fixed order, no name twice."""
    makers = (
        preserving, compression, merges, single_matrix, bits, whole_model, faults_inside_int8, wrongly_preserving,
        deceiving, others,
    )  # fmt: skip
    cases = [case for maker in makers for case in maker(trained)]
    names = [case.name for case in cases]
    assert len(names) == len(set(names)), "two cases have one name"
    return cases
