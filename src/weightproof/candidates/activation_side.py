"""Candidates that are made from activations of the base model, and the one ceiling that is made from the change's.

All are fitted on the FIT half of the prompts, at the last real token, of blocks numbered from 0; h_l is what leaves
block l. PCA of states is about their mean, of differences about zero (`shapes.principal`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from weightproof.candidates import shapes
from weightproof.candidates.candidate import Candidate, Sources
from weightproof.candidates.captures import Captures
from weightproof.subspace import orthonormal

_EPS = torch.finfo(torch.float32).eps
_SAME = "what it is made from is the same for every prompt, or differs by no more than rounding"
_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "gelu_fast": partial(functional.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class At:
    """Where a candidate is made: `layer` counts the blocks of the weights, `block` those that were listened to."""

    sources: Sources
    captures: Captures
    layer: int
    block: int

    @property
    def rank(self) -> int:
        """Columns asked for."""
        return self.sources.rank

    def states(self, which: str) -> Tensor:
        """What leaves the block, of one set of prompts."""
        return self.captures.states(which, self.block)

    def mlp(self, which: str, what: str) -> Tensor:
        """What was read of its MLP; see `captures.Reading.mlp`."""
        return self.captures.mlp(which, self.block, what)

    def weight(self, part: str) -> Tensor | str:
        """The one matrix of a part, (d_out, d_in) float64."""
        found = self.sources.weights.matrix(self.layer, part)
        if isinstance(found, str):
            return found
        return found[0] if len(found) == 1 else f"it has {len(found)} of {part}: which of them is active is not read"


Build = Callable[[At], "Tensor | str"]


def _candidate(name: str, family: str, needs: str, build: Build, axis_kind: str = "mixed") -> Candidate:
    """A candidate that says why it is not there, instead of failing, where what it needs was not captured."""
    wanted = frozenset(needs.split())

    def checked(sources: Sources, layer: int) -> Tensor | str:
        captures = sources.captures
        if captures is None:
            return "there are no prompts to read activations on"
        gaps = [gap for need in sorted(wanted) if (gap := captures.gap(need)) is not None]
        if gaps:
            return gaps[0]
        block = sources.weights.layers[layer].name
        if block not in captures.layers:
            return f"no activations were read of {block}"
        found = build(At(sources, captures, layer, captures.layers.index(block)))
        return _SAME if isinstance(found, Tensor) and found.shape[1] == 0 else found

    return Candidate(name, family, axis_kind, wanted, checked)


def _everywhere(build: Callable[[Captures, int], Tensor | str]) -> Build:
    """The same basis for every layer, made once."""
    return lambda at: at.sources.once(("everywhere", build), lambda: build(at.captures, at.rank))


# ---------------------------------------------------------------- clean prompts


def _magnitude_changes(captures: Captures) -> Tensor:
    """|h_l+1| - |h_l|, (L - 1, prompts, d)."""
    return captures.all_states("clean").abs().diff(dim=0)


def suppressed(captures: Captures, rank: int) -> Tensor | str:
    """PCA over prompts of min(sum over layers of rises of |h|, sum of its falls): what comes and goes again."""
    if len(captures.layers) < 3:
        return "what comes and goes again takes three blocks or more"
    changes = _magnitude_changes(captures)
    return shapes.principal(torch.minimum(changes.relu().sum(0), (-changes).relu().sum(0)), rank)


def amplified(captures: Captures, rank: int) -> Tensor:
    """PCA over prompts of relu(|h_last| - |h_first|): what is larger in the end."""
    states = captures.all_states("clean").abs()
    return shapes.principal((states[-1] - states[0]).relu(), rank)


def added_features(captures: Captures, rank: int) -> Tensor:
    """PCA over prompts of the sum over layers of rises of |h|: what is written at all."""
    return shapes.principal(_magnitude_changes(captures).relu().sum(0), rank)


def global_clean_resid_pca(captures: Captures, rank: int) -> Tensor:
    """PCA of h over clean prompts and all layers."""
    return shapes.principal(captures.all_states("clean").flatten(0, 1), rank)


def global_persona_resid_pca(captures: Captures, rank: int) -> Tensor:
    """PCA of h over positive and negative prompts and all layers, without a difference."""
    sides = [captures.all_states(side).flatten(0, 1) for side in ("positive", "negative")]
    return shapes.principal(torch.cat(sides), rank)


def layer_clean_resid_pca(at: At) -> Tensor:
    """PCA of h_l over clean prompts."""
    return shapes.principal(at.states("clean"), at.rank)


def churn(at: At) -> Tensor:
    """PCA of what block l adds to the stream, h_l - h_l-1, over clean prompts."""
    return shapes.principal(at.captures.added(at.block), at.rank, noise=at.captures.noise(at.block))


# ---------------------------------------------------------------- contrasts


def task_diff_contrast(at: At) -> Tensor:
    """PCA of h_l(positive) - h_l(negative), pair by pair."""
    return _contrast(at.states("positive"), at.states("negative"), at.rank)


def _contrast(positive: Tensor, negative: Tensor, rank: int) -> Tensor:
    noise = 4.0 * _EPS * float(torch.linalg.vector_norm(positive) + torch.linalg.vector_norm(negative))
    return shapes.principal(positive - negative, rank, about_zero=True, noise=noise)


Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]


def _attention_selected(weigh: Weigh, at: At) -> Tensor:
    """PCA of token-wise differences d_t = h_t(positive) - h_t(negative), each times the root of a weight.

    The weight is made of how much the last token attends to token t on both sides. Pairs are aligned at their last
    token; what one side has more in front has no partner and is left out.
    """
    positive, negative = at.captures.positive, at.captures.negative
    assert positive is not None
    assert negative is not None  # a candidate is not built without a contrast
    rows: list[Tensor] = []
    size = 0.0
    for index in at.captures.half(positive.num_prompts).tolist():
        length = min(side.sequences[index].shape[1] for side in (positive, negative))
        states = [side.sequences[index][at.block, -length:].to(torch.float64) for side in (positive, negative)]
        attention = [side.attention[index][at.block, -length:].to(torch.float64) for side in (positive, negative)]
        difference = states[0] - states[1]
        weight = weigh(attention[0], attention[1], torch.linalg.vector_norm(difference, dim=1))
        rows.append(weight.sqrt()[:, None] * difference)
        scale = weight.sqrt()[:, None] * (states[0].abs() + states[1].abs())
        size += float(scale.square().sum())
    return shapes.principal(torch.cat(rows), at.rank, about_zero=True, noise=4.0 * _EPS * size**0.5)


def up_proj_input_contrast(at: At) -> Tensor:
    """PCA of x(positive) - x(negative), x what the up-projection is given."""
    sides = [at.mlp(side, "up_input") for side in ("positive", "negative")]
    return _contrast(sides[0], sides[1], at.rank)


def up_proj_output_written_contrast(at: At) -> Tensor | str:
    """PCA of W_down (u(positive) - u(negative)), u what the up-projection gives; gate and activation are ignored."""
    down = at.weight("down")
    if isinstance(down, str):
        return down
    sides = [at.mlp(side, "up_output") @ down.T for side in ("positive", "negative")]
    return _contrast(sides[0], sides[1], at.rank)


def rotation_contrast(at: At) -> Tensor | str:
    """The planes of the Procrustes rotation that turns h_l(negative) into h_l(positive); see `shapes.rotation`."""
    if at.rank < 2:
        return "a rotation has planes: it needs a rank of 2 or more"
    return shapes.rotation(at.states("negative"), at.states("positive"), at.rank)


def chars_clusters(at: At) -> Tensor:
    """PCA of the centres of 8 clusters of h_l over clean, positive and negative prompts together: 7 columns at most."""
    sides = [at.states(side) for side in ("clean", "positive", "negative")]
    return shapes.principal(shapes.centres(torch.cat(sides)), at.rank)


# ---------------------------------------------------------------- MLPs and attention sinks


def gate_active_written(at: At) -> Tensor | str:
    """PCA of W_down a over clean prompts, a = act(W_gate x) * W_up x; act(W_up x) where there is no gate."""
    down = at.weight("down")
    if isinstance(down, str):
        return down
    return shapes.principal(at.mlp("clean", "activated") @ down.T, at.rank)


def gate_kernel(at: At) -> Tensor | str:
    """Left singular vectors of W_down diag(E act(W_gate x)) W_up, the mean over clean prompts."""
    if "gate_output" not in at.captures.clean.mlp[at.block]:
        return "its MLP has no gate"
    act = _FUNCTIONS.get(at.captures.activation or "")
    if act is None:
        return f"the activation function {at.captures.activation!r} is not known"
    down, up = (at.weight(part) for part in ("down", "up"))
    if isinstance(down, str) or isinstance(up, str):
        return next(one for one in (down, up) if isinstance(one, str))
    opening = act(at.mlp("clean", "gate_output")).mean(0)
    return orthonormal((down * opening) @ up, at.rank)


def attention_sink(at: At) -> Tensor | str:
    """PCA over heads of W_o,h W_v,h e, e the embedding of the first token, mean over clean prompts."""
    heads, values, output = (
        at.sources.weights.heads(at.layer),
        at.sources.weights.by_head(at.layer, "v"),
        at.weight("o"),
    )
    if isinstance(heads, str) or isinstance(values, str) or isinstance(output, str):
        return next(one for one in (heads, values, output) if isinstance(one, str))
    first = at.captures.clean.first[0, at.captures.half(at.captures.clean.num_prompts)].to(torch.float64).mean(0)
    read = (values @ first).reshape(heads[0], -1)
    written = output.reshape(output.shape[0], heads[0], -1) * read
    return shapes.principal(written.sum(2).T, at.rank)


# ---------------------------------------------------------------- the ceiling


def task_diff_lora_ceiling(at: At) -> Tensor:
    """PCA of what the change itself does to h_l on the FIT half: no guess is made from so much."""
    return shapes.principal(
        at.captures.difference(at.block, "fit"), at.rank, about_zero=True, noise=at.captures.noise(at.block)
    )


_ATTENTION_WEIGHTS: Mapping[str, Weigh] = {
    "attn_min_taskdiff": lambda a, b, _: torch.minimum(a, b),
    "attn_max_taskdiff": lambda a, b, _: torch.maximum(a, b),
    "attn_diff_taskdiff": lambda a, b, _: (a - b).abs(),
    "attn_min_x_diffnorm_taskdiff": lambda a, b, size: torch.minimum(a, b) * size,
}

ACTIVATION_SIDE: tuple[Candidate, ...] = (
    _candidate("gate_kernel", "W:MLP", "weights clean mlp", gate_kernel, "write"),
    _candidate("attention_sink", "W:OV", "weights clean", attention_sink, "write"),
    _candidate("suppressed", "act:clean", "clean", _everywhere(suppressed)),
    _candidate("amplified", "act:clean", "clean", _everywhere(amplified)),
    _candidate("added_features", "act:clean", "clean", _everywhere(added_features)),
    _candidate("global_clean_resid_pca", "act:baseline", "clean", _everywhere(global_clean_resid_pca)),
    _candidate("global_persona_resid_pca", "act:baseline", "contrast", _everywhere(global_persona_resid_pca)),
    _candidate("layer_clean_resid_pca", "act:baseline", "clean", layer_clean_resid_pca),
    _candidate("TaskDiff_contrast", "act:persona", "contrast", task_diff_contrast),
    *(
        _candidate(name, "act:attn-selected", "contrast attention", partial(_attention_selected, weigh))
        for name, weigh in _ATTENTION_WEIGHTS.items()
    ),
    _candidate("up_proj_input_contrast", "act:up_proj", "contrast mlp", up_proj_input_contrast),
    _candidate(
        "up_proj_output_written_contrast", "act:up_proj", "weights contrast mlp", up_proj_output_written_contrast
    ),
    _candidate("gate_active_written", "act:MLP", "weights clean mlp", gate_active_written),
    _candidate("chars_clusters", "act:cluster", "clean contrast", chars_clusters),
    _candidate("churn", "act:clean", "clean", churn),
    _candidate("rotation_contrast", "act:rotation", "contrast", rotation_contrast),
)

ACTIVATION_CEILING = _candidate(
    "TaskDiff_lora_ceiling", "ceiling", "clean delta", task_diff_lora_ceiling, axis_kind="ceiling"
)
