"""The declared kind of a LoRA merge: each matrix grew by exactly its adapter's delta, once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.contracts.merging import Merge, guess, read_merge, words_for
from weightproof.contracts.quantities import count_altered, incomparable
from weightproof.errors import InputError
from weightproof.lora.adapters import Adapter, AdapterDelta, read_adapter, require_fits
from weightproof.types import ContractReading, WeightMatrix
from weightproof.weights import iter_tensors, iter_weight_matrices

# Besides the result, DoRA in half precision rounds the sum, the lengths of its rows, and the ratio to the magnitudes.
_DORA_ROUNDINGS = 4
_NO_DELTA = "the adapter has no delta for it"
_TOO_SMALL = "the delta is smaller than the rounding of the dtype: merged or not, the weights look the same"


@dataclass(frozen=True, eq=False)
class LoraMerge:
    """Each matrix grew by exactly its adapter's delta, biases and replaced modules went as the adapter says.

    Attributes:
        adapter: An `Adapter`, or deltas: matrix name -> (d_out, d_in), that is scaling * B @ A, or its factors. What
            is not named there must not change.
        reverse: The adapter was taken out of the weights (PEFT's `unmerge`), not merged into them.
        same_base: Whether the base must be the one that the adapter was trained on, where that is known.
        about: What else the evidence should say of deltas that are given by matrix name: which, how much of them.
    """

    adapter: Adapter | Mapping[str, Tensor | AdapterDelta]
    reverse: bool = False
    same_base: bool = True
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    # Replaced matrices as they are read, (d_out, d_in); known once the model is (`bound`).
    _replaced: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)

    name = "lora_merge"

    def __init__(
        self,
        adapter: Adapter | Mapping[str, Tensor | AdapterDelta] | Path | str | nn.Module,
        *,
        adapter_name: str = "default",
        reverse: bool = False,
        same_base: bool = True,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Declare a merge.

        Args:
            adapter: What was merged: the folder of an adapter, a live model that holds it, an `Adapter` that was read,
                or deltas by matrix name, whole or as factors (`AdapterDelta`).
            adapter_name: Which of several, in a folder or a live model.
            reverse: It is taken out again.
            same_base: False: into other weights than it was trained on, too.
            about: As above, JSON values.

        Raises:
            InputError: There is no such adapter, or nothing in it.
        """
        if isinstance(adapter, str | Path | nn.Module):
            adapter = read_adapter(adapter, adapter_name)
        if not isinstance(adapter, Adapter):
            _require_deltas(adapter)
        found = adapter.replaced if isinstance(adapter, Adapter) else {}
        known = {"adapter": adapter, "reverse": reverse, "same_base": same_base, "_replaced": found}
        for key, value in {**known, "about": dict(about or {})}.items():
            object.__setattr__(self, key, value)

    def params(self) -> dict[str, Any]:
        """The names of what it changes, and the digest of an adapter."""
        reverse = {"reverse": True} if self.reverse else {}
        if not isinstance(self.adapter, Adapter):
            return {"matrices": sorted(self.adapter), **self.about, **reverse}
        whole = {"replaced": sorted(self.adapter.replaced), "biases": sorted(self.adapter.biases)}
        return {
            "matrices": sorted(self.adapter.deltas),
            **{key: names for key, names in whole.items() if names},
            "adapter": self.adapter.digest,
            **reverse,
        }

    @property
    def expected(self) -> frozenset[str]:
        """Matrices and tensors that it must change: they are measured although they did not."""
        if not isinstance(self.adapter, Adapter):
            return frozenset(self.adapter)
        whole = () if self.reverse else (*self.adapter.replaced, *self._replaced)
        return frozenset((*self.adapter.deltas, *self.adapter.biases, *whole))

    def bound(self, model: nn.Module) -> LoraMerge:
        """The same for one model: its own names of tied tensors, replaced matrices turned as they are read.

        Raises:
            InputError: The adapter does not fit the model, or was trained on another base.
        """
        matrices = list(iter_weight_matrices(model))
        names = {tied: one.name for one in matrices for tied in (one.name, *one.tied_names)}
        if not isinstance(self.adapter, Adapter):
            if missing := [name for name in self.adapter if name not in names]:
                raise InputError(f"LoraMerge has a delta for {missing[0]}, which the model does not have")
            found = {names[name]: delta for name, delta in self.adapter.items()}
            return LoraMerge(found, reverse=self.reverse, about=self.about)
        require_fits(self.adapter, model, same_base=self.same_base and not self.reverse)
        tensors = {tied: one.name for one in iter_tensors(model) for tied in (one.name, *one.tied_names)}
        return self.read_as(matrices, names, tensors)

    def read_as(
        self,
        matrices: Collection[WeightMatrix],
        names: Mapping[str, str] | None = None,
        tensors: Mapping[str, str] | None = None,
    ) -> LoraMerge:
        """The same for matrices as they are read: an adapter under their names, replaced matrices turned.

        Args:
            matrices: Those of the model or folder.
            names: Name of a matrix in the adapter -> name here; one that is not in it keeps its own.
            tensors: As `names`, of whole tensors and biases.
        """
        if not isinstance(self.adapter, Adapter):
            return self
        names, tensors = names or {}, tensors or {}
        whole = {tensors.get(name, name): tensor for name, tensor in self.adapter.replaced.items()}
        found = ((names.get(name, name), delta) for name, delta in self.adapter.deltas.items())
        adapter = replace(
            self.adapter,
            deltas={name: replace(delta, name=name) for name, delta in found},
            replaced=whole,
            biases={tensors.get(name, name): tensor for name, tensor in self.adapter.biases.items()},
        )
        made = LoraMerge(adapter, reverse=self.reverse, same_base=self.same_base)
        turned = {
            one.name: one.select(whole[one.tensor_name])
            for one in matrices
            if one.tensor_name in whole and one.select is not None
        }
        rest = {name: tensor for name, tensor in whole.items() if tensor.ndim < 2}
        object.__setattr__(made, "_replaced", turned | rest)
        return made

    def without(self, tensor_names: Collection[str]) -> LoraMerge:
        """The same where some tensors hold their earlier values again: nothing is expected of what lies in them."""

        def stays(name: str) -> bool:
            return name.partition("[")[0] not in tensor_names

        if not isinstance(self.adapter, Adapter):
            left = {name: delta for name, delta in self.adapter.items() if stays(name)}
            return LoraMerge(left or dict(self.adapter), reverse=self.reverse, about=self.about)
        parts = {
            key: {name: value for name, value in getattr(self.adapter, key).items() if stays(name)}
            for key in ("deltas", "replaced", "biases")
        }
        made = LoraMerge(replace(self.adapter, **parts), reverse=self.reverse, same_base=self.same_base)
        object.__setattr__(made, "_replaced", {name: one for name, one in self._replaced.items() if stays(name)})
        return made

    def measure(self, name: str, before: Tensor, after: Tensor) -> tuple[ContractReading, ...]:
        """What the merge made of one matrix (d_out, d_in), against what it should have."""
        if reason := incomparable(before, after):
            return (ContractReading(name, "merge_error", None, 1.0, rigorous=True, reason=reason),)
        if self.reverse:  # merging what is there now must give what was there before
            before, after = after, before
        delta = self._delta(name)
        whole = None if self.reverse else self._replaced.get(name)
        if delta is not None:
            return (_merge_reading(name, before if whole is None else whole.to(before.device), after, delta),)
        if whole is not None:
            return (_replaced_reading(name, before, after, whole),)
        value = count_altered(before, after)[0] / max(1, before.numel())
        reason = _NO_DELTA if value else None
        return (ContractReading(name, "altered_fraction", value, 0.0, rigorous=True, reason=reason),)

    def measure_outside(self, name: str, before: Tensor, after: Tensor) -> tuple[ContractReading, ...]:
        """What became of a bias, a norm or a buffer, any shape."""
        added = self.adapter.biases.get(name) if isinstance(self.adapter, Adapter) else None
        whole = None if self.reverse else self._replaced.get(name)
        if added is None and whole is None:
            return (ContractReading(name, "altered_outside_matrices", 1.0, 0.0, rigorous=True, reason=_NO_DELTA),)
        if reason := incomparable(before, after):
            return (ContractReading(name, "merge_error", None, 1.0, rigorous=True, reason=reason),)
        if self.reverse:
            before, after = after, before
        base = before if whole is None else whole.to(before.device)
        if added is None:
            return (_replaced_reading(name, before, after, base),)
        read = read_merge(base.reshape(1, -1), after.reshape(1, -1), added.reshape(1, -1))
        return (_reading(name, read, lambda: words_for(read, base, after)),)

    def _delta(self, name: str) -> Tensor | AdapterDelta | None:
        return (self.adapter.deltas if isinstance(self.adapter, Adapter) else self.adapter).get(name)


def _require_deltas(deltas: object) -> None:
    if not isinstance(deltas, Mapping) or not deltas:
        raise InputError(
            "LoraMerge needs the folder of an adapter, a live model that holds one, or a mapping of matrix name -> "
            "delta (scaling * B @ A); it is empty or none of these"
        )
    for key, delta in deltas.items():
        if not isinstance(delta, AdapterDelta) and (not isinstance(delta, Tensor) or delta.ndim != 2):
            raise InputError(f"LoraMerge: the delta of {key!r} must be a 2-D tensor (d_out, d_in)")


def _merge_reading(name: str, base: Tensor, after: Tensor, delta: Tensor | AdapterDelta) -> ContractReading:
    if tuple(delta.shape) != tuple(base.shape):
        reason = f"the declared delta has shape {list(delta.shape)}, the matrix {list(base.shape)}"
        return ContractReading(name, "merge_error", None, 1.0, rigorous=True, reason=reason)
    if isinstance(delta, Tensor):
        read = read_merge(base, after, delta)
        return _reading(name, read, lambda: words_for(read, base, after))
    dora = delta.magnitude is not None
    read = read_merge(base, after, delta.dense(base), _DORA_ROUNDINGS if dora else 1)
    return _reading(name, read, lambda: _dora_words(read, base, after, delta) if dora else words_for(read, base, after))


def _reading(name: str, read: Merge, words: Callable[[], str]) -> ContractReading:
    if read.limit >= 1.0 and read.error <= read.limit:
        return ContractReading(name, "merge_error", None, 1.0, rigorous=True, reason=_TOO_SMALL)
    reason = words() if read.error > read.limit else None
    return ContractReading(name, "merge_error", read.error, read.limit, rigorous=True, reason=reason)


def _dora_words(read: Merge, base: Tensor, after: Tensor, delta: AdapterDelta) -> str:
    """What a broken DoRA merge looks like: the common mistakes are made and compared."""

    def merged(weight: Tensor, made: AdapterDelta) -> Tensor:
        return weight.to(torch.float32) + made.dense(weight).to(weight.device)

    mistakes: dict[str, Callable[[], Tensor]] = {
        "the adapter was merged twice": lambda: merged(merged(base, delta), delta),
        "the delta was merged with the wrong sign": lambda: merged(base, replace(delta, scaling=-delta.scaling)),
        "the delta was merged with 10 times its scaling": lambda: merged(
            base, replace(delta, scaling=10 * delta.scaling)
        ),
        "the delta was merged without DoRA's magnitudes": lambda: merged(base, replace(delta, magnitude=None)),
    }
    found = None if read.coefficient == 0.0 else guess(after, mistakes, read.size, max(3 * read.limit, 0.05))
    return found or words_for(read, base, after)


def _replaced_reading(name: str, before: Tensor, after: Tensor, whole: Tensor) -> ContractReading:
    """Whether a tensor holds the adapter's own copy, cast to its dtype."""
    if tuple(whole.shape) != tuple(after.shape):
        reason = f"the adapter's copy has shape {list(whole.shape)}, the tensor {list(after.shape)}"
        return ContractReading(name, "replaced_fraction", None, 0.0, rigorous=True, reason=reason)
    wanted = whole.to(after.device, after.dtype)
    value = count_altered(wanted, after)[0] / max(1, after.numel())
    reason = None
    if value:
        same = not count_altered(before, after)[0]
        reason = "it is byte-identical to the base: the adapter's own copy (modules_to_save) did not take its place"
        reason = reason if same else "it is not the adapter's own copy (modules_to_save)"
    return ContractReading(name, "replaced_fraction", value, 0.0, rigorous=True, reason=reason)
