"""What a run needs beside its weights to go on as if a rejected window had never been.

    >>> state = TrainingState.capture(optimizer=optimizer, scheduler=scheduler, loader=data)  # doctest: +SKIP
    >>> ...                                              # steps that turn out to be bad       # doctest: +SKIP
    >>> snapshot.restore(); state.restore(data="skip")                                        # doctest: +SKIP

A `Snapshot` keeps the weights (and the fp32 masters of DeepSpeed as its companions). A `TrainingState` keeps the
rest: moments and step counts, learning-rate schedule, gradient scaler, random generators, data position, and
whatever else has a `state_dict` (a moving average of the weights, Trainer's callbacks).

Take and restore it between two steps, on every process: each keeps and restores its own part and waits for
no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weightproof.errors import InputError, RestoreError
from weightproof.transactions.steps import Step
from weightproof_callbacks.data_position import BatchMemory, Mark, ReplayableLoader
from weightproof_callbacks.generator_state import (
    GlobalDraws,
    generator_names,
    generator_value,
    put_generator_back,
    require_generators,
)
from weightproof_callbacks.optimizer_state import OptimizerState, require_same
from weightproof_callbacks.restorable import require_restorable
from weightproof_callbacks.sharded import clear_moments
from weightproof_callbacks.state_values import Values

__all__ = [
    "DATA_MODES",
    "ReplayableLoader",
    "TrainingState",
    "clear_optimizer_state",
    "forget_moments",
    "require_restorable",
]

DATA_MODES = ("skip", "replay")
_FORMAT = "weightproof-training-state-v1"
_SCHEDULER, _SCALER, _EXTRA = "scheduler", "scaler", "extra:"


class _Part(NamedTuple):
    """One object with `state_dict` and `load_state_dict`, and what it held."""

    owner: Any
    values: Values
    words: str


class TrainingState:
    """A run's state beside its weights, on this process.

    Made by `capture`, or by `from_parts` from what was read from files.

    Attributes:
        covered: What `restore` puts back, in words for a certificate.
        uncovered: What it does not put back, and why.
        nbytes: Size of the copies.
    """

    def __init__(
        self, optimizer: OptimizerState, parts: Mapping[str, _Part], draws: Values, generators: tuple[Any, ...]
    ) -> None:
        self._optimizer = optimizer
        self._parts = dict(parts)
        self._draws = draws
        self._generators = generators
        self._memory: BatchMemory | None = None
        self._mark: Mark | None = None
        self._uncovered: tuple[str, ...] = ()

    @classmethod
    def capture(  # noqa: PLR0913 - one argument for each thing that shapes a run
        cls,
        *,
        optimizer: Any,
        scheduler: Any = None,
        scaler: Any = None,
        loader: Any = None,
        extra: Mapping[str, Any] | None = None,
        generators: Iterable[Any] = (),
        device: torch.device | str | None = None,
    ) -> TrainingState:
        """Copy everything, tensor after tensor; only the copies need memory.

        Args:
            optimizer: A torch optimizer, or what accelerate or DeepSpeed made of it.
            scheduler: Of the learning rate: anything with `state_dict`.
            scaler: `GradScaler` of the run; by default the one in accelerate's optimizer.
            loader: `ReplayableLoader` or `BatchMemory`, which remembers the batches from here on, for as long as
                this state lives. Of any other loader the batches cannot be given again.
            extra: Further objects with `state_dict` and `load_state_dict`, by name for people.
            generators: Further random generators that training draws from. Those of samplers and loaders are
                none: the loader has moved on, and they belong to where it is.
            device: Keep the copies there, for example "cpu" (pinned where tensors lie on CUDA).

        Raises:
            InputError: The optimizer, a generator or an extra object is none that can be restored.
            SnapshotError: No memory, or something in a state has no form that can be kept.
        """
        found = cls(
            OptimizerState.capture(optimizer, device),
            {
                name: _Part(owner, Values.copied(owner.state_dict(), name, device), words)
                for name, (owner, words) in _owners(optimizer, scheduler, scaler, extra).items()
            },
            Values.copied(None, "generators"),
            require_generators(generators),
        )
        found._draws = Values.copied(found._present_draws(), "generators")
        found._follow(loader, scheduler)
        return found

    @classmethod
    def from_parts(  # noqa: PLR0913 - as capture
        cls,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        *,
        optimizer: Any,
        scheduler: Any = None,
        scaler: Any = None,
        loader: Any = None,
        extra: Mapping[str, Any] | None = None,
        generators: Iterable[Any] = (),
    ) -> TrainingState:
        """A state that was kept in files, for the objects of this run; call `restore` to put it into them.

        The data position of files is a number only: begin where the run's own checkpoint says.

        Args:
            tensors: As `tensors()` gave them.
            values: As `values()` gave them.
            optimizer: And all further arguments: as in `capture`, of this run.
            scheduler: See there.
            scaler: See there.
            loader: See there; the state follows it from its present position.
            extra: See there.
            generators: As many as were kept.

        Raises:
            InputError: The files are of another format, or of a run with other parts.
        """
        if values.get("format") != _FORMAT:
            raise InputError(f"this is no training state of format {_FORMAT}, but {values.get('format')!r}")
        read = {name: Values(tree, _below(tensors, name)) for name, tree in values["parts"].items()}
        owners = _owners(optimizer, scheduler, scaler, extra)
        given = require_generators(generators)
        _require_same_parts({*owners, "optimizer", "generators"}, set(read))
        found = cls(
            OptimizerState.from_values(optimizer, read["optimizer"]),
            {name: _Part(owner, read[name], words) for name, (owner, words) in owners.items()},
            read["generators"],
            given,
        )
        kept = len(read["generators"].tree["map"]["given"])
        if kept != len(given):
            raise InputError(f"the kept state has {kept} further generators, and {len(given)} were given")
        found._follow(loader, scheduler)
        return found

    # -- what it is ----------------------------------------------------------------------------

    @property
    def covered(self) -> tuple[str, ...]:
        """What `restore` puts back, in words for a certificate."""
        draws = generator_names(self._draws.tree["map"]["global"]["map"])
        given = f", {len(self._generators)} further ones" if self._generators else ""
        data = ("data position",) if self._mark is not None else ()
        parts = (part.words for part in self._parts.values())
        return (self._optimizer.in_words(), *parts, f"random generators of {draws}{given}", *data)

    @property
    def uncovered(self) -> tuple[str, ...]:
        """What `restore` does not put back, in words for a certificate."""
        return self._uncovered

    @property
    def nbytes(self) -> int:
        """Size of the copies on this process."""
        return sum(values.nbytes for values in self._all().values())

    @property
    def digest(self) -> str:
        """SHA-256 over everything that is kept but the data position, of this process's parts."""
        whole = hashlib.sha256()
        for name, values in sorted(self._all().items()):
            whole.update(f"{name}={values.digest}\n".encode())
        return whole.hexdigest()

    def tensors(self) -> Mapping[str, Tensor]:
        """The kept tensors, by name; do not write to them."""
        return {f"{name}/{key}": one for name, values in self._all().items() for key, one in values.tensors.items()}

    def values(self) -> dict[str, Any]:
        """The rest, as JSON."""
        return {
            "format": _FORMAT,
            "parts": {name: values.tree for name, values in self._all().items()},
            "batches_given": None if self._mark is None else self._mark.position,
        }

    # -- going back ----------------------------------------------------------------------------

    def restore(self, data: str = "skip") -> None:
        """Put everything back in place, and prove it by digest.

        Args:
            data: What becomes of the batches that were given since: "skip" (never again) or "replay" (again,
                before any others).

        Raises:
            InputError: `data="replay"` and the batches cannot be given again; nothing was changed.
            RestoreError: A kept copy was altered (nothing was changed then), or something does not take what
                it held: do not train on.
        """
        self.require_replayable(data)
        self._optimizer.require_intact()
        for values in (*(part.values for part in self._parts.values()), self._draws):
            values.require_intact()
        try:
            self._optimizer.restore()
            for part in self._parts.values():
                part.owner.load_state_dict(part.values.value())
            # The schedule has written learning rates of its own choice into the groups, and loading may draw.
            self._optimizer.restore()
            self.put_draws_back()
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise RestoreError(f"restoring the training state failed midway, do not train on: {error}") from error
        self.prove()
        if self._memory is not None and self._mark is not None:
            (self._memory.rewind if data == "replay" else self._memory.skip)(self._mark)

    def require_replayable(self, data: str) -> None:
        """Refuse a way to go on with the data that is not open, before anything is written.

        Raises:
            InputError: Saying why.
        """
        if data not in DATA_MODES:
            raise InputError(f"data must be one of {', '.join(DATA_MODES)}, not {data!r}")
        if data == "skip":
            return
        if self._memory is None:
            raise InputError(
                'data="replay" needs a loader that can give batches again: wrap it as ReplayableLoader(loader), or '
                'use GuardedTrainer; or choose data="skip"'
            )
        self._memory.require_rewindable(self._mark)

    def prove(self) -> None:
        """Compare what the run holds now with what is kept, by digest.

        Raises:
            RestoreError: Naming what differs.
        """
        self._optimizer.prove()
        for name, part in self._parts.items():
            require_same(Values.referring(part.owner.state_dict(), name), part.values)
        require_same(Values.referring(self._present_draws(), "generators"), self._draws)

    # -- helpers -------------------------------------------------------------------------------

    def _all(self) -> dict[str, Values]:
        parts = {name: part.values for name, part in self._parts.items()}
        return {"optimizer": self._optimizer.values, **parts, "generators": self._draws}

    def _present_draws(self) -> dict[str, Any]:
        given = [generator_value(generator) for generator in self._generators]
        return {"global": GlobalDraws.now().values, "given": given}

    def put_draws_back(self) -> None:
        """Put the random generators back, and nothing else."""
        draws = self._draws.value()
        GlobalDraws(draws["global"]).put_back()
        for generator, value in zip(self._generators, draws["given"], strict=True):
            put_generator_back(generator, value)

    def _follow(self, loader: Any, scheduler: Any) -> None:
        uncovered = [] if scheduler is not None else ["learning-rate schedule: none was given"]
        if isinstance(loader, ReplayableLoader):
            loader = loader.memory
        if isinstance(loader, BatchMemory):
            self._memory, self._mark = loader, loader.mark()
        else:
            kind = "no loader was given" if loader is None else f"{type(loader).__name__} cannot give batches again"
            reason = f"{kind}, so the data goes on from where it is"
            uncovered.append(f"data position: {reason}")
        if _owns_states(self._draws) and not torch.cuda.is_initialized():
            uncovered.append("random generators of CUDA: it was not in use")
        self._uncovered = tuple(uncovered)


def _owns_states(draws: Values) -> bool:
    """Whether this machine has CUDA devices whose generators were not read."""
    return torch.cuda.is_available() and "cuda" not in draws.tree["map"]["global"]["map"]


def _owners(optimizer: Any, scheduler: Any, scaler: Any, extra: Mapping[str, Any] | None) -> dict[str, tuple[Any, str]]:
    """(object, words) of everything that is kept by its `state_dict`, by name."""
    found: dict[str, tuple[Any, str]] = {}
    if scheduler is not None:
        inner = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps the torch scheduler
        found[_SCHEDULER] = scheduler, f"learning-rate schedule {type(inner).__name__}"
    scaler = getattr(optimizer, "scaler", None) if scaler is None else scaler
    if scaler is not None and getattr(scaler, "is_enabled", lambda: True)():
        found[_SCALER] = scaler, "gradient scaler"
    for name, owner in (extra or {}).items():
        found[f"{_EXTRA}{name}"] = owner, name
    for name, (owner, _) in found.items():
        if not all(callable(getattr(owner, method, None)) for method in ("state_dict", "load_state_dict")):
            raise InputError(f"{name} ({type(owner).__name__}) has no state_dict and load_state_dict to be kept by")
    return found


def _below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): one for key, one in tensors.items() if key.startswith(f"{name}/")}


def _require_same_parts(ours: set[str], kept: set[str]) -> None:
    if ours != kept:
        odd = sorted(ours ^ kept)[0]
        where = "was kept, but this run has none" if odd in kept else "is in this run, but was not kept"
        raise InputError(f"the training state does not fit this run: {odd.removeprefix(_EXTRA)} {where}")


# ---- without a captured state ---------------------------------------------------------------------------------------


def forget_moments(step: Step, optimizer: Any) -> int:
    """Clear the optimizer's state after the window `step` was rolled back, and note that in its record.

    Returns:
        How many parameters had a state.
    """
    cleared = clear_optimizer_state(optimizer)
    if step.record is not None:
        step.record = replace(step.record, params={**step.record.params, "optimizer_states_cleared": cleared})
    return cleared


def clear_optimizer_state(optimizer: Any) -> int:
    """Forget the per-parameter state (moments, step counts) of every parameter; returns how many had one.

    Torch optimizers rebuild it at their next step, as at the start of training. Of DeepSpeed's ZeRO it is
    kept for flat masters, which are counted instead.
    """
    flat = clear_moments(optimizer)
    if flat is not None:
        return flat
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the torch optimizer
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    cleared = sum(inner.state.pop(parameter, None) is not None for parameter in parameters)
    if isinstance(inner, torch.optim.Adagrad):  # makes its state when it is made, and steps with none that is missing
        inner.state.update(type(inner)([{**group} for group in inner.param_groups], **inner.defaults).state)
    return cleared
