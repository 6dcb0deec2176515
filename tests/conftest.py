"""Puts the helpers that several test folders share (`from architectures import build`) on the path."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

# Two workers share two cores: a second thread in each would only wait for the other.
torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).parent / "support"))

# Modules and collected tests are some 700,000 objects that stay: a walk over them, which Trainer asks for at the end of
# each training, takes longer than many a test.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """From here on the collector walks only what tests make, in each worker and in the process that leads them."""
    gc.freeze()
    gc.enable()
