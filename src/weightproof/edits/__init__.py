"""Edits: changes of weights that are planned first and written by the snapshot afterwards.

An edit is one file with one frozen dataclass (its parameters), registered in the entry-point group
`weightproof.edits`:

- `name`: how it is called in tables and certificates, e.g. `rtn-int8-channel`;
- `kind`: the contract it promises, an object of `weightproof.kinds`;
- `params()`: its parameters, ready for JSON;
- `selects(matrix)`: whether it wants to change this `WeightMatrix`;
- `plan(matrix, context)`: the new (d_out, d_in) values in the matrix's dtype, or None to leave it.

Optional, looked for by name:

- `prepare(session)`: the same edit with what it must know of the model first (a threshold over all matrices,
  second moments of inputs), called before planning; the weights stay as they are;
- `light()`: the same edit without what it only needed to plan; kept in `Step.edit`;
- `unmatched(matrices)`: patterns that choose nothing, which is an error;
- `touches_vectors`: True where biases and norms are changed too; they come as n x 1 matrices of family "vector".

`plan` is pure: it reads `matrix.load()` and returns a fresh tensor. It never writes to the model;
`weightproof.snapshot.write_matrix` does, and what was written is compared with the plan bit for bit.

    >>> from weightproof.edits import RTN
    >>> RTN(bits=8).name
    'rtn-int8-channel'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from weightproof.edits.gptq import GPTQ
from weightproof.edits.kfac import KFAC
from weightproof.edits.lora_merge import LoraMerge
from weightproof.edits.mixed import Mixed
from weightproof.edits.prune import Prune
from weightproof.edits.rtn import RTN
from weightproof.edits.selection import VECTOR_FAMILY
from weightproof.edits.steering import Steer, steer
from weightproof.edits.svd import SVD
from weightproof.edits.task_arithmetic import TaskArithmetic
from weightproof.kinds import Kind
from weightproof.types import WeightMatrix

__all__ = [
    "GPTQ",
    "KFAC",
    "RTN",
    "SVD",
    "VECTOR_FAMILY",
    "Edit",
    "LoraMerge",
    "Mixed",
    "Prune",
    "Steer",
    "TaskArithmetic",
    "steer",
]


@runtime_checkable
class Edit(Protocol):
    """The contract of an edit; see the module's docstring."""

    @property
    def name(self) -> str:
        """Short name, unique for these parameters."""
        ...

    @property
    def kind(self) -> Kind:
        """The declared kind, whose contract is checked after the edit."""
        ...

    def params(self) -> Mapping[str, Any]:
        """The parameters, ready for JSON."""
        ...

    def selects(self, matrix: WeightMatrix) -> bool:
        """Whether this edit changes `matrix`; False for a refused matrix."""
        ...

    def plan(self, matrix: WeightMatrix, context: object = None) -> torch.Tensor | None:
        """New values (d_out, d_in) in `matrix.dtype`, or None to leave the matrix as it is."""
        ...
