"""Real quantizers on small trained models. Not part of `make test`: see `make test-quantizers`."""

from __future__ import annotations

import platform
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
PACKAGES = ("torch", "torchao", "bitsandbytes", "optimum-quanto", "hqq", "compressed-tensors")

with warnings.catch_warnings():
    # What these packages do when they are imported (old interfaces of torch) is theirs.
    warnings.simplefilter("ignore")
    import backends  # noqa: F401


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """Keep the result of a run of the whole folder beside the tests."""
    if config.option.keyword or config.option.collectonly or [Path(arg).resolve() for arg in config.args] != [HERE]:
        return
    reports = [
        report
        for outcome in ("passed", "failed", "error", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
        if outcome != "passed" or report.when == "call"
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    lines = [f"python {platform.python_version()}, {versions}", ""]
    lines += [f"{report.outcome:8} {report.nodeid.partition('tests/quantizers/')[2]}" for report in reports]
    (HERE / "last_run.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
