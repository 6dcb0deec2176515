"""Run every shipped recipe on the small demo model, and verify every certificate, as a user would.

    python tests/recipes/run_all.py [--write]      # make recipes; minutes, and one more for the demo model at first

`--write` keeps the table beside this file. Exit code 1 where a recipe does not end as it expects, or a certificate
is not valid.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from weightproof import cli
from weightproof.cli.run import size_in_words
from weightproof.procedure.source import shipped_recipes
from weightproof_callbacks.demo_model import demo_model

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "weightproof"
OUT = ROOT / ".cache" / "recipes"
RESULT = Path(__file__).with_name("last_run.txt")
NAMES = sorted(set(shipped_recipes()) - {"demo"})
HEADS = ("recipe", "step", "decision", "assurance", "KL", "loss ratio", "size", "certificate")


def called(*argv: object) -> tuple[int, str]:
    """Exit code and standard output of a verb."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            cli.main([str(one) for one in argv])
    except SystemExit as stop:
        return int(stop.code or 0), out.getvalue()
    return 0, out.getvalue()


def rows_of(name: str, base: Path) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Run one recipe; a row for each step, and whether it is as it must be."""
    out = OUT / name
    code, text = called("run", name, "--out", out, "--cache", CACHE, "--json")
    if code not in (0, 1):
        yield (name, "-", f"exit code {code}", *["-"] * 5), False
        return
    before, parent, adapters = base, None, []
    for step in json.loads(text)["steps"]:
        checked, good = "-", True
        adapters += [one for one in [out / "training" / step["name"] / "adapter"] if one.is_dir()]
        if step["model"] is not None:
            checked, good = verified(out / step["model"], before, parent, adapters)
            before, parent = out / step["model"], out / step["model"] / "certificate.json"
        yield row(name, step, checked), good and step["as_expected"]


def verified(folder: Path, base: Path, parent: Path | None, adapters: list[Path]) -> tuple[str, bool]:
    """Level 3: base, data and the trained adapter are at hand; the chain where there is one."""
    argv = ["verify", folder / "certificate.json", "--model", folder, "--unsigned-ok", "--base", base]
    argv += ["--retain", base_text(), "--level", "3", *(["--parent", parent] if parent is not None else [])]
    code, _ = called(*argv, *(part for one in adapters for part in ("--adapter", one)), "--json")
    return ("valid, level 3", True) if code == 0 else (f"exit code {code}", False)


def base_text() -> Path:
    return demo_model(CACHE).retain


def row(name: str, step: Mapping[str, Any], checked: str) -> tuple[str, ...]:
    numbers = ("-" if step[key] is None else f"{step[key]:.4f}" for key in ("kl", "loss_ratio"))
    size = "-" if step["size"] is None else size_in_words(step["size"])
    return (name, step["name"], step["action"], step["assurance"] or "-", *numbers, size, checked)


def main() -> int:
    """Print the table; 1 where something is not as it must be."""
    shutil.rmtree(OUT, ignore_errors=True)
    demo = demo_model(CACHE, say=lambda words: sys.stderr.write(f"{words}\n"))
    lines: list[tuple[str, ...]] = []
    wrong: list[str] = []
    seconds: dict[str, float] = {}
    for name in NAMES:
        sys.stderr.write(f"{name}\n")
        started = time.perf_counter()
        for cells, good in rows_of(name, demo.folder):
            lines.append(cells)
            wrong += [] if good else [" ".join(cells)]
        seconds[name] = time.perf_counter() - started
    widths = [max(len(line[i]) for line in (HEADS, *lines)) for i in range(len(HEADS))]
    table = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (HEADS, *lines)
    ]
    took = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    text = (
        "\n".join(table)
        + f"\n\ntorch {torch.__version__}, {torch.get_num_threads()} threads; with all verifying: {took}\n"
    )
    text += "everything as it must be\n" if not wrong else "".join(f"WRONG: {one}\n" for one in wrong)
    sys.stdout.write(text)
    if "--write" in sys.argv:
        RESULT.write_text(text, encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
