"""A `Trainer` run that suffers a fault and is taken back equals, bit for bit, the run that never suffered it."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os

import pytest
import torch
from tests.support.twins import FAULTS, differences, whole_state
from tests.trainer.markov import Chains, tiny_llama, trainer_for
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback

from weightproof.errors import InputError
from weightproof.types import Action
from weightproof_callbacks.trainer import GuardCallback
from weightproof_callbacks.trainer_mixin import GuardedTrainer, GuardedTrainerMixin

EVERY, FAULT_AT, STEPS, ROWS = 5, 32, 45, 16


class InOrder(Trainer):
    """Gives the rows in their order, so that a twin can be made that lacks some."""

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


class Replayable(GuardedTrainerMixin, InOrder):
    pass


class Fault(TrainerCallback):
    """Does something to model and optimizer after some steps. Put it before the guard."""

    def __init__(self, act, *steps):
        self.act, self.steps = act, steps

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step in self.steps:
            self.act(model, optimizer)


class BadGradients(TrainerCallback):
    """Makes one gradient useless before some optimizer steps."""

    def __init__(self, *steps, value=math.nan):
        self.steps, self.value = steps, value

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 in self.steps:
            model.lm_head.weight.grad[3, 5] = self.value


class Seen(TrainerCallback):
    """The whole state after some steps. Put it after the guard."""

    def __init__(self, *steps):
        self.steps, self.states, self.rates = steps, {}, {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self.rates[state.global_step] = optimizer.param_groups[0]["lr"]
        if state.global_step in self.steps:
            self.states[state.global_step] = whole_state(model, optimizer, lr_scheduler)


def run(folder, callbacks, *, kind=InOrder, without=(), steps=STEPS, rows=64 * ROWS, resume=None, **changes):
    settings = {"lr_scheduler_type": "cosine", "warmup_steps": 5, **changes}
    trainer = trainer_for(folder, callbacks, model=tiny_llama(dropout=0.1), steps=steps, **settings)
    trainer = kind(
        model=trainer.model,
        args=trainer.args,
        train_dataset=Subset(Chains(rows, seed=1), [row for row in range(rows) if row // ROWS not in without]),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rejected(guard):
    return [(step.step, step.decision.action, step.applied) for step in guard.history if step.applied != "kept"]


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """The run that was never given the batches of steps 31 to 35."""
    seen = Seen(STEPS - EVERY)
    run(tmp_path_factory.mktemp("twin"), [seen], without=range(30, 35))
    return seen.states[STEPS - EVERY]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_taken_back_equals_the_run_that_never_saw_the_batches(tmp_path, fault, twin):
    guard, seen = GuardCallback(every=EVERY), Seen(STEPS)
    run(tmp_path, [Fault(FAULTS[fault], FAULT_AT), guard, seen])
    assert rejected(guard) == [(35, Action.ROLLBACK, "restored")]
    params = guard.history[6].record.params
    assert (params["back_to_step"], params["rollbacks"], params["data"]) == (30, 1, "skip")
    assert params["restored"] == [
        "weights and buffers", "optimizer AdamW, the state of 21 parameters", "learning-rate schedule LambdaLR",
        "random generators of Python, numpy, torch CPU",
    ]  # fmt: skip
    assert params["not_restored"] == ["data position: the batches of the window are not given again"]
    assert differences(seen.states[STEPS], twin) == []


def test_weights_alone_are_not_the_twin(tmp_path, twin):
    guard, seen = GuardCallback(every=EVERY, rollback="weights"), Seen(STEPS)
    run(tmp_path, [Fault(FAULTS["weight-noise"], FAULT_AT), guard, seen])
    assert rejected(guard) == [(35, Action.ROLLBACK, "restored")]
    assert guard.history[6].record.params["optimizer_states_cleared"] == 21
    assert {name.split()[0] for name in differences(seen.states[STEPS], twin)} >= {"weights", "moments", "schedule"}


def test_a_gradient_that_is_not_finite_is_not_stepped_with(tmp_path):
    """Twin: the run whose optimizer left that step out, and whose schedule waited."""
    guard, seen, twin = GuardCallback(every=EVERY), Seen(30, 20), Seen(30)
    run(tmp_path / "guarded", [BadGradients(23), guard, seen], steps=30)

    class LeaveOut(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            optimizer._is_overflow = state.global_step + 1 == 23
            if state.global_step + 1 == 23:
                model.zero_grad()

    run(tmp_path / "twin", [LeaveOut(), twin], steps=30)
    assert rejected(guard) == []
    assert guard.session.current.readings.window.num_skipped == 0
    skips = [
        m.value for s in guard.history for v in s.verdicts for m in v.measurements if m.statistic == "num_steps_skipped"
    ]
    assert skips == [0, 0, 0, 0, 1, 0]
    assert differences(seen.states[30], twin.states[30]) == []
    assert seen.states[30]["schedule"]["last_epoch"] == 29


def test_many_useless_gradients_take_the_run_back(tmp_path):
    guard, seen = GuardCallback(every=EVERY), Seen(20, 25)
    run(tmp_path, [BadGradients(21, 22, 23), guard, seen], steps=25)
    assert rejected(guard) == [(25, Action.ROLLBACK, "restored")]
    assert "gradients: num_steps_skipped = 3 (limit 2)" in guard.history[-1].decision.reason
    assert differences(seen.states[25], seen.states[20]) == []


def test_replayed_batches_make_the_undisturbed_run(tmp_path):
    """A fault that came from outside: given the same batches again, the run is the one without it, five steps later."""
    guard, seen, twin = GuardCallback(every=EVERY, data="replay"), Seen(STEPS), Seen(STEPS - EVERY)
    run(tmp_path / "guarded", [Fault(FAULTS["weight-noise"], FAULT_AT), guard, seen], kind=Replayable)
    run(tmp_path / "twin", [twin])
    assert rejected(guard) == [(35, Action.ROLLBACK, "restored")]
    params = guard.history[6].record.params
    assert (params["data"], params["not_restored"]) == ("replay", [])
    assert differences(seen.states[STEPS], twin.states[STEPS - EVERY]) == []


def test_replay_is_refused_before_the_first_step_where_batches_cannot_be_given_again(tmp_path):
    guard = GuardCallback(every=EVERY, data="replay")
    with pytest.raises(
        InputError, match='data="replay" gives batches again, which no loader cannot: train with Guarded'
    ):
        run(tmp_path, [guard])
    assert guard.history == ()


def test_the_learning_rate_is_lowered_after_each_rollback_and_stays_lower(tmp_path):
    guard, seen, plain = GuardCallback(every=EVERY, lr_factor=0.5), Seen(), Seen()
    faults = Fault(FAULTS["broken-moments"], 12, 27)
    run(tmp_path / "guarded", [faults, guard, seen], steps=40, lr_scheduler_type="linear")
    run(tmp_path / "plain", [plain], steps=40, lr_scheduler_type="linear")
    assert [step for step, *_ in rejected(guard)] == [15, 30]
    assert [step.record.params.get("learning_rate_scale") for step in guard.history if step.applied != "kept"] == [
        0.5,
        0.25,
    ]
    in_rejected_windows = {*range(11, 15), *range(26, 30)}
    for step, rate in ((step, rate) for step, rate in seen.rates.items() if step not in in_rejected_windows):
        steps_taken_back = EVERY * sum(step >= at for at in (15, 30))
        expected = plain.rates[step - steps_taken_back] * 0.5 ** sum(step >= at for at in (15, 30))
        assert rate == pytest.approx(expected), step


def test_after_max_rollbacks_the_run_ends_with_the_last_good_state_in_place(tmp_path):
    guard, seen = GuardCallback(every=EVERY, max_rollbacks=2, keep=1), Seen(5)
    faults = Fault(FAULTS["broken-moments"], 6, 11, 16, 21, 26)
    trainer = run(tmp_path, [faults, guard, seen], steps=40, save_strategy="steps", save_steps=5)
    assert [(step, action) for step, action, _ in rejected(guard)] == [
        (10, Action.ROLLBACK), (15, Action.ROLLBACK), (20, Action.HALT),
    ]  # fmt: skip
    assert trainer.state.global_step == 20
    assert not (tmp_path / "checkpoint-20").exists()
    state = whole_state(trainer.model, trainer.optimizer, trainer.lr_scheduler)
    assert differences(state, seen.states[5]) == []
    assert (
        "2 rollbacks (rollback='full', data='skip', lr_factor=None) did not help" in guard.history[-1].decision.reason
    )


@pytest.mark.parametrize(
    "wrong", [{"rollback": "all"}, {"data": "again"}, {"keep": 0}, {"lr_factor": 2}, {"max_rollbacks": -1}]
)
def test_options_out_of_range_are_refused_when_the_callback_is_made(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        GuardCallback(**wrong)


class UnknownOptimizer(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.buffer = torch.zeros(3)


def test_an_optimizer_that_cannot_be_restored_is_refused_before_the_first_step(tmp_path):
    model = tiny_llama()
    optimizer = UnknownOptimizer(model.parameters(), 0.1)
    for rollback, expected in (("full", "UnknownOptimizer cannot be restored"), ("weights", None)):
        trainer = trainer_for(tmp_path, [], steps=2)
        guarded = Trainer(
            model=model,
            args=trainer.args,
            train_dataset=Chains(64, seed=1),
            callbacks=[GuardCallback(every=1, rollback=rollback)],
            optimizers=(optimizer, None),
        )
        if expected:
            with pytest.raises(InputError, match=expected):
                guarded.train()
            assert guarded.state.global_step == 0
        else:
            guarded.train()


def killed_at(step, folder, **how):
    """A guarded training in a process of its own, which is gone after a step without a word."""

    class Gone(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                os._exit(9)

    def work():
        callbacks = [GuardCallback(every=EVERY, snapshot_dir=folder / "states"), Gone()]
        run(folder / "first", callbacks, **{"steps": 20, **how})

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 9


def test_a_training_that_was_killed_goes_on_from_the_last_committed_state(tmp_path, caplog):
    before, after = Seen(10), Seen(11)
    run(tmp_path / "undisturbed", [before], steps=20)
    killed_at(13, tmp_path)
    guard, began = GuardCallback(every=EVERY, snapshot_dir=tmp_path / "states"), Began()
    with caplog.at_level(logging.WARNING, "weightproof"):
        trainer = run(tmp_path / "second", [guard, began, after], steps=20)
    assert "holds the state of step 10: the run goes on from there. Its data begins anew" in caplog.text
    assert "Train with GuardedTrainer" in caplog.text
    assert (began.step, differences(began.state, before.states[10])) == (10, [])
    assert [step.step for step in guard.history] == [15, 20]
    assert trainer.state.global_step == 20
    assert after.states[11]["schedule"]["last_epoch"] == 11


class Given(TrainerCallback):
    """The batches that the model is given in training. Put it anywhere."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.batches = []
        self.handle = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        if module.training:
            self.batches.append(kwargs["input_ids"].sum().item())

    def on_train_end(self, args, state, control, **kwargs):
        self.handle.remove()


SHUFFLED = {"kind": GuardedTrainer, "rows": 11 * ROWS, "steps": 20}


@pytest.mark.parametrize(
    ("killed", "begins", "accumulation", "saved"),
    [(8, 5, 1, None), (18, 15, 2, None), (14, 12, 1, 6)],
    ids=["first-pass", "third-pass-accumulating", "from-an-older-checkpoint"],
)
def test_a_training_that_was_killed_is_given_the_batches_that_come_next(
    tmp_path, caplog, killed, begins, accumulation, saved
):
    """Bit for bit, with dropout and a shuffled order: 11 batches a pass, so that passes end inside of windows."""
    how = {**SHUFFLED, "gradient_accumulation_steps": accumulation}
    seen, all_given = Seen(20), Given()
    run(tmp_path / "undisturbed", [seen, all_given], **how)
    again = {"save_strategy": "steps", "save_steps": saved} if saved else {}
    killed_at(killed, tmp_path, **how, **again)
    guard, after, given = GuardCallback(every=EVERY, snapshot_dir=tmp_path / "states"), Seen(20), Given()
    resume = str(tmp_path / "first" / f"checkpoint-{saved}") if saved else None
    torch.rand(3)  # wherever the generators of the new process stand
    with caplog.at_level(logging.WARNING, "weightproof"):
        run(tmp_path / "second", [guard, after, given], **how, resume=resume)
    assert f"holds the state of step {begins}: the run goes on from there. Its data goes on after" in caplog.text
    assert given.batches == all_given.batches[given_by(begins, accumulation) :]
    assert differences(after.states[20], seen.states[20]) == []


def given_by(step, accumulation):
    """Batches that were given when a step was over: the last step of a pass takes what is left of it."""
    steps_a_pass = -(-11 // accumulation)
    return step // steps_a_pass * 11 + step % steps_a_pass * accumulation


class Began(TrainerCallback):
    """The whole state when training begins. Put it after the guard."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self.step, self.state = state.global_step, whole_state(model, optimizer, lr_scheduler)
