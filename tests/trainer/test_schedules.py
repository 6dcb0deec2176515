"""Schedules of edits in `Trainer`: what is pruned stays pruned, what is rolled back is not held, copies stay equal."""

from __future__ import annotations

import json

import pytest
import torch
from tests.support.trainer_runs import trainer_of
from tests.trainer.markov import Chains, Fault, Recorder, fill, same, tiny_llama, trainer_for, weights
from transformers import TrainerCallback
from worlds import run_world

from weightproof.edits import RTN
from weightproof.errors import InputError
from weightproof.policy import load_policy
from weightproof.types import Action
from weightproof.weights import iter_weight_matrices
from weightproof_callbacks.schedules import FakeQuantization, GradualPruning
from weightproof_callbacks.trainer import GuardCallback

# A model that has learned nothing yet: what an edit does to its outputs says nothing.
LENIENT = load_policy("balanced").override(
    actions={"outputs_reject": "KEEP_WARNED", "gross_without_outputs": "KEEP_WARNED"}
)


def zero_shares(model):
    """Share of zeros of each matrix inside the blocks."""
    return {
        matrix.name: (matrix.load() == 0).float().mean().item()
        for matrix in iter_weight_matrices(model)
        if matrix.family in ("attn", "ffn")
    }


def pruned_run(folder, schedule, guard, *extra, steps=12, **changes):
    held = schedule.attach(guard)
    trainer = trainer_for(folder, [*extra, held, guard], steps=steps, **changes)
    trainer.train()
    return trainer, held


def edits_of(guard):
    return [(step.step, step.name, step.applied) for step in guard.history if step.name != "train"]


def test_the_sparsity_is_the_cubic_of_zhu_and_gupta():
    schedule = GradualPruning(0.8, begin=100, end=500, every=100, initial_sparsity=0.2)
    # 0.8 - 0.6 (1 - k/4)^3 for k = 0 ... 4
    expected = {100: 0.2, 200: 0.546875, 300: 0.725, 400: 0.790625, 500: 0.8}
    assert {step: edit.share for step, edit in schedule.edits.items()} == pytest.approx(expected)
    assert list(GradualPruning(0.5, begin=1, end=9, every=4).edits) == [5, 9], "nothing is pruned at 0 %"


BAD = {
    "final_sparsity": ({"final_sparsity": 1.5}, "sparsities are shares"),
    "initial": ({"final_sparsity": 0.2, "initial_sparsity": 0.3}, "sparsities are shares"),
    "begin": ({"final_sparsity": 0.2, "begin": 0}, "begin must be a whole number"),
    "order": ({"final_sparsity": 0.2, "begin": 9}, "must come after begin"),
    "every": ({"final_sparsity": 0.2, "every": 3}, "must divide end - begin"),
    "scope": ({"final_sparsity": 0.2, "scope": "model"}, "scope"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_pruning_out_of_range_is_refused(case):
    changes, message = BAD[case]
    with pytest.raises(InputError, match=message):
        GradualPruning(**{"begin": 1, "end": 9, "every": 4, **changes})


def test_a_quantization_out_of_range_is_refused():
    for changes, message in (
        ({"bits": 1}, "bits"),
        ({"mode": "both"}, "mode"),
        ({"begin": 9}, "after begin"),
        ({"every": 0}, "every"),
        ({"mode": "round", "every": 3}, "must divide"),
    ):
        with pytest.raises(InputError, match=message):
            FakeQuantization(**{"bits": 4, "begin": 1, "end": 9, **changes})


def test_two_edits_at_one_step_are_refused():
    guard = GuardCallback(edits={8: RTN(8)})
    with pytest.raises(InputError, match="an edit at step 8 already"):
        GradualPruning(0.5, begin=4, end=8, every=4).attach(guard)


@pytest.mark.parametrize("scope", ["matrix", pytest.param("global", marks=pytest.mark.slow)])
def test_pruned_weights_stay_0_through_training_and_the_others_learn(tmp_path, scope):
    guard = GuardCallback(LENIENT, every=4)
    recorder = Recorder(8)
    schedule = GradualPruning(0.5, begin=2, end=8, every=2, scope=scope)
    trainer, held = pruned_run(tmp_path, schedule, guard, recorder)
    shares = zero_shares(trainer.model)
    assert sum(shares.values()) / len(shares) == pytest.approx(0.5, abs=0.05)
    if scope == "matrix":
        assert min(shares.values()) == max(shares.values()) == 0.5
    assert [(step, applied) for step, _, applied in edits_of(guard)] == [(4, "kept"), (6, "kept"), (8, "kept")]
    after = weights(trainer.model)
    for name, mask in held.masks.items():
        assert not after[name][~mask].any()
        assert (after[name] != recorder.seen[8][name])[mask].float().mean() > 0.9, "kept weights went on learning"
    assert "50.0 %" in held.in_words()


def test_a_pruning_that_is_taken_back_is_not_held(tmp_path):
    guard = GuardCallback(load_policy("balanced"), every=20)
    schedule = GradualPruning(0.9, begin=30, end=50, every=20, initial_sparsity=0.8)
    trainer, held = pruned_run(tmp_path, schedule, guard, steps=54)
    assert {applied for _, _, applied in edits_of(guard)} == {"restored"}
    assert len(edits_of(guard)) == 2
    assert not held.masks
    assert max(zero_shares(trainer.model).values()) == 0.0


def test_masks_hold_after_a_window_was_taken_back(tmp_path):
    guard = GuardCallback(LENIENT, every=3)
    schedule = GradualPruning(0.4, begin=2, end=4, every=2)
    trainer, held = pruned_run(tmp_path, schedule, guard, Fault(8, fill(float("nan"))))
    rejected = [step.step for step in guard.history if step.decision.action is Action.ROLLBACK]
    assert rejected == [9]
    assert len(held.masks) == len(zero_shares(trainer.model))
    assert list(zero_shares(trainer.model).values()) == pytest.approx([0.4] * len(held.masks), abs=1e-3)


def test_a_resumed_run_holds_what_the_checkpoint_had_pruned(tmp_path):
    schedule = GradualPruning(0.4, begin=2, end=4, every=2)
    saves = {"save_strategy": "steps", "save_steps": 6}
    pruned_run(tmp_path, schedule, GuardCallback(LENIENT, every=3), steps=6, **saves)
    guard = GuardCallback(LENIENT, every=3)
    held = schedule.attach(guard)
    trainer = trainer_for(tmp_path, [guard, held], model=tiny_llama(seed=1), steps=10)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert len(held.masks) == len(zero_shares(trainer.model))
    assert list(zero_shares(trainer.model).values()) == pytest.approx([0.4] * len(held.masks), abs=1e-3)


class Seen(TrainerCallback):
    """What the forward pass of each step sees of one matrix, and what the optimizer is given."""

    NAME = "model.layers.0.self_attn.q_proj.weight"

    def __init__(self):
        self.forward, self.optimizer, self.after, self.gradients = [], [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weight = dict(model.named_parameters())[self.NAME]

        def note(module, inputs):
            if module.training:
                self.forward.append(self.weight.detach().clone())

        self.handle = model.register_forward_pre_hook(note)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer.append(self.weight.detach().clone())
        self.gradients.append(self.weight.grad.clone())

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.after.append(self.weight.detach().clone())

    def on_train_end(self, args, state, control, **kwargs):
        self.handle.remove()


def rounded(weight, bits=4):
    """Symmetric rounding, one scale a row."""
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.round(weight / step) * step


def test_fake_weights_are_seen_and_the_weights_are_moved_by_their_gradient(tmp_path):
    schedule, seen = FakeQuantization(4, begin=2, end=8, every=2), Seen()
    guard = GuardCallback(LENIENT, every=4)
    fake = schedule.attach(guard)
    plain = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.05}
    trainer = trainer_for(tmp_path, [fake, seen, guard], steps=8, warmup_steps=0, **plain)
    trainer.train()
    for step in range(8):
        shown = step in (2, 4, 6)
        expected = rounded(seen.optimizer[step]) if shown else seen.optimizer[step]
        torch.testing.assert_close(seen.forward[step], expected, rtol=0, atol=1e-7)
        assert torch.equal(seen.optimizer[step], seen.after[step - 1]) or step == 0, "the weights came back bit for bit"
        torch.testing.assert_close(seen.after[step], seen.optimizer[step] - 0.05 * seen.gradients[step])
    assert fake.steps_shown == 3
    assert edits_of(guard) == [(8, "rtn-int4-channel", "kept")]
    torch.testing.assert_close(seen.weight.detach(), rounded(seen.after[-1]), rtol=0, atol=1e-7)
    assert "3 steps" in fake.in_words()


def test_rounding_for_good_is_guarded_each_time(tmp_path):
    guard = GuardCallback(LENIENT, every=20)
    callback = FakeQuantization(8, begin=2, end=6, every=2, mode="round").attach(guard)
    trainer_for(tmp_path, [guard, callback], steps=6).train()
    assert edits_of(guard) == [(step, "rtn-int8-channel", "kept") for step in (2, 4, 6)]


# ---- several processes ----------------------------------------------------------------------------------------------


def schedules_of(rank, size, folder):
    pruning = GuardCallback(LENIENT, every=4, retain=[Chains(4, seed=4)[index] for index in range(4)])
    held = GradualPruning(0.5, begin=2, end=6, every=2).attach(pruning)
    first = trainer_of(size, folder / "pruned", [held, pruning, Fault(9, fill(float("nan")))], steps=10)
    first.train()
    faking = GuardCallback(LENIENT, every=4)
    fake = FakeQuantization(4, begin=2, end=6).attach(faking)
    second = trainer_of(size, folder / "fake", [fake, faking], steps=6)
    second.train()
    return {
        "pruned": weights(first.model),
        "masks": dict(held.masks),
        "edits": edits_of(pruning) + edits_of(faking),
        "actions": [str(step.decision.action) for step in (*pruning.history, *faking.history)],
        "fake": weights(second.model),
        "shown": fake.steps_shown,
    }


def test_two_processes_prune_hold_and_round_alike(tmp_path):
    one, two = run_world(schedules_of, 2, tmp_path)
    for what in ("pruned", "masks", "fake"):
        assert same(one[what], two[what]), what
    assert one["edits"] == two["edits"]
    assert [applied for _, _, applied in one["edits"]] == ["kept"] * 3
    assert one["actions"] == two["actions"]
    assert one["actions"].count("ROLLBACK") == 1, "the NaN at step 9"
    assert one["shown"] == 4
    for name, mask in one["masks"].items():
        assert not one["pruned"][name][~mask].any()
        assert mask.float().mean().item() == pytest.approx(0.5)
    log = (tmp_path / "pruned" / "weightproof" / "events.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["type"] == "event" for line in log) >= 4
