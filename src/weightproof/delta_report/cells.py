"""Scores of one candidate at one layer, and what they are held against there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightproof.candidates.activation_side import ACTIVATION_SIDE
from weightproof.candidates.candidate import Candidate, Sources
from weightproof.candidates.captures import EVAL
from weightproof.candidates.from_weights import write_targets
from weightproof.subspace import (
    Recovery,
    Target,
    ZeroChangeError,
    activation_target,
    balanced,
    mean_cosine,
    oracle_basis,
    oracle_recovery,
    recovery,
    specificity,
)

_CLEAN = next(one for one in ACTIVATION_SIDE if one.name == "layer_clean_resid_pca")
NO_PROMPTS = "there are no prompts (--prompts)"


@dataclass(frozen=True)
class Score:
    """One change in one candidate: what it holds, and the most that as many dimensions could."""

    found: Recovery
    oracle: Recovery


@dataclass(frozen=True, eq=False)
class Ground:
    """What candidates are held against at one layer.

    Attributes:
        layer: Number of the layer.
        tensors: The change of each matrix that writes to the stream, by its name below the block; experts together.
        weights: The same, balanced; as text, why there is nothing.
        activations: What the change makes of the stream on the prompts kept for scoring; as text, why it is not known.
        samples: Those differences of unit length, (prompts, d), a zero one as zero.
        clean: The directions that the base model uses anyhow; as text, why they are not known.
        change: Leading directions of `weights`.
    """

    layer: int
    tensors: Mapping[str, Target]
    weights: Target | str
    activations: Target | str
    samples: Tensor | None
    clean: Tensor | str
    change: Tensor | None


@dataclass(frozen=True, eq=False)
class Cell:
    """One candidate at one layer; None or text where something was not measured.

    Attributes:
        layer: Number of the layer.
        rank: Columns of the basis.
        tensors: By matrix name below the block.
        weights: Of the balanced change.
        activations: Of what the change does to the stream.
        ratios: R of each prompt alone, 0 where the change does nothing.
        specific_weights: Without the directions that the base model uses anyhow.
        specific_activations: The same for activations.
        cosine: Mean cosine of the principal angles with the leading directions of the change.
        reason: Why there is no basis; nothing else is measured then.
    """

    layer: int
    rank: int = 0
    tensors: Mapping[str, Score] = field(default_factory=dict[str, Score])
    weights: Score | None = None
    activations: Score | None = None
    ratios: Tensor | None = None
    specific_weights: Recovery | str = ""
    specific_activations: Recovery | str = ""
    cosine: float | None = None
    reason: str | None = None


def ground(sources: Sources, layer: int) -> Ground:
    """What the candidates of a layer are held against."""
    targets = write_targets(sources, layer)
    tensors = {} if isinstance(targets, str) else _by_role(targets, sources.weights.layers[layer].name)
    weights = targets if isinstance(targets, str) else balanced(list(targets.values()))
    samples = _samples(sources, layer)
    activations: Target | str = samples if isinstance(samples, str) else _activation_target(samples)
    return Ground(
        layer=layer,
        tensors=tensors,
        weights=weights,
        activations=activations,
        samples=None if isinstance(samples, str) else _unit(samples),
        clean=sources.basis(_CLEAN, layer),
        change=None if isinstance(weights, str) else oracle_basis(weights, sources.rank),
    )


def _by_role(targets: Mapping[str, Target], block: str) -> dict[str, Target]:
    """By name below the block and without `.weight`; the experts of a stack are balanced into one."""
    groups: dict[str, list[Target]] = {}
    for name, target in targets.items():
        role = name.removeprefix(f"{block}.").partition("[")[0].removesuffix(".weight")
        groups.setdefault(role, []).append(target)
    return {role: members[0] if len(members) == 1 else balanced(members) for role, members in groups.items()}


def _samples(sources: Sources, layer: int) -> Tensor | str:
    captures = sources.captures
    if captures is None:
        return NO_PROMPTS
    if captures.steered is None:
        return "no activations were read with the change"
    block = sources.weights.layers[layer].name
    if block not in captures.layers:
        return f"no activations were read of {block}"
    return captures.difference(captures.layers.index(block), EVAL)


def _activation_target(samples: Tensor) -> Target | str:
    try:
        return activation_target(samples)
    except ZeroChangeError as error:
        return str(error)


def _unit(samples: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(samples, dim=1, keepdim=True)
    return samples / torch.where(lengths > 0, lengths, torch.ones_like(lengths))


def cell(sources: Sources, candidate: Candidate, held: Ground) -> Cell:
    """Every score of one candidate at one layer."""
    basis = sources.basis(candidate, held.layer)
    if isinstance(basis, str):
        return Cell(held.layer, reason=basis)
    rank = basis.shape[1]
    tensors = {role: _score(target, basis) for role, target in held.tensors.items()}
    if candidate.name == "dW_left_basis_ceiling":  # of one matrix the ceiling is the best there is for it alone
        best = {role: oracle_recovery(target, rank) for role, target in held.tensors.items()}
        tensors = {role: Score(found, found) for role, found in best.items()}
    return Cell(
        layer=held.layer,
        rank=rank,
        tensors=tensors,
        weights=None if isinstance(held.weights, str) else _score(held.weights, basis),
        activations=None if isinstance(held.activations, str) else _score(held.activations, basis),
        ratios=None if held.samples is None else (held.samples @ basis).square().sum(1) * basis.shape[0] / rank,
        specific_weights=_specific(held.weights, basis, held.clean),
        specific_activations=_specific(held.activations, basis, held.clean),
        cosine=None if held.change is None else mean_cosine(basis, held.change),
    )


def _score(target: Target, basis: Tensor) -> Score:
    return Score(recovery(target, basis), oracle_recovery(target, basis.shape[1]))


def _specific(target: Target | str, basis: Tensor, clean: Tensor | str) -> Recovery | str:
    if isinstance(target, str):
        return target
    return clean if isinstance(clean, str) else specificity(target, basis, clean)
