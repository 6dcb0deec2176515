"""`weightproof.attach` in two real processes (DDP): one verdict, one rollback, checkpoints that prove themselves."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests.support.accelerate_loop import Loop, fresh_accelerate
from torch.nn.parallel import DistributedDataParallel
from worlds import run_world

from weightproof import Certificate, attach, edits
from weightproof.errors import CollectiveError, EditRejectedError, InputError, WeightproofError
from weightproof.probes import digest_of, read_tensors


def digest(loop):
    """Of the weights that this process holds now, read anew."""
    return digest_of(read_tensors(loop.plain, {}, ()))


def moments(loop):
    """All moments in one row."""
    states = (loop.optimizer.state[parameter] for parameter in loop.plain.parameters())
    return torch.cat([value.flatten() for state in states for value in state.values()])


def windows(guard):
    return [(step.step, step.name, str(step.decision.action), step.applied) for step in guard.history]


def two_processes(size, **settings):
    loop = Loop(**settings)
    assert dist.get_world_size() == loop.accelerator.num_processes == size
    assert isinstance(loop.model, DistributedDataParallel)
    assert all(type(parameter) is torch.nn.Parameter for parameter in loop.plain.parameters())
    return loop


def outcome(error):
    return type(error).__name__, str(error)


# ---- windows and edits ----------------------------------------------------------------------------------------------


def train_and_edit(rank, size, folder):
    loop = two_processes(size, accumulation=2)
    with attach(loop.accelerator, loop.model, loop.optimizer, every=3, output_dir=folder) as guard:
        assert guard.session.processes.size == size
        loop.run(7)
        kept = guard.apply(edits.RTN(8))
        held = digest(loop)
        with guard.edit("zero") as zeroed, torch.no_grad():
            loop.plain.lm_head.weight.zero_()
        assert (kept.applied, zeroed.applied) == ("kept", "restored")
        assert digest(loop) == held
    return windows(guard), guard.step, held, [step.decision.digest for step in guard.history]


def test_steps_are_counted_under_accumulation_and_every_rank_decides_alike(tmp_path):
    first, second = run_world(train_and_edit, 2, tmp_path)
    assert first == second
    seen, steps, _, _ = first
    assert steps == 7
    assert [row[0] for row in seen] == [3, 6, 7, 7, 7]
    assert [row[2] for row in seen] == ["KEEP", "KEEP", "KEEP", "KEEP", "ROLLBACK"]
    certificate = Certificate.load(tmp_path / "certificate.json")
    assert certificate.predicate["world_size"] == 2
    assert len(certificate.predicate["steps"]) == 5


def poisoned(rank, size, victims):
    """Weights turn NaN on some ranks: without the guard the copies part."""
    loop = two_processes(size)
    good = {}
    with attach(loop.accelerator, loop.model, loop.optimizer, every=4) as guard:
        loop.run(
            8,
            before=lambda step: loop.ruin_weights() if step == 6 and rank in victims else None,
            after=lambda step: good.update(digest=digest(loop), moments=moments(loop)) if step == 4 else None,
        )
        restored, same_moments = digest(loop), torch.equal(moments(loop), good["moments"])
        loop.run(4)
    return windows(guard), good["digest"], restored, same_moments, digest(loop)


@pytest.mark.parametrize("victims", [(0, 1), (1,), (0,)])
def test_a_bad_step_on_any_rank_is_taken_back_on_both(victims):
    first, second = run_world(poisoned, 2, victims)
    assert first == second
    seen, good, restored, same_moments, last = first
    assert [(row[0], row[2], row[3]) for row in seen] == [
        (4, "KEEP", "kept"), (8, "ROLLBACK", "restored"), (12, "KEEP", "kept"),
    ]  # fmt: skip
    assert restored == good
    assert same_moments
    assert last != good, "training goes on"


def told_loss(rank, size):
    loop = two_processes(size)
    with attach(loop.accelerator, loop.model, loop.optimizer, every=2) as guard:
        loop.run(2, before=lambda step: guard.log_loss(float("nan") if rank == 1 and step == 2 else 1.0))
    return windows(guard), digest(loop)


def test_a_raw_loss_that_is_nan_on_one_rank_rejects_the_window_on_both():
    first, second = run_world(told_loss, 2)
    assert first == second
    assert first[0][0][2:] == ("ROLLBACK", "restored")


def stopped(rank, size):
    loop = two_processes(size)
    guard = attach(loop.accelerator, loop.model, loop.optimizer, every=2, on_violation="stop")
    before = digest(loop)
    with pytest.raises(EditRejectedError) as caught:
        loop.run(2, before=lambda _: loop.ruin_weights() if rank == 0 else None)
    guard.detach()
    return outcome(caught.value), before == digest(loop)


def test_stop_raises_on_every_rank():
    first, second = run_world(stopped, 2)
    assert first == second
    assert first[0][1].startswith("training stopped at step 2")
    assert first[1]


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def save(rank, size, folder):
    loop = two_processes(size)
    with attach(loop.accelerator, loop.model, loop.optimizer, every=4) as guard:
        loop.run(4)
        good = digest(loop)
        loop.run(2, before=lambda _: loop.ruin_weights() if rank == 1 else None)
        loop.accelerator.save_state(str(folder))
        assert digest(loop) == good
    return good, guard.step


def resume(rank, size, folder):
    loop = two_processes(size, seed=1) if size > 1 else Loop(seed=1)
    with attach(loop.accelerator, loop.model, loop.optimizer, every=4) as guard:
        loop.accelerator.load_state(str(folder))
        found = digest(loop), guard.step
        loop.run(2)
    return found, windows(guard), [step["name"] for step in guard.session.certificate().predicate["steps"]]


def save_alone(folder):
    loop = Loop()
    with attach(loop.accelerator, loop.model, loop.optimizer, every=4) as guard:
        loop.run(6)
        loop.accelerator.save_state(str(folder))
        return digest(loop), guard.step


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 2), (2, 1), (1, 2)])
def test_a_checkpoint_is_proven_and_resumed_by_any_number_of_processes(saved_by, loaded_by, tmp_path):
    saved = run_world(save, 2, tmp_path) if saved_by == 2 else [save_alone(tmp_path)]
    assert len(set(saved)) == 1
    resumed = run_world(resume, 2, tmp_path) if loaded_by == 2 else [resume(0, 1, tmp_path)]
    for found, seen, names in resumed:
        assert found == saved[0]
        assert [(row[0], row[2]) for row in seen] == [(8, "KEEP")]
        assert names == ["train", "train", "train"]
    fresh_accelerate()


def refused(rank, size, folder):
    loop = two_processes(size)
    guard = attach(loop.accelerator, loop.model, loop.optimizer, every=1)
    with pytest.raises(WeightproofError) as caught:
        loop.accelerator.load_state(str(folder))
    went_on = True
    try:
        guard.check()
    except EditRejectedError:
        went_on = False
    guard.detach()
    return type(caught.value).__name__, re.sub(r"^rank \d+: ", "", str(caught.value)), went_on


def test_altered_weights_are_refused_on_every_rank(tmp_path):
    run_world(save, 2, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    first, second = run_world(refused, 2, tmp_path)
    assert first == second
    kind, message, went_on = first
    assert (kind, went_on) == ("BaselineError", False)
    assert "model.layers.1.mlp.up_proj.weight" in message


def save_unguarded(rank, size, folder):
    two_processes(size).accelerator.save_state(str(folder))


def test_a_checkpoint_without_the_guards_files_is_refused_on_every_rank(tmp_path):
    run_world(save_unguarded, 2, tmp_path)
    first, second = run_world(refused, 2, tmp_path)
    assert first[:2] == second[:2]
    assert first[0] == "InputError"
    assert "has no guard_state.json" in first[1]


# ---- ranks that do not do the same ----------------------------------------------------------------------------------


def attach_differently(rank, size, settings):
    loop = two_processes(size)
    with pytest.raises(WeightproofError) as caught:
        attach(loop.accelerator, loop.model, loop.optimizer, **settings[rank])
    return type(caught.value).__name__


@pytest.mark.parametrize(
    "settings",
    [({"every": 2}, {"every": 3}), ({"on_violation": "stop"}, {}), ({"policy": "aggressive"}, {"policy": "balanced"})],
)
def test_settings_that_differ_between_ranks_are_refused_on_every_rank(settings):
    assert run_world(attach_differently, 2, settings) == ["InputError", "InputError"]


def attach_alone(rank, size):
    loop = two_processes(size)
    if rank == 1:
        return None
    with pytest.raises(CollectiveError) as caught:
        attach(loop.accelerator, loop.model, loop.optimizer, timeout=2.0)
    return caught.value.ranks, caught.value.timed_out


def test_a_guard_attached_on_some_ranks_only_says_which_are_missing():
    assert run_world(attach_alone, 2)[0] == ((1,), True)


def one_loop_fails(rank, size):
    loop = two_processes(size)
    with (
        pytest.raises((CollectiveError, ZeroDivisionError)) as caught,
        attach(loop.accelerator, loop.model, loop.optimizer, every=100) as guard,
    ):
        loop.run(2)
        if rank == 1:
            raise ZeroDivisionError("the data ran out")
        guard.check()
    return outcome(caught.value)


def test_an_exception_in_the_loop_of_one_rank_ends_the_others_at_the_guard():
    (kind, message), own = run_world(one_loop_fails, 2)
    assert own == ("ZeroDivisionError", "the data ran out")
    assert kind == "CollectiveError"
    assert "rank 1 failed in training under guard: ZeroDivisionError: the data ran out" in message


def other_settings(rank, size):
    loop = two_processes(size)
    with pytest.raises(InputError, match="every must be a whole number"):
        attach(loop.accelerator, loop.model, loop.optimizer, every=0)
    return True


def test_a_wrong_argument_is_refused_before_anyone_waits():
    assert run_world(other_settings, 2) == [True, True]


def wrong_on_one(rank, size):
    loop = two_processes(size)
    with pytest.raises(InputError) as caught:
        attach(loop.accelerator, loop.model, loop.optimizer, every=0 if rank == 1 else 1, timeout=30.0)
    return str(caught.value)


def test_a_wrong_argument_on_one_rank_is_told_to_the_others_at_once():
    told, own = run_world(wrong_on_one, 2, timeout=20)
    assert own.startswith("every must be a whole number of steps")
    assert "rank 1" in told
    assert own in told
