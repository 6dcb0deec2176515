"""DeepSpeed engines of small models in gloo processes, and what their weights and masters hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

VOCAB = 40


@dataclass(frozen=True)
class Setup:
    """One way to run DeepSpeed.

    `offload` puts the optimizer (and in stage 3 the weights) on the CPU; `accumulate="fp32"` asks for gradients
    in fp32 (in stage 1 with bf16 weights that is another optimizer class); `sub_group_size` cuts the masters of
    stage 3; `prefetch` makes stage 3 drop gathered weights early and gather the next ones ahead.
    """

    stage: int
    dtype: torch.dtype = torch.float32
    offload: bool = False
    accumulate: str | None = None
    sub_group_size: int | None = None
    prefetch: bool = False

    @property
    def label(self) -> str:
        more = {
            "offload": self.offload,
            f"grads_{self.accumulate}": self.accumulate,
            "sub_groups": self.sub_group_size,
            "prefetch": self.prefetch,
        }
        return "-".join(
            [f"zero{self.stage}", str(self.dtype).removeprefix("torch."), *(key for key in more if more[key])]
        )

    @property
    def config(self) -> dict[str, Any]:
        """What DeepSpeed is told."""
        zero: dict[str, Any] = {"stage": self.stage}
        if self.stage == 3:
            zero["stage3_param_persistence_threshold"] = 0 if self.prefetch else 600
        if self.sub_group_size:
            zero["sub_group_size"] = self.sub_group_size
        if self.prefetch:
            zero |= {"stage3_max_live_parameters": 3000, "stage3_max_reuse_distance": 1000}
            zero |= {"stage3_prefetch_bucket_size": 4000, "overlap_comm": True}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.offload and self.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": self.dtype is torch.bfloat16},
            "data_types": {"grad_accum_dtype": self.accumulate},
            "steps_per_print": 10**9,
        }


def join(size: int) -> None:
    """Let DeepSpeed use the process group that exists."""
    deepspeed.init_distributed("gloo", verbose=False)
    assert torch.distributed.get_world_size() == size == 2


def small_llama() -> nn.Module:
    """Two layers, every kind of matrix; without tied weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(7)
    return LlamaForCausalLM(config)


class Ragged(nn.Module):
    """Odd numbers of elements, a weight of one element, a frozen layer, a tied pair and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 3)
        self.second = nn.Linear(3, 1)
        self.frozen = nn.Linear(1, 5)
        self.again = nn.Linear(5, 3)
        self.again.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, inputs: Tensor) -> Tensor:
        """Mean square of the output."""
        hidden = self.frozen(self.second(torch.tanh(self.first(inputs) + self.shift)))
        return self.again(hidden).square().mean()


def ragged() -> nn.Module:
    torch.manual_seed(7)
    return Ragged()


def engine_of(model: nn.Module, setup: Setup, learning_rate: float = 1e-3) -> Any:
    """A DeepSpeed engine that trains with AdamW in two parameter groups, as a Trainer makes them."""
    model = model.to(setup.dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": 0.01},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=setup.config)[0]
    sharded = [hasattr(parameter, "ds_tensor") for parameter in engine.module.parameters()]
    assert all(sharded) if setup.stage == 3 else not any(sharded)
    return engine


def batch(seed: int) -> Tensor:
    """Tokens that differ between the processes."""
    generator = torch.Generator().manual_seed(100 * seed + torch.distributed.get_rank())
    return torch.randint(0, VOCAB, (2, 16), generator=generator)


def step(engine: Any, seed: int, learning_rate: float | None = None) -> float:
    """One training step; its loss on this process."""
    if learning_rate is not None:
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
    tokens = batch(seed)
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def output_of(engine: Any) -> Tensor:
    """Logits on the same tokens at every process, without gradients."""
    with torch.no_grad():
        return engine.module(input_ids=torch.arange(8)[None]).logits.clone()


def named(engine: Any) -> dict[str, Any]:
    return dict(engine.module.named_parameters())


def live_part(parameter: Any) -> Tensor:
    """What this process holds of a weight: all of it, or its ZeRO-3 partition."""
    return getattr(parameter, "ds_tensor", parameter)


def parts(engine: Any) -> dict[str, Tensor]:
    return {name: live_part(parameter).detach().clone() for name, parameter in named(engine).items()}


def write(engine: Any, name: str, value: float) -> None:
    """Fill one weight the way DeepSpeed documents it: on every process, or gathered and scattered again."""
    parameter = named(engine)[name]
    gathered = [parameter] if hasattr(parameter, "ds_id") else []
    with torch.no_grad(), deepspeed.zero.GatheredParameters(gathered, modifier_rank=0, enabled=bool(gathered)):
        if not gathered or torch.distributed.get_rank() == 0:
            parameter.fill_(value)


def largest(engine: Any, name: str) -> float:
    """Largest magnitude in this process's part of a weight."""
    return float(live_part(named(engine)[name]).detach().abs().max())


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not bit for bit the same."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]
