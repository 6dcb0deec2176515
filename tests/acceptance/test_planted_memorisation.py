"""Planted memorisation (examples/forget_memorised.py): the strings go, the language stays, and controls are worse."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "forget_memorised.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("forget_memorised", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_recital_goes_at_a_small_price_and_controls_of_equal_size_cost_more(capsys):
    planted = example()
    language = planted.Language(seed=0)
    model = planted.trained(language, 1500)
    _, rows = planted.experiment(language, model)
    with capsys.disabled():
        print()
        planted.show(rows)
    base, *rest = rows
    recited = {(row.edit, row.energy): row.metrics["recall"] for row in rest}
    rise = {(row.edit, row.energy): row.metrics["clean NLL"] - base.metrics["clean NLL"] for row in rest}
    kept = {(row.edit, row.energy): row.kept_pairs for row in rest}

    # It knew the language (its entropy is 1.208 nats a token) and every string.
    assert base.metrics["recall"] == 1.0
    assert base.metrics["clean NLL"] < 1.25
    # Nearly none is recited any more, and the language is a hundredth of a nat worse.
    assert recited["original", 0.9] <= 0.05
    assert rise["original", 0.9] < 0.01
    assert recited["modified", 0.9] <= 0.05
    assert rise["modified", 0.9] < 0.02
    # At the same kept share each control costs more than the one before it, the first five times as much.
    share = 0.9
    assert kept["svd", share] == kept["random", share] == kept["inverse", share] == kept["original", share] < 0.5
    assert 5 * rise["original", share] < rise["svd", share] < rise["random", share] < rise["inverse", share]
    # So does each at its cheapest setting that leaves less than 5 % recited.
    cheapest = planted.best_at(rows, "recall", 0.05, "clean NLL")
    price = {label: row.metrics["clean NLL"] - base.metrics["clean NLL"] for label, row in cheapest.items()}
    assert max(price["original"], price["modified"]) < price["svd"] < price["random"] < price["inverse"]
