"""Hang faults into a training loop, from outside: the loop itself is not changed.

    >>> with inject([LearningRateSpike(at=30)], model, optimizer) as injection:    # doctest: +SKIP
    ...     train(model, optimizer)                                                # doctest: +SKIP
    >>> injection.fired                                                            # doctest: +SKIP
    [Fired(fault='learning-rate', step=30, what='learning rate x100')]

Steps are those of the optimizer, counted by the injection itself, so that a rollback does not bring a
transient fault back. Leaving the block removes every hook, after an exception too; values that a fault
wrote stay written, as a fault leaves them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weightproof.errors import InputError
from weightproof.parallel.placements import is_dtensor
from weightproof.weights import clean_name, unwrap

if TYPE_CHECKING:
    from weightproof.testing.faults import Fault

__all__ = ["FaultyLoader", "Fired", "Injection", "inject"]


@dataclass(frozen=True)
class Fired:
    """One thing that an injected fault did on this process."""

    fault: str
    step: int
    what: str


@dataclass
class Injection:
    """Faults that hang in a loop; as a context manager it removes them at the end of the block.

    Attributes:
        model: The model, without wrappers.
        optimizer: The torch optimizer, without wrappers.
        masters: fp32 copies from which the optimizer's step rewrites a weight, by the weight's name.
        step: The optimizer step that is being made, counted from 1.
        fired: What was done so far.
        held: What a fault keeps between two events.
    """

    faults: Sequence[Fault]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    masters: Mapping[str, Tensor]
    rank: int
    step: int
    fired: list[Fired] = field(default_factory=list)
    held: dict[Fault, Any] = field(default_factory=dict)
    _exits: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _armed: bool = True

    def hang_in(self) -> None:
        """Install the hooks; `inject` calls this once."""
        for fault in self.faults:
            fault.prepare(self)
        hooks = [
            self.model.register_forward_pre_hook(self._batch, with_kwargs=True),
            self.optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            self.optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]
        for hook in hooks:
            self._exits.callback(hook.remove)

    def until_removed(self, hook: Any) -> None:
        """A hook of a fault's own, removed with the injection."""
        self._exits.callback(hook.remove)

    def remove(self) -> None:
        """Take every hook out, and put back what is held for a step only (a learning rate)."""
        self._armed = False
        for fault in self.faults:
            fault.let_go(self)
        self._exits.close()

    def note(self, fault: Fault, what: str) -> None:
        """Remember what was done."""
        self.fired.append(Fired(fault.name, self.step, what))

    def due(self, fault: Fault) -> bool:
        """Whether the fault happens in this step, on this process."""
        here = fault.rank is None or fault.rank == self.rank
        return self._armed and here and fault.at <= self.step < (fault.at + fault.steps)

    def loader(self, batches: Iterable[Any]) -> FaultyLoader:
        """A data loader with the faults that hit loaders. Wrap it inside a `ReplayableLoader`, not around it."""
        return FaultyLoader(self, batches)

    def resuming(self, folder: Path | str) -> None:
        """Tell the faults that hit a resume that the checkpoint in `folder` is loaded next, on every process."""
        for fault in self.faults:
            here = fault.rank is None or fault.rank == self.rank
            if self._armed and here:
                fault.resume(self, Path(folder))

    # -- targets of faults ---------------------------------------------------------------------

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by public name."""
        named = self.model.named_parameters()
        return {clean_name(name): parameter for name, parameter in named if parameter.requires_grad}

    def parameter(self, pattern: str | None, seed: int) -> tuple[str, nn.Parameter]:
        """A parameter by name, or one of the matrices drawn by `seed`.

        Raises:
            InputError: There is none of that name, or no matrix.
        """
        found = self.parameters()
        if pattern is not None:
            if pattern not in found:
                raise InputError(f"the fault is to hit {pattern!r}, which is no trained parameter of this model")
            return pattern, found[pattern]
        matrices = sorted(name for name, parameter in found.items() if parameter.dim() == 2)
        if not matrices:
            raise InputError("the fault draws a matrix to hit, and this model trains none: name a parameter")
        drawn = int(torch.randint(len(matrices), (1,), generator=torch.Generator().manual_seed(seed)))
        return matrices[drawn], found[matrices[drawn]]

    def on_gradient(self, parameter: nn.Parameter, act: Any) -> bool:
        """Call `act()` when the gradient is there, before anyone clips it; False for shards, whose step comes first."""
        if is_dtensor(parameter):
            return False
        self.until_removed(parameter.register_post_accumulate_grad_hook(lambda _: act()))
        return True

    # -- events --------------------------------------------------------------------------------

    def _batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not module.training:
            return None
        for fault in self.faults:
            if self.due(fault):
                args, kwargs = fault.forward(self, args, kwargs)
        return args, kwargs

    def _before_step(self) -> None:
        for fault in self.faults:
            if self.due(fault):
                fault.before_step(self)

    def _after_step(self) -> None:
        for fault in self.faults:
            if self.due(fault):
                fault.after_step(self)
        self.step += 1

    def __enter__(self) -> Injection:
        """The hooks are in since `inject`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove them, whatever happened."""
        self.remove()


class FaultyLoader:
    """A loader that gives what the faults of an injection make of its batches; everything else is the loader's own."""

    def __init__(self, injection: Injection, batches: Iterable[Any]) -> None:
        self.injection = injection
        self.batches: Any = batches

    def __iter__(self) -> Iterator[Any]:
        """One pass."""
        previous: Any = None
        for batch in self.batches:
            given = batch
            for fault in self.injection.faults:
                if self.injection.due(fault):
                    given = fault.load(self.injection, given, previous)
            yield given
            previous = batch

    def __len__(self) -> int:
        """Batches of one pass."""
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        """What is not about faults is the loader's."""
        if name in ("injection", "batches"):
            raise AttributeError(name)
        return getattr(self.batches, name)


def inject(  # noqa: PLR0913 - one argument for each part of a loop that a fault may hit
    faults: Iterable[Fault],
    model: nn.Module,
    optimizer: Any,
    *,
    masters: Mapping[str, Tensor] | None = None,
    rank: int | None = None,
    steps_done: int = 0,
) -> Injection:
    """Hang `faults` into the loop that trains `model` with `optimizer`. Every process calls it alike.

    Args:
        faults: See `weightproof.testing.faults`.
        model: The model; wrappers (DDP, compile) are looked through.
        optimizer: A torch optimizer, or what accelerate made of one.
        masters: fp32 copies of the weights, if the loop keeps some, by the weight's name.
        rank: Of this process; by default that of torch.distributed.
        steps_done: Optimizer steps before this one, in a run that was resumed.

    Raises:
        InputError: A fault finds nothing to hit in this model or optimizer; nothing is hung in then.
    """
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "accelerator_state"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise InputError(f"faults are injected around a torch optimizer, not {type(optimizer).__name__}")
        optimizer = inner
    if rank is None:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    injection = Injection(tuple(faults), unwrap(model), optimizer, dict(masters or {}), rank, steps_done + 1)
    try:
        injection.hang_in()
    except BaseException:
        injection.remove()
        raise
    return injection
