"""How much of a model an edit reached: the share of the matrix parameters that it changed, and what it left alone.

Several quantizers leave stacked experts as they were without a word, and with them most of a mixture's weights.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from weightproof.types import Reach, WeightMatrix


def reach_of(matrices: Sequence[WeightMatrix], changed: Collection[str], *, named: bool = True) -> Reach | None:
    """What an edit reached of all matrices, those that are refused too; None for a model without any.

    Args:
        matrices: Every matrix of the changed model.
        changed: Public names of the tensors that changed, appeared or went.
        named: Whether to name what was left alone: asked of an edit that should have reached it.

    Example:
        >>> reach_of([], ()) is None
        True
    """
    sizes: dict[str, int] = {}
    left: dict[str, int] = {}
    names: dict[str, dict[str, None]] = {}
    for matrix in matrices:
        size = matrix.d_out * matrix.d_in
        sizes[matrix.family] = sizes.get(matrix.family, 0) + size
        if not any(name in changed for name in (matrix.name, *matrix.tensor_names)):
            left[matrix.family] = left.get(matrix.family, 0) + size
            stored = matrix.name.partition("[")[0]  # a stack of experts is one name
            names.setdefault(matrix.family, {})[stored] = None
    total = sum(sizes.values())
    if not total:
        return None
    return Reach(
        touched_fraction=1.0 - sum(left.values()) / total,
        untouched={family: tuple(found) for family, found in sorted(names.items())} if named else {},
        untouched_fraction={family: left[family] / sizes[family] if sizes[family] else 0.0 for family in sorted(left)},
    )
