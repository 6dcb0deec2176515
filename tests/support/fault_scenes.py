"""Rows of a fault table: what goes wrong on one process of a guarded run, and how it must end on all.

`live_through(scene, fault)` is what one process sees of a fault; `mistakes` says what of it is not as the row says.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from architectures import build
from torch import nn

from weightproof import GuardSession
from weightproof.parallel.placements import local_of
from weightproof.snapshots.tensor_store import same_bits

NAME = "change"
WEIGHT = "model.layers.1.mlp.down_proj.weight"


@dataclass
class Scene:
    """One process in the middle of a fault; `hit`: it is the faulty one."""

    rank: int
    size: int
    folder: Path
    limit: float
    victim: int = 0
    model: nn.Module = field(default_factory=lambda: build("llama"))
    session: GuardSession | None = None
    entered: int = 0

    @property
    def hit(self) -> bool:
        return self.rank == self.victim

    @property
    def guard(self) -> GuardSession:
        assert self.session is not None
        return self.session

    def begin(self, **settings: Any) -> GuardSession:
        """A new session around the model."""
        self.session = GuardSession(self.model, **{"timeout": self.limit, **settings})
        assert self.session.processes.size == self.size
        return self.session

    def weight(self, name: str = WEIGHT) -> torch.Tensor:
        """This process's part of a matrix."""
        return local_of(self.model.get_parameter(name)).detach()

    def change(self, factor: float) -> None:
        """What the edits of all processes do."""
        self.entered += 1
        for name, _ in self.model.named_parameters():
            self.weight(name).mul_(factor)

    def edit(self, fault: Callable[[], Any] | None = None, factor: float = 1.001, name: str = NAME, **kw: Any) -> None:
        """Change the weights in a guarded block; then, on the faulty process, the fault."""
        with self.guard.edit(name, **kw):
            self.change(factor)
            if self.hit and fault is not None:
                fault()

    def here(self, faulty: Any, sound: Any) -> Any:
        """The first on the faulty process, the second on the others."""
        return faulty if self.hit else sound

    @contextmanager
    def patched(self, owner: Any, name: str, value: Any) -> Iterator[None]:
        """Replace an attribute on the faulty process."""
        with patch.object(owner, name, self.here(value, getattr(owner, name))):
            yield

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that this process has of the model, itself."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {name: local_of(tensor).detach() for name, tensor in tensors.items()}

    def held(self) -> dict[str, torch.Tensor]:
        """Copies of everything that this process has of the model."""
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    def is_as(self, held: dict[str, torch.Tensor]) -> bool:
        now = self.tensors()
        return now.keys() == held.keys() and all(same_bits(now[name], held[name]) for name in held)

    def put_back(self, held: dict[str, torch.Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(held[name])


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
        what: What happens on one process.
        act: Does it; called on every process.
        here: Class of what the faulty process raises; "" for nothing.
        there: Class of what the others raise.
        says: What the message must contain, parts separated by " ... ": that of the error on the others, else the
            verdict's reason. {rank} is the faulty one.
        verdict: Action of the step, the same on every process; "" where nothing was judged.
        weights: "as before", bit for bit on every process that lives; "kept" where the change was; "lost here" where
            the faulty process could not go back, and says so.
        victims: Which processes are faulty in turn.
        stops: The processes can do nothing together afterwards, and say so at once.
    """

    what: str
    act: Callable[[Scene], Any]
    here: str = ""
    there: str = ""
    says: str = ""
    verdict: str = ""
    weights: str = "as before"
    victims: tuple[int, ...] = (0, 1)
    stops: bool = False


@dataclass(frozen=True)
class Outcome:
    """What one process saw of one fault."""

    error: str
    message: str
    verdict: str
    digest: str
    as_before: bool
    seconds: float
    stopped: str


def live_through(scene: Scene, fault: Fault, *, still: Callable[[], str]) -> Outcome:
    """Do what the row says and note how it ended; `still` says afterwards what keeps the processes apart."""
    held, judged = scene.held(), 0 if scene.session is None else len(scene.session.history)
    started, error = time.monotonic(), None
    try:
        fault.act(scene)
    except BaseException as raised:  # noqa: BLE001 - the table says which it must be
        error = raised
    seconds = time.monotonic() - started
    steps = () if scene.session is None else scene.session.history[judged:]
    decision = steps[-1].decision if steps else None
    outcome = Outcome(
        error="" if error is None else type(error).__name__,
        message=str(error) if error is not None else "" if decision is None else decision.reason,
        verdict="" if decision is None else str(decision.action),
        digest="" if decision is None else decision.digest,
        as_before=scene.is_as(held),
        seconds=seconds,
        stopped=still(),
    )
    if fault.weights == "lost here":
        scene.put_back(held)
    return outcome


def mistakes(fault: Fault, victim: int, outcomes: Sequence[Outcome | None], limit: float) -> list[str]:
    """What of the outcomes, by rank, is not as the row says; None stands for a process that died."""
    found: list[str] = []
    living = {rank: outcome for rank, outcome in enumerate(outcomes) if outcome is not None}
    for rank, outcome in living.items():
        wanted = fault.here if rank == victim else fault.there
        if outcome.error != wanted:
            found.append(f"rank {rank} raised {outcome.error or 'nothing'}, not {wanted or 'nothing'}")
        if outcome.verdict != fault.verdict:
            found.append(f"rank {rank} decided {outcome.verdict or 'nothing'}, not {fault.verdict or 'nothing'}")
        if outcome.as_before != (fault.weights == "as before" or (fault.weights == "lost here" and rank != victim)):
            found.append(f"the weights of rank {rank} are {'as before' if outcome.as_before else 'changed'}")
        if bool(outcome.stopped) != fault.stops:
            found.append(f"afterwards rank {rank} says {outcome.stopped!r}")
        if outcome.seconds > limit:
            found.append(f"rank {rank} took {outcome.seconds:.1f} s")
    others = {rank: outcome for rank, outcome in living.items() if rank != victim}
    spoken = {_without_place(outcome.message) for outcome in others.values()}
    found += [f"the others say different things: {spoken}"] * (len(spoken) > 1)
    if len({outcome.digest for outcome in living.values()}) > 1:
        found.append("the decisions have different digests")
    for wanted in fault.says.format(rank=victim).split(" ... "):
        found += [f"{message!r} does not say {wanted!r}" for message in spoken if wanted not in message]
    return [f"{fault.what} (rank {victim}): {mistake}" for mistake in found]


def _without_place(message: str) -> str:
    """Without the host of the store nobody can tell how far all had come: each says where it was, and what it saw."""
    return re.sub(r"^.*?: (the store of torch.distributed does not answer.*) \([^()]*\)$", r"\1", message)


def printed(fault: Fault, victim: int, outcomes: Sequence[Outcome | None]) -> str:
    """The row, with what was seen."""
    here = outcomes[victim]
    others = [outcome for rank, outcome in enumerate(outcomes) if outcome is not None and rank != victim]
    seconds = max(outcome.seconds for outcome in outcomes if outcome is not None)
    columns = (
        f"{fault.what:<41} {victim:>4}",
        f"{'(dead)' if here is None else here.error or '-':<17} {others[0].error or '-':<15}",
        f"{others[0].verdict or '-':<8} {_weights(here):<9} {_weights(*others):<9}",
        f"{'stopped' if others[0].stopped else 'goes on':<7} {seconds:4.1f} {others[0].message[:160]}",
    )
    return " ".join(columns)


def _weights(*outcomes: Outcome | None) -> str:
    seen = {"(dead)" if outcome is None else "as before" if outcome.as_before else "changed" for outcome in outcomes}
    return ", ".join(sorted(seen))


HEADER = (
    f"{'one rank':<41} rank {'it raises':<17} {'others raise':<15} {'verdict':<8} {'weights':<9} {'others':<9} "
    f"{'run':<7}    s what the others read"
)
