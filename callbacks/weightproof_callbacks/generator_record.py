"""Where the random generators of every process stood at a checkpoint: held against where a resume puts them.

Trainer and accelerate restore the generators of a process from a file of its own. Where that is missing or of
another process they say nothing and go on, and the run draws other numbers than the one it continues:
other dropout, other augmentation, another order of the data. No loss shows it.

A guard keeps the states themselves beside its other files. After a resume they are compared by digest; what
differs is put back from the record, and told, before the first step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightproof.collective import Processes
from weightproof.errors import BaselineError
from weightproof.folders.files import write_atomically
from weightproof.folders.sealed_json import open_sealed, seal
from weightproof.parallel.run_agreement import generator_digests
from weightproof_callbacks.generator_state import GlobalDraws
from weightproof_callbacks.state_values import Values

logger = logging.getLogger("weightproof")

__all__ = ["GENERATORS_FILE", "GeneratorRecord"]

GENERATORS_FILE = "guard_generators.json"
_FORMAT = "weightproof-generators-v1"


class GeneratorRecord:
    """The global generators of all processes at one moment.

    Args:
        ranks: Of each process: digests by generator, the tree of the states, and their tensors in hexadecimal.
    """

    def __init__(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        self._ranks = ranks

    @classmethod
    def now(cls, processes: Processes) -> GeneratorRecord:
        """As they stand now, of every process."""
        values = Values.copied(GlobalDraws.now().values, "generators", "cpu")
        ours = {
            "digests": generator_digests(),
            "tree": values.tree,
            "tensors": {name: [str(one.dtype), _in_hex(one)] for name, one in values.tensors.items()},
        }
        return cls(processes.gather("where the random generators stand", ours))

    @classmethod
    def shared(cls, processes: Processes, folder: Path) -> GeneratorRecord | None:
        """`load` by rank 0, for all: a folder may be on its machine only."""
        with processes.together("the record of the random generators"):
            ours = cls.load(folder) if processes.is_main else None
        return processes.broadcast("the record of the random generators", ours)

    def save(self, folder: Path) -> None:
        """Write the record, whole or not at all; one process does.

        Raises:
            InputError: If it cannot be written.
        """
        write_atomically(folder / GENERATORS_FILE, seal({"format": _FORMAT, "ranks": list(self._ranks)}))

    @classmethod
    def load(cls, folder: Path) -> GeneratorRecord | None:
        """Read a record; None where the folder has none (it was saved by an older version).

        Raises:
            BaselineError: It was altered after it was written.
        """
        path = folder / GENERATORS_FILE
        if not path.is_file():
            return None
        try:
            text = path.read_bytes()
            content = open_sealed(text)
        except (OSError, ValueError) as error:
            raise BaselineError(f"no usable record of the random generators at {path} ({error})") from error
        if content is None or content.get("format") != _FORMAT:
            raise BaselineError(f"{path} was altered after it was written: its digest does not match")
        return cls(content["ranks"])

    def differing(self, rank: int) -> tuple[str, ...]:
        """Generators of this process that are not where the process of this rank had them; () where it had none.

        Generators that only one side has (of another machine's devices) are left out: they are no fault.
        """
        if rank >= len(self._ranks):
            return ()
        kept, now = self._ranks[rank]["digests"], generator_digests()
        return tuple(sorted(name for name in kept.keys() & now.keys() if kept[name] != now[name]))

    def settle(self, processes: Processes, where: str, *, acts: bool) -> tuple[str, ...]:
        """After a resume, on every process: put back what is not where it was, and tell it.

        Args:
            processes: Of the run.
            where: The checkpoint, for the message.
            acts: Whether generators are put back.

        Returns:
            What differed, of all processes, in words.
        """
        ours = self.differing(processes.rank)
        if ours and acts:
            self.put_back(processes.rank)
        every = processes.gather("random generators after the resume", ours)
        found = tuple(f"{', '.join(names)} of rank {rank}" for rank, names in enumerate(every) if names)
        if processes.is_main:
            if found:
                done = "they are put back from the guard's record" if acts else "they are left as they are"
                logger.warning(
                    "the resume from %s did not restore the random generators: %s; %s", where, "; ".join(found), done
                )
            if processes.size > len(self._ranks):
                logger.warning(
                    "%s was saved by %d processes: ranks from %d on begin with random generators of their own",
                    where,
                    len(self._ranks),
                    len(self._ranks),
                )
        return found

    def put_back(self, rank: int) -> None:
        """Give this process the generators that the one of this rank had; nothing where there was none."""
        if rank >= len(self._ranks):
            return
        kept = self._ranks[rank]
        tensors = {name: _from_hex(*pair) for name, pair in kept["tensors"].items()}
        draws = Values(kept["tree"], tensors).value()
        if len(draws.get("cuda", ())) != len(GlobalDraws.now().values.get("cuda", ())):
            draws.pop("cuda", None)
        GlobalDraws(draws).put_back()


def _in_hex(tensor: Tensor) -> str:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes().hex()


def _from_hex(dtype: str, digits: str) -> Tensor:
    kind: torch.dtype = getattr(torch, dtype.removeprefix("torch."))
    return torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8).view(kind).clone()
