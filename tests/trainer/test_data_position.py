"""Batches that are given again, or never again, whatever loader gives them."""

from __future__ import annotations

from collections import UserDict, namedtuple

import pytest
import torch
from accelerate import Accelerator
from tests.support.accelerate_loop import fresh_accelerate
from torch.utils.data import DataLoader, Dataset

from weightproof.errors import InputError
from weightproof_callbacks.data_position import BatchMemory, ReplayableLoader
from weightproof_callbacks.generator_state import GlobalDraws


class Noisy(Dataset):
    """Rows with noise from the global generator, as a random transform gives them."""

    def __init__(self, width=2):
        self.width = width

    def __len__(self):
        return 12

    def __getitem__(self, row):
        return {"row": torch.tensor(row), "noise": torch.randn(self.width)}


def rows(batches):
    return [batch["row"].tolist() for batch in batches]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


@pytest.fixture
def loader():
    return ReplayableLoader(DataLoader(torch.arange(6), batch_size=1))


def numbers(batches):
    return [int(batch) for batch in batches]


def test_batches_are_given_again_before_others(loader):
    stream = iter(loader)
    assert numbers(take(stream, 2)) == [0, 1]
    mark = loader.mark()
    assert numbers(take(stream, 2)) == [2, 3]
    assert loader.rewind() == 2
    assert loader.memory.position == mark.position == 2
    assert numbers(take(stream, 3)) == [2, 3, 4]
    assert loader.rewind(mark) == 3, "once more, with what was given since"
    assert numbers(stream) == [2, 3, 4, 5]
    assert numbers(loader) == list(range(6)), "the next pass is a whole one"


def test_skipped_batches_are_never_given_again(loader):
    stream = iter(loader)
    mark = loader.mark()
    take(stream, 2)
    assert loader.skip(mark) == 2
    assert numbers(take(stream, 1)) == [2]
    assert loader.rewind(mark) == 1, "what was skipped is no part of a later window"
    assert numbers(stream) == [2, 3, 4, 5]


def test_of_two_states_the_older_can_be_gone_back_to_and_the_newer_is_gone_then(loader):
    stream = iter(loader)
    older = loader.mark()
    take(stream, 2)
    newer = loader.mark()
    take(stream, 1)
    assert loader.rewind(newer) == 1
    take(stream, 2)
    assert loader.rewind(older) == 4
    with pytest.raises(InputError, match="there is no such position"):
        loader.rewind(newer)
    assert numbers(stream) == list(range(6))


def test_batches_are_remembered_only_for_living_marks(loader):
    stream = iter(loader)
    take(stream, 2)
    assert loader.memory.nbytes == 0
    mark = loader.mark()
    take(stream, 2)
    assert loader.memory.nbytes == 16
    del mark
    take(stream, 1)
    assert loader.memory.nbytes == 0
    with pytest.raises(InputError, match="there is no such position"):
        loader.rewind()


def test_too_much_to_remember_can_be_skipped_but_not_given_again():
    loader = ReplayableLoader(DataLoader(torch.arange(6), batch_size=1), max_bytes=16)
    stream, mark = iter(loader), loader.mark()
    take(stream, 3)
    with pytest.raises(InputError, match=r'more than 16 B of batches were given since\. Choose data="skip"'):
        loader.rewind()
    assert loader.skip(mark) == 3
    take(stream, 1)
    assert loader.rewind(mark) == 1
    assert numbers(stream) == [3, 4, 5]


def test_a_batch_that_was_written_into_is_not_given_again(loader):
    stream, mark = iter(loader), loader.mark()
    take(stream, 1)[0].add_(1)
    with pytest.raises(InputError, match="training wrote into one of them in place"):
        loader.rewind(mark)
    assert loader.memory.position == 1


Pair = namedtuple("Pair", "ids labels")


def test_containers_are_the_loops_own():
    """What a loop takes out of a batch is in it the second time."""
    batches = [{"ids": [torch.ones(1)], "pair": Pair(1, {"a": 2})}, UserDict(ids=torch.ones(1), more=(1, [2]))]
    loader = ReplayableLoader(batches)
    stream, mark = iter(loader), loader.mark()
    first, second = take(stream, 2)
    first["ids"].append(0)
    first["pair"].labels.clear()
    del second["ids"]
    loader.rewind(mark)
    first, second = take(stream, 2)
    assert (len(first["ids"]), first["pair"].labels, type(first["pair"])) == (1, {"a": 2}, Pair)
    assert (set(second), second["more"]) == ({"ids", "more"}, (1, [2]))


def test_what_fetching_drew_is_drawn_again():
    torch.manual_seed(0)
    loader = ReplayableLoader(DataLoader(Noisy(), batch_size=2, shuffle=True))
    mark, draws = loader.mark(), GlobalDraws.now()
    stream = iter(loader)
    first = [(batch["noise"], torch.rand(1)) for batch in take(stream, 3)]
    draws.put_back()
    loader.rewind(mark)
    again = [(batch["noise"], torch.rand(1)) for batch in take(stream, 3)]
    assert all(
        torch.equal(a, b) for one, other in zip(first, again, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_it_is_said_when_what_fetching_drew_cannot_be_drawn_again(caplog):
    torch.manual_seed(0)
    loader = ReplayableLoader(DataLoader(Noisy(width=20), batch_size=12))
    mark, stream = loader.mark(), iter(loader)
    (first,) = take(stream, 1)
    torch.randn(7)  # the generators stand elsewhere than before the first time
    loader.rewind(mark)
    (again,) = take(stream, 1)
    assert torch.equal(first["noise"], again["noise"]), "the batch is the same one"
    assert "the generators stand elsewhere" in caplog.text


def test_it_is_the_loader_in_everything_else():
    fresh_accelerate()
    prepared = Accelerator(cpu=True).prepare(DataLoader(Noisy(), batch_size=5, shuffle=True))
    loader = ReplayableLoader(prepared)
    assert len(loader) == 3
    assert loader.batch_sampler is prepared.batch_sampler
    assert loader.dataset is prepared.dataset
    loader.set_epoch(4)
    assert prepared.iteration == 4
    with pytest.raises(InputError, match="can be iterated over once only"):
        ReplayableLoader(iter(prepared))
    with pytest.raises(InputError, match="max_bytes must be positive"):
        BatchMemory(0)


def ends(accelerator, stream, count):
    """(row, whether accelerate sees the end of the epoch there)."""
    found = []
    for _ in range(count):
        batch = next(stream)
        found.append((int(batch["row"][0]), accelerator.gradient_state.end_of_dataloader))
    return found


def test_accumulation_sees_the_end_of_an_epoch_where_it_was():
    """accelerate steps at the last batch of an epoch, also in the middle of an accumulation."""
    fresh_accelerate()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = ReplayableLoader(accelerator.prepare(DataLoader(Noisy(), batch_size=4)))
    mark, stream = loader.mark(), iter(loader)
    first = ends(accelerator, stream, 3)
    assert first == [(0, False), (4, False), (8, True)]
    loader.rewind(mark)
    assert ends(accelerator, stream, 3) == first
    assert list(stream) == []
    assert not accelerator.gradient_state.in_dataloader

    loader.rewind(mark)  # between two passes
    stream = iter(loader)
    assert ends(accelerator, stream, 3) == first
    assert ends(accelerator, stream, 3) == first
    assert list(stream) == []
    assert not accelerator.gradient_state.in_dataloader


def test_a_loop_that_counts_steps_gets_the_stream_that_it_would_have_had():
    """As `Trainer` does: it begins the next pass after as many batches as one has, whatever was given twice."""
    fresh_accelerate()
    own = torch.Generator()
    loader = DataLoader(torch.arange(4), batch_size=1, shuffle=True, generator=own)
    prepared = Accelerator(cpu=True).prepare(loader)

    def run(*rewind_after):
        own.manual_seed(3)
        memory, found = BatchMemory(), []
        mark = memory.mark()
        for epoch in range(4):
            prepared.set_epoch(epoch)
            iterator = iter(prepared)
            for _ in range(4):
                found.append(int(next(memory.over(iterator, prepared))))
                if len(found) in rewind_after:
                    memory.rewind(mark)
                    mark = memory.mark()
        return found

    undisturbed = run()
    assert sorted(undisturbed[4:8]) == [0, 1, 2, 3]
    assert undisturbed[:4] != undisturbed[4:8]
    assert run(3) == (undisturbed[:3] + undisturbed)[:16]
    assert run(4) == (undisturbed[:4] + undisturbed)[:16]
    assert run(3, 10) == (undisturbed[:3] + undisturbed[:7] + undisturbed)[:16]
