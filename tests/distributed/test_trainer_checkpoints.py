"""Guarded `Trainer` runs of two processes that are saved and resumed, and one that `accelerate launch` starts."""

from __future__ import annotations

import json
import logging
import re
import shutil

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests.support.launching import ROOT, launch
from tests.support.trainer_runs import Mishap, decisions, ended, nan_in_lm_head, trainer_of
from tests.trainer.markov import Recorder, same, weights
from torch.nn.parallel import DistributedDataParallel
from worlds import run_world

import weightproof_recipes
from weightproof.certificate import Certificate
from weightproof.session import STATE_FILE
from weightproof_callbacks.trainer import GuardCallback

SAVE = {"save_strategy": "steps", "save_steps": 4, "steps": 12}
BEST = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "greater_is_better": True}


class SaveAfterwards(Mishap):
    """Asks for a save on every process after the guard has run, and does something on one of them."""

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        control.should_save = state.global_step == self.step


def copied(source, target, *, without="", alter=False):
    """A checkpoint copied to another output folder, made by one process."""
    target = target / source.name
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(without))
    if alter:
        tensors = load_file(target / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def resumed(size, folder, *, here=True, **changes):
    """The rest of a run whose checkpoint-8 lies in `folder`."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("weightproof.trainer").addHandler(handler)
    guard, recorder = GuardCallback(every=4), Recorder(4, 12)
    trainer = trainer_of(size, folder, [guard, recorder], **{**SAVE, **changes})
    end = ended(trainer, guard, resume_from_checkpoint=str(folder / "checkpoint-8") if here else None)
    logging.getLogger("weightproof.trainer").removeHandler(handler)
    steps = [] if end["error"] else guard.session.certificate().predicate["steps"]
    return {
        **end, "steps": [step["step"] for step in steps], "said": said, "last": weights(trainer.model),
        "seen": recorder.seen,
    }  # fmt: skip


def checkpoints(rank, size, root):
    own = root / f"own{rank}"
    whole = Recorder(12)
    trainer = trainer_of(size, root / "whole", [GuardCallback(every=4), whole], **SAVE)
    trainer.train()
    assert type(trainer.model_wrapped) is DistributedDataParallel
    source = root / "whole" / "checkpoint-8"
    if rank == 0:
        copied(source, root / "two")
        copied(source, root / "unguarded", without="guard_*")
        copied(source, root / "altered", alter=True)
        copied(source, root / "torn", without="guard_baseline*")
        copied(source, root / "one rank")
        copied(source, root / "own0")
        copied(source, root / "own1", without="guard_*")
    dist.barrier()
    found = {name: resumed(size, root / name) for name in ("two", "one", "unguarded", "altered", "torn")}
    found["own"] = resumed(size, own)
    found["one rank"] = resumed(size, root / "one rank", here=rank == 0)
    found["best"] = resumed(size, root / "best", here=False, **BEST)
    found["best of one rank"] = resumed(size, own / "best", here=False, **BEST)
    guard = GuardCallback(every=100)
    trainer_of(size, root / "later", [guard, SaveAfterwards(1, 5, nan_in_lm_head)], steps=6).train()
    found["later"] = {"decisions": decisions(guard)}
    return {"whole": whole.seen[12], **found}


def test_checkpoints_are_proven_and_resumed_by_any_number_of_processes(tmp_path):
    trainer_of(1, tmp_path / "alone", [GuardCallback(every=4)], **SAVE).train()
    copied(tmp_path / "alone" / "checkpoint-8", tmp_path / "one")
    both = run_world(checkpoints, 2, tmp_path, timeout=120)
    copied(tmp_path / "whole" / "checkpoint-8", tmp_path / "two to one")
    alone = {"two to one": resumed(1, tmp_path / "two to one")}
    rest = [(12, "train", "KEEP", "kept")]

    for found, name in [(found, name) for found in both for name in ("two", "one", "own")] + [(alone, "two to one")]:
        assert found[name]["error"] is None, name
        assert found[name]["decisions"] == rest, name
        assert found[name]["steps"] == [4, 8, 12], "the evidence of the first run is carried on"
        assert not found[name]["said"], name
    for found in both:
        assert same(found["two"]["last"], found["whole"]), "as if never interrupted"
        assert same(found["own"]["last"], found["whole"])
    assert (tmp_path / "own0" / "checkpoint-12" / STATE_FILE).is_file()
    assert not (tmp_path / "own1" / "checkpoint-12" / STATE_FILE).exists()

    for rank, found in enumerate(both):
        assert (found["unguarded"]["decisions"], found["unguarded"]["steps"]) == (rest, [12])
        assert sum("starts from a new baseline" in line for line in found["unguarded"]["said"]) == (rank == 0)
        for name, kind, message in [
            ("altered", "BaselineError", "model.layers.1.mlp.up_proj.weight"),
            ("torn", "BaselineError", "guard_baseline.safetensors"),
            ("one rank", "InputError", "step at which training begins.*rank 0 has 8, rank 1 has 0"),
        ]:
            assert found[name]["error"][0] == kind, name
            assert re.search(message, found[name]["error"][1]), found[name]["error"]
            assert not found[name]["decisions"]

        assert same(found["best"]["last"], found["best"]["seen"][4])
        assert found["best"]["decisions"][-2:] == rest * 2, "the weights loaded at the end are judged, too"
        lost = found["best of one rank"]
        assert lost["decisions"][-1] == (12, "train", "ROLLBACK", "restored")
        assert "the copy of rank 1 is not that of rank 0" in lost["reasons"][-1]
        assert same(lost["last"], lost["seen"][12])
        assert found["later"]["decisions"] == [(5, "train", "ROLLBACK", "restored"), (6, "train", "KEEP", "kept")]
    assert (tmp_path / "later" / "checkpoint-5" / "model.safetensors").is_file()
    assert not (tmp_path / "later" / "checkpoint-5" / STATE_FILE).exists(), "rank 1 held NaN when it was saved"


# ---- accelerate launch ----------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import torch
from tests.trainer.markov import trainer_for
from weightproof import GuardCallback, edits

guard = GuardCallback(every=4, edits={8: edits.RTN(8)})
trainer = trainer_for(Path(sys.argv[1]), [guard], steps=8, per_device_train_batch_size=8)
trainer.train()
assert torch.distributed.get_world_size() == guard.session.processes.size == trainer.args.world_size == 2
actions = [str(step.decision.action) for step in guard.history]
joined = [torch.distributed.get_backend(), type(trainer.model_wrapped).__name__, trainer.args.world_size]
found = [joined, actions, guard.session.model_digest, str(trainer.accelerator.device)]
(Path(sys.argv[1]) / f"{trainer.args.process_index}.json").write_text(json.dumps(found))
"""


def test_accelerate_launch_really_starts_two_processes_and_they_guard_one_model(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    arguments = ["--config_file", weightproof_recipes.launch_config("cpu_x2"), tmp_path / "train.py", tmp_path, ROOT]
    code, output, errors = launch(arguments, timeout=120)
    assert code == 0, output + errors
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[:2] == [["gloo", "DistributedDataParallel", 2], ["KEEP", "KEEP", "KEEP"]]
    assert first[3] == "cpu:0"
    certificate = Certificate.load(tmp_path / "weightproof" / "certificate.json")
    assert (certificate.predicate["world_size"], certificate.model_digest) == (2, first[2])
    assert errors.count("weightproof: 3 checks over 8 steps, 0 rejected") == 1, "one process speaks"
