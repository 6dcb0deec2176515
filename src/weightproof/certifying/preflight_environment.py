"""The half of a preflight that looks at the machine: versions, plug-ins, threads, disk, W&B."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch

from weightproof.registry import load_plugin, plugins
from weightproof.snapshots.tensor_store import readable

_MINIMUM = {"torch": (2, 6), "transformers": (5, 0), "safetensors": (0, 6)}


class Level(StrEnum):
    """OK, WARN: works but something will not be measured or may be slow; ERROR: will be refused."""

    OK = "OK"
    WARN = "WARN"
    ERROR = "ERROR"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: a stable code, what was found, and what to do (empty where nothing is to be done)."""

    code: str
    level: Level
    what: str
    do: str = ""


@dataclass(frozen=True)
class Plan:
    """What is about to be done; every part may be left out."""

    base: Path | None = None
    subject: Path | None = None
    retain: Path | None = None
    target: Path | None = None
    policy: str | Path = "balanced"
    key: Path | None = None
    output: Path = Path()


def examine_environment(plan: Plan) -> Iterator[Finding]:
    """Versions, plug-ins, threads, disk and W&B."""
    versions = {name: _version(name) for name in _MINIMUM}
    for name, low in _MINIMUM.items():
        found = versions[name]
        if found is None or tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < low:
            wanted = ".".join(map(str, low))
            yield Finding("WP001", Level.ERROR, f"{name} is {found or 'missing'}", f"install {name}>={wanted}")
    shown = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    yield Finding("WP001", Level.OK, shown)
    yield _plugins()
    yield _threads()
    yield _disk(plan)
    yield _wandb()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plugins() -> Finding:
    groups = ("weightproof.guards", "weightproof.loaders")
    broken = [f"{name} ({why})" for group in groups for name in plugins(group) if (why := _unloadable(group, name))]
    if broken:
        return Finding("WP002", Level.ERROR, f"cannot be loaded: {', '.join(broken)}", "reinstall what offers them")
    return Finding(
        "WP002", Level.OK, f"{sum(len(plugins(group)) for group in groups)} guards and loaders can be loaded"
    )


def _unloadable(group: str, name: str) -> str | None:
    try:
        load_plugin(group, name)
    except (ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _threads() -> Finding:
    world = int(os.environ.get("WORLD_SIZE", "1") or "1")
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    what = f"{threads} threads on {cores} cores, {world} processes"
    if world > 1:
        return Finding(
            "WP003", Level.WARN, what, "certify runs in one process: start it without accelerate or torchrun"
        )
    return Finding("WP003", Level.OK, what)


def _disk(plan: Plan) -> Finding:
    folder = next(path for path in (plan.output.absolute(), *plan.output.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return Finding("WP005", Level.ERROR, f"{folder} cannot be written", "choose another folder with --output")
    level = Level.OK if free > 1 << 30 else Level.WARN
    do = "" if level is Level.OK else "free some space: certificate, report and loss windows need up to 1 GiB"
    return Finding("WP005", level, f"{readable(free)} free in {folder}", do)


def _wandb() -> Finding:
    if importlib.util.find_spec("wandb") is None:
        return Finding("WP006", Level.WARN, "wandb is not installed", "install wandb, or use the jsonl tracker")
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "disabled"):
        return Finding("WP006", Level.OK, f"W&B is {mode}")
    return Finding("WP006", Level.OK, "W&B is online: a run needs a login, or WANDB_MODE=offline")
