"""Edits that leave a model's function as it is, made from what the circuit finder knows of its heads and MLPs.

- `permute neurons`: hidden neurons of every MLP in a random order (rows of up and gate with their biases, columns of
  down);
- `rescale values`: W_v and its bias times c, W_o over c, another c for each key-value head;
- `rescale up`: of a gated MLP up times c, down over c, another c for each neuron.

Whether a model admits one is proven by its outputs before anything is drawn (see `measuring`); nothing is assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from weightproof.calibration.drawing import EditDraw
from weightproof.calibration.value_edits import block_of
from weightproof.numerics.circuit_products import Reader
from weightproof.readings.circuit_finder import Circuit
from weightproof.types import WeightMatrix

PERMUTE, VALUES, UP = "permute neurons", "rescale values", "rescale up"
KINDS = (PERMUTE, VALUES, UP)


@dataclass(frozen=True)
class Change:
    """Rows (or columns) of one matrix or bias: taken in another order, times factors.

    Attributes:
        lines: Which rows; columns where `across`, (n,).
        order: Where each comes from, indices into `lines`; None: they stay.
        factors: What each is multiplied with; None: nothing.
        across: Columns instead of rows.
    """

    lines: torch.Tensor
    order: torch.Tensor | None = None
    factors: torch.Tensor | None = None
    across: bool = False

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The changed values of a (d_out, d_in) matrix, a fresh tensor in its dtype."""
        turned = weight.t() if self.across else weight
        lines = self.lines.to(weight.device)
        source = lines if self.order is None else lines[self.order.to(weight.device)]
        values = turned[source]
        if self.factors is not None:
            values = (values.float() * self.factors.to(weight.device)[:, None]).to(weight.dtype)
        changed = turned.clone().index_copy(0, lines, values)
        return changed.t().contiguous() if self.across else changed


def preserving_plan(
    drawn: EditDraw, circuits: Sequence[Circuit], matrices: Mapping[str, WeightMatrix]
) -> Callable[[WeightMatrix], torch.Tensor | None]:
    """What a draw makes of a matrix, or of a bias as an n x 1 matrix; None where it leaves it."""
    changes = _changes(drawn, circuits, matrices)

    def plan(matrix: WeightMatrix) -> torch.Tensor | None:
        change = changes.get(matrix.name)
        return None if change is None else change.of(matrix.load())

    return plan


def candidates(circuits: Sequence[Circuit]) -> tuple[str, ...]:
    """The preserving edits that the parts of a model would allow."""
    found = [kind for kind in KINDS if any(_is_for(kind, one) for one in circuits)]
    return tuple(found)


def _is_for(kind: str, circuit: Circuit) -> bool:
    if circuit.compute is None:
        return False
    if kind == VALUES:
        return circuit.kind == "ov" and circuit.heads is not None and {"o", "v"} <= circuit.readers.keys()
    parts = {"up", "down", "gate"} if kind == UP else {"up", "down"}
    return circuit.kind == "mlp" and parts <= circuit.readers.keys()


def _changes(drawn: EditDraw, circuits: Iterable[Circuit], matrices: Mapping[str, WeightMatrix]) -> dict[str, Change]:
    """Of every matrix and bias the change that a draw asks for; those of one layer fit together."""
    found: dict[str, Change] = {}
    for number, circuit in enumerate(circuits):
        if not _is_for(drawn.kind, circuit) or not _is_in(drawn.where, circuit):
            continue
        random = torch.Generator().manual_seed(drawn.seed + number)
        make = _of_values if drawn.kind == VALUES else _of_neurons
        found |= make(drawn, circuit, matrices, random)
    return found


def _is_in(where: str, circuit: Circuit) -> bool:
    return where == "all" or block_of(circuit.matrices[0]) == where.removeprefix("block ")


def _of_neurons(
    drawn: EditDraw, circuit: Circuit, matrices: Mapping[str, WeightMatrix], random: torch.Generator
) -> dict[str, Change]:
    up, down = circuit.readers["up"], circuit.readers["down"]
    size = matrices[down.matrix].d_in
    columns = torch.arange(size)
    if drawn.kind == UP:
        factors = _factors(drawn, size, random)
        up_rows = _with_bias(_rows(up, matrices), up.matrix, lambda lines: Change(lines, factors=factors))
        return up_rows | {down.matrix: Change(columns, factors=1.0 / factors, across=True)}
    order = torch.randperm(size, generator=random)
    found: dict[str, Change] = {down.matrix: Change(columns, order, across=True)}
    gate = circuit.readers.get("gate")
    if gate is not None and gate.matrix == up.matrix:  # one matrix holds both: their rows move alike
        lines = torch.cat([_rows(gate, matrices), _rows(up, matrices)])
        return found | _with_bias(lines, up.matrix, lambda rows: Change(rows, torch.cat([order, order + size])))
    for part in (up, gate):
        if part is not None:
            found |= _with_bias(_rows(part, matrices), part.matrix, lambda rows: Change(rows, order))
    return found


def _of_values(
    drawn: EditDraw, circuit: Circuit, matrices: Mapping[str, WeightMatrix], random: torch.Generator
) -> dict[str, Change]:
    assert circuit.heads is not None
    num_heads, num_shared = circuit.heads
    value, output = circuit.readers["v"], circuit.readers["o"]
    lines = _rows(value, matrices)
    by_head = _factors(drawn, num_shared, random)
    factors = by_head.repeat_interleave(len(lines) // num_shared)
    d_in = matrices[output.matrix].d_in
    behind = by_head.repeat_interleave(num_heads // num_shared).repeat_interleave(d_in // num_heads)
    found = _with_bias(lines, value.matrix, lambda rows: Change(rows, factors=factors))
    return found | {output.matrix: Change(torch.arange(d_in), factors=1.0 / behind, across=True)}


def _factors(drawn: EditDraw, count: int, random: torch.Generator) -> torch.Tensor:
    """Between 1 / factor and factor, evenly in logarithms."""
    return float(drawn.params["factor"]) ** (2.0 * torch.rand(count, generator=random) - 1.0)


def _rows(reader: Reader, matrices: Mapping[str, WeightMatrix]) -> torch.Tensor:
    """Indices of the rows that a part of a circuit reads."""
    every = torch.arange(matrices[reader.matrix].d_out)[:, None]
    return (every if reader.rows is None else reader.rows.of(every)).reshape(-1)


def _with_bias(lines: torch.Tensor, matrix: str, change: Callable[[torch.Tensor], Change]) -> dict[str, Change]:
    """The change of some rows, and of the same entries of the bias where there is one."""
    return {matrix: change(lines), f"{matrix.removesuffix('weight')}bias": change(lines)}
