"""Fetch a Hub model: safetensors, configuration and tokenizer, nothing that can execute."""

from __future__ import annotations

from pathlib import Path

from weightproof.errors import InputError

PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def resolve_model_folder(model_id: str) -> Path:
    """Local folder of a Hub model's weights, downloaded into the usual Hugging Face cache.

    Args:
        model_id: `owner/name`, or a bare name.

    Raises:
        InputError: If the model cannot be fetched, or offers no safetensors.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model_id, allow_patterns=list(PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        cause = " ".join(str(error).split()).split(". ")[0].split(" An error happened")[0][:160] or type(error).__name__
        raise InputError(
            f"{model_id} is no local folder and could not be fetched from the Hub: check the name and the network "
            f"({cause})"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"the Hub model {model_id} offers no safetensors; pickle checkpoints are refused: load it where you "
            "trust it and save it with save_pretrained, which writes safetensors"
        )
    return folder
