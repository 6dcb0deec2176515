"""A loop on Accelerate that suffers a fault and is taken back equals, bit for bit, the loop that never suffered it."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import re

import pytest
import torch
from accelerate import Accelerator
from tests.support.accelerate_loop import LR, fresh_accelerate
from tests.support.chains import Chains, tiny_llama
from tests.support.twins import FAULTS, differences, whole_state
from torch.utils.data import DataLoader, Subset

from weightproof import attach
from weightproof.errors import EditRejectedError, InputError, RestoreError, SnapshotError
from weightproof.folders.files import DISK
from weightproof.snapshots.manifest import Manifest
from weightproof.snapshots.tensor_files import object_name
from weightproof.testing import faults, inject
from weightproof_callbacks.state_size import _moments
from weightproof_callbacks.training_state import ReplayableLoader

EVERY, FAULT_AT, STEPS, ROWS = 5, 32, 45, 16
OPTIMIZERS = {
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=LR, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=LR, fused=True),
}


class Loop:
    """Model with dropout, optimizer, falling learning rate, and rows in their order without some batches."""

    def __init__(
        self, *, without=(), optimizer="foreach", replayable=False, dtype=torch.float32, dropout=0.1, rows=64 * ROWS,
        shuffle=False,
    ):  # fmt: skip
        fresh_accelerate()
        self.accelerator = Accelerator(cpu=True)
        model = tiny_llama(dropout=dropout).to(dtype)
        inner = OPTIMIZERS[optimizer](model.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 1.0 / (1.0 + 0.02 * step))
        data = Subset(Chains(rows, seed=1), [row for row in range(rows) if row // ROWS not in without])
        self.model, self.optimizer, self.data, self.schedule = self.accelerator.prepare(
            model, inner, DataLoader(data, batch_size=ROWS, shuffle=shuffle), schedule
        )
        if replayable:
            self.data = ReplayableLoader(self.data)
        self.steps = 0
        self.seen = []
        self._batches = self._endless()

    def _endless(self):
        while True:
            for batch in self.data:
                self.seen.append(batch["input_ids"].sum().item())
                yield batch

    def run(self, until, *, before=None, after=None):
        """Train up to a step; `before(n)` between backward pass and the n-th step, `after(n)` at its very end."""
        while self.steps < until:
            self.accelerator.backward(self.model(**next(self._batches)).loss)
            if before is not None:
                before(self.steps + 1)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.steps += 1
            if after is not None:
                after(self.steps)

    def state(self):
        return whole_state(self.accelerator.unwrap_model(self.model), self.optimizer, self.schedule)

    def guarded(self, **options):
        if isinstance(self.data, ReplayableLoader):
            options.setdefault("loader", self.data)
        return attach(self.accelerator, self.model, self.optimizer, every=EVERY, **options)


def faulty(loop, fault, *steps):
    return lambda step: FAULTS[fault](loop.model, loop.optimizer) if step in steps else None


def rejected(guard):
    return [(step.step, step.record.params["back_to_step"]) for step in guard.history if step.applied != "kept"]


@pytest.mark.parametrize(
    ("fault", "optimizer", "dtype"),
    [
        ("weight-noise", "foreach", torch.float32),
        ("poisoned-moments", "fused", torch.float32),
        ("broken-moments", "foreach", torch.bfloat16),
        ("broken-moments", "fused", torch.float32),
    ],
)
def test_a_loop_taken_back_equals_the_loop_that_never_saw_the_batches(fault, optimizer, dtype):
    loop = Loop(optimizer=optimizer, dtype=dtype)
    with loop.guarded() as guard:
        loop.run(STEPS, after=faulty(loop, fault, FAULT_AT))
        found = loop.state()
    twin = Loop(optimizer=optimizer, dtype=dtype, without=range(30, 35))
    twin.run(STEPS - EVERY)
    assert rejected(guard) == [(35, 30)]
    assert "learning-rate schedule LambdaLR" in guard.history[6].record.params["restored"]
    assert differences(found, twin.state()) == []


def test_replayed_batches_make_the_undisturbed_loop():
    loop = Loop(replayable=True)
    with loop.guarded(data="replay") as guard:
        loop.run(STEPS, after=faulty(loop, "weight-noise", FAULT_AT))
        found = loop.state()
    twin = Loop()
    twin.run(STEPS - EVERY)
    assert rejected(guard) == [(35, 30)]
    assert guard.history[6].record.params["not_restored"] == []
    assert differences(found, twin.state()) == []


def test_a_fault_before_the_first_check_goes_back_to_the_very_beginning():
    """What was kept outside of `optimizer.step()` is put back inside of it: the schedule must not be a step ahead."""
    loop = Loop()
    with loop.guarded() as guard:
        loop.run(12, after=faulty(loop, "broken-moments", 2))
        found = loop.state()
    twin = Loop(without=range(5))
    rates = []
    twin.run(7, before=lambda _: rates.append(twin.optimizer.param_groups[0]["lr"]))
    assert rejected(guard) == [(5, 0)]
    assert rates[0] == LR
    ours, theirs = found, twin.state()
    # The first batch of an epoch draws the seed of its loader from torch's generator, before the model draws.
    for state in (ours, theirs):
        del state["torch"]
    assert (ours["rates"], ours["schedule"]) == (theirs["rates"], theirs["schedule"])


def test_what_was_kept_inside_of_a_step_is_put_back_outside_of_it():
    loop = Loop()
    with loop.guarded(cooldown=0) as guard:
        loop.run(8)
        guard.check()
        at_check = loop.state()
        loop.run(9)
        FAULTS["weight-noise"](loop.model, loop.optimizer)
        guard.check()
        assert differences(loop.state(), at_check) == []
        loop.run(10)
        at_ten = loop.state()
        loop.run(12)
        with torch.no_grad():
            loop.accelerator.unwrap_model(loop.model).lm_head.weight.fill_(math.nan)
        guard.check()
        assert rejected(guard) == [(9, 8), (12, 10)]
        assert differences(loop.state(), at_ten) == []


def test_a_useless_gradient_is_not_stepped_with_and_the_schedule_waits(caplog):
    loop = Loop()
    with caplog.at_level(logging.WARNING, "weightproof"), loop.guarded() as guard:

        def poison(step):
            if step == 7:
                loop.accelerator.unwrap_model(loop.model).lm_head.weight.grad[2] = math.inf

        before = {}
        loop.run(6)
        before = loop.state()
        loop.run(7, before=poison)
        after = loop.state()
        loop.run(10)
    assert {name.split()[0] for name in differences(before, after)} == {"torch"}, "dropout has drawn, nothing else"
    assert rejected(guard) == []
    assert loop.schedule.scheduler.last_epoch == 9
    told = [record.getMessage() for record in caplog.records if "is kept" in record.message]
    assert len(told) == 1
    assert told[0].startswith("the window that ends at step 10 is kept; 1 optimizer step was left out")


def test_a_leap_of_the_gradient_that_is_stepped_with_is_told(caplog):
    loop = Loop()

    def leap(step):
        if step == 33:
            for one in loop.model.parameters():
                one.grad.mul_(30.0)

    with caplog.at_level(logging.WARNING, "weightproof"), loop.guarded() as guard:
        loop.run(40, before=leap)
    assert rejected(guard) == []
    told = [record.getMessage() for record in caplog.records if "is kept" in record.message]
    assert len(told) == 1
    assert re.search(r"step 35 is kept; a gradient norm was [\d.]+ times the usual, and was stepped with", told[0])


def test_one_bad_batch_is_told_once_and_left_alone(caplog):
    loop = Loop(dropout=0.0)
    fault = faults.BadBatch(at=33, share=0.5, steps=1)
    with (
        caplog.at_level(logging.WARNING, "weightproof"),
        inject([fault], loop.model, loop.optimizer),
        loop.guarded() as guard,
    ):
        loop.run(40)
    assert rejected(guard) == []
    told = [record.getMessage() for record in caplog.records if "is kept" in record.message]
    assert len(told) == 1
    assert "step 35 is kept; raw loss of a step" in told[0]


def test_bad_batches_one_after_the_other_are_taken_back_and_never_end_the_run():
    """Losses are those of a model that guesses, though it does not get worse than it was before it was trained."""
    loop = Loop(dropout=0.0)
    fault = faults.BadBatch(at=32, steps=12)
    with inject([fault], loop.model, loop.optimizer), loop.guarded(max_rollbacks=2) as guard:
        loop.run(50)
    assert rejected(guard) == [(35, 30), (40, 25)]
    assert "num_near_guessing = 4 (limit 1)" in guard.history[6].decision.reason
    passed = {one.statistic: one for one in guard.history[8].decision.reported}
    assert passed["loss_peak"].reason.startswith("noted"), "a third rollback would have ended it"


def test_monitor_steps_with_whatever_there_is():
    loop = Loop()
    with loop.guarded(on_violation="monitor") as guard:
        loop.run(5, before=lambda step: loop.model.lm_head.weight.grad.fill_(math.nan) if step == 3 else None)
    assert torch.isnan(loop.model.lm_head.weight).all()
    assert [(step.applied, str(step.decision.action)) for step in guard.history] == [("kept", "ROLLBACK")]
    assert guard.session.cost.snapshot_bytes < 2 * sum(p.nbytes for p in loop.model.parameters()), "no moments are kept"


def test_after_max_rollbacks_the_loop_is_stopped_with_the_last_good_state_in_place():
    loop = Loop()
    guard = loop.guarded(max_rollbacks=1)
    loop.run(5)
    good = loop.state()
    with pytest.raises(EditRejectedError, match=r"training stopped at step 15: .*1 rollbacks .* did not help"):
        loop.run(20, after=faulty(loop, "broken-moments", 6, 11))
    found = loop.state()
    assert found["weights"].keys() == good["weights"].keys()
    assert rejected(guard) == [(10, 5), (15, 0)], "soon after a rollback: the older one"
    with pytest.raises(EditRejectedError, match="has stopped this run"):
        loop.run(21)
    guard.detach()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollback": "all"}, "rollback must be one of"),
        ({"data": "replay"}, "no loader cannot: wrap it, data = ReplayableLoader"),
        ({"data": "replay", "loader": [1, 2]}, "which list cannot"),
        ({"lr_factor": 0}, "lr_factor must be"),
        ({"keep": 0}, "keep must be"),
        ({"generators": [7]}, "is no random generator"),
        ({"snapshots": "tape"}, "snapshots must be one of memory, pinned, disk"),
        ({"snapshots": "disk"}, 'snapshots="disk" needs a folder'),
        ({"snapshots": "memory", "snapshot_dir": "states"}, "leave it out"),
        (
            {"snapshot_budget": 60_000},
            r"holds no good state: one takes .* KiB \(.* KiB of weights, .* KiB of moments\)",
        ),
        ({"snapshot_budget": 60_000, "rollback": "weights"}, r"one takes .* KiB \([0-9.]+ KiB of weights\)"),
    ],
)
def test_what_could_not_be_restored_is_refused_before_the_first_step(options, message):
    loop = Loop()
    hooks = len(loop.optimizer.optimizer._optimizer_step_pre_hooks)
    with pytest.raises(InputError, match=message):
        loop.guarded(**options)
    assert len(loop.optimizer.optimizer._optimizer_step_pre_hooks) == hooks


def test_the_budget_decides_how_many_states_are_kept():
    loop = Loop()
    one = sum(parameter.nbytes for parameter in loop.model.parameters())
    for budget, kept in ((None, (5, 10)), (4 * one, (10,))):
        loop = Loop()
        with loop.guarded(snapshot_budget=budget) as guard:
            loop.run(10)
            assert guard.session.rolling.steps == kept


def test_pinned_memory_is_plain_memory_where_nothing_can_be_pinned(caplog):
    loop = Loop()
    with caplog.at_level(logging.WARNING, "weightproof"), loop.guarded(snapshots="pinned") as guard:
        loop.run(STEPS, after=faulty(loop, "weight-noise", FAULT_AT))
    said = [record.message for record in caplog.records if "pinned" in record.message]
    assert len(said) == (0 if torch.cuda.is_available() else 1)
    twin = Loop(without=range(30, 35))
    twin.run(STEPS - EVERY)
    assert rejected(guard) == [(35, 30)]
    assert differences(loop.state(), twin.state()) == []


def test_the_size_of_a_state_is_known_before_its_optimizer_has_stepped():
    for kind in (*OPTIMIZERS.values(), lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9)):
        model = tiny_llama()
        optimizer = kind(model.parameters())
        parameters = list(model.parameters())
        before = _moments(optimizer)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        generators = torch.get_rng_state()
        optimizer.step()
        assert before == _moments(optimizer) > 0
        assert torch.equal(torch.get_rng_state(), generators)


# ---- on disk --------------------------------------------------------------------------------------------------------


def killed_at(step, folder, **how):
    """A guarded loop in a process of its own, which is gone after a step without a word."""

    def work():
        loop = Loop(**{"dropout": 0.0, **how})
        loop.guarded(snapshot_dir=folder)
        loop.run(step)
        os._exit(9)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 9


def test_a_loop_that_was_killed_goes_on_from_the_last_committed_state_and_says_so(tmp_path, caplog):
    killed_at(13, tmp_path)
    loop = Loop(dropout=0.0, without=range(10))
    with caplog.at_level(logging.WARNING, "weightproof"), loop.guarded(snapshot_dir=tmp_path) as guard:
        assert guard.step == 10
        loop.run(10)
        found = loop.state()
        assert [step.step for step in guard.history] == [15, 20]
    undisturbed = Loop(dropout=0.0)
    undisturbed.run(20)
    assert "holds the state of step 10: the run goes on from there" in caplog.text
    assert "Its data begins anew, so batches are given twice: no loader was given" in caplog.text
    assert differences(found, undisturbed.state()) == ["torch"], "but for the seed that a loader draws when it begins"


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("steps", [8, 13, 24])
def test_a_loop_that_was_killed_is_given_the_batches_that_come_next(tmp_path, caplog, steps, shuffle):
    """Bit for bit, dropout and the order of later passes with it; 10 steps a pass, so 10 is where one begins."""
    how = {"dropout": 0.1, "replayable": True, "rows": 10 * ROWS, "shuffle": shuffle}
    killed_at(steps, tmp_path, **how)
    loop, begins = Loop(**how), steps // EVERY * EVERY
    torch.rand(3)  # wherever the generators of the new process stand
    with caplog.at_level(logging.WARNING, "weightproof"), loop.guarded(snapshot_dir=tmp_path) as guard:
        assert guard.step == begins
        assert loop.data.epoch == begins // 10
        loop.steps = begins
        loop.run(34)
        found = loop.state()
    twin = Loop(**{**how, "replayable": False})
    twin.run(34)
    assert f"Its data goes on after {begins % 10} batches of pass {begins // 10 + 1}" in caplog.text
    assert loop.seen == twin.seen[begins:]
    assert differences(found, twin.state()) == []


def test_a_loop_killed_after_a_rollback_goes_on_behind_the_batches_that_were_skipped(tmp_path):
    how = {"dropout": 0.1, "replayable": True}

    def work():
        loop = Loop(**how)
        loop.guarded(snapshot_dir=tmp_path)
        loop.run(17, after=faulty(loop, "weight-noise", 8))
        os._exit(9)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    loop = Loop(**how)
    with loop.guarded(snapshot_dir=tmp_path) as guard:
        assert guard.step == 15
        loop.steps = 15
        loop.run(20)
        found = loop.state()
    twin = Loop(without=range(5, 10))
    twin.run(15)
    assert loop.seen == twin.seen[10:]
    assert differences(found, twin.state()) == []


def test_a_good_state_on_disk_is_what_a_rollback_reads(tmp_path):
    loop = Loop()
    with loop.guarded(snapshot_dir=tmp_path) as guard:
        loop.run(STEPS, after=faulty(loop, "weight-noise", FAULT_AT))
        found = loop.state()
        assert guard.session.rolling.newest.training.nbytes == 0, "moments are not kept in memory"
    twin = Loop(without=range(30, 35))
    twin.run(STEPS - EVERY)
    assert rejected(guard) == [(35, 30)]
    assert differences(found, twin.state()) == []


def states_on(folder):
    return {path: path.stat().st_size for path in (folder / "good-states").rglob("*.safetensors")}


def test_weights_lie_on_disk_once_and_what_did_not_change_once_for_all_states(tmp_path):
    loop = Loop()
    frozen = loop.accelerator.unwrap_model(loop.model).model.embed_tokens.weight.requires_grad_(False)
    with loop.guarded(snapshot_dir=tmp_path, keep=2) as guard:
        loop.run(10)
        assert [path.name for path in tmp_path.iterdir()] == ["good-states"], "no second copy of this process's own"
        weights = [parameter for parameter in loop.model.parameters() if parameter is not frozen]
        two_states = 2 * 3 * sum(weight.nbytes for weight in weights) + frozen.nbytes
        assert two_states < sum(states_on(tmp_path).values()) < 1.2 * two_states
        assert guard.session.rolling.nbytes == 0, "nothing is kept in memory"
        assert guard.session.has_changed() is False
        loop.run(11)
        assert guard.session.has_changed() is True


def test_states_on_disk_are_pruned_by_bytes(tmp_path):
    loop = Loop()
    one = 3 * sum(parameter.nbytes for parameter in loop.model.parameters())
    with loop.guarded(snapshots="disk", snapshot_dir=tmp_path, keep=4, snapshot_budget=int(2.5 * one)) as guard:
        loop.run(25)
        assert guard.session.rolling.steps == (20, 25)
        assert sum(states_on(tmp_path).values()) <= 2.5 * one
    with pytest.raises(InputError, match=r"snapshot_budget=.* holds no good state: one takes"):
        Loop().guarded(snapshot_dir=tmp_path / "other", snapshot_budget=int(0.9 * one))


def flip_newest(folder, count):
    """Flip a bit in a file of each of the newest states that no older one shares."""
    older = set()
    manifests = sorted((folder / "good-states").rglob("snapshots/*.json"))
    for manifest in manifests:
        names = {object_name(held) for held in Manifest.read(manifest, DISK).objects}
        if manifest in manifests[-count:]:
            path = max((one for one in states_on(folder) if one.name in names - older), key=lambda one: one.name)
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        older |= names


def test_a_state_damaged_on_the_disk_stops_the_run(tmp_path):
    """What the window began with is not known any more: nothing can be said of it. Started again, the run goes on."""
    loop = Loop()
    guard = loop.guarded(snapshot_dir=tmp_path)
    loop.run(10)
    flip_newest(tmp_path, 1)
    with pytest.raises(RestoreError, match="was altered after it was written"):
        loop.run(15)
    with pytest.raises(EditRejectedError, match="has stopped this run"):
        loop.run(16)
    guard.detach()


def test_a_killed_loop_whose_newest_state_is_damaged_goes_on_from_the_one_before(tmp_path, caplog):
    how = {"dropout": 0.1, "replayable": True}
    killed_at(13, tmp_path, **how)
    flip_newest(tmp_path, 1)
    loop = Loop(**how)
    with caplog.at_level(logging.WARNING, "weightproof"), loop.guarded(snapshot_dir=tmp_path) as guard:
        assert guard.step == 5
        loop.steps = 5
        loop.run(20)
        found = loop.state()
    assert "snapshot 3 is damaged and is passed over; snapshot 2 (step 5) is used in its place" in caplog.text
    twin = Loop()
    twin.run(20)
    assert loop.seen == twin.seen[5:]
    assert differences(found, twin.state()) == []


def test_a_folder_of_another_model_or_in_use_is_refused(tmp_path):
    loop = Loop()
    with loop.guarded(snapshot_dir=tmp_path):
        loop.run(5)
        other = Loop()
        with pytest.raises(SnapshotError, match="in use"):
            other.guarded(snapshot_dir=tmp_path)
    bf16 = Loop(dtype=torch.bfloat16)
    with pytest.raises(InputError, match="the kept state is of another model"):
        bf16.guarded(snapshot_dir=tmp_path)
