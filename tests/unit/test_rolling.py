"""Good states of a run: which are kept, which one a run goes back to, and when it has to stop."""

from __future__ import annotations

import json

import pytest
import torch
from tests.support.chains import tiny_llama

from weightproof.errors import InputError, RestoreError
from weightproof.session import GuardSession
from weightproof.transactions.rolling import GoodState, Rolling, RollingOptions, place_of_snapshots
from weightproof.transactions.steps import SafePoint
from weightproof.types import Action


class Kept:
    """Stands for a snapshot."""

    nbytes = 100

    def __init__(self):
        self.discarded = False

    def discard(self):
        self.discarded = True


def good(step):
    return GoodState(SafePoint(Kept(), None), None, None, None, step)


def ring(*steps, **options):
    found = Rolling(RollingOptions(**options))
    for step in steps:
        found.make_room()
        found.push(good(step))
    return found


# ---- which are kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "left"), [(1, (30,)), (2, (20, 30)), (5, (10, 20, 30))])
def test_the_newest_states_are_kept(keep, left):
    assert ring(10, 20, 30, keep=keep).steps == left


def test_room_is_made_before_the_next_state_is_captured():
    states = ring(10, 20)
    first = states._states[0].point.snapshot
    states.make_room()
    assert first.discarded
    assert states.steps == (20,)


@pytest.mark.parametrize(("budget", "left"), [(99, (30,)), (100, (30,)), (250, (20, 30)), (300, (10, 20, 30))])
def test_older_states_are_dropped_to_keep_to_the_budget_and_the_newest_never(budget, left):
    assert ring(10, 20, 30, keep=3, snapshot_budget=budget).steps == left


def test_the_largest_process_decides_for_all_what_fits():
    states = Rolling(RollingOptions(keep=3, snapshot_budget=250))
    for step in (10, 20):
        states.push(good(step), lambda size: 2 * size)
    assert states.steps == (20,)


# ---- which one a run goes back to -----------------------------------------------------------------------------------


def test_the_newest_first_and_the_next_older_one_when_the_run_fails_again_soon():
    states = ring(10, 20)
    assert states.choose(30, "bad").step == 20
    assert states.choose(40, "bad").step == 10
    assert states.choose(50, "bad").step == 10, "there is no older one"
    assert [(one.step, one.to) for one in states.rollbacks] == [(30, 20), (40, 10), (50, 10)]


@pytest.mark.parametrize(("kept", "back"), [(1, 30), (2, 40)])
def test_after_the_cooldown_the_newest_is_trusted_again(kept, back):
    states = ring(20, 30, keep=2, cooldown=2)
    states.choose(40, "bad")
    states.push(good(40))
    for _ in range(kept):
        states.kept()
    assert states.choose(50, "bad").step == back


def test_a_newest_state_in_doubt_is_passed_over():
    assert ring(10, 20).choose(30, "bad", doubtful=True).step == 10
    assert ring(20).choose(30, "bad", doubtful=True).step == 20


def test_without_a_state_there_is_nothing_to_go_back_to():
    with pytest.raises(InputError, match="no good state"):
        ring().choose(5, "bad")


def test_after_too_many_rollbacks_it_says_what_was_tried():
    states = ring(10, max_rollbacks=1)
    states.choose(20, "bad")
    assert not states.exhausted
    states.choose(30, "bad")
    assert states.exhausted
    assert "at step 20 back to step 10; at step 30 back to step 10" in states.tried()
    assert "1 rollbacks" in states.tried()


@pytest.mark.parametrize(
    "options",
    [
        {"rollback": "all"},
        {"data": "again"},
        {"rollback": "weights", "data": "replay"},
        {"keep": 0},
        {"keep": 1.5},
        {"cooldown": -1},
        {"max_rollbacks": -1},
        {"max_rollbacks": True},
        {"snapshot_budget": 0},
        {"snapshots": "tape"},
        {"lr_factor": 0.0},
        {"lr_factor": 1.5},
        {"lr_factor": float("nan")},
        {"lr_factor": "half"},
    ],
)
def test_options_out_of_range_are_refused_by_name(options):
    with pytest.raises(InputError, match=next(iter(set(options) - {"rollback"}), "rollback")):
        RollingOptions(**options)


class Disk:
    """Stands for a folder of good states."""

    def __init__(self, damaged=(), room=9):
        self.damaged, self.room, self.kept = set(damaged), room, []

    def keep(self, tensors):
        return None

    def commit(self, state):
        self.kept = [*self.kept, state.step][-self.room :]
        return state

    def has(self, state):
        return state.step in self.kept

    def forget(self, state):
        self.kept.remove(state.step)

    def damage(self, state):
        return f"a bit of {state.step} flipped" if state.step in self.damaged else None


def on_disk(disk, *steps, **options):
    found = Rolling(RollingOptions(snapshots="disk", **options), disk=disk)
    for step in steps:
        found.make_room()
        found.push(good(step))
    return found


def test_what_the_disk_has_pruned_is_none_to_go_back_to():
    assert on_disk(Disk(room=2), 10, 20, 30, keep=5).steps == (20, 30)


def test_a_damaged_state_on_disk_is_passed_over_by_name_and_forgotten(caplog):
    disk = Disk(damaged=(20, 30))
    assert on_disk(disk, 10, 20, 30, keep=3).choose(40, "bad").step == 10
    assert disk.kept == [10], "a run that is killed now must not go on from the others"
    assert "of step 30 is damaged and is passed over for that of step 20: a bit of 30 flipped" in caplog.text
    assert "of step 20 is damaged and is passed over for that of step 10: a bit of 20 flipped" in caplog.text


def test_where_every_state_is_damaged_none_is_put_back():
    disk = Disk(damaged=(20, 30))
    with pytest.raises(RestoreError, match="no good state is left to go back to: a bit of 20 flipped"):
        on_disk(disk, 20, 30).choose(40, "bad")
    assert disk.kept == [20]


def test_a_state_in_doubt_is_none_that_a_killed_run_goes_on_from():
    disk = Disk()
    assert on_disk(disk, 10, 20).choose(30, "bad", doubtful=True).step == 10
    assert disk.kept == [10]


@pytest.mark.parametrize(
    ("asked", "folder", "found"),
    [(None, None, "memory"), (None, "x", "disk"), ("disk", "x", "disk"), ("pinned", None, "pinned")],
)
def test_states_lie_on_disk_where_there_is_a_folder(asked, folder, found):
    assert place_of_snapshots(asked, folder) == found


# ---- in a session ---------------------------------------------------------------------------------------------------


class Counter:
    """A training state of one number."""

    nbytes = 8

    def __init__(self, held, *, fails=False):
        self.held, self.value, self.fails = held, held["steps"], fails

    def put_back(self):
        if self.fails:
            raise RestoreError("the optimizer does not take it")
        self.held["steps"] = self.value
        return {"restored": ["a counter"]}

    def parts(self):
        return {}, {}


def nudge(model, scale=1e-3):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 + scale)


def ruin(model):
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))


def watched(held=None, **options):
    model = tiny_llama()
    session = GuardSession(model)
    capture = None if held is None else lambda: Counter(held)
    session.watch(Rolling(RollingOptions(**options), capture), step=0)
    return model, session


def digest_now(session):
    return session.rolling.newest.point.snapshot.model_digest


def test_weights_and_training_state_go_back_together_and_the_record_says_so():
    held = {"steps": 0}
    model, session = watched(held)
    nudge(model)
    held["steps"] = 5
    assert session.check_window(step=5, raw_losses=[2.0]).applied == "kept"
    held["steps"] = 10
    ruin(model)
    step = session.check_window(step=10, raw_losses=[2.0])
    assert (step.applied, held["steps"]) == ("restored", 5)
    assert {**step.record.params} == {"back_to_step": 5, "rollbacks": 1, "restored": ["a counter"]}


def test_trackers_are_told_how_often_and_how_far_back(tmp_path):
    model = tiny_llama()
    session = GuardSession(model, trackers=["jsonl"], output_dir=tmp_path)
    session.watch()
    ruin(model)
    session.check_window(step=5, raw_losses=[2.0])
    session.close()
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["rows"]["guard/rollbacks"], event["rows"]["guard/back_to_step"]) == (1.0, 0.0)


def test_a_run_that_breaks_again_goes_back_further_and_is_judged_from_there():
    model, session = watched()
    first = digest_now(session)
    nudge(model)
    session.check_window(step=5, raw_losses=[2.0])
    second = digest_now(session)
    for at, expected in ((10, second), (15, first)):
        ruin(model)
        assert session.check_window(step=at, raw_losses=[2.0]).applied == "restored"
        assert session.model_digest == expected == digest_now(session)
    nudge(model)
    kept = session.check_window(step=20, raw_losses=[2.0])
    assert (kept.applied, kept.record.digest_before) == ("kept", first)


def test_a_first_loss_far_too_high_puts_the_last_good_state_itself_in_doubt():
    model, session = watched()
    first = digest_now(session)
    session.training.losses = [2.0, 2.01] * 20
    nudge(model, 0.01)
    assert session.check_window(step=5, raw_losses=[2.0] * 5).applied == "kept"
    nudge(model)
    step = session.check_window(step=10, raw_losses=[9.0] * 5)
    assert (step.decision.action, step.record.params["back_to_step"]) == (Action.ROLLBACK, 0)
    assert session.model_digest == first


def test_a_window_that_ends_high_does_not_become_the_last_good_state_yet():
    model, session = watched()
    first = digest_now(session)
    session.training.losses = [2.0, 2.01] * 20
    nudge(model)
    assert session.check_window(step=5, raw_losses=[2.0, 2.0, 2.0, 9.0]).applied == "kept"
    assert session.rolling.steps == (0,)
    nudge(model)
    assert session.check_window(step=10, raw_losses=[9.0] * 4).applied == "restored"
    assert session.model_digest == first


def test_too_many_rollbacks_halt_with_the_last_good_state_in_place():
    model, session = watched(max_rollbacks=2, keep=1)
    good_weights = digest_now(session)
    for at, action in ((5, Action.ROLLBACK), (10, Action.ROLLBACK), (15, Action.HALT)):
        ruin(model)
        step = session.check_window(step=at, raw_losses=[2.0])
        assert (step.decision.action, step.applied) == (action, "restored")
        assert session.model_digest == good_weights
    assert step.decision.situation == "rollbacks_exhausted"
    assert "at step 5 back to step 0; at step 10 back to step 0; at step 15 back to step 0" in step.decision.reason


def test_a_training_state_that_does_not_go_back_halts():
    held = {"steps": 0}
    model, session = watched(held)
    session.rolling.newest.training.fails = True
    ruin(model)
    with pytest.raises(RestoreError, match="does not take it"):
        session.check_window(step=5, raw_losses=[2.0])
    assert (session.history[-1].decision.action, session.history[-1].applied) == (Action.HALT, "not restored")


def test_no_rollback_goes_behind_a_kept_edit():
    model, session = watched()
    nudge(model)
    session.check_window(step=5, raw_losses=[2.0])
    assert session.rolling.steps == (0, 5)
    with session.edit("small", step=7):
        nudge(model, 1e-4)
    assert session.rolling.steps == (7,)


def test_stale_masters_break_a_window():
    class Masters:
        stale_now = ()

        def tensors(self):
            return {}

        def refresh(self, names):
            return None

        def stale(self):
            return self.stale_now

    masters = Masters()
    model = tiny_llama()
    session = GuardSession(model, masters=masters)
    session.watch()
    nudge(model)
    assert session.check_window(step=5, raw_losses=[2.0]).applied == "kept"
    masters.stale_now = ("lm_head.weight",)
    nudge(model)
    step = session.check_window(step=10, raw_losses=[2.0])
    assert step.applied == "restored"
    assert "lm_head.weight: stale_master" in step.decision.reason


@pytest.mark.parametrize(("skipped", "applied"), [(2, "kept"), (3, "restored")])
def test_a_few_steps_may_be_left_out_and_no_more(skipped, applied):
    model, session = watched()
    nudge(model)
    step = session.check_window(step=5, raw_losses=[2.0], grad_norms=[1.0], num_skipped=skipped)
    assert step.applied == applied
