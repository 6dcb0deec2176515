"""The nine architectures of the table tests, tiny and randomly initialised from configuration.

`build("llama")` returns a model in eval mode; nothing is downloaded. Keyword overrides change the configuration
(for example `build("llama", tie_word_embeddings=True)`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCAB = 64
HIDDEN = 32
LAYERS = 2

_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# name -> (model class, config class, settings)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64,
            "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_DECODER, "head_dim": 8}),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        {
            "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS,
            "num_attention_heads": 4, "max_position_embeddings": 64,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS,
            "num_decoder_layers": LAYERS, "num_heads": 4, "decoder_start_token_id": 0,
        },
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
            "image_size": 16, "patch_size": 4, "num_channels": 3, "num_labels": 5,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": VOCAB, "d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
            "suppress_tokens": None, "begin_suppress_tokens": None,
        },
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCAB, "hidden_size": HIDDEN, "state_size": 4, "num_hidden_layers": LAYERS, "time_step_rank": 4},
    ),
}  # fmt: skip


def build(name: str, *, seed: int = 0, **overrides: Any) -> nn.Module:
    """A tiny randomly initialised model of one of the nine architectures, in eval mode."""
    import transformers

    model_class, config_class, settings = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**{**settings, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, model_class)(config).eval()


def example_inputs(name: str, *, batch: int = 2, length: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Seeded inputs on which `build(name)` can be called."""
    generator = torch.Generator().manual_seed(seed)

    def ids() -> torch.Tensor:
        return torch.randint(3, VOCAB, (batch, length), generator=generator)

    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    if name == "whisper":
        return {"input_features": torch.randn(batch, 16, 64, generator=generator), "decoder_input_ids": ids()}
    if name == "t5":
        return {"input_ids": ids(), "decoder_input_ids": ids()}
    return {"input_ids": ids()}
