"""A task that a tiny Llama learns in seconds: a sparse Markov chain."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

VOCAB = 64
SUCCESSORS = 4  # entropy floor ln 4 = 1.39 nats; uniform is ln 64 = 4.16
LENGTH = 32


class Chains(Dataset):
    """Rows of one fixed chain: token t is followed by one of `SUCCESSORS` tokens, uniformly."""

    def __init__(self, rows: int, seed: int) -> None:
        successors = torch.randint(0, VOCAB, (VOCAB, SUCCESSORS), generator=torch.Generator().manual_seed(7))
        draw = torch.Generator().manual_seed(seed)
        tokens = [torch.randint(0, VOCAB, (rows,), generator=draw)]
        for _ in range(LENGTH - 1):
            choice = torch.randint(0, SUCCESSORS, (rows,), generator=draw)
            tokens.append(successors[tokens[-1], choice])
        self.ids = torch.stack(tokens, dim=1)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def tiny_llama(*, dropout: float = 0.0, seed: int = 0) -> LlamaForCausalLM:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_dropout=dropout, pad_token_id=None,
        bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)
