"""What is noted of a window of training: seen, told, and never acted on."""

from __future__ import annotations

import math
import random
import time

import pytest
import torch
from tests.support.chains import tiny_llama
from torch import nn

from weightproof import GuardSession
from weightproof.collective import Processes
from weightproof.readings.readings_json import readings_json, readings_of
from weightproof.readings.vector_moves import vector_moves
from weightproof.statistics import window_reports
from weightproof.statistics.window_reports import (
    KNOWN,
    Usual,
    is_noted,
    loss_peak,
    measurement_of,
    moment_growth,
    norm_peak,
    noted,
    rate_peak,
    slowest_step,
    weight_move,
    words_of_report,
    worst_reports,
)
from weightproof.types import Outcome, WindowReport
from weightproof_callbacks.gradient_watch import GradientWatch


def wandering(count, *, seed=0, around=2.0, spread=0.05, fall=0.0):
    draw = random.Random(seed)
    return [around * math.exp(draw.gauss(0.0, spread) - fall * i) for i in range(count)]


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_one_bad_step_of_a_window_is_noted_though_the_others_are_healthy():
    history = wandering(40)
    report = loss_peak(history, [2.0, 3.4, 2.0])
    assert report.is_noted
    assert report.value == 3.4
    assert report.reference == pytest.approx(2.0, rel=0.05)
    assert not loss_peak(history, [2.0, 2.2, 2.0]).is_noted
    assert loss_peak(history, [2.0, math.nan]).is_noted
    assert loss_peak(history[: window_reports.KNOWN], [9.0]) is None, "too little is known"
    assert loss_peak(history, []) is None


def test_a_bad_step_is_noted_while_the_loss_falls_steeply():
    history = wandering(30, around=6.0, fall=0.05)
    assert loss_peak(history, [history[-1] * 3.0]).is_noted
    assert not loss_peak(history, [history[-1]]).is_noted


@pytest.mark.parametrize("seed", range(10))
def test_healthy_steps_are_hardly_ever_noted(seed):
    losses = wandering(300, seed=seed, around=4.0, spread=0.08, fall=0.002)
    norms = wandering(300, seed=seed, around=1.0, spread=0.25)
    reports = [
        found
        for at in range(20, 300, 10)
        for found in (loss_peak(losses[:at], losses[at : at + 10]), norm_peak(norms[:at], norms[at : at + 10]))
    ]
    assert sum(report.is_noted for report in reports) == 0


def test_a_rate_is_noted_beyond_every_one_before_it():
    assert rate_peak(1.5e-3, 1e-3).is_noted
    assert not rate_peak(1e-3, 1e-3).is_noted
    assert rate_peak(1e-3, 0.0) is None, "a group that never stepped may begin with any"


def test_a_slow_step_is_evidence_only_where_it_is_very_slow():
    usual = [0.05] * KNOWN
    assert slowest_step(usual, [0.05, 2.0], "rank 1").where == "rank 1"
    assert slowest_step(usual, [0.05, 0.9], "rank 1") is None, "clocks are no evidence below a second"
    assert slowest_step([1.0] * KNOWN, [5.0], "rank 1") is None
    assert slowest_step(usual[1:], [9.0], "rank 1") is None


def test_what_stays_is_noted_once_and_what_comes_again_each_time():
    usual = Usual()
    for _ in range(KNOWN):
        assert moment_growth(usual, {"a": 9.0}) is None
        usual.learn({"a": 1.0, "b": 2.0})
    assert moment_growth(usual, {"a": 9.0, "b": 2.0}).where == "a"
    assert moment_growth(usual, {"a": 9.0}).is_noted
    usual.learn({"a": 9.0})
    assert not moment_growth(usual, {"a": 9.0}).is_noted, "it stays"
    usual.learn({"a": 1.0})
    usual.learn({"a": 1.0})
    assert moment_growth(usual, {"a": 20.0}).is_noted, "one leap does not hide the next"
    usual.learn({"a": math.nan, "b": None})
    assert set(usual.known()) == {"a", "b"}


def test_moves_are_held_against_windows_of_the_same_learning_rate():
    usual = Usual()
    for _ in range(KNOWN):
        usual.learn({"w": 1e-2 / 5e-3})
    assert not weight_move(usual.known(5e-4), {"w": 1e-3}).is_noted
    assert weight_move(usual.known(5e-4), {"w": 1e-2}).is_noted
    assert weight_move(usual.known(5e-4), {"w": None, "other": 1.0}) is None


def test_of_each_statistic_the_worst_is_kept_whoever_saw_it():
    mild, bad = (WindowReport("optimizer", "moment_growth", value, 1.0, 4.0, "w") for value in (2.0, 9.0))
    rate = WindowReport("learning rate", "rate_peak", 1.0, 1.0, 1.05)
    assert worst_reports([mild, rate, bad]) == worst_reports([bad, mild, rate]) == (bad, rate)
    assert "9 times the usual, noted: 4 or more (w)" in words_of_report(measurement_of(bad))
    assert is_noted(measurement_of(bad))
    assert not is_noted(measurement_of(mild))


# ---- a session ------------------------------------------------------------------------------------------------------


def nudge(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1e-3 * torch.randn(weight.shape, generator=generator) * weight.square().mean().sqrt())


def watched_windows(count=4):
    """A session that has kept some healthy windows."""
    model = tiny_llama()
    session = GuardSession(model)
    session.watch()
    losses = wandering(5 * count)
    for number in range(count):
        nudge(model, number)
        window = losses[5 * number : 5 * number + 5]
        step = session.check_window(step=5 * number + 5, raw_losses=window, grad_norms=[1.0] * 5, update_size=5e-3)
        assert step.applied == "kept"
        assert noted(step.decision) == ()
    return model, session


def statistics_of(step):
    return {one.statistic: one for one in step.decision.reported if one.family == window_reports.FAMILY}


def test_a_note_changes_no_verdict_no_warning_and_no_weight():
    model, session = watched_windows()
    nudge(model, 9)
    strange = WindowReport("optimizer", "moment_growth", 1e6, 1.0, 4.0, "exp_avg of w")
    step = session.check_window(step=35, raw_losses=[2.0, 5.0, 2.0, 2.0, 2.0], update_size=5e-3, reports=[strange])
    assert {one.statistic for one in noted(step.decision)} == {"loss_peak", "moment_growth"}
    assert (step.applied, step.decision.warned) == ("kept", False)
    assert all(one.limit is None and one.outcome is Outcome.PASS for one in noted(step.decision))
    judged = [one for verdict in step.verdicts for one in verdict.measurements]
    assert not any(one.family == window_reports.FAMILY for one in judged), "a report is no verdict"
    assert statistics_of(step)["num_noted"].value == 2.0


def test_one_weight_and_one_gain_that_moved_alone_are_named():
    model, session = watched_windows()
    name = "model.layers.0.mlp.up_proj.weight"
    nudge(model, 9)
    with torch.no_grad():
        dict(model.named_parameters())[name][3, 5] += 1.0
        model.model.norm.weight.mul_(1.02)
    found = {one.statistic: one for one in noted(session.check_window(step=35, update_size=5e-3).decision)}
    assert name in found["weight_move"].reason
    assert "model.norm.weight" in found["gain_move"].reason
    nudge(model, 10)
    assert noted(session.check_window(step=40, update_size=5e-3).decision) == ()


def test_readings_with_reports_come_back_from_json():
    model, session = watched_windows()
    nudge(model, 9)
    step = session.check_window(step=35, raw_losses=[2.0] * 5, grad_norms=[9.0] * 5, update_size=5e-3)
    again = readings_of(readings_json(step.judged.after))
    assert again.window == step.judged.after.window
    assert again.window.reports


def test_moves_of_vectors_leave_out_what_has_no_size():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    nn.init.zeros_(model[0].bias)
    session = GuardSession(model)
    session.watch()
    snapshot = session.training.rolling.newest.point.snapshot
    with torch.no_grad():
        model[1].weight.mul_(1.1)
        model[0].bias.add_(1.0)
    assert vector_moves(model, snapshot, Processes.alone()) == {"1.weight": pytest.approx(0.1, rel=1e-5)}


# ---- a loop ---------------------------------------------------------------------------------------------------------


class Run:
    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Linear(8, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.watch = GradientWatch(self.optimizer, model=self.model)

    def window(self, steps=5, before=None):
        for step in range(steps):
            self.model(torch.randn(4, 8)).square().mean().backward()
            if before is not None and step == 2:
                before()
            self.optimizer.step()
            self.optimizer.zero_grad()
        norms = [norm for norm, _ in self.watch.drain()]
        assert self.watch.impossible_moments() == ()
        found = {one.statistic: one for one in self.watch.reports(0)}
        self.watch.learn(norms)
        return found

    def known(self):
        for _ in range(5):
            assert not any(one.is_noted for one in self.window().values())
        return self


def test_a_rate_that_leaps_for_one_step_is_noted():
    run = Run().known()
    group = run.optimizer.param_groups[0]
    before = group["lr"]
    found = run.window(before=lambda: group.update(lr=1.5 * before))
    assert found["rate_peak"].is_noted
    assert found["rate_peak"].value == pytest.approx(1.5 * before)
    assert run.watch.update_size == pytest.approx((2 + 3 * 1.5) * before)


def test_a_moment_that_grew_within_its_bound_is_noted_by_name():
    run = Run().known()

    def raise_it():
        run.optimizer.state[run.model.weight]["exp_avg"][0, 3] = 30.0

    found = run.window(before=raise_it)
    assert found["moment_growth"].is_noted
    assert found["moment_growth"].where == "exp_avg of weight"


def test_a_step_that_takes_seconds_is_noted_with_its_rank(monkeypatch):
    run = Run().known()
    now = time.perf_counter()
    clock = iter(now + offset for offset in (0.0, 0.01, 1.0, 1.01, 2.0, 9.0, 10.0, 10.01, 11.0, 11.01))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    found = run.window()
    assert found["slowest_step"].is_noted
    assert (found["slowest_step"].where, found["slowest_step"].value) == ("rank 0", pytest.approx(7.0))


def test_every_hook_is_taken_away():
    run = Run()
    run.watch.remove()
    assert not run.model._forward_hooks
    assert not run.optimizer._optimizer_step_post_hooks
