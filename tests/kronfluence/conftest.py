"""Agreement with kronfluence. Skipped where it is not installed: see `make test-kronfluence`."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "kronfluence")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """Keep the result of a run of the whole folder beside the tests."""
    if config.option.keyword or config.option.collectonly or [Path(arg).resolve() for arg in config.args] != [HERE]:
        return
    stats = terminalreporter.stats
    reports = [one for outcome in ("passed", "failed", "error") for one in stats.get(outcome, [])]
    reports = [one for one in reports if one.when == "call" or not one.passed]
    if not reports:
        return  # not installed
    lines = [f"python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in PACKAGES), ""]
    for one in reports:
        measured = "".join(f"  {what} {value}" for what, value in one.user_properties)
        lines.append(f"{one.outcome:8} {one.nodeid.partition('tests/kronfluence/')[2]}{measured}")
    (HERE / "last_run.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
