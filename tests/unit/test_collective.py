"""One process by itself, the dealing of work, and what is written into the store."""

from __future__ import annotations

import itertools
import math
import pickle
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import FileStore, HashStore, PrefixStore, Store, TCPStore

from weightproof.collective import Processes, deal
from weightproof.errors import CollectiveError, InputError, PolicyError
from weightproof.parallel.rendezvous import Rendezvous
from weightproof.parallel.timed_store import TimedStore

# ---------------------------------------------------------------- one process


def test_without_torch_distributed_a_process_is_alone():
    processes = Processes.join(timeout=3.0)
    assert (processes.rank, processes.size, processes.is_main, processes.lost) == (0, 1, True, None)


def test_alone_every_operation_returns_what_it_got():
    processes = Processes.alone()
    value, tensors = object(), [torch.ones(2), torch.zeros(0, dtype=torch.bool)]
    assert processes.gather("reading", value) == [value]
    assert processes.gather("reading", value)[0] is value
    assert processes.broadcast("decision", value) is value
    assert all(mine is theirs for mine, theirs in zip(processes.sum("sum", tensors), tensors, strict=True))
    with processes.together("edit"):
        pass
    processes.close()
    assert processes.gather("after close", 1) == [1]
    assert processes.bytes_sent == 0


def test_alone_a_message_to_itself_is_copied():
    processes, target = Processes.alone(), torch.zeros(2, 3)
    processes.exchange("parts", [(0, torch.arange(6.0).view(3, 2).t()), (0, torch.ones(0))], [(0, target)])
    assert target.tolist() == [[0, 2, 4], [1, 3, 5]]
    assert processes.bytes_sent == 0


@pytest.mark.parametrize(
    ("sends", "receives", "message"),
    [
        ([(1, torch.ones(1))], [], "send 0 is with rank 1; there are ranks 0 to 0"),
        ([], [(-1, torch.ones(1))], "receive 0 is with rank -1"),
        ([(0, torch.ones(2))], [(0, torch.ones(3))], "rank 0 sends 1 tensors to itself"),
        ([(0, torch.ones(2))], [], "rank 0 sends 1 tensors to itself"),
        ([], [(0, torch.ones(2, 2).t())], "receive 0, of shape \\(2, 2\\), is not contiguous"),
    ],
)
def test_messages_that_cannot_be_are_refused(sends: Any, receives: Any, message: str):
    with pytest.raises(InputError, match=message):
        Processes.alone().exchange("parts", sends, receives)


@pytest.mark.parametrize("error", [ValueError("mine"), PolicyError("mine"), KeyboardInterrupt(), StopIteration()])
def test_alone_errors_pass_as_they_are(error: BaseException):
    def body() -> None:
        with Processes.alone().together("edit"):
            raise error

    with pytest.raises(type(error)) as caught:
        body()
    assert caught.value is error
    assert not vars(error)


def test_a_collective_error_survives_pickling():
    error = pickle.loads(pickle.dumps(CollectiveError("rank 1 died", operation="gather", ranks=(1,), timed_out=True)))
    assert (str(error), error.operation, error.ranks, error.timed_out) == ("rank 1 died", "gather", (1,), True)


# ---------------------------------------------------------------- dealing


@pytest.mark.parametrize(
    ("costs", "size", "owners"),
    [
        ([], 3, []),
        ([7.0], 1, [0]),
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 1, 0, 1]),
        ([5.0, 4.0, 3.0, 3.0], 2, [0, 1, 1, 0]),
        ([1.0, 2.0, 3.0], 5, [2, 1, 0]),
        ([0.0, 0.0, 9.0], 2, [1, 1, 0]),
        ([7, 6, 5, 4, 3], 2, [0, 1, 1, 0, 0]),
    ],
)
def test_the_longest_item_goes_first_to_the_least_busy_rank(costs: list[float], size: int, owners: list[int]):
    assert deal(costs, size) == owners


@given(st.lists(st.integers(0, 50), max_size=7), st.integers(1, 3))
def test_no_rank_works_longer_than_grahams_bound(costs: list[int], size: int):
    def busiest(owners: Any) -> int:
        return max(
            sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)
        )

    best = min(busiest(owners) for owners in itertools.product(range(size), repeat=len(costs)))
    owners = deal(costs, size)
    assert all(0 <= owner < size for owner in owners)
    assert 3 * size * busiest(owners) <= (4 * size - 1) * best
    assert owners == deal(costs, size)


@pytest.mark.parametrize(
    ("costs", "size", "message"),
    [
        ([1.0], 0, "not to 0"),
        ([1.0, -1.0], 2, "item 1 costs -1.0"),
        ([math.nan], 2, "item 0 costs nan"),
        ([math.inf], 2, "item 0 costs inf"),
    ],
)
def test_work_that_cannot_be_dealt_is_refused(costs: list[float], size: int, message: str):
    with pytest.raises(InputError, match=message):
        deal(costs, size)


# ---------------------------------------------------------------- meetings in any store


@pytest.fixture(params=["hash", "file", "tcp"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> list[Store]:
    """One client of the same store for each of three ranks."""
    if request.param == "hash":
        shared = HashStore()
        return [PrefixStore("test", shared) for _ in range(3)]
    if request.param == "file":
        return [FileStore(str(tmp_path / "store"), 3) for _ in range(3)]
    host = TCPStore("127.0.0.1", 0, 3, is_master=True, wait_for_workers=False)
    return [host, *(TCPStore("127.0.0.1", host.port, 3, is_master=False) for _ in range(2))]


def everywhere(stores: list[Store], timeout: float, life: Callable[[Rendezvous], Any]) -> list[Any]:
    """Run `life` as three ranks, each in a thread; what it returns or raises, by rank."""

    def live(rank: int) -> Any:
        try:
            return life(Rendezvous(stores[rank], rank, 3, timeout))
        except (CollectiveError, PolicyError) as error:
            return error

    with ThreadPoolExecutor(3) as threads:
        return list(threads.map(live, range(3)))


def test_ranks_meet_and_exchange_notes(stores: list[Store]):
    def life(meetings: Rendezvous) -> list[list[str]]:
        return [meetings.meet(f"meeting {number}", f"{meetings.rank}/{number}") for number in range(5)]

    expected = [[f"{rank}/{number}" for rank in range(3)] for number in range(5)]
    assert everywhere(stores, 20.0, life) == [expected] * 3


def test_a_failure_is_met_at_the_next_meeting_and_then_all_go_on(stores: list[Store]):
    def life(meetings: Rendezvous) -> Any:
        for number in range(3):
            if meetings.rank == number:
                meetings.tell("edit", PolicyError("no such tier"))
            else:
                with pytest.raises(PolicyError, match=f"rank {number}: no such tier"):
                    meetings.meet("somewhere")
        return meetings.meet("afterwards", str(meetings.rank))

    assert everywhere(stores, 20.0, life) == [["0", "1", "2"]] * 3


def test_who_does_not_come_is_named(stores: list[Store]):
    late = threading.Event()

    def life(meetings: Rendezvous) -> Any:
        meetings.meet("first")
        if meetings.rank == 2:
            late.wait(20.0)
        try:
            return meetings.meet("second")
        finally:
            late.set()

    errors = everywhere(stores, 0.5, life)
    assert {str(error) for error in errors} == {str(errors[0])}
    assert all(isinstance(error, CollectiveError) and error.timed_out and error.ranks == (2,) for error in errors)
    assert "rank 2 did not come to 'second' within 0.5 s (rank 2 was last seen at 'first')" in str(errors[0])


def test_who_comes_last_and_stops_before_it_says_so_is_among_those_named(stores: list[Store]):
    waiting = threading.Barrier(3)

    def life(meetings: Rendezvous) -> Any:
        waiting.wait(20.0)
        if meetings.rank == 2:
            time.sleep(0.2)
            verdict = meetings._verdict
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(meetings, "_verdict", lambda at: (time.sleep(1.5), verdict(at))[1])
                return meetings.meet("first")
        return meetings.meet("first")

    errors = everywhere(stores, 0.8, life)
    assert {str(error) for error in errors} == {str(errors[0])}
    assert all(isinstance(error, CollectiveError) and error.timed_out and 2 in error.ranks for error in errors)
    assert "all ranks came, but the last of them (one of ranks " in str(errors[0])


def test_a_lost_payload_names_who_gives_no_sign_of_life(stores: list[Store]):
    def life(meetings: Rendezvous) -> Any:
        meetings.meet("payload")
        if meetings.rank == 0:
            meetings.finished("payload")  # has all it needs, and computes for long
            return None
        if meetings.rank == 1:
            return None
        raise meetings.lose("payload", RuntimeError("connection closed"))

    *_, error = everywhere(stores, 0.5, life)
    assert isinstance(error, CollectiveError)
    assert error.ranks == (1,)
    assert not error.timed_out
    assert str(error) == "payload: the connection between ranks broke (no sign of life from rank 1): connection closed"


def test_who_wakes_up_after_a_payload_timed_out_is_named(stores: list[Store]):
    cause = RuntimeError("[buffer.cc:81] Timed out waiting 500ms for recv operation to complete")

    def life(meetings: Rendezvous) -> Any:
        meetings.meet("payload")
        if meetings.rank == 0:
            raise meetings.lose("payload", cause)
        if meetings.rank == 1:
            time.sleep(1.5)
            raise meetings.lose("payload", RuntimeError("Connection closed by peer"))
        raise meetings.lose("payload", RuntimeError("Connection closed by peer"))  # by rank 0, which gave up first

    errors = everywhere(stores, 20.0, life)
    assert {str(error) for error in errors} == {str(errors[0])}
    assert all(isinstance(error, CollectiveError) and error.timed_out and error.ranks == (1,) for error in errors)
    assert "no sign of life from rank 1): Timed out waiting 500ms" in str(errors[0])


def test_an_interrupt_after_the_meeting_took_place_is_met_at_the_next_one(stores: list[Store]):
    def life(meetings: Rendezvous) -> Any:
        if meetings.rank == 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(meetings, "_forget_older", lambda: signal.default_int_handler(signal.SIGINT, None))
                with pytest.raises(KeyboardInterrupt):
                    meetings.meet("first")
        else:
            assert meetings.meet("first") == ["", "", ""]
            with pytest.raises(CollectiveError, match="rank 1 failed in first: KeyboardInterrupt"):
                meetings.meet("second")
        return meetings.meet("third", str(meetings.rank))

    assert everywhere(stores, 20.0, life) == [["0", "1", "2"]] * 3


def test_a_payload_that_broke_because_a_rank_left_it_is_lost(stores: list[Store]):
    def life(meetings: Rendezvous) -> Any:
        meetings.meet("payload")
        if meetings.rank == 1:
            meetings.tell("edit", PolicyError("no such tier"))
            return True
        with pytest.raises(PolicyError, match="rank 1: no such tier"):
            raise meetings.lose("payload", RuntimeError("connection closed"))
        return meetings.lost is not None

    assert everywhere(stores, 0.5, life) == [True] * 3


def test_a_store_that_does_not_answer_is_given_up_at_the_limit():
    released = threading.Event()
    store = TimedStore(HashStore(), 0.2)
    with pytest.raises(RuntimeError, match=r"no answer within 0\.2 s"):
        store.ask(lambda _: released.wait(20.0))
    released.set()
    assert store.ask(lambda held: held.add("count", 2)) == 2
    with pytest.raises(ValueError, match="from the request"):
        store.ask(_refuse)


def _refuse(_: Store) -> None:
    raise ValueError("from the request")


def test_the_thread_of_a_store_ends_with_it_and_keeps_it_not_alive():
    before = set(threading.enumerate())
    store = TimedStore(HashStore(), 5.0)
    assert store.ask(lambda held: held.add("count", 1)) == 1
    (thread,) = set(threading.enumerate()) - before
    del store
    thread.join(5.0)
    assert not thread.is_alive()
