"""Kronecker factors of a model's weight matrices: sums over tokens, additive, with what they were fitted on.

Sums and counts are kept, never means: parts fitted on different data, or by different processes, merge exactly. A
file holds every number with its digest; the weights and the data they belong to are named by digest too, so that
factors of other weights are refused instead of giving numbers that look right.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn

from weightproof.errors import InputError
from weightproof.folders.files import make_folders, write_atomically
from weightproof.snapshots.tensor_store import tensor_digest
from weightproof.types import WeightMatrix
from weightproof.weights import iter_weight_matrices

__all__ = ["Factor", "Factors", "Source"]

logger = logging.getLogger("weightproof")

FILE_NAME = "factors.safetensors"
_FORMAT = "weightproof-factors/1"

# Below this many tokens for each dimension an edit by these factors is off by more than a tenth
# (docs/kfac.md); below one the factors have no full rank.
ENOUGH_TOKENS_PER_DIMENSION = 100.0


@dataclass(frozen=True)
class Factor:
    """The factors of one weight matrix, as sums over tokens.

    Attributes:
        name: Of the matrix.
        activation_sum: (d_in, d_in), sum of a a' over tokens: inputs of the layer.
        gradient_sum: (d_out, d_out), sum of g g': gradients of the summed loss at the layer's outputs.
        tokens: How many tokens were summed.
        weight_digest: SHA-256 of the weights (d_out, d_in) at which it was fitted; "" where unknown.
        corrected_sum: (d_out, d_in), sum of (u_i' g)^2 (v_j' a)^2 in the factors' eigenbases; None unless fitted.
    """

    name: str
    activation_sum: torch.Tensor
    gradient_sum: torch.Tensor
    tokens: int
    weight_digest: str = ""
    corrected_sum: torch.Tensor | None = None

    @property
    def activation_covariance(self) -> torch.Tensor:
        """A = E[a a'], (d_in, d_in), not centred."""
        return self.activation_sum / max(1, self.tokens)

    @property
    def gradient_covariance(self) -> torch.Tensor:
        """G = E[g g'], (d_out, d_out)."""
        return self.gradient_sum / max(1, self.tokens)

    @property
    def tokens_per_dimension(self) -> float:
        """Tokens over the larger dimension."""
        return self.tokens / max(len(self.activation_sum), len(self.gradient_sum))

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(tensor.nbytes for _, tensor in _tensors_of(self))

    @property
    def digest(self) -> str:
        """SHA-256 over both sums and the count."""
        whole = hashlib.sha256(f"{self.tokens}\n".encode())
        for label, tensor in _tensors_of(self):
            whole.update(f"{label}={tensor_digest(tensor)}\n".encode())
        return whole.hexdigest()


@dataclass(frozen=True)
class Source:
    """What factors were fitted on and how.

    Attributes:
        labels: "sampled" from the model's own distribution (true Fisher) or "empirical".
        loss: Which loss, "causal" for example, summed over tokens.
        seed: Of the sampled labels.
        batches: How many batches were read.
        data_digest: SHA-256 chain over the batches in their order; of merged parts, over the parts' digests.
        loss_tokens_only: Whether tokens whose label is ignored were left out.
        origin: The program that fitted them, where it was another one ("kronfluence", "bergson"): what that does not
            tell (seed, batches) is 0, labels may be "unknown".
    """

    labels: str
    loss: str
    seed: int
    batches: int
    data_digest: str
    loss_tokens_only: bool = False
    origin: str = ""


@dataclass(frozen=True)
class Factors:
    """Factors by name of their matrix.

    Attributes:
        by_name: The factors.
        source: What they were fitted on.
        refused: Why matrices that were asked for have none, by name.
    """

    by_name: Mapping[str, Factor]
    source: Source
    refused: Mapping[str, str]

    def __getitem__(self, name: str) -> Factor:
        """The factor of one matrix.

        Raises:
            InputError: If there is none; says why where that is known.
        """
        if name in self.by_name:
            return self.by_name[name]
        why = self.refused.get(name, f"it was not among the {len(self.by_name)} matrices that were fitted")
        raise InputError(f"there are no factors for {name}: {why}")

    def __contains__(self, name: str) -> bool:
        """Whether a matrix has factors."""
        return name in self.by_name

    def __iter__(self) -> Iterator[str]:
        """Names of the matrices."""
        return iter(self.by_name)

    def __len__(self) -> int:
        """How many matrices have factors."""
        return len(self.by_name)

    @property
    def nbytes(self) -> int:
        """Memory that they take; a sum that matrices share counts once."""
        tensors = {id(tensor): tensor for one in self.by_name.values() for _, tensor in _tensors_of(one)}
        return sum(tensor.nbytes for tensor in tensors.values())

    @property
    def digest(self) -> str:
        """SHA-256 over all factors and what they were fitted on."""
        lines = [f"{name}={self.by_name[name].digest}" for name in sorted(self.by_name)]
        # Factors that were fitted here have the digest that they had before there was an origin.
        source = {key: value for key, value in vars(self.source).items() if key != "origin" or value}
        return hashlib.sha256("\n".join([json.dumps(source, sort_keys=True), *lines]).encode()).hexdigest()

    def merge(self, other: Factors) -> Factors:
        """The factors of both data sets together: sums and counts add.

        Raises:
            InputError: If they are of different matrices, weights, losses or labels, or of the same data.
        """
        _require_alike(self, other)
        merged = summed(self.by_name, other.by_name)
        digests = sorted((self.source.data_digest, other.source.data_digest))
        source = replace(
            self.source,
            batches=self.source.batches + other.source.batches,
            data_digest=hashlib.sha256("\n".join(["merged", *digests]).encode()).hexdigest(),
        )
        return Factors(merged, source, {**self.refused, **other.refused})

    def require_weights(self, model: nn.Module) -> dict[str, WeightMatrix]:
        """The matrices of a model that have factors, proven to hold the weights at which those were fitted.

        Raises:
            InputError: Naming the first matrix that is missing, of another shape, or of other weights (by hash).
        """
        found = self.require_matrices(iter_weight_matrices(model))
        for name, matrix in found.items():
            require_digest(self.by_name[name], matrix)
        return found

    def require_matrices(self, matrices: Iterable[WeightMatrix]) -> dict[str, WeightMatrix]:
        """Those of some matrices that have factors, by name; their weights are not read.

        Raises:
            InputError: Naming the first matrix that is missing or of another shape.
        """
        found = {one.name: one for one in matrices if one.refusal is None}
        for name, factor in self.by_name.items():
            if name not in found:
                raise InputError(f"these factors belong to another model: it has no matrix {name}")
            matrix = found[name]
            if (matrix.d_out, matrix.d_in) != (len(factor.gradient_sum), len(factor.activation_sum)):
                shape = f"{len(factor.gradient_sum)} x {len(factor.activation_sum)}"
                raise InputError(
                    f"these factors belong to another model: {name} is {matrix.d_out} x {matrix.d_in} here, not {shape}"
                )
        return {name: found[name] for name in self.by_name}

    def require_enough_tokens(self) -> None:
        """Refuse factors without full rank, and warn of noisy ones.

        Raises:
            InputError: Naming the matrix with the fewest tokens for its size, if they are fewer than its dimensions.
        """
        if not self.by_name:
            raise InputError("these factors hold no matrix")
        poorest = min(self.by_name.values(), key=lambda one: one.tokens_per_dimension)
        size = max(len(poorest.activation_sum), len(poorest.gradient_sum))
        if poorest.tokens < size:
            raise InputError(
                f"{poorest.name} was fitted on {poorest.tokens} tokens and has {size} dimensions, so its factors have "
                f"no full rank: fit on {int(ENOUGH_TOKENS_PER_DIMENSION * size):,} tokens or more"
            )
        if poorest.tokens_per_dimension < ENOUGH_TOKENS_PER_DIMENSION and _WARNED.get(id(self)) is not self:
            _WARNED[id(self)] = self  # an edit, a guard and a certificate ask alike: it is said once
            logger.warning(
                "factors are noisy: %s saw %.1f tokens for each of its %d dimensions, fewer than %d",
                poorest.name, poorest.tokens_per_dimension, size, int(ENOUGH_TOKENS_PER_DIMENSION),
            )  # fmt: skip

    def save(self, path: Path | str) -> Path:
        """Write a safetensors file with a manifest; a folder gets `factors.safetensors`. Old or new at any time."""
        path = _file_in(Path(path))
        tensors, entries, stored = {}, {}, {}
        for name, factor in self.by_name.items():
            places = {}
            for label, tensor in _tensors_of(factor):
                digest = tensor_digest(tensor)
                # Matrices that read the same input (gate and up) share one sum.
                places[label] = stored.setdefault(digest, digest)
                tensors[digest] = tensor.detach().cpu().contiguous()
            entries[name] = {"tokens": factor.tokens, "weight_digest": factor.weight_digest, "tensors": places}
        header = json.dumps(
            {"format": _FORMAT, "source": vars(self.source), "refused": dict(self.refused), "factors": entries}
        )
        make_folders(path.parent)
        write_atomically(path, safetensors_bytes(tensors, metadata={"header": header, "digest": _sha(header)}))
        return path

    @classmethod
    def load(cls, path: Path | str) -> Factors:
        """Read factors, with every digest proven.

        Raises:
            InputError: If the file is missing, torn, altered or of another format.
        """
        path = _file_in(Path(path))
        if not path.is_file():
            raise InputError(f"no factors at {path}: fit them first (weightproof factors fit)")
        try:
            with safe_open(path, framework="pt") as handle:
                metadata = handle.metadata() or {}
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise InputError(f"the factors {path} are torn or no safetensors file ({error})") from error
        header = metadata.get("header", "")
        altered = [key for key, tensor in tensors.items() if tensor_digest(tensor) != key]
        if not header or metadata.get("digest") != _sha(header) or altered:
            raise InputError(f"the factors {path} were altered or are of another kind: a digest does not match")
        return _decoded(json.loads(header), tensors, path)


_WARNED: WeakValueDictionary[int, Factors] = WeakValueDictionary()
_READ: WeakValueDictionary[tuple[str, int, int], Factors] = WeakValueDictionary()


def load_factors(path: Path | str) -> Factors:
    """As `Factors.load`; a file that is in memory already, of the same size and time, is not read again.

    Raises:
        InputError: As `Factors.load`.
    """
    file = _file_in(Path(path))
    if not file.is_file():
        return Factors.load(file)
    known = file.stat()
    key = str(file.resolve()), known.st_size, known.st_mtime_ns
    found = _READ.get(key)
    if found is None:
        found = _READ[key] = Factors.load(file)
    return found


def require_digest(factor: Factor, matrix: WeightMatrix) -> None:
    """Refuse factors of other weights.

    Raises:
        InputError: Naming both hashes.
    """
    require_values(factor, matrix.load())


def require_values(factor: Factor, weight: torch.Tensor) -> None:
    """The same for weights (d_out, d_in) that are at hand.

    Raises:
        InputError: Naming both hashes.
    """
    if not factor.weight_digest:
        return
    digest = tensor_digest(weight)
    if digest != factor.weight_digest:
        raise InputError(
            f"these factors belong to other weights: {factor.name} has the hash {digest[:12]} here and had "
            f"{factor.weight_digest[:12]} when they were fitted. Fit them again on this model"
        )


def _tensors_of(factor: Factor) -> Iterator[tuple[str, torch.Tensor]]:
    yield "activation", factor.activation_sum
    yield "gradient", factor.gradient_sum
    if factor.corrected_sum is not None:
        yield "corrected", factor.corrected_sum


def summed(first: Mapping[str, Factor], second: Mapping[str, Factor]) -> dict[str, Factor]:
    """Factors of the data of both, by name; sums that matrices share in both they share in the result.

    Raises:
        InputError: If one of them has corrected eigenvalues.
    """
    sums: dict[tuple[int, int], torch.Tensor] = {}

    def add(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        pair = id(one), id(other)
        if pair not in sums:
            sums[pair] = one + other.to(one.device)
        return sums[pair]

    found = {}
    for name, mine in first.items():
        theirs = second[name]
        if mine.corrected_sum is not None or theirs.corrected_sum is not None:
            raise InputError(
                f"{name}: corrected eigenvalues belong to the eigenbases of their own factors and cannot be merged; "
                "merge the factors without them, then fit the correction for the result"
            )
        activation = add(mine.activation_sum, theirs.activation_sum)
        gradient = add(mine.gradient_sum, theirs.gradient_sum)
        digest = mine.weight_digest or theirs.weight_digest
        found[name] = Factor(name, activation, gradient, mine.tokens + theirs.tokens, digest)
    return found


def _require_alike(first: Factors, second: Factors) -> None:
    missing = sorted(first.by_name.keys() ^ second.by_name.keys())
    if missing:
        raise InputError(f"only one of the two parts has factors of {missing[0]}: they cannot be merged")
    for field in ("labels", "loss", "loss_tokens_only"):
        ours, theirs = getattr(first.source, field), getattr(second.source, field)
        if ours != theirs:
            raise InputError(f"the parts cannot be merged: {field} is {ours!r} in one and {theirs!r} in the other")
    if first.source.data_digest == second.source.data_digest:
        raise InputError("both parts were fitted on the same data: merged, it would count twice")
    for name, factor in first.by_name.items():
        other = second.by_name[name]
        if factor.weight_digest != other.weight_digest:
            raise InputError(f"the parts were fitted at different weights of {name}: they cannot be merged")
        if factor.activation_sum.shape != other.activation_sum.shape:
            raise InputError(f"the parts have factors of different shapes for {name}: they cannot be merged")


def _decoded(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], path: Path) -> Factors:
    if header.get("format") != _FORMAT:
        raise InputError(f"{path} is of the format {header.get('format')!r}; this version reads {_FORMAT}")
    factors = {}
    for name, entry in header["factors"].items():
        places = {label: tensors[digest] for label, digest in entry["tensors"].items()}
        sums = places["activation"], places["gradient"]
        factors[name] = Factor(name, *sums, entry["tokens"], entry["weight_digest"], places.get("corrected"))
    return Factors(factors, Source(**header["source"]), header["refused"])


def _file_in(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
