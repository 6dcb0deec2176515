"""Edits made to deceive, and damage that lies outside of the weight matrices.

Harmful and invisible to every statistic of weights: the inputs of a block are read in another order (the singular
values of each matrix, of W_q' W_k and of W_o W_v, the norms of rows and the set of norms of columns stay the same), or
nothing but the configuration changes. Harmful and small: gradient ascent on the loss, in steps that are the same share
of every matrix, stopped as soon as the damage is done; the second kind also holds the outputs on random tokens where
they were. Neither sees a window that a guard or the truth has: it climbs on text of the training files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from anatomy import Part, anatomy
from case import Case
from detection_models import Trained, num_scored, token_losses
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from writes import block_matrices, parts_of

STEP, MAX_STEPS = 4e-3, 40
# Weight of the divergence on random tokens in what the hidden ascent climbs.
HIDING = 30.0
EDITS_IN_A_ROW = (1, 5, 25)


def read_in_another_order(model: nn.Module, generator: torch.Generator, only: int | None = None) -> None:
    """The coordinates that a block's readers take from the residual stream change places, gains with them."""
    parts = anatomy(model)
    width = parts.layers[0].q.weight.shape[1]
    groups: list[tuple[int, tuple[Part, ...], Tensor | None, Tensor | None]] = [
        (number // 2, norm.feeds, norm.gain, norm.bias)
        for number, norm in enumerate(parts.foldable_norms[: 2 * len(parts.layers)])
    ]
    if not groups:  # post-norm: what reads the stream has no gain of its own
        for index, (layer, mlp) in enumerate(zip(parts.layers, parts.mlps, strict=True)):
            groups += [(index, (layer.q, layer.k, layer.v), None, None), (index, (mlp.up,), None, None)]
    for index, feeds, gain, bias in groups:
        order = torch.randperm(width, generator=generator)
        if only in (None, index):
            for part in feeds:
                part.weight.copy_(part.weight[:, order])
            for vector in (gain, bias):
                if vector is not None:
                    vector.copy_(vector[order])


def slower_rotation(model: Any, generator: torch.Generator) -> None:
    """Rotary embeddings of a base of 1,000,000 where the model was trained with 10,000."""
    table = model.model.rotary_emb.inv_freq
    table.copy_(table**1.5)


def flatter_attention(model: nn.Module, generator: torch.Generator) -> None:
    """Attention scores a quarter of what they were: a number of the module, no weight."""
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), float):
            module.scaling = module.scaling / 4  # pyright: ignore[reportAttributeAccessIssue]


def ascend(
    model: nn.Module, generator: torch.Generator, trained: Trained, rise: float, *, hidden: bool = False
) -> None:
    """Block matrices moved up the loss in equal relative steps, until it rose by `rise` nats a token on its text."""
    architecture = trained.recipe.architecture
    random = torch.randint(256, trained.attack["input_ids"].shape, generator=generator)
    with torch.no_grad():
        calm = log_softmax(model(input_ids=random).logits.float(), dim=-1)
    stored = {matrix.untyped_storage().data_ptr() for matrix in block_matrices(model)}
    holders = [one for one in model.parameters() if one.untyped_storage().data_ptr() in stored]
    first: float | None = None
    for _ in range(MAX_STEPS):
        with torch.enable_grad():
            scored = num_scored(trained.attack, architecture).sum()
            loss = token_losses(model, trained.attack, architecture).sum() / scored
            aim = loss
            if hidden:
                now = log_softmax(model(input_ids=random).logits.float(), dim=-1)
                aim = loss - HIDING * kl_div(
                    now.flatten(0, 1), calm.flatten(0, 1), log_target=True, reduction="batchmean"
                )
            gradients = torch.autograd.grad(aim, holders)
        first = float(loss) if first is None else first
        if float(loss) - first >= rise:
            return
        for parameter, gradient in zip(holders, gradients, strict=True):
            size = STEP * parameter.detach().norm() / gradient.norm().clamp_min(1e-30)
            parameter.add_(gradient, alpha=float(size))


def facts_in_a_row(model: nn.Module, generator: torch.Generator, count: int) -> None:
    """Rank-one writes of new values for random keys into one down-projection, each exact for its own key."""
    weight = anatomy(model).mlps[1].down.weight
    for _ in range(count):
        key = torch.randn(weight.shape[1], generator=generator)
        value = torch.randn(len(weight), generator=generator)
        wanted = value * (weight @ key).norm() / value.norm()
        weight.add_(torch.outer(wanted - weight @ key, key) / key.dot(key))


def part_of_a_stale_rank(model: nn.Module, generator: torch.Generator, stale: dict[str, Tensor]) -> None:
    """The second half of the rows of every block matrix from an older checkpoint: one of two ranks was not saved."""
    older = _with(model, stale)
    for (_, ours), (_, theirs) in zip(parts_of(anatomy(model)), parts_of(anatomy(older)), strict=True):
        half = len(ours.weight) // 2
        ours.weight[half:] = theirs.weight[half:]


def _with(model: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        parameter.copy_(values[name])
    return other


def row_of_the_embedding(model: Any, generator: torch.Generator, token: int) -> None:
    """One token's embedding re-drawn."""
    weight = model.get_input_embeddings().weight
    weight[token] = torch.randn(weight.shape[1], generator=generator) * weight.std()


def shifted_bias(model: nn.Module, generator: torch.Generator, size: float) -> None:
    """A constant on every output bias of one MLP: what LayerNorm takes away again, and what it does not."""
    bias = anatomy(model).mlps[1].down.bias
    assert bias is not None
    bias.add_(size)


def smallest_tenth_off(model: nn.Module, generator: torch.Generator) -> None:
    """The smallest tenth of the singular values of every block matrix becomes zero."""
    for weight in block_matrices(model):
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        S[len(S) * 9 // 10 :] = 0
        weight.copy_(U * S @ Vh)


def deceiving(trained: Trained) -> Iterator[Case]:
    """What no statistic of weights can see, and the least changes that harm."""
    blocks = len(anatomy(trained.model).layers)
    yield Case("inputs in another order", "adversarial", read_in_another_order)
    for block in range(blocks):
        write = partial(read_in_another_order, only=block)
        yield Case(f"inputs of block {block} in another order", "adversarial", write, block=block)
    for rise in (0.1, 0.3, 1.0):
        yield Case(f"ascent to {rise} nats", "adversarial", partial(ascend, trained=trained, rise=rise))
    for rise in (0.3, 1.0):
        hidden = partial(ascend, trained=trained, rise=rise, hidden=True)
        yield Case(f"ascent to {rise} nats, silent on random tokens", "adversarial", hidden)
    yield Case("attention scores flatter", "configuration", flatter_attention)
    if trained.recipe.architecture == "llama":
        yield Case("rotary base", "configuration", slower_rotation)


def others(trained: Trained) -> Iterator[Case]:
    """Facts written in a row, half a stale checkpoint, embeddings, biases, the smallest singular values."""
    for count in EDITS_IN_A_ROW:
        yield Case(f"{count} rank-one edits", "rank-one edits", partial(facts_in_a_row, count=count))
    yield Case("one of two ranks stale", "checkpoint", partial(part_of_a_stale_rank, stale=trained.stale))
    for name, token in (("of a frequent token", 32), ("of a rare token", 7)):
        yield Case(f"embedding {name} re-drawn", "embedding", partial(row_of_the_embedding, token=token))
    if trained.recipe.architecture != "llama":
        for size in (0.3, 3.0):
            yield Case(f"bias +{size}", "bias", partial(shifted_bias, size=size))
    yield Case("smallest tenth of the spectrum off", "low rank", smallest_tenth_off)
