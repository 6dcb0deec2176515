"""The nouns of weightproof: frozen dataclasses shared by measurement, judgement and evidence.

Units: singular values, norms and edges are in the units of the weights they were taken from,
unless a field says otherwise; matrices are always oriented (d_out, d_in).
A value that was not measured is None, never 0.0, 1.0 or -1, and comes with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from weightproof.parallel.shards import Shard


class Outcome(StrEnum):
    """What one guard found. NOT_MEASURED is never PASS."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"
    NOT_MEASURED = "NOT_MEASURED"


class Action(StrEnum):
    """What the policy says to do with a change."""

    KEEP = "KEEP"
    ROLLBACK = "ROLLBACK"
    HALT = "HALT"


class Assurance(StrEnum):
    """The highest tier of evidence that was measured for a decision."""

    LOSS = "loss"
    OUTPUTS_ONLY = "outputs-only"
    WEIGHTS_ONLY = "weights-only"
    NONE = "none"


@dataclass(frozen=True, slots=True, eq=False)
class WeightMatrix:
    """One weight matrix of a model or checkpoint, oriented (d_out, d_in).

    Attributes:
        name: Public name without wrapper prefixes; one expert of a stack is `...gate_up_proj[3]`.
        family: attn, ffn, expert, router, embed, head, conv or other.
        d_out: Rows: outputs of the linear map.
        d_in: Columns: inputs (a convolution counts in_channels / groups * kernel positions).
        dtype: Storage dtype.
        tied_names: Other public names under which the same storage is registered.
        tensor_name: Public name of the stored tensor this matrix is (a slice of).
        load: Returns the (d_out, d_in) tensor, detached; see `is_view`. Raises InputError when sharded.
        is_view: True when `load()` aliases live model storage, so that a write to it is an edit.
        refusal: Why this tensor is enumerated but not measured (None when measured).
        select: Turns any tensor laid out like the stored `tensor_name` (a kept original, for
            example) into this matrix; a view of it. None where the matrix is joined from several.
        shard: The part of the matrix that this process holds, 2-D; None when it holds all of it.
        select_shard: For a sharded matrix: turns any shard laid out like that of `tensor_name` into one of
            this matrix.
        storage: Backend that stores a packed matrix (a quantizer, a pruning mask); None for a plain one.
        parts: Of a packed matrix: local name of each part -> public name of the tensor that it is.
        rebuild: Of a packed matrix: its values from other contents of its parts, by local name.
    """

    name: str
    family: str
    d_out: int
    d_in: int
    dtype: torch.dtype
    tied_names: tuple[str, ...]
    tensor_name: str
    load: Callable[[], torch.Tensor]
    is_view: bool = True
    refusal: str | None = None
    select: Callable[[torch.Tensor], torch.Tensor] | None = None
    shard: Shard | None = None
    select_shard: Callable[[Shard], Shard] | None = None
    storage: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict[str, str])
    rebuild: Callable[[Mapping[str, torch.Tensor]], torch.Tensor] | None = None

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Public names of every tensor that holds a part of it."""
        return tuple(self.parts.values()) or (self.tensor_name,)


@dataclass(frozen=True, slots=True, eq=False)
class NamedTensor:
    """A parameter or buffer under its public name; `tied_names` are its other names.

    `shape` is that of the whole tensor; `tensor` may be a shard of it (see `weightproof.parallel.shards`).
    `part_of` is the packed matrix that it is a part of, with the backend that stores it so; None for any other.
    """

    name: str
    tensor: torch.Tensor
    is_buffer: bool
    persistent: bool
    tied_names: tuple[str, ...]
    shape: tuple[int, ...]
    part_of: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """Singular-value summary of one matrix.

    `spectral_norm_error` is absolute: |true - spectral_norm| <= spectral_norm_error (0 <= error;
    for an estimate it holds with the failure probability named in `method`).
    `singular_values` is a 1-D float64 tensor in descending order, None when only estimated.
    `alpha` is the power-law exponent of the eigenvalue density with its standard error, None
    where the spectrum is too short or not exact.
    """

    name: str
    d_out: int
    d_in: int
    spectral_norm: float
    spectral_norm_error: float
    frobenius_norm: float
    stable_rank: float
    effective_rank: float | None
    alpha: float | None
    alpha_error: float | None
    singular_values: torch.Tensor | None
    method: str


@dataclass(frozen=True, slots=True, eq=False)
class BulkFit:
    """Marchenko-Pastur fit of the bulk of one spectrum.

    Everything is in the units of `singular_values`, the spectrum the fit was made on: raw for
    `null="global"`, biwhitened for `"biwhitened"`; for `"signflip"` the singular values are raw
    and the edge is that of the sign-flipped matrix. `threshold` is the upper edge plus the
    Tracy-Widom allowance: values above it are spikes. `row_scale` / `col_scale` are the whitening
    factors (None unless biwhitened): whitened = W * row_scale[:, None] * col_scale[None, :].
    """

    name: str
    d_out: int
    d_in: int
    sigma_mp: float
    aspect_ratio: float
    edge_minus: float
    edge_plus: float
    threshold: float
    num_spikes: int
    spike_energy: float
    ks_distance: float
    null: str
    method: str
    singular_values: torch.Tensor
    row_scale: torch.Tensor | None = None
    col_scale: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class TensorReading:
    """Exact facts about one parameter or buffer. `num_nonfinite` counts NaN and inf, `num_nan` NaN alone.

    Of a tensor that every process holds whole, the facts are those of the lowest rank where it is not finite,
    else of rank 0; `differing_ranks` are the ranks whose copy is not that of rank 0 bit for bit. `nonfinite_ranks`
    are those whose copy or part is not finite, where that is not every rank. `part_of` is the packed matrix that the
    tensor is a part of; its `storage` is then the backend's name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    storage: str
    is_buffer: bool
    num_nonfinite: int
    digest: str
    num_nan: int | None = None
    differing_ranks: tuple[int, ...] = ()
    nonfinite_ranks: tuple[int, ...] = ()
    part_of: str | None = None

    @property
    def is_infinite_by_design(self) -> bool:
        """A buffer with inf but no NaN, such as an additive attention mask."""
        return self.is_buffer and self.num_nonfinite > 0 and self.num_nan == 0


@dataclass(frozen=True, slots=True)
class MatrixReading:
    """Cheap statistics of one weight matrix (a few reads of its elements).

    `norm_collapse` is min(row_min / row_median, col_min / col_median) over row and column norms.
    All None when the matrix could not be measured; `reason` says why.
    """

    name: str
    family: str
    d_out: int
    d_in: int
    frobenius_norm: float | None
    spectral_norm: float | None
    spectral_norm_error: float | None
    norm_collapse: float | None
    zero_rows: int | None
    zero_cols: int | None
    method: str
    reason: str | None = None

    @property
    def stable_rank(self) -> float | None:
        """(||W||_F / s1)^2; None when not measured or for a zero matrix."""
        if self.frobenius_norm is None or not self.spectral_norm:
            return None
        return (self.frobenius_norm / self.spectral_norm) ** 2


@dataclass(frozen=True, slots=True)
class BulkReading:
    """Marchenko-Pastur statistics of one matrix.

    `num_spikes` lies within [`num_spikes_low`, `num_spikes_high`] (equal when counted exactly).
    `top_over_edge` is s1 / edge_plus, both under `null`.
    """

    name: str
    family: str
    null: str
    sigma_mp: float | None
    edge_plus: float | None
    num_spikes: int | None
    num_spikes_low: int | None
    num_spikes_high: int | None
    spike_energy: float | None
    ks_distance: float | None
    top_over_edge: float | None
    pure_bulk: bool | None
    method: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class StructureReading:
    """Module classes by public module name, and tie groups (each a sorted tuple of names)."""

    modules: Mapping[str, str]
    ties: frozenset[tuple[str, ...]]
    embedding_sizes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ContractReading:
    """One number that a declared kind of edit bounds, for one matrix.

    `rigorous` bounds are theorems about the declared kind (a breach is FAIL); the others are
    typical sizes (a breach is WARN). `value` None: not measurable, `reason` says why. Of a value beyond its limit
    `reason` may say what it looks like (a delta merged twice, for example).
    """

    target: str
    statistic: str
    value: float | None
    limit: float
    rigorous: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class BlockError:
    """Relative error of one block's output when fed the baseline's input of that block."""

    block: str
    relative_error: float


@dataclass(frozen=True, slots=True)
class DivergenceReading:
    """Outputs now against outputs at baseline on one set of windows.

    `kl` is KL(base || now) in nats per token (a lower bound when the base distribution is cached
    as top-k plus one bucket); for models without logits `kl` is None and `hidden_error`, the
    relative RMS change of the normalised last hidden state, is given instead. `reason` says why
    there are no outputs at all (then `finite` is False).
    """

    windows: str
    windows_digest: str
    num_tokens: int
    kl: float | None
    kl_max: float | None
    top1_flip_rate: float | None
    hidden_error: float | None
    finite: bool
    blocks: tuple[BlockError, ...] = ()
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class LossReading:
    """One metric on one set of windows, before and after a change, perfectly paired.

    Attributes:
        role: "retain" (must not get worse) or "target" (must get better).
        windows_digest: SHA-256 over inputs, labels, their order and the tokenizer where it is known.
        metric: "nll" (nats per token) or the name of a per-example metric, such as "accuracy".
        num_windows: Windows there are.
        num_groups: What is resampled: documents, or windows where documents are unknown.
        num_tokens: Scored tokens (examples, where the metric is one number an example).
        num_used: Groups read before a sequential test stopped; `num_groups` where it did not.
        tokens_used: Tokens of those groups.
        before: Weighted mean over what was used, per token or example.
        after: The same after the change.
        difference: after - before; for "nll" the logarithm of the perplexity ratio.
        lower: Lower end of the interval of `difference` at `confidence`.
        upper: Upper end.
        confidence: Two-sided, such as .95.
        effective_size: (sum w)^2 / sum w^2 of the weights of the groups used.
        method: How the interval was made: "bca", "confidence-sequence", "newcombe", ...
        undecided: Why no interval can be trusted, None where one can.
        reason: Why nothing was measured; then every number is None.
        sums: What a verifier recomputes: total losses before and after, and total weight, of what was used.
    """

    role: str
    windows_digest: str
    metric: str
    num_windows: int
    num_groups: int
    num_tokens: int
    num_used: int
    tokens_used: int
    before: float | None
    after: float | None
    difference: float | None
    lower: float | None
    upper: float | None
    confidence: float | None
    effective_size: float | None
    method: str
    undecided: str | None = None
    reason: str | None = None
    sums: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class CircuitReading:
    """Singular values of one function-relevant product of matrices, such as one head's W_q' W_k.

    `kind` is "qk", "ov" or "mlp"; `values` are descending, in the units of the product; `matrices` are the
    names of the matrices in it. `reason` says why it was not measured (then `values` is None).
    """

    name: str
    kind: str
    matrices: tuple[str, ...]
    values: tuple[float, ...] | None
    method: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class CurvatureReading:
    """Loss change that the change of one matrix should cost by its Kronecker factors (`weightproof.curvature`).

    `predicted` is 1/2 tr(G E A E') in nats per token, E the difference to the weights at which the factors were fitted;
    `relative_change` is ||E||_F / ||W||_F (None where W is zero). `reason` says why it was not measured (then both
    are None).
    """

    name: str
    family: str
    predicted: float | None
    relative_change: float | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class LossForecast:
    """What a change should cost by curvature, without a forward pass.

    `factors` is the digest of the factors, `matrices` the readings of the changed matrices that have some, in their
    order, and `not_covered` the names of the changed matrices that have none.
    """

    factors: str
    matrices: tuple[CurvatureReading, ...]
    not_covered: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredCosine:
    """How far the change of a matrix writes into one stored direction.

    `cosine` is ||Q'E||_F / ||E||_F for directions Q of the residual stream, <E, D> / (||E||_F ||D||_F) for a stored
    change D of the same matrix; `chance` is the root mean square of it for random directions.
    """

    direction: str
    cosine: float
    chance: float


@dataclass(frozen=True, slots=True)
class DirectionsReading:
    """Which directions of one matrix came with a change (see `weightproof.numerics.intruders`).

    `cosines` holds, for each leading left singular vector after the change, the largest cosine with those before it;
    `earlier` the low ones among those of earlier changes since the baseline. `stored` are cosines with directions that
    the user keeps. `reason` says why there are no `cosines`.
    """

    name: str
    family: str
    cosines: tuple[float, ...] | None
    earlier: tuple[float, ...]
    stored: tuple[StoredCosine, ...]
    method: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class SubspaceReading:
    """The directions of a merge or of steering: those of the changed matrices in the order of the model.

    `directions` is the digest of the stored directions, None where there are none; `not_compared` names those of them
    that no changed matrix could be compared with.
    """

    matrices: tuple[DirectionsReading, ...]
    directions: str | None = None
    not_compared: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DiagnosticReading:
    """One diagnostic of training health: its status ("pass", "warn", "fail", "skipped", "invalid") and its number."""

    name: str
    status: str
    value: float | None
    threshold: float | None
    location: str | None
    message: str


@dataclass(frozen=True, slots=True)
class HealthReading:
    """A report of training health that was handed to a guard (`weightproof.health`), made at a step of the training."""

    diagnostics: tuple[DiagnosticReading, ...]
    step: int | None = None


@dataclass(frozen=True, slots=True)
class Reach:
    """How much of a model's matrices an edit changed (values or storage), in parameters.

    `untouched` names, by family, the tensors of matrices that a quantization left as they were; `untouched_fraction`
    is their share of the family's parameters, of any edit.
    """

    touched_fraction: float
    untouched: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    untouched_fraction: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class EditRecord:
    """What changed: by declaration and by measurement.

    `relative_delta` is ||W' - W||_F / ||W||_F per changed matrix (None where W is zero).
    `stray_names` changed since the last accepted state outside of any guarded change;
    `corrections` says which matrices a policy with `correct` brought back to their limit, and `reverted` which
    tensors of the edit were restored, so that the rest of it could be kept (`on_violation="revert-worst"`). `reach`
    is None for training, and where nobody read it.
    """

    name: str
    kind: str
    params: Mapping[str, object]
    targets: tuple[str, ...] | None
    changed_names: tuple[str, ...]
    replaced_modules: tuple[str, ...]
    digest_before: str
    digest_after: str
    relative_delta: Mapping[str, float | None]
    contract: tuple[ContractReading, ...] = ()
    stray_names: tuple[str, ...] = ()
    corrections: tuple[str, ...] = ()
    reverted: tuple[str, ...] = ()
    reach: Reach | None = None


@dataclass(frozen=True, slots=True)
class WindowReport:
    """A number that is reported of a window of training, and judged by nobody.

    `reference` is what was usual before, `level` where it begins to be noted, both in the units of `value`; `where`
    names the tensor or process that it is of.
    """

    target: str
    statistic: str
    value: float
    reference: float
    level: float
    where: str = ""

    @property
    def share(self) -> float:
        """How far it lies towards its level: 1 and more is noted."""
        return self.value / self.level if self.level else math.inf

    @property
    def is_noted(self) -> bool:
        """Whether it lies at or beyond its level, or is no number."""
        return not self.value < self.level


@dataclass(frozen=True, slots=True)
class WindowReading:
    """What a window of training steps showed beside its raw losses (see `weightproof.statistics.spikes`).

    `grad_norms` are those of the steps that were taken, None where nobody read them; `num_skipped` steps were left
    out, because their gradients were not finite or far too large. `loss_z`, `loss_ratio` and `loss_rise` compare the
    mildest of the last three losses with what was usual, `norm_z` and `norm_ratio` the largest gradient norm; None
    where too little is known. `stale_masters` are weights that the optimizer's next step would undo,
    `impossible_moments` states of it that no gradients could have made, and `disagreements` what is proven to be wrong
    with what the processes trained on; the last two in words. `num_steps` were given losses, `num_near` of which, with
    those just before, lie near `guessing`, the loss of a model that guesses (nats per token; None where nobody knows).
    `reports` are judged by nobody; `usual_moves` is how far, relative to its norm, a matrix usually moves in such a
    window.
    """

    grad_norms: tuple[float, ...] | None = None
    num_skipped: int = 0
    loss_z: float | None = None
    loss_ratio: float | None = None
    loss_rise: float | None = None
    norm_z: float | None = None
    norm_ratio: float | None = None
    stale_masters: tuple[str, ...] = ()
    impossible_moments: tuple[str, ...] = ()
    disagreements: tuple[str, ...] = ()
    num_steps: int = 0
    guessing: float | None = None
    num_near: int | None = None
    reports: tuple[WindowReport, ...] = ()
    usual_moves: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class Readings:
    """Everything the probes read from a model at one moment. Frozen; guards see nothing else.

    `unmeasured` maps a probe's name to the reason why it gave nothing at all.
    `second_moments` maps (windows, tap) names joined by `:` to mean squared block outputs.
    `raw_losses` are the unfiltered losses of a window of training steps, `window` what else was seen of it.
    `curvature` is None where nobody gave factors, `subspace` where no adapter was merged and nothing was steered,
    `health` where nobody diagnosed the training.
    """

    model_digest: str
    tensors: Mapping[str, TensorReading]
    structure: StructureReading
    matrices: Mapping[str, MatrixReading]
    bulks: Mapping[str, BulkReading]
    divergence: tuple[DivergenceReading, ...] = ()
    second_moments: Mapping[str, float] = field(default_factory=dict[str, float])
    losses: tuple[LossReading, ...] = ()
    circuits: Mapping[str, CircuitReading] = field(default_factory=dict[str, CircuitReading])
    unmeasured: Mapping[str, str] = field(default_factory=dict[str, str])
    edit: EditRecord | None = None
    raw_losses: tuple[float, ...] | None = None
    loss_spike: bool | None = None
    in_warmup: bool = False
    untrained: frozenset[str] = frozenset()
    window: WindowReading | None = None
    curvature: LossForecast | None = None
    subspace: SubspaceReading | None = None
    health: HealthReading | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One judged (or reported) number: `limit` None means reported, not judged."""

    guard: str
    target: str
    statistic: str
    value: float | None
    reference: float | None
    limit: float | None
    family: str = "model"
    outcome: Outcome = Outcome.PASS
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one guard concludes. `reason` names the worst measurement, or why none was made."""

    guard: str
    outcome: Outcome
    measurements: tuple[Measurement, ...]
    reason: str
    num_measured: int
    num_eligible: int


@dataclass(frozen=True, slots=True)
class Decision:
    """One action for one change, with everything it rests on.

    `digest` covers what was decided: action, situation, assurance, step, policy, and the outcome of every
    measurement; one process and many give the same. `evidence_digest` covers every field to the last bit.
    """

    action: Action
    situation: str
    reason: str
    warned: bool
    assurance: Assurance
    verdicts: tuple[Verdict, ...]
    reported: tuple[Measurement, ...]
    step: int
    world_size: int
    policy_digest: str
    digest: str = ""
    evidence_digest: str = ""
