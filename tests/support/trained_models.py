"""Four small models, briefly trained, for tests that need a model with something to lose.

The task is an order-2 Markov chain drawn from a seed: next-token prediction (GPT-2, Llama), masked
prediction (BERT), restoring a sequence from a masked copy (T5). Trained once with plain AdamW on one
thread and cached under `.cache/test-models/<name>-<digest of the recipe>`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from filelock import FileLock
from torch import nn
from torch.nn.functional import cross_entropy

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "test-models"
NAMES = ("gpt2", "llama", "bert", "t5")
NUM_SYMBOLS = 32
START_TOKEN, MASK_TOKEN, VOCAB_SIZE = 32, 33, 40
HIDDEN, HEADS, LAYERS = 64, 4, 3
IGNORED = -100

Window = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes a trained model; its digest names the cache folder."""

    name: str
    steps: int
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    batch_size: int = 32
    length: int = 32
    mask_fraction: float = 0.0
    seed: int = 0
    version: int = 2

    @property
    def digest(self) -> str:
        shape = (NUM_SYMBOLS, VOCAB_SIZE, HIDDEN, HEADS, LAYERS, torch.__version__, transformers.__version__)
        text = json.dumps([asdict(self), *shape], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


RECIPES = {
    "gpt2": Recipe("gpt2", steps=600),
    "llama": Recipe("llama", steps=500),
    "bert": Recipe("bert", steps=1000, learning_rate=1e-3, batch_size=64, length=16, mask_fraction=0.2),
    "t5": Recipe("t5", steps=700, length=16, mask_fraction=0.1),
}

MODEL_CLASSES: dict[str, Any] = {
    "gpt2": transformers.GPT2LMHeadModel,
    "llama": transformers.LlamaForCausalLM,
    "bert": transformers.BertForMaskedLM,
    "t5": transformers.T5ForConditionalGeneration,
}


class Trained(NamedTuple):
    """A trained model in eval mode, held-out windows, and `loss(model)`: mean NLL on them, nats per token."""

    model: nn.Module
    heldout: list[Window]
    loss: Callable[[nn.Module], float]


# ---- models ---------------------------------------------------------------------------------------------------------


def untrained(name: str, seed: int = 0) -> nn.Module:
    """Return the randomly initialised model of one architecture, in eval mode."""
    config = {"gpt2": _gpt2, "llama": _llama, "bert": _bert, "t5": _t5}[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODEL_CLASSES[name](config).eval()


def _gpt2() -> transformers.PreTrainedConfig:
    return transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=128, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=START_TOKEN, eos_token_id=START_TOKEN,
    )  # fmt: skip


def _llama() -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS // 2, max_position_embeddings=128, use_cache=False,
        tie_word_embeddings=False, bos_token_id=START_TOKEN, eos_token_id=START_TOKEN, pad_token_id=None,
    )  # fmt: skip


def _bert() -> transformers.PreTrainedConfig:
    return transformers.BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN, max_position_embeddings=128, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=START_TOKEN, initializer_range=0.1,  # 0.02 stays on a plateau
    )  # fmt: skip


def _t5() -> transformers.PreTrainedConfig:
    options: dict[str, Any] = {"tie_word_embeddings": True, "decoder_start_token_id": START_TOKEN}
    return transformers.T5Config(
        vocab_size=VOCAB_SIZE, d_model=HIDDEN, d_kv=HIDDEN // HEADS, d_ff=4 * HIDDEN, num_layers=LAYERS,
        num_decoder_layers=LAYERS, num_heads=HEADS, dropout_rate=0.0, feed_forward_proj="relu", use_cache=False,
        pad_token_id=START_TOKEN, eos_token_id=START_TOKEN, relative_attention_num_buckets=16,
        relative_attention_max_distance=32, **options,
    )  # fmt: skip


# ---- data -----------------------------------------------------------------------------------------------------------


@functools.cache
def transition_table(seed: int = 0) -> torch.Tensor:
    """Return P[a, b, next], the chain's law: peaked rows on a skewed alphabet, (symbols, symbols, symbols)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    popularity = torch.arange(1, NUM_SYMBOLS + 1, dtype=torch.float64) ** -0.7
    scores = 2.0 * torch.randn((NUM_SYMBOLS,) * 3, generator=generator, dtype=torch.float64)
    scores += 1.5 * torch.randn((NUM_SYMBOLS, 1, NUM_SYMBOLS), generator=generator, dtype=torch.float64)
    scores += 1.5 * torch.randn((1, NUM_SYMBOLS, NUM_SYMBOLS), generator=generator, dtype=torch.float64)
    return torch.softmax(scores + popularity.log(), dim=-1)


def chain_samples(count: int, length: int, seed: int) -> torch.Tensor:
    """Return `count` sequences of the chain, (count, length) int64."""
    generator = torch.Generator().manual_seed(seed)
    table = transition_table()
    tokens = torch.randint(NUM_SYMBOLS, (count, length + 8), generator=generator)
    for t in range(2, length + 8):
        law = table[tokens[:, t - 2], tokens[:, t - 1]]
        tokens[:, t] = torch.multinomial(law, 1, generator=generator)[:, 0]
    return tokens[:, 8:]


def make_windows(recipe: Recipe, count: int, seed: int) -> list[Window]:
    """Return `count` batches for the recipe's task; `labels` follow the Hugging Face convention."""
    tokens = chain_samples(count * recipe.batch_size, recipe.length, seed)
    inputs, labels = tokens, tokens
    if recipe.name in {"bert", "t5"}:
        generator = torch.Generator().manual_seed(seed + 1)
        hidden = torch.rand(tokens.shape, generator=generator) < recipe.mask_fraction
        inputs = tokens.masked_fill(hidden, MASK_TOKEN)
        labels = tokens.masked_fill(~hidden, IGNORED) if recipe.name == "bert" else tokens
    size = recipe.batch_size
    return [
        {"input_ids": inputs[i : i + size].clone(), "labels": labels[i : i + size].clone()}
        for i in range(0, count * size, size)
    ]


def calibration_windows(name: str, count: int = 2) -> list[Window]:
    """Return windows of the task's own data, disjoint from training and held-out ones: for `retain=`."""
    return make_windows(RECIPES[name], count, seed=30_000)


# ---- loss -----------------------------------------------------------------------------------------------------------


def nll(name: str, model: nn.Module, window: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean negative log-likelihood of one window, nats per predicted token."""
    logits, labels = model(**window).logits.float(), window["labels"]
    if name in {"gpt2", "llama"}:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED)


def _heldout_loss(name: str, windows: list[Window], model: nn.Module) -> float:
    with torch.no_grad():
        return sum(nll(name, model, window).item() for window in windows) / len(windows)


def unigram_entropy() -> float:
    """Return the entropy of the chain's stationary symbol frequencies, nats: the best context-free loss."""
    counts = torch.bincount(chain_samples(2000, 32, seed=40_000).reshape(-1), minlength=NUM_SYMBOLS).double()
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * frequencies.log()).sum())


# ---- training and cache ---------------------------------------------------------------------------------------------


def train(recipe: Recipe) -> nn.Module:
    """Train one model from scratch on one thread, deterministically, and return it in eval mode."""
    model = untrained(recipe.name, recipe.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    for step, window in enumerate(make_windows(recipe, recipe.steps, seed=10_000 + recipe.seed)):
        rate = min(1.0, (step + 1) / 40) * 0.5 * (1.05 + math.cos(math.pi * step / recipe.steps))
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * rate
        loss = nll(recipe.name, model, window)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _train_into_cache(recipe: Recipe, folder: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = train(recipe)
    finally:
        torch.set_num_threads(threads)
    assert isinstance(model, transformers.PreTrainedModel)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:  # renamed last: a killed run leaves no half model
        model.save_pretrained(Path(temporary) / "model")
        (Path(temporary) / "model").rename(folder)


def load(name: str) -> Trained:
    """Return a fresh copy of one trained model, training it first where the cache has none."""
    recipe = RECIPES[name]
    folder = CACHE / f"{name}-{recipe.digest}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{folder.name}.lock"):  # one test worker trains, the others wait for it
        if not folder.exists():
            _train_into_cache(recipe, folder)
    model = MODEL_CLASSES[name].from_pretrained(folder).eval()
    heldout = make_windows(recipe, 8, seed=20_000)
    return Trained(model, heldout, functools.partial(_heldout_loss, name, heldout))
