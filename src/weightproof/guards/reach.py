"""What a declared quantization left as it was: named, with its share of the parameters."""

from __future__ import annotations

from collections.abc import Iterator

from weightproof.guards.scope import Scope
from weightproof.types import Measurement, Outcome, Readings

# Linear maps inside of the repeated blocks: what "quantize the model" means. Embeddings, heads and routers are often
# left alone on purpose.
BLOCK_FAMILIES = ("attn", "ffn", "expert")
_NAMED = 3


def judge_reach(before: Readings, after: Readings) -> Iterator[Measurement]:
    """How much of the model an edit reached; WARN for block matrices that a quantization did not, and could have.

    A matrix that no declared target covers was not meant.
    """
    edit = after.edit
    if edit is None or edit.reach is None or edit.kind == "train":
        return
    reach, scope = edit.reach, Scope(before)
    yield Measurement("invariants", "model", "touched_fraction", reach.touched_fraction, None, None)
    if edit.kind != "quantize" or reach.touched_fraction == 0.0:
        return
    for family in BLOCK_FAMILIES:
        names = [
            name for name in reach.untouched.get(family, ()) if edit.targets is None or scope.covers(name, edit.targets)
        ]
        if names:
            shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
            share = reach.untouched_fraction[family]
            reason = (
                f"{share:.1%} of the {family} parameters were left as they were: {shown}; {edit.name!r} changed "
                f"{reach.touched_fraction:.1%} of all matrix parameters (if that was meant, declare targets=)"
            )
            yield Measurement("invariants", family, "untouched_fraction", share, 0.0, 0.0, family, Outcome.WARN, reason)
