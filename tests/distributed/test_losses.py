"""The loss probe in worlds of two processes: the same readings as one process, bit for bit, and no hang."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import trained_models
from torch import nn
from torch.distributed.fsdp import fully_shard
from worlds import run_world

from weightproof.collective import Processes
from weightproof.errors import InputError
from weightproof.guards.loss import LossLimits
from weightproof.losses import LossProbe
from weightproof.types import LossReading, Outcome

LIMITS = LossLimits(min_windows=20, min_tokens=256, max_windows=256, length=32)


@torch.no_grad()
def scale(model: nn.Module, factor: float) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("down_proj.weight"):
            parameter.mul_(factor)


def readings_of(model: nn.Module, data: Iterable[Any], processes: Processes) -> list[LossReading]:
    """Before any change, after a small one and after a large one."""
    probe = LossProbe(model, data, data, LIMITS, processes)
    probe.capture()
    found = list(probe.measure())
    for factor in (1.001, 3.0):
        scale(model, factor)
        found += probe.measure()
    return found


def data() -> list[torch.Tensor]:
    """Windows of two lengths and one odd one: batches do not come out even."""
    windows = trained_models.chain_samples(101, 32, seed=77)
    return [window if i % 3 else window[:20] for i, window in enumerate(windows)]


def one_process() -> list[LossReading]:
    return readings_of(trained_models.load("llama").model, data(), Processes.alone())


def replicas(rank: int, size: int) -> list[LossReading]:
    return readings_of(trained_models.load("llama").model, data(), Processes.join(30.0))


def sharded(rank: int, size: int) -> list[LossReading]:
    model = trained_models.load("llama").model
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return readings_of(model, data(), Processes.join(30.0))


def test_replicas_read_the_same_as_one_process_to_the_bit():
    torch.set_num_threads(1)
    alone = one_process()
    assert [LIMITS.outcome(reading) for reading in alone[::2]] == [Outcome.PASS, Outcome.PASS, Outcome.FAIL]
    first, second = run_world(replicas, 2)
    assert first == second == alone


def test_sharded_models_read_the_same_as_one_process_to_the_bit():
    torch.set_num_threads(1)
    first, second = run_world(sharded, 2)
    assert first == second == one_process()


def other_data(rank: int, size: int) -> str:
    windows = trained_models.chain_samples(60, 32, seed=rank)
    probe = LossProbe(trained_models.load("gpt2").model, windows, None, LIMITS, Processes.join(30.0))
    with pytest.raises(InputError) as found:
        probe.capture()
    return str(found.value)


def test_different_data_are_refused_on_every_process():
    for message in run_world(other_data, 2):
        assert "processes hold different loss windows: give every process the same" in message


def one_breaks(rank: int, size: int) -> tuple[str, LossReading]:
    """Rank 1's copy stops running after the change; then all go on together."""
    model = trained_models.load("gpt2").model
    processes = Processes.join(30.0)
    probe = LossProbe(model, trained_models.chain_samples(60, 32, seed=5), None, LIMITS, processes)
    probe.capture()

    def fail(*_: Any) -> None:
        raise RuntimeError("a broken copy")

    handle = model.register_forward_pre_hook(fail) if rank == 1 else None
    (broken,) = probe.measure()
    if handle is not None:
        handle.remove()
    (again,) = probe.measure()
    assert again.difference == 0.0
    return broken.method, replace(broken, method="")


def test_a_pass_that_fails_on_one_process_is_a_rejection_on_all():
    (method, first), (other, second) = run_world(one_breaks, 2)
    assert method == other
    assert "rank 1" in method
    assert "a broken copy" in method
    assert first == second
    assert LIMITS.outcome(first) is Outcome.FAIL
