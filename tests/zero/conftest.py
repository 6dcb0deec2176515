"""Runs of DeepSpeed in real processes. Not part of `make test`: see `make test-zero`."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import worlds

# DeepSpeed asks for its accelerator when it is imported, and the processes inherit the answer. It builds with the
# ninja of this environment: another version of ninja would find nothing built, and begin anew.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
HERE = Path(__file__).parent
BUILD = (
    "from deepspeed.accelerator import get_accelerator as get; get().create_op_builder('ShareMemCommBuilder').load()"
)
sys.path.insert(0, str(HERE))

worlds.PRELOADED.append("deepspeed")


@pytest.fixture(scope="session", autouse=True)
def operator_built():
    """Build DeepSpeed's operator before the clock of any world runs: minutes at the first time, with a C++ compiler."""
    done = subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """Keep the result of a run of the whole folder beside the tests."""
    if config.option.keyword or config.option.collectonly or [Path(arg).resolve() for arg in config.args] != [HERE]:
        return
    reports = [
        report
        for outcome in ("passed", "failed", "skipped", "error")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call" or report.outcome != "passed"
    ]
    packages = ", ".join(f"{name} {version(name)}" for name in ("deepspeed", "torch", "accelerate", "transformers"))
    lines = [f"Python {platform.python_version()}, {packages}; 2 processes, gloo, CPU; exit status {int(exitstatus)}"]
    lines += [
        f"{report.outcome:7} {report.duration:6.1f} s  {report.nodeid.removeprefix('tests/zero/')}"
        for report in sorted(reports, key=lambda report: report.nodeid)
    ]
    (HERE / "last_run.txt").write_text("\n".join(lines) + "\n")
