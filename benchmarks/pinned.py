"""Worlds of real processes for measurements: each on a core of its own, with one thread, waiting for calls.

A world stays up between calls, so that measurements of one process and of two can be interleaved in
one run. Cores are given out in turn: more processes than cores share them, which is good enough for
bytes and memory and not for time.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

# Before numpy: its BLAS reads this once, when it is loaded.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", TQDM_DISABLE="1")

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from weightproof.collective import Processes

LIMIT_SECONDS = 600.0
LEAVE_SECONDS = 20.0


@dataclass
class Here:
    """One process of a world, and what it keeps between calls."""

    rank: int
    size: int
    processes: Processes
    kept: dict[Any, Any] = field(default_factory=dict)

    def timed(self, work: Callable[[], Any]) -> dict[str, float]:
        """Wall seconds and processor seconds (all threads) of this process, from when all have come."""
        self.processes.gather("starting together", None)
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


class World:
    """The processes, seen from outside."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
        port = _free_port()
        self._ranks = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_live, args=(theirs, rank, size, next(cores), port), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(here, *args)` in every process, at the same time; the results, by rank.

        Raises:
            SystemExit: a process failed, died or did not answer; with its traceback.
        """
        for _, pipe in self._ranks:
            pipe.send_bytes(pickle.dumps((function, args)))
        deadline = time.monotonic() + LIMIT_SECONDS
        return [self._answer(rank, deadline) for rank in range(len(self._ranks))]

    def _answer(self, rank: int, deadline: float) -> Any:
        process, pipe = self._ranks[rank]
        if not pipe.poll(max(0.0, deadline - time.monotonic())):
            self.close()
            sys.exit(f"rank {rank} gave no answer within {LIMIT_SECONDS:g} s")
        try:
            failed, result = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            process.join()
            self.close()
            sys.exit(f"rank {rank} died with exit code {process.exitcode}")
        if failed:
            self.close()
            sys.exit(f"rank {rank} failed:\n{result}")
        return result

    def close(self) -> None:
        """End the processes: they leave when their pipes close, and those that do not are killed."""
        for _, pipe in self._ranks:
            pipe.close()
        for process, _ in self._ranks:
            process.join(LEAVE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def world(size: int) -> Iterator[World]:
    """A world that ends with the block."""
    made = World(size)
    try:
        yield made
    finally:
        made.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _live(pipe: Any, rank: int, size: int, core: int, port: int) -> None:
    """The life of one process: answer calls until the pipe closes."""
    os.sched_setaffinity(0, {core})  # before there are other threads: they inherit it
    torch.set_num_threads(1)
    logging.getLogger("weightproof").setLevel(logging.ERROR)  # the models are random, and it says so
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = timedelta(seconds=LIMIT_SECONDS)
    if size > 1:
        store = TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    here = Here(rank, size, Processes.join(LIMIT_SECONDS))
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            return
        try:
            answer = (False, function(here, *args))
        except BaseException:  # noqa: BLE001 - shown by the process that asked
            answer = (True, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
