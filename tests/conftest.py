"""Puts the helpers that several test folders share (`from architectures import build`) on the path."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))
