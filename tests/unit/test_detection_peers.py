"""What other tools say in the detection benchmark: an error is neither a find nor a pass, no row is never a figure."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "detection"
GUARDS = ("invariants", "spectral", "rmt", "variance", "ratio")


@pytest.fixture
def by_peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("score_peers").by_peers
    for name in ("score_peers", "score"):
        sys.modules.pop(name, None)


def ours(case: str, delta: float, *, preserving: bool = False) -> dict[str, Any]:
    truth = {"delta": delta, "lower": delta, "upper": delta, "max_logit": 0.0 if preserving else None}
    return {
        "model": "m", "case": case, "truth": truth, "preserving": preserving, "broken": False, "check_seconds": 1.0,
        "situations": {"all": "loss_accepts", "weights": "nothing_measured"},
    }  # fmt: skip


def theirs(case: str, shift: float | None = 0.1, **outcomes: str) -> dict[str, Any]:
    guards = {name: {"outcome": outcomes.get(name, "pass"), "seconds": 1.0, "prepare_seconds": 2.0} for name in GUARDS}
    alpha = {"outcome": "measured", "mean": shift, "largest": shift, "layers": 1, "of": 2, "seconds": 1.0}
    if shift is None:
        alpha = {"outcome": "error: ValueError: NaN", "seconds": 1.0}
    return {"model": "m", "case": case, "invarlock": guards, "weightwatcher": alpha}


def test_without_rows_nothing_is_filled_in(by_peers: Any):
    assert by_peers([ours("a", 1.0)], []) == {"invarlock 0.12.1": "not run", "weightwatcher 0.7.7": "not run"}


def test_an_error_is_neither_found_nor_passed(by_peers: Any):
    rows = [ours("raised", 1.0), ours("found", 1.0), ours("missed", 1.0), ours("fine", 0.0), ours("not judged", 1.0)]
    said = [
        theirs("raised", shift=None, rmt="error: RuntimeError: x"),
        theirs("found", shift=0.9, rmt="fail", spectral="error: RuntimeError: x"),
        theirs("missed", variance="unsupported", spectral="warn"),
        theirs("fine", shift=0.2),
    ]
    found = by_peers(rows, said)
    guards = found["invarlock 0.12.1"]["all models"]["guards"]
    assert (guards["tpr"]["hits"], guards["tpr"]["of"], guards["nothing_said"]) == (1, 2, 1)
    assert (guards["fpr"]["hits"], guards["fpr"]["of"]) == (0, 1)
    warned = found["invarlock 0.12.1"]["all models"]["guards, warnings counted"]
    assert (warned["tpr"]["hits"], warned["tpr"]["of"]) == (2, 2)
    assert found["invarlock 0.12.1"]["all models"]["variance"]["nothing_said"] == 1
    assert found["weightwatcher 0.7.7"]["errors"] == 1
    assert found["weightwatcher 0.7.7"]["mean"]["auroc"]["value"] == pytest.approx(0.5)
    assert found["edits"] == {"judged": 4, "of": 5}


def test_models_failed_untouched_are_named_and_set_apart(by_peers: Any):
    rows = [ours("preserving: nothing", 0.0, preserving=True), ours("harmful", 1.0)]
    found = by_peers(rows, [theirs("preserving: nothing", spectral="fail"), theirs("harmful", spectral="fail")])
    assert found["invarlock 0.12.1"]["fails_untouched"] == ["m"]
    assert found["invarlock 0.12.1"]["all models"]["guards"]["false_alarms_preserving"]["hits"] == 1
    assert found["invarlock 0.12.1"]["models that pass untouched"]["guards"]["tpr"]["of"] == 0
