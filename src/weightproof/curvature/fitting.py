"""Fitting Kronecker factors: which matrices, in how many passes over the data, on which process."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from weightproof.activations import undisturbed
from weightproof.collective import Processes
from weightproof.curvature.collector import Collector, CorrectedMoments, Moments, Target, TokenSums, flops_per_token
from weightproof.curvature.eigenbasis import eigenbasis
from weightproof.curvature.factors import Factor, Factors, Source
from weightproof.curvature.objectives import Objective, objective_of, prepared
from weightproof.errors import InputError
from weightproof.forward.windows import digest_items, takes
from weightproof.snapshots.tensor_store import readable, tensor_digest
from weightproof.types import WeightMatrix
from weightproof.weights import iter_tensors, iter_weight_matrices, storage_identity, unwrap

__all__ = ["FitCost", "correct_eigenvalues", "fit_cost", "fit_factors"]

logger = logging.getLogger("weightproof")

DEFAULT_FAMILIES = ("attn", "ffn")

# A factor of this many dimensions takes 16 GiB in float32; heads of large vocabularies have such outputs.
LARGEST_DIMENSION = 65536

_STACKED = "its experts are stacked in one parameter that no linear layer multiplies by: no hook sees their inputs"


@dataclass(frozen=True)
class FitCost:
    """What fitting would take.

    Attributes:
        matrices: Names of the matrices.
        refused: Why others that the patterns name have no factors.
        passes: How often the data is read.
        bytes_of_factors: Memory of all factors together.
        bytes_at_once: Memory of the largest pass.
        flops_per_token: Floating point operations beside the model's own forward and backward pass.
    """

    matrices: tuple[str, ...]
    refused: Mapping[str, str]
    passes: int
    bytes_of_factors: int
    bytes_at_once: int
    flops_per_token: int

    def __str__(self) -> str:
        """In words."""
        return (
            f"{len(self.matrices)} matrices in {self.passes} pass{'es' * (self.passes > 1)} over the data, "
            f"{readable(self.bytes_of_factors)} of factors ({readable(self.bytes_at_once)} at once), "
            f"{self.flops_per_token:.3g} operations a token beside the model's own"
        )


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
    targets, refused = _targets(model, include)
    passes = _passes(targets, max_bytes)
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
            run.checkpoint = None if checkpoint is None else (Path(checkpoint), checkpoint_every, refused)
            with processes.together("reading batches for factors"):
                run.read(batches, _zeros, progress=progress)
            fitted.update(run.factors())
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
    targets, _ = _targets(model, tuple(factors))
    source = factors.source
    objective = objective_of(unwrap(model), source.labels, source.seed, loss_tokens_only=source.loss_tokens_only)

    def make(target: Target, device: torch.device) -> CorrectedMoments:
        factor = factors[target.name]
        left, right = (
            eigenbasis(one, f"a factor of {target.name}").vectors.to(device)
            for one in (factor.gradient_covariance, factor.activation_covariance)
        )
        return CorrectedMoments(left, right, left.new_zeros(target.d_out, target.d_in))

    processes = Processes.join(timeout)
    try:
        run = _Run(unwrap(model), objective, targets, processes, None)
        with processes.together("reading batches for corrected eigenvalues"):
            run.read(batches, make, progress=progress)
        found = {}
        for target in targets:
            (total,), tokens = run.totals(target)
            factor = factors[target.name]
            found[target.name] = replace(factor, corrected_sum=total * (factor.tokens / max(1, tokens)))
    finally:
        processes.close()
    return Factors({name: found[name] for name in factors}, source, factors.refused)


def fit_cost(model: nn.Module, include: str | Sequence[str] | None = None, *, max_bytes: int = 8 << 30) -> FitCost:
    """What `fit_factors` would take, without running the model.

    Raises:
        InputError: As `fit_factors`.
    """
    targets, refused = _targets(model, include)
    passes = [sum(_bytes(one) for one in chosen) for chosen in _passes(targets, max_bytes)]
    names = tuple(one.name for one in targets)
    return FitCost(names, refused, len(passes), sum(passes), max(passes), flops_per_token(targets))


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
        self._model, self._objective, self._targets, self._processes = model, objective, targets, processes
        self._resume = resume
        self._device = next(model.parameters()).device
        self._moments: dict[str, TokenSums] = {}
        self._read, self._chain = 0, ""
        self.checkpoint: tuple[Path, int, Mapping[str, str]] | None = None

    @property
    def source(self) -> Source:
        """What was read so far."""
        o = self._objective
        return Source(o.labels, o.task, o.seed, self._read, self._chain, o.loss_tokens_only)

    def read(
        self, batches: Iterable[Mapping[str, Any]], make: Callable[[Target, torch.device], TokenSums], *, progress: bool
    ) -> None:
        """Add every batch behind those of `resume`; of a run of several processes, this one's share."""
        self._moments = {one.name: make(one, self._device) for one in self._targets}
        collector = Collector(self._targets, self._moments)
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
                if number >= behind:
                    self._save_now_and_then()
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
        batch = {name: value.to(self._device) for name, value in batch.items()}
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
        collector.require_matched()

    def _save_now_and_then(self) -> None:
        if self.checkpoint is None or self._read % self.checkpoint[1]:
            return
        path, _, refused = self.checkpoint
        factors = Factors(self.factors(), self.source, refused)
        if self._processes.rank == 0:
            factors.save(path)

    def totals(self, target: Target) -> tuple[list[Tensor], int]:
        """The sums and the tokens of one matrix over all processes, on the CPU.

        Raises:
            InputError: If a sum is not finite.
        """
        moments = self._moments[target.name]
        mine = [one.cpu().clone() for one in moments.sums()]
        mine.append(torch.tensor([moments.tokens], dtype=torch.float64))
        *sums, count = self._processes.sum(f"factors of {target.name}", mine)
        if not all(bool(torch.isfinite(one).all()) for one in sums):
            raise InputError(f"the inputs or gradients of {target.name} are not finite: it has no factors")
        return sums, int(count)

    def factors(self) -> dict[str, Factor]:
        """The factors of all processes and of what was resumed."""
        found = {}
        for target in self._targets:
            (activation, gradient), tokens = self.totals(target)
            new = Factor(target.name, activation, gradient, tokens, _weight_digest(target))
            before = None if self._resume is None else self._resume.by_name[target.name]
            found[target.name] = new if before is None else _behind(before, new)
        return found


def _zeros(target: Target, device: torch.device) -> Moments:
    # The processor adds in float64 for the price of a copy; an accelerator in float32.
    return Moments.zeros(target, torch.float64 if device.type == "cpu" else torch.float32, device)


def _behind(before: Factor, new: Factor) -> Factor:
    return replace(
        new,
        activation_sum=before.activation_sum + new.activation_sum,
        gradient_sum=before.gradient_sum + new.gradient_sum,
        tokens=before.tokens + new.tokens,
    )


def _targets(model: nn.Module, include: str | Sequence[str] | None) -> tuple[tuple[Target, ...], dict[str, str]]:
    """The matrices to fit with the modules that multiply by them, and why others that were asked for are not."""
    patterns = None if include is None else (include,) if isinstance(include, str) else tuple(include)
    matrices = list(iter_weight_matrices(model))
    modules = _linear_modules(model)
    names = {named.name: storage_identity(named.tensor) for named in iter_tensors(model)}
    targets, refused = [], {}
    for matrix in matrices:
        if not _is_chosen(matrix, patterns):
            continue
        owners = modules.get(names.get(matrix.tensor_name), ())
        reason = _refusal(matrix, owners)
        if reason is None:
            targets.append(Target(matrix.name, matrix.d_out, matrix.d_in, tuple(owners)))
        else:
            refused[matrix.name] = reason
    for pattern in patterns or ():
        if not any(_matches(matrix, pattern) for matrix in matrices):
            raise InputError(f"{pattern!r} matches no weight matrix of this model: see `weightproof inspect` for names")
    if not targets:
        name, reason = next(iter(refused.items()), ("the model", "it has no linear layer of a known family"))
        raise InputError(f"no matrix can have factors; {name}: {reason}")
    return tuple(targets), refused


def _refusal(matrix: WeightMatrix, owners: Sequence[nn.Module]) -> str | None:
    if matrix.refusal is not None:
        return matrix.refusal
    if not owners:
        return _STACKED if matrix.name != matrix.tensor_name else "no linear layer multiplies by it"
    if matrix.shard is not None:
        return "it is sharded over processes: fit the factors on a whole copy of the model"
    largest = max(matrix.d_out, matrix.d_in)
    if largest > LARGEST_DIMENSION:
        return f"a factor of {largest} x {largest} would take {readable(4 * largest**2)}"
    return None


def _is_chosen(matrix: WeightMatrix, patterns: tuple[str, ...] | None) -> bool:
    if patterns is None:
        return matrix.family in DEFAULT_FAMILIES or (matrix.family == "expert")
    return any(_matches(matrix, pattern) for pattern in patterns)


def _matches(matrix: WeightMatrix, pattern: str) -> bool:
    labels = (matrix.name, matrix.name.removesuffix(".weight"), matrix.family)
    return any(fnmatchcase(label, pattern) for label in labels)


def _linear_modules(model: nn.Module) -> dict[Any, list[nn.Module]]:
    """Modules of which the output is input times weight, by the storage of that weight."""
    found: dict[Any, list[nn.Module]] = {}
    for module in unwrap(model).modules():
        is_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        if (isinstance(module, nn.Linear) or is_conv1d) and isinstance(module.weight, Tensor):
            found.setdefault(storage_identity(module.weight), []).append(module)
    return found


def _passes(targets: tuple[Target, ...], max_bytes: int) -> list[tuple[Target, ...]]:
    """Matrices that are fitted together, in their order."""
    passes: list[list[Target]] = [[]]
    room = max_bytes
    for target in targets:
        size = _bytes(target)
        if size > max_bytes:
            raise InputError(
                f"the factors of {target.name} ({target.d_out} x {target.d_in}) take {readable(size)}, more than the "
                f"{readable(max_bytes)} allowed: give more memory (max_bytes=) or leave it out (include=)"
            )
        if size > room:
            passes.append([])
            room = max_bytes
        passes[-1].append(target)
        room -= size
    return [tuple(chosen) for chosen in passes]


def _bytes(target: Target) -> int:
    return 8 * (target.d_in**2 + target.d_out**2)


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
