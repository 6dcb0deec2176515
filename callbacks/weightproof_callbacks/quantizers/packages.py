"""What a reader says where the package that its backend comes from is not installed."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec

EXTRA = "pip install 'weightproof[quantization]'"


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def missing(package: str) -> str | None:
    """Why weights cannot be dequantised without a package, and which extra brings it; None where it is there.

    Example:
        >>> missing("torch") is None
        True
        >>> missing("no_such_quantizer")
        "no_such_quantizer is not installed, and only it can dequantise them: pip install 'weightproof[quantization]'"
    """
    if package in sys.modules or _is_installed(package):
        return None
    return f"{package} is not installed, and only it can dequantise them: {EXTRA}"
