"""Certificates to make reports of: that of a real session on a briefly trained model, and what can be done to it."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from functools import cache
from typing import Any

from trained_models import load

from weightproof import Certificate, GuardSession, edits
from weightproof.folders.jsonable import to_jsonable
from weightproof.guards.loss import Loss, LossLimits
from weightproof.types import LossReading, Readings, StructureReading

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(1)> `x` | & {{ 7*7 }} \u202e'\n## head"
LOSSES = {"kept": (0.0003, -0.0011, 0.0019), "undecided": (0.05, -0.01, 0.11), "rejected": (0.0852, 0.0713, 0.0997)}


@cache
def _session_json() -> str:
    """A session with int8 kept and int2 rolled back, with spectra of two matrices in both steps."""
    model = load("llama").model
    with tempfile.TemporaryDirectory() as folder:
        session = GuardSession(model, output_dir=folder, trackers=["jsonl"])
        session.apply(edits.RTN(bits=8))
        session.apply(edits.RTN(bits=2))
        text = session.certificate().to_json()
        session.close()
    return text


def statement() -> dict[str, Any]:
    """The statement of the session, free to be changed."""
    return json.loads(_session_json())


def certificate(changed: Mapping[str, Any] | None = None) -> Certificate:
    """A statement as a certificate, by the way of its text."""
    return Certificate.from_json(json.dumps(statement() if changed is None else changed))


def kept() -> dict[str, Any]:
    """Only the first step: int8, kept."""
    found = statement()
    del found["predicate"]["steps"][1:]
    return about_last(found)


def with_loss(outcome: str, found: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The last step with a loss as the guard judges it: kept, undecided or rejected."""
    found = statement() if found is None else found
    step = found["predicate"]["steps"][-1]
    difference, lower, upper = LOSSES[outcome]
    fields = {
        "role": "retain", "windows_digest": "ab" * 32, "metric": "nll", "num_windows": 400, "num_groups": 400,
        "num_tokens": 50800, "num_used": 400, "tokens_used": 50800, "before": 1.2609, "after": 1.2609 + difference,
        "difference": difference, "lower": lower, "upper": upper, "confidence": 0.95, "effective_size": 395.2,
        "method": "bca",
    }  # fmt: skip
    reading = LossReading(**{**fields, **changes})
    nothing = Readings("", {}, StructureReading({}, frozenset(), {}), {}, {})
    verdict = to_jsonable(Loss().judge(nothing, dataclasses.replace(nothing, losses=(reading,)), LossLimits()))
    step["verdicts"] = [item for item in step["verdicts"] if item["guard"] != "loss"]
    step["verdicts"].append({**verdict, "num_measurements": len(verdict["measurements"])})
    situations = {"kept": "loss_accepts", "undecided": "loss_undecided", "rejected": "loss_rejects"}
    step.update(losses=[to_jsonable(reading)], assurance="loss", situation=situations[outcome])
    step["reason"] = f"policy 'balanced': {verdict['reason']}"
    return about_last(found)


def about_last(found: dict[str, Any]) -> dict[str, Any]:
    """The statement with its decision on its last step."""
    last = found["predicate"]["steps"][-1]
    copied = ("applied", "action", "situation", "reason", "warned", "decision_digest", "evidence_digest")
    found["predicate"]["decision"] = {
        "step": last["name"],
        "index": len(found["predicate"]["steps"]) - 1,
        **{name: last[name] for name in copied},
    }
    return found


def hostile() -> dict[str, Any]:
    """A rejected change in which every text that a stranger may choose is markup."""
    found = with_loss("rejected")
    found["subject"][0]["name"] = HOSTILE
    found["predicate"] = _replaced(found["predicate"])
    for step in found["predicate"]["steps"]:
        step["record"]["relative_delta"][f"layers.0.{HOSTILE}"] = 0.5
        step["record"]["relative_delta"][HOSTILE] = None
    found["predicate"]["not_tested"].append(HOSTILE)
    return found


def _replaced(found: Any) -> Any:
    if isinstance(found, dict):
        chosen = {key: HOSTILE for key, item in found.items() if key in _CHOSEN and isinstance(item, str)}
        return {key: chosen.get(key, _replaced(item)) for key, item in found.items()}
    return [_replaced(item) for item in found] if isinstance(found, list) else found


_CHOSEN = (
    "name", "reason", "target", "guard", "statistic", "method", "matrix", "situation", "kind", "created_at", "torch",
    "outcome", "action", "applied", "assurance", "digest", "null",
)  # fmt: skip
