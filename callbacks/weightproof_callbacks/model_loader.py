"""Load a local model folder with transformers: safetensors only, no remote code, no network.

The folder is untrusted. Its config.json may name a class of transformers, nothing else; what would fetch or run
something (an adapter that names another model, attention kernels of the Hub, code files) is refused or overridden.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from weightproof.errors import InputError
from weightproof.folders.checkpoint_files import read_config, read_headers, require_regular
from weightproof.folders.loading import LoadedModel

# What a damaged or foreign folder makes transformers, tokenizers and torch raise.
_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, IndexError)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_CAUSAL = ("ForCausalLM", "LMHeadModel")


def load_model(folder: Path, *, device: str = "cpu") -> LoadedModel:
    """The model of a local folder in eval mode, in the dtype of its files, with its tokenizer where it has one.

    Args:
        folder: A folder written by `save_pretrained`.
        device: Where the model is put.

    Raises:
        InputError: If the folder is unsafe, names a class that transformers does not have, lacks weights that the
            class needs, or holds a tokenizer that cannot be read.
    """
    folder = Path(folder)
    config = read_config(folder)
    read_headers(folder)  # refuses pickles, torn files and links that lead out
    _require_plain(folder, config)
    model_class = _model_class(folder, config)
    with quiet():
        model, unloaded = _load_weights(folder, model_class)
        encode, digest = _read_tokenizer(folder, model_class.__name__)
    return LoadedModel(_placed(model, device), encode, digest, unloaded)


def _placed(model: torch.nn.Module, device: str) -> torch.nn.Module:
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"the model cannot be put on {device!r}: {_brief(error)}") from error


def _require_plain(folder: Path, config: dict[str, Any]) -> None:
    for name in ("adapter_config.json", "generation_config.json", *TOKENIZER_FILES):
        require_regular(folder, folder / name)
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder} holds a PEFT adapter beside its weights, which names a base model of its own: merge it and save "
            "the merged model (merge_and_unload)"
        )
    if "quantization_config" in config:
        raise InputError(
            f"{folder} is stored quantised ({_method(config['quantization_config'])}): dequantise it and save it again"
        )


def _method(found: Any) -> str:
    return str(found.get("quant_method", "unknown method"))[:60] if isinstance(found, dict) else "unknown method"


def _model_class(folder: Path, config: dict[str, Any]) -> Any:
    import transformers

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name is None:
        raise InputError(f"{folder / 'config.json'} names no architecture: save the model with save_pretrained")
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        code = ", and code in a model folder is never run" if "auto_map" in config else ""
        raise InputError(
            f"{folder} is a {name[:80]}, a class that transformers {transformers.__version__} does not have{code}: "
            "only its weights can be compared (--weights-only)"
        )
    return found


def _load_weights(folder: Path, model_class: Any) -> tuple[torch.nn.Module, tuple[str, ...]]:
    try:
        model, info = model_class.from_pretrained(
            folder,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="eager",  # config.json could name a kernel to be fetched from the Hub
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    except _ERRORS as error:
        raise InputError(f"{folder} cannot be loaded as {model_class.__name__}: {_brief(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{folder} lacks {missing[0]}{_more(missing)}, which {model_class.__name__} needs: loading would fill it "
            "with random values; save the whole model again"
        )
    if mismatched := sorted(str(item[0]) for item in info["mismatched_keys"]):
        raise InputError(f"{folder} stores {mismatched[0]}{_more(mismatched)} in another shape than config.json says")
    return model, tuple(sorted(info["unexpected_keys"]))


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more tensors" if len(names) > 1 else ""


# ---------------------------------------------------------------- tokenizer


Encode = Callable[[str], list[int]]


def load_tokenizer(folder: Path) -> tuple[Encode | None, str | None]:
    """The tokenizer of a local folder alone: text -> token ids, and its digest; both None where there is none.

    Raises:
        InputError: If the folder is unsafe or its tokenizer cannot be read.
    """
    folder = Path(folder)
    config = read_config(folder)
    _require_plain(folder, config)
    names = config.get("architectures")
    with quiet():
        return _read_tokenizer(folder, str(names[0]) if isinstance(names, list) and names else "")


def _read_tokenizer(folder: Path, architecture: str) -> tuple[Encode | None, str | None]:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None, None
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except _ERRORS as error:
        raise InputError(f"the tokenizer in {folder} cannot be loaded: {_brief(error)}") from error
    marked = not architecture.endswith(_CAUSAL)  # an encoder was trained with its marks around a text

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=marked, verbose=False)["input_ids"])

    return encode, tokenizer_digest(tokenizer)


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over what a tokenizer does: its whole pipeline where it has one, else its class and vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        pipeline = json.loads(backend.to_str())
        pipeline |= {"truncation": None, "padding": None}  # set by the last call, not part of what it is
    else:
        pipeline = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    content = {"pipeline": pipeline, "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- words


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice of transformers inside: certify has its own."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no reason given'}"
