"""The site builds strictly, and every Python block of README and docs runs on the way a reader would run it.

Blocks of one page run in order, in one namespace that a page's setting prepares with the names the page takes for
granted (a model, its data, a Trainer). Two pages need what no ordinary environment has; of their blocks the syntax and
every import from our packages are checked, and the pages name the command that runs them for real.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from page_settings import APART, SETTINGS, plain

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# Page -> why its blocks only have their syntax and imports checked here.
ELSEWHERE = {
    "zero.md": "DeepSpeed: make test-zero",
    "quantizers.md": "torchao: make test-quantizers",
}


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


WITH_CODE = [page for page in PAGES if blocks(page)]


def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={"PATH": str(Path(sys.executable).parent), "NO_MKDOCS_2_WARNING": "1", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    assert "GuardSession" in reference
    assert "Raises" in reference


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("page", [p for p in WITH_CODE if p.name in ELSEWHERE], ids=lambda p: p.name)
def test_what_runs_elsewhere_is_sound_and_says_where(page):
    command = ELSEWHERE[page.name].split(": ")[1]
    assert command in page.read_text(encoding="utf-8"), f"{page.name} does not name {command}"
    for block in blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("weightproof"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def is_doctest(block: str) -> bool:
    return block.lstrip().startswith(">>>")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers so
@pytest.mark.parametrize("page", [p for p in WITH_CODE if p.name not in ELSEWHERE], ids=lambda p: p.name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    names = SETTINGS.get(page.name, plain)(tmp_path)
    for number, block in enumerate(blocks(page)):
        if number and page.name in APART:
            names = SETTINGS[page.name](tmp_path)
        if is_doctest(block):
            example = doctest.DocTestParser().get_doctest(block, names, f"{page.name}[{number}]", str(page), 0)
            result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, clear_globs=False)
            assert result.failed == 0
            names.update(example.globs)
        else:
            exec(compile(block, f"{page.name}[{number}]", "exec"), names)
    if page.name.startswith("quickstart-"):
        assert verdicts(capsys.readouterr().out) == verdicts(page.read_text(encoding="utf-8"))


def verdicts(text: str) -> list[str]:
    """Lines that say what was done; the numbers beside them differ between machines."""
    return re.findall(r"^.*(?:KEEP kept|ROLLBACK restored)$", text, re.MULTILINE)


def test_the_guard_of_ones_own_keeps_the_rules(monkeypatch, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "--rootdir",
            str(tmp_path),
            "tests",
        ],
        cwd=ROOT / "examples" / "own_guard",
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={"PYTHONPATH": ".", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
