"""Weights that are no plain parameter: how a module's packed storage becomes the matrix that it multiplies by.

A reader knows one backend (a quantizer's modules or tensor subclasses, pruning masks, parametrizations). It is
registered by entry point under `weightproof.readers` and recognises modules by class and attribute names: no backend
is imported before a module of it is there.

What a reader gives of a matrix is a fresh dequantised copy; what it says of the storage behind it (`tensors`, and the
`owners` that hold them) is what digests cover and what a snapshot copies and restores, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from weightproof.errors import InputError
from weightproof.registry import load_plugin, plugins

GROUP = "weightproof.readers"

# What a reader may meet in another version of its backend: said by name, the model stays guarded.
_SURPRISES = (AttributeError, KeyError, TypeError, ValueError, RuntimeError, ImportError, NotImplementedError)


@dataclass(frozen=True)
class PackedWeight:
    """One matrix that is not a plain parameter.

    Attributes:
        name: Local name in its module, such as "weight": the public name of the matrix is "<module>.<name>".
        backend: What stores it, such as "torchao".
        d_out: Rows of the dequantised matrix.
        d_in: Columns.
        dtype: Of what `dequantize` returns.
        registered: Local names of the module's parameters and buffers that hold it; they are no matrices of their
            own. A dot leads into a submodule ("parametrizations.weight.original").
        tensors: Every plain tensor that holds a part of it, live, by local name; those in `registered` under the name
            they have there. A "bias" that is packed with it belongs here too; it counts as a tensor of its own.
        dequantize: A fresh (d_out, d_in) tensor: what the module multiplies by.
        bits: Width of a code, where known.
        group_size: Consecutive inputs that share a scale; None: a whole row, or unknown.
        steps: Largest distance between neighbouring values of the grid, broadcastable to (d_out, d_in), where known.
        rebuild: The same as `dequantize`, from copies of `tensors` (same keys): originals in a snapshot are read so.
        owners: Objects whose attributes hold `tensors` (a state object, a packed module): a restore puts the same
            attributes back. The module and its registered tensors always are.
        opaque: `tensors` are copies that reading made, of an object that cannot be written to: it goes back whole.
    """

    name: str
    backend: str
    d_out: int
    d_in: int
    dtype: torch.dtype
    registered: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    dequantize: Callable[[], Tensor]
    bits: int | None = None
    group_size: int | None = None
    steps: Callable[[], Tensor] | None = None
    rebuild: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    owners: tuple[object, ...] = ()
    opaque: bool = False


@dataclass(frozen=True)
class Unreadable:
    """A module whose backend is recognised and whose weight cannot be read.

    `tensors` are all that are registered in the module itself, but for its bias: none of them is a matrix.
    """

    backend: str
    reason: str
    d_out: int
    d_in: int
    tensors: Mapping[str, Tensor]
    name: str = "weight"
    owners: tuple[object, ...] = ()
    opaque: bool = False

    @property
    def registered(self) -> tuple[str, ...]:
        """Their local names."""
        return tuple(self.tensors)

    @property
    def refusal(self) -> str:
        """Why the matrix has no numbers."""
        return f"it is stored by {self.backend}, and cannot be read: {self.reason}"


Reading = PackedWeight | tuple[PackedWeight, ...] | str | None


@runtime_checkable
class WeightReader(Protocol):
    """What an entry point in `weightproof.readers` names: an object, or a class without arguments."""

    @property
    def name(self) -> str:
        """The backend's name, as it stands in readings and refusals."""
        ...

    def read(self, module: nn.Module) -> Reading:
        """The packed weight of a module (several, where it has several), or None where it is not of this backend.

        Text: it is of this backend and cannot be read, because of that.
        """
        ...


@cache
def readers() -> tuple[WeightReader, ...]:
    """Every registered reader, in order of name.

    Raises:
        InputError: If what an entry point names is no reader.
    """
    found: list[WeightReader] = []
    for name in plugins(GROUP):
        made: Any = load_plugin(GROUP, name)
        reader = made() if isinstance(made, type) else made
        if not isinstance(reader, WeightReader):
            raise InputError(
                f"the plug-in {name!r} in {GROUP} has no name and read(module): it is no reader of weights"
            )
        found.append(reader)
    return tuple(found)


def read_packed(module: nn.Module) -> tuple[PackedWeight | Unreadable, ...]:
    """The packed weights of one module, not of its children; () for a module whose weights are plain.

    Example:
        >>> read_packed(nn.Linear(2, 2))
        ()
    """
    if is_plain(module):
        return ()
    for reader in readers():
        try:
            found = reader.read(module)
        except _SURPRISES as error:
            found = f"its storage is not laid out as expected ({type(error).__name__}: {error})"
        if isinstance(found, str):
            return (_unreadable(module, reader.name, found),)
        if isinstance(found, PackedWeight):
            return (found,)
        if found:
            return found
    return ()


def is_plain(module: nn.Module) -> bool:
    """Whether a module of torch itself holds nothing but plain parameters: what almost every module is.

    Spares the readers; a subclass, a hook or an attribute that torch does not put there goes to them.
    """
    kind = type(module)
    if not kind.__module__.startswith("torch.nn.modules."):
        return False
    own = vars(module)
    plain = all(one is None or type(one) is nn.Parameter for one in own["_parameters"].values())
    return plain and not own["_forward_pre_hooks"] and not (own.keys() - _known_attributes(kind))


@cache
def _known_attributes(kind: type[nn.Module]) -> frozenset[str]:
    """Attributes that a layer of torch has of its own; none are known of containers, which hold no weights."""
    made: nn.Module | None = None
    with torch.device("meta"):
        if issubclass(kind, nn.Linear):
            made = kind(1, 1)
        elif kind in (nn.LayerNorm, nn.RMSNorm):
            made = kind(1)
        elif issubclass(kind, nn.Embedding):
            made = kind(1, 1)
        elif kind in (nn.Dropout, nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.GELU, nn.SiLU, nn.ReLU, nn.Tanh):
            made = kind()
    return frozenset() if made is None else frozenset(vars(made)) | {"_is_hf_initialized"}


def _unreadable(module: nn.Module, backend: str, reason: str) -> Unreadable:
    own = {**vars(module)["_parameters"], **vars(module)["_buffers"]}
    tensors = {name: tensor for name, tensor in own.items() if tensor is not None and name != "bias"}
    weight = own.get("weight")
    shape = tuple(weight.shape) if weight is not None and weight.ndim == 2 else (0, 0)
    d_out = getattr(module, "out_features", shape[0])
    d_in = getattr(module, "in_features", shape[1])
    return Unreadable(backend, reason, _whole(d_out), _whole(d_in), tensors)


def _whole(size: object) -> int:
    return size if isinstance(size, int) else 0


# ---------------------------------------------------------------- tensor subclasses


def flat_tensors(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The plain tensors inside of a traceable wrapper subclass, by `name.<attribute>`; nested ones too.

    By `__tensor_flatten__`, which every subclass that torch.compile and state dicts understand has.
    """
    if type(tensor.detach()) is Tensor:
        return {name: tensor}
    subclass: Any = tensor
    if not hasattr(subclass, "__tensor_flatten__"):
        raise TypeError(f"{type(tensor).__name__} does not say which tensors it is made of (__tensor_flatten__)")
    attributes, _ = subclass.__tensor_flatten__()
    found: dict[str, Tensor] = {}
    for attribute in attributes:
        inner = getattr(subclass, attribute)
        if inner is not None:
            found |= flat_tensors(f"{name}.{attribute}", inner)
    return found


def rebuilt(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The same wrapper subclass around other inner tensors, named as `flat_tensors` names them."""
    if type(tensor.detach()) is Tensor:
        return tensors[name]
    subclass: Any = tensor
    attributes, context = subclass.__tensor_flatten__()
    inner = {
        attribute: rebuilt(f"{name}.{attribute}", getattr(subclass, attribute), tensors)
        for attribute in attributes
        if getattr(subclass, attribute) is not None
    }
    return type(subclass).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())


def wrappers(tensor: Tensor) -> Iterator[object]:
    """The subclass objects that a packed tensor is made of, outermost first: owners of what lies in them."""
    subclass: Any = tensor
    if type(tensor.detach()) is Tensor:
        return
    yield tensor
    for attribute in subclass.__tensor_flatten__()[0]:
        inner = getattr(subclass, attribute)
        if inner is not None:
            yield from wrappers(inner)


def plain_copy(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A fresh plain tensor of some values, without autograd."""
    fresh = values.detach()
    return fresh.to(dtype).clone() if dtype is not None and fresh.dtype != dtype else fresh.clone()


@dataclass(frozen=True)
class Placed:
    """A packed weight with the module that holds it and every raw path under which that module is registered."""

    module: nn.Module
    found: PackedWeight | Unreadable
    paths: list[str] = field(default_factory=list)

    def raw(self, local: str, path: str | None = None) -> str:
        """Raw name of something in the module, under one of its paths (the first)."""
        path = self.paths[0] if path is None else path
        return f"{path}.{local}" if path else local

    def raws(self, locals_: Iterable[str]) -> Iterator[str]:
        """Raw names of all of them under every path."""
        for local in locals_:
            for path in self.paths:
                yield self.raw(local, path)


def packed_weights(model: nn.Module) -> list[Placed]:
    """Every packed weight of a model, once for each module that holds one.

    A model without any costs a look at each module.
    """
    found: dict[tuple[int, str], Placed] = {}
    seen: dict[int, tuple[PackedWeight | Unreadable, ...]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) not in seen:
            seen[id(module)] = read_packed(module)
        for one in seen[id(module)]:
            found.setdefault((id(module), one.name), Placed(module, one)).paths.append(path)
    return list(found.values())
