"""`accelerate launch` as a user calls it, and nothing left running when it returns."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 40.0  # torch gives workers 30 s to end


def launch(arguments: Sequence[object], *, timeout: float) -> tuple[int, str, str]:
    """Run it with a port of its own; the exit code, what it printed, and what it wrote to stderr."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--main_process_port",
        str(port),
        *map(str, arguments),
    ]
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1", "WANDB_SILENT": "true"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "WANDB_"))}
    with subprocess.Popen(
        command, cwd=ROOT, env={**environment, **settings}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            output, errors = _end(process)
            pytest.fail(f"not done within {timeout} s: {shlex.join(command)}\n{output}\n{errors}")
    return process.returncode, output, errors


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """The launcher ends its workers, which are in sessions of their own, if it is asked; then itself."""
    process.terminate()
    try:
        return process.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()
