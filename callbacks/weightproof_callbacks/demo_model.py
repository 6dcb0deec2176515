"""The small demo model as a folder: trained once, by the code of `weightproof demo`, and kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weightproof.errors import InputError
from weightproof.folders.files import reason_of
from weightproof.folders.loading import DemoModel

FOLDER, RETAIN, TRAIN = "demo", "retain.txt", "train.txt"
_TRAIN_BYTES = 2_000_000
# Three times the windows that the loss guard needs at least; more would only take longer.
_RETAIN_BYTES = 240_000
# Sections of the demo's recipe that shape the model and its texts.
_SECTIONS = ("corpus", "tokenizer", "model", "training", "heldout")


def demo_model(cache: Path, *, fast: bool = False, say: Callable[[str], None] = lambda _: None) -> DemoModel:
    """The demo model, from the cache or trained now (a minute or two; seconds with `fast`).

    Args:
        cache: Folder to keep it in.
        fast: A tiny one.
        say: Told before the training begins.

    Raises:
        InputError: If the cache cannot be written.
    """
    from weightproof_callbacks.commands.demo import load_recipe

    recipe = load_recipe("demo", fast=fast)
    place = Path(cache) / f"demo-model-{_digest(recipe)}"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.is_dir():
            _make(recipe, place, say)
    except OSError as error:
        raise InputError(f"the demo model cannot be kept in {cache}: {reason_of(error)}; see --cache") from error
    return DemoModel(place / FOLDER, place / RETAIN, place / TRAIN)


def _digest(recipe: Mapping[str, Any]) -> str:
    """Of everything that shapes the model: another recipe or torch is another model."""
    import torch
    import transformers

    shaping = {name: recipe[name] for name in _SECTIONS}
    content = {
        **shaping,
        "files": [FOLDER, RETAIN, TRAIN, _TRAIN_BYTES, _RETAIN_BYTES],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _make(recipe: Mapping[str, Any], place: Path, say: Callable[[str], None]) -> None:
    """Train into a scratch folder and rename it: two programs may come at the same time."""
    scratch = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        say("training the small demo model, once")
        _train(recipe, scratch)
        if not place.is_dir():
            scratch.rename(place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _train(recipe: Mapping[str, Any], folder: Path) -> None:
    from weightproof_callbacks.commands import corpus, small_model
    from weightproof_callbacks.model_loader import quiet

    part, sizes = recipe["corpus"], recipe["training"]
    texts = corpus.read_corpus(corpus.standard_library(), part["exclude"], part["max_bytes"], part["heldout_fraction"])
    train = list(texts.train.values())
    tokenizer = corpus.train_tokenizer(train, recipe["tokenizer"]["vocab_size"], sizes["window"])
    model = small_model.build_model(recipe["model"], vocab_size=len(tokenizer), window=sizes["window"], seed=0)
    windows = corpus.cut_windows(train, tokenizer, sizes["window"])
    trainer = small_model.make_trainer(model, windows, sizes, callbacks=[], output_dir=folder / "trainer", seed=0)
    trainer.remove_callback(small_model.LossBar)  # it says "under guard", which this training is not
    if sys.stderr.isatty():
        trainer.add_callback(small_model.LossBar("training the demo model"))
    trainer.train()
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    with quiet():
        model.eval().save_pretrained(folder / FOLDER)
    tokenizer.save_pretrained(folder / FOLDER)
    retain_bytes = min(_RETAIN_BYTES, recipe["heldout"]["text_bytes"])
    heldout = corpus.beginning(list(texts.heldout.values()), retain_bytes)
    (folder / RETAIN).write_text(heldout, encoding="utf-8")
    (folder / TRAIN).write_text(corpus.beginning(train, _TRAIN_BYTES), encoding="utf-8")
