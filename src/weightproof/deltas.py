"""A difference of weights as a thing of its own: where it came from, what it was made for, saved and loaded.

    >>> delta = Delta.load("my-adapter")                           # doctest: +SKIP
    >>> style = Delta.contrast(Delta.load("formal"), Delta.load("casual"))   # doctest: +SKIP
    >>> with weightproof.steer(model, style, alpha=0.5):            # doctest: +SKIP
    ...     model.generate(...)

A LoRA stays factored, s B A, in float32: never the difference of two rounded merges. A difference of half-precision
weights that was taken after the merge has lost much of what it was (docs/steering.md).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightproof.differences import delta_file, sources
from weightproof.differences.contrasts import contrasted
from weightproof.differences.factors import LowRank, Part, dense_of, frobenius, largest_element, scaled_part, values_of
from weightproof.errors import InputError
from weightproof.folders.jsonable import to_jsonable
from weightproof.lora.folders import is_adapter_folder
from weightproof.snapshots.tensor_store import tensor_digest

__all__ = ["Delta", "LowRank"]


@dataclass(frozen=True, eq=False)
class Delta:
    """What is added to each matrix of a model.

    Attributes:
        parts: Public matrix name (`iter_weight_matrices`) -> its change (d_out, d_in), however the matrix is stored
            (GPT-2's Conv1D turned): two factors, or all of it; float32.
        metadata: JSON values: `mode` (adapter, difference, contrast, given), `source`, `base` (its `name`, and the
            digest of each matrix where that is known), `dtype` of the weights or factors it was made from, `norms`
            (Frobenius, by matrix), `not_included` (what else the source changes -> why it is not in `parts`), `notes`.

    Raises:
        InputError: A part is no matrix of floating point numbers, or there is none.

    Example:
        >>> delta = Delta({"0.weight": LowRank(torch.ones(3, 1), torch.ones(1, 4))})
        >>> delta.dense("0.weight").shape, round(delta.metadata["norms"]["0.weight"] ** 2, 6)
        (torch.Size([3, 4]), 12.0)
    """

    parts: Mapping[str, Part]
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        """Check the parts, cast whole matrices to float32, and complete the metadata."""
        if not isinstance(self.parts, Mapping) or not self.parts:
            raise InputError("a delta needs a mapping of matrix name -> change that holds at least one")
        parts = {str(name): _checked(str(name), part) for name, part in self.parts.items()}
        known = {"mode": "given", "source": None, "base": {}, "dtype": "float32", "not_included": {}, "notes": []}
        base = self.metadata.get("base") or {}
        about = {"base": base if isinstance(base, Mapping) else {"name": str(base)}}
        about["norms"] = {name: frobenius(part) for name, part in parts.items()}
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "metadata", to_jsonable({**known, **self.metadata, **about}))

    # -- what it is ----------------------------------------------------------------------------

    def dense(self, name: str) -> Tensor:
        """The change of one matrix, (d_out, d_in), float32.

        Raises:
            InputError: The delta has no such matrix.
        """
        return dense_of(self._part(name))

    def singular_values(self, name: str) -> Tensor:
        """Singular values of one change, descending, float64; of factors only the r that may differ from zero.

        Raises:
            InputError: The delta has no such matrix, or it holds NaN or inf there.
        """
        part = self._part(name)
        if not math.isfinite(largest_element(part)):
            raise InputError(f"the delta of {name} holds NaN or inf: was its adapter trained to the end?")
        return values_of(part)

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices it changes, sorted."""
        return tuple(sorted(self.parts))

    @property
    def is_factored(self) -> bool:
        """Whether every part is kept as factors."""
        return all(isinstance(part, LowRank) for part in self.parts.values())

    @property
    def base_digests(self) -> Mapping[str, str]:
        """Matrix name -> digest of the weights it was made for, where that is known."""
        return self.metadata["base"].get("digests", {})

    @property
    def digest(self) -> str:
        """SHA-256 over the names and the bits of every part."""
        whole = hashlib.sha256()
        for name, part in sorted(self.parts.items()):
            tensors = (part.left, part.right) if isinstance(part, LowRank) else (part,)
            whole.update(f"{name} {' '.join(tensor_digest(tensor) for tensor in tensors)}\n".encode())
        return whole.hexdigest()

    def scaled(self, alpha: float) -> Delta:
        """Alpha times this."""
        parts = {name: scaled_part(part, alpha) for name, part in self.parts.items()}
        return Delta(parts, {**self.metadata, "scale": alpha * self.metadata.get("scale", 1.0)})

    def _part(self, name: str) -> Part:
        if name not in self.parts:
            raise InputError(f"the delta has no {name!r}: it changes {', '.join(self.names[:3])} ({len(self.parts)})")
        return self.parts[name]

    def __repr__(self) -> str:
        """How many matrices, how they are kept, and where they come from."""
        factored = sum(isinstance(part, LowRank) for part in self.parts.values())
        mode, source = self.metadata["mode"], self.metadata["source"]
        return f"Delta({len(self.parts)} matrices, {factored} of them factored, {mode}, source={source!r})"

    # -- where it comes from -------------------------------------------------------------------

    @classmethod
    def from_adapter(
        cls,
        source: Path | str | nn.Module,
        adapter_name: str = "default",
        base: nn.Module | Path | str | None = None,
    ) -> Delta:
        """What an adapter adds: s B A in float32, kept as factors.

        DoRA scales whole rows, so that what it changes depends on the base: its parts are the merged weights minus the
        base, dense, which `metadata["notes"]` says. So are those of other methods (IA3, LoHa, ...), which PEFT itself
        merges into a copy. Biases and norms are not part of a delta, and replaced matrices
        (`modules_to_save`) are only where the base is given; `metadata["not_included"]` names them.

        Args:
            source: The folder that PEFT saved the adapter to, or a live model with LoRA layers.
            adapter_name: Which of several.
            base: The model that it belongs to, or its folder; needed for what is no plain LoRA out of a folder. Where
                it is given, an adapter of another base is refused.

        Raises:
            InputError: No adapter there, none of LoRA weights, a kind that is not understood, DoRA without its base,
                or an adapter of another base.
        """
        return cls(*sources.of_adapter(source, adapter_name, base))

    @classmethod
    def between(cls, before: nn.Module | Path | str, after: nn.Module | Path | str) -> Delta:
        """After - before, in float32, of every matrix that differs; folders are read one tensor at a time.

        Raises:
            InputError: They are of different architectures, are equal, or a matrix is sharded over processes.
        """
        return cls(*sources.difference(before, after))

    @classmethod
    def contrast(
        cls, positive: Delta, negative: Delta, mode: Literal["difference", "bisector"] = "difference"
    ) -> Delta:
        """What one changes and the other does not: positive - negative, of every matrix of either.

        A matrix that only one of them changes counts as zero in the other. Parts stay factored where both are:
        [s B+, -s B-] and [A+; A-]. `metadata["sides"]` holds, over all matrices, the `cosine` of the two, their
        `norm_ratio`, and how much they have in common.

        Args:
            positive: What to move towards.
            negative: What to move away from.
            mode: "bisector" gives both sides the same weight, however long each is, and the length of the difference.

        Raises:
            InputError: A matrix has another shape in each, or they were made for different weights.
        """
        return cls(*contrasted(positive.parts, positive.metadata, negative.parts, negative.metadata, mode))

    # -- its file ------------------------------------------------------------------------------

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file with the metadata in its header, the old one or the new one at any time.

        Args:
            path: A file that ends in .safetensors, or a folder, which gets `delta.safetensors`.

        Returns:
            The file.
        """
        return delta_file.write(Path(path), self.parts, self.metadata)

    @classmethod
    def load(cls, path: Path | str) -> Delta:
        """Read what `save` wrote (the file, or a folder that holds it), or the folder of a PEFT adapter.

        Raises:
            InputError: Nothing of the kind is there, or it is torn or was altered; also as `from_adapter`.
        """
        found = Path(path)
        if found.is_dir() and not (found / delta_file.NAME).exists() and is_adapter_folder(found):
            return cls.from_adapter(found)
        return cls(*delta_file.read(found))


def _checked(name: str, part: object) -> Part:
    if isinstance(part, LowRank):
        return part
    if not isinstance(part, Tensor) or part.ndim != 2 or not part.is_floating_point():
        raise InputError(
            f"the delta of {name} must be a LowRank or a 2-D tensor (d_out, d_in) of floating point numbers"
        )
    return part.detach().to(torch.float32)
