"""What a hostile user found: each row was a hang, a false alarm or a silent loss between processes."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharding import kept_parts, shard
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from worlds import run_world

from weightproof import GuardSession
from weightproof.collective import Processes
from weightproof.errors import BaselineError, CollectiveError, InputError
from weightproof.families import unwrap
from weightproof.parallel.placements import local_of

# Nothing here should wait for anything; a hang must end long before the world does.
TIMEOUT = 10.0


class Net(nn.Module):
    """Two layers with running statistics between them, and noise in eval mode where `noise` is not 0."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 24)
        self.norm = nn.BatchNorm1d(24)
        self.last = nn.Linear(24, 12)
        self.noise = noise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last(x + self.noise * torch.randn(x.shape))


class Outer(nn.Module):
    """A wrapper of the user's own around DDP."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def _retain() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [{"x": torch.randn(4, 12, generator=generator)} for _ in range(3)]


def _session(model: nn.Module) -> GuardSession:
    return GuardSession(model, retain=_retain(), timeout=TIMEOUT)


def _ruin(model: nn.Module) -> None:
    for parameter in model.parameters():
        local_of(parameter).mul_(1000.0)


def _train(model: nn.Module, rank: int) -> float:
    model.train()
    loss = model(torch.randn(8, 12, generator=torch.Generator().manual_seed(rank))).square().mean()
    loss.backward()
    return float(loss)


def _same(before: list[torch.Tensor], model: nn.Module) -> bool:
    return all(torch.equal(*pair) for pair in zip(before, kept_parts(model), strict=True))


# ---------------------------------------------------------------- an interrupt on one process


def _interrupted(rank: int, size: int) -> Any:
    assert dist.get_world_size() == size == 2
    model = Net()
    fully_shard(model.last)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    session, before = _session(model), kept_parts(model)

    def interrupt(*_: object) -> None:
        handle.remove()
        if rank == 1:
            raise KeyboardInterrupt

    with pytest.raises((CollectiveError, KeyboardInterrupt)) as raised, session.edit("louder"):
        _ruin(model)
        handle = model.norm.register_forward_pre_hook(interrupt)
    restored = _same(before, model)
    with session.edit("louder again") as step:
        _ruin(model)
    return raised.typename, str(raised.value), restored, step.applied


def test_an_interrupt_in_a_forward_pass_of_one_process_leaves_no_other_in_an_all_gather():
    first, second = run_world(_interrupted, 2, timeout=40)
    assert second == ("KeyboardInterrupt", "", True, "restored")
    assert first[0] == "CollectiveError"
    assert first[1].startswith("rank 1 failed in outputs after the change: KeyboardInterrupt")
    assert first[2:] == (True, "restored")


# ---------------------------------------------------------------- a model that draws random numbers in eval mode


def _noisy(rank: int, size: int) -> Any:
    assert dist.get_world_size() == size == 2
    model = DistributedDataParallel(Net(noise=0.5))
    torch.manual_seed(rank)
    session = _session(model)
    with session.edit("nothing") as idle:
        torch.rand(3)
    with session.edit("louder") as louder:
        _ruin(model)
        torch.rand(5)
    assert idle.decision is not None
    measured = [one for verdict in idle.decision.verdicts for one in verdict.measurements]
    return [one.value for one in measured if one.statistic == "kl"], idle.applied, louder.applied


def test_a_model_that_draws_random_numbers_is_restored_and_its_noise_is_no_damage():
    for divergence, idle, louder in run_world(_noisy, 2, timeout=40):
        assert divergence == [0.0]
        assert (idle, louder) == ("kept", "restored")


# ---------------------------------------------------------------- another dtype, taken back


def _cast_shards(rank: int, size: int, guarded: bool) -> Any:
    assert dist.get_world_size() == size == 2
    model = shard(Net())
    outcome = None
    if guarded:
        session, before = _session(model), kept_parts(model)
        with session.edit("cast") as step:  # a forward pass of FSDP2 fails after this, whoever makes it
            _train(model, rank)
            model.zero_grad()
            model.to(torch.bfloat16)
        outcome = step.applied, _same(before, model)
    else:
        _train(model, rank)
        model.zero_grad()
        model.norm.reset_running_stats()
    return outcome, _train(model, rank)


def test_shards_that_were_cast_and_taken_back_train_as_before():
    plain, guarded = run_world(_cast_shards, 2, False, timeout=40), run_world(_cast_shards, 2, True, timeout=40)
    assert [outcome for outcome, _ in guarded] == [("restored", True)] * 2
    assert [loss for _, loss in guarded] == [loss for _, loss in plain]


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _cast_replicas(rank: int, size: int) -> Any:
    assert dist.get_world_size() == size == 2
    heard = _Heard()
    logging.getLogger("weightproof").addHandler(heard)
    model: nn.Module = DistributedDataParallel(Net())
    session, before = _session(model), kept_parts(model)
    said: list[int] = []
    for cast in (False, True):
        heard.messages.clear()
        with session.edit("louder"):
            _ruin(model)
            if cast:
                unwrap(model).to(torch.bfloat16)
        said.append(sum("wrap the model again" in message for message in heard.messages))
    model = DistributedDataParallel(unwrap(model))
    _train(model, rank)
    gradients = [parameter.grad.tolist() for parameter in model.parameters() if parameter.grad is not None]
    return said, _same(before, model), gradients


def test_a_restore_says_when_ddp_has_lost_the_parameters():
    first, second = run_world(_cast_replicas, 2, timeout=40)
    assert first[:2] == second[:2] == ([0, 1], True)
    assert first[2] == second[2]  # averaged: each rank trained on data of its own


# ---------------------------------------------------------------- DDP inside another module


def _nested(rank: int, size: int) -> Any:
    assert dist.get_world_size() == size == 2
    inner = DistributedDataParallel(Net())
    model = Outer(inner)
    _train(model, rank)  # moves the running statistics of the ranks apart
    buffers = [buffer.clone() for buffer in model.buffers()]
    syncs = inner.require_forward_param_sync
    session = _session(model)
    untouched = all(torch.equal(*pair) for pair in zip(buffers, model.buffers(), strict=True))
    return untouched, syncs, inner.require_forward_param_sync, session.processes.size


def test_a_guard_makes_no_ddp_inside_the_model_broadcast_its_buffers():
    assert run_world(_nested, 2, timeout=40) == [(True, True, True, 2)] * 2


# ---------------------------------------------------------------- a replica that is not that of rank 0


def _torn(rank: int, size: int, folder: str) -> Any:
    assert dist.get_world_size() == size == 2
    model = DistributedDataParallel(Net())
    session = _session(model)
    session.save_state(folder)
    if rank == 1:
        unwrap(model).get_parameter("first.bias").data[0] += 1.0
    said = []
    for load in (
        lambda: session.load_state(folder),
        lambda: GuardSession(model, retain=_retain(), timeout=TIMEOUT, baseline=folder),
    ):
        with pytest.raises(BaselineError) as raised:
            load()
        said.append(str(raised.value))
    return said


def test_weights_are_not_proven_where_one_process_holds_others(tmp_path):
    for said in run_world(_torn, 2, str(tmp_path), timeout=40):
        assert len(said) == 2
        assert all("first.bias has other values on rank 1" in message for message in said)


# ---------------------------------------------------------------- attaching in vain, and again


def _in_vain(rank: int, size: int) -> Any:
    assert dist.get_world_size() == size == 2
    model = DistributedDataParallel(Net())

    def attach() -> None:
        policy = "balanced" if rank == 0 else "aggressive"
        with pytest.raises(InputError, match="policy: not the same on every process"):
            GuardSession(model, retain=_retain(), policy=policy, timeout=TIMEOUT)

    def held() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    attach()
    gc.collect()
    before = held()
    for _ in range(3):
        attach()
    gc.collect()
    return held() - before


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux shows them")
def test_a_session_that_was_refused_leaves_no_connection_open():
    assert run_world(_in_vain, 2, timeout=40) == [0, 0]


def _attached_again(rank: int, size: int) -> Any:
    assert dist.get_world_size() == size == 2
    wrong: Any = None if rank == 0 else 0.5
    with pytest.raises((InputError, CollectiveError)) as raised:
        Processes.join(wrong)
    dist.barrier()
    processes = Processes.join(TIMEOUT)
    return raised.typename, str(raised.value), processes.gather("ranks", rank)


def test_processes_meet_again_after_one_of_them_could_not_attach():
    first, second = run_world(_attached_again, 2, timeout=40)
    assert first[:2] == ("InputError", "timeout must be a positive number of seconds, not None")
    assert second[0] == "CollectiveError"
    assert first[2] == second[2] == [0, 1]
