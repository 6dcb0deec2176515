from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from architectures import build, example_inputs
from hand_readings import baseline
from weight_edits import apply_edit, preserving_edits

from weightproof.collective import Processes
from weightproof.edits.rtn import RTN
from weightproof.errors import PolicyError
from weightproof.guards.circuits import CircuitLimits, Circuits
from weightproof.policy import TIERS, load_policy
from weightproof.readings.circuits import config_of, read_circuits, vectors_of
from weightproof.types import CircuitReading, EditRecord, Outcome, Readings
from weightproof.weights import iter_weight_matrices

LIMITS = load_policy("balanced").limits_for(Circuits)
EDITS = [
    (architecture, edit) for architecture in ("gpt2", "llama", "bert", "t5") for edit in preserving_edits(architecture)
]


def read(model) -> Readings:
    alone = Processes.alone()
    found = read_circuits(list(iter_weight_matrices(model)), vectors_of(model, alone), config_of(model), alone)
    return baseline(circuits=found)


def judge(before: Readings, after: Readings, limits: CircuitLimits = LIMITS):
    return Circuits().judge(before, after, limits)


def distances(verdict) -> list[float]:
    return [item.value for item in verdict.measurements if item.statistic == "relative_distance"]


def outputs(name: str, model) -> torch.Tensor:
    with torch.no_grad():
        return model(**example_inputs(name)).logits


def redrawn(name: str) -> torch.nn.Module:
    """A model with gains, biases and weights of no special form."""
    model = build(name, **({"feed_forward_proj": "relu"} if name == "t5" else {}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator) * (parameter.std() + 0.1))
    return model


@pytest.mark.parametrize(("architecture", "edit"), EDITS, ids=[f"{name}-{edit.name}" for name, edit in EDITS])
def test_edits_that_preserve_the_function_do_not_move_a_circuit(architecture, edit):
    model = redrawn(architecture)
    before, expected = read(model), outputs(architecture, model)
    then = [parameter.detach().clone() for parameter in model.parameters()]
    apply_edit(edit, model)
    assert any(not torch.equal(old, new) for old, new in zip(then, model.parameters(), strict=True))
    torch.testing.assert_close(outputs(architecture, model), expected, rtol=1e-3, atol=1e-3)
    verdict = judge(before, read(model))
    assert verdict.outcome is Outcome.PASS
    assert verdict.num_measured == verdict.num_eligible > 0
    assert max(distances(verdict)) < 1e-5


@pytest.mark.parametrize("invertible", [False, True], ids=["rotation", "invertible"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "vit"])
def test_a_change_of_basis_between_values_and_output_moves_nothing(architecture, invertible):
    model = redrawn(architecture)
    before, expected = read(model), outputs(architecture, model)
    layer = model.vit.layers[0].attention if architecture == "vit" else model.model.layers[0].self_attn
    shared = 4 if architecture == "vit" else 2
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for group in range(shared):
            basis = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
            if invertible:
                basis = basis * torch.linspace(0.5, 2.0, 8, dtype=torch.float64)
            rows = slice(group * 8, (group + 1) * 8)
            layer.v_proj.weight[rows] = (basis @ layer.v_proj.weight[rows].double()).float()
            if layer.v_proj.bias is not None:
                layer.v_proj.bias[rows] = (basis @ layer.v_proj.bias[rows].double()).float()
            for head in range(group * (4 // shared), (group + 1) * (4 // shared)):
                columns = slice(head * 8, (head + 1) * 8)
                output = layer.o_proj.weight[:, columns].double() @ torch.linalg.inv(basis)
                layer.o_proj.weight[:, columns] = output.float()
    torch.testing.assert_close(outputs(architecture, model), expected, rtol=1e-3, atol=1e-3)
    verdict = judge(before, read(model))
    assert verdict.outcome is Outcome.PASS
    assert max(distances(verdict)) < 1e-5


def test_permuted_experts_and_scaled_queries_under_a_norm_move_nothing():
    mixtral = redrawn("mixtral")
    before, expected = read(mixtral), outputs("mixtral", mixtral)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for part in (mixtral.model.layers[0].mlp.gate.weight, *mixtral.model.layers[0].mlp.experts.parameters()):
            part.copy_(part[order])
    torch.testing.assert_close(outputs("mixtral", mixtral), expected, rtol=1e-3, atol=1e-3)
    assert max(distances(judge(before, read(mixtral)))) == 0.0

    qwen3 = redrawn("qwen3")
    before, expected = read(qwen3), outputs("qwen3", qwen3)
    with torch.no_grad():
        qwen3.model.layers[0].self_attn.q_proj.weight.mul_(7.0)
        qwen3.model.layers[0].self_attn.q_norm.weight.mul_(3.0)
        qwen3.model.layers[0].self_attn.k_norm.weight.div_(3.0)
    torch.testing.assert_close(outputs("qwen3", qwen3), expected, rtol=1e-3, atol=1e-3)
    assert max(distances(judge(before, read(qwen3)))) < 1e-5


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_scaling_around_an_activation_that_passes_no_scale_is_seen(architecture):
    model = redrawn(architecture)
    before = read(model)
    mlp = model.transformer.h[0].mlp if architecture == "gpt2" else model.bert.encoder.layer[0]
    up, down = (mlp.c_fc, mlp.c_proj) if architecture == "gpt2" else (mlp.intermediate.dense, mlp.output.dense)
    with torch.no_grad():
        up.weight.mul_(2.0)
        down.weight.div_(2.0)
    verdict = judge(before, read(model))
    assert verdict.outcome is Outcome.WARN
    moved = {item.target for item in verdict.measurements if item.outcome is Outcome.WARN}
    assert {name.rpartition(":")[2] for name in moved} == {"up"}


@pytest.mark.parametrize(("bits", "outcome"), [(8, Outcome.PASS), (4, Outcome.PASS), (2, Outcome.WARN)])
def test_quantization_moves_circuits_by_its_damage(bits, outcome):
    model = build("llama")
    before = read(model)
    with torch.no_grad():
        for matrix in iter_weight_matrices(model):
            planned = RTN(bits=bits).plan(matrix, None)
            if matrix.family in ("attn", "ffn") and planned is not None:
                matrix.load().copy_(planned)
    verdict = judge(before, read(model))
    assert verdict.outcome is outcome
    assert 0.0 < max(distances(verdict)) < {8: 0.002, 4: 0.06, 2: 1.0}[bits]


# ---- judgement on readings built by hand ----------------------------------------------------------------------------


def hand(*values: float, name: str = "layers.0.attn:qk", reason: str | None = None) -> Readings:
    one = CircuitReading(name, "qk", ("layers.0.attn.q",), None if reason else values, "float64", reason)
    return baseline(circuits={name: one})


@pytest.mark.parametrize(
    ("after", "outcome"),
    [
        ((4.0, 2.0), Outcome.PASS),
        ((2.0, 4.0), Outcome.PASS),
        ((5.6, 2.0), Outcome.PASS),
        ((5.7, 2.0), Outcome.WARN),
        ((2.4, 2.0), Outcome.PASS),
        ((2.3, 2.0), Outcome.WARN),
        ((39.0, 19.0), Outcome.WARN),
        ((41.0, 21.0), Outcome.FAIL),
        ((0.39, 0.19), Outcome.FAIL),
        ((0.0, 0.0), Outcome.FAIL),
    ],
)
def test_two_sided_with_a_gross_limit(after, outcome):
    assert judge(hand(4.0, 2.0), hand(*after)).outcome is outcome


def test_what_cannot_be_compared_is_never_a_pass():
    assert judge(baseline(), baseline()).outcome is Outcome.NOT_MEASURED
    unread = hand(reason="the layout is unknown")
    verdict = judge(unread, unread)
    assert (verdict.outcome, verdict.num_measured, verdict.num_eligible) == (Outcome.NOT_MEASURED, 0, 1)
    assert judge(hand(0.0, 0.0), hand(1.0, 1.0)).outcome is Outcome.NOT_MEASURED
    lost = judge(hand(4.0, 2.0), hand(reason="it holds NaN"))
    assert lost.measurements[0].outcome is Outcome.WARN
    assert lost.outcome is not Outcome.PASS
    assert judge(hand(4.0, 2.0), hand(4.0, 2.0, 1.0)).measurements[0].outcome is Outcome.WARN
    assert judge(hand(4.0, 2.0), baseline()).measurements[0].outcome is Outcome.WARN


def test_training_is_reported_and_not_judged():
    record = EditRecord("w", "train", {}, None, (), (), "a", "b", {})
    verdict = judge(hand(4.0, 2.0), replace(hand(400.0, 200.0), edit=record))
    assert verdict.outcome is Outcome.PASS
    assert all(item.limit is None for item in verdict.measurements)
    assert [item.value for item in verdict.measurements] == [pytest.approx(99.0), pytest.approx(math.log(100))]


def test_limits_of_the_tiers_and_wrong_ones():
    tiers = [load_policy(tier).limits_for(Circuits) for tier in TIERS]
    assert [limits.distance for limits in tiers] == [0.12, 0.36, 0.36]
    assert CircuitLimits() == LIMITS
    for wrong in ({"distance": -1.0}, {"distance": math.nan}, {"gross_ratio": 1.0}, {"gross_ratio": "x"}):
        with pytest.raises(PolicyError, match=next(iter(wrong))):
            CircuitLimits(**wrong)  # type: ignore[arg-type]
