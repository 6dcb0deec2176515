"""The global random generators of a process, kept, compared and put back.

Python's, numpy's legacy one, torch's on the CPU, and torch's on every CUDA device where CUDA was used already:
asking for a CUDA generator's state would start CUDA, so a process that did not is left alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from weightproof.errors import InputError, RestoreError
from weightproof.snapshots.tensor_store import same_bits

__all__ = ["GlobalDraws", "generator_names", "generator_value", "put_generator_back", "require_generators"]

_FEW_DRAWS = 64


def require_generators(generators: Iterable[Any]) -> tuple[Any, ...]:
    """The given generators, after refusing what is none.

    Raises:
        InputError: If one is neither a torch.Generator, a numpy.random.Generator or RandomState, nor a random.Random.
    """
    found = tuple(generators)
    for generator in found:
        if not isinstance(generator, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            raise InputError(f"{generator!r} is no random generator of torch, numpy or Python")
    return found


def generator_value(generator: Any) -> Any:
    """The state of one generator as nested tuples, dicts, arrays, numbers and tensors."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state(legacy=False)


def put_generator_back(generator: Any, value: Any) -> None:
    """Give a generator the state that `generator_value` read."""
    if isinstance(generator, torch.Generator):
        generator.set_state(value)
    elif isinstance(generator, random.Random):
        generator.setstate(value)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = value
    else:
        generator.set_state(value)


class GlobalDraws:
    """Where the global generators of this process stand."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    @classmethod
    def now(cls) -> GlobalDraws:
        """Read all of them; never starts CUDA."""
        values: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 - the global generator is what is read
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            values["cuda"] = torch.cuda.get_rng_state_all()
        return cls(values)

    def put_back(self) -> None:
        """Set all of them.

        Raises:
            RestoreError: If the devices are not those of before.
        """
        cuda = self.values.get("cuda", [])
        if cuda and len(cuda) != torch.cuda.device_count():
            raise RestoreError(
                f"{len(cuda)} CUDA generators were kept, and there are {torch.cuda.device_count()} devices"
            )
        random.setstate(self.values["python"])
        np.random.set_state(self.values["numpy"])  # noqa: NPY002 - the global generator is what is put back
        torch.set_rng_state(self.values["torch"])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    def after_as_many(self, before: GlobalDraws, after: GlobalDraws) -> GlobalDraws | None:
        """Where the generators stand after as many numbers as were drawn between `before` and `after`.

        None where that cannot be told: others than torch's on the CPU drew, or it drew more than a few. A few are
        what the beginning of an epoch draws.
        """
        if not GlobalDraws({**before.values, "torch": None}).same_as(GlobalDraws({**after.values, "torch": None})):
            return None
        then, now = torch.Generator(), torch.Generator()
        then.set_state(before.values["torch"])
        now.set_state(self.values["torch"])
        for _ in range(_FEW_DRAWS):
            for generator in (then, now):
                torch.empty((), dtype=torch.int32).random_(generator=generator)
            if same_bits(then.get_state(), after.values["torch"]):
                return GlobalDraws({**self.values, "torch": now.get_state()})
        return None

    def same_as(self, other: GlobalDraws) -> bool:
        """Whether every generator stands where it stands in `other`."""
        return self.values.keys() == other.values.keys() and all(
            _same(value, other.values[name]) for name, value in self.values.items()
        )


def generator_names(values: dict[str, Any]) -> str:
    """The global generators among `values`, for people."""
    names = {"python": "Python", "numpy": "numpy", "torch": "torch CPU", "cuda": "CUDA"}
    return ", ".join(words for name, words in names.items() if name in values)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return same_bits(left, right)
    if isinstance(left, np.ndarray):
        return np.array_equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right
