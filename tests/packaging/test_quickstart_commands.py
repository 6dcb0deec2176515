"""The commands of the command line's quick start, in order, on folders like those that its demo leaves.

`weightproof demo --fast` itself is run by tests/unit/test_demo_parts.py.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from certified_folders import make_folders

from weightproof import cli

PAGE = Path(__file__).resolve().parents[2] / "docs" / "quickstart-command-line.md"
MADE = ("weightproof demo --fast", "cd weightproof-demo")


def commands() -> list[tuple[str, int, list[str]]]:
    """Each command with the exit code that the page promises and the lines that it shows."""
    found: list[tuple[str, int, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            if line.startswith("$ "):
                command, _, comment = line[2:].partition("  #")
                found.append((command.strip(), int(comment.split()[-1]) if comment else 0, []))
            else:
                found[-1][2].append(line)
    return found


def without_numbers(text: str) -> str:
    """Words alone: intervals differ between models, and with them where lines break."""
    return " ".join(re.sub(r"-?\d+(\.\d+)?", "N", text).split())


def test_every_command_does_what_the_page_shows(tmp_path, monkeypatch, capsys):
    make_folders(tmp_path)
    (tmp_path / "int2").rename(tmp_path / "int2-rejected")
    monkeypatch.chdir(tmp_path)
    made, rest = commands()[:2], commands()[2:]
    assert tuple(command for command, _, _ in made) == MADE
    assert len(rest) == 6
    for command, code, shown in rest:
        program, *arguments = shlex.split(command)
        assert program == "weightproof"
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert (stop.value.code or 0) == code, command
        said = without_numbers(capsys.readouterr().out)
        assert said.startswith(without_numbers(" ".join(shown).removesuffix("..."))), command
    assert (tmp_path / "int8-certified" / "report.html").is_file()
