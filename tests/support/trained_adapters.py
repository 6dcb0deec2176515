"""LoRA adapters that PEFT trained for a few seconds on the small trained models, for tests of merging.

The task is another Markov chain than the base model's, so that an adapter has something to learn. Trained once on one
thread, saved by PEFT, and cached beside the models as `<name>-adapter-<digest of the recipe>`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import trained_models
from filelock import FileLock
from torch import nn
from trained_models import CACHE, RECIPES, make_windows, nll

STEPS, LEARNING_RATE = 120, 5e-3
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def configuration(name: str, **options: Any) -> peft.LoraConfig:
    """A LoRA configuration for one architecture."""
    settings = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS[name], "fan_in_fan_out": name == "gpt2"}
    return peft.LoraConfig(**(settings | options))


def adapted(model: nn.Module, config: peft.LoraConfig, seed: int = 0) -> Any:
    """The model with fresh adapter layers, made from a seed."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about layers that are tied or turned
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


def other_windows(name: str, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Windows of the chain run backwards: the same symbols, another law."""
    return [
        {key: value.flip(1) for key, value in window.items()} for window in make_windows(RECIPES[name], count, seed)
    ]


def mean_loss(name: str, model: nn.Module) -> float:
    """Mean loss on held-out windows of the adapter's task, nats per token."""
    with torch.no_grad():
        windows = other_windows(name, 4, seed=60_000)
        return sum(nll(name, model, window).item() for window in windows) / len(windows)


def _train(name: str, folder: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = adapted(trained_models.load(name).model, configuration(name)).train()
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=LEARNING_RATE)
        for window in other_windows(name, STEPS, seed=50_000):
            nll(name, model, window).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval().save_pretrained(folder)
    finally:
        torch.set_num_threads(threads)


def adapter_folder(name: str) -> Path:
    """The folder of the trained adapter of one architecture, training it first where the cache has none."""
    recipe = [RECIPES[name].digest, STEPS, LEARNING_RATE, TARGETS[name], peft.__version__]
    folder = CACHE / f"{name}-adapter-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]}"
    trained_models.load(name)
    with FileLock(CACHE / f"{folder.name}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
                _train(name, Path(temporary) / "adapter")
                (Path(temporary) / "adapter").rename(folder)
    return folder


def load_adapted(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A fresh base model with the trained adapter in it, unmerged, in eval mode."""
    base: Any = trained_models.load(name).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, str(adapter_folder(name))).to(dtype).eval()
