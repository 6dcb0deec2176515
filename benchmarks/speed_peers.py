"""Speed and memory beside other tools, in one run on one machine, one thread: `make benchmark-speed`.

Each row is measured in a process of its own (`speed_rows.py`), on two models made here (`speed_models.py`), by the
environment that has the tool: `.venv-peers` for invarlock 0.12.1 and weightwatcher 0.7.7, `.cache/invarlock-0.2.0`
for the older invarlock. Where one is missing its rows say "not run". A row that failed says why, and the others go on.

Rows are written to `speed_peers.json` as they are made, and are not made again while code, machine and settings are
the same (`--again` makes all). At the end the tables are written into docs/speed.md (on a GPU into docs/gpu.md).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from speed_tables import INVARLOCK, JOBS, LINES, MODELS, OURS, RMT, TOOL_OF, WATCHER, lines_for, with_tables  # noqa: E402

THREADS = 1
FOLDER = ROOT / ".cache" / "speed"
PACKAGES = ("weightproof", "torch", "transformers", "numpy", "scipy")
CODE = ("src/weightproof/**/*.py", "benchmarks/speed*.py")


@dataclass(frozen=True)
class Environment:
    """An interpreter, what its path begins with, and where the models are kept."""

    python: Path
    path: Path | None = None
    folder: Path = FOLDER

    def run(self, arguments: list[str], limit: float) -> subprocess.CompletedProcess[str]:
        """Run it in benchmarks/, with one thread."""
        pins = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(THREADS))
        given = os.environ | pins | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        given |= {"PYTHONPATH": str(self.path or ""), "SPEED_FOLDER": str(self.folder)}
        return subprocess.run(
            [str(self.python), *arguments],
            env=given, cwd=HERE, capture_output=True, text=True, timeout=limit, check=False,
        )  # fmt: skip

    def missing(self, tool: str) -> str | None:
        """Why a tool such as "name 1.2" is not there in this version; None where it is."""
        name, _, wanted = tool.partition(" ")
        if not self.python.exists():
            return f"no environment at {_shown(self.python)}"
        if self.path is not None and not self.path.is_dir():
            return f"no folder {_shown(self.path)}"
        asked = self.run(["-c", f"import importlib.metadata as m; print(m.version({name!r}))"], 60.0)
        found = asked.stdout.strip()
        if asked.returncode or found != wanted:
            return f"{_shown(self.path or self.python)} has {f'{name} {found}' if found else f'no {name}'}"
        return None


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def environments(peers: Path, older: Path, folder: Path) -> dict[str, Environment]:
    """Who runs whose rows."""
    ours = Environment(Path(sys.executable), folder=folder)
    theirs = Environment(peers, folder=folder)
    rmt = Environment(ours.python, older, folder)
    return {"": ours, OURS: ours, INVARLOCK: theirs, WATCHER: theirs, RMT: rmt}


# ---------------------------------------------------------------- what a run is known by


def code_digest() -> str:
    """Of the library and of this benchmark: rows made by other code are made again."""
    whole = hashlib.sha256()
    for pattern in CODE:
        for path in sorted(ROOT.glob(pattern)):
            whole.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def machine(device: str) -> str:
    """The processor, and the GPU where it is one that is measured."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    named = f"{processor or platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    if device == "cpu":
        return named
    import torch

    return f"{torch.cuda.get_device_name()}, host {named}"


def made_by(device: str, settings: str, at_once: int) -> dict[str, Any]:
    """Everything that rows of one run have in common."""
    import importlib.metadata

    return {
        "device": device,
        "settings": settings,
        "threads": THREADS,
        "at_once": at_once,
        "machine": machine(device),
        "code": code_digest(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


# ---------------------------------------------------------------- rows


class Report:
    """The rows so far, in a file that is whole at any time."""

    def __init__(self, path: Path, made: dict[str, Any], *, again: bool) -> None:
        self.path = path
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if old and old.get("made") != made:
            print("rows of other code, another machine or other settings are made again", flush=True)
        same = old.get("made") == made and not again
        self.content: dict[str, Any] = {"made": made, "rows": old["rows"] if same else {}}

    def rows(self, model: str) -> dict[str, Any]:
        """Of one model."""
        return self.content["rows"].setdefault(model, {})

    def lacks(self, model: str, job: str) -> bool:
        """Whether a row of this job has no number yet."""
        names = [line.name for line in LINES if line.job == job]
        return any(self.rows(model).get(name, {}).get("status") != "measured" for name in names)

    def add(self, model: str, rows: dict[str, Any]) -> None:
        """Keep rows, in the order of the table."""
        known = self.rows(model) | rows
        self.content["rows"][model] = {line.name: known[line.name] for line in LINES if line.name in known}
        ordered = {name: self.content["rows"][name] for name in MODELS if name in self.content["rows"]}
        self.content["rows"] = ordered
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)


@dataclass(frozen=True)
class Runner:
    """Runs jobs, each in its own process."""

    settings: str
    device: str
    limit: float
    tools: dict[str, Environment]

    def missing(self, job: str) -> dict[str, Any]:
        """The rows of a job whose tool is not there; none where it is."""
        tool = TOOL_OF[job]
        if tool in {"", OURS} or not (reason := self.tools[tool].missing(tool)):
            return {}
        return {line.name: {"status": "not run", "reason": reason} for line in LINES if line.job == job}

    def run(self, model: str, job: str) -> dict[str, Any]:
        """The rows of one job: measured, or failed."""
        names = [line.name for line in LINES if line.job == job]
        environment = self.tools[TOOL_OF.get(job, "")]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            arguments = ["speed_rows.py", self.settings, model, job, self.device, str(out)]
            try:
                done = environment.run(arguments, self.limit)
            except subprocess.TimeoutExpired:
                return self._failed(names, f"not finished within {self.limit:g} s")
            if done.returncode:
                return self._failed(names, _error(done))
            rows = json.loads(out.read_text(encoding="utf-8"))
        return {name: {"status": "measured", **row} for name, row in rows.items()}

    @staticmethod
    def _failed(names: list[str], why: str) -> dict[str, Any]:
        return {name: {"status": "failed", "reason": why} for name in names or ["folders"]}


def _error(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"ended by signal {-done.returncode} (9: out of memory, most likely)"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"exit code {done.returncode}"


# Memory-bound rows run alone, before the others; these hold the whole model, and no two of them run at once.
ALONE = ("read", "snapshot")
WHOLE = ("baseline", "check_weights", "check_outputs", "invarlock")


class Measuring:
    """Makes the rows that are wanted and not there."""

    def __init__(self, report: Report, runner: Runner, jobs: list[str], lanes: int) -> None:
        self.report, self.runner, self.lanes = report, runner, lanes
        wanted = {line.job for line in lines_for(runner.device)}
        self.jobs = [job for job in jobs if job in wanted]
        self._began = time.perf_counter()
        self._lock, self._ended = threading.Lock(), threading.Event()

    def say(self, what: str) -> None:
        """A line of progress, with the seconds since the beginning."""
        print(f"[{time.perf_counter() - self._began:6.0f} s] {what}", flush=True)

    def model(self, model: str) -> None:
        """Every row of a model: those that run alone, then the others in one lane or two."""
        todo = [job for job in self.jobs if self.report.lacks(model, job)]
        for job in list(todo):
            if missing := self.runner.missing(job):
                self._keep(model, missing, 0.0)
                todo.remove(job)
        if not todo:
            return
        self.say(f"{model}: making the folders")
        if failed := self.runner.run(model, "folders"):
            raise SystemExit(f"the model {model} could not be made: {failed['folders']['reason']}")
        self._ended.clear()
        alone = [job for job in todo if job in ALONE or self.lanes == 1]
        rest = [job for job in todo if job not in alone]
        self._lane(model, alone)
        held = [job for job in rest if job in WHOLE]
        with ThreadPoolExecutor(2) as pool:  # what a job needs of another comes before it in the same lane
            lanes = pool.map(lambda lane: self._lane(model, lane), (held, [job for job in rest if job not in held]))
            try:
                list(lanes)
            finally:  # after an interrupt the jobs that run come to their end, and no other begins
                self._ended.set()

    def _lane(self, model: str, jobs: list[str]) -> None:
        for job in jobs:
            if self._ended.is_set():
                return
            self.say(f"{model}: {job} ...")
            started = time.perf_counter()
            self._keep(model, self.runner.run(model, job), time.perf_counter() - started)

    def _keep(self, model: str, rows: dict[str, Any], spent: float) -> None:
        with self._lock:
            self.report.add(model, rows)
            for name, row in rows.items():
                said = f"{row['seconds']:.4g} s" if row["status"] == "measured" else f"{row['status']}: {row['reason']}"
                self.say(f"{model}: {name}: {said} (with its start {spent:.0f} s)")


# ---------------------------------------------------------------- command


def chosen(given: str, known: tuple[str, ...]) -> list[str]:
    """Names separated by commas, in our order; all of them by default.

    Raises:
        SystemExit: One is unknown.
    """
    names = [name.strip() for name in given.split(",") if name.strip()]
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if not names or name in names]


def require_device(device: str) -> None:
    """Refuse a CUDA device that is not there: nothing is measured on another one in its place.

    Raises:
        SystemExit: There is none.
    """
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no CUDA device here: run without --device cuda")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--rows", default="", help=f"jobs, of {', '.join(JOBS)}; all by default")
    parser.add_argument("--again", action="store_true", help="make every row again")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--at-once", type=int, choices=(1, 2), help="rows at once; by default 2, on a GPU 1")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds that one job may take")
    parser.add_argument("--smoke", action="store_true", help="tiny models: does it run? The numbers mean nothing")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    parser.add_argument("--older-invarlock", type=Path, default=ROOT / ".cache" / "invarlock-0.2.0")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the models are kept: 9 GB")
    parser.add_argument("--out", type=Path, help="JSON of the rows")
    parser.add_argument("--docs", type=Path, help="page that gets the tables")
    parser.add_argument("--tables", action="store_true", help="write the tables of the last run, measure nothing")
    given = parser.parse_args(argv)
    on_gpu = given.device != "cpu"
    given.at_once = given.at_once or (1 if on_gpu or (os.cpu_count() or 1) < 2 else 2)
    if given.out is None:
        given.out = given.folder / "smoke.json" if given.smoke else HERE / f"{_stem(on_gpu)}.json"
    if given.docs is None and not given.smoke:
        given.docs = ROOT / "docs" / ("gpu.md" if on_gpu else "speed.md")
    return given


def _stem(on_gpu: bool) -> str:
    return "speed_peers_cuda" if on_gpu else "speed_peers"


def write_page(page: Path, report: dict[str, Any]) -> None:
    """Put the tables into the page."""
    page.write_text(with_tables(page.read_text(encoding="utf-8"), report), encoding="utf-8")
    print(f"tables written into {_shown(page.resolve())}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Measure what is not there, then write the tables."""
    given = parse(argv)
    models, jobs = chosen(given.models, tuple(MODELS)), chosen(given.rows, JOBS)
    if given.tables:
        write_page(given.docs, json.loads(given.out.read_text(encoding="utf-8")))
        return
    require_device(given.device)
    settings = "smoke" if given.smoke else "full"
    report = Report(given.out, made_by(given.device, settings, given.at_once), again=given.again)
    tools = environments(given.peers_python, given.older_invarlock, given.folder.resolve())
    try:
        measuring = Measuring(report, Runner(settings, given.device, given.limit, tools), jobs, given.at_once)
        for model in models:
            measuring.model(model)
    finally:  # an interrupt keeps what there is
        if given.docs is not None and report.content["rows"]:
            write_page(given.docs, report.content)


if __name__ == "__main__":
    main()
