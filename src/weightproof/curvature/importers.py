"""Factors that other programs fitted: the folders of kronfluence and of bergson.

kronfluence (arXiv:2308.03296) keeps four safetensors files, of sums and of counts by module; a layer with a bias has a
homogeneous coordinate, a one behind every input, whose row and column are left out here. bergson (arXiv:2606.11660)
keeps rows of its sums in one file a process, and one count of tokens. Neither says at which weights it fitted: the
model that is given here is taken to be that one, and its weights are what the factors are bound to. Pickles are not
read: of the file of bergson's count, a zip archive, only the bytes of its one number.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from weightproof.curvature.eigenbasis import checked_factor
from weightproof.curvature.factors import Factor, Factors, Source
from weightproof.errors import InputError
from weightproof.folders.plain_yaml import parse_yaml
from weightproof.snapshots.tensor_store import tensor_digest
from weightproof.types import WeightMatrix
from weightproof.weights import iter_tensors, iter_weight_matrices, storage_identity, unwrap

__all__ = ["IMPORTERS", "import_bergson", "import_factors", "import_kronfluence"]

logger = logging.getLogger("weightproof")

_ACTIVATION, _GRADIENT = "activation", "gradient"
_COUNTS = {kind: f"num_{kind}_covariance_processed" for kind in (_ACTIVATION, _GRADIENT)}

# Folder names of bergson since 2.0, and before.
_SHARDS = ("{}_sharded", "{}_covariance_sharded")
_TOTAL = "total_processed.pt"
_INT64_BYTES = 8


@dataclass(frozen=True)
class _Sums:
    """What a folder holds of one module: sums over tokens and how many; sizes may count a homogeneous coordinate."""

    activation: Tensor
    gradient: Tensor
    activation_tokens: int
    gradient_tokens: int


def import_factors(folder: Path | str, kind: str, model: nn.Module) -> Factors:
    """Factors that another program fitted.

    Args:
        folder: Where it wrote them.
        kind: "kronfluence" or "bergson".
        model: The model that they were fitted at.

    Raises:
        InputError: If `kind` is unknown, or as the importer of that kind.
    """
    if kind not in IMPORTERS:
        raise InputError(f"factors of {kind!r} cannot be imported: known are {', '.join(IMPORTERS)}")
    return IMPORTERS[kind](folder, model)


def import_kronfluence(folder: Path | str, model: nn.Module) -> Factors:
    """Factors from a folder of kronfluence 1.x, `<output>/<analysis>/factors_<name>`.

    Its loss and its tokens are those of the task that was written for it: predictions are in nats per token only if
    that task sums the loss over tokens.

    Args:
        folder: With `activation_covariance.safetensors` and its three sisters.
        model: The model that they were fitted at.

    Returns:
        The factors, without homogeneous coordinates; bound to the weights of `model`.

    Raises:
        InputError: If a file is missing or torn, a count is missing or zero, the model lacks a matrix or has it in
            another shape, or a sum is not finite or not symmetric.
    """
    folder = _existing(folder)
    files = {kind: folder / f"{kind}_covariance.safetensors" for kind in (_ACTIVATION, _GRADIENT)}
    files |= {count: folder / f"{count}.safetensors" for count in _COUNTS.values()}
    _require_files(folder, files.values())
    read = {what: _tensors(file) for what, file in files.items()}

    def sums() -> Iterator[tuple[str, _Sums]]:
        for name in read[_ACTIVATION] | read[_GRADIENT]:
            activation, gradient = (_part(read[what], name, files[what]) for what in (_ACTIVATION, _GRADIENT))
            inputs, slopes = (_counted(_part(read[one], name, files[one]), name) for one in _COUNTS.values())
            yield name, _Sums(activation, gradient, inputs, slopes)

    arguments = _json(folder / "factor_arguments.json")
    labels = _labels(arguments.get("use_empirical_fisher"))
    source = _source("kronfluence", labels, "of a kronfluence task", files.values())
    return _factors(dict(sums()), model, folder, source)


def import_bergson(folder: Path | str, model: nn.Module) -> Factors:
    """Factors from a folder of bergson 2.x that `bergson hessian --method kfac` wrote.

    Args:
        folder: With `activation_sharded`, `gradient_sharded` and `total_processed.pt`.
        model: The model that they were fitted at.

    Returns:
        The factors, without homogeneous coordinates; bound to the weights of `model`.

    Raises:
        InputError: As `import_kronfluence`, or if another method than K-FAC was fitted.
    """
    folder = _existing(folder)
    settings = _bergson_settings(folder)
    method = settings.get("method", "kfac")
    if method != "kfac":
        raise InputError(f"{folder} holds {method} factors of bergson; only those of --method kfac are Kronecker sums")
    shards = {kind: _shards(folder, kind) for kind in (_ACTIVATION, _GRADIENT)}
    tokens = _bergson_count(folder / _TOTAL)
    read = {kind: _joined(files) for kind, files in shards.items()}
    found = {}
    for name in read[_ACTIVATION] | read[_GRADIENT]:
        activation, gradient = (_part(read[kind], name, shards[kind][0].parent) for kind in (_ACTIVATION, _GRADIENT))
        found[name] = _Sums(activation, gradient, tokens, tokens)
    labels = _labels(settings.get("use_dataset_labels"))
    reduction = settings.get("loss_reduction", "unknown")
    if reduction == "mean":
        logger.warning(
            "bergson took the mean of the loss over each document, so gradients of short documents weigh more and "
            "predicted loss changes are not in nats per token: fit with --loss_reduction sum for those"
        )
    files = (file for kind in shards for file in shards[kind])
    return _factors(found, model, folder, _source("bergson", labels, f"causal, reduced by {reduction}", files))


IMPORTERS = {"kronfluence": import_kronfluence, "bergson": import_bergson}


def _factors(found: Mapping[str, _Sums], model: nn.Module, folder: Path, source: Source) -> Factors:
    matrices = _by_module(model)
    by_name: dict[str, Factor] = {}
    shared: dict[str, Tensor] = {}
    for name, sums in found.items():
        matrix = matrices.get(name)
        if matrix is None:
            known = ", ".join(sorted(matrices)[:2])
            raise InputError(f"{folder} has factors of {name}, and this model has no such matrix (it has {known}, ...)")
        if matrix.name in by_name:
            raise InputError(f"{folder} has factors of {matrix.name} twice: it is tied, and fitted under both names")
        factor = _factor(matrix, sums)
        # Gate and up read the same input: their sums are equal, and are held once.
        kept = shared.setdefault(tensor_digest(factor.activation_sum), factor.activation_sum)
        digest = tensor_digest(matrix.load())
        by_name[matrix.name] = Factor(matrix.name, kept, factor.gradient_sum, factor.tokens, digest)
    if not by_name:
        raise InputError(f"{folder} has no factors of any matrix")
    return Factors(by_name, source, {})


def _factor(matrix: WeightMatrix, sums: _Sums) -> Factor:
    """Checked, without the homogeneous coordinate, of one count."""
    for what, count in (("inputs", sums.activation_tokens), ("gradients", sums.gradient_tokens)):
        if count < 1:
            raise InputError(f"the factors of {matrix.name} were fitted on {count} {what}: fit them again")
    activation = _plain(sums.activation)
    if tuple(activation.shape) == (matrix.d_in + 1,) * 2:
        activation = activation[:-1, :-1].contiguous()
    checked_factor(activation, matrix.d_in, f"the sum over inputs of {matrix.name} (d_in x d_in)")
    gradient = checked_factor(
        _plain(sums.gradient), matrix.d_out, f"the sum over gradients of {matrix.name} (d_out x d_out)"
    )
    if sums.activation_tokens != sums.gradient_tokens:
        gradient = gradient * (sums.activation_tokens / sums.gradient_tokens)
    return Factor(matrix.name, activation, gradient, sums.activation_tokens)


def _plain(tensor: Tensor) -> Tensor:
    """In float32 or better: sums in half precision are kept as they are, but worked with in more."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _by_module(model: nn.Module) -> dict[str, WeightMatrix]:
    """Matrices by the module that holds them, from the root and from the body that a head was put on."""
    inner = unwrap(model)
    matrices = (one for one in iter_weight_matrices(model) if one.refusal is None)
    by_tensor = {one.tensor_name: one for one in matrices if one.name == one.tensor_name}
    places = {storage_identity(one.tensor): one.name for one in iter_tensors(model)}
    found: dict[str, WeightMatrix] = {}
    for path, module in inner.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and places.get(storage_identity(weight)) in by_tensor:
            found[path] = by_tensor[places[storage_identity(weight)]]
    body = f"{getattr(inner, 'base_model_prefix', '')}."
    return found | {path.removeprefix(body): one for path, one in found.items() if path.startswith(body)}


def _labels(of_the_data: object) -> str:
    return {True: "empirical", False: "sampled"}[of_the_data] if isinstance(of_the_data, bool) else "unknown"


def _source(program: str, labels: str, loss: str, files: Any) -> Source:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return Source(labels, loss, 0, 0, digest.hexdigest(), origin=program)


def _existing(folder: Path | str) -> Path:
    folder = Path(folder)
    if folder.is_file():
        pickled = folder.suffix in (".pt", ".pth", ".pkl", ".bin")
        why = "a pickle, which could run code when it is read" if pickled else "a file"
        raise InputError(
            f"{folder} is {why}: name the folder that kronfluence or bergson wrote"
            + (", or fit the factors again (weightproof factors fit)" if pickled else "")
        )
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    return folder


def _require_files(folder: Path, files: Any) -> None:
    for file in files:
        if file.is_file():
            continue
        if any(folder.glob(f"{file.stem}_data_partition*")):
            raise InputError(
                f"{folder} holds partitions of {file.name} that were not joined: call kronfluence's "
                "Analyzer.aggregate_covariance_matrices first"
            )
        inside = sorted(path.parent.name for path in folder.glob(f"*/{file.name}"))
        more = f"; the folder {inside[0]} in it has one" if inside else " (fit_covariance_matrices writes it)"
        raise InputError(f"{folder} has no file {file.name}{more}")


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is torn or no safetensors file ({error})") from error


def _part(tensors: Mapping[str, Tensor], name: str, file: Path) -> Tensor:
    if name not in tensors:
        raise InputError(f"{file} has nothing of {name}, of which its sisters have something: fit the factors again")
    return tensors[name]


def _counted(count: Tensor, name: str) -> int:
    if count.numel() != 1:
        raise InputError(f"the count of tokens of {name} holds {count.numel()} numbers, not one")
    return int(count.item())


def _json(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is no JSON ({error})") from error
    return found if isinstance(found, Mapping) else {}


def _bergson_settings(folder: Path) -> dict[str, Any]:
    """What its configuration says of method, labels and loss; files and nesting differ between versions."""
    wanted, found = ("method", "use_dataset_labels", "loss_reduction"), {}
    for name in ("config.yaml", "index_config.yaml", "hessian_config.yaml"):
        if not (folder / name).is_file():
            continue
        pending = [parse_yaml((folder / name).read_text(encoding="utf-8"), str(folder / name))]
        while pending:
            value = pending.pop()
            if isinstance(value, Mapping):
                found |= {key: value[key] for key in wanted if isinstance(value.get(key), str | bool)}
                pending += value.values()
            elif isinstance(value, list):
                pending += value
    return found


def _shards(folder: Path, kind: str) -> list[Path]:
    """Files of rows, in the order of the processes that wrote them."""
    places = [folder / pattern.format(kind) for pattern in _SHARDS]
    place = next((one for one in places if one.is_dir()), None)
    if place is None:
        inside = sorted(one.parent.name for pattern in _SHARDS for one in folder.glob(f"*/{pattern.format(kind)}"))
        more = f"; the folder {inside[0]} in it has one" if inside else " (bergson hessian --method kfac writes it)"
        raise InputError(f"{folder} has no folder {places[0].name}{more}")
    count = len(list(place.glob("shard_*.safetensors")))
    files = [place / f"shard_{rank}.safetensors" for rank in range(max(1, count))]
    for file in files:
        if not file.is_file():
            raise InputError(f"{place} holds {count} shards, and {file.name} is not among them: rows are missing")
    return files


def _joined(files: list[Path]) -> dict[str, Tensor]:
    shards = [_tensors(file) for file in files]
    names = shards[0].keys()
    if any(one.keys() != names for one in shards):
        raise InputError(f"the shards in {files[0].parent} are of different modules: they are of different runs")
    return {name: torch.cat([one[name] for one in shards]) for name in names}


def _bergson_count(file: Path) -> int:
    if not file.is_file():
        raise InputError(f"there is no {file.name} in {file.parent}, so it is not known how many tokens were summed")
    try:
        with zipfile.ZipFile(file) as archive:
            numbers = [name for name in archive.namelist() if name.split("/")[1:2] == ["data"]]
            content = archive.read(numbers[0]) if len(numbers) == 1 else b""
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{file} is torn ({error})") from error
    if len(content) != _INT64_BYTES:
        raise InputError(f"{file} does not hold one whole number of 64 bits, as bergson writes it")
    return int.from_bytes(content, "little", signed=True)
