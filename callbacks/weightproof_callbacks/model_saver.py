"""Write a model folder with transformers: safetensors, configuration, and the tokenizer of the model it came from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from weightproof.errors import InputError
from weightproof.folders.checkpoint_files import require_regular
from weightproof_callbacks.model_loader import TOKENIZER_FILES, quiet

# Beside the tokenizer's own files; what else lies in a folder is nobody's business here.
_COPIED = (*TOKENIZER_FILES, "chat_template.jinja", "preprocessor_config.json")


def save_model(model: Any, folder: Path, source: Path) -> None:
    """Write a model that was loaded from `source` into a new folder.

    Args:
        model: A transformers model.
        folder: Is made.
        source: Its tokenizer files are copied as they are.

    Raises:
        InputError: If the model has no `save_pretrained`, or its weights cannot be stored as safetensors.
    """
    if not callable(getattr(model, "save_pretrained", None)):
        raise InputError(f"a {type(model).__name__} has no save_pretrained: its folder cannot be written")
    folder.mkdir(parents=True)
    try:
        with quiet():
            model.save_pretrained(folder, safe_serialization=True)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(
            f"the model cannot be written as safetensors: {line}; say save: false for this step"
        ) from error
    for name in _COPIED:
        require_regular(source, source / name)
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)
