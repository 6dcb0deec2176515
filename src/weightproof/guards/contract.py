"""The contractual half of the invariants guard: what a declared kind of change promises.

A breach of a rigorous bound is FAIL, of a typical size WARN, a bound that could not be measured is WARN. Of a window
of training one thing is asked: that no trained matrix moved farther than a tenfold growth would take it.
"""

from __future__ import annotations

from collections.abc import Iterator

from weightproof.guards.conclude import edit_kind
from weightproof.guards.scope import changed_tensors
from weightproof.types import ContractReading, EditRecord, Measurement, Outcome, Readings

WITH_CONTRACT = frozenset({"cast", "quantize", "prune", "low_rank", "lora_merge", "preserving"})

# ||W' - W||_F / ||W||_F of one window of training. Provisional: a matrix that grew tenfold, which the spectral guard
# calls gross, has moved by 9 or more. Healthy training from random initialisation moved no matrix with a learned
# spectrum by more than 1.2 in 25 steps (docs/guards/invariants.md).
MAX_RELATIVE_DELTA = 9.0


def judge_contract(before: Readings, after: Readings) -> Iterator[Measurement]:
    """The bounds that the declared kind promises, for each matrix they were measured on."""
    edit = after.edit
    if edit is None:
        return
    if edit.kind == "train":
        yield from _judge_training(edit, after)
    for reading in edit.contract:
        matrix = after.matrices.get(reading.target) or before.matrices.get(reading.target)
        outcome, reason = _outcome(reading, edit.kind)
        yield Measurement(
            "invariants",
            reading.target,
            f"contract_{reading.statistic}",
            reading.value,
            None,
            reading.limit,
            matrix.family if matrix else "model",
            outcome,
            reason,
        )
    if edit_kind(after) in WITH_CONTRACT and not edit.contract and changed_tensors(before, after, edit):
        reason = f"the contract of {edit.kind!r} was not measured on any matrix"
        yield Measurement("invariants", edit.name, "contract", None, None, None, outcome=Outcome.WARN, reason=reason)


def _outcome(reading: ContractReading, kind: str) -> tuple[Outcome, str | None]:
    if reading.value is None:
        return Outcome.WARN, f"not measured: {reading.reason or 'no reason was given'}"
    if reading.value <= reading.limit:
        return Outcome.PASS, None
    finite = reading.value - reading.value == 0.0
    if finite and not reading.rigorous:
        return Outcome.WARN, f"unusual for {kind!r}"
    named = f": {reading.reason}" if reading.reason else ""
    return Outcome.FAIL, f"the contract of {kind!r} is broken{named}"


def _judge_training(edit: EditRecord, after: Readings) -> Iterator[Measurement]:
    """How far a window of training moved each matrix.

    As for gross growth, what has no learned spectrum is not judged (every `lora_B` at first), nor is anything while
    the learning rate warms up, unless the loss rose with it.
    """
    lenient = after.in_warmup and not after.loss_spike
    judged = {
        name: delta
        for name, delta in edit.relative_delta.items()
        if delta is not None and name not in after.untrained and ".lora_" not in name and not lenient
    }
    if not judged:
        return
    far = {name: delta for name, delta in judged.items() if delta > MAX_RELATIVE_DELTA}
    yield Measurement("invariants", "model", "num_matrices_moved_far", float(len(far)), 0.0, None)
    for name, delta in far.items():
        matrix = after.matrices.get(name)
        yield Measurement(
            "invariants",
            name,
            "contract_relative_delta",
            float(f"{delta:.3g}"),  # sums over shards differ in their last bits
            None,
            MAX_RELATIVE_DELTA,
            matrix.family if matrix else "model",
            Outcome.FAIL,
            "farther in one window than a tenfold growth would take it",
        )


def no_op_words(edit: EditRecord) -> str:
    """What it means that an edit with a declared kind changed nothing."""
    if edit.kind != "lora_merge":
        return "no-op edit: no tensor changed although a kind or targets were declared"
    merges = [one for one in edit.contract if one.statistic == "merge_error"]
    if merges and all(one.value == 0.0 for one in merges):
        why = "every delta of the adapter is zero, as it is before any training"
    elif merges and all(one.value is None for one in merges):
        why = "its deltas are smaller than the rounding of the dtype"
    else:
        why = "it was not merged"
    return f"no-op edit: the merged model is byte-identical to the base: {why}"
