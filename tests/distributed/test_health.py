"""Training health of several processes: each reads its share of the batches, and all get what one would."""

from pathlib import Path

import pytest
import torch
from architectures import build, example_inputs
from tests.support.chains import Chains
from torch.distributed.fsdp import fully_shard
from trainer_runs import trainer_of
from worlds import run_world

from weightproof import HealthCallback, health
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


def sharded(rank, size):
    torch.set_num_threads(1)
    model = build("llama")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    first = health.diagnose(model, batches(), depth="skip", digest=False).to_dict()
    again = health.diagnose(model, batches(), depth="skip", digest=False).to_dict()
    # A training step afterwards works as before.
    model(**batches()[0]).loss.backward()
    return first, first == again, all(one.grad is not None for one in model.parameters())


def test_sharded_weights_give_the_same_report():
    plain = health.diagnose(build("llama"), batches(), depth="skip", digest=False).to_dict()
    for found, steady, trains in run_world(sharded, 2, timeout=120):
        assert steady
        assert trains
        assert found["overall"] == plain["overall"]
        for key in ("residual_norms", "bp_grad_norms", "cross_batch"):
            assert found[key] == pytest.approx(plain[key], rel=1e-4)


def trained(rank, size, folder, watched):
    """A DDP run; the weights it ends with, and what was reported."""
    torch.set_num_threads(1)
    callback = HealthCallback(Chains(64, seed=2), every=4, rows=4)
    trainer = trainer_of(size, Path(folder) / f"{watched}", [callback] if watched else [], steps=8)
    trainer.train()
    total = sum(float(one.detach().double().sum()) for one in trainer.model.parameters())
    return total, [(one.provenance.step, one.to_dict()["residual_norms"]) for one in callback.reports]


def test_a_data_parallel_run_is_not_disturbed_and_reports_the_same_on_both(tmp_path):
    (total, reports), (other_total, other_reports) = run_world(trained, 2, str(tmp_path), True, timeout=120)
    [(plain, _), _] = run_world(trained, 2, str(tmp_path), False, timeout=120)
    assert total == other_total == plain
    assert reports == other_reports
    assert [step for step, _ in reports] == [0, 4, 8]
    assert len((tmp_path / "True" / "weightproof" / "health.jsonl").read_text().splitlines()) == 3
