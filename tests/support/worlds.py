"""Worlds of a few real processes (gloo, CPU) for tests of what ranks do together.

    results = run_world(body, 2, "argument")    # [body(0, 2, "argument"), body(1, 2, "argument")]

`body` is a module-level function of any test module. Each process is forked from a server that has
torch and weightproof loaded, so that a world starts in a fraction of a second.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

PRELOADED = ["numpy", "pytest", "torch", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers"]
PRELOADED += ["transformers.models.llama.modeling_llama", "transformers.trainer", "accelerate"]
PRELOADED += ["weightproof.session", "weightproof.edits", "worlds"]

# After the first failure the other ranks get this long to report theirs.
LAST_WORDS_SECONDS = 2.0

# How long a rank that hangs gets to write down where.
STACK_SECONDS = 0.3

# How long a rank may take to leave after its result was received.
LEAVE_SECONDS = 20.0

# A rank whose test process is gone ends itself this long after the limit.
ORPHAN_SECONDS = 10.0


class WorldError(AssertionError):
    """A rank raised, died or did not end in time; the message holds every traceback."""


@dataclass
class _Rank:
    process: Any
    pipe: Connection
    log: Path
    report: tuple[str, Any] | None = None  # ("result", value), ("error", traceback) or ("ended", exit code)

    def stack(self) -> str:
        """Where the process is now: it writes that down when it gets this signal."""
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(STACK_SECONDS)
        return self.log.read_text() if self.log.exists() else ""


@dataclass
class _World:
    ranks: list[_Rank] = field(default_factory=list)


def run_world(
    fn: Callable[..., Any], size: int, *args: Any, timeout: float = 60.0, expect_dead: Collection[int] = ()
) -> list[Any]:
    """Run `fn(rank, size, *args)` in `size` fresh processes of one torch.distributed world.

    Args:
        fn: a function at the top of its module.
        size: how many processes.
        args: what pickle can carry.
        timeout: seconds until the processes are killed; where each of them was is then in the error.
        expect_dead: ranks that the test kills: their result is None, and it is an error if they return.

    Returns:
        What each rank returned, by rank.

    Raises:
        WorldError: a rank raised, died unexpectedly, or did not end in time.
    """
    with tempfile.TemporaryDirectory(prefix="world-") as folder:
        world = _World()
        try:
            _start(world, fn, size, pickle.dumps(args), timeout, Path(folder))
            _follow(world, set(expect_dead), time.monotonic() + timeout)
            _check(world, set(expect_dead), timeout)
            _dismiss(world)
        finally:
            _end(world)
        return [rank.report[1] if rank.report and rank.report[0] == "result" else None for rank in world.ranks]


def _start(world: _World, fn: Callable[..., Any], size: int, args: bytes, timeout: float, folder: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    module = sys.modules[fn.__module__]
    source = (fn.__module__, str(Path(str(module.__file__)).resolve()), fn.__qualname__)
    for rank in range(size):
        ours, theirs = context.Pipe()
        log = folder / f"rank{rank}.log"
        process = context.Process(
            target=_live, args=(theirs, rank, size, source, args, timeout, str(log)), daemon=True, name=f"rank {rank}"
        )
        process.start()
        theirs.close()
        world.ranks.append(_Rank(process, ours, log))


def _follow(world: _World, expect_dead: set[int], deadline: float) -> None:
    """Take reports until all ranks have given one, or until shortly after the first failure."""
    while open_ranks := [rank for rank in world.ranks if rank.report is None]:
        ready = wait([rank.pipe for rank in open_ranks], timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            return
        for number, rank in enumerate(world.ranks):
            if rank.pipe not in ready or rank.report is not None:
                continue
            _take(world, rank)
            if rank.report is not None and rank.report[0] != "result" and number not in expect_dead:
                deadline = min(deadline, time.monotonic() + LAST_WORDS_SECONDS)


def _take(world: _World, rank: _Rank) -> None:
    try:
        kind, content = pickle.loads(rank.pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        rank.process.join(LEAVE_SECONDS)
        rank.report = ("ended", rank.process.exitcode)
        return
    if kind != "port":
        rank.report = (kind, content)
        return
    for other in world.ranks[1:]:  # rank 0 let the system choose the port of its store
        other.pipe.send_bytes(pickle.dumps(content))


def _check(world: _World, expect_dead: set[int], timeout: float) -> None:
    troubles, late = [], []
    for number, rank in enumerate(world.ranks):
        kind, content = rank.report or ("late", None)
        if number in expect_dead:
            if kind != "ended":
                troubles.append(f"rank {number} was to die, but: {kind} {content}")
        elif kind == "late":
            late.append(f"rank {number} was still running\n{rank.stack()}")
        elif kind == "ended":
            troubles.append(f"rank {number} ended with exit code {content} and gave no result")
        elif kind == "error":
            troubles.append(f"rank {number} raised\n{content}")
    __tracebackhide__ = True
    if late and not troubles:
        troubles = [f"the world did not end within {timeout:g} s"]
    if troubles:
        raise WorldError("\n".join(troubles + late))


def _dismiss(world: _World) -> None:
    """Let all ranks leave at the same time: rank 0 hosts the store that others may still use."""
    living = [rank for rank in world.ranks if rank.report and rank.report[0] == "result"]
    for rank in living:
        rank.pipe.send_bytes(b"leave")
    for rank in living:
        rank.process.join(LEAVE_SECONDS)
        if rank.process.exitcode != 0:
            raise WorldError(f"{rank.process.name} gave its result, then left with exit code {rank.process.exitcode}")


def _end(world: _World) -> None:
    for rank in world.ranks:
        if rank.process.is_alive():
            rank.process.kill()
    for rank in world.ranks:
        rank.process.join()
        rank.process.close()
        rank.pipe.close()


def _live(
    pipe: Connection, rank: int, size: int, source: tuple[str, str, str], args: bytes, timeout: float, log: str
) -> None:
    """The life of one rank."""
    gc.freeze()  # what the server loaded stays: Trainer asks for a full collection after each training
    # A shell starts what it puts into the background with interrupts ignored; tests of interrupts need them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Path(log).open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        faulthandler.dump_traceback_later(timeout + ORPHAN_SECONDS, exit=True, file=stacks)
        try:
            result = _joined(pipe, rank, size, source, args, timeout)
            report = pickle.dumps(("result", result))
        except BaseException:  # noqa: BLE001 - shown by the test process
            report = pickle.dumps(("error", traceback.format_exc()))
        pipe.send_bytes(report)
        try:
            pipe.recv_bytes()
        except EOFError:
            os._exit(1)
        if dist.is_initialized():
            dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


def _joined(pipe: Connection, rank: int, size: int, source: tuple[str, str, str], args: bytes, timeout: float) -> Any:
    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout)
    if rank == 0:
        store = TCPStore("127.0.0.1", 0, size, is_master=True, timeout=limit, wait_for_workers=False)
        pipe.send_bytes(pickle.dumps(("port", store.port)))
    else:
        port = pickle.loads(pipe.recv_bytes())
        store = TCPStore("127.0.0.1", port, size, is_master=False, timeout=limit)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    assert dist.get_world_size() == size
    name, path, function = source
    return getattr(_module(name, path), function)(rank, size, *pickle.loads(args))


def _module(name: str, path: str) -> ModuleType:
    """The test module, by path: pytest's importlib mode gives modules names that cannot be imported."""
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == path:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
