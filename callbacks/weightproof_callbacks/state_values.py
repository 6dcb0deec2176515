"""Values of a training state in two parts: plain tensors by name, and a tree of JSON that says how they go together.

What optimizers, schedulers and generators keep is nested dicts, lists, numbers and tensors. `Values` holds a
copy of such a tree; the same form goes to disk, is digested, and is put back. Nothing is pickled: what has no
form here is refused with its path.

Tensors of several parts (`DTensor`, torchao's 8-bit states) are taken apart by torch's own protocol
(`__tensor_flatten__`), so that only plain tensors are kept: of a sharded one the part that lies here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from weightproof.errors import RestoreError, SnapshotError
from weightproof.snapshots.tensor_store import model_digest, same_bits, tensor_digest, tensor_digests

__all__ = ["Values", "is_composed", "plain_parts"]

# Gives the tensor that is to take the kept values of a place, from what is there now; see `Values.written`.
Write = Callable[[Tensor, Tensor], None]


class _Composition(NamedTuple):
    """How a tensor of several parts is put together again from those that are plain."""

    kind: type
    shape: torch.Size
    layout: object
    make: Callable[[dict[str, Tensor]], Tensor]

    @classmethod
    def of(cls, tensor: Any) -> _Composition:
        """That of a tensor with values: everything but its plain parts is kept by reference."""
        names, context = tensor.__tensor_flatten__()
        objects = {name: value for name in names if not isinstance(value := getattr(tensor, name), Tensor)}
        kind, shape, stride = type(tensor), tensor.shape, tuple(tensor.stride())

        def make(parts: dict[str, Tensor]) -> Tensor:
            return kind.__tensor_unflatten__({**parts, **objects}, context, shape, stride)

        return cls(kind, shape, _layout(tensor), make)

    @classmethod
    def like(cls, sharded: Any) -> _Composition:
        """That of a DTensor cut as `sharded` is, of any dtype."""
        kind: Any = type(sharded.detach())
        place = {"shape": sharded.shape, "stride": tuple(sharded.stride())}

        def make(parts: dict[str, Tensor]) -> Tensor:
            local = parts["_local_tensor"]
            return kind.from_local(local, sharded.device_mesh, sharded.placements, run_check=False, **place)

        return cls(kind, sharded.shape, _layout(sharded), make)


class Values:
    """A copy of a nested value.

    Attributes:
        tree: The JSON side; tensors are `{"tensor": name}`.
        tensors: The plain tensors, by name.
        nbytes: Size of the tensors.
    """

    def __init__(self, tree: Any, tensors: dict[str, Tensor]) -> None:
        self.tree = tree
        self.tensors = tensors
        self._compositions: dict[str, _Composition] = {}
        self._devices: dict[str, torch.device] = {}
        self._digests: dict[str, str] | None = None

    @classmethod
    def copied(cls, value: Any, what: str, device: torch.device | str | None = None) -> Values:
        """Copy `value`, tensor after tensor.

        Args:
            value: Dicts, lists, tuples, sets, numbers, strings, numpy arrays and tensors, nested.
            what: Its name for people, the beginning of every path.
            device: Keep tensors there instead of where they are; host memory of a CUDA tensor is pinned.

        Raises:
            SnapshotError: If something in it has no form here, or there is no memory for the copy.
        """
        found = cls(None, {})
        try:
            found.tree = _Writer(found, device, copies=True).form(value, what)
        except (RuntimeError, MemoryError) as error:
            reason = str(error).splitlines()[0]
            raise SnapshotError(f"no memory for a copy of {what}: {reason}. Nothing was changed") from error
        return found

    @classmethod
    def referring(cls, value: Any, what: str) -> Values:
        """The same form around the tensors themselves: to be compared, not to be kept."""
        found = cls(None, {})
        found.tree = _Writer(found, None, copies=False).form(value, what)
        return found

    @property
    def nbytes(self) -> int:
        """Size of the kept tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def digests(self) -> Mapping[str, str]:
        """SHA-256 of every kept tensor, taken from the copies when first asked for."""
        if self._digests is None:
            self._digests = tensor_digests(self.tensors)
        return self._digests

    @property
    def digest(self) -> str:
        """SHA-256 over the tree and the tensors."""
        return model_digest({**self.digests, "": json.dumps(self.tree, sort_keys=True, allow_nan=False)})

    def require_intact(self) -> None:
        """Refuse copies that changed after their digests were taken.

        Raises:
            RestoreError: Naming the tensor.
        """
        for name, digest in self.digests.items():
            if tensor_digest(self.tensors[name]) != digest:
                raise RestoreError(f"the kept copy of {name} was altered: nothing was restored")

    def value(self) -> Any:
        """The value again, every tensor a copy of its own on its first device."""
        return self.written(self.tree, None, None)

    def written(self, tree: Any, now: Any, write: Write | None) -> Any:
        """The value of a tree of this form, in the tensors of `now` where those can take it.

        Args:
            tree: `self.tree` or a part of it.
            now: What is at this place now: a tensor of the same type, shape, dtype and device is written to
                and given back, everything else is made anew.
            write: Writes a kept tensor into a present one; None: nothing is reused.
        """
        if isinstance(tree, list):
            return [self.written(part, _at(now, i), write) for i, part in enumerate(tree)]
        if not isinstance(tree, dict):
            return tree
        (kind, body), *_ = tree.items()
        if kind == "tensor":
            return self._tensor(tree, now, write)
        if kind == "map":
            return {key: self.written(part, _at(now, key), write) for key, part in body.items()}
        if kind == "tuple":
            return tuple(self.written(part, _at(now, i), write) for i, part in enumerate(body))
        return self._other(kind, body)

    def _other(self, kind: str, body: Any) -> Any:
        if kind == "float":
            return float(body)
        if kind == "array":
            return self.tensors[body].cpu().numpy().copy()
        if kind == "torch":
            return torch.device(body[1]) if body[0] == "device" else getattr(torch, body[1])
        items = [self.written(part, None, None) for part in body]
        return {"pairs": dict, "counter": lambda pairs: Counter(dict(pairs)), "set": set}[kind](items)

    def _tensor(self, tree: Mapping[str, Any], now: Any, write: Write | None) -> Tensor:
        name = tree["tensor"]
        if "parts" in tree:
            return self._composed(tree, now, write)
        kept = self.tensors[name]
        wanted = self._devices.get(name) or _device(tree.get("device", "cpu"), now)
        if write is not None and _takes(now, kept, wanted):
            if not same_bits(now.detach(), kept):
                write(now.detach(), kept)
            return now
        return kept.to(wanted, copy=True)

    def _composed(self, tree: Mapping[str, Any], now: Any, write: Write | None) -> Tensor:
        name, composition = tree["tensor"], self._compositions.get(tree["tensor"])
        if write is not None and self._fits(tree, now):
            parts = dict(plain_parts(now))
            for part, kept in tree["parts"].items():
                self.written(kept, parts[part], write)
            return now
        if composition is None:
            raise RestoreError(f"{name} cannot be made anew")
        return composition.make({part: self.written(kept, None, None) for part, kept in tree["parts"].items()})

    def _fits(self, tree: Mapping[str, Any], now: Any) -> bool:
        """Whether a present wrapper can be written to, part for part."""
        if not is_composed(now) or _kind_name(type(now)) != tree["kind"] or list(now.shape) != tree["shape"]:
            return False
        composition, parts = self._compositions.get(tree["tensor"]), dict(plain_parts(now))
        if composition is not None and _layout(now) != composition.layout:
            return False
        return all(_takes_part(parts.get(part), self._leaf(kept)) for part, kept in tree["parts"].items())

    def require_writable(self, tree: Any, now: Any) -> None:
        """Refuse a tree that `written` could not put back whole; nothing is touched.

        Raises:
            RestoreError: Naming the tensor, with what to do.
        """
        if isinstance(tree, list):
            for i, part in enumerate(tree):
                self.require_writable(part, _at(now, i))
        elif isinstance(tree, Mapping) and "map" in tree:
            for key, part in tree["map"].items():
                self.require_writable(part, _at(now, key))
        elif self._is_out_of_reach(tree, now):
            raise RestoreError(
                f"{tree['tensor']} is a {tree['kind']} of several parts, which files alone do not describe: let the "
                "optimizer take one step before its state is loaded. Nothing was restored"
            )

    def _is_out_of_reach(self, tree: Any, now: Any) -> bool:
        """Whether a wrapper can neither be made anew nor written to."""
        is_wrapper = isinstance(tree, Mapping) and "parts" in tree
        return is_wrapper and tree["tensor"] not in self._compositions and not self._fits(tree, now)

    def describe(self, tree: Any, sharded: Tensor) -> None:
        """Take the wrappers of a tree from files, where they have the shape of `sharded`, to be cut as that is."""
        if isinstance(tree, Mapping) and "parts" in tree:
            if tree["shape"] == list(sharded.shape) and tree["kind"] == _kind_name(type(sharded.detach())):
                self._compositions.setdefault(tree["tensor"], _Composition.like(sharded))
        elif isinstance(tree, Mapping | list):
            for part in tree.values() if isinstance(tree, Mapping) else tree:
                self.describe(part, sharded)

    def _leaf(self, tree: Mapping[str, Any]) -> Tensor | None:
        return None if "parts" in tree else self.tensors[tree["tensor"]]


class _Writer:
    """Turns values into trees, and puts their tensors or copies of them into a `Values`."""

    def __init__(self, found: Values, device: torch.device | str | None, *, copies: bool) -> None:
        self._found = found
        self._device = None if device is None else torch.device(device)
        self._copies = copies

    def form(self, value: Any, path: str) -> Any:
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, int | float | np.generic):
            return _number(value.item() if isinstance(value, np.generic) else value, path)
        if isinstance(value, np.ndarray):
            self._found.tensors[path] = torch.from_numpy(np.ascontiguousarray(value).copy())
            return {"array": path}
        if isinstance(value, torch.dtype | torch.device):
            return {"torch": [type(value).__name__, str(value).removeprefix("torch.")]}
        return self._container(value, path)

    def _container(self, value: Any, path: str) -> Any:
        if isinstance(value, list):
            return [self.form(part, f"{path}.{i}") for i, part in enumerate(value)]
        if isinstance(value, tuple):
            return {"tuple": [self.form(part, f"{path}.{i}") for i, part in enumerate(value)]}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) for key in value) and not isinstance(value, Counter):
                return {"map": {key: self.form(part, f"{path}.{key}") for key, part in value.items()}}
            pairs = [[self.form(key, path), self.form(part, f"{path}.{key}")] for key, part in value.items()]
            return {"counter" if isinstance(value, Counter) else "pairs": pairs}
        if isinstance(value, set | frozenset):
            return {"set": sorted((self.form(part, path) for part in value), key=repr)}
        raise SnapshotError(
            f"{path} is a {type(value).__module__}.{type(value).__qualname__}: only tensors, arrays, numbers, text and "
            "containers of them can be kept and put back. Nothing was changed"
        )

    def _tensor(self, tensor: Tensor, path: str) -> dict[str, Any]:
        if is_composed(tensor):
            return self._composed(tensor, path)
        if refusal := _refusal_of(tensor):
            raise SnapshotError(f"{path} cannot be kept: {refusal}. Nothing was changed")
        self._found.tensors[path] = _copy(tensor, self._device) if self._copies else tensor.detach()
        self._found._devices[path] = tensor.device
        return {"tensor": path} if tensor.device.type == "cpu" else {"tensor": path, "device": tensor.device.type}

    def _composed(self, tensor: Any, path: str) -> dict[str, Any]:
        self._found._compositions[path] = _Composition.of(tensor)
        parts = {name: self.form(part, f"{path}.{name}") for name, part in plain_parts(tensor)}
        return {"tensor": path, "kind": _kind_name(type(tensor)), "shape": list(tensor.shape), "parts": parts}


def is_composed(tensor: Any) -> bool:
    """Whether a tensor is a wrapper around others, which torch's protocol takes apart."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "__tensor_flatten__")


def plain_parts(tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """(attribute, tensor) of every part of a wrapper that is a tensor."""
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if isinstance(part, Tensor):
            yield name, part


def _layout(tensor: Any) -> object:
    """How a DTensor is cut; other wrappers differ by their parts alone."""
    return (tensor.placements, tensor.device_mesh) if hasattr(tensor, "placements") else None


def _takes_part(now: Tensor | None, kept: Tensor | None) -> bool:
    return now is not None and (kept is None or (now.dtype == kept.dtype and now.shape == kept.shape))


def _takes(now: Any, kept: Tensor, device: torch.device) -> bool:
    """Whether a present tensor can be written to instead of being made anew."""
    if not isinstance(now, Tensor) or is_composed(now):
        return False
    return (now.dtype, now.shape, now.device) == (kept.dtype, kept.shape, device)


def _device(kind: str, now: Any) -> torch.device:
    """Where a tensor read from files belongs: where the present one is, else the current device of its kind."""
    if isinstance(now, Tensor) and now.device.type == kind:
        return now.device
    return torch.empty(0, device=kind).device


def _at(now: Any, key: Any) -> Any:
    """The part of a present container at a key, None where there is none."""
    if isinstance(now, Mapping):
        return now.get(key)
    is_row = isinstance(now, list | tuple) and isinstance(key, int)
    return now[key] if is_row and key < len(now) else None


def _number(value: Any, path: str) -> Any:
    if isinstance(value, int):
        return int(value)
    if not isinstance(value, float):
        raise SnapshotError(f"{path} is the number {value!r}, which cannot be kept. Nothing was changed")
    return float(value) if math.isfinite(value) else {"float": repr(float(value))}


def _refusal_of(tensor: Tensor) -> str | None:
    if tensor.device.type == "meta":
        return "it lies on the meta device, without values"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"its layout {tensor.layout} is not supported"
    return None


def _copy(tensor: Tensor, device: torch.device | None) -> Tensor:
    """A copy in dense memory, without another copy on the way."""
    plain = tensor.detach()
    if device is None or device == plain.device:
        return plain.clone()
    moved = plain.to(device, copy=True)
    return moved.pin_memory() if device.type == "cpu" and plain.device.type == "cuda" else moved


def _kind_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
