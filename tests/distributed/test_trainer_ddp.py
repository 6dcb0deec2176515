"""`GuardCallback` in a `Trainer` run of two real processes (DDP): one verdict, one rollback, one set of files."""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time

import numpy as np
import pytest
import torch
from tests.support.trainer_runs import (
    ROWS,
    Mishap,
    NaNLoss,
    bad_luck,
    decisions,
    digests,
    ended,
    nan_in_lm_head,
    require_same_end,
    trainer_of,
)
from tests.support.wandb_records import read_offline_run
from tests.trainer.markov import Chains, Recorder, logged_losses, same, tiny_llama, trainer_for, weights
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM, TrainerCallback, set_seed
from worlds import run_world

from weightproof.certificate import Certificate
from weightproof.edits import RTN
from weightproof.session import STATE_FILE
from weightproof.types import Action
from weightproof_callbacks.trainer import GuardCallback


def trained(size, folder, callbacks, **changes):
    """Such a run, under DDP where there are several processes."""
    trainer = trainer_of(size, folder, callbacks, **changes)
    trainer.train()
    assert size == 1 or type(trainer.model_wrapped) is DistributedDataParallel
    assert all(type(parameter) is torch.nn.Parameter for parameter in trainer.model.parameters())
    return trainer


# ---- a run without violation ----------------------------------------------------------------------------------------


class RunningLossForCausalLM(LlamaForCausalLM):
    """Keeps what batch normalisation keeps: a buffer that every process updates with its own share of the data."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("running_loss", torch.zeros(()))

    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if self.training:
            self.running_loss.mul_(0.9).add_(output.loss.detach(), alpha=0.1)
        return output


class OrderedChains(Chains):
    """Notes which rows were asked for, in order."""

    def __init__(self, rows, seed):
        super().__init__(rows, seed)
        self.order = []

    def __getitem__(self, index):
        self.order.append(int(index))
        return super().__getitem__(index)


class RandomStates(TrainerCallback):
    """The states of every random number generator when the run ends. Put it after the guard."""

    def on_train_end(self, args, state, control, **kwargs):
        self.states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002 - the global state is the point


def twins(rank, size, folder):
    retain = [Chains(8, seed=4)[index] for index in range(8)]
    runs = {"plain": [], "guarded": [GuardCallback(every=3, retain=retain)]}
    runs["edited"] = [GuardCallback(every=6, edits={12: RTN(8)})]
    found = {}
    for name, guards in runs.items():
        set_seed(0)
        model = RunningLossForCausalLM(tiny_llama(dropout=0.1).config)
        states = RandomStates()
        settings = {"eval_strategy": "steps", "eval_steps": 4, "gradient_accumulation_steps": 2, "logging_steps": 2}
        settings |= {"per_device_train_batch_size": 4, "average_tokens_across_devices": name != "edited"}
        trainer = trainer_of(size, folder / name, [*guards, states], model=model, steps=12, **settings)
        trainer.train_dataset = OrderedChains(512, seed=1)
        trainer.train()
        assert type(trainer.model_wrapped) is DistributedDataParallel
        found[name] = describe(trainer, states.states)
    for guard in (*runs["guarded"], *runs["edited"]):
        assert {step.decision.action for step in guard.history} == {Action.KEEP}, [
            (step.step, step.name, step.decision.reason) for step in guard.history
        ]
    assert [step.step for step in runs["guarded"][0].history] == [3, 4, 6, 8, 9, 12]
    (edit,) = [step for step in runs["edited"][0].history if step.name != "train"]
    assert edit.record.stray_names == (), "buffers that training moved apart were not changed by anybody"
    seen = torch.tensor(runs["edited"][0].session.losses).view(-1, 2).mean(1).tolist()
    assert seen == pytest.approx(list(logged_losses(trainer).values()), rel=1e-4), "of tokens averaged on each process"
    return found


def describe(trainer, states):
    timing = ("runtime", "per_second")
    rows = [{k: v for k, v in row.items() if not k.endswith(timing)} for row in trainer.state.log_history]
    moments = {
        f"{key}.{part}": torch.as_tensor(value)
        for key, parts in trainer.optimizer.state_dict()["state"].items()
        for part, value in parts.items()
    }
    return {
        "weights": weights(trainer.model), "moments": moments, "states": states, "rows": rows,
        "order": trainer.train_dataset.order, "training": trainer.model.training,
        "hooks": len(trainer.model._forward_hooks),
    }  # fmt: skip


def test_a_guard_without_violation_disturbs_nothing_on_any_rank(tmp_path):
    both = run_world(twins, 2, tmp_path)
    for rank, found in enumerate(both):
        plain, guarded = found["plain"], found["guarded"]
        assert same(plain.pop("weights"), guarded["weights"]), rank
        assert same(plain.pop("moments"), guarded["moments"]), rank
        assert all(plain[what] == guarded[what] for what in plain), rank
        assert guarded["hooks"] == 0
    first, second = (found["guarded"] for found in both)
    own = first["weights"].pop("running_loss"), second["weights"].pop("running_loss")
    assert own[0] != own[1], "each process has a value of its own"
    assert first["order"] != second["order"]
    assert same(first["weights"], second["weights"])


# ---- verdicts, files, trackers --------------------------------------------------------------------------------------

EDITS = {30: RTN(8), 35: RTN(2)}


def guarded(size, folder, **changes):
    guard, before, after = GuardCallback(every=15, edits=EDITS), Recorder(35), Recorder(30, 35)
    changes |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": ROWS // size // 2}
    trainer = trained(size, folder, [before, guard, after], steps=40, logging_steps=1, **changes)
    assert guard.session.processes.size == size
    assert {step.decision.world_size for step in guard.history} == {size}
    assert same(before.seen[35], after.seen[35]), "bit for bit as before the rejected edit"
    return {
        "decisions": decisions(guard), "digests": digests(guard), "model_digest": guard.session.model_digest,
        "losses": guard.session.losses, "logged": list(logged_losses(trainer).values()),
        "kept": after.seen[30], "restored": after.seen[35], "last": weights(trainer.model),
    }  # fmt: skip


def guarded_with_wandb(rank, size, folder):
    os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}
    found = guarded(size, folder / "out", report_to=["wandb"])
    wandb = sys.modules.get("wandb")
    run = None if wandb is None else wandb.run
    assert (run is not None) is (rank == 0), "only rank 0 has a run"
    if run is not None:
        wandb.finish()
        wandb.teardown()
    return found


def test_windows_and_edits_have_one_verdict_one_certificate_and_one_wandb_run(tmp_path):
    first, second = run_world(guarded_with_wandb, 2, tmp_path)
    alone = guarded(1, tmp_path / "alone")
    assert first["decisions"] == [
        (15, "train", "KEEP", "kept"), (30, "train", "KEEP", "kept"), (30, "rtn-int8-channel", "KEEP", "kept"),
        (35, "train", "KEEP", "kept"), (35, "rtn-int2-channel", "ROLLBACK", "restored"), (40, "train", "KEEP", "kept"),
    ]  # fmt: skip
    for name in ("decisions", "digests", "losses", "model_digest"):
        assert first[name] == second[name], name
    for name in ("kept", "restored", "last"):
        assert same(first[name], second[name]), name
    assert alone["decisions"] == first["decisions"]
    assert alone["digests"] == first["digests"]
    # Parts of a batch are added in another order than the whole: what is left of that after 40 steps.
    assert alone["losses"] == pytest.approx(first["losses"], rel=2e-3)
    assert first["losses"] == pytest.approx(first["logged"][-len(first["losses"]) :], rel=1e-4)

    certificate = Certificate.load(tmp_path / "out" / "weightproof" / "certificate.json")
    assert certificate.predicate["world_size"] == 2
    assert certificate.model_digest == first["model_digest"]
    assert [step["action"] for step in certificate.predicate["steps"]] == [row[2] for row in first["decisions"]]
    assert [path.parent for path in tmp_path.rglob("certificate.json")].count(tmp_path / "out" / "weightproof") == 1
    lines = (tmp_path / "out" / "weightproof" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["step"] for event in events if event["type"] == "event"] == [row[0] for row in first["decisions"]]
    run = read_offline_run(tmp_path)  # asserts that there is one run only
    assert [row["guard/step"] for row in run.history if "guard/decision/keep" in row] == [
        row[0] for row in first["decisions"]
    ]
    assert [alert.title for alert in run.alerts] == ["weightproof rolled back rtn-int2-channel"]


# ---- faults of one process ------------------------------------------------------------------------------------------


def ask_to_stop(model, control):
    control.should_training_stop = True


def live_through(size, folder, callbacks, *, drain=None, run=None, **settings):
    """A short run: judged at steps 4 and 8 of 10, evaluated and saved there."""
    guard, recorder = GuardCallback(**{"every": 4, **settings}), Recorder(4, 8)
    if drain is not None:
        guard._recorder.drain = drain
    often = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4, "steps": 10}
    trainer = trainer_of(size, folder, [*callbacks, guard, recorder], **{**often, **(run or {})})
    return {"end": ended(trainer, guard), "seen": {**recorder.seen, "last": weights(trainer.model)}}


EPOCHS = {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 2, "steps": -1}


def faults(rank, size, folder):
    edit = RTN(8, include=("no_such_*",)) if rank == 1 else RTN(8)
    rows = {
        "nan weight at a check": ([Mishap(1, 8, nan_in_lm_head)], {}),
        "nan weight before it": ([Mishap(1, 6, nan_in_lm_head)], {}),
        "nan loss": ([NaNLoss(1)], {}),
        "nan loss, stop": ([NaNLoss(1)], {"on_violation": "stop"}),
        "nan weight, stop": ([Mishap(0, 8, nan_in_lm_head)], {"on_violation": "stop"}),
        "nan weight, monitor": ([Mishap(1, 8, nan_in_lm_head)], {"on_violation": "monitor"}),
        "nan weight, epochs, stop": (
            [Mishap(1, 32, nan_in_lm_head)],
            {"every": 100, "run": EPOCHS, "on_violation": "stop"},
        ),
        "exception in the guard": ([], {"drain": bad_luck if rank == 1 else None}),
        "flag of one rank": ([Mishap(0, 4, ask_to_stop)], {}),
        "other settings": ([], {"every": 4 + rank}),
        "edit that applies on one rank": ([], {"edits": {6: edit}}),
        "sleep": ([Mishap(1, 4, lambda *_: time.sleep(3.5))], {"timeout": 2.0}),
    }
    found = {}
    for name, (callbacks, settings) in rows.items():
        found[name] = live_through(size, folder / name, callbacks, **settings)
    return found


KEPT_AT_4 = (4, "train", "KEEP", "kept")
ENDS_BY_ITSELF = [KEPT_AT_4, (8, "train", "ROLLBACK", "restored"), (10, "train", "KEEP", "kept")]
NAN_ON_1 = "lm_head.weight: num_nonfinite = 3 (limit 0), NaN or infinite elements in a parameter, on rank 1 only"


def test_a_fault_of_one_process_has_one_outcome_on_both(tmp_path):
    both = run_world(faults, 2, tmp_path, timeout=120)
    for name in both[0]:
        require_same_end([found[name]["end"] for found in both], name)

    def run_of(name):
        """Decisions, reason of the first rejection and last step of a run in which no process raised."""
        end = both[0][name]["end"]
        assert [found[name]["end"]["error"] for found in both] == [None, None], name
        actions = [row[2] for row in end["decisions"]]
        return end["decisions"], end["reasons"][actions.index("ROLLBACK")], end["at"]

    def copies(name, moment):
        """The weights after a step, or at the end; the same on both processes."""
        first, second = (found[name]["seen"][moment] for found in both)
        assert same(first, second), (name, moment)
        return first

    def errors(name):
        return [found[name]["end"]["error"] for found in both]

    for name in ("nan weight at a check", "nan weight before it"):
        found, reason, last = run_of(name)
        assert (found, last) == (ENDS_BY_ITSELF, 10)
        assert "num_nonfinite" in reason
        assert same(copies(name, 4), copies(name, 8)), "bit for bit the last good weights, on both"
        assert not same(copies(name, 8), copies(name, "last")), "training goes on"
    assert NAN_ON_1 in run_of("nan weight at a check")[1]

    found, reason, last = run_of("nan loss")
    assert [row[2] for row in found] == ["ROLLBACK", "KEEP", "KEEP"]
    assert "raw losses: num_nonfinite = 1 (limit 0), of 4 steps in this window" in reason
    assert not same(copies("nan loss", 4), copies("nan loss", "last"))

    assert run_of("nan loss, stop")[::2] == ([(4, "train", "ROLLBACK", "restored")], 4)
    assert not (tmp_path / "nan loss, stop" / "checkpoint-4").exists()
    assert run_of("nan weight, stop")[::2] == (ENDS_BY_ITSELF[:2], 8)
    assert same(copies("nan weight, stop", 4), copies("nan weight, stop", "last"))
    assert (tmp_path / "nan weight, stop" / "checkpoint-4" / STATE_FILE).is_file()
    assert not (tmp_path / "nan weight, stop" / "checkpoint-8").exists()

    found, reason, last = run_of("nan weight, epochs, stop")
    assert (found, last) == ([(32, "train", "ROLLBACK", "restored")], 32)
    assert NAN_ON_1 in reason
    assert not (tmp_path / "nan weight, epochs, stop" / "checkpoint-32").exists()

    found, reason, last = run_of("nan weight, monitor")
    assert [row[2:] for row in found] == [("KEEP", "kept"), ("ROLLBACK", "kept"), ("ROLLBACK", "kept")]
    assert NAN_ON_1 in reason
    torn = [int(one["nan weight, monitor"]["seen"][8]["lm_head.weight"].isnan().sum()) for one in both]
    assert torn == [0, 3], "monitored: nothing is restored, and evaluation and save at this step end all the same"
    assert (tmp_path / "nan weight, monitor" / "checkpoint-8" / STATE_FILE).is_file()

    assert errors("exception in the guard") == [
        ("CollectiveError", "rank 1 failed in step 4: ZeroDivisionError: bad luck"),
        ("ZeroDivisionError", "bad luck"),
    ]
    for name, message in {
        "flag of one rank": r"flag should_training_stop at step 4.*rank 0 has True, rank 1 has False",
        "other settings": r"guard's every.*rank 0 has 4, rank 1 has 5",
        "edit that applies on one rank": r"edits\[6\] \(rtn-int8-channel\) selects no weight matrix",
        "sleep": r"^rank 1 did not come to '.* step 4' within 2 s",
    }.items():
        kind = "CollectiveError" if name == "sleep" else "InputError"
        assert [error[0] for error in errors(name)] == [kind, kind], name
        assert all(re.search(message, error[1]) for error in errors(name)), errors(name)
    assert errors("edit that applies on one rank")[0][1].startswith("rank 1: ")


def each_alone(rank, size, folder):
    """On a machine without GPU two processes that do not ask for the CPU do not join."""
    guard = GuardCallback()
    return ended(trainer_for(folder, [guard], steps=4, use_cpu=False), guard)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the trap is that of machines without GPU")
def test_processes_that_trainer_does_not_join_are_refused(tmp_path):
    for end in run_world(each_alone, 2, tmp_path):
        kind, message = end["error"]
        assert (kind, end["at"]) == ("InputError", 0)
        assert "2 processes were launched but TrainingArguments sees 1" in message
        assert "use_cpu=True" in message
