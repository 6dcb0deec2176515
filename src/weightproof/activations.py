"""Forward passes that leave no trace, and what they show: outputs and block contributions.

`undisturbed` is the only way this library runs a model: train/eval flags, random state, autocast,
gradients and hooks are afterwards as they were. The inputs are `Windows` (windows.py,
calibration.py), re-exported here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from weightproof.errors import InputError
from weightproof.families import taps, unwrap
from weightproof.forward.calibration import calibration_windows
from weightproof.forward.passes import CONNECTION_ERRORS, in_step, whole
from weightproof.forward.windows import Windows, forward_names, random_windows
from weightproof.parallel.placements import settle
from weightproof.rng import fix_rng, preserved_rng

__all__ = [
    "ModelOutput",
    "TapMoments",
    "TapSums",
    "Windows",
    "calibration_windows",
    "forward_outputs",
    "hooked",
    "merged_moments",
    "random_windows",
    "real_positions",
    "tap_moments",
    "undisturbed",
]

# What a broken or ill-fed model raises in forward. Anything else propagates, and so do a want of memory and a broken
# connection (RuntimeErrors): they say nothing about the model.
_FORWARD_ERRORS = (
    RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError, ArithmeticError,
)  # fmt: skip


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model for measurement: eval mode, no gradients, full precision, no trace.

    Saved and put back, also when the body raises: the training flag of every module on its own,
    the random state (torch CPU and CUDA, NumPy, Python). Autocast is off inside, also where
    accelerate wrapped `forward` in it; the casts of an FSDP2 mixed-precision policy are part of the
    model. Gradients and hooks are not touched. Weights that an earlier pass left gathered are sharded
    again first: the passes inside see the weights as they are stored. A DDP somewhere inside the model
    neither broadcasts its buffers nor forgets to at its next training pass.

    The flags are set directly, not through `eval()`: some adapters override `train()` and merge
    weights in it.
    """
    flags = [(module, module.training) for module in model.modules()]
    replicated = [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]
    syncs = [module.require_forward_param_sync for module in replicated]
    mixed_precision = _swap_forward(unwrap(model))
    try:
        settle(model)
        for module in replicated:
            module.require_forward_param_sync = False
        for module, _ in flags:
            module.training = False
        with preserved_rng(), torch.no_grad(), _no_autocast():
            yield
    finally:
        for module, was_training in flags:
            module.training = was_training
        for module, syncs_buffers in zip(replicated, syncs, strict=True):
            module.require_forward_param_sync = syncs_buffers
        for module, wrapped in mixed_precision:
            module.__dict__["forward"] = wrapped


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _swap_forward(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Undo accelerate's mixed-precision wrapper: it keeps the model's own forward as `_original_forward`."""
    own = model.__dict__
    if "forward" not in own or "_original_forward" not in own:
        return []
    wrapped = own["forward"]
    own["forward"] = own["_original_forward"]
    return [(model, wrapped)]


@contextlib.contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Remove hooks on the way out, whatever happens inside."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True, eq=False)
class ModelOutput:
    """What one forward pass gave, in the form in which it is compared.

    Attributes:
        kind: "logits" (scores of a distribution over the last axis), "hidden" (the last hidden
            state) or "values" (numbers that are neither: regression, independent labels).
        scores: (rows, ..., width).
        real: (rows, ...) bool, False where the input was padding; None when every position counts.
        pooled: (rows, width) summary beside a hidden state (the pooler's output), None without one.
    """

    kind: str
    scores: torch.Tensor
    real: torch.Tensor | None
    pooled: torch.Tensor | None = None

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """Everything compared: the scores and, where there is one, the pooled summary."""
        return (self.scores,) if self.pooled is None else (self.scores, self.pooled)


def forward_outputs(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> ModelOutput:
    """One forward pass on one batch, past DDP and `torch.compile`; call it inside `undisturbed`.

    A model that draws random numbers even in eval mode draws the same ones in every pass, so that what
    differs between two passes is the model. Of a sharded model all processes make it together
    (`weightproof.forward.passes`).

    Raises:
        InputError: If the model's forward fails on these inputs, or gives nothing comparable.
        torch.OutOfMemoryError: If the device has no memory for the pass.
    """
    model = unwrap(model)
    inputs = {key: _placed(value, model) for key, value in batch.items()}
    fix_rng()
    try:
        with in_step(model):
            output = model(**inputs, **_switches(model))
    except (torch.OutOfMemoryError, *CONNECTION_ERRORS):
        raise
    except _FORWARD_ERRORS as error:
        first = str(error).strip().splitlines() or [""]
        raise InputError(
            f"{_class_name(model)}.forward failed on inputs {', '.join(sorted(batch))} "
            f"({type(error).__name__}: {first[0]}): give windows that this model accepts"
        ) from error
    kind, scores = _comparable(output, model)
    scores = whole(scores)
    if kind == "logits" and _is_one_per_token(scores, batch, model):
        kind, scores = "values", scores[..., None]
    real = real_positions(batch, scores.shape[:-1], decoder="decoder_input_ids" in batch)
    pooled = output.get("pooler_output") if kind == "hidden" else None
    if not isinstance(pooled, torch.Tensor) or pooled.ndim != 2 or pooled.shape[-1] == 1:
        return ModelOutput(kind, scores, real)
    return ModelOutput(kind, scores, real, whole(pooled))


def _class_name(model: nn.Module) -> str:
    """The class that the user knows: `fully_shard` puts a subclass of the same name with a prefix on top."""
    return next(kind.__name__ for kind in type(model).__mro__ if not hasattr(kind, "_get_fsdp_state"))


def _switches(model: nn.Module) -> dict[str, bool]:
    """Ask for a named output and no key-value cache, where forward understands that."""
    if getattr(model, "config", None) is None:
        return {}
    names, open_ended = forward_names(model)
    switches = {"use_cache": False} if "use_cache" in names else {}
    return {**switches, "return_dict": True} if open_ended or "return_dict" in names else switches


def _placed(value: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """On the model's device; floating inputs in the model's dtype."""
    for parameter in model.parameters():
        if parameter.device.type != "meta" and parameter.is_floating_point():
            dtype = parameter.dtype if value.is_floating_point() and parameter.dtype.itemsize > 1 else value.dtype
            return value.to(parameter.device, dtype)
    return value


def _comparable(output: Any, model: nn.Module) -> tuple[str, torch.Tensor]:
    fields = output if isinstance(output, Mapping) else {}
    logits = fields.get("logits", fields.get("prediction_logits"))
    if logits is None and isinstance(fields.get("start_logits"), torch.Tensor):
        logits = torch.stack([fields["start_logits"], fields["end_logits"]], dim=1)  # two distributions over positions
    if logits is None and not fields:  # a plain module: a tensor, or a tuple that begins with one
        logits = output[0] if isinstance(output, (tuple, list)) and output else output
    if isinstance(logits, torch.Tensor) and logits.is_floating_point() and logits.ndim:
        problem = getattr(getattr(model, "config", None), "problem_type", None)
        is_distribution = logits.shape[-1] > 1 and problem not in ("regression", "multi_label_classification")
        return ("logits" if is_distribution else "values"), logits
    hidden = fields.get("last_hidden_state")
    if isinstance(hidden, torch.Tensor) and hidden.ndim:
        return ("hidden" if hidden.shape[-1] > 1 else "values"), hidden
    raise InputError(
        f"{_class_name(model)} returns neither logits nor a last hidden state (but {_describe(output)}): "
        "outputs cannot be compared"
    )


def _is_one_per_token(logits: torch.Tensor, batch: Mapping[str, torch.Tensor], model: nn.Module) -> bool:
    """True for one independent score per input token: no distribution over the last axis."""
    ids = batch.get("input_ids")
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    return ids is not None and logits.shape == ids.shape and logits.shape[-1] != num_labels


def _describe(output: Any) -> str:
    return ", ".join(map(str, output)) if isinstance(output, Mapping) else type(output).__name__


def real_positions(
    batch: Mapping[str, torch.Tensor], shape: torch.Size | tuple[int, ...], *, decoder: bool
) -> torch.Tensor | None:
    """Which positions of an output of this shape (without its width) hold real tokens; None: all.

    A flattened output (rows * positions,) takes the flattened mask. `decoder` says whose mask.
    """
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    if mask is None or mask.ndim != 2:
        return None
    if tuple(shape) == tuple(mask.shape):
        return mask.ne(0)
    return mask.ne(0).flatten() if tuple(shape) == (mask.numel(),) else None


class TapMoments:
    """Second moments (mean squares over real tokens) of every tap of a model.

    Set `batch` before each forward pass. Read `moments()` after the last, or `take()` after each and
    `merged_moments` of all in the end.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.batch: Mapping[str, torch.Tensor] = {}
        self._names = names
        self._sums: TapSums = {}

    def add(self, name: str, output: Any) -> None:
        """Account for one output (rows, positions, width) of the tap `name`."""
        values = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(values, torch.Tensor) or not values.is_floating_point():
            return
        values = whole(values)
        has_decoder = "decoder_input_ids" in self.batch
        real = real_positions(self.batch, values.shape[:-1], decoder=has_decoder and "encoder." not in _outer(name))
        if real is not None:
            values = values[real.to(values.device)]
        total, count = self._sums.get(name, (0.0, 0))
        squares = float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
        self._sums[name] = (total + squares, count + values.numel())

    def take(self) -> TapSums:
        """Tap -> (sum of squares, count) since the last call."""
        taken, self._sums = {name: self._sums[name] for name in self._names if name in self._sums}, {}
        return taken

    def moments(self) -> dict[str, float]:
        """Mean square per tap that was reached; NaN where an output was not finite."""
        return merged_moments([self._sums])


TapSums = dict[str, tuple[float, int]]


def merged_moments(batches: Iterable[TapSums]) -> dict[str, float]:
    """Mean square per tap over batches, added up in their order; NaN where an output was not finite."""
    sums: TapSums = {}
    for batch in batches:
        for name, (squares, count) in batch.items():
            total, seen = sums.get(name, (0.0, 0))
            sums[name] = (total + squares, seen + count)
    found = {name: total / count for name, (total, count) in sums.items() if count}
    return {name: value if math.isfinite(value) else math.nan for name, value in found.items()}


def _outer(name: str) -> str:
    """`decoder.` or `encoder.` side of a tap, whichever comes first in its path."""
    parts = [part for part in name.split(".") if part in ("encoder", "decoder")]
    return f"{parts[0]}." if parts else ""


@contextlib.contextmanager
def tap_moments(model: nn.Module) -> Iterator[TapMoments]:
    """Collect second moments of every tap in the forward passes made inside.

    Yields a `TapMoments` with no names where the architecture's taps are unknown.
    """
    found = taps(model)
    moments = TapMoments(tuple(tap.name for tap in found))

    def watch(name: str) -> Any:
        return lambda _module, _args, output: moments.add(name, output)

    with hooked(*(tap.module.register_forward_hook(watch(tap.name)) for tap in found)):
        yield moments
