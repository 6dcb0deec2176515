"""The two models of the speed benchmark, as folders: GPT-2 small and a Llama of 1 B parameters, seeded, in float32.

No pretrained weights: noise with planted directions, in turn few strong ones, many that decay, and power laws (as in
`speed.py`), so that spectra have spikes to count and a check has something to decide. Beside each base lies what an
int8 edit makes of it (one scale per row of the linear maps, embeddings left alone).
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("SPEED_FOLDER", ROOT / ".cache" / "speed"))  # 9 GB; speed_peers.py --folder
NOISE = 0.02
BASE, INT8 = "base", "int8"
BLOCK = "model.layers.0."
_VERSION = 1  # of what is written here


@dataclass(frozen=True)
class Shape:
    """A model by its configuration.

    Attributes:
        name: Shown, and the folder's.
        architecture: "gpt2" or "llama".
        sizes: Arguments of its configuration.
        blocks_alike: How many blocks one stands for where a slow row reads one; 1: every row reads all of it.
    """

    name: str
    architecture: str
    sizes: tuple[tuple[str, Any], ...]
    blocks_alike: int = 1

    @cached_property
    def folder(self) -> Path:
        """Where its folders are kept; other sizes lie elsewhere."""
        digest = hashlib.sha256(json.dumps([_VERSION, asdict(self)], sort_keys=True).encode()).hexdigest()
        return CACHE / f"{self.name}-{digest[:10]}"

    @property
    def config(self) -> Any:
        """The configuration of transformers."""
        from transformers import GPT2Config, LlamaConfig

        return {"gpt2": GPT2Config, "llama": LlamaConfig}[self.architecture](**dict(self.sizes))

    def empty(self) -> nn.Module:
        """The model of transformers without values, on the meta device."""
        from transformers import GPT2LMHeadModel, LlamaForCausalLM

        with torch.device("meta"):
            return {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}[self.architecture](self.config)


def _llama(name: str, *, width: int, inner: int, blocks: int, tokens: int) -> Shape:
    sizes = {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": tokens, "tie_word_embeddings": True, "max_position_embeddings": 2048,
    }  # fmt: skip
    return Shape(name, "llama", tuple(sizes.items()), blocks)


FULL = {
    "124m": Shape("124m", "gpt2", ()),
    "1b": _llama("1b", width=2048, inner=8192, blocks=16, tokens=32000),
}
SMOKE = {
    "124m": Shape(
        "smoke-124m",
        "gpt2",
        (("n_embd", 64), ("n_layer", 2), ("n_head", 4), ("vocab_size", 256), ("bos_token_id", 0), ("eos_token_id", 0)),
    ),
    "1b": _llama("smoke-1b", width=64, inner=128, blocks=2, tokens=256),
}


# ---------------------------------------------------------------- making


def planted(shape: tuple[int, ...], index: int) -> torch.Tensor:
    """Noise, with directions above it where it is a matrix; `index` seeds it and chooses the kind of spectrum."""
    from speed import spike_strengths  # the same kinds of spectra; importing it pins the threads

    generator = torch.Generator().manual_seed(20_261_121 + index)
    noise = torch.randn(shape, generator=generator).mul_(NOISE)
    if noise.ndim < 2:
        return noise
    strengths, spread = spike_strengths(index % 48)
    rank = min(len(strengths), *(size // 2 for size in shape))
    if spread:
        for axis, size in enumerate(shape):
            scale = torch.exp(spread * torch.randn(size, generator=generator))
            noise.mul_(scale[:, None] if axis == 0 else scale)
    edge = NOISE * (shape[0] ** 0.5 + shape[1] ** 0.5)
    left = torch.randn(shape[0], rank, generator=generator) * (edge / shape[0] ** 0.5)
    right = torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5
    return noise.addmm_(left * torch.from_numpy(strengths[:rank]).float(), right)


def rounded(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Int8 with one scale per output, for the linear maps; everything else as it is."""
    if tensor.ndim != 2 or not any(part in name for part in ("_proj", "c_attn", "c_fc")):
        return tensor
    inputs = 0 if "c_" in name else 1  # GPT-2 keeps (inputs, outputs)
    step = tensor.abs().amax(inputs, keepdim=True) / 127
    return (tensor / step).round_().mul_(step)


def _parts(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of one file each: a block, or everything outside of blocks."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in shape.empty().state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        number = next((word for word in name.split(".") if word.isdigit()), "")
        parts.setdefault(number, {})[name] = tuple(tensor.shape)
    yield from parts.values()


def make(shape: Shape) -> Path:
    """Write both folders unless they are there; an unfinished folder is made anew."""
    done = shape.folder / "done"
    if done.exists():
        return shape.folder
    from safetensors.torch import save_file

    shutil.rmtree(shape.folder, ignore_errors=True)
    index: dict[str, str] = {}
    count = 0
    for folder in (BASE, INT8):
        (shape.folder / folder).mkdir(parents=True)
        shape.config.save_pretrained(shape.folder / folder)
    for number, part in enumerate(_parts(shape)):
        tensors = {}
        for name, size in part.items():
            is_norm = len(size) == 1 and name.endswith("weight")
            tensors[name] = planted(size, count) + (1.0 if is_norm else 0.0)
            count += 1
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, shape.folder / BASE / file, metadata={"format": "pt"})
        edited = {name: rounded(name, tensor) for name, tensor in tensors.items()}
        save_file(edited, shape.folder / INT8 / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    for folder in (BASE, INT8):
        target = shape.folder / folder / "model.safetensors.index.json"
        target.write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")
    os.sync()  # or the first rows would wait for the disk
    done.touch()
    return shape.folder


# ---------------------------------------------------------------- loading


def load(shape: Shape, device: str = "cpu") -> nn.Module:
    """The base as transformers loads it, in memory of its own: no page of it is a file's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shape.folder / BASE, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, copy=True)
    gc.collect()
    return nn.Module.to(model, device).eval()  # buffers, too


def load_block(shape: Shape, device: str = "cpu") -> nn.Module:
    """The first block alone."""
    block: nn.Module = shape.empty().get_submodule(BLOCK.rstrip("."))
    values = {name.removeprefix(BLOCK): value.clone() for name, value in tensors(shape, BASE, BLOCK)}
    block.load_state_dict(values, assign=True)
    return block.to(device).eval()


def tensors(shape: Shape, folder: str, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a folder whose name begins so, one after the other."""
    from safetensors import safe_open

    for path in sorted((shape.folder / folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name.startswith(prefix):
                    yield name, file.get_tensor(name)


@torch.no_grad()
def put_int8(model: nn.Module, shape: Shape, prefix: str = "") -> None:
    """The edit, in place: every tensor of the int8 folder copied into the model, or into a part by its prefix."""
    own = dict(model.named_parameters())
    for name, value in tensors(shape, INT8, prefix):
        own[name.removeprefix(prefix)].copy_(value)
