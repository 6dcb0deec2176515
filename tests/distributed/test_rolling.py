"""Two processes: a fault on one or on both is taken back on both, and the run equals its twin on each."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from tests.support.accelerate_loop import fresh_accelerate
from tests.support.trainer_runs import ROWS, trainer_of
from tests.support.twins import FAULTS, differences, whole_state
from tests.trainer.markov import Chains, tiny_llama
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback
from worlds import run_world

from weightproof import attach
from weightproof.errors import InputError
from weightproof_callbacks.trainer import GuardCallback
from weightproof_callbacks.training_state import ReplayableLoader

EVERY, FAULT_AT, STEPS = 5, 12, 20


def in_order(without=(), rows=40 * ROWS):
    return Subset(Chains(rows, seed=1), [row for row in range(rows) if row // ROWS not in without])


def rejected(guard):
    return [(step.step, step.record.params["back_to_step"]) for step in guard.history if step.applied != "kept"]


# ---- a loop on Accelerate -------------------------------------------------------------------------------------------


def loop(size, *, steps, fault=None, victims=(), without=(), rank=0, **options):
    fresh_accelerate()
    accelerator = Accelerator(cpu=True)
    assert dist.get_world_size() == accelerator.num_processes == size
    model = tiny_llama(dropout=0.1)
    inner = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 1.0 / (1.0 + 0.02 * step))
    data = DataLoader(in_order(without), batch_size=ROWS // size)
    model, optimizer, data, schedule = accelerator.prepare(model, inner, data, schedule)
    torch.manual_seed(rank)  # each process has draws of its own
    guard = attach(accelerator, model, optimizer, every=EVERY, **options) if options is not None and fault else None
    batches = iter(data)
    for step in range(1, steps + 1):
        accelerator.backward(model(**next(batches)).loss)
        if fault == "nan-gradient" and step == FAULT_AT and rank in victims:
            accelerator.unwrap_model(model).lm_head.weight.grad[2] = math.nan
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if fault in FAULTS and step == FAULT_AT and rank in victims:
            FAULTS[fault](accelerator.unwrap_model(model), optimizer)
    state = whole_state(accelerator.unwrap_model(model), optimizer, schedule)
    if guard is not None:
        guard.detach()
    return guard, state


def loop_and_twin(rank, size, fault, victims):
    guard, found = loop(size, steps=STEPS, fault=fault, victims=victims, rank=rank)
    _, twin = loop(size, steps=STEPS - EVERY, without=range(10, 15), rank=rank)
    return rejected(guard), differences(found, twin)


@pytest.mark.parametrize(
    ("fault", "victims"),
    [("broken-moments", (0, 1)), ("broken-moments", (1,)), ("frozen-weight", (0, 1)), ("nan-gradient", (1,))],
)
def test_a_loop_is_taken_back_on_every_process_and_equals_its_twin(fault, victims):
    """A gradient that is NaN on one process alone, after averaging: its copy is left behind, and found."""
    for found in run_world(loop_and_twin, 2, fault, victims):
        assert found == ([(15, 10)], [])


def goes_on_from_disk(rank, size, folder):
    """Trains to step 13, is gone without a word, and begins again; 8 shuffled batches a pass."""

    def run(begins, ends, folder):
        fresh_accelerate()
        accelerator = Accelerator(cpu=True)
        model = tiny_llama(dropout=0.1)
        inner = torch.optim.AdamW(model.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 1.0 / (1.0 + 0.02 * step))
        data = DataLoader(Chains(8 * ROWS, seed=1), batch_size=ROWS // size, shuffle=True)
        model, optimizer, data, schedule = accelerator.prepare(model, inner, data, schedule)
        torch.manual_seed(rank + (100 if begins else 0))  # wherever the generators of the new process stand
        data, guard = ReplayableLoader(data), None
        if folder is not None:
            guard = attach(accelerator, model, optimizer, every=EVERY, snapshot_dir=folder, loader=data)
            assert guard.step == begins
        step, seen = begins, []
        while step < ends:
            for batch in data:
                seen.append(batch["input_ids"].sum().item())
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                step += 1
                if step == ends:
                    break
        state = whole_state(accelerator.unwrap_model(model), optimizer, schedule)
        if guard is not None:
            guard._release()  # nothing is judged, saved or said
        return seen, state

    twin_seen, twin = run(0, 20, None)
    run(0, 13, folder)
    seen, found = run(10, 20, folder)
    return seen == twin_seen[10:], differences(found, twin)


def test_a_loop_of_two_processes_goes_on_from_disk_as_if_it_had_never_been_killed(tmp_path):
    assert run_world(goes_on_from_disk, 2, tmp_path) == [(True, [])] * 2


# ---- Trainer --------------------------------------------------------------------------------------------------------


class Fault(TrainerCallback):
    def __init__(self, rank):
        self.rank = rank

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if (state.global_step, args.process_index) == (FAULT_AT, self.rank):
            FAULTS["poisoned-moments"](model, optimizer)


class Seen(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        if state.global_step == self.step:
            self.state = whole_state(model, optimizer, lr_scheduler)


def trained(size, folder, callbacks, without=()):
    settings = {"steps": STEPS, "lr_scheduler_type": "cosine", "train_sampling_strategy": "sequential"}
    trainer = trainer_of(size, folder, callbacks, model=tiny_llama(dropout=0.1), **settings)
    trainer.train_dataset = in_order(without)
    trainer.train()


def trainer_and_twin(rank, size, folder):
    guard, found, twin = GuardCallback(every=EVERY), Seen(STEPS), Seen(STEPS - EVERY)
    trained(size, folder / "guarded", [Fault(1), guard, found])
    trained(size, folder / "twin", [twin], without=range(10, 15))
    return rejected(guard), differences(found.state, twin.state)


def test_a_trainer_run_is_taken_back_on_every_process_and_equals_its_twin(tmp_path):
    for found in run_world(trainer_and_twin, 2, tmp_path):
        assert found == ([(15, 10)], [])


# ---- options --------------------------------------------------------------------------------------------------------


def other_options(rank, size):
    with pytest.raises(InputError) as caught:
        loop(size, steps=1, fault="none", rank=rank, max_rollbacks=3 + rank)
    return str(caught.value)


def test_options_must_be_the_same_on_every_process():
    first, second = run_world(other_options, 2)
    assert first == second
    assert "guard's max_rollbacks: not the same on every process (rank 0 has 3, rank 1 has 4)" in first
