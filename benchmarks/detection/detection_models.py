"""Six small language models of real text, trained from a configuration and cached: what the edits are made on.

Bytes of the Python standard library's own sources, split by file: one part trains, one is given to the guard as
`retain`, one no guard sees and is the truth. Three architectures and two seeds; a minute or two each on one core.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

from weightproof_callbacks.commands.corpus import read_corpus, standard_library

CACHE = Path(__file__).parents[2] / ".cache" / "detection"
ARCHITECTURES = ("llama", "gpt2", "bert")
HIDDEN, HEADS, LAYERS, LENGTH = 96, 4, 4, 64
MASK, VOCAB, IGNORED = 256, 264, -100
MASKED_SHARE = 0.15
BATCH = 32
CORPUS_BYTES, HELDOUT_SHARE, NOT_TEXT = 6_000_000, 0.3, ("test", "tests", "idle_test", "lib2to3", "site-packages")
RETAIN_WINDOWS, TRUTH_WINDOWS = 160, 384

CLASSES: dict[str, Any] = {
    "llama": transformers.LlamaForCausalLM,
    "gpt2": transformers.GPT2LMHeadModel,
    "bert": transformers.BertForMaskedLM,
}


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes a model; its digest names the cache folder."""

    architecture: str
    seed: int
    steps: int = 900
    learning_rate: float = 2e-3
    version: int = 1

    @property
    def name(self) -> str:
        """Architecture and seed, as tables show it."""
        return f"{self.architecture}-{self.seed}"

    @property
    def folder(self) -> Path:
        """Where the trained model is kept."""
        shape = (HIDDEN, HEADS, LAYERS, LENGTH, VOCAB, CORPUS_BYTES, torch.__version__, transformers.__version__)
        text = json.dumps([asdict(self), *shape], sort_keys=True)
        return CACHE / f"{self.name}-{sha256(text.encode()).hexdigest()[:12]}"


class Trained(NamedTuple):
    """A model in eval mode, with what it was made of."""

    recipe: Recipe
    model: nn.Module
    stale: dict[str, torch.Tensor]  # the weights at two thirds of the training
    finetuned: dict[str, torch.Tensor]  # the weights after a few more steps on other files
    retain: list[dict[str, torch.Tensor]]
    truth: list[dict[str, torch.Tensor]]
    documents: tuple[int, ...]  # file of each truth window
    attack: dict[str, torch.Tensor]  # windows of training files, for edits that climb the loss


def windows_of(texts: dict[str, str], count: int, seed: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """`count` windows of bytes, as many of one file as of another, and the number of the file of each."""
    generator = torch.Generator().manual_seed(seed)
    long = [text.encode() for text in texts.values() if len(text) > 8 * LENGTH]
    found, documents = [], []
    for index in range(count):
        number = index * len(long) // count
        data = long[number]
        start = int(torch.randint(len(data) - LENGTH, (1,), generator=generator))
        found.append(torch.tensor(list(data[start : start + LENGTH]), dtype=torch.long))
        documents.append(number)
    return torch.stack(found), tuple(documents)


def as_inputs(architecture: str, ids: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """A batch with labels as Hugging Face models take them."""
    if architecture != "bert":
        return {"input_ids": ids, "labels": ids}
    hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < MASKED_SHARE
    return {"input_ids": ids.masked_fill(hidden, MASK), "labels": ids.masked_fill(~hidden, IGNORED)}


def token_losses(model: nn.Module, batch: dict[str, torch.Tensor], architecture: str) -> torch.Tensor:
    """Negative log-likelihood of every token, nats, zero where none is predicted: (rows, tokens), float32."""
    logits, labels = model(input_ids=batch["input_ids"]).logits.float(), batch["labels"]
    if architecture != "bert":
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return flat.reshape(labels.shape)


def num_scored(batch: dict[str, torch.Tensor], architecture: str) -> torch.Tensor:
    """Predicted tokens of each row."""
    labels = batch["labels"] if architecture == "bert" else batch["labels"][:, 1:]
    return (labels != IGNORED).sum(dim=1)


def untrained(recipe: Recipe) -> nn.Module:
    """The model as its configuration and seed make it."""
    shared: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "use_cache": False}
    config = {
        "llama": lambda: transformers.LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2, max_position_embeddings=LENGTH, tie_word_embeddings=False, **shared,
        ),
        "gpt2": lambda: transformers.GPT2Config(
            n_positions=LENGTH, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, **shared,
        ),
        "bert": lambda: transformers.BertConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            intermediate_size=4 * HIDDEN, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, initializer_range=0.06, pad_token_id=257,
        ),
    }[recipe.architecture]()  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return CLASSES[recipe.architecture](config).eval()


def _batches(recipe: Recipe, texts: Sequence[str], steps: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    data = torch.tensor(list("".join(texts).encode()), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator)
        ids = torch.stack([data[start : start + LENGTH] for start in starts.tolist()]).long()
        yield as_inputs(recipe.architecture, ids, seed * 100_003 + step)


def fit(  # noqa: PLR0913, PLR0917 - a training run in one line
    recipe: Recipe, model: nn.Module, texts: Sequence[str], steps: int, rate: float, seed: int
) -> Iterator[int]:
    """Train, and yield the number of each step that was made."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    model.train()
    for step, batch in enumerate(_batches(recipe, texts, steps, seed)):
        optimizer.param_groups[0]["lr"] = (
            rate * min(1.0, (step + 1) / 50) * 0.5 * (1.05 + math.cos(math.pi * step / steps))
        )
        loss = token_losses(model, batch, recipe.architecture).sum() / num_scored(batch, recipe.architecture).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1
    model.eval()


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def _train_into(recipe: Recipe, train: Sequence[str]) -> None:
    """Train once; renamed last, so that an interrupted run leaves no half model."""
    half = len(train) * 9 // 10
    model = untrained(recipe)
    stale: dict[str, torch.Tensor] = {}
    for step in fit(recipe, model, train[:half], recipe.steps, recipe.learning_rate, 1000 + recipe.seed):
        if step == recipe.steps * 2 // 3:
            stale = _copy(model)
    partial = recipe.folder.with_name(recipe.folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)  # pyright: ignore[reportCallIssue]
    for _ in fit(recipe, model, train[half:], 60, recipe.learning_rate / 5, 2000 + recipe.seed):
        pass
    torch.save({"stale": stale, "finetuned": _copy(model)}, partial / "others.pt")
    partial.rename(recipe.folder)


def load(recipe: Recipe) -> Trained:
    """One trained model with its windows, trained first where the cache has none."""
    corpus = read_corpus(standard_library(), NOT_TEXT, CORPUS_BYTES, HELDOUT_SHARE)
    train = list(corpus.train.values())
    heldout = list(corpus.heldout.items())
    CACHE.mkdir(parents=True, exist_ok=True)
    if not recipe.folder.exists():
        _train_into(recipe, train)
    model = CLASSES[recipe.architecture].from_pretrained(recipe.folder).eval()
    others = torch.load(recipe.folder / "others.pt", weights_only=True)
    middle = len(heldout) // 3
    seen, _ = windows_of(corpus.train, BATCH, 33)
    # Of BERT 15 % of the tokens are scored: more windows for as many of them.
    given, _ = windows_of(dict(heldout[:middle]), RETAIN_WINDOWS * (3 if recipe.architecture == "bert" else 1), 31)
    unseen, documents = windows_of(dict(heldout[middle:]), TRUTH_WINDOWS, 32)
    return Trained(
        recipe,
        model,
        others["stale"],
        others["finetuned"],
        [as_inputs(recipe.architecture, row[None], 7_000 + i) for i, row in enumerate(given)],
        [as_inputs(recipe.architecture, part, 8_000 + i) for i, part in enumerate(unseen.split(BATCH))],
        documents,
        as_inputs(recipe.architecture, seen, 9_000),
    )
