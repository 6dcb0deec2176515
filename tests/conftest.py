"""Puts the helpers that several test folders share (`from architectures import build`) on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

# Two workers share two cores: a second thread in each would only wait for the other.
torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).parent / "support"))
