"""What an optimizer keeps beside the weights: moments, step counts, and the numbers of its parameter groups.

Any `torch.optim.Optimizer` whose state is tensors and numbers is kept and put back: foreach, fused and
capturable alike, 8-bit ones whose states are plain tensors (bitsandbytes) or wrappers of such (torchao), moments
of sharded parameters (the part that lies here), and the optimizer inside accelerate's wrapper or DeepSpeed's ZeRO.
What keeps something elsewhere is refused by name, before it has trained (`require_known_optimizer`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from weightproof.errors import InputError, RestoreError, SnapshotError
from weightproof.parallel.placements import local_of
from weightproof_callbacks.sharded import flat_masters, zero_optimizer
from weightproof_callbacks.state_values import Values, is_composed, plain_parts

__all__ = ["OptimizerState", "require_known_optimizer", "stepped_alike", "stepping_optimizer"]

# Packages whose optimizers keep all that they know in `state` and `param_groups`.
_KNOWN = ("torch.optim.", "transformers.optimization", "bitsandbytes.optim.", "torchao.optim.", "deepspeed.ops.")
# Step inside of the backward pass, where no moment between two steps exists.
_WITHOUT_STEPS = ("Lomo", "AdaLomo")
# Buffers that are written before they are read (apex, DeepSpeed) and tables that never change (bitsandbytes).
_HARMLESS = ("_dummy_overflow_buf", "name2qmap")
_SCALARS = (bool, int, float, str, type(None))


class OptimizerState:
    """A copy of one optimizer's state, on this process.

    Made by `OptimizerState.capture` or `OptimizerState.from_values`.
    """

    def __init__(self, optimizer: Any, values: Values, settings: list[dict[str, Any]]) -> None:
        self._optimizer = optimizer
        self._inner = stepping_optimizer(optimizer)
        self.values = values
        self._groups = [(group, list(group["params"]), set(group)) for group in self._inner.param_groups]
        self._settings = settings

    @classmethod
    def capture(cls, optimizer: Any, device: torch.device | str | None = None) -> OptimizerState:
        """Copy it, tensor after tensor; `device` as in `Values.copied`.

        Raises:
            InputError: If it is none that can be restored.
            SnapshotError: If its state holds something that cannot be kept, or there is no memory.
        """
        require_known_optimizer(optimizer)
        inner = stepping_optimizer(optimizer)
        settings = [{key: value for key, value in group.items() if _is_opaque(value)} for group in inner.param_groups]
        return cls(optimizer, Values.copied(_value_of(optimizer), "optimizer", device), settings)

    @classmethod
    def from_values(cls, optimizer: Any, values: Values) -> OptimizerState:
        """The state that `values` describe (read from files), to be put into `optimizer`.

        Raises:
            InputError: If the optimizer is of another class, or has other parameter groups.
        """
        require_known_optimizer(optimizer)
        tree, inner = values.tree["map"], stepping_optimizer(optimizer)
        if tree["class"] != type(inner).__name__:
            raise InputError(f"the kept state is one of {tree['class']}, and this optimizer is {type(inner).__name__}")
        sizes = [len(group["params"]) for group in inner.param_groups]
        if tree["sizes"] != sizes:
            raise InputError(
                f"the kept optimizer state has groups of {tree['sizes']} parameters, and this optimizer of {sizes}"
            )
        keys = _Keys(optimizer)
        for name, state in tree["states"]["map"].items():
            if is_composed(keys.owner(name)):
                values.describe(state, keys.owner(name))
        return cls(optimizer, values, [{} for _ in sizes])

    def in_words(self) -> str:
        """What it is, for people."""
        states = self.values.tree["map"]["states"]["map"]
        return f"optimizer {type(self._inner).__name__}, the state of {len(states)} parameters"

    def require_intact(self) -> None:
        """Refuse what could not be put back whole, before anything is written.

        Raises:
            RestoreError: Naming the tensor.
        """
        self.values.require_intact()
        keys = _Keys(self._optimizer)
        for name, tree in self.values.tree["map"]["states"]["map"].items():
            self.values.require_writable(tree, self._inner.state.get(keys.owner(name)))

    def restore(self) -> None:
        """Put the state back: into the tensors that are there, and without what was not there at capture."""
        for group, parameters, _ in self._groups:
            group["params"][:] = parameters
        self._inner.param_groups[:] = [group for group, *_ in self._groups]
        tree = self.values.tree["map"]
        self._put_states_back(tree["states"]["map"])
        kept_groups = tree["groups"]
        for (group, _, keys), kept, settings in zip(self._groups, kept_groups, self._settings, strict=True):
            fresh = self.values.written(kept, group, _write)
            for key in group.keys() - keys:
                del group[key]
            group.update({**fresh, **settings})
        counters = self.values.written(tree["counters"], None, None)
        for name in [name for name, value in vars(self._inner).items() if isinstance(value, _SCALARS)]:
            if name not in counters:
                del vars(self._inner)[name]
        vars(self._inner).update(counters)
        self._put_loss_scale_back(tree["loss_scale"])
        zero = zero_optimizer(self._optimizer)
        if zero is not None and hasattr(zero, "_hp_optimizer_states_linked"):
            zero._hp_optimizer_states_linked = False  # so that checkpoints link each weight to its moments anew

    def _put_states_back(self, kept: Mapping[str, Any]) -> None:
        state, keys = self._inner.state, _Keys(self._optimizer)
        for key in [key for key in state if keys.name(key) not in kept]:
            del state[key]
        for name, tree in kept.items():
            key = keys.owner(name)
            present = state.get(key)
            fresh = self.values.written(tree, present, _write)
            if isinstance(present, dict) and isinstance(fresh, dict):
                present.clear()
                present.update(fresh)
            else:
                state[key] = fresh

    def _put_loss_scale_back(self, tree: Any) -> None:
        zero = zero_optimizer(self._optimizer)
        if tree is not None and zero is not None:
            vars(zero.loss_scaler).update(self.values.written(tree, None, None))

    def prove(self) -> None:
        """Compare what the optimizer holds now with what was kept, bit for bit.

        Raises:
            RestoreError: Naming the first difference.
        """
        require_same(Values.referring(_value_of(self._optimizer), "optimizer"), self.values)


def require_same(found: Values, kept: Values) -> None:
    """Refuse values that are not those that were kept, by digest.

    Raises:
        RestoreError: Naming the first tensor that differs.
    """
    if found.digest == kept.digest:
        return
    names = [name for name in kept.tensors if found.digests.get(name) != kept.digests[name]]
    where = f"{names[0]} ({len(names)} of {len(kept.tensors)} tensors)" if names else "a number of it"
    raise RestoreError(f"{where} does not hold what was kept after restoring: do not train on")


def stepping_optimizer(optimizer: Any) -> Any:
    """The torch optimizer that changes the weights, inside of accelerate's wrappers and of DeepSpeed's ZeRO.

    Raises:
        InputError: If there is none.
    """
    zero = zero_optimizer(optimizer)
    inner = optimizer if zero is None else zero.optimizer
    if type(inner).__module__.startswith("accelerate."):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise InputError(
            f"the state of {type(inner).__module__}.{type(inner).__qualname__} cannot be restored: it is no torch "
            'optimizer. Choose rollback="weights"'
        )
    return inner


def require_known_optimizer(optimizer: Any) -> None:
    """Refuse an optimizer of which not all is known.

    Raises:
        InputError: Naming its class, what it keeps where, and what to do.
    """
    inner = stepping_optimizer(optimizer)
    if reason := _refusal_of(inner):
        raise InputError(f'the state of {type(inner).__name__} cannot be restored: {reason}. Choose rollback="weights"')


def _refusal_of(inner: torch.optim.Optimizer) -> str | None:
    if type(inner).__name__ in _WITHOUT_STEPS:
        return "it changes the weights inside of the backward pass"
    own = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    for name, value in vars(inner).items():
        if name in ("state", "param_groups", "defaults"):
            continue
        held = list(_flat(value))
        if any(isinstance(one, torch.optim.Optimizer) for one in held):
            return f"it holds other optimizers ({name}), and what each of them keeps is not known"
        if name not in _HARMLESS and any(isinstance(one, Tensor) and id(one) not in own for one in held):
            return f"it keeps tensors outside of its state ({name})"
    if f"{type(inner).__module__}.".startswith(_KNOWN) or inner.state:
        return None
    return _refusal_after_a_trial(inner)


def _refusal_after_a_trial(inner: torch.optim.Optimizer) -> str | None:
    """What an unknown optimizer keeps is seen after a step: one of its class takes it, on a weight of its own."""
    try:
        trial = stepped_alike(inner, torch.ones(2, 2), inner.param_groups[0] if inner.param_groups else {})
    except Exception as error:  # noqa: BLE001 - an unknown class may raise anything; it becomes the refusal
        return f"it is not known, and a trial step of its class on a small weight failed ({error})"
    try:
        Values.copied(_states_of(trial, _Keys(trial)), "its state")
    except (SnapshotError, InputError) as error:
        return str(error).removesuffix(". Nothing was changed")
    return None


def stepped_alike(inner: torch.optim.Optimizer, values: Tensor, group: Mapping[str, Any]) -> torch.optim.Optimizer:
    """One of the same class and settings that has taken a step, on a weight of its own; draws nothing.

    Raises:
        Exception: Whatever its class raises.
    """
    weight = torch.nn.Parameter(values)
    settings = {key: value for key, value in group.items() if key != "params"}
    kind: Any = type(inner)
    taken = inspect.signature(kind.__init__).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    # A class can note as a default what it does not take: AdamW does.
    defaults = {name: value for name, value in inner.defaults.items() if anything or name in taken}
    with torch.random.fork_rng(devices=[]):
        trial = kind([{"params": [weight], **settings}], **defaults)
        weight.grad = torch.full_like(values, 0.5)
        trial.step()
    return trial


def _value_of(optimizer: Any) -> dict[str, Any]:
    """All that is kept of an optimizer, as one nested value."""
    inner, zero = stepping_optimizer(optimizer), zero_optimizer(optimizer)
    scaler = None if zero is None else getattr(zero, "loss_scaler", None)
    groups = inner.param_groups
    return {
        "class": type(inner).__name__,
        "sizes": [len(group["params"]) for group in groups],
        "states": _states_of(inner, _Keys(optimizer)),
        "groups": [{k: v for k, v in group.items() if k != "params" and not _is_opaque(v)} for group in groups],
        "counters": {name: value for name, value in vars(inner).items() if isinstance(value, _SCALARS)},
        "loss_scale": None
        if scaler is None
        else {name: value for name, value in vars(scaler).items() if isinstance(value, _SCALARS)},
    }


def _states_of(inner: torch.optim.Optimizer, keys: _Keys) -> dict[str, Any]:
    weights = {_address(parameter) for parameter in keys.owners.values()}
    states: dict[str, Any] = {}
    for key, state in inner.state.items():
        name = keys.name(key)
        if name is None:
            raise SnapshotError(
                f"the state of {type(inner).__name__} has an entry for a {type(key).__name__} that is in none of its "
                "parameter groups: it cannot be put back. Nothing was changed"
            )
        for one in _flat(state):
            if isinstance(one, Tensor) and one.numel() and _address(one) in weights:
                raise SnapshotError(
                    f"the state of {type(inner).__name__} shares memory with a weight: it cannot be kept apart from "
                    "it. Nothing was changed"
                )
        states[name] = state
    return states


class _Keys:
    """Names of what `optimizer.state` is keyed by: parameters by their number, and plain text."""

    def __init__(self, optimizer: Any) -> None:
        zero = zero_optimizer(optimizer)
        # The groups of ZeRO's stage 3 are empty between two steps: its states belong to the flat masters.
        groups = stepping_optimizer(optimizer).param_groups if zero is None else [{"params": flat_masters(zero)}]
        self.owners: dict[str, Any] = {}
        for parameter in (parameter for group in groups for parameter in group["params"]):
            self.owners[str(len(self.owners))] = parameter
        self._names = {id(parameter): name for name, parameter in self.owners.items()}

    def name(self, key: Any) -> str | None:
        return f"key:{key}" if isinstance(key, str) else self._names.get(id(key))

    def owner(self, name: str) -> Any:
        return self.owners.get(name, name.removeprefix("key:"))


def _address(tensor: Any) -> object:
    plain = local_of(tensor)
    while is_composed(plain):
        plain = next(iter(plain_parts(plain)))[1]
    return plain.device, plain.untyped_storage().data_ptr()


def _flat(value: Any) -> Iterator[Any]:
    """Everything inside of nested containers."""
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _flat(part)
    elif isinstance(value, list | tuple | set):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _is_opaque(value: Any) -> bool:
    """Whether a setting of a parameter group is an object (a function, for example), kept by reference."""
    known = (*_SCALARS, Tensor, torch.dtype, torch.device)
    return not all(isinstance(one, known) for one in _flat(value))


def _write(present: Tensor, kept: Tensor) -> None:
    """Write kept bits into a state tensor; one that shares memory with a weight was refused at capture."""
    with torch.no_grad():
        present.copy_(kept)
