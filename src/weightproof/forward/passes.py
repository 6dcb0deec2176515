"""Forward passes that several processes make at the same time.

Where weights are sharded (FSDP2), a forward pass is a series of all-gathers that all processes make
together, each for inputs of its own. So all make the same number of passes, and a process whose pass
fails half-way makes the all-gathers that are left: the others would wait for it. Where processes
compute one pass between them (tensor parallelism), all must be given the same inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn

from weightproof.parallel.placements import settle

# Nothing is wrong with the model then, and there is nobody to keep step with. (gloo raises plain RuntimeErrors: where
# a process died, the next meeting of all says so.)
CONNECTION_ERRORS: tuple[type[Exception], ...] = (dist.DistError,) if dist.is_available() else ()

# The order in which the sharded modules of a model were entered in its last whole pass.
_ORDERS: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()


def share_inputs(model: nn.Module, size: int) -> bool:
    """Whether `size` processes must be given the same inputs: they compute each pass between them.

    False for whole weights and for FSDP2 over all processes, where every process runs inputs of its
    own. True for any other DTensor (tensor parallelism, meshes of two dimensions or of some processes).
    """
    gathered = {id(tensor) for module in _sharded_modules(model).values() for tensor in module.parameters()}
    meshes = [(id(tensor), getattr(tensor, "device_mesh", None)) for tensor in model.parameters()]
    return any(
        mesh is not None and (key not in gathered or mesh.ndim != 1 or mesh.size() != size) for key, mesh in meshes
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole value of an activation that is a DTensor (all processes of its mesh take part); else itself."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


@contextlib.contextmanager
def in_step(model: nn.Module) -> Iterator[None]:
    """One forward pass inside; afterwards the weights are sharded again.

    When the pass raises, the rest of its all-gathers is made first, so that the other processes
    finish theirs and FSDP2 is ready for the next.
    """
    modules = _sharded_modules(model)
    entered: list[str] = []
    handles = [
        # Before FSDP2's own hook: what another hook raises after the all-gather finds the module noted.
        module.register_forward_pre_hook(lambda *_, name=name: entered.append(name), prepend=True)
        for name, module in modules.items()
    ]
    try:
        yield
        if modules:
            _ORDERS[model] = tuple(entered)
    except CONNECTION_ERRORS:
        raise
    except BaseException:  # an interrupt on one process, too: the others would wait in their all-gathers
        _finish(model, modules, entered)
        _forget_gathered(modules)
        raise
    finally:
        for handle in handles:
            handle.remove()
        settle(model)


def skip_pass(model: nn.Module) -> None:
    """Make the all-gathers of one forward pass and compute nothing; plain models have none."""
    _finish(model, _sharded_modules(model), ())
    settle(model)


def _sharded_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules on which `fully_shard` was called, the outermost first."""
    return {name: module for name, module in model.named_modules() if hasattr(type(module), "_get_fsdp_state")}


def _finish(model: nn.Module, modules: dict[str, nn.Module], entered: Sequence[str]) -> None:
    """Go through the sharded modules of a pass from where it stopped, as FSDP2 does around each forward.

    The order is that of the last whole pass, else that of registration.
    """
    order = _ORDERS.get(model, tuple(modules))
    if tuple(entered) != order[: len(entered)] or not set(order) <= set(modules):
        order = (*entered, *(name for name in modules if name not in entered))
    is_open = [name for name in dict.fromkeys(entered) if _is_open(modules[name])]
    # A communication error here says less than what was raised first, and every process meets it by itself.
    with contextlib.suppress(RuntimeError), torch.no_grad():
        for name in reversed(is_open[1:]):
            _leave(modules[name])
        for name in order[len(entered) :]:
            _enter(modules[name])
            _leave(modules[name])
        for name in is_open[:1]:
            _leave(modules[name])


def _forget_gathered(modules: dict[str, nn.Module]) -> None:
    """Let go of parts that came but could not be put in place: the next pass would take them for its own."""
    for module in modules.values():
        state = _state(module)
        groups: list[Any] = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in groups:
            gathered = getattr(group, "_all_gather_result", None)  # a module without parameters has no group
            if gathered is not None:
                group._wait_all_gather_streams_on_event(gathered.all_gather_event)
                if gathered.all_gather_work is not None:
                    gathered.all_gather_work.wait()
                group._all_gather_result = None


def _state(module: nn.Module) -> Any:
    return module._get_fsdp_state()  # pyright: ignore[reportCallIssue]


def _is_open(module: nn.Module) -> bool:
    """Whether FSDP2 entered this module's forward and did not leave it."""
    return _state(module)._training_state.name == "FORWARD"


def _enter(module: nn.Module) -> None:
    """What FSDP2 does before a forward: all-gather, and prefetch what the user asked it to."""
    state = _state(module)
    if len(state._modules) > 1 and not state._modules_to_run_forward:  # gathered once for the whole group
        state._modules_to_run_forward.update(state._modules)
    state._pre_forward(module, (torch.empty(0),), {})


def _leave(module: nn.Module) -> None:
    """What FSDP2 does after a forward, for a group after that of its last module: let go of the weights."""
    state = _state(module)
    state._modules_to_run_forward.discard(module)
    if not state._modules_to_run_forward and _is_open(module):
        state._post_forward(module, (), None)
