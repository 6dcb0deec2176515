"""Random number generators of the process: saved and put back, set to a fixed state."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave torch (CPU and every CUDA device in use), NumPy's global and Python's generator as found.

    CUDA is read only when this process already uses it: asking for its state would otherwise
    create a context on every device.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global generator is what must be preserved
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(cpu_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def fix_rng() -> None:
    """Set the same generators to a fixed state; use it inside `preserved_rng`."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - a model draws from the global generator if from any
    torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed a CUDA that is not in use yet
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
