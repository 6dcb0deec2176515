"""Runs of DeepSpeed in real processes. Not part of `make test`: see `make test-zero`."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import worlds

# DeepSpeed asks for its accelerator when it is imported, and the processes inherit the answer.
os.environ["DS_ACCELERATOR"] = "cpu"
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

worlds.PRELOADED.append("deepspeed")


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
