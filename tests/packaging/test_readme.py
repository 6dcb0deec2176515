"""The README's example runs, and what it names exists."""

import re
import subprocess
from pathlib import Path

import pytest
from architectures import build

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_sixty_second_example_runs_and_says_what_the_readme_says(tmp_path, monkeypatch, capsys):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "GuardSession(" in block)
    build("llama").save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("path/to/model", str(tmp_path / "model")), "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["KEEP kept", "ROLLBACK restored"]
    assert "limit" in lines[2]
    assert (tmp_path / "certificate.json").is_file()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_every_link_leads_to_a_file(target):
    assert (ROOT / target).exists()


def test_the_two_commands_are_targets_of_the_makefile():
    for command in re.findall(r"`make ([a-z-]+)`|^\$ make ([a-z-]+)", README, re.MULTILINE):
        target = next(filter(None, command))
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=False, timeout=60)
        assert done.returncode == 0, target
