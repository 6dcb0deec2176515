"""What belongs to a module besides the values of its tensors, and how it goes back.

Which parameter, buffer and module object sits where, the class of each module, the hooks beside them,
and a module's own notes: flags, numbers and small lists that its code keeps about its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

_TABLES = ("_modules", "_parameters", "_buffers")
_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)

# What torch keeps in every module, and the types that a module's own notes are made of.
_MODULE_OWN = frozenset(vars(nn.Module()))
_SIMPLE = (bool, int, float, str, tuple, type(None), torch.dtype, torch.device)


@dataclass(slots=True)
class Notes:
    """The flags, numbers and small containers among an object's attributes, and what was in them."""

    owner: object
    kept: dict[str, tuple[object, object]]

    @classmethod
    def of(cls, owner: object) -> Notes:
        """Of any object with attributes."""
        own = vars(owner)
        return cls(owner, {key: (value, _copy(value)) for key, value in own.items() if _is_bookkeeping(key, value)})

    def put_back(self) -> None:
        """The same containers with the members they had, and the same values."""
        own = vars(self.owner)
        for key, (value, content) in self.kept.items():
            _refill(value, content)
            if key not in own or own[key] is not value:
                own[key] = value


@dataclass(slots=True)
class ModuleState:
    """One module object: its class, its tables, its bookkeeping, and what an edit may hang onto it.

    `visible` are the names in the tables that no plain attribute of the instance hides.
    """

    module: nn.Module
    kind: type[nn.Module]
    tables: dict[str, dict[str, object]]
    visible: tuple[str, ...]
    non_persistent: set[str]
    hooks: dict[str, dict[int, object]]
    notes: Notes
    forward: object
    attributes: frozenset[str]

    @classmethod
    def of(cls, module: nn.Module) -> ModuleState:
        """As the module is now."""
        own = vars(module)
        return cls(
            module=module,
            kind=type(module),
            tables={table: dict(own[table]) for table in _TABLES},
            visible=tuple(name for table in _TABLES for name in own[table] if name not in own),
            non_persistent=set(own["_non_persistent_buffers_set"]),
            hooks={table: dict(own[table]) for table in _HOOK_TABLES},
            notes=Notes.of(module),
            forward=own.get("forward"),
            attributes=frozenset(own),
        )

    def is_changed(self) -> bool:
        """Whether the class, a table or the instance's `forward` is not what it was."""
        own = vars(self.module)
        return (
            type(self.module) is not self.kind
            or own.get("forward") is not self.forward
            or own["_non_persistent_buffers_set"] != self.non_persistent
            or any(not _same_objects(own[table], kept) for table, kept in self.tables.items())
            or any(name in own for name in self.visible)
        )

    def put_back(self) -> None:
        """Restore bookkeeping, and of a changed module the tables, in place, and the hooks beside them."""
        if self.is_changed():
            self._put_structure_back()
        self.notes.put_back()

    def _put_structure_back(self) -> None:
        module, own = self.module, vars(self.module)
        module.__class__ = self.kind
        for table, kept in (*self.tables.items(), *self.hooks.items()):
            own[table].clear()
            own[table].update(kept)
        for name in self.visible:
            own.pop(name, None)  # a plain attribute left by a reparametrization would hide the tensor
        own["_non_persistent_buffers_set"].clear()
        own["_non_persistent_buffers_set"].update(self.non_persistent)
        own.pop("forward", None)
        if self.forward is not None:
            own["forward"] = self.forward
        for name in own.keys() - self.attributes:
            del own[name]  # what came with the change: a quantizer's scheme, for example


@dataclass(slots=True)
class Attributes:
    """The very objects that an object's attributes (or a dictionary's keys) hold: the state of a packed weight.

    For what `ModuleState` does not cover: objects that are no modules, and attributes that are neither tensors in a
    module's tables nor small notes.
    """

    owner: object
    kept: dict[str, object]

    @classmethod
    def of(cls, owner: object) -> Attributes:
        """As they are now; of a module without what torch keeps in every one."""
        own = _contents(owner)
        hidden = _MODULE_OWN if isinstance(owner, nn.Module) else frozenset[str]()
        return cls(owner, {key: value for key, value in own.items() if key not in hidden})

    def put_back(self) -> None:
        """The same attributes with the same objects; those that were added go, but a module keeps its own."""
        own = _contents(self.owner)
        if not isinstance(self.owner, nn.Module):
            for key in own.keys() - self.kept.keys():
                del own[key]
        for key, value in self.kept.items():
            if key not in own or own[key] is not value:
                own[key] = value


def _contents(owner: object) -> dict[str, object]:
    return owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})


def _same_objects(now: Mapping[str, object], kept: Mapping[str, object]) -> bool:
    return list(now) == list(kept) and all(now[name] is kept[name] for name in kept)


def configs_of(model: nn.Module) -> list[tuple[object, str, Notes]]:
    """Every `config` of a module, and every configuration within one: its owner, its name there, its notes."""
    waiting: list[tuple[object, str]] = [(module, "config") for module in model.modules()]
    found: list[tuple[object, str, Notes]] = []
    expanded: set[int] = set()
    while waiting:
        owner, name = waiting.pop()
        config = vars(owner).get(name)
        if isinstance(config, (nn.Module, type, dict)) or not hasattr(config, "__dict__"):
            continue
        found.append((owner, name, Notes.of(config)))
        if id(config) not in expanded:
            expanded.add(id(config))
            waiting += [(config, key) for key, value in vars(config).items() if hasattr(value, "to_dict")]
    return found


def _is_bookkeeping(key: str, value: object) -> bool:
    """Whether an attribute is a flag, a number or a small list of such, set by the module's own code.

    PEFT, for example, notes in `merged_adapters` that a delta has gone into the weights: weights
    and notes must go back together. Train or eval mode is nobody's weight and stays as it is.
    """
    if key in _MODULE_OWN:
        return False
    if isinstance(value, (list, set, dict)):
        members = [*value, *value.values()] if isinstance(value, dict) else list(value)
        return len(members) <= 256 and all(isinstance(member, _SIMPLE) for member in members)
    return isinstance(value, _SIMPLE)


def _copy(value: object) -> object:
    return value.copy() if isinstance(value, (list, set, dict)) else value


def _refill(value: object, content: object) -> None:
    """Give a container the members it had."""
    if isinstance(value, list) and isinstance(content, list) and value != content:
        value[:] = content
    elif isinstance(value, (set, dict)) and isinstance(content, (set, dict)) and value != content:
        value.clear()
        value |= content  # pyright: ignore[reportOperatorIssue] - content is a copy of value
