"""Models and tokenizers from folders, through the loader plug-in: the library itself knows no model class."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weightproof.errors import InputError
from weightproof.registry import load_plugin

if TYPE_CHECKING:
    from torch import nn

LOADERS = "weightproof.loaders"
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class LoadedModel:
    """A model folder in memory.

    Attributes:
        model: In eval mode, in the dtype of its files.
        encode: Text -> token ids; None where the folder holds no tokenizer.
        tokenizer_digest: SHA-256 over what the tokenizer does (vocabulary, merges, normalisation); None without one.
        unloaded: Tensors of the files that the model class has no place for.
    """

    model: nn.Module
    encode: Callable[[str], list[int]] | None
    tokenizer_digest: str | None
    unloaded: tuple[str, ...] = ()


def load_model(folder: Path, *, device: str = "cpu", loader: str = "transformers") -> LoadedModel:
    """Load a local model folder with the registered loader; safetensors only, no code of the folder is run.

    Args:
        folder: Model folder.
        device: Where the model is put, as torch names it.
        loader: Name of the loader plug-in.

    Raises:
        InputError: If no loader of that name is installed, or the folder cannot be loaded.
    """
    return load_plugin(LOADERS, loader)(folder, device=device)


@dataclass(frozen=True)
class DemoModel:
    """The small demo model on disk.

    Attributes:
        folder: The model, with its tokenizer.
        retain: Text that it was not trained on.
        train: Text that it was trained on.
    """

    folder: Path
    retain: Path
    train: Path


def resolve_folder(model: str) -> Path:
    """The local folder `model` names; a Hub id is fetched by the loader plug-in, a folder never is.

    Raises:
        InputError: If it is a file, a path that does not exist, or an id that cannot be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{model} is a file: name the folder that holds the model's config.json and safetensors")
    if not HUB_ID.fullmatch(model):
        raise InputError(f"there is no folder {model}: check the path (a Hub id looks like owner/name)")
    return load_plugin(LOADERS, "hub")(model)
