"""The structural half of the invariants guard: tensors, shapes, dtypes, ties, sizes, module classes."""

from __future__ import annotations

from collections.abc import Iterator

from weightproof.guards.conclude import edit_kind
from weightproof.guards.packing import Repacked, repacked, reshaped, without
from weightproof.types import EditRecord, Measurement, Outcome, Readings, TensorReading

# What a declared kind forbids to change; `unknown` promises nothing, so a change is WARN there.
FORBIDS: dict[str, frozenset[str]] = {
    "cast": frozenset({"storage", "module_class"}),
    "quantize": frozenset({"dtype", "storage"}),
    "prune": frozenset({"dtype", "storage", "module_class"}),
    "lora_merge": frozenset({"dtype", "storage"}),
    "low_rank": frozenset({"dtype", "storage", "module_class"}),
    "preserving": frozenset({"dtype", "storage", "module_class"}),
    "train": frozenset({"dtype", "storage", "module_class"}),
}


_ADAPTER_PARTS = (".lora_", ".original_module.", ".modules_to_save.")
_WITH_ADAPTERS = frozenset({"unknown", "lora_merge", "preserving"})


def judge_structure(before: Readings, after: Readings) -> Iterator[Measurement]:
    """Yield what differs in structure, and one PASS row with the number of differences when nothing does."""
    changes = repacked(before, after)
    found = [*_judge_ties(before, after), *_judge_packing(before, after, changes)]
    before, after = without(before, changes), without(after, changes)
    found += [
        *_judge_embeddings(before, after),
        *_judge_names(before, after),
        *_judge_tensors(before, after),
        *_judge_modules(before, after),
    ]
    yield from found
    if not any(item.outcome is not Outcome.PASS for item in found):
        yield Measurement("invariants", "model", "num_structural_changes", 0.0, 0.0, 0.0)


def _fail(target: str, statistic: str, reason: str, *, value: float = 1.0, reference: float = 0.0) -> Measurement:
    return Measurement(
        "invariants", target, statistic, value, reference, reference, outcome=Outcome.FAIL, reason=reason
    )


def _judge_ties(before: Readings, after: Readings) -> Iterator[Measurement]:
    for group in sorted(before.structure.ties):
        if not any(set(group) <= set(now) for now in after.structure.ties):
            yield _fail(group[0], "broken_tie", f"{' and '.join(group)} no longer share one storage")


def _judge_packing(before: Readings, after: Readings, changes: tuple[Repacked, ...]) -> Iterator[Measurement]:
    """Matrices that are stored another way: by kind, as any change of storage."""
    kind = edit_kind(after)
    for change in changes:
        words = f"{change.before} became {change.after}" if change.before != change.after else "packed another way"
        if change.is_declared(kind):
            yield Measurement(
                "invariants", change.name, "changed_storage", 1.0, 0.0, None, reason=f"{words}, as declared"
            )
        else:
            yield _by_kind(change.name, "storage", words, after)
    for name, words in reshaped(before, after, changes):
        yield _fail(name, "changed_shape", words)


def _judge_embeddings(before: Readings, after: Readings) -> Iterator[Measurement]:
    for name, then in before.structure.embedding_sizes.items():
        now = after.structure.embedding_sizes.get(name)
        if now is not None and now != then:
            reason = f"the tokenizer and the embedding no longer fit: {then} rows became {now}"
            yield _fail(name, "embedding_size", reason, value=float(now), reference=float(then))


def _judge_names(before: Readings, after: Readings) -> Iterator[Measurement]:
    kind = edit_kind(after)
    for name in before.tensors:
        if name not in after.tensors and not (kind == "lora_merge" and _is_of_adapter(name)):
            # Merging an adapter may take its own tensors away; that is what was declared.
            yield _fail(name, "missing_tensor", "it was there before the change")
    for name in after.tensors:
        if name not in before.tensors:
            yield _judge_added(name, kind)


def _judge_added(name: str, kind: str) -> Measurement:
    """A tensor that appeared; an adapter's own beside weights that stay is no change of what is there."""
    if not _is_of_adapter(name) or kind not in _WITH_ADAPTERS:
        return _fail(name, "added_tensor", "it was not there before the change")
    if kind == "unknown":
        reason = "a tensor of an adapter that was put in"
        return Measurement("invariants", name, "added_tensor", 1.0, 0.0, 0.0, outcome=Outcome.WARN, reason=reason)
    return Measurement("invariants", name, "added_tensor", 1.0, 0.0, None, reason="a tensor of an adapter")


def _is_of_adapter(name: str) -> bool:
    return any(part in name for part in _ADAPTER_PARTS)


def _judge_tensors(before: Readings, after: Readings) -> Iterator[Measurement]:
    for name, then in before.tensors.items():
        now = after.tensors.get(name)
        if now is None:
            continue
        if now.shape != then.shape:
            yield _fail(name, "changed_shape", f"{list(then.shape)} became {list(now.shape)}")
        if _dtype(now.dtype) != _dtype(then.dtype):
            yield _judge_dtype(then, now, after.edit)
        if now.storage != then.storage:
            yield _by_kind(name, "storage", f"{then.storage} became {now.storage}", after)


def _dtype(name: object) -> str:
    return str(name).removeprefix("torch.")


def _judge_dtype(then: TensorReading, now: TensorReading, edit: EditRecord | None) -> Measurement:
    kind = edit.kind if edit is not None else "unknown"
    change = f"{_dtype(then.dtype)} became {_dtype(now.dtype)}"
    if edit is None or kind != "cast":
        return _changed(now.name, "dtype", change, kind)
    declared = _dtype(edit.params.get("dtype", ""))
    if _dtype(now.dtype) != declared:
        return _fail(
            now.name, "changed_dtype", f"{change} although the edit declared a cast to {declared or 'nothing'}"
        )
    return Measurement("invariants", now.name, "changed_dtype", 1.0, 0.0, None, reason=f"{change}, as declared")


def _judge_modules(before: Readings, after: Readings) -> Iterator[Measurement]:
    for name, then in before.structure.modules.items():
        now = after.structure.modules.get(name)
        if now is not None and now != then:
            yield _by_kind(name, "module_class", f"{then} became {now}", after)


def _by_kind(name: str, what: str, change: str, after: Readings) -> Measurement:
    return _changed(name, what, change, edit_kind(after))


def _changed(name: str, what: str, change: str, kind: str) -> Measurement:
    """FAIL where the declared kind forbids the change, PASS for a merged adapter's wrapper, else WARN."""
    outcome, limit = Outcome.WARN, 0.0
    reason = f"{change}, which kind {kind!r} does not rule out"
    if what in FORBIDS.get(kind, frozenset()):
        outcome, reason = Outcome.FAIL, f"{change}, which kind {kind!r} forbids"
    elif kind == "lora_merge":
        outcome, limit, reason = Outcome.PASS, None, change
    return Measurement("invariants", name, f"changed_{what}", 1.0, 0.0, limit, outcome=outcome, reason=reason)
