"""What the Python blocks of each documentation page take for granted, made small: models, data, loops, files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from architectures import build
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from weightproof import GuardCallback, GuardSession, attach
from weightproof.snapshot import Snapshot
from weightproof_callbacks.training_state import ReplayableLoader

Names = dict[str, Any]


def windows(count: int = 4, length: int = 16) -> list[dict[str, torch.Tensor]]:
    """Rows of tokens for `retain=`."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(60, (1, length), generator=generator)} for _ in range(count)]


def rows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    """Examples for a Trainer or a DataLoader."""
    return [{"input_ids": one["input_ids"][0], "labels": one["input_ids"][0]} for one in windows(count)]


def plain(folder: Path) -> Names:
    """A model, and data of every name that pages use."""
    return {"model": build("llama"), "windows": windows(), "batches": windows(8), "data": rows()}


def with_session(folder: Path) -> Names:
    """As `plain`, with the session's class."""
    return {**plain(folder), "GuardSession": GuardSession}


def with_model_folder(folder: Path) -> Names:
    """A model saved as path/to/model, a certificate of it, a Trainer, and a loop under accelerate."""
    model = build("llama")
    model.save_pretrained(folder / "path" / "to" / "model")  # pyright: ignore[reportCallIssue]
    session = GuardSession(model)
    session.certificate().save(folder / "certificate.json")
    session.close()
    adapters = steering(folder)  # the README steers too
    return {**adapters, "trainer": with_trainer(folder)["trainer"], "eval_dataset": windows(), **with_loop(folder)}


def with_trainer(folder: Path) -> Names:
    """A Trainer of a few steps and its parts."""
    model = build("llama")
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows())  # pyright: ignore[reportArgumentType]
    names = {"model": model, "args": arguments, "trainer": trainer, "Trainer": Trainer, "GuardCallback": GuardCallback}
    return {**names, "data": rows(), "train": rows(), "eval_dataset": windows()}


def with_loop(folder: Path) -> Names:
    """A model, optimizer and loader as a loop under accelerate has them before `prepare`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(rows(), batch_size=2)  # pyright: ignore[reportArgumentType]
    return {"accelerator": Accelerator(cpu=True), "model": model, "optimizer": optimizer, "data": loader}


def rolling(folder: Path) -> Names:
    """What `GuardCallback(...)` and `attach(...)` are called with."""
    names = with_loop(folder)
    names["model"], names["optimizer"], names["data"] = names["accelerator"].prepare(
        names["model"], names["optimizer"], names["data"]
    )
    loader = ReplayableLoader(names["data"])
    return {**names, "GuardCallback": GuardCallback, "attach": attach, "data": loader, "loader": loader}


def adapters(folder: Path) -> Names:
    """A PEFT model whose adapter was saved as path/to/adapter."""
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(build("llama")), config)
    adapted.save_pretrained(folder / "path" / "to" / "adapter")
    return {"model": adapted}


def deltas(folder: Path) -> Names:
    """A base and an adapter of it as folders."""
    model = build("llama")
    model.save_pretrained(folder / "base")  # pyright: ignore[reportCallIssue]
    config = peft.LoraConfig(r=2, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder / "shout")  # pyright: ignore[reportArgumentType]
    return {}


def steering(folder: Path) -> Names:
    """A base, two adapters of it as folders, and something to read of a steered model."""
    model = build("llama")
    for seed, name in enumerate(("formal-adapter", "casual-adapter")):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
        adapted: Any = peft.get_peft_model(copy.deepcopy(model), config)  # pyright: ignore[reportArgumentType]
        adapted.save_pretrained(folder / name)
    return {**plain(folder), "model": model, "evaluate": lambda model: 0.0}


def losses(folder: Path) -> Names:
    """A text file, something that encodes it, and a metric."""
    (folder / "wiki.txt").write_text("\n".join(f"line {number} of some text" for number in range(4000)))

    class Tokenizer:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) % 60 for letter in text]

    def exact_match(outputs: Any, batch: Mapping[str, Any]) -> list[float]:
        return [1.0] * len(batch["input_ids"])

    names = {"tokenizer": Tokenizer(), "examples": windows(120), "exact_match": exact_match}
    return {**with_session(folder), **names}


def planning(folder: Path) -> Names:
    """Enough windows for the loss to decide on a budget."""
    return {**plain(folder), "windows": windows(130, 48)}


def snapshots(folder: Path) -> Names:
    """What is saved."""
    return {"step": 1, "tensors": {"weight": torch.ones(3)}, "values": {"lr": 1e-3}}


def training_state(folder: Path) -> Names:
    """Everything that a training state holds."""
    names = with_loop(folder)
    names["model"], names["optimizer"], names["data"] = names["accelerator"].prepare(
        names["model"], names["optimizer"], names["data"]
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(names["optimizer"].optimizer)
    ema = torch.optim.swa_utils.AveragedModel(names["model"])
    return {
        **names,
        "scheduler": scheduler,
        "ema": ema,
        "snapshot": Snapshot.capture(names["model"]),
    }


def faults(folder: Path) -> Names:
    """A model and its optimizer."""
    names = with_loop(folder)
    return {"model": names["model"], "optimizer": names["optimizer"]}


def health(folder: Path) -> Names:
    """A Trainer, held-out windows, and a network of blocks with the answers that it and its baseline gave."""
    net = torch.nn.Module()
    net.embed, net.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)
    net.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))
    batches = [{"x": torch.randn(16, 8), "y": torch.randint(4, (16,))} for _ in range(8)]
    answers = {"right": [1.0] * 30, "right_with_frozen_blocks": [1.0, 0.0] * 15}
    return {**with_trainer(folder), "held_out": windows(32), "net": net, "F": functional, "batches": batches, **answers}


# Pages whose blocks do not go on from one another.
APART = {"README.md"}

SETTINGS: Mapping[str, Callable[[Path], Names]] = {
    "README.md": with_model_folder,
    "accelerate.md": with_loop,
    "adapters.md": adapters,
    "deltas.md": deltas,
    "faults.md": faults,
    "health.md": health,
    "loss.md": losses,
    "planner.md": planning,
    "recipes.md": with_trainer,
    "report.md": with_model_folder,
    "rolling.md": rolling,
    "snapshots.md": snapshots,
    "steering.md": steering,
    "trainer.md": with_trainer,
    "training-state.md": training_state,
}
