"""Live metrics: the tracker protocol and the JSONL file that is always written first.

A tracker mirrors evidence, it never makes it: the certificate on disk is the truth, and a
tracker that fails may warn but never changes a verdict.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from weightproof.errors import InputError
from weightproof.folders.files import write_atomically
from weightproof.folders.jsonable import to_jsonable
from weightproof.registry import load_plugin
from weightproof.types import Measurement, Outcome, Verdict

_SEVERITY = {Outcome.FAIL: 3, Outcome.NOT_MEASURED: 2, Outcome.WARN: 1, Outcome.PASS: 0}


@dataclass(frozen=True, slots=True)
class GuardEvent:
    """One judged change, as trackers see it.

    `rows` are finite scalars named `guard/<guard>/<family>/<statistic>`; numbers that are not
    finite or were not measured appear in `worst` only.
    """

    name: str
    step: int
    kind: str
    action: str
    applied: str
    situation: str
    reason: str
    warned: bool
    monitor: bool
    rows: Mapping[str, float]
    worst: tuple[Measurement, ...]
    seconds: float


class Tracker(Protocol):
    """What a session needs from a tracker; entry-point group `weightproof.trackers`."""

    name: str

    def log_event(self, event: GuardEvent) -> None:
        """Record one judged change."""
        ...

    def log_picture(self, key: str, png: bytes, step: int) -> None:
        """Record a PNG."""
        ...

    def log_certificate(self, path: Path, *, action: str, step: int) -> None:
        """Record the certificate file just written at `path`."""
        ...

    def close(self) -> None:
        """Flush; called once at the end of a session."""
        ...


class JsonlTracker:
    """One JSON object a line in a local file, flushed at every event. No account, no network."""

    name = "jsonl"

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            raise InputError(f"cannot open the event log {self.path}: {error.strerror or error}") from error

    def _write(self, row: Mapping[str, object]) -> None:
        # Opened for each line: nothing to lose when the process dies, and no handle to forget.
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        whole: int | None = None
        try:
            with self.path.open("ab") as handle:
                whole = handle.tell()
                handle.write(line)
        except OSError as error:
            if whole is not None and self.path.is_file() and self.path.stat().st_size > whole:
                os.truncate(self.path, whole)  # half a line would spoil the next one, too
            raise InputError(f"cannot write to the event log {self.path}: {error.strerror or error}") from error

    def log_event(self, event: GuardEvent) -> None:
        """Append the event with its rows and its worst measurements."""
        self._write({"type": "event", **to_jsonable(event)})

    def log_picture(self, key: str, png: bytes, step: int) -> None:
        """Write the picture beside the log and append its name."""
        stem = f"{key.replace('/', '-')}-{step}"
        path = self.path.with_name(f"{stem}.png")
        number = 1
        while path.exists():  # several edits may share a step, and no earlier line may lose its picture
            number += 1
            path = self.path.with_name(f"{stem}-{number}.png")
        write_atomically(path, png)
        self._write({"type": "picture", "key": key, "step": step, "path": path.name})

    def log_metrics(self, rows: Mapping[str, float], step: int) -> None:
        """Append numbers that belong to no judged change."""
        self._write({"type": "metrics", "step": step, "rows": dict(rows)})

    def log_certificate(self, path: Path, *, action: str, step: int) -> None:
        """Append where the certificate is."""
        self._write({"type": "certificate", "path": path.name, "action": action, "step": step})

    def close(self) -> None:
        """Nothing is held open."""


def log_metrics(tracker: Tracker, rows: Mapping[str, float], step: int) -> None:
    """Give finite numbers that belong to no judged change (`health/...`) to a tracker that takes any.

    Args:
        tracker: One without a method `log_metrics(rows, step)` is left alone: the protocol does not ask for it.
        rows: By name.
        step: Of the training.
    """
    log = getattr(tracker, "log_metrics", None)
    if callable(log):
        log(rows, step)


def open_trackers(
    given: Sequence[Tracker | str] | None, output_dir: Path | None, accelerator: Any = None
) -> tuple[Tracker, ...]:
    """Trackers as given, those named being made; None means the JSONL log where there is a folder for it.

    Args:
        given: Trackers or their registered names.
        output_dir: Folder of the JSONL log.
        accelerator: `accelerate.Accelerator` of the run, for trackers that write through it.

    Raises:
        InputError: If `given` is no list, a name is unknown, "jsonl" has no folder, or a tracker that writes
            through an `Accelerator` gets none.
    """
    if isinstance(given, str) or not isinstance(given, (Sequence, type(None))):
        raise InputError(f"trackers must be a list of trackers or of their names, such as ['jsonl'], not {given!r}")
    names: Sequence[Tracker | str] = given if given is not None else (("jsonl",) if output_dir else ())
    found: list[Tracker] = []
    for tracker in names:
        if not isinstance(tracker, str):
            found.append(tracker)
        elif tracker == "jsonl":
            if output_dir is None:
                raise InputError('the "jsonl" tracker needs output_dir=')
            found.append(JsonlTracker(output_dir / "events.jsonl"))
        else:
            found.append(_make(tracker, accelerator))
    return tuple(found)


def _make(name: str, accelerator: Any) -> Tracker:
    """The tracker registered under `name`, given the accelerator if its constructor asks for one."""
    factory = load_plugin("weightproof.trackers", name)
    asked = inspect.signature(factory).parameters.get("accelerator")
    if asked is None:
        return factory()
    if accelerator is None and asked.default is inspect.Parameter.empty:
        raise InputError(f"the tracker {name!r} writes through an Accelerator: pass GuardSession(..., accelerator=...)")
    return factory(accelerator=accelerator)


def severity(measurement: Measurement) -> tuple[int, float]:
    """Sort key: outcome first, then how far the value lies towards (or beyond) its limit."""
    value, limit = measurement.value, measurement.limit
    if value is None or limit is None:
        return _SEVERITY[measurement.outcome], -1.0
    if not math.isfinite(value):
        return _SEVERITY[measurement.outcome], math.inf
    scale = abs(value) / abs(limit) if limit else abs(value)
    return _SEVERITY[measurement.outcome], scale


def worst_measurements(verdicts: Iterable[Verdict], count: int = 20) -> tuple[Measurement, ...]:
    """The `count` most severe measurements over all verdicts, worst first."""
    every = [measurement for verdict in verdicts for measurement in verdict.measurements]
    return tuple(sorted(every, key=severity, reverse=True)[:count])


def metric_rows(verdicts: Iterable[Verdict], reported: Iterable[Measurement] = ()) -> dict[str, float]:
    """Scalars `guard/<guard>/<family>/<statistic>`: per family the value farthest from its reference."""
    rows: dict[str, float] = {}
    far: dict[str, float] = {}
    every = [measurement for verdict in verdicts for measurement in verdict.measurements]
    for measurement in (*every, *reported):
        value = measurement.value
        if value is None or not math.isfinite(value):
            continue
        key = f"guard/{measurement.guard}/{measurement.family}/{measurement.statistic}"
        distance = _distance(value, measurement)
        if key not in rows or distance > far[key]:
            rows[key], far[key] = float(value), distance
    return rows


def _distance(value: float, measurement: Measurement) -> float:
    """How far a value lies from its reference; a log ratio is taken against it already."""
    is_ratio = measurement.statistic.startswith("log_")
    return abs(value) if is_ratio else abs(value - (measurement.reference or 0.0))
