"""Exit codes and sentences of the command line."""

import subprocess
import sys

import pytest
import typer

from weightproof import cli
from weightproof.errors import InputError


class FakeEntry:
    """An entry point whose object is given."""

    def __init__(self, target):
        self.target = target
        self.value = "somewhere:verb"

    def load(self):
        if isinstance(self.target, Exception):
            raise self.target
        return self.target


def run(monkeypatch, capsys, target, *argv):
    monkeypatch.setattr(cli, "plugins", lambda group: {"verb": FakeEntry(target), "zother": FakeEntry(good)})
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def good() -> None:
    """Do nothing, well."""


def bad_input() -> None:
    """Refuse."""
    raise InputError("nothing here: name a folder")


def interrupted() -> None:
    """Be interrupted."""
    raise KeyboardInterrupt


def undecided() -> None:
    """Find no answer."""
    raise typer.Exit(2)


def full_disk() -> None:
    """Meet a full disk."""
    raise OSError(28, "No space left on device", "certificate.json")


def bug() -> None:
    """Have a bug."""
    raise RuntimeError("a bug is not hidden")


@pytest.mark.parametrize(
    ("verb", "code", "sentence"),
    [
        (good, 0, ""),
        (bad_input, 3, "error: nothing here: name a folder\n"),
        (interrupted, 130, "interrupted"),
        (undecided, 2, ""),
        (full_disk, 3, "error: certificate.json: No space left on device\n"),
        (ImportError("no module"), 3, "error: the verb 'verb' cannot be loaded from somewhere:verb: no module"),
    ],
    ids=["good", "bad input", "interrupted", "undecided", "full disk", "not importable"],
)
def test_exit_code_and_sentence(monkeypatch, capsys, verb, code, sentence):
    exit_code, _, err = run(monkeypatch, capsys, verb, "verb")
    assert exit_code == code
    assert err.startswith(sentence)
    assert len(err.splitlines()) <= 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "plugins", lambda group: {"verb": FakeEntry(bug), "zother": FakeEntry(good)})
    with pytest.raises(RuntimeError, match="a bug is not hidden"):
        cli.main(["verb"])


def test_an_unknown_verb_and_no_verb_are_bad_usage(monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, good, "nonsense")
    assert code == 3
    assert "nonsense" in err
    assert run(monkeypatch, capsys, good)[0] == 3


def test_a_wrong_option_is_usage_and_not_undecided(monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, good, "verb", "--nonsense")
    assert code == 3
    assert "--nonsense" in err


def test_an_application_is_a_verb_with_verbs_of_its_own(monkeypatch, capsys):
    inner = typer.Typer()
    inner.command("good")(good)
    inner.command("undecided")(undecided)
    assert run(monkeypatch, capsys, inner, "verb", "good")[0] == 0
    assert run(monkeypatch, capsys, inner, "verb", "undecided")[0] == 2
    assert run(monkeypatch, capsys, inner, "verb", "absent")[0] == 3


def test_help_names_every_verb_with_its_line(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, ImportError("gone"), "--help")
    assert code == 0
    assert "Do nothing, well." in out
    assert "cannot be loaded" in out


def test_version_is_printed(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, good, "--version")
    assert code == 0
    assert out.startswith("weightproof ")


def test_help_imports_neither_torch_nor_hugging_face():
    script = (
        "import sys\n"
        "from weightproof.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'wandb', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
    assert "inspect" in done.stdout
