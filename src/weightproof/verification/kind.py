"""What a certified step declared: from its record, and the merged adapter or steered delta where it is at hand.

A certificate holds the digest of an adapter or a delta, not the thing. Who has it gives it; it counts only where its
digest is the one that the certificate states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightproof import kinds
from weightproof.certifying.form import Content
from weightproof.deltas import Delta
from weightproof.edits.mixed import QuantizeEach
from weightproof.edits.steering import Steer
from weightproof.errors import InputError
from weightproof.lora.adapters import Adapter, combine, read_adapter
from weightproof.numerics.low_rank import LowRank
from weightproof.types import EditRecord
from weightproof.verification.result import Findings


def adapters_at_hand(
    content: Content, given: Sequence[Adapter | Path | str], findings: Findings
) -> Adapter | Delta | None:
    """The adapter (or the delta of a steering) that was given, if the certificate is about it; else a difference.

    Args:
        content: The certificate.
        given: Folders, or adapters that were read; several count as merged at once, in this order. Where a model was
            steered: what `Delta.load` reads.
        findings: Where differences go.

    Raises:
        InputError: If a folder holds no adapter that can be read, or no delta.
    """
    if not given:
        return None
    records = [step.record for step in content.predicate.steps if step.record is not None]
    named = [one for one in records if _names_adapter(one) or delta_digest(one) is not None]
    if named and delta_digest(named[-1]) is not None:
        return _delta_at_hand(named, given, findings)
    adapter = combine([one if isinstance(one, Adapter) else read_adapter(one) for one in given])
    where = f"adapter {', '.join(one.source if isinstance(one, Adapter) else str(one) for one in given)}"
    stated = [str(one.params["adapter"]) for one in named if _names_adapter(one)]
    if adapter.digest in stated:
        findings.checked.append(f"digest of the {where}")
        return adapter
    what = "digest" if stated else "digest (no step of the certificate names an adapter)"
    findings.differs(where, what, stated[-1] if stated else None, adapter.digest)
    return None


def _delta_at_hand(
    records: Sequence[EditRecord], given: Sequence[Adapter | Path | str], findings: Findings
) -> Delta | None:
    path, *others = given
    if others or isinstance(path, Adapter):
        raise InputError("the certificate is about steering by one delta: give that delta's path, and nothing else")
    delta = Delta.load(path)
    if any(_part_of(one, delta) is not None for one in records):
        findings.checked.append(f"digest of the delta {path}")
        return delta
    findings.differs(f"delta {path}", "digest", delta_digest(records[-1]), delta.digest)
    return None


def delta_digest(record: EditRecord) -> str | None:
    """The digest of the delta that a steering added, as its record states it; None for anything else."""
    stated = record.params.get("delta")
    digest = stated.get("digest") if isinstance(stated, Mapping) else None
    return digest if record.kind == kinds.LoraMerge.name and isinstance(digest, str) else None


def _part_of(record: EditRecord, delta: Delta) -> Delta | None:
    """What a steering added of a delta: all of it, or the matrices that were chosen; None where it is another one."""
    names = record.params.get("matrices")
    listed = [str(name) for name in names] if isinstance(names, list | tuple) else []
    chosen = {name: delta.parts[name] for name in listed if name in delta.parts}
    kept = [delta, Delta(chosen, delta.metadata)] if chosen else [delta]
    return next((one for one in kept if one.digest == delta_digest(record)), None)


def _names_adapter(record: EditRecord) -> bool:
    return record.kind == kinds.LoraMerge.name and isinstance(record.params.get("adapter"), str)


def kind_of(record: EditRecord | None, adapter: Adapter | Delta | None, ties: Mapping[str, Sequence[str]]) -> object:
    """The kind that a record declares, as far as its parameters say what it was.

    Args:
        record: Of the step that made the subject.
        adapter: The adapter at hand, or the delta.
        ties: Name of a tensor -> its other names, as in the certificate.

    Returns:
        The kind; None where the record does not hold enough to tell.
    """
    if record is None:
        return None
    params: dict[str, Any] = {key: value for key, value in record.params.items() if key != "inferred"}
    try:
        if record.kind in kinds.PLAIN_NAMES:
            return kinds.Plain(record.kind)
        if record.kind == kinds.LoraMerge.name:
            return _merge_of(record, adapter, ties)
        if record.kind == "quantize" and isinstance(params.get("bits"), Mapping):
            return QuantizeEach(params.pop("bits"), **params)
        made = {"cast": kinds.Cast, "quantize": kinds.Quantize, "prune": kinds.Prune, "low_rank": LowRank}.get(
            record.kind
        )
        return None if made is None else made(**params)
    except (TypeError, InputError):
        return None


def _merge_of(
    record: EditRecord, adapter: Adapter | Delta | None, ties: Mapping[str, Sequence[str]]
) -> kinds.LoraMerge | None:
    merge = _steering_of(record, adapter) if isinstance(adapter, Delta) else _adapter_merge(record, adapter)
    if merge is None:
        return None
    first = {tied: name for name, others in ties.items() for tied in others}
    return merge.read_as((), first, first).without(record.reverted)


def _adapter_merge(record: EditRecord, adapter: Adapter | None) -> kinds.LoraMerge | None:
    if adapter is None or record.params.get("adapter") != adapter.digest:
        return None
    return kinds.LoraMerge(adapter, reverse=record.params.get("reverse") is True)


def _steering_of(record: EditRecord, delta: Delta) -> kinds.LoraMerge | None:
    part, alpha = _part_of(record, delta), record.params.get("alpha")
    return None if part is None or not isinstance(alpha, int | float) else Steer(part, float(alpha)).kind


def compare_merge(where: str, stated: EditRecord, found: EditRecord, findings: Findings) -> None:
    """Hold the names that a merge is said to have changed against those of the adapter."""
    for key in ("matrices", "replaced", "biases"):
        findings.require_stated(where, f"{key} of the adapter", _listed(found, key), _listed(stated, key))


def _listed(record: EditRecord, key: str) -> str:
    names = record.params.get(key)
    return ", ".join(map(str, names)) if isinstance(names, list | tuple) else ""
