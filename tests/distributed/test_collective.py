"""Real processes: what ranks do together, and what happens to the others when one fails, sleeps or dies."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from worlds import run_world

from weightproof.collective import Processes
from weightproof.errors import CollectiveError, InputError, PolicyError, WeightproofError
from weightproof.parallel import rendezvous

# Far more than an operation takes here, even on a busy machine; far less than the limit of a world.
PATIENT = 30.0

# The limit of the tests in which a rank does not come.
SHORT = 2.0


def joined(size: int, timeout: float = PATIENT) -> Processes:
    processes = Processes.join(timeout)
    assert dist.get_world_size() == processes.size == size > 1
    assert processes.rank == dist.get_rank()
    return processes


def caught(action: Callable[[], Any]) -> BaseException | None:
    try:
        action()
    except BaseException as error:  # noqa: BLE001 - the tests look at what it was
        return error
    return None


def in_step(processes: Processes) -> None:
    assert processes.gather("still in step", processes.rank) == list(range(processes.size))


# ---------------------------------------------------------------- payloads


def readings_travel(rank: int, size: int) -> None:
    processes = joined(size)
    values = [
        None,
        0.1 * rank,
        {"rank": rank, "long": "x" * (rank * 5000)},
        [],
        float("nan"),
        PolicyError(f"from {rank}"),
    ]
    for number, value in enumerate(values):
        gathered = processes.gather(f"value {number}", value)
        assert len(gathered) == size
        assert repr(gathered[rank]) == repr(value)
    assert processes.gather("ranks", {"rank": rank, "long": "x" * rank * 5000}) == [
        {"rank": r, "long": "x" * r * 5000} for r in range(size)
    ]
    assert processes.broadcast("decision", f"keep, says {rank}") == "keep, says 0"
    assert processes.broadcast("nothing", None) is None
    assert processes.is_main == (rank == 0)
    assert processes.bytes_sent == 0


@pytest.mark.parametrize("size", [2, 3])
def test_readings_reach_every_rank(size: int):
    run_world(readings_travel, size)


def tensors_add_up(rank: int, size: int) -> list[bytes]:
    processes = joined(size)
    generator = torch.Generator().manual_seed(rank)
    tensors = [
        torch.randn(3, 5, generator=generator),
        torch.randn(0, 4, generator=generator),
        torch.randint(-9, 9, (7,), generator=generator),
        torch.randn(1001, generator=generator, dtype=torch.float64),
        torch.randn(6, 2, generator=generator).t(),
        torch.randn(9, generator=generator).to(torch.bfloat16),
        torch.tensor(float(rank)),
        torch.randn(2, generator=generator, requires_grad=True),
    ]
    copies = [tensor.clone() for tensor in tensors]
    sums = processes.sum("readings", tensors)
    everyone = processes.gather("what was added", [tensor.detach() for tensor in tensors])
    for index, total in enumerate(sums):
        assert torch.equal(tensors[index], copies[index])
        assert total.dtype == tensors[index].dtype
        assert total.shape == tensors[index].shape
        expected = sum(theirs[index].double() for theirs in everyone)
        torch.testing.assert_close(
            total.double(), expected, rtol=2e-2 if total.dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )
    moved = (15 + 12 + 1 + 2) * 4, 7 * 8, 1001 * 8, 9 * 2
    assert processes.bytes_sent == sum(2 * (size - 1) * count // size for count in moved)
    assert processes.sum("nothing", []) == []
    return [total.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for total in sums]


@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_right_and_the_same_bits_on_every_rank(size: int):
    bits = run_world(tensors_add_up, size)
    assert all(theirs == bits[0] for theirs in bits)


def different_tensors(rank: int, size: int) -> None:
    processes = joined(size)
    error = caught(lambda: processes.sum("vectors", [torch.ones(3 + (rank == 2))]))
    assert isinstance(error, CollectiveError)
    assert error.ranks == (2,)
    assert "vectors" in str(error)
    in_step(processes)
    error = caught(lambda: processes.sum("flags", [torch.ones(3, dtype=torch.bool if rank == 1 else torch.int32)]))
    assert type(error) is InputError
    assert "torch.bool" in str(error)
    in_step(processes)


def test_sums_of_different_tensors_are_refused_on_every_rank():
    run_world(different_tensors, 3)


def parts_travel(rank: int, size: int) -> None:
    processes = joined(size)
    shapes = [
        ((4, 3), torch.float32),
        ((0, 3), torch.float32),
        ((5,), torch.bfloat16),
        ((), torch.int64),
        ((2, 2), torch.bool),
    ]

    def part(source: int, target: int, number: int) -> torch.Tensor:
        shape, dtype = shapes[number]
        filled = torch.full(shape, float(10 * source + target + number), dtype=torch.float32)
        return (filled % 2 == 0) if dtype == torch.bool else filled.to(dtype)

    pairs = [(s, t) for s in range(size) for t in range(size) if (s, t) != (1, 0)]
    sends = [(t, part(s, t, n)) for s, t in pairs for n in range(len(shapes)) if s == rank]
    expected = [(s, part(s, t, n)) for s, t in pairs for n in range(len(shapes)) if t == rank]
    receives = [(s, torch.zeros_like(wanted)) for s, wanted in expected]
    processes.exchange("parts", sends, receives)
    for (_, got), (_, wanted) in zip(receives, expected, strict=True):
        assert torch.equal(got, wanted)
    assert processes.bytes_sent == sum(tensor.nbytes for target, tensor in sends if target != rank)

    # A part of a whole lands in the whole; a transposed part is sent as it is read, row by row.
    whole = torch.zeros(size, 6)
    mine = torch.arange(6.0).view(2, 3).t() + rank
    processes.exchange("wholes", [(0, mine)], [(r, whole[r].view(3, 2)) for r in range(size)] if rank == 0 else [])
    if rank == 0:
        assert whole.tolist() == [[r + x for x in (0.0, 3.0, 1.0, 4.0, 2.0, 5.0)] for r in range(size)]
    processes.exchange("nothing", [], [])


@pytest.mark.parametrize("size", [2, 3])
def test_parts_reach_the_right_rank_in_order(size: int):
    run_world(parts_travel, size)


def wrong_messages(rank: int, size: int) -> None:
    processes = joined(size)
    one = torch.zeros(2, 2)
    wrong = [
        ([(size, one)], []),
        ([], [(0, one.t())]),
        ([(1, one)], [(1, torch.zeros(3))]),
    ]
    for sends, receives in wrong:
        error = caught(lambda s=sends, r=receives: processes.exchange("parts", *((s, r) if rank == 1 else ([], []))))
        assert type(error) is InputError
        assert (rank == 1) == ("rank 1: " not in str(error))
        in_step(processes)


def test_messages_that_cannot_be_are_refused_on_every_rank():
    run_world(wrong_messages, 2)


# ---------------------------------------------------------------- one rank fails, the others hear of it


def one_rank_fails(rank: int, size: int, failing: tuple[int, ...], place: str) -> None:
    processes = joined(size)

    def body() -> None:
        with processes.together("edit"):
            if place == "before" and rank in failing:
                raise ValueError(f"bad luck on {rank}")
            processes.gather("norms", rank)
            if place == "between" and rank in failing:
                raise ValueError(f"bad luck on {rank}")
            processes.sum("more norms", [torch.ones(2)])
            if place == "after" and rank in failing:
                raise ValueError(f"bad luck on {rank}")

    for _ in range(3):
        error = caught(body)
        if rank in failing:
            assert type(error) is ValueError
            assert str(error) == f"bad luck on {rank}"
        else:
            assert type(error) is CollectiveError
            assert str(error) in [f"rank {r} failed in edit: ValueError: bad luck on {r}" for r in failing]
            assert error.operation == "edit"
            assert error.ranks in [(r,) for r in failing]
            assert not error.timed_out
        in_step(processes)
    assert processes.lost is None


@pytest.mark.parametrize("place", ["before", "between", "after"])
@pytest.mark.parametrize("failing", [(0,), (2,), (0, 2), (0, 1, 2)])
def test_a_failure_ends_the_body_on_every_rank_and_leaves_them_in_step(failing: tuple[int, ...], place: str):
    run_world(one_rank_fails, 3, failing, place)


class OwnError(PolicyError):
    """Of a plugin: the other ranks know its nearest parent among weightproof's errors."""


def classes_travel(rank: int, size: int) -> None:
    processes = joined(size)
    for raised, expected in [
        (InputError("no such folder"), InputError),
        (PolicyError("no such tier"), PolicyError),
        (OwnError("no such plugin"), PolicyError),
        (WeightproofError("base"), WeightproofError),
        (CollectiveError("another group", operation="x", ranks=(5,)), CollectiveError),
        (KeyboardInterrupt(), CollectiveError),
        (SystemExit(3), CollectiveError),
        (MemoryError("too large"), CollectiveError),
        (StopIteration(), CollectiveError),
    ]:

        def body(error: BaseException = raised) -> None:
            with processes.together("capture"):
                if rank == 1:
                    raise error

        error = caught(body)
        if rank == 1:
            assert error is raised
        else:
            assert type(error) is expected
            assert str(error).startswith("rank 1")
            assert str(raised) in str(error)
        in_step(processes)


def test_errors_of_weightproof_keep_their_class_on_the_other_ranks():
    run_world(classes_travel, 2)


def nested_bodies(rank: int, size: int) -> None:
    processes = joined(size)

    def body(*, handled: bool) -> None:
        with processes.together("outer"), contextlib.suppress(PolicyError if handled else ()):
            processes.gather("first", rank)
            with processes.together("middle"):
                with processes.together("inner"):
                    if rank == 1:
                        raise PolicyError("deep inside")
                processes.gather("never", rank)

    for _ in range(3):
        assert type(caught(lambda: body(handled=False))) is PolicyError
        in_step(processes)
        # All ranks have the error, so all may handle it alike and go on.
        assert caught(lambda: body(handled=True)) is None
        in_step(processes)


def test_an_error_that_all_ranks_have_passes_through_outer_bodies():
    run_world(nested_bodies, 2)


def translated(rank: int, size: int) -> None:
    processes = joined(size)

    def body() -> None:
        with processes.together("outer"):
            try:
                with processes.together("inner"):
                    if rank == 0:
                        raise OSError("disk full")
            except (OSError, CollectiveError) as error:
                processes.gather("clean up", rank)
                raise InputError(f"no room: {error}") from error

    for _ in range(3):
        error = caught(body)
        assert type(error) is InputError
        assert "disk full" in str(error)
        in_step(processes)


def test_an_error_may_be_translated_on_all_ranks():
    run_world(translated, 3)


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("cannot travel")


def not_at_arrival() -> None:
    raise TypeError("cannot arrive")


class ArrivesBadly:
    def __reduce__(self) -> Any:
        return not_at_arrival, ()


def bad_values(rank: int, size: int) -> None:
    processes = joined(size)
    error = caught(lambda: processes.gather("readings", Unpicklable() if rank == 1 else rank))
    assert type(error) is (TypeError if rank == 1 else CollectiveError)
    assert "cannot travel" in str(error)
    in_step(processes)
    error = caught(lambda: processes.broadcast("policy", Unpicklable()))
    assert type(error) is (TypeError if rank == 0 else CollectiveError)
    in_step(processes)
    error = caught(lambda: processes.gather("readings", ArrivesBadly() if rank == 1 else rank))
    assert type(error) is TypeError
    assert str(error) == "cannot arrive"
    in_step(processes)


def test_values_that_cannot_travel_are_an_error_on_every_rank():
    run_world(bad_values, 2)


def different_operations(rank: int, size: int) -> None:
    processes = joined(size)
    error = caught(lambda: processes.gather("restore" if rank == 1 else "baseline", rank))
    assert type(error) is CollectiveError
    for part in ("rank 0 at 'baseline'", "rank 1 at 'restore'", "rank 2 at 'baseline'"):
        assert part in str(error)
    assert error.ranks == (1,)
    in_step(processes)


def test_ranks_at_different_operations_are_named():
    run_world(different_operations, 3)


def random_failures(rank: int, size: int, seed: int) -> list[str]:
    processes = joined(size)
    shared, own = random.Random(seed), random.Random(f"{seed} {rank}")
    history = []
    for step in range(40):
        failing = {r for r in range(size) if shared.random() < 0.2}
        place = {r: shared.randrange(3) for r in failing}

        def body(step: int = step, place: dict[int, int] = place) -> None:
            with processes.together(f"step {step}"):
                for part in range(3):
                    time.sleep(own.choice([0, 0, 0.001, 0.004]))
                    if place.get(rank) == part:
                        raise ValueError(f"step {step}")
                    assert processes.gather(f"part {part}", (step, part)) == [(step, part)] * size

        error = caught(body)
        assert (error is not None) == bool(failing)
        history.append(type(error).__name__ if place.get(rank) == min(place.values(), default=None) else "")
        assert processes.gather("step done", step) == [step] * size
    return history


@pytest.mark.parametrize("seed", range(3))
def test_failures_at_random_times_never_bring_the_ranks_out_of_step(seed: int):
    results = run_world(random_failures, 3, seed)
    assert any("ValueError" in history for history in results)


# ---------------------------------------------------------------- a rank does not come


def one_rank_sleeps(rank: int, size: int) -> None:
    processes = joined(size, SHORT)
    processes.gather("first", rank)
    if rank == 1:
        time.sleep(2 * SHORT)
    started = time.monotonic()
    error = caught(lambda: processes.gather("second", rank))
    waited = time.monotonic() - started
    assert isinstance(error, CollectiveError)
    assert error.operation == "second"
    assert error.ranks == (1,)
    assert error.timed_out
    assert "rank 1 did not come to 'second' within 2 s (rank 1 was last seen at 'first')" in str(error)
    assert waited < SHORT / 2 if rank == 1 else SHORT <= waited < 2 * SHORT
    for action in (lambda: processes.sum("third", [torch.ones(1)]), lambda: processes.exchange("fourth", [], [])):
        started = time.monotonic()
        again = caught(action)
        assert str(again) == str(error)
        assert time.monotonic() - started < SHORT / 4
    body = caught(lambda: processes.together("fifth").__enter__())
    assert str(body) == str(error) == str(processes.lost)


def test_a_rank_that_sleeps_is_named_and_gets_the_same_error_on_arrival():
    run_world(one_rank_sleeps, 3)


def interrupted(rank: int, size: int) -> None:
    processes = joined(size)
    if rank == 1:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    if rank == 2:
        time.sleep(3.0)
    started = time.monotonic()
    error = caught(lambda: processes.gather("readings", rank))
    assert time.monotonic() - started < 2.5
    assert type(error) is (KeyboardInterrupt if rank == 1 else CollectiveError)
    if rank != 1:
        assert str(error) == "rank 1 failed in readings: KeyboardInterrupt: "
    in_step(processes)


def test_an_interrupt_while_waiting_reaches_the_other_ranks():
    run_world(interrupted, 3)


def some_attach(rank: int, size: int) -> None:
    if rank == 1:
        return
    started = time.monotonic()
    error = caught(lambda: Processes.join(SHORT))
    assert time.monotonic() - started < 2 * SHORT
    assert isinstance(error, CollectiveError)
    assert error.ranks == (1,)
    assert error.timed_out
    assert "rank 1 never came" in str(error)
    assert "attaching the guard on every rank" in str(error)


def test_a_guard_on_some_ranks_only_names_the_others():
    run_world(some_attach, 3)


def bad_limit(rank: int, size: int) -> None:
    assert dist.get_world_size() == size
    for timeout in (0.0, -1.0, float("inf"), float("nan")):
        assert isinstance(caught(lambda t=timeout: Processes.join(t)), InputError)
    in_step(joined(size))


def test_a_limit_must_be_a_number_of_seconds():
    run_world(bad_limit, 2)


# ---------------------------------------------------------------- a rank dies


def dies_before(rank: int, size: int, victim: int, how: str) -> str:
    processes = joined(size, SHORT)
    processes.gather("first", rank)
    if rank == victim:
        if how == "exit":
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    error = caught(lambda: processes.gather("second", rank))
    assert time.monotonic() - started < 2 * SHORT
    assert isinstance(error, CollectiveError)
    assert error.ranks == (victim,)
    assert error.operation == "second"
    assert type(caught(lambda: processes.gather("third", rank))) is CollectiveError
    return str(error)


@pytest.mark.parametrize("how", ["exit", "kill"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_is_named(victim: int, how: str):
    messages = run_world(dies_before, 3, victim, how, expect_dead={victim})
    for rank in {0, 1, 2} - {victim}:
        expected = "rank 0, which hosts it, has probably ended" if victim == 0 else "rank 1 did not come to 'second'"
        assert expected in messages[rank]


@contextlib.contextmanager
def replaced(name: str, substitute: Callable[..., Any]) -> Iterator[None]:
    original = getattr(dist, name)
    setattr(dist, name, substitute)
    try:
        yield
    finally:
        setattr(dist, name, original)


def dies_within(rank: int, size: int, victim: int, operation: str) -> str:
    rendezvous.SIGNS_OF_LIFE_SECONDS = 1.0
    processes = joined(size, 20.0)
    if rank == victim:
        for name in ("all_gather", "all_reduce", "batch_isend_irecv"):
            setattr(dist, name, lambda *_, **__: os._exit(1))
    actions: dict[str, Callable[[], Any]] = {
        "gather": lambda: processes.gather("payload", rank),
        "sum": lambda: processes.sum("payload", [torch.ones(1000)]),
        # A chain: rank 2 waits for rank 1, and rank 0 waits for rank 2 only.
        "exchange": lambda: processes.exchange(
            "payload",
            [((rank + 1) % size, torch.ones(100_000))] if rank != 2 else [],
            [((rank - 1) % size, torch.zeros(100_000))] if rank != 0 else [(2, torch.zeros(5))],
        ),
    }
    started = time.monotonic()
    error = caught(actions[operation])
    assert isinstance(error, CollectiveError)
    assert error.operation == "payload"
    assert error.ranks == (victim,)
    assert time.monotonic() - started < 15.0
    assert str(processes.lost) == str(error)
    assert str(caught(lambda: processes.gather("later", rank))) == str(error)
    return str(error)


@pytest.mark.parametrize("operation", ["gather", "sum", "exchange"])
def test_a_death_while_the_payload_moves_is_named(operation: str):
    messages = run_world(dies_within, 3, 1, operation, expect_dead={1})
    assert messages[0] == messages[2]
    assert "no sign of life from rank 1" in messages[0]


def test_the_death_of_the_host_of_the_store_while_the_payload_moves():
    messages = run_world(dies_within, 3, 0, "gather", expect_dead={0})
    assert all("rank 0, which hosts it, has probably ended" in message for message in messages[1:])


def death_of_a_sender(rank: int, size: int) -> str:
    rendezvous.SIGNS_OF_LIFE_SECONDS = 1.0
    processes = joined(size, 20.0)
    if rank == 1:
        dist.batch_isend_irecv = lambda *_, **__: os._exit(1)
    sends, receives = ([(2, torch.ones(9))] if rank == 1 else []), ([(1, torch.ones(9))] if rank == 2 else [])
    if rank == 0:
        processes.exchange("payload", sends, receives)
        time.sleep(2.5)
        return str(caught(lambda: processes.gather("next", rank)))
    return str(caught(lambda: processes.exchange("payload", sends, receives)))


def test_a_rank_that_has_its_payload_and_is_busy_is_not_accused():
    messages = run_world(death_of_a_sender, 3, expect_dead={1})
    assert messages[0] == messages[2]
    assert "(no sign of life from rank 1)" in messages[0]


def payload_breaks(rank: int, size: int) -> None:
    processes = joined(size, 5.0)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("network is unreachable")

    with replaced("all_gather", broken):
        error = caught(lambda: processes.gather("readings", rank))
    assert isinstance(error, CollectiveError)
    assert error.ranks == ()
    assert "all ranks still answer" in str(error)
    assert "network is unreachable" in str(error)
    assert str(caught(lambda: processes.gather("later", rank))) == str(error)


def test_a_broken_network_accuses_nobody():
    run_world(payload_breaks, 3)


def interrupted_payload(rank: int, size: int) -> None:
    processes = joined(size, SHORT)
    if rank == 1:
        with replaced("all_gather", lambda *_, **__: signal.raise_signal(signal.SIGINT)):
            error = caught(lambda: processes.gather("readings", rank))
        assert type(error) is KeyboardInterrupt
    else:
        error = caught(lambda: processes.gather("readings", rank))
        assert type(error) is CollectiveError
        assert str(error) == "rank 1 failed in readings: KeyboardInterrupt: "
    later = caught(lambda: processes.gather("later", rank))
    assert str(later) == "rank 1 failed in readings: KeyboardInterrupt: "


def test_an_interrupt_while_the_payload_moves_ends_it_everywhere():
    run_world(interrupted_payload, 2)


def frozen_host(rank: int, size: int) -> str | None:
    processes = joined(size, SHORT)
    pids = processes.gather("pids", os.getpid())
    if rank == 0:
        time.sleep(60)
        return None
    os.kill(pids[0], signal.SIGSTOP)
    started = time.monotonic()
    error = caught(lambda: processes.gather("readings", rank))
    waited = time.monotonic() - started
    os.kill(pids[0], signal.SIGKILL)
    assert isinstance(error, CollectiveError)
    assert error.ranks == (0,)
    assert waited < 3 * SHORT
    return str(error)


def test_a_frozen_host_of_the_store_does_not_hang_the_others():
    _, message = run_world(frozen_host, 2, expect_dead={0})
    assert "does not answer" in message
    assert "no answer within 2 s" in message


# ---------------------------------------------------------------- lifetimes


def many_operations(rank: int, size: int) -> None:
    processes = joined(size)
    store = _get_default_store()

    def fail() -> None:
        with processes.together("fails"):
            if rank == 0:
                raise ValueError

    def counted() -> int:
        in_step(processes)
        return processes.broadcast("keys", store.num_keys())

    before = counted()
    for _ in range(50):
        in_step(processes)
        assert caught(fail) is not None
        assert caught(fail) is not None
    assert counted() <= before + 1  # a rank may have come to the next meeting already


def test_keys_do_not_accumulate_in_the_store():
    run_world(many_operations, 2)


def several_sessions(rank: int, size: int) -> None:
    for number in range(3):
        first, second = joined(size), joined(size)
        error = caught(lambda p=first: p.gather("left" if rank else "right", 0))
        assert isinstance(error, CollectiveError)
        for processes in (second, first, second):
            assert processes.gather("number", (rank, number)) == [(r, number) for r in range(size)]
        first.close()
        in_step(second)
        later = caught(lambda p=first: p.gather("after its end", 0))
        assert isinstance(later, CollectiveError)
        assert "closed" in str(later)
        second.close()
        second.close()


def test_sessions_of_one_process_do_not_mix():
    run_world(several_sessions, 2)


def gone_at_once(rank: int, size: int) -> list[int]:
    processes = joined(size)
    totals = []
    for number in range(20):
        totals.append(int(processes.sum("last words", [torch.ones(50_000)])[0][number]))
        processes.close()
        processes = joined(size)
    return totals


def test_a_rank_may_close_as_soon_as_it_has_its_result():
    assert run_world(gone_at_once, 3) == [[3] * 20] * 3


def no_default_group(rank: int, size: int) -> None:
    assert dist.get_world_size() == size
    dist.destroy_process_group()
    processes = Processes.join()
    assert processes.size == 1
    assert processes.gather("alone", rank) == [rank]


def test_without_a_default_group_every_process_is_alone():
    run_world(no_default_group, 2)


def collective_error_travels(rank: int, size: int) -> None:
    processes = joined(size)
    sent = CollectiveError("gone", operation="x", ranks=(3,), timed_out=True)
    for received in [*processes.gather("errors", sent), pickle.loads(pickle.dumps(sent))]:
        assert (str(received), received.operation, received.ranks, received.timed_out) == ("gone", "x", (3,), True)


def test_a_collective_error_keeps_its_fields_on_the_way():
    run_world(collective_error_travels, 2)
