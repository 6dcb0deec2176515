"""Training health of several processes: each reads its share of the batches, and all get what one would."""

import torch
from architectures import build, example_inputs
from worlds import run_world

from weightproof import health
from weightproof.errors import InputError


def batches(count=8):
    found = [example_inputs("llama", batch=4, seed=seed) for seed in range(count)]
    return [{**one, "labels": one["input_ids"]} for one in found]


def report(rank, size):
    torch.set_num_threads(1)
    return health.diagnose(build("llama"), batches(), depth="skip").to_dict()


def failing(rank, size):
    model = build("llama")
    bad = batches()
    bad[1] = {"input_ids": torch.full((4, 8), 10_000)}  # read by rank 1
    try:
        health.diagnose(model, bad)
    except InputError as error:
        return str(error)
    return None


def test_two_processes_give_the_report_of_one():
    one = report(0, 1)
    assert run_world(report, 2) == [one, one]


def test_three_processes_share_eight_batches():
    one = report(0, 1)
    assert run_world(report, 3) == [one] * 3


def test_a_pass_that_fails_on_one_process_fails_on_all():
    found = run_world(failing, 2)
    assert all(found)
    assert all("forward failed" in one for one in found)
