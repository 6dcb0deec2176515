"""What a certified step declared: from the parameters in its record, and the merged adapter where it is at hand.

A certificate holds the digest of an adapter, not the adapter. Who has it gives it; it counts only where its digest is
the one that the certificate states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightproof import kinds
from weightproof.certifying.form import Content
from weightproof.edits.mixed import QuantizeEach
from weightproof.errors import InputError
from weightproof.lora.adapters import Adapter, combine, read_adapter
from weightproof.numerics.low_rank import LowRank
from weightproof.types import EditRecord
from weightproof.verification.result import Findings


def adapters_at_hand(content: Content, given: Sequence[Adapter | Path | str], findings: Findings) -> Adapter | None:
    """The adapter that was given, if the certificate is about a merge of it; where it is not, that is a difference.

    Args:
        content: The certificate.
        given: Folders, or adapters that were read; several count as merged at once, in this order.
        findings: Where differences go.

    Raises:
        InputError: If a folder holds no adapter that can be read.
    """
    if not given:
        return None
    adapter = combine([one if isinstance(one, Adapter) else read_adapter(one) for one in given])
    where = f"adapter {', '.join(one.source if isinstance(one, Adapter) else str(one) for one in given)}"
    records = [step.record for step in content.predicate.steps if step.record is not None]
    stated = [str(one.params["adapter"]) for one in records if _names_adapter(one)]
    if adapter.digest in stated:
        findings.checked.append(f"digest of the {where}")
        return adapter
    what = "digest" if stated else "digest (no step of the certificate names an adapter)"
    findings.differs(where, what, stated[-1] if stated else None, adapter.digest)
    return None


def _names_adapter(record: EditRecord) -> bool:
    return record.kind == kinds.LoraMerge.name and isinstance(record.params.get("adapter"), str)


def kind_of(record: EditRecord | None, adapter: Adapter | None, ties: Mapping[str, Sequence[str]]) -> object:
    """The kind that a record declares, as far as its parameters say what it was.

    Args:
        record: Of the step that made the subject.
        adapter: The adapter at hand.
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


def _merge_of(record: EditRecord, adapter: Adapter | None, ties: Mapping[str, Sequence[str]]) -> kinds.LoraMerge | None:
    if adapter is None or record.params.get("adapter") != adapter.digest:
        return None
    first = {tied: name for name, others in ties.items() for tied in others}
    merge = kinds.LoraMerge(adapter, reverse=record.params.get("reverse") is True)
    return merge.read_as((), first, first).without(record.reverted)


def compare_merge(where: str, stated: EditRecord, found: EditRecord, findings: Findings) -> None:
    """Hold the names that a merge is said to have changed against those of the adapter."""
    for key in ("matrices", "replaced", "biases"):
        findings.require_stated(where, f"{key} of the adapter", _listed(found, key), _listed(stated, key))


def _listed(record: EditRecord, key: str) -> str:
    names = record.params.get(key)
    return ", ".join(map(str, names)) if isinstance(names, list | tuple) else ""
