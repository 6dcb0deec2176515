"""Two processes (DDP): a loader that slips ends the run alike on both; what loaders do on purpose never does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from tests.support.accelerate_loop import fresh_accelerate
from tests.support.chains import Chains, tiny_llama
from tests.support.trainer_runs import ended, trainer_of
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from worlds import run_world

from weightproof import GuardCallback, attach
from weightproof.errors import EditRejectedError
from weightproof.testing import faults, inject

EVERY = 4


class Streamed(torch.utils.data.IterableDataset):
    """A few rows, again and again: nobody can tell where it begins anew."""

    def __init__(self, rows: int):
        self.rows = Chains(rows, seed=1)

    def __iter__(self):
        while True:
            yield from (self.rows[i] for i in range(len(self.rows)))


def data_of(kind: str) -> tuple[Dataset, int]:
    """Data and rows of a batch."""
    whole = Chains(96, seed=1)
    return {
        "plain": (whole, 4),
        "a pass of one batch": (Subset(whole, range(8)), 4),
        "uneven": (Subset(whole, range(27)), 4),
        "single rows": (whole, 1),
        "every row twice": (ConcatDataset([whole, whole]), 4),
        "streamed": (Streamed(10), 4),
    }[kind]


def guarded_loop(rank, size, kind, steps, fault=None, **loading):
    """(judged windows, error, what was said) of a loop; it goes over its data as often as it must."""
    fresh_accelerate()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("weightproof").addHandler(handler)
    shuffle = loading.pop("shuffle", False)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**loading))
    dataset, rows = data_of(kind)
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(dataset, batch_size=rows, shuffle=shuffle)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    injection = inject([] if fault is None else [fault], model, optimizer)
    batches = injection.loader(loader)
    error, done = None, 0
    with injection, attach(accelerator, model, optimizer, every=EVERY, trackers=[]) as guard:
        try:
            while done < steps:
                for batch in batches:
                    accelerator.backward(model(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    done += 1
                    if done == steps:
                        break
        except EditRejectedError as raised:
            error = str(raised)
    logging.getLogger("weightproof").removeHandler(handler)
    windows = [(step.step, str(step.decision.action), step.applied) for step in guard.history]
    return windows, error, said


@pytest.mark.parametrize("at", [6, 8])  # within a window, and the last batch of one
def test_a_loader_that_slips_on_one_rank_stops_both_with_the_last_good_state_in_place(at):
    first, second = run_world(guarded_loop, 2, "plain", 16, faults.LoaderSkew(at=at, rank=1))
    found = 8 if at == 6 else 12
    assert first[:2] == second[:2]
    assert first[0][-1] == (found, "HALT", "restored")
    assert f"training stopped at step {found}" in first[1]
    assert f"batch {at} of rank 1 is batch {at - 1} of rank 1 again" in first[1]


def healthy(rank, size, runs):
    return [guarded_loop(rank, size, *one, **loading) for one, loading in runs]


def test_what_loaders_do_on_purpose_stops_nothing():
    steps = 3 * EVERY
    runs = [
        (("plain", steps), {}),
        (("plain", steps), {"shuffle": True}),
        (("plain", steps), {"dispatch_batches": True}),
        (("plain", steps), {"split_batches": True}),
        (("a pass of one batch", steps), {}),
        (("uneven", steps), {}),
        (("uneven", steps), {"even_batches": True, "shuffle": True}),
        (("every row twice", 26), {}),
        (("streamed", steps), {"dispatch_batches": False}),
        (("single rows", steps), {}),
    ]
    first, second = run_world(healthy, 2, runs, timeout=180.0)
    for run, (windows, error, _), (theirs, _, _) in zip(runs, first, second, strict=True):
        assert error is None, run
        assert {action for _, action, _ in windows} == {"KEEP"}, run
        assert windows == theirs, run


def test_a_single_row_that_comes_again_is_said_and_not_acted_on():
    (windows, error, said), (_, _, nothing) = run_world(
        guarded_loop, 2, "single rows", 12, faults.LoaderSkew(at=6, rank=1)
    )
    assert error is None
    assert {action for _, action, _ in windows} == {"KEEP"}
    assert sum("batch 6 of rank 1 is batch 5 of rank 1 again" in one for one in said) == 1
    assert nothing == [], "rank 0 speaks for all"


def unsharded(rank, size):
    """Every process iterates over a loader of its own."""
    fresh_accelerate()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("weightproof").addHandler(handler)
    accelerator = Accelerator(cpu=True)
    model = tiny_llama()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    with attach(accelerator, model, optimizer, every=EVERY, trackers=[]) as guard:
        for batch in [*DataLoader(Chains(32, seed=1), batch_size=4)][:8]:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    return [str(step.decision.action) for step in guard.history], said


def test_a_loader_that_nobody_sharded_is_said_once():
    (actions, said), _ = run_world(unsharded, 2)
    assert actions == ["KEEP", "KEEP"]
    assert sum("every process is given the same batches" in one for one in said) == 1


# ---- Trainer --------------------------------------------------------------------------------------------------------


class Slipping(Dataset):
    """Rows of which some were read wrongly: those of rank 1's second step are those of its first again."""

    def __init__(self, rank: int):
        self.rows, self.rank = Chains(256, seed=1), rank

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        # Batches of 8 rows go to the ranks in turn: rank 1 has rows 8 to 15, then 24 to 31.
        return self.rows[index - 16 if self.rank == 1 and 24 <= index < 32 else index]


def trainer_run(rank, size, folder, slips):
    guard = GuardCallback(every=EVERY)
    trainer = trainer_of(size, folder, [guard], steps=8, train_sampling_strategy="sequential")
    trainer.train_dataset = Slipping(rank) if slips else Chains(256, seed=1)
    return ended(trainer, guard)


@pytest.mark.parametrize("slips", [False, True])
def test_a_trainer_stops_alike_on_both_where_batches_come_again(tmp_path, slips):
    first, second = run_world(trainer_run, 2, tmp_path, slips)
    assert first["decisions"] == second["decisions"]
    assert first["digests"] == second["digests"]
    actions = [(step, action) for step, _, action, _ in first["decisions"]]
    assert actions == ([(4, "HALT")] if slips else [(4, "KEEP"), (8, "KEEP")])
    assert first["flags"][0] or not slips
    assert not slips or "batch 2 of rank 1 is batch 1 of rank 1 again" in first["reasons"][0]


# ---- generators -----------------------------------------------------------------------------------------------------


def resumed(rank, size, folder):
    fresh_accelerate()
    accelerator = Accelerator(cpu=True)
    model = tiny_llama()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    torch.manual_seed(100 + rank)  # ranks may differ
    with attach(accelerator, model, optimizer, every=EVERY, trackers=[]) as guard:
        accelerator.save_state(folder)
        held = torch.get_rng_state()
        accelerator.wait_for_everyone()
        if rank == 1:
            (Path(folder) / "random_states_1.pkl").unlink()
        torch.manual_seed(0)
        accelerator.load_state(folder)
        return guard.put_back, torch.equal(torch.get_rng_state(), held)


def test_a_rank_whose_generators_a_resume_forgets_is_named_on_both_and_has_them_again(tmp_path):
    for found in run_world(resumed, 2, str(tmp_path)):
        assert found == (("torch CPU of rank 1",), True)
