"""A model guarded by one of any number of processes, in any storage, and what its session said of each step.

`parity_steps` makes the steps; `parity_comparison` says where two runs do not agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from parity_models import MODELS, Model, stored, whole
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from weightproof import EditRejectedError, GuardSession
from weightproof.types import Decision, EditRecord, Readings

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Seen:
    """What one process saw of one step.

    Attributes:
        session: Which of the sessions around a model.
        name: The step's.
        applied: What was done.
        decision: The decision, with every verdict.
        record: What changed.
        before: Readings that the change was judged against.
        after: Readings of the changed model, though it may have been restored since.
        accepted: Digest of the last accepted state, as the session knows it.
        bits: Digest of all weights after the step, taken without any code of the library.
    """

    session: int
    name: str
    applied: str | None
    decision: Decision
    record: EditRecord
    before: Readings
    after: Readings
    accepted: str
    bits: str


@dataclass
class Scene:
    """One process among those that guard a model."""

    rank: int
    size: int
    name: str
    kind: str
    core: nn.Module = field(init=False)
    model: nn.Module = field(init=False)
    session: GuardSession = field(init=False)
    sessions: int = 0
    seen: list[Seen] = field(default_factory=list)
    judged: tuple[Readings, Readings] | None = None

    def __post_init__(self) -> None:
        assert dist.get_world_size() == self.size

    @property
    def spec(self) -> Model:
        return MODELS[self.name]

    def fresh(self, state: dict[str, torch.Tensor] | None = None) -> None:
        """The model as it was in the beginning, or with other values, stored anew."""
        self.core = whole(self.name)
        if state is not None:
            self.core.load_state_dict(state)
        self.model = stored(self.core, self.kind)

    def begin(self, **settings: Any) -> GuardSession:
        """A session around the model; the readings behind its last decision are kept."""
        self.session = GuardSession(self.model, retain=self.spec.retain(), timeout=120.0, **settings)
        assert self.session.processes.size == self.size
        self.sessions += 1
        assessor: Any = self.session.guarded.assessor
        assess = assessor.assess

        def noted(*args: Any) -> Any:
            found = assess(*args)
            self.judged = args[2].readings, found.state.readings
            return found

        assessor.assess = noted
        return self.session

    def alter(self, name: str, change: Change) -> None:
        """Write what `change` makes of a whole tensor: this process its part of it."""
        parameter = self.core.get_parameter(name)
        assert isinstance(parameter, DTensor) == self.kind.startswith("FSDP2")
        with torch.no_grad():
            if isinstance(parameter, DTensor):
                new = change(parameter.full_tensor().clone())
                part = distribute_tensor(new, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.to_local().copy_(part.to_local())
            else:
                parameter.copy_(change(parameter.detach().clone()))

    def alter_all(self, size: float, seed: int = 3) -> None:
        """Relative noise on every parameter."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.core.named_parameters():
            noise = 1 + size * torch.randn(parameter.shape, generator=generator)
            self.alter(name, lambda values, noise=noise: (values * noise).to(values.dtype))

    def state(self) -> dict[str, torch.Tensor]:
        """All values, whole, put together without any code of the library."""
        tensors = {name: tensor.detach() for name, tensor in self.core.state_dict().items()}
        parts = {name: tensor.to_local() for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        everywhere: list[Any] = [None] * self.size
        if parts:
            dist.all_gather_object(everywhere, parts)
        found = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                (placement,) = tensor.placements
                pieces = [theirs[name] for theirs in everywhere if theirs[name].numel()]
                found[name] = torch.cat(pieces, dim=placement.dim)  # pyright: ignore[reportAttributeAccessIssue]
                assert found[name].shape == tensor.shape
            else:
                found[name] = tensor.clone()
        return found

    def note(self, step: Any, name: str | None = None) -> None:
        """Keep what the session said of a step."""
        assert self.judged is not None
        bits = hashlib.sha256()
        for key, tensor in sorted(self.state().items()):
            bits.update(key.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self.seen.append(
            Seen(
                session=self.sessions,
                name=name or step.name,
                applied=step.applied,
                decision=step.decision,
                record=step.record,
                before=self.judged[0],
                after=self.judged[1],
                accepted=self.session.model_digest,
                bits=bits.hexdigest(),
            )
        )

    def edit(self, name: str, act: Callable[[], Any], **options: Any) -> None:
        """A guarded edit, whatever becomes of it."""
        before = len(self.session.history)
        with suppress(EditRejectedError), self.session.edit(name, **options):
            act()
        (step,) = self.session.history[before:]
        self.note(step)

    def window(self, name: str, step: int, act: Callable[[], Any], losses: Sequence[float], **options: Any) -> None:
        """A window of training, whose losses differ between processes around a mean that is exact."""
        act()
        shift = (self.rank - (self.size - 1) / 2) / 8
        self.note(self.session.check_window(step=step, raw_losses=[x + shift for x in losses], name=name, **options))
