"""The processes of a run: one code path for one process and for many.

Every operation is first a meeting of all ranks (`weightproof.parallel.rendezvous`), then the payload. So a rank
that failed, sleeps, died or does something else ends the operation on all ranks, within the limit and
with an error that names the rank, and nobody waits inside a collective for a rank that never comes.
"""

from __future__ import annotations

import heapq
import itertools
import math
import pickle
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from weightproof.errors import CollectiveError, InputError
from weightproof.parallel.rendezvous import Failure, Rendezvous

T = TypeVar("T")
R = TypeVar("R")
Message = tuple[int, Tensor]

SUMMED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)

# The watchdog of an NCCL group ends the process; our own limit, which raises, must come before it.
WATCHDOG_DELAY = timedelta(seconds=60)

# All ranks create their sessions in the same order: the n-th of one process belongs to the n-th of the others.
_INSTANCES = itertools.count()


class Processes:
    """All processes of a run as seen by one of them. Every rank makes the same calls in the same order.

    Make one with `Processes.join()`, or `Processes.alone()` for one process: then nothing waits, nothing
    is copied that need not be, and exceptions pass as they are.

    Attributes:
        rank: this process, from 0.
        size: how many processes there are.
        timeout: seconds that a rank waits for the others in each operation.
        bytes_sent: payload bytes this rank sent in `sum` (by the ring formula, 2 (P - 1) / P of the
            tensors) and in `exchange`.
    """

    def __init__(self, meetings: Rendezvous | None, timeout: float) -> None:
        self.rank = 0 if meetings is None else meetings.rank
        self.size = 1 if meetings is None else meetings.size
        self.timeout = timeout
        self.bytes_sent = 0
        self._meetings = meetings
        self._host_group: dist.ProcessGroup | None = None
        self._device_group: dist.ProcessGroup | None = None
        self._device_connected = False

    @classmethod
    def alone(cls) -> Processes:
        """One process by itself."""
        return cls(None, math.inf)

    @classmethod
    def join(cls, timeout: float = 600.0) -> Processes:
        """All ranks of torch.distributed's default group; `alone()` if there is none, or only one rank.

        Args:
            timeout: seconds that a rank waits for the others, here and in every operation.

        Raises:
            CollectiveError: not all ranks came within the limit; the error names those that did not.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls.alone()
        instance = next(_INSTANCES)  # counted here even where it fails here alone: all must come to the same one next
        if not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
            raise InputError(f"timeout must be a positive number of seconds, not {timeout!r}")
        from torch.distributed import distributed_c10d

        store = distributed_c10d.PrefixStore(f"weightproof/{instance}", distributed_c10d._get_default_store())
        processes = cls(Rendezvous(store, dist.get_rank(), dist.get_world_size(), timeout), timeout)
        processes._connect("attaching the guard on every rank")
        return processes

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def lost(self) -> CollectiveError | None:
        """What ended all common operations (a rank timed out or died), if something did."""
        lost = None if self._meetings is None else self._meetings.lost
        if lost is None:
            return None
        return CollectiveError(lost.message, operation=lost.operation, ranks=lost.ranks, timed_out=lost.timed_out)

    def gather(self, operation: str, value: T) -> list[T]:
        """Every rank's value, by rank. For small readings: each rank receives all of them, pickled.

        Raises:
            CollectiveError: a rank failed, is missing, or died (also from all methods below).
            WeightproofError: the class that another rank raised.
        """
        if self._meetings is None:
            return [value]
        with self._own_work(operation):
            payload = pickle.dumps(value)

        def transfer(lengths: list[str]) -> list[bytes]:
            rows = torch.zeros(self.size, max(map(int, lengths)), dtype=torch.uint8)
            mine = torch.zeros(rows.shape[1], dtype=torch.uint8)
            mine[: len(payload)] = _as_bytes(payload)
            dist.all_gather(list(rows), mine, group=self._group_of(mine))
            return [row[: int(length)].numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]

        payloads = self._meet_and(transfer, operation, str(len(payload)))
        with self._own_work(operation):
            return [pickle.loads(theirs) for theirs in payloads]

    def broadcast(self, operation: str, value: T) -> T:
        """Rank 0's value, pickled; what the other ranks hand in is ignored."""
        if self._meetings is None:
            return value
        with self._own_work(operation):
            payload = pickle.dumps(value) if self.is_main else b""

        def transfer(lengths: list[str]) -> bytes:
            buffer = _as_bytes(payload) if self.is_main else torch.zeros(int(lengths[0]), dtype=torch.uint8)
            dist.broadcast(buffer, src=0, group=self._group_of(buffer))
            return buffer.numpy().tobytes()

        received = self._meet_and(transfer, operation, str(len(payload)))
        with self._own_work(operation):
            return pickle.loads(received)

    @contextmanager
    def together(self, operation: str) -> Iterator[None]:
        """A body that ends on all ranks alike: what one rank raises in it, the others raise too.

        The rank that failed raises its own exception. The others raise, at the next operation they come
        to or at the end of the body, the same class if it is one of weightproof's, else CollectiveError.
        """
        if self._meetings is None:
            yield
            return
        self._meetings.raise_if_lost()
        with self._own_work(operation):
            yield
        self._meetings.meet(operation)

    def sum(self, operation: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Element by element sums over the ranks, the same bits on every rank.

        One all-reduce for each dtype and kind of device, over all tensors at once.

        Args:
            operation: what it is for, in error messages.
            tensors: of the same shapes and dtypes, in the same order, on every rank; not changed.

        Returns:
            New tensors (with one process: the tensors themselves).

        Raises:
            InputError: a dtype that cannot be summed.
            CollectiveError: the shapes or dtypes differ between ranks.
        """
        if self._meetings is None:
            return list(tensors)
        with self._own_work(operation):
            groups = _groups_to_sum(tensors)
            flats = {key: torch.cat([tensors[i].detach().reshape(-1) for i in items]) for key, items in groups.items()}
            note = " ".join(f"{dtype}:{device}" for dtype, device in groups)
            shapes = zlib.crc32(repr([(tuple(t.shape), t.dtype) for t in tensors]).encode())

        def transfer(notes: list[str]) -> dict[tuple[torch.dtype, str], Tensor]:
            self._check_alike(operation, notes)
            return {key: self._all_reduced(flat) for key, flat in flats.items()}

        sums = self._meet_and(transfer, operation, f"{note} {sum(t.numel() for t in tensors)} elements, {shapes:08x}")
        results = list(tensors)
        for key, items in groups.items():
            parts = sums[key].split([tensors[i].numel() for i in items])
            for i, part in zip(items, parts, strict=True):
                results[i] = part.view(tensors[i].shape)
        return results

    def exchange(self, operation: str, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Messages from rank to rank, without copies of contiguous tensors.

        Args:
            operation: what it is for, in error messages.
            sends: (rank, tensor) pairs. The messages of one pair of ranks arrive in order. A message to
                this rank itself is copied. Tensors without elements are not sent.
            receives: (rank, contiguous tensor) pairs, filled in place; sizes and dtypes as sent, and on
                the same kind of device.

        Raises:
            InputError: a rank that does not exist, a tensor that cannot be filled in place, or messages
                of this rank to itself that do not match.
        """
        with self._own_work(operation):
            _check_messages(sends, receives, self.size)
            _copy_to_itself(self.rank, sends, receives)
            outgoing = [(peer, t) for peer, t in sends if peer != self.rank and t.numel()]
            incoming = [(peer, t) for peer, t in receives if peer != self.rank and t.numel()]
            on_device = any(t.device.type != "cpu" for _, t in outgoing + incoming)
        if self._meetings is None:
            return

        def transfer(notes: list[str]) -> None:
            self._connect_device(needed=any(notes))
            self._move(outgoing, incoming)

        self._meet_and(transfer, operation, "device" if on_device else "")
        self.bytes_sent += sum(t.nbytes for _, t in outgoing)

    def close(self) -> None:
        """Give the process groups back. Waits for nobody; operations after it raise CollectiveError."""
        for group in (self._host_group, self._device_group):
            if group is not None and dist.is_initialized():
                dist.destroy_process_group(group)
        self._host_group = self._device_group = None
        if self._meetings is not None and self._meetings.lost is None:
            self._meetings.lost = Failure("close", (self.rank,), "the session of this rank was closed", lost=True)

    def _connect(self, operation: str) -> None:
        """Make the process groups, once a meeting has shown that all ranks are there."""
        limit = timedelta(seconds=self.timeout)

        def connect(_: list[str]) -> None:
            self._host_group = _new_group(backend="gloo", timeout=limit)
            if dist.get_backend() != "gloo":
                self._device_group = _new_group(backend=None, timeout=limit + WATCHDOG_DELAY)

        self._meet_and(connect, operation)

    @contextmanager
    def _own_work(self, operation: str) -> Iterator[None]:
        """Work of this rank on which the others wait: its failure is theirs."""
        try:
            yield
        except BaseException as error:
            if self._meetings is not None:
                self._meetings.tell(operation, error)
            raise

    def _meet_and(self, transfer: Callable[[list[str]], R], operation: str, note: str = "") -> R:
        """Meet, then move the payload; `transfer` gets the notes of all ranks.

        If the transfer breaks, no later one can be trusted.
        """
        meetings = self._meetings
        if meetings is None:
            return transfer([note])
        notes = meetings.meet(operation, note)
        try:
            result = transfer(notes)
        except RuntimeError as error:  # what gloo and NCCL raise
            # Sockets close when nothing refers to the group any more, and ranks that wait for this
            # one notice at once. The frames of the traceback refer to it.
            error.__traceback__ = None
            self._drop_host_group()
            raise meetings.lose(operation, error) from error
        except BaseException as error:
            meetings.tell(operation, error, lost=True)
            raise
        meetings.finished(operation)
        return result

    def _drop_host_group(self) -> None:
        group, self._host_group = self._host_group, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)

    def _check_alike(self, operation: str, notes: list[str]) -> None:
        others = tuple(rank for rank, note in enumerate(notes) if note != notes[0])
        if others and self._meetings is not None:
            text = "; ".join(f"rank {rank}: {notes[rank]}" for rank in (0, *others))
            message = f"{operation}: the ranks add up different tensors ({text})"
            raise self._meetings.shared(Failure(operation, others, message))

    def _all_reduced(self, flat: Tensor) -> Tensor:
        self.bytes_sent += 2 * (self.size - 1) * flat.nbytes // self.size
        staged = flat if self._moves_directly(flat) else flat.cpu()
        dist.all_reduce(staged, group=self._group_of(staged))
        return staged.to(flat.device)

    def _moves_directly(self, tensor: Tensor) -> bool:
        """Whether a group can move a tensor from where it lies; else it travels through host memory."""
        return tensor.device.type == "cpu" or self._device_group is not None

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup:
        group = self._host_group if tensor.device.type == "cpu" else self._device_group
        assert group is not None  # None would mean the default group, which is not ours
        return group

    def _connect_device(self, *, needed: bool) -> None:
        """All ranks set up the device group's connections before the first message between a few of them."""
        if needed and self._device_group is not None and not self._device_connected:
            dist.barrier(group=self._device_group, device_ids=[torch.accelerator.current_device_index()])
            self._device_connected = True

    def _move(self, outgoing: Sequence[Message], incoming: Sequence[Message]) -> None:
        landings = [t if self._moves_directly(t) else torch.empty_like(t, device="cpu") for _, t in incoming]
        leaving = [t.contiguous() if self._moves_directly(t) else t.cpu().contiguous() for _, t in outgoing]
        operations = [
            *self._operations(dist.irecv, [peer for peer, _ in incoming], landings),
            *self._operations(dist.isend, [peer for peer, _ in outgoing], leaving),
        ]
        deadline = time.monotonic() + self.timeout
        for group in (self._host_group, self._device_group):
            batch = [operation for operation in operations if operation.group is group]
            for work in dist.batch_isend_irecv(batch) if batch else []:
                work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
        for (_, target), landing in zip(incoming, landings, strict=True):
            if landing is not target:
                target.copy_(landing)

    def _operations(
        self, kind: Callable[..., object], peers: Sequence[int], tensors: Sequence[Tensor]
    ) -> list[dist.P2POp]:
        """Each message of a pair under a tag of its own, so that none is taken for another."""
        counts: Counter[tuple[int, bool]] = Counter()
        operations = []
        for peer, tensor in zip(peers, tensors, strict=True):
            lane = (peer, tensor.device.type == "cpu")
            raw = tensor.detach().reshape(-1).view(torch.uint8)
            operations.append(dist.P2POp(kind, raw, peer, self._group_of(tensor), tag=counts[lane]))
            counts[lane] += 1
        return operations


def deal(costs: Sequence[float], size: int) -> list[int]:
    """The owner of each item, longest first, each to the rank with the least work so far (Graham 1969).

    No rank gets more than 4/3 of the work that the best division gives the busiest one. Deterministic:
    the same on every rank.

    Args:
        costs: of each item, finite and not negative.
        size: how many ranks there are.

    Raises:
        InputError: a cost that is negative or not finite, or no rank.

    Example:
        >>> deal([5.0, 4.0, 3.0, 3.0], 2)
        [0, 1, 1, 0]
    """
    if size < 1:
        raise InputError(f"work can be dealt to one rank or more, not to {size}")
    for item, cost in enumerate(costs):
        if not 0 <= cost < math.inf:
            raise InputError(f"item {item} costs {cost}: a cost must be finite and not negative")
    loads = [(0.0, rank) for rank in range(size)]
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(loads)
        owners[item] = rank
        heapq.heappush(loads, (load + costs[item], rank))
    return owners


def _new_group(*, backend: str | None, timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend=backend, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)  # not a member: impossible for a group of all ranks
    return group


def _as_bytes(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)


def _groups_to_sum(tensors: Sequence[Tensor]) -> dict[tuple[torch.dtype, str], list[int]]:
    """Which tensors travel together, in order of appearance."""
    groups: dict[tuple[torch.dtype, str], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.dtype not in SUMMED_DTYPES:
            raise InputError(f"tensor {index} is {tensor.dtype}, which cannot be summed over ranks")
        groups.setdefault((tensor.dtype, tensor.device.type), []).append(index)
    return groups


def _check_messages(sends: Sequence[Message], receives: Sequence[Message], size: int) -> None:
    for kind, messages in (("send", sends), ("receive", receives)):
        for index, (peer, _) in enumerate(messages):
            if not 0 <= peer < size:
                raise InputError(f"{kind} {index} is with rank {peer}; there are ranks 0 to {size - 1}")
    for index, (_, tensor) in enumerate(receives):
        if not tensor.is_contiguous():
            raise InputError(f"receive {index}, of shape {tuple(tensor.shape)}, is not contiguous: it cannot be filled")


def _copy_to_itself(rank: int, sends: Sequence[Message], receives: Sequence[Message]) -> None:
    given = [t for peer, t in sends if peer == rank and t.numel()]
    taken = [t for peer, t in receives if peer == rank and t.numel()]
    if [(t.numel(), t.dtype) for t in given] != [(t.numel(), t.dtype) for t in taken]:
        raise InputError(
            f"rank {rank} sends {len(given)} tensors to itself that are not those it expects ({len(taken)})"
        )
    for source, target in zip(given, taken, strict=True):
        target.detach().view(-1).copy_(source.detach().reshape(-1))
