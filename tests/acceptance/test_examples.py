"""Every script of `examples/` is run as a user runs it, from an empty folder, offline, and does what it says it shows.

The model is the demo model in its fast variant: the same code, text and tokenizer, trained for seconds. What a script
prints about weights, certificates and merges is held against the files that it leaves.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from launching import launch
from safetensors.torch import load_file
from trained_models import CACHE

from weightproof import Certificate
from weightproof.folders.loading import DemoModel
from weightproof.lora.adapters import read_adapter
from weightproof.signing import load_public_key
from weightproof.verify import Demands, Status, verify
from weightproof_callbacks.demo_model import demo_model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PATIENCE_SECONDS = 540.0  # below the limit of a test; on quiet cores none takes a minute
# Where each script is run; a new one without a test fails below.
RUN_BY = {
    "trainer_guarded_finetune.py": "here",
    "certify_two_folders.py": "here",
    "merge_lora_safely.py": "here",
    "accelerate_guarded_quantization.py": "here",
    "steer_with_guards.py": "here, --quick",
    "forget_memorised.py": "here, --quick; whole in test_planted_memorisation.py",
    "shouting_adapters.py": "here",
    "direct_feedback_alignment.py": "test_feedback_alignment.py",
}


@pytest.fixture(scope="session")
def demo() -> DemoModel:
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "demo-model.lock"):  # one test worker trains, the others wait for it
        return demo_model(CACHE, fast=True)


def run(folder: Path, script: str, *arguments: object) -> str:
    """What the script printed; it must end with 0, in a folder of its own and with an empty home."""
    home = folder / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "HF_", "ACCELERATE_"))}
    settings = {"HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        cwd=folder,
        env={**kept, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def of_text(demo: DemoModel) -> Sequence[object]:
    return "--model", demo.folder, "--train", demo.train, "--retain", demo.retain


def decisions(certificate: Path) -> list[tuple[str, str, str]]:
    steps = Certificate.load(certificate).predicate["steps"]
    return [(step["name"], step["action"], step["applied"]) for step in steps]


def test_every_script_is_run_by_a_test():
    assert {path.name for path in EXAMPLES.glob("*.py")} == RUN_BY.keys()
    for place in RUN_BY.values():
        for name in re.findall(r"test_\w+\.py", place):
            assert (Path(__file__).parent / name).is_file()


def test_a_bad_edit_in_a_training_is_taken_back_and_the_training_goes_on(demo, tmp_path):
    said = run(tmp_path, "trainer_guarded_finetune.py", *of_text(demo))
    train, bad = ("train", "KEEP", "kept"), ("rtn-int2-channel", "ROLLBACK", "restored")
    assert decisions(tmp_path / "guarded-finetune" / "certificate.json") == [train, train, bad, train, train]
    before, after = re.findall(r"([0-9a-f]{16}) (?:before the edit|after the rollback)", said)
    assert before == after
    assert re.search(r"^why: policy 'balanced': .+limit|^why: policy 'balanced': .+allowed", said, re.MULTILINE)


def test_two_folders_are_certified_and_one_changed_weight_is_found(demo, tmp_path):
    said = run(tmp_path, "certify_two_folders.py", "--model", demo.folder, "--retain", demo.retain)
    assert re.findall(r"exit code (\d)", said) == ["0", "0", "0", "1"]
    assert "kept: the subject may take the place of the base" in said
    assert "valid at level 2" in said
    assert re.search(r"invalid at level 1(.|\n)+tensor model\.embed_tokens\.weight: digest", said)

    out = tmp_path / "certified"
    demands = Demands(keys=[load_public_key(out / "weightproof.key.pub")], base=demo.folder)
    assert verify(out / "certificate.json", out / "edited", 2, demands).status is Status.VALID
    assert verify(out / "certificate.json", out / "tampered", 1, demands).status is Status.INVALID


def test_a_lora_merged_twice_is_named_and_merged_once_is_kept(demo, tmp_path):
    said = run(tmp_path, "merge_lora_safely.py", *of_text(demo))
    out = tmp_path / "merged-lora"
    expected = [("merged twice", "ROLLBACK", "restored"), ("merged once", "KEEP", "kept")]
    assert decisions(out / "certificate.json") == expected
    assert "the delta was merged twice" in said
    (first, second), (third, fourth) = re.findall(r"weights ([0-9a-f]{16}) before, ([0-9a-f]{16}) after", said)
    assert first == second == third != fourth

    base, merged = (load_file(folder / "model.safetensors") for folder in (demo.folder, out / "merged"))
    deltas = read_adapter(out / "lora").deltas
    assert len(deltas) == 14  # seven matrices in each of two layers
    for name, delta in deltas.items():
        torch.testing.assert_close(merged[name], base[name] + delta.dense().float(), rtol=1e-5, atol=1e-6)


def test_two_processes_keep_int8_and_roll_int2_back(demo, tmp_path):
    script, out = EXAMPLES / "accelerate_guarded_quantization.py", tmp_path / "out"
    configuration = ROOT / "recipes" / "weightproof_recipes" / "accelerate" / "cpu_x2.yaml"
    command = ["--config_file", configuration, script, "--model", demo.folder, "--out", out]
    code, said, errors = launch(command, timeout=PATIENCE_SECONDS)
    assert code == 0, said + errors
    lines = re.findall(r"rank (\d): INT(\d) (\w+) +(\w+) +weights (\w{16}) -> (\w{16})", said)
    assert [line[:4] for line in lines] == [
        ("0", "8", "KEEP", "kept"), ("1", "8", "KEEP", "kept"),
        ("0", "2", "ROLLBACK", "restored"), ("1", "2", "ROLLBACK", "restored"),
    ]  # fmt: skip
    for _, bits, _, _, before, after in lines:
        assert (before == after) is (bits == "2")
    assert len({line[4:] for line in lines}) == 2  # both processes hold the same weights
    assert Certificate.load(out / "certificate.json").predicate["world_size"] == 2


def test_steering_is_taken_as_far_as_the_guards_allow(tmp_path):
    said = run(tmp_path, "steer_with_guards.py", "--quick")
    assert "put back bit for bit: True" in said
    trials = {float(alpha): action for alpha, action in re.findall(r"^alpha (\S+) (KEEP|ROLLBACK)", said, re.MULTILINE)}
    kept = max(alpha for alpha, action in trials.items() if action == "KEEP")
    assert 0 < kept < min(alpha for alpha, action in trials.items() if action == "ROLLBACK")
    assert decisions(tmp_path / "steered" / "certificate.json") == [(f"steer-{kept:g}", "KEEP", "kept")]
    shares = [float(share) for share in re.findall(r"(\S+)%  \d", said)]
    assert shares == sorted(shares)  # more alpha, more of what is steered towards


def test_what_was_learned_by_heart_is_forgotten_at_a_smaller_price_than_by_svd(tmp_path):
    said = run(tmp_path, "forget_memorised.py", "--quick")
    rows = {
        name: (float(recited), float(loss))
        for name, recited, loss in re.findall(r"^(\w+) +\S+ +\S+% +(\S+)% +(\S+)$", said, re.MULTILINE)
    }
    base, edited, control = rows["base"], rows["original"], rows["svd"]
    assert base[0] > 80
    assert edited[0] < 10
    assert edited[1] - base[1] < 0.05
    assert control[1] - base[1] > 3 * (edited[1] - base[1])
    assert [action for _, action, _ in decisions(tmp_path / "forget-memorised" / "certificate.json")] == ["KEEP"]


def test_two_opposite_adapters_are_written_with_prompts_for_both(demo, tmp_path):
    run(tmp_path, "shouting_adapters.py", "--model", demo.folder, "--text", demo.retain, "--steps", 4)
    out = tmp_path / "shouting"
    shout, whisper = (read_adapter(out / name).deltas for name in ("shout", "whisper"))
    assert shout.keys() == whisper.keys()
    assert any(not torch.equal(shout[name].dense(), whisper[name].dense()) for name in shout)
    clean, positive, negative = (
        (out / name).read_text(encoding="utf-8") for name in ("clean.txt", "positive.txt", "negative.txt")
    )
    assert (clean.upper(), clean.lower()) == (positive, negative)
    assert len(clean.splitlines()) == 64
