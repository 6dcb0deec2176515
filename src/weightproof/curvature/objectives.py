"""The loss whose curvature is fitted: summed over tokens, with labels drawn from the model or taken from the data.

With labels drawn from the model's own distribution, E[g g'] is a block of the Fisher matrix, which is the Gauss-Newton
matrix of the loss (Martens 2020, arXiv:1412.1193); with those of the data it is the "empirical Fisher", which is not
(Kunstner et al. 2019, arXiv:1905.12558). Sums, not means: the mean over a batch would scale g by the batch's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from weightproof.errors import InputError
from weightproof.forward.calibration import LABEL_NAMES
from weightproof.forward.windows import vocab_size
from weightproof.loss_data.items import IGNORED, check_range, task_of
from weightproof.numerics.matrices import seeded_generator

__all__ = ["LABELS", "Objective", "objective_of"]

LABELS = ("sampled", "empirical")

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Objective:
    """Which loss a model is trained with, and which labels it gets here.

    Attributes:
        task: "causal", "masked", "tokens", "seq2seq" or "classes".
        labels: One of `LABELS`.
        seed: Of the sampled labels.
        loss_tokens_only: Leave tokens out whose label is ignored. By default prompt tokens count, for the loss's
            gradient reaches them through attention.
    """

    task: str
    labels: str
    seed: int
    loss_tokens_only: bool = False

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor], number: int) -> Tensor:
        """The summed negative log-likelihood of a batch.

        Args:
            logits: (batch, positions, classes) or, for "classes", (batch, classes).
            batch: Its inputs, with `labels` where the data has them.
            number: Of the batch in the data: sampled labels depend on it and the seed alone.

        Raises:
            InputError: If labels are needed and missing.
        """
        scored = self.scored(batch)
        rows = logits[scored.to(logits.device)] if self.task != "causal" else logits[:, :-1][scored[:, :-1]]
        if self.labels == "sampled":
            labels = sample(rows.detach(), seeded_generator("curvature labels", self.seed, number))
        else:
            labels = self._given(batch, scored)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return cross_entropy(rows, labels.to(rows.device), reduction="sum")

    def scored(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Which positions predict something that counts: (batch, positions) bool, or (batch,) for "classes"."""
        given = batch.get("labels")
        if self.task == "classes":
            return torch.ones(len(next(iter(batch.values()))), dtype=torch.bool)
        real = self._real(batch)
        if self.task != "causal":
            return real if given is None else real & given.ne(IGNORED)
        following = real[:, 1:] if given is None else real[:, 1:] & given[:, 1:].ne(IGNORED)
        return torch.cat([real[:, :-1] & following, torch.zeros_like(real[:, :1])], dim=1)

    def masks(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which tokens count in A and G, by side: "main", and "encoder" beside a decoder.

        The final real token of a causal window predicts nothing, so its gradient is zero: it is left out of both.
        """
        if self.task == "classes":
            ids = batch.get("input_ids")
            main = batch.get("attention_mask")
            if main is None:
                return {} if ids is None else {"main": torch.ones_like(ids, dtype=torch.bool)}
            return {"main": main.ne(0)}
        scored, real = self.scored(batch), self._real(batch)
        if self.loss_tokens_only:
            main = scored
        elif self.task == "causal":
            main = torch.cat([real[:, :-1] & real[:, 1:], torch.zeros_like(real[:, :1])], dim=1)
        else:
            main = real
        if self.task != "seq2seq":
            return {"main": main}
        source = batch.get("attention_mask")
        ids = batch["input_ids"]
        return {"main": main, "encoder": torch.ones_like(ids, dtype=torch.bool) if source is None else source.ne(0)}

    def _real(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Tokens that are no padding."""
        if self.task == "seq2seq":
            mask, ids = batch.get("decoder_attention_mask"), batch["decoder_input_ids"]
        else:
            mask, ids = batch.get("attention_mask"), batch["input_ids"]
        return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.ne(0)

    def _given(self, batch: Mapping[str, Tensor], scored: Tensor) -> Tensor:
        labels = batch.get("labels")
        if self.task == "causal":
            following = batch["input_ids"] if labels is None else labels
            return following[:, 1:][scored[:, :-1]]
        if labels is None:
            raise InputError("labels='empirical' needs labels in every batch: add them, or use labels='sampled'")
        return labels if self.task == "classes" else labels[scored]


def objective_of(model: nn.Module, labels: str, seed: int, *, loss_tokens_only: bool = False) -> Objective:
    """The objective of a model, told from its class and config.

    Raises:
        InputError: If no loss is known for it, or `labels` is unknown.
    """
    if labels not in LABELS:
        raise InputError(f"labels must be 'sampled' (from the model's distribution) or 'empirical', not {labels!r}")
    task, reason = task_of(model)
    if task is None:
        raise InputError(f"no curvature can be fitted: {reason.removesuffix(': give a metric')}")
    return Objective(task, labels, seed, loss_tokens_only)


def prepared(batch: Mapping[str, Tensor], model: nn.Module, task: str) -> dict[str, Tensor]:
    """A batch with its labels under one name, and decoder inputs made from them where there are none."""
    found = {name: value for name, value in batch.items() if name not in LABEL_NAMES}
    labels = next((batch[name] for name in LABEL_NAMES if name in batch), None)
    if labels is not None:
        found["labels"] = labels
    if task == "seq2seq" and "decoder_input_ids" not in found:
        make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if labels is None or make is None:
            raise InputError("batches of a sequence-to-sequence model need decoder_input_ids or labels")
        found["decoder_input_ids"] = make(labels=labels)
    return found


def check_batch(batch: Mapping[str, Tensor], model: nn.Module, task: str, where: str) -> None:
    """Refuse a batch that the model could not read, before it is run.

    Raises:
        InputError: If it has no token ids, or ids or labels that the model does not have.
    """
    ids = batch.get("input_ids")
    if ids is None:
        if task == "classes":  # of images, for example
            return
        raise InputError(f"{where} has no input_ids (found: {', '.join(batch)}): give token ids")
    if ids.is_floating_point():
        raise InputError(f"{where} holds floating point numbers where token ids belong: give integers")
    check_range(ids, vocab_size(model), "token id", where)
    labels = batch.get("labels")
    if task in ("causal", "masked", "seq2seq") and labels is not None:
        check_range(labels[labels.ne(IGNORED)], vocab_size(model), "label", where)


@torch.no_grad()
def sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One class a row, drawn from softmax(logits): (n, classes) -> (n,) int64, the same on every device up to rounding.

    By inverting the cumulative distribution at uniform numbers that a CPU generator gives, some rows at a time.
    """
    uniform = torch.rand(len(logits), generator=generator, dtype=torch.float64)
    found = torch.empty(len(logits), dtype=torch.int64)
    step = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        heaps = torch.softmax(logits[rows].double(), dim=-1).cumsum(dim=-1)
        wanted = uniform[rows, None].to(heaps.device) * heaps[:, -1:]
        found[rows] = torch.searchsorted(heaps, wanted, right=True).clamp(max=logits.shape[-1] - 1)[:, 0].cpu()
    return found
