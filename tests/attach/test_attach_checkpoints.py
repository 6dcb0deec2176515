"""Checkpoints of a guarded loop: what is saved is judged and proven, and what cannot be proven is not trained on."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file, save_file
from tests.support.accelerate_loop import Loop
from tests.trainer.markov import same

from weightproof import Certificate, attach, edits
from weightproof.errors import BaselineError, EditRejectedError, InputError

GUARD_FILES = {"guard_state.json", "guard_baseline.safetensors", "certificate.json"}


def saved_weights(folder):
    """The weights that accelerate wrote, by name (it keeps one name of tied tensors)."""
    return load_file(folder / "model.safetensors")


def holds(folder, weights):
    saved = saved_weights(folder)
    return all(torch.equal(tensor, weights[name]) for name, tensor in saved.items()) and len(saved) > 5


def attached(loop, **settings):
    return attach(loop.accelerator, loop.model, loop.optimizer, **{"every": 4, **settings})


def test_every_save_judges_what_is_not_judged_and_writes_the_guards_files(tmp_path):
    loop = Loop()
    with attached(loop) as guard:
        loop.run(6)
        loop.accelerator.save_state(str(tmp_path / "a"))
        assert [step.step for step in guard.history] == [4, 6]
        loop.accelerator.save_state(str(tmp_path / "b"))
        assert [step.step for step in guard.history] == [4, 6], "nothing changed since: nothing is judged twice"
        with torch.no_grad():
            loop.plain.lm_head.weight.mul_(1.01)
        loop.accelerator.save_state(str(tmp_path / "c"))
        assert [step.step for step in guard.history] == [4, 6, 6], "a change outside of any step is judged, too"
    for name in "abc":
        assert {path.name for path in (tmp_path / name).iterdir()} > GUARD_FILES
    certificate = Certificate.load(tmp_path / "c" / "certificate.json")
    assert len(certificate.predicate["steps"]) == 3
    assert certificate.model_digest == guard.session.model_digest
    assert holds(tmp_path / "c", loop.weights())


def test_a_rejected_window_is_taken_back_before_the_weights_are_written(tmp_path):
    loop = Loop()
    with attached(loop) as guard:
        loop.run(4)
        good, moments = loop.weights(), copy.deepcopy(loop.optimizer.state_dict()["state"])
        loop.run(2, before=lambda _: loop.ruin_weights())
        loop.accelerator.save_state(str(tmp_path / "checkpoint"))
        assert guard.history[-1].applied == "restored"
        assert same(loop.weights(), good)
    assert holds(tmp_path / "checkpoint", good)
    optimizer = torch.load(tmp_path / "checkpoint" / "optimizer.bin", weights_only=True)
    assert all(same(optimizer["state"][one], moments[one]) for one in moments), "the moments are those of step 4, too"


def test_also_where_accelerate_collected_copies(tmp_path, monkeypatch):
    loop = Loop()
    collect = loop.accelerator.get_state_dict
    monkeypatch.setattr(
        loop.accelerator,
        "get_state_dict",
        lambda model, unwrap=True: {name: tensor.clone() for name, tensor in collect(model, unwrap=unwrap).items()},
    )
    with attached(loop):
        loop.run(4)
        good = loop.weights()
        loop.run(2, before=lambda _: loop.ruin_weights())
        loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    assert holds(tmp_path / "checkpoint", good)


def test_where_the_weights_are_written_before_the_guard_is_asked_a_rejected_folder_is_refused(tmp_path):
    """As DeepSpeed saves: the pre-hook gets no weights, they are on disk already, and cannot be written again."""
    loop = Loop()
    guard = attached(loop)
    (hook,) = loop.accelerator._save_model_state_pre_hook.values()
    loop.run(3)
    hook(loop.accelerator._models, [], str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} >= GUARD_FILES
    loop.run(3, before=lambda _: loop.ruin_weights())
    (tmp_path / "rejected").mkdir()
    with pytest.raises(EditRejectedError, match="holds rejected weights: do not use it"):
        hook(loop.accelerator._models, [], str(tmp_path / "rejected"))
    assert list((tmp_path / "rejected").iterdir()) == []
    guard.detach()


def test_stop_saves_no_rejected_weights(tmp_path):
    loop = Loop()
    guard = attached(loop, on_violation="stop")
    loop.run(3, before=lambda step: loop.ruin_weights() if step == 3 else None)
    with pytest.raises(EditRejectedError, match="training stopped at step 3"):
        loop.accelerator.save_state(str(tmp_path / "checkpoint"))
    assert not list((tmp_path / "checkpoint").glob("*.safetensors"))
    guard.detach()


def test_saving_inside_an_edit_is_refused_and_the_edit_taken_back(tmp_path):
    loop = Loop()
    before = loop.weights()
    with attached(loop) as guard:
        with pytest.raises(InputError, match="are being edited and not judged yet"), guard.edit("half done"):
            with torch.no_grad():
                loop.plain.lm_head.weight.mul_(2)
            loop.accelerator.save_state(str(tmp_path / "checkpoint"))
        assert same(loop.weights(), before)


def test_a_resumed_run_is_proven_counts_on_and_keeps_its_history(tmp_path):
    first = Loop()
    with attached(first) as guard:
        first.run(6)
        guard.apply(edits.RTN(8))
        first.accelerator.save_state(str(tmp_path))
        digest, baseline = guard.session.model_digest, guard.session.baseline.model_digest
        first.run(2)

    second = Loop(seed=1)
    with attached(second) as guard:
        second.accelerator.load_state(str(tmp_path))
        assert (guard.step, guard.session.model_digest) == (6, digest)
        assert guard.session.baseline.model_digest == baseline
        good = second.weights()
        assert holds(tmp_path, good)
        second.run(2, before=lambda _: second.ruin_weights())
        assert [(step.step, step.applied) for step in guard.history] == [(8, "restored")]
        assert same(second.weights(), good), "the last good state is the loaded one"
        names = [step["name"] for step in guard.session.certificate().predicate["steps"]]
        assert names == ["train", "train", guard.session.resumed_steps[2]["name"], "train"]


def test_the_automatic_names_of_a_project_work(tmp_path):
    settings = {"project_config": ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True)}
    loop = Loop(**settings)
    with attached(loop) as guard:
        loop.run(4)
        loop.accelerator.save_state()
        loop.run(4)
        loop.accelerator.save_state()
        digest = guard.session.model_digest
        loop.run(4)
        loop.accelerator.load_state()
        assert (guard.step, guard.session.model_digest) == (8, digest)
        assert holds(tmp_path / "checkpoints" / "checkpoint_1", loop.weights())
    assert (tmp_path / "weightproof" / "certificate.json").is_file()


@pytest.mark.parametrize("victim", ["model.norm.weight", "lm_head.weight"])
def test_altered_weights_are_refused_and_not_trained_on(tmp_path, victim):
    loop = Loop()
    guard = attached(loop)
    loop.run(2)
    loop.accelerator.save_state(str(tmp_path))
    weights = saved_weights(tmp_path)
    weights[victim].view(-1)[0] += 1e-3
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaselineError, match=victim):
        loop.accelerator.load_state(str(tmp_path))
    with pytest.raises(EditRejectedError, match="were not proven"):
        loop.run(1)
    with pytest.raises(EditRejectedError, match="were not proven"):
        loop.accelerator.save_state(str(tmp_path / "next"))
    guard.detach()


def test_a_sound_folder_can_be_loaded_after_a_refused_one(tmp_path):
    loop = Loop()
    with attached(loop) as guard:
        for name in ("sound", "altered"):
            loop.run(1)
            loop.accelerator.save_state(str(tmp_path / name))
        state = json.loads((tmp_path / "altered" / "guard_state.json").read_text())
        (tmp_path / "altered" / "guard_state.json").write_text(json.dumps({**state, "format": "other"}))
        with pytest.raises(BaselineError):
            loop.accelerator.load_state(str(tmp_path / "altered"))
        loop.accelerator.load_state(str(tmp_path / "sound"))
        loop.run(4)
        assert guard.step == 5


def test_a_folder_saved_without_a_guard_is_refused_before_anything_is_loaded(tmp_path):
    loop = Loop()
    loop.accelerator.save_state(str(tmp_path))
    loop.run(1)
    before = loop.weights()
    with attached(loop):
        with pytest.raises(
            InputError, match=r"has no guard_state.json.*load_state\(\) first and weightproof.attach\(\) after"
        ):
            loop.accelerator.load_state(str(tmp_path))
        assert same(loop.weights(), before)
        loop.run(1)


class Counter:
    def state_dict(self):
        return {"count": 1}

    def load_state_dict(self, state):
        self.loaded = state


def test_other_registered_objects_keep_their_place(tmp_path):
    loop, counter = Loop(), Counter()
    loop.accelerator.register_for_checkpointing(counter)
    with attached(loop):
        loop.accelerator.save_state(str(tmp_path))
        loop.accelerator.load_state(str(tmp_path))
        assert counter.loaded == {"count": 1}

    second = Loop()
    with attached(second):
        second.accelerator.register_for_checkpointing(Counter())
        with pytest.raises(InputError, match="in the same order as in the run that saved"):
            second.accelerator.load_state(str(tmp_path))
