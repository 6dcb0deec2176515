"""The contractual half of the invariants guard: from readings written by hand, and in a training that is healthy."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hand_readings import after, baseline, edit, tensor
from trained_adapters import adapted, configuration
from trained_models import RECIPES, make_windows, nll, untrained

from weightproof import GuardSession
from weightproof.guards.contract import MAX_RELATIVE_DELTA, judge_contract, no_op_words
from weightproof.guards.invariants import Invariants, InvariantsLimits
from weightproof.types import ContractReading, Measurement, Outcome, Readings

UP, Q = "blocks.0.mlp.up", "blocks.0.attn.q"


def judged(readings: Readings) -> list[Measurement]:
    return list(judge_contract(baseline(), readings))


def reading(value: float | None, *, rigorous: bool = True, reason: str | None = None) -> ContractReading:
    return ContractReading(UP, "merge_error", value, 1.0, rigorous, reason)


@pytest.mark.parametrize(
    ("found", "outcome", "words"),
    [
        (reading(0.5), Outcome.PASS, None),
        (reading(1.5, reason="it was merged twice"), Outcome.FAIL, "the contract of 'prune' is broken: it was merged"),
        (reading(1.5), Outcome.FAIL, "the contract of 'prune' is broken"),
        (reading(1.5, rigorous=False), Outcome.WARN, "unusual for 'prune'"),
        (reading(math.nan, rigorous=False), Outcome.FAIL, "the contract of 'prune' is broken"),
        (reading(None, reason="it is packed"), Outcome.WARN, "not measured: it is packed"),
    ],
)
def test_a_breach_says_what_it_looks_like(found, outcome, words):
    (item,) = judged(replace(after("prune"), edit=edit("prune", f"{UP}.weight", contract=(found,))))
    assert (item.outcome, item.family) == (outcome, "ffn")
    assert (item.reason is None) if words is None else (words in item.reason)


@pytest.mark.parametrize("kind", ["prune", "lora_merge", "preserving", "cast", "quantize", "low_rank"])
def test_a_contract_that_was_measured_on_nothing_warns(kind):
    (item,) = judged(replace(after(), edit=edit(kind, f"{UP}.weight")))
    assert item.outcome is Outcome.WARN
    assert "was not measured on any matrix" in item.reason


NO_OPS = [
    ((), "it was not merged"),
    ((reading(1.0),), "it was not merged"),
    ((reading(0.0), reading(0.0)), "every delta of the adapter is zero"),
    ((reading(None, reason="rounding"),), "smaller than the rounding"),
]


@pytest.mark.parametrize(("contract", "words"), NO_OPS)
def test_a_merge_that_changed_nothing_says_why(contract, words):
    said = no_op_words(edit("lora_merge", contract=contract))
    assert "byte-identical to the base" in said
    assert words in said
    assert "although a kind or targets were declared" in no_op_words(edit("prune"))


def test_a_merge_that_only_took_its_own_tensors_away_is_a_no_op():
    gone = f"{UP}.lora_A.default.weight"
    before = replace(baseline(), tensors={**baseline().tensors, gone: tensor(gone)})
    record = edit("lora_merge", gone, replaced_modules=(UP,), contract=(reading(1.0),))
    found = Invariants().judge(before, replace(baseline(), edit=record), InvariantsLimits())
    assert found.outcome is Outcome.FAIL
    assert "byte-identical" in str([item.reason for item in found.measurements])


@pytest.mark.parametrize(("kind", "outcome"), [("unknown", "WARN"), ("preserving", "PASS"), ("prune", "FAIL")])
def test_tensors_of_an_adapter_that_appear_are_told_from_others(kind, outcome):
    fresh = f"{UP}.lora_B.second.weight"
    record = edit(kind, fresh, contract=(reading(0.0),))
    readings = replace(baseline(), tensors={**baseline().tensors, fresh: tensor(fresh)}, edit=record)
    found = Invariants().judge(baseline(), readings, InvariantsLimits())
    assert found.outcome == outcome


# ---- training -------------------------------------------------------------------------------------------------------


def window(deltas: dict[str, float | None], **changes: object) -> list[Measurement]:
    readings = replace(after("train"), edit=edit("train", relative_delta=deltas), **changes)  # type: ignore[arg-type]
    return judged(readings)


def test_a_window_counts_the_matrices_that_moved_too_far_and_fails_each():
    (item,) = window({UP: 0.3, Q: 0.5})
    assert (item.statistic, item.value, item.outcome) == ("num_matrices_moved_far", 0.0, Outcome.PASS)
    count, *far = window({UP: 10.00004, Q: 99.0, "embed": 0.1})
    assert count.value == 2.0
    assert [(item.target, item.value, item.limit) for item in far] == [
        (UP, 10.0, MAX_RELATIVE_DELTA),
        (Q, 99.0, MAX_RELATIVE_DELTA),
    ]
    assert {item.outcome for item in far} == {Outcome.FAIL}


def test_what_has_no_learned_spectrum_and_what_warms_up_is_not_judged():
    assert window({UP: 50.0}, untrained=frozenset({UP})) == []
    assert window({f"{UP}.lora_B.default": 50.0, Q: None}) == []
    assert window({UP: 50.0}, in_warmup=True) == []
    _, item = window({UP: 50.0}, in_warmup=True, loss_spike=True)
    assert item.outcome is Outcome.FAIL


@pytest.mark.parametrize("with_adapter", [False, True], ids=["from random weights", "LoRA"])
def test_healthy_training_stays_far_below_the_limit(with_adapter):
    model = untrained("llama")
    if with_adapter:
        model = adapted(model, configuration("llama"))
    session = GuardSession(model)
    session.watch()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=3e-3)
    seen = []
    for index, batch in enumerate(make_windows(RECIPES["llama"], 50, seed=10_000)):
        model.train()
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (index + 1) / 40)
        nll("llama", model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if index % 25 == 24:
            step = session.check_window(step=index + 1, in_warmup=False)
            assert step.applied == "kept", step.decision.reason
            trained = step.record.relative_delta.keys() - step.judged.before.untrained
            seen += [step.record.relative_delta[name] for name in trained if ".lora_" not in name]
    assert with_adapter or seen
    assert all(value < MAX_RELATIVE_DELTA / 5 for value in seen)


def test_a_matrix_that_training_threw_far_away_is_rolled_back():
    model = untrained("llama")
    generator = torch.Generator().manual_seed(2)
    weight = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    with torch.no_grad():  # a learned spectrum: one direction stands out
        weight.add_(torch.outer(torch.randn(64, generator=generator), torch.randn(192, generator=generator)) * 0.1)
    session = GuardSession(model)
    session.watch()
    with torch.no_grad():
        weight.add_(torch.randn(weight.shape, generator=generator) * 3.0)
    step = session.check_window(step=1)
    assert step.applied == "restored"
    invariants = next(verdict for verdict in step.verdicts if verdict.guard == "invariants")
    assert "farther in one window than a tenfold growth" in invariants.reason
