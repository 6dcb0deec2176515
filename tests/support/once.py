"""What takes long and serves many tests, made once a run: by the worker that asks first, while the others wait."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """The folder of this run of the tests, the same for all workers and for no other run."""
    root = factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


def once_a_run(factory: pytest.TempPathFactory, name: str, make: Callable[[], Any]) -> Any:
    """Return a copy of what `make` returns, called by one worker only.

    Args:
        factory: pytest's `tmp_path_factory`.
        name: of the value, unique among all tests.
        make: what to call; its result is what pickle can carry.
    """
    path = shared_folder(factory) / f"{name}.pickle"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_bytes(pickle.dumps(make()))
            partial.rename(path)
    return pickle.loads(path.read_bytes())
