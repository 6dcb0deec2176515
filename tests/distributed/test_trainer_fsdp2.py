"""`GuardCallback` in a `Trainer` run of two real processes with sharded weights (FSDP2): the whole model's verdicts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from tests.support.trainer_runs import (
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
from tests.trainer.markov import logged_losses, same, tiny_llama
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, TrainerCallback, set_seed
from transformers.distributed import DistributedConfig
from worlds import run_world

from weightproof.certificate import Certificate
from weightproof.edits import RTN
from weightproof.parallel.placements import settle
from weightproof.session import STATE_FILE
from weightproof_callbacks.trainer import GuardCallback

VOCAB = 65  # rows that two processes cannot halve


def whole_model():
    config = copy.deepcopy(tiny_llama().config)
    config.vocab_size = VOCAB
    set_seed(0)
    return LlamaForCausalLM(config)


def sharded_model(size, folder):
    """The same model, loaded in parts: every parameter a DTensor, the vocabulary cut into 33 and 32 rows."""
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=size))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert model.lm_head.weight.to_local().shape[0] == (33, 32)[dist.get_rank()]
    return model


def parts(model):
    """Copies of what this process holds of the model."""
    settle(model)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: getattr(tensor, "_local_tensor", tensor).detach().clone() for name, tensor in state.items()}


class Parts(TrainerCallback):
    """Copies this process's part of the weights after each of some steps."""

    def __init__(self, *steps):
        self.steps, self.seen = steps, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            self.seen[state.global_step] = parts(model)


class PartsBefore(Parts):
    """The same, before the guard acts."""


EDITS = {30: RTN(8), 35: RTN(2)}
SAVE = {"save_strategy": "steps", "save_steps": 40, "save_only_model": True}


def edited(size, folder, model):
    guard, before, after = GuardCallback(every=15, edits=EDITS), PartsBefore(35), Parts(35)
    trainer = trainer_of(size, folder, [before, guard, after], model=model, steps=40, logging_steps=1, **SAVE)
    trainer.train()
    assert guard.session.processes.size == size
    assert same(before.seen[35], after.seen[35]), "bit for bit as before the rejected edit"
    return {
        "decisions": decisions(guard), "digests": digests(guard), "model_digest": guard.session.model_digest,
        "losses": guard.session.losses, "logged": list(logged_losses(trainer).values()),
    }  # fmt: skip


def twins(size, folder, source):
    """A run without and a run with a guard, and all that they leave."""
    found = []
    for name, guards in {"plain": [], "guarded": [GuardCallback(every=3)]}.items():
        set_seed(0)
        settings = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
        settings |= {"per_device_train_batch_size": 4, "logging_steps": 2}
        trainer = trainer_of(size, folder / name, guards, model=sharded_model(size, source), **settings)
        trainer.train()
        assert [str(step.decision.action) for guard in guards for step in guard.history] == ["KEEP"] * 4 * len(guards)
        found.append((parts(trainer.model), untimed(trainer.state.log_history), torch.get_rng_state().tolist()))
    return found


def untimed(rows):
    return [{key: value for key, value in row.items() if not key.endswith(("runtime", "per_second"))} for row in rows]


def live_through(size, folder, model, callbacks, *, drain=None, **settings):
    """A short run: judged at steps 4 and 8 of 10, evaluated there."""
    guard, recorder = GuardCallback(**{"every": 4, **settings}), Parts(4, 8)
    if drain is not None:
        guard._recorder.drain = drain
    evaluate = {"eval_strategy": "steps", "eval_steps": 4}
    trainer = trainer_of(size, folder, [*callbacks, guard, recorder], model=model, steps=10, **evaluate)
    return {"end": ended(trainer, guard), "seen": recorder.seen, "last": parts(trainer.model)}


def sharded(rank, size, folder):
    found = {"edited": edited(size, folder / "edited", sharded_model(size, folder / "model"))}
    found["twins"] = twins(size, folder, folder / "model")
    rows = {
        "nan weight at a check": ([Mishap(1, 8, nan_in_lm_head)], {}),
        "nan loss, stop": ([NaNLoss(1)], {"on_violation": "stop"}),
        "nan weight, monitor": ([Mishap(1, 8, nan_in_lm_head)], {"on_violation": "monitor"}),
        "exception in the guard": ([], {"drain": bad_luck if rank == 1 else None}),
    }
    for name, (callbacks, settings) in rows.items():
        model = sharded_model(size, folder / "model")
        found[name] = live_through(size, folder / name, model, callbacks, **settings)
    return found


def resumed_alone(folder):
    """One process goes on with the whole model; of models sharded when loaded, Trainer saves no optimizer."""
    guard = GuardCallback(every=2)
    trainer = trainer_of(1, folder, [guard], model=whole_model(), steps=42)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-40"))
    return decisions(guard), [step["step"] for step in guard.session.certificate().predicate["steps"]]


NAN_ON_1 = "lm_head.weight: num_nonfinite = 3 (limit 0), NaN or infinite elements in a parameter, on rank 1 only"


def test_sharded_weights_are_guarded_as_the_whole_model_is(tmp_path):
    whole_model().save_pretrained(tmp_path / "model")
    both = run_world(sharded, 2, tmp_path, timeout=120)
    alone = edited(1, tmp_path / "alone", whole_model())
    here, there = (found["edited"] for found in both)
    assert here == there
    assert [row[2] for row in here["decisions"]] == ["KEEP"] * 4 + ["ROLLBACK", "KEEP"]
    assert (here["decisions"], here["digests"]) == (alone["decisions"], alone["digests"])
    assert here["losses"] == pytest.approx(alone["losses"], rel=2e-3)
    assert here["losses"] == pytest.approx(here["logged"][-len(here["losses"]) :], rel=1e-4)
    certificate = Certificate.load(tmp_path / "edited" / "weightproof" / "certificate.json")
    assert (certificate.predicate["world_size"], certificate.model_digest) == (2, here["model_digest"])
    assert (tmp_path / "edited" / "checkpoint-40" / STATE_FILE).is_file()
    rest, steps = resumed_alone(tmp_path / "edited")
    assert (rest, steps) == ([(42, "train", "KEEP", "kept")], [15, 30, 30, 35, 35, 40, 42])

    for (plain, plain_rows, plain_random), (guarded, rows, random) in (found["twins"] for found in both):
        assert same(plain, guarded)
        assert (plain_rows, plain_random) == (rows, random)

    for name in ("nan weight at a check", "nan loss, stop", "nan weight, monitor", "exception in the guard"):
        require_same_end([found[name]["end"] for found in both], name)
    for found in both:
        rolled_back = found["nan weight at a check"]
        assert [row[2:] for row in rolled_back["end"]["decisions"]] == [
            ("KEEP", "kept"), ("ROLLBACK", "restored"), ("KEEP", "kept"),
        ]  # fmt: skip
        assert NAN_ON_1 in rolled_back["end"]["reasons"][1]
        assert same(rolled_back["seen"][4], rolled_back["seen"][8]), "each process has its part back, bit for bit"
        assert not same(rolled_back["seen"][8], rolled_back["last"]), "training goes on"
        stopped = found["nan loss, stop"]["end"]
        assert (stopped["decisions"], stopped["at"]) == ([(4, "train", "ROLLBACK", "restored")], 4)
        monitored = found["nan weight, monitor"]["end"]
        assert [row[3] for row in monitored["decisions"]] == ["kept"] * 3
        assert NAN_ON_1 in monitored["reasons"][1]
    assert [found["exception in the guard"]["end"]["error"] for found in both] == [
        ("CollectiveError", "rank 1 failed in step 4: ZeroDivisionError: bad luck"),
        ("ZeroDivisionError", "bad luck"),
    ]
