"""Fitting Kronecker factors: passes over the data, on one process or several, resumed and checkpointed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from weightproof.activations import undisturbed
from weightproof.collective import Processes
from weightproof.curvature.bases import bases_of
from weightproof.curvature.collector import Collector, Target
from weightproof.curvature.factors import Factor, Factors, Source, summed
from weightproof.curvature.moments import CorrectedMoments, Moments, TokenSums
from weightproof.curvature.objectives import Objective, check_batch, objective_of, prepared
from weightproof.curvature.targets import FitCost, dealt_passes, find_targets, fit_cost
from weightproof.errors import InputError
from weightproof.forward.windows import digest_items, takes
from weightproof.snapshots.tensor_store import readable, tensor_digest
from weightproof.weights import unwrap

__all__ = ["FitCost", "correct_eigenvalues", "fit_cost", "fit_factors"]

logger = logging.getLogger("weightproof")


def fit_factors(  # noqa: PLR0913 - the first five are fixed, the others have defaults that suit most
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    include: str | Sequence[str] | None = None,
    labels: str = "sampled",
    seed: int = 0,
    *,
    max_bytes: int = 8 << 30,
    loss_tokens_only: bool = False,
    resume: Factors | None = None,
    timeout: float = 600.0,
    require_full_rank: bool = True,
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> Factors:
    """Fit K-FAC factors of a model's linear layers on some data.

    The model is run in evaluation mode, its weights, gradients, flags and random state are left as found. In a run of
    several processes all of them call this with the same batches; each reads its share, all get the sum.

    Args:
        model: A transformers model with a known loss (causal, masked, sequence-to-sequence, classification).
        batches: Dicts of tensors with a batch axis: `input_ids`, `attention_mask`, `labels`. Any iterable; one that
            can be read once only will do if all factors fit `max_bytes`.
        include: Globs on names or families of matrices; by default those of attention and feed-forward layers.
        labels: "sampled" from the model's distribution (the Fisher matrix), or "empirical": those of the data.
        seed: Of the sampled labels.
        max_bytes: Memory for factors at once; more factors are fitted in several passes over the data.
        loss_tokens_only: Leave out tokens whose label is ignored (a prompt, for example).
        resume: Factors of the first batches of the same data: goes on behind them.
        timeout: Seconds that a process waits for the others.
        require_full_rank: Refuse the result if a matrix has more dimensions than tokens; switch off for parts that
            will be merged.
        checkpoint: File that is written every `checkpoint_every` batches, to resume from; one pass only.
        checkpoint_every: Batches between two of them.
        progress: Show a progress bar.

    Returns:
        The factors, on the CPU.

    Raises:
        InputError: If a pattern matches nothing or only what has no factors, a matrix is too large, a batch cannot be
            used, a gradient is not finite, the data is not what `resume` was fitted on, or there are too few tokens.
    """
    targets, refused = find_targets(model, include)
    passes = dealt_passes(targets, max_bytes)
    objective = objective_of(unwrap(model), labels, seed, loss_tokens_only=loss_tokens_only)
    if len(passes) > 1 and iter(batches) is iter(batches):
        raise InputError(
            f"the factors take {len(passes)} passes within {readable(max_bytes)}, and these batches can be read only "
            "once: give a list or a DataLoader, fewer matrices (include=), or more memory (max_bytes=)"
        )
    if checkpoint is not None and len(passes) > 1:
        raise InputError("checkpoints need all factors in one pass: give more memory (max_bytes=) or fewer matrices")
    _require_resumable(resume, targets, objective)
    processes = Processes.join(timeout)
    try:
        runs = [_Run(unwrap(model), objective, chosen, processes, resume) for chosen in passes]
        fitted: dict[str, Factor] = {}
        for run in runs:
            moments = _zeros(run.targets, run.device)
            save = None if checkpoint is None else _Checkpoint(Path(checkpoint), checkpoint_every, moments, refused)
            with processes.together("reading batches for factors"):
                run.read(batches, moments, save, progress=progress)
            fitted.update(run.factors(moments))
        factors = Factors({one.name: fitted[one.name] for one in targets}, runs[0].source, refused)
    finally:
        processes.close()
    if require_full_rank:
        factors.require_enough_tokens()
    return factors


def correct_eigenvalues(
    factors: Factors,
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    timeout: float = 600.0,
    progress: bool = True,
) -> Factors:
    """Fit the eigenvalues of EK-FAC in the eigenbases of factors: E[(u_i' g)^2 (v_j' a)^2] (arXiv:1806.03884).

    One more pass over the data, with the labels of the factors. Three arrays of the size of each matrix and its two
    eigenbases are held at once: choose the matrices when the factors are fitted.

    Args:
        factors: Fitted at the weights of `model`.
        model: The model.
        batches: Data, best that of the factors.
        timeout: Seconds that a process waits for the others.
        progress: Show a progress bar.

    Returns:
        The same factors with `corrected_sum`, scaled to their number of tokens.

    Raises:
        InputError: As `fit_factors`, or if the factors are of other weights.
    """
    factors.require_weights(model)
    targets, _ = find_targets(model, tuple(factors))
    source = factors.source
    objective = objective_of(unwrap(model), source.labels, source.seed, loss_tokens_only=source.loss_tokens_only)

    processes = Processes.join(timeout)
    try:
        run = _Run(unwrap(model), objective, targets, processes, None)
        moments = CorrectedMoments({one.name: _vectors(factors[one.name], run.device) for one in targets})
        with processes.together("reading batches for corrected eigenvalues"):
            run.read(batches, moments, progress=progress)
        found = {}
        for name, (total, tokens) in moments.over(processes).items():
            factor = factors[name]
            found[name] = replace(factor, corrected_sum=total * (factor.tokens / max(1, tokens)))
    finally:
        processes.close()
    return Factors({name: found[name] for name in factors}, source, factors.refused)


@dataclass(frozen=True)
class _Checkpoint:
    """Where the factors of the batches so far are written, and how often."""

    path: Path
    every: int
    moments: Moments
    refused: Mapping[str, str]


class _Run:
    """One pass over the data for some of the matrices."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        targets: tuple[Target, ...],
        processes: Processes,
        resume: Factors | None,
    ) -> None:
        self.targets = targets
        self.device = next(model.parameters()).device
        self._model, self._objective, self._processes, self._resume = model, objective, processes, resume
        self._read, self._chain = 0, ""

    @property
    def source(self) -> Source:
        """What was read so far."""
        o = self._objective
        return Source(o.labels, o.task, o.seed, self._read, self._chain, o.loss_tokens_only)

    def read(
        self,
        batches: Iterable[Mapping[str, Any]],
        sums: TokenSums,
        checkpoint: _Checkpoint | None = None,
        *,
        progress: bool,
    ) -> None:
        """Add every batch behind those of `resume`; of a run of several processes, this one's share."""
        collector = Collector(self.targets, sums)
        behind = 0 if self._resume is None else self._resume.source.batches
        bar = tqdm(batches, desc="factors", unit="batch", disable=None if progress else True, leave=False)
        shown = bar if self._processes.rank == 0 else batches
        with undisturbed(self._model), torch.enable_grad(), _frozen(self._model), collector.collecting():
            for number, given in enumerate(shown):
                batch = prepared(_tensors(given, number), self._model, self._objective.task)
                self._count(batch)
                if number >= behind and (number - behind) % self._processes.size == self._processes.rank:
                    self._add(collector, batch, number)
                if number + 1 == behind:
                    self._require_same_data()
                if number >= behind and checkpoint is not None:
                    self._save_now_and_then(checkpoint)
        if self._read <= behind:
            raise InputError("there is no batch" + (" behind those that were read before" if behind else ""))

    def _count(self, batch: Mapping[str, Tensor]) -> None:
        self._read += 1
        self._chain = hashlib.sha256(f"{self._chain}\n{digest_items([batch])}".encode()).hexdigest()

    def _require_same_data(self) -> None:
        if self._resume is not None and self._chain != self._resume.source.data_digest:
            raise InputError(
                f"the first {self._read} batches are not those on which the factors to resume from were fitted "
                f"(hash {self._chain[:12]}, theirs {self._resume.source.data_digest[:12]})"
            )

    def _add(self, collector: Collector, batch: Mapping[str, Tensor], number: int) -> None:
        check_batch(batch, self._model, self._objective.task, f"batch {number}")
        batch = {name: value.to(self.device) for name, value in batch.items()}
        collector.masks = self._objective.masks(batch)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        switches = {"use_cache": False} if takes(self._model, "use_cache") else {}
        output = self._model(**inputs, **switches)
        logits = output["logits"] if isinstance(output, Mapping) else output[0]
        loss = self._objective.loss(logits, batch, number)
        if not bool(torch.isfinite(loss)):
            raise InputError(f"the loss of batch {number} is {float(loss)}: the factors would hold NaN")
        if loss.requires_grad:
            loss.backward()
        collector.end_pass()

    def _save_now_and_then(self, checkpoint: _Checkpoint) -> None:
        if self._read % checkpoint.every:
            return
        factors = Factors(self.factors(checkpoint.moments), self.source, checkpoint.refused)
        if self._processes.rank == 0:
            factors.save(checkpoint.path)

    def factors(self, moments: Moments) -> dict[str, Factor]:
        """The factors of all processes and of what was resumed."""
        sums = moments.over(self._processes)
        found = {
            one.name: Factor(
                one.name, sums[one.name].activation, sums[one.name].gradient, sums[one.name].tokens, _weight_digest(one)
            )
            for one in self.targets
        }
        return found if self._resume is None else summed(self._resume.by_name, found)


def _zeros(targets: tuple[Target, ...], device: torch.device) -> Moments:
    # The processor adds in float64 for the price of a copy; an accelerator in float32.
    sizes = {one.name: (one.d_out, one.d_in) for one in targets}
    return Moments(sizes, torch.float64 if device.type == "cpu" else torch.float32, device)


def _vectors(factor: Factor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Eigenvectors of G and of A."""
    bases = bases_of(factor)
    return bases.gradient.vectors.to(device), bases.activation.vectors.to(device)


def _weight_digest(target: Target) -> str:
    module = target.modules[0]
    weight = module.weight.detach()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return tensor_digest(weight if isinstance(module, nn.Linear) else weight.T)


def _require_resumable(resume: Factors | None, targets: tuple[Target, ...], objective: Objective) -> None:
    if resume is None:
        return
    if list(resume.by_name) != [one.name for one in targets]:
        raise InputError("the factors to resume from are of other matrices: give the same include=")
    source = resume.source
    ours = (objective.labels, objective.task, objective.seed, objective.loss_tokens_only)
    theirs = (source.labels, source.loss, source.seed, source.loss_tokens_only)
    if ours != theirs:
        raise InputError(f"the factors to resume from were fitted with other settings: {theirs}, now {ours}")
    for target in targets:
        if resume[target.name].weight_digest not in ("", _weight_digest(target)):
            raise InputError(f"the weights of {target.name} are not those of the factors to resume from")


def _tensors(given: Mapping[str, Any], number: int) -> dict[str, Tensor]:
    if not isinstance(given, Mapping):
        raise InputError(f"batch {number} is no dict of tensors but {type(given).__name__}")
    found = {}
    for name, value in given.items():
        if isinstance(value, list | tuple):
            value = torch.as_tensor(value)  # noqa: PLW2901 - lists of numbers are batches too
        if isinstance(value, Tensor):
            found[name] = value[None] if value.ndim == 1 and name not in ("labels", "label") else value
    if not found:
        raise InputError(f"batch {number} holds no tensor (found: {', '.join(map(str, given)) or 'nothing'})")
    return found


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter gets a gradient: only the outputs of the hooked layers do."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, needed in flags:
            parameter.requires_grad_(needed)
