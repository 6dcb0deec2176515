"""`accelerate launch`: the CPU configurations start two processes, the example does what its page says on both."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from tests.support.launching import ROOT, launch
from tests.support.wandb_records import read_offline_run
from worlds import run_world

import weightproof_recipes
from weightproof import Certificate, attach
from weightproof.errors import InputError

PAGE = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
CPU_CONFIGS = ("cpu_x2",)  # launched by the example below, and with Trainer in test_trainer_checkpoints

# ---- configurations -------------------------------------------------------------------------------------------------


def each_alone(rank, size):
    """A loop that does not ask for the CPU, in an environment such as launchers make: what the guard says to it."""
    accelerator = Accelerator()
    assert accelerator.num_processes == 1
    with pytest.raises(InputError) as refused:
        attach(accelerator, accelerator.prepare(torch.nn.Linear(2, 2)))
    return str(refused.value)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the trap is that of machines without GPU")
def test_processes_that_accelerate_does_not_join_are_refused():
    """Without cpu=True two processes start, and each believes it is alone."""
    for said in run_world(each_alone, 2):
        assert "2 processes were launched but the Accelerator sees 1" in said
        assert "Accelerator(cpu=True)" in said


@pytest.mark.parametrize(
    ("name", "kind", "flag", "settings"),
    [
        ("cpu_x2", DistributedType.MULTI_GPU, "multi_gpu", {"use_cpu": True}),
        ("multi_gpu_ddp", DistributedType.MULTI_GPU, "multi_gpu", {"mixed_precision": "bf16"}),
        ("fsdp2", DistributedType.FSDP, "use_fsdp", {"fsdp_version": 2, "fsdp_reshard_after_forward": True}),
        ("zero3", DistributedType.DEEPSPEED, "use_deepspeed", {"zero_stage": 3, "zero3_save_16bit_model": True}),
    ],
)
def test_accelerate_understands_every_line_of_a_configuration(name, kind, flag, settings):
    path = str(weightproof_recipes.launch_config(name))
    config = load_config_from_file(path)
    assert (config.distributed_type, config.num_processes, config.num_machines) == (kind, 2, 1)

    parsed = launch_command_parser().parse_args(["--config_file", path, "script.py"])
    known = set(vars(parsed))
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= known, "a key that accelerate does not read"
    parsed.nondefault = set()
    asked, _, _ = _validate_launch_command(parsed)
    flags = {name for name in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(asked, name)}
    assert flags == {flag}
    assert {name: getattr(asked, name) for name in settings} == settings
    assert asked.num_processes == 2


def test_every_shipped_configuration_is_tested_and_found_by_name():
    assert weightproof_recipes.launch_configs() == ("cpu_x2", "fsdp2", "multi_gpu_ddp", "zero3")
    assert [name for name in weightproof_recipes.launch_configs() if name.startswith("cpu")] == list(CPU_CONFIGS)
    assert "cpu_x2" not in weightproof_recipes.shipped(), "a recipe is a procedure of weightproof"
    with pytest.raises(InputError, match="no launch configuration 'zero2'; there are cpu_x2, fsdp2"):
        weightproof_recipes.launch_config("zero2")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["fsdp2"], 0, r"weightproof_recipes.accelerate.fsdp2\.yaml"),
        (["x"], 1, "no launch conf"),
        ([], 1, "name one of"),
    ],
)
def test_the_command_prints_where_a_configuration_lies(arguments, code, says):
    command = [sys.executable, "-m", "weightproof_recipes", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert re.search(says, done.stdout + done.stderr)
    assert "Traceback" not in done.stderr


# ---- the example ----------------------------------------------------------------------------------------------------


def command_of_the_page():
    """The command of the page on examples, as arguments of `accelerate launch`."""
    (found,) = re.findall(r"^\$ accelerate launch (.*?[^\\])$", PAGE, re.MULTILINE | re.DOTALL)
    return shlex.split(found.replace("\\\n", " "))


def test_the_command_of_the_page_keeps_int8_and_rolls_int2_back_on_both_ranks(tmp_path):
    code, output, errors = launch([*command_of_the_page(), "--steps", "60", "--out", tmp_path], timeout=400)
    assert code == 0, output + errors
    lines = [line for line in output.splitlines() if line.startswith(("world", "rank", "certificate"))]
    assert lines[0] == "world size 2 on cpu"
    pattern = r"rank (\d): INT(\d) +(\w+) +(\w+) +weights (\w{16}) -> (\w{16})"
    said = [re.fullmatch(pattern, line).groups() for line in lines[1:5]]
    assert [row[:4] for row in said] == [
        ("0", "8", "KEEP", "kept"), ("1", "8", "KEEP", "kept"),
        ("0", "2", "ROLLBACK", "restored"), ("1", "2", "ROLLBACK", "restored"),
    ]  # fmt: skip
    (start,), (kept,) = {row[4] for row in said[:2]}, {row[5] for row in said}
    assert start != kept
    assert {row[4] for row in said[2:]} == {kept}, "after the rollback every rank holds the INT8 weights again"

    certificate = Certificate.load(tmp_path / "certificate.json")
    assert lines[5] == f"certificate {tmp_path}/certificate.json: world size 2, sha256 {certificate.digest[:16]}"
    assert certificate.predicate["world_size"] == 2
    assert [step["action"] for step in certificate.predicate["steps"]] == ["KEEP", "KEEP", "KEEP", "ROLLBACK"]
    assert len(list(tmp_path.rglob("certificate.json"))) == 1

    assert len(list(tmp_path.rglob("*.wandb"))) == 1, "only the main process opens a run"
    run = read_offline_run(tmp_path)
    decided = [(row["guard/step"], row["guard/decision/keep"]) for row in run.history if "guard/decision/keep" in row]
    assert decided == [(50, 1), (60, 1), (60, 1), (60, 0)]
    assert [alert.title for alert in run.alerts] == ["weightproof rolled back rtn-int2-channel"]
    assert run.summary["guard/verdict"] == "ROLLBACK"
