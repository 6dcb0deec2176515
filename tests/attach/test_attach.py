"""`weightproof.attach` in one process: what triggers a check, what a violation does, and what it leaves alone."""

from __future__ import annotations

import functools
import logging
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from tests.support.accelerate_loop import Loop
from tests.trainer.markov import same, tiny_llama

import weightproof
from weightproof import attach, edits
from weightproof.errors import EditRejectedError, InputError, RestoreError
from weightproof.types import Action


def windows(guard):
    return [(step.step, str(step.decision.action), step.applied) for step in guard.history]


def states(optimizer):
    inner = getattr(optimizer, "optimizer", optimizer)
    return [
        {k: torch.as_tensor(v).clone() for k, v in inner.state[p].items()}
        for g in inner.param_groups
        for p in g["params"]
    ]


def ruin(model):
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)


# ---- what triggers a check ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
def test_real_optimizer_steps_are_counted_and_every_few_of_them_are_judged(accumulation):
    loop = Loop(accumulation=accumulation)
    with attach(loop.accelerator, loop.model, loop.optimizer, every=4) as guard:
        loop.run(10)
        assert guard.step == 10
        assert len(loop.losses) == 10 * accumulation
        assert [step for step, _, _ in windows(guard)] == [4, 8]
    assert windows(guard) == [(4, "KEEP", "kept"), (8, "KEEP", "kept"), (10, "KEEP", "kept")]


def test_a_run_without_violation_is_the_run_without_the_guard():
    runs = []
    for guarded in (False, True):
        loop = Loop(accumulation=2)
        if guarded:
            with attach(loop.accelerator, loop.model, loop.optimizer, every=3) as guard:
                loop.run(12)
            assert {action for _, action, _ in windows(guard)} == {"KEEP"}
        else:
            loop.run(12)
        runs.append(loop)
    plain, guarded = runs
    assert plain.losses == guarded.losses
    assert same(plain.weights(), guarded.weights())
    assert all(
        same(left, right) for left, right in zip(states(plain.optimizer), states(guarded.optimizer), strict=True)
    )


def test_the_torch_optimizer_itself_will_do():
    loop = Loop()
    with attach(loop.accelerator, loop.model, loop.optimizer.optimizer, every=2) as guard:
        loop.run(2)
        assert windows(guard) == [(2, "KEEP", "kept")]


def test_without_an_optimizer_nothing_is_judged_until_asked():
    loop = Loop()
    guard = attach(loop.accelerator, loop.model, every=1)
    loop.run(3)
    assert guard.history == ()
    assert guard.check().applied == "kept"
    ruin(loop.plain)
    assert guard.check().applied == "restored"
    guard.detach()
    assert len(guard.history) == 2, "nothing changed since the last check: nothing to judge at the end"


# ---- what a violation does ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rollback", ["full", "weights"])
def test_a_bad_step_is_taken_back_inside_the_step_and_its_moments_with_it(caplog, rollback):
    loop = Loop()
    good = {}
    with (
        caplog.at_level(logging.WARNING, "weightproof"),
        attach(loop.accelerator, loop.model, loop.optimizer, every=5, rollback=rollback) as guard,
    ):
        loop.run(
            10,
            before=lambda step: loop.ruin_weights() if step == 8 else None,
            after=lambda step: (
                good.update(weights=loop.weights(), moments=states(loop.optimizer)) if step == 5 else None
            ),
        )
        assert windows(guard) == [(5, "KEEP", "kept"), (10, "ROLLBACK", "restored")]
        assert same(loop.weights(), good["weights"])
        params, count = guard.history[-1].record.params, len(list(loop.plain.parameters()))
        if rollback == "full":
            assert all(same(left, right) for left, right in zip(states(loop.optimizer), good["moments"], strict=True))
            assert f"optimizer AdamW, the state of {count} parameters" in params["restored"]
        else:
            assert loop.optimizer.state == {}
            assert params["optimizer_states_cleared"] == count
        loop.run(30)
    assert {action for _, action, _ in windows(guard)[2:]} == {"KEEP"}
    assert loop.losses[-1] < 0.7 * loop.losses[4], "it learns again"
    assert f"step 10: restored as of step {params['back_to_step']}: weights and buffers" in caplog.text


def test_stop_raises_out_of_the_step_with_the_last_good_weights_and_nothing_goes_on():
    loop = Loop()
    guard = attach(loop.accelerator, loop.model, loop.optimizer, every=2, on_violation="stop")
    loop.run(2)
    good, moments = loop.weights(), states(loop.optimizer)
    with pytest.raises(EditRejectedError, match="training stopped at step 4, the last good weights are restored"):
        loop.run(2, before=lambda step: loop.ruin_weights())
    assert same(loop.weights(), good)
    assert all(same(left, right) for left, right in zip(states(loop.optimizer), moments, strict=True))
    with pytest.raises(EditRejectedError, match="has stopped this run"):
        loop.run(1)
    with pytest.raises(EditRejectedError, match="has stopped this run"):
        guard.check()
    guard.detach()
    loop.run(1)
    assert guard.history[-1].decision.action is Action.ROLLBACK


def test_monitor_only_reports(caplog):
    loop = Loop()
    with (
        caplog.at_level(logging.WARNING, "weightproof"),
        attach(loop.accelerator, loop.model, loop.optimizer, every=2, on_violation="monitor") as guard,
    ):
        loop.run(2, before=lambda step: loop.ruin_weights())
        assert windows(guard) == [(2, "ROLLBACK", "kept")]
    assert all(bool(torch.isnan(parameter).all()) for parameter in loop.plain.parameters())
    assert len(loop.optimizer.state) == len(list(loop.plain.parameters()))
    assert "step 2, train: ROLLBACK, kept" in caplog.text


def test_a_gradient_scaler_goes_on_as_if_the_error_had_not_left_the_step():
    """The error skips `scaler.update()`; without the guard's own the next gradients would stay scaled."""
    ends = []
    for poisoned in (False, True):
        loop = Loop()
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        optimizer = AcceleratedOptimizer(torch.optim.SGD(loop.plain.parameters(), lr=0.1), scaler=scaler)
        guard = attach(loop.accelerator, loop.model, optimizer, every=1, on_violation="stop")
        batch = next(iter(loop.data))

        def step(optimizer=optimizer, scaler=scaler, loop=loop, batch=batch, lr=0.1):
            optimizer.param_groups[0]["lr"] = lr
            scaler.scale(loop.model(**batch).loss).backward()
            optimizer.step()
            optimizer.zero_grad()

        if poisoned:
            with pytest.raises(EditRejectedError, match="stopped at step 1"):
                step(lr=math.inf)
            optimizer.zero_grad()
        guard.detach()
        step()
        ends.append(loop.weights())
    assert same(*ends)


def test_broken_weights_are_found_though_the_scaler_skips_every_step_from_then_on():
    loop = Loop(accumulation=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = AcceleratedOptimizer(torch.optim.SGD(loop.plain.parameters(), lr=0.1), scaler=scaler)
    batch = next(iter(loop.data))

    def run(steps, lr=0.1):
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(2 * steps):
            with loop.accelerator.accumulate(loop.model):
                scaler.scale(loop.model(**batch).loss).backward()
                optimizer.step()
                optimizer.zero_grad()

    with attach(loop.accelerator, loop.model, optimizer, every=3) as guard:
        run(3)
        good = loop.weights()
        run(1, lr=math.inf)
        run(3)
        assert [(step, action) for step, action, _ in windows(guard)] == [(3, "KEEP")], (
            "3 skipped steps may be overflow"
        )
        assert guard.step == 4
        loop.model(**batch)
        assert windows(guard)[1:] == [(4, "ROLLBACK", "restored")]
        assert same(loop.weights(), good)
        run(2)
        assert guard.step > 4, "it steps again"


@pytest.mark.parametrize("what", ["window", "edit"])
def test_a_halt_ends_the_run_with_the_weights_restored(monkeypatch, what):
    loop = Loop()
    guard = attach(loop.accelerator, loop.model, loop.optimizer, every=2)
    before, assessor = loop.weights(), guard.session.guarded.assessor
    halted = functools.partial(assessor.halted, reason="processes disagree", situation="processes_disagree")
    monkeypatch.setattr(assessor, "_agreed", halted)
    with pytest.raises(RestoreError, match="halts the run: processes disagree"):
        loop.run(2) if what == "window" else guard.apply(edits.RTN(8))
    assert same(loop.weights(), before)
    with pytest.raises(EditRejectedError, match="has stopped this run"):
        guard.check()
    guard.detach()


# ---- raw losses -----------------------------------------------------------------------------------------------------


def test_a_raw_loss_that_is_not_finite_rejects_the_window():
    loop = Loop(accumulation=2)
    guard = attach(loop.accelerator, loop.model, loop.optimizer, every=2)
    for loss in (1.0, 3.0, 2.0, math.inf):
        guard.log_loss(loss)
        loop.run(1) if loss in (3.0, math.inf) else None
    assert windows(guard) == [(2, "ROLLBACK", "restored")]
    assert "loss" in guard.history[0].decision.reason
    guard.detach()


def test_losses_of_micro_batches_become_their_mean(monkeypatch):
    loop = Loop(accumulation=2)
    guard = attach(loop.accelerator, loop.model, loop.optimizer, every=3)
    seen = []
    check = guard.session.check_window
    monkeypatch.setattr(
        guard.session, "check_window", lambda **given: seen.append(given["raw_losses"]) or check(**given)
    )
    loop.run(3)
    means = [sum(loop.losses[i : i + 2]) / 2 for i in (0, 2, 4)]
    assert seen[0] == pytest.approx(means)
    guard.detach()


def test_losses_told_replace_those_of_the_model(monkeypatch):
    loop = Loop()
    guard = attach(loop.accelerator, loop.model, loop.optimizer, every=2)
    seen = []
    check = guard.session.check_window
    monkeypatch.setattr(
        guard.session, "check_window", lambda **given: seen.append(given["raw_losses"]) or check(**given)
    )
    loop.run(2, before=lambda step: guard.log_loss(torch.tensor(float(step))))
    assert seen == [(1.0, 2.0)]
    guard.detach()


def test_a_loop_that_shows_no_loss_is_told_so_once(caplog):
    loop = Loop()
    with (
        caplog.at_level(logging.WARNING, "weightproof.accelerate"),
        attach(loop.accelerator, loop.model, loop.optimizer, every=1),
    ):
        for _ in range(3):
            ids = next(iter(loop.data))["input_ids"]
            logits = loop.model(input_ids=ids).logits
            loop.accelerator.backward(
                torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            )
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    assert [record.message for record in caplog.records if "log_loss" in record.message] == [
        "the model returned no loss in training mode: raw losses are not judged; call guard.log_loss(loss)"
    ]


# ---- edits ----------------------------------------------------------------------------------------------------------


def test_an_edit_judges_the_window_before_it_and_becomes_the_new_last_good_state():
    loop = Loop()
    with attach(loop.accelerator, loop.model, loop.optimizer, every=4) as guard:
        loop.run(6)
        step = guard.apply(edits.RTN(8))
        assert [(s.step, s.name) for s in guard.history] == [(4, "train"), (6, "train"), (6, step.name)]
        assert step.applied == "kept"
        kept = loop.weights()
        with guard.edit("zero") as zeroed, torch.no_grad():
            loop.plain.lm_head.weight.zero_()
        assert (zeroed.step, zeroed.applied) == (6, "restored")
        assert same(loop.weights(), kept)
        assert loop.optimizer.state, "moments were gathered on good weights: a rejected edit leaves them"
        loop.run(2, before=lambda step: loop.ruin_weights())
        assert same(loop.weights(), kept)


def test_training_inside_an_edit_is_judged_with_the_edit_and_its_moments_go_with_it():
    loop = Loop()
    with attach(loop.accelerator, loop.model, loop.optimizer, every=2) as guard:
        loop.run(2)
        with guard.edit("unlearn", kind="train") as step:
            loop.run(3, before=lambda _: loop.ruin_weights())
        assert step.applied == "restored"
        assert loop.optimizer.state == {}
        assert [(s.step, s.name) for s in guard.history] == [(2, "train"), (2, "unlearn")]
        loop.run(1)
    assert [(s.step, s.name) for s in guard.history[2:]] == [(6, "train")]


def test_an_edit_under_stop_raises():
    loop = Loop()
    guard = attach(loop.accelerator, loop.model, loop.optimizer, on_violation="stop")
    before = loop.weights()
    with pytest.raises(EditRejectedError), guard.edit("ruin"):
        ruin(loop.plain)
    assert same(loop.weights(), before)
    guard.detach()


# ---- the end --------------------------------------------------------------------------------------------------------


def hooks_of(loop):
    accelerator, inner = loop.accelerator, loop.optimizer.optimizer
    return (
        len(accelerator._custom_objects), len(accelerator._save_model_state_pre_hook),
        len(accelerator._load_model_state_pre_hook),
        len(inner._optimizer_step_post_hooks), len(inner._optimizer_step_pre_hooks),
        len(loop.plain._forward_hooks), len(loop.plain._forward_pre_hooks),
    )  # fmt: skip


def test_detach_judges_the_rest_and_leaves_no_hook(tmp_path):
    loop = Loop(project_dir=str(tmp_path))
    found = hooks_of(loop)
    guard = attach(loop.accelerator, loop.model, loop.optimizer, every=10)
    assert hooks_of(loop) != found
    loop.run(3)
    guard.detach()
    guard.detach()
    assert hooks_of(loop) == found
    assert windows(guard) == [(3, "KEEP", "kept")]
    assert (
        weightproof.Certificate.load(tmp_path / "weightproof" / "certificate.json").predicate["steps"][0]["step"] == 3
    )
    with pytest.raises(InputError, match="this guard was detached"):
        guard.check()
    loop.run(10)
    assert len(guard.history) == 1


def test_an_exception_in_the_block_leaves_as_it_is_and_nothing_is_judged():
    loop = Loop()
    found = hooks_of(loop)
    with pytest.raises(ZeroDivisionError), attach(loop.accelerator, loop.model, loop.optimizer, every=10) as guard:
        loop.run(1)
        raise ZeroDivisionError
    assert guard.history == ()
    assert hooks_of(loop) == found


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_arguments_out_of_range_are_refused():
    loop = Loop()
    for wrong in ({"every": 0}, {"every": 1.5}, {"on_violation": "raise"}, {"policy": "no such tier"}):
        with pytest.raises(InputError):
            attach(loop.accelerator, loop.model, loop.optimizer, **wrong)
    with pytest.raises(InputError, match="must be a torch optimizer"):
        attach(loop.accelerator, loop.model, "adam")


def test_a_model_that_was_not_prepared_is_refused():
    with pytest.raises(InputError, match="was not prepared"):
        attach(Accelerator(cpu=True), tiny_llama())


def test_an_optimizer_of_another_model_is_refused():
    loop = Loop()
    with pytest.raises(InputError, match="trains none of this model's parameters"):
        attach(loop.accelerator, loop.model, torch.optim.SGD(tiny_llama().parameters(), lr=1.0))


def test_a_second_guard_is_refused_until_the_first_is_detached():
    loop = Loop()
    guard = attach(loop.accelerator, loop.model, loop.optimizer)
    with pytest.raises(InputError, match="attached to this Accelerator already"):
        attach(loop.accelerator, loop.model, loop.optimizer)
    guard.detach()
    attach(loop.accelerator, loop.model, loop.optimizer).detach()


def test_the_public_name_is_loaded_on_use():
    assert weightproof.attach.__module__ == "weightproof_callbacks.accelerator"
