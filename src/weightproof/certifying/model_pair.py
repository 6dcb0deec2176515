"""Two model folders, run one after the other: what one says is kept as numbers while the other takes its place.

Only one model is in memory at a time. Each is proven to be what its files hold before it is believed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from weightproof.collective import Processes
from weightproof.divergence import (
    OutputCache,
    OutputPass,
    capture_outputs,
    forward_digest,
    locate_damage,
    measure_divergence,
)
from weightproof.errors import InputError
from weightproof.folders.loading import LoadedModel, load_model
from weightproof.forward.calibration import calibration_windows
from weightproof.forward.windows import Windows, random_windows
from weightproof.losses import LossData, LossProbe, LossWindows
from weightproof.policy import Policy
from weightproof.registry import load_plugin
from weightproof.snapshots.tensor_store import tensor_digest
from weightproof.types import DivergenceReading, LossReading, StructureReading, TensorReading
from weightproof.weights import iter_tensors, read_structure

GUARDS = "weightproof.guards"
CALIBRATION_WINDOWS = 8


@dataclass(frozen=True)
class Data:
    """What the models are run on beside random tokens: files of text or examples, and the device.

    `say` is told, in a few words, what is being done.
    """

    retain: Path | None = None
    target: Path | None = None
    device: str = "cpu"
    say: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class PairReadings:
    """What two models said on the same windows.

    Attributes:
        moments_before: Second moments of the base's blocks.
        moments_after: Of the subject's.
        divergence: The subject's outputs against the base's.
        losses: Paired losses.
        structures: Module classes, ties and embedding sizes of base and subject.
        windows: What they were run on.
        ties: Other names of each tied tensor of the subject.
        transient: Tensors of the subject in memory that no file holds.
        unmeasured: Why something gave nothing, by name.
        notes: What a reader must know about how the models were run.
    """

    structures: tuple[StructureReading, StructureReading]
    moments_before: Mapping[str, float] = field(default_factory=dict[str, float])
    moments_after: Mapping[str, float] = field(default_factory=dict[str, float])
    divergence: tuple[DivergenceReading, ...] = ()
    losses: tuple[LossReading, ...] = ()
    windows: tuple[Windows | LossWindows, ...] = ()
    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    transient: tuple[str, ...] = ()
    unmeasured: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()


def compare_models(
    folders: tuple[Path, Path],
    tensors: tuple[Mapping[str, TensorReading], Mapping[str, TensorReading]],
    policy: Policy,
    data: Data,
) -> PairReadings:
    """Run the base, keep what it says, let it go; run the subject on the same windows.

    Args:
        folders: Of base and subject.
        tensors: Readings of their files.
        policy: Its limits say how many windows the losses need.
        data: What to run them on.

    Raises:
        InputError: If a folder cannot be loaded, a model in memory is not what its files hold, the tokenizers
            differ, or the data cannot be used.
        BaselineError: If the base's outputs are NaN or inf.
    """
    data.say("loading the base")
    base, notes = _proven(folders[0], tensors[0], "base", data.device)
    probe = _probe(base, policy, data)
    try:
        before = _reference(base.model, probe, data)
        structure, tokenizer = read_structure(base.model), base.tokenizer_digest
        if probe is not None:
            probe.model = nn.Module()  # lets go of the base: the subject takes its place
        del base
        gc.collect()
        data.say("loading the subject")
        subject, more_notes = _proven(folders[1], tensors[1], "subject", data.device)
        if probe is not None and subject.tokenizer_digest != tokenizer:
            raise tokenizers_differ(*folders)
        outputs, unmeasured = _outputs(subject.model, before, policy, data)
        losses = _losses(probe, subject.model, data)
        present = list(iter_tensors(subject.model))
        return PairReadings(
            structures=(structure, read_structure(subject.model)),
            moments_before=before.cache.second_moments if before.cache else {},
            moments_after=outputs.second_moments,
            divergence=outputs.divergence,
            losses=losses,
            windows=(*before.windows, *(probe.windows if probe is not None else ())),
            ties={named.name: named.tied_names for named in present if named.tied_names},
            transient=tuple(named.name for named in present if not named.persistent),
            unmeasured=unmeasured,
            notes=(*notes, *more_notes),
        )
    finally:
        if probe is not None:
            probe.close()


def tokenizers_differ(base: Path, subject: Path) -> InputError:
    """The sentence for two tokenizers: the same text would be other tokens, and no loss would be paired."""
    return InputError(
        f"the tokenizer of {subject} is not that of {base}: the same text would be other tokens, so that no loss could "
        "be compared; put the base's tokenizer files into the folder, or leave --retain and --target out"
    )


# ---------------------------------------------------------------- one model


def _proven(
    folder: Path, tensors: Mapping[str, TensorReading], which: str, device: str
) -> tuple[LoadedModel, tuple[str, ...]]:
    """The model of a folder, proven to hold what its files hold, and what a reader must know of how it is run.

    A dtype may differ: config.json can ask for another than that of the files.
    """
    loaded = load_model(folder, device=device)
    num_cast = 0
    for named in iter_tensors(loaded.model):
        stored = [tensors[name] for name in (named.name, *named.tied_names) if name in tensors]
        if not stored and named.persistent and not named.is_buffer:
            raise InputError(f"{folder} does not hold {named.name}, which the model needs; save the whole model again")
        digest, dtype = tensor_digest(named.tensor), str(named.tensor.dtype).removeprefix("torch.")
        if changed := [one.name for one in stored if one.digest != digest and one.dtype == dtype]:
            raise InputError(
                f"{changed[0]} in memory is not what {folder} holds: the class changes it on loading, so that outputs "
                "would say nothing about the files (--weights-only compares the files)"
            )
        num_cast += any(one.dtype != dtype for one in stored)
    notes: list[str] = []
    if loaded.unloaded:
        notes.append(f"{len(loaded.unloaded)} tensors of the {which} that its class has no place for")
    if num_cast:
        notes.append(f"{num_cast} tensors of the {which} in their stored dtype: config.json has them run in another")
    return loaded, tuple(notes)


def _probe(base: LoadedModel, policy: Policy, data: Data) -> LossProbe | None:
    if data.retain is None and data.target is None:
        return None
    limits = policy.limits_for(load_plugin(GUARDS, "loss"))
    retain, target = (None if path is None else LossData(path) for path in (data.retain, data.target))
    return LossProbe(
        base.model,
        retain,
        target,
        limits,
        Processes.alone(),
        encode=base.encode,
        tokenizer_digest=base.tokenizer_digest,
    )


@dataclass(frozen=True)
class _Reference:
    """The base's outputs, or why there are none."""

    windows: tuple[Windows, ...]
    cache: OutputCache | None
    no_outputs: str


def _reference(model: nn.Module, probe: LossProbe | None, data: Data) -> _Reference:
    """Outputs and losses of the base."""
    random = random_windows(model)
    reason = "the model's inputs cannot be guessed from its config and no --retain data was given"
    if random is not None:
        try:
            forward_digest(model, random)
        except InputError as error:
            reason, random = f"the model does not run on random inputs ({_brief(error)})", None
    first = probe.first(CALIBRATION_WINDOWS) if probe is not None and data.retain is not None else []
    calibration = calibration_windows(first, model, count=CALIBRATION_WINDOWS) if first else None
    windows = tuple(one for one in (random, calibration) if one is not None)
    if probe is not None:
        data.say("losses of the base")
        probe.capture()
    if not windows:
        return _Reference((), None, reason)
    data.say("outputs of the base")
    return _Reference(windows, capture_outputs(model, windows), reason)


def _outputs(model: nn.Module, before: _Reference, policy: Policy, data: Data) -> tuple[OutputPass, dict[str, str]]:
    """The subject's outputs against the base's; a forward pass that now raises is broken, not unmeasured."""
    if before.cache is None:
        return OutputPass(()), dict.fromkeys(("divergence", "outputs", "second_moments"), before.no_outputs)
    data.say("outputs of the subject")
    try:
        found = measure_divergence(model, before.cache)
    except InputError as error:
        why = f"the subject does not run on windows that the base runs on: {_brief(error)}"
        lost = tuple(
            DivergenceReading(w.name, w.digest, w.num_tokens, None, None, None, None, finite=False, reason=why)
            for w in before.windows
        )
        return OutputPass(lost), {}
    return _located(model, before.cache, found, policy), {}


def _located(model: nn.Module, cache: OutputCache, found: OutputPass, policy: Policy) -> OutputPass:
    """The same readings; where one is beyond its limit, with the relative error of every block."""
    limits = policy.limits_for(load_plugin(GUARDS, "divergence"))
    beyond = [
        one for one in found.divergence if (one.kl or 0) > limits.kl or (one.hidden_error or 0) > limits.hidden_error
    ]
    if not beyond:
        return found
    first, *others = found.divergence
    return replace(found, divergence=(replace(first, blocks=locate_damage(model, cache)), *others))


def _losses(probe: LossProbe | None, model: nn.Module, data: Data) -> tuple[LossReading, ...]:
    if probe is None:
        return ()
    data.say("losses of the subject")
    probe.model = model
    return probe.measure()


def _brief(error: InputError) -> str:
    return str(error).splitlines()[0][:200]
