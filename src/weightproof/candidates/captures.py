"""Activations of a model on prompts, kept for the candidates that are made from them.

Three sets of prompts: clean ones, and pairs that ask for a behaviour (`positive`) and against it (`negative`). Of each
the residual stream at the last real token is kept, at every layer, in float32. Half of the prompts is for making a
basis (FIT), the other for scoring it (EVAL): what was fitted on a prompt is never scored on it.

`weightproof.candidates.capturing.capture` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from weightproof.errors import InputError
from weightproof.numerics.matrices import seeded_generator

FIT, EVAL = "fit", "eval"
_EPS = torch.finfo(torch.float32).eps
NO_CONTRAST = "there are no pairs of prompts for and against a behaviour"
NO_DELTA = "no change of the weights was given to compare activations with"


@dataclass(frozen=True, eq=False)
class Reading:
    """What was read on one set of n prompts, of a model of L blocks and width d; all float32, on the CPU.

    Attributes:
        stream: (L + 1, n, d) residual stream at the last real token; entry l enters block l, the last one leaves the
            last block.
        first: (L + 1, n, d) the same at the first real token, where attention sinks are.
        sequences: For each prompt (L, T, d) what leaves the blocks at every token; () where nobody asked.
        attention: For each prompt (L, T) how much the last token attends to each token, mean over heads; () where
            nobody asked or the model does not give it.
        mlp: For each block what was read of its MLP at the last token: "up_input" (n, d), "up_output" (n, f),
            "gate_output" (n, f) where there is a gate, and "activated" (n, f), what the down-projection is given.
        gaps: "attention" or "mlp" -> why nothing of it was read.
    """

    stream: Tensor
    first: Tensor
    sequences: tuple[Tensor, ...] = ()
    attention: tuple[Tensor, ...] = ()
    mlp: tuple[Mapping[str, Tensor], ...] = ()
    gaps: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def num_prompts(self) -> int:
        """How many prompts there are."""
        return self.stream.shape[1]


@dataclass(frozen=True, eq=False)
class Captures:
    """Activations of one model, and what a change of its weights does to them.

    Attributes:
        layers: Names of the blocks.
        clean: On plain prompts.
        positive: On prompts that ask for a behaviour; None without.
        negative: On the same ones, asking against it.
        steered: (L, n, d) what leaves the blocks at the last token of the clean prompts with the change added, minus
            with it taken off (or left out); None without a change.
        activation: Name of the model's activation function, "silu" for example; None where its config has none.
        seed: Which split into halves; None: even prompts are for fitting, odd ones for scoring.
    """

    layers: tuple[str, ...]
    clean: Reading
    positive: Reading | None = None
    negative: Reading | None = None
    steered: Tensor | None = None
    activation: str | None = None
    seed: int | None = None

    def with_seed(self, seed: int | None) -> Captures:
        """The same activations, split into other halves."""
        return replace(self, seed=seed)

    def half(self, count: int, which: str = FIT) -> Tensor:
        """Numbers of the prompts of one half, ascending; of an odd number FIT has one more."""
        order = torch.arange(count)
        if self.seed is not None:
            order = torch.randperm(count, generator=seeded_generator("halves of prompts", self.seed, count))
        start = {FIT: 0, EVAL: 1}[which]
        return order[start::2].sort().values

    def require_rank(self, rank: int) -> None:
        """Refuse a rank for which there are too few prompts.

        Raises:
            InputError: Either half of any set has fewer prompts than `rank`.
        """
        sets = {"clean": self.clean, "positive": self.positive, "negative": self.negative}
        for name, reading in sets.items():
            if reading is not None and reading.num_prompts // 2 < max(1, rank):
                raise InputError(
                    f"a basis of rank {rank} needs at least {2 * max(1, rank)} {name} prompts, half of them to fit it "
                    f"and half to score it; there are {reading.num_prompts}: give more prompts or a lower rank"
                )

    def gap(self, need: str) -> str | None:
        """Why something that a candidate needs is not there; None where it is."""
        if need in ("contrast", "attention") and (self.positive is None or self.negative is None):
            return NO_CONTRAST
        if need == "delta" and self.steered is None:
            return NO_DELTA
        readings = [one for one in (self.clean, self.positive, self.negative) if one is not None]
        return next((one.gaps[need] for one in readings if need in one.gaps), None)

    # -- samples, (prompts of one half, d) in float64 ----------------------------------------------------------

    def states(self, which: str, layer: int, half: str = FIT) -> Tensor:
        """The stream that leaves a block, of "clean", "positive" or "negative" prompts."""
        reading = self._reading(which)
        return reading.stream[layer + 1, self.half(reading.num_prompts, half)].to(torch.float64)

    def all_states(self, which: str, half: str = FIT) -> Tensor:
        """The stream that leaves every block, (L, prompts, d)."""
        reading = self._reading(which)
        return reading.stream[1:, self.half(reading.num_prompts, half)].to(torch.float64)

    def added(self, layer: int, half: str = FIT) -> Tensor:
        """What a block adds to the stream of the clean prompts."""
        rows = self.half(self.clean.num_prompts, half)
        before, after = (self.clean.stream[index, rows].to(torch.float64) for index in (layer, layer + 1))
        return after - before

    def contrast(self, layer: int, half: str = FIT) -> Tensor:
        """Positive minus negative, pair by pair."""
        return self.states("positive", layer, half) - self.states("negative", layer, half)

    def difference(self, layer: int, half: str = EVAL) -> Tensor:
        """What the change of the weights makes of the stream: the samples that a basis is scored on.

        Raises:
            InputError: There is no change.
        """
        if self.steered is None:
            raise InputError(f"activations cannot be compared: {NO_DELTA}")
        return self.steered[layer, self.half(self.steered.shape[1], half)].to(torch.float64)

    def mlp(self, which: str, layer: int, what: str, half: str = FIT) -> Tensor:
        """What was read of an MLP (see `Reading.mlp`)."""
        reading = self._reading(which)
        return reading.mlp[layer][what][self.half(reading.num_prompts, half)].to(torch.float64)

    def noise(self, layer: int) -> float:
        """What rounding alone can make of a difference between two readings: a bound on its singular values."""
        readings = [one for one in (self.clean, self.positive) if one is not None]
        size = max(float(torch.linalg.vector_norm(one.stream[layer + 1].to(torch.float64))) for one in readings)
        return 4.0 * _EPS * size

    def _reading(self, which: str) -> Reading:
        found = {"clean": self.clean, "positive": self.positive, "negative": self.negative}[which]
        if found is None:
            raise InputError(f"no {which} prompts were given: {NO_CONTRAST}")
        return found
