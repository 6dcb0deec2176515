"""The run around the model: a process that sleeps, generators that a resume forgets, a loader that slips."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from weightproof.errors import InputError
from weightproof.testing.faults.fault import Fault
from weightproof.testing.injection import Injection


@dataclass(frozen=True, kw_only=True)
class StuckRank(Fault):
    """One process sleeps before its step, while the others wait."""

    name: ClassVar[str] = "stuck-rank"
    hits: ClassVar[str] = "a process"
    weaker: ClassVar[Mapping[str, Any] | None] = {"seconds": 2.0}
    rank: int | None = 1
    seconds: float = 60.0

    def before_step(self, run: Injection) -> None:
        """Sleep."""
        run.note(self, f"asleep for {self.seconds:g} s")
        time.sleep(self.seconds)


@dataclass(frozen=True, kw_only=True)
class WrongRNG(Fault):
    """The random generators of the process (Python, NumPy, torch) are not those that the run had.

    `moment="resume"`: the file in which accelerate or Trainer keeps them is missing from the checkpoint that is loaded,
    and the process goes on with those that it began with, as both do without a word. A loop tells the injection when
    it resumes (`injection.resuming(folder)`); `at` is for the loop to read. `moment="step"`: they are seeded after a
    step.
    """

    name: ClassVar[str] = "wrong-rng"
    hits: ClassVar[str] = "random generators"
    moment: str = "resume"

    def prepare(self, run: Injection) -> None:
        """Refuse a moment that never comes."""
        if self.moment not in ("resume", "step"):
            raise InputError(f"{self.name}: moment is 'resume' or 'step', not {self.moment!r}")

    def resume(self, run: Injection, folder: Path) -> None:
        """Take the file away, and stand where a new process stands."""
        if self.moment != "resume":
            return
        names = (f"random_states_{run.rank}.pkl", f"rng_state_{run.rank}.pth", *(("rng_state.pth",) * (not run.rank)))
        for path in (folder / name for name in names):
            path.unlink(missing_ok=True)
        self._seed()
        run.note(self, f"the checkpoint has no generators of rank {run.rank}")

    def after_step(self, run: Injection) -> None:
        """Seed them."""
        if self.moment == "step":
            self._seed()
            run.note(self, f"generators seeded with {self.seed}")

    def _seed(self) -> None:
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)  # noqa: NPY002 - training draws from the global generator
        torch.manual_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class LoaderSkew(Fault):
    """A process is given the batch before once more instead of its own. Wrap the loader: `injection.loader(data)`."""

    name: ClassVar[str] = "loader-skew"
    hits: ClassVar[str] = "the data loader"
    rank: int | None = 0

    def load(self, run: Injection, batch: Any, previous: Any) -> Any:
        """The batch before, where there was one."""
        if previous is None:
            return batch
        run.note(self, "the batch before is given again")
        return previous
