from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from architectures import build, example_inputs
from sharding import shard
from trained_models import chain_samples, load
from worlds import run_world

from weightproof import GuardSession, InputError, edits
from weightproof.activations import forward_outputs, tap_moments, undisturbed
from weightproof.families import taps
from weightproof.guards.variance import VarianceLimits
from weightproof.parallel.placements import local_of
from weightproof.policy import load_policy
from weightproof.snapshot import MatrixBits
from weightproof.transactions.equalisation import Scale, equalise, helps, scale_of, scaled, scales_for, writers
from weightproof.types import LossReading
from weightproof.weights import iter_weight_matrices

LIMITS = VarianceLimits(equalise=True)
DOWN, OUTPUT = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"
# Floors and intervals for windows of 32 tokens.
FLOORS = {"min_windows": 50, "min_tokens": 0, "min_effective_size": 12.0}


def policy(**variance: object):
    limits = {"variance": {"equalise": True, **variance}, "loss": FLOORS, "divergence": {"kl": 0.5}}
    return load_policy("aggressive").override(limits)  # type: ignore[arg-type]


def windows(count: int = 256) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row} for row in chain_samples(count, 32, seed=50_000)]


def gain(lower: float | None, upper: float | None, **changes: object) -> LossReading:
    middle = None if lower is None or upper is None else (lower + upper) / 2
    plain = LossReading(
        "target", "digest", "nll", 100, 100, 3200, 100, 3200, 4.0, 4.0, middle, lower, upper, 0.95, 100.0, "bca"
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


# ---- the rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "now", "alpha"),
    [
        (1.0, 1.0, None),
        (1.0, 1.04, None),
        (1.0, 0.97, None),
        (1.0, 1.21, 1 / 1.1),
        (1.0, 0.9025, 1 / 0.95),
        (1.0, 100.0, 0.85),
        (1.0, 0.01, 1.12),
        (0.0, 1.0, None),
        (1.0, 0.0, None),
        (math.nan, 1.0, None),
        (1.0, math.inf, None),
    ],
)
def test_scale_is_the_root_of_the_ratio_within_the_clamp(before, now, alpha):
    found = scale_of(before, now, LIMITS)
    assert found == (None if alpha is None else pytest.approx(alpha))


@pytest.mark.parametrize(
    ("reading", "min_effect", "expected"),
    [
        # A/B of perplexities: 100 -> 90 with a ratio in (.9, 1.01); without an interval; 100 -> 99.97; an effect of .2.
        (gain(math.log(0.9), math.log(1.01)), 0.0005, False),
        (gain(None, None), 0.0005, False),
        (None, 0.0005, False),
        (gain(math.log(0.9996), math.log(0.9998)), 0.0005, False),
        (gain(math.log(0.80), math.log(0.83)), 0.2, False),
        (gain(math.log(0.80), math.log(0.8187)), 0.2, True),
        # One-sided: a mean and an interval of the change of the loss, and the least effect.
        (gain(-0.2, -0.05), 0.01, True),
        (gain(0.05, 0.15), 0.01, False),
        (gain(-0.002, -0.0001), 0.01, False),
        (gain(0.0, 0.1), 0.01, False),
        (gain(0.0, 0.0), 0.0, False),
        (gain(-0.2, -0.05, undecided="effective sample too small"), 0.01, False),
        (gain(-0.2, -0.05, reason="too little data"), 0.01, False),
        (gain(-0.2, math.nan), 0.01, False),
    ],
)
def test_scales_help_only_if_the_whole_interval_says_so(reading, min_effect, expected):
    assert helps(reading, min_effect) is expected


def test_the_furthest_off_come_first_and_only_so_many():
    llama = build("llama")
    before = {f"random:{tap.name}": 1.0 for tap in taps(llama)} | {
        f"calibration:{tap.name}": 1.0 for tap in taps(llama)
    }
    now = dict(before)
    now[f"calibration:{DOWN}"] = 1.21
    now["calibration:model.layers.1.self_attn.o_proj"] = 0.81
    now["random:model.layers.1.mlp.down_proj"] = 4.0  # the user's data say that it did not move
    matrices = list(iter_weight_matrices(llama))
    found = scales_for(before, now, matrices, LIMITS)
    assert [(one.tap, one.matrices) for one in found] == [
        ("model.layers.1.self_attn.o_proj", ("model.layers.1.self_attn.o_proj.weight",)),
        (DOWN, (f"{DOWN}.weight",)),
    ]
    assert [one.alpha for one in found] == [pytest.approx(1 / 0.9), pytest.approx(1 / 1.1)]
    assert scales_for(before, now, matrices, replace(LIMITS, max_equalised=1)) == found[:1]
    kept_out = [one for one in matrices if "o_proj" not in one.name]
    assert scales_for(before, now, kept_out, LIMITS) == found[1:]
    assert scales_for(before, before, matrices, LIMITS) == ()


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "vit", "mixtral", "whisper", "mamba"])
def test_every_tap_is_read_and_its_scale_is_that_of_its_writers(name):
    model = build(name)
    found = taps(model)
    matrices = list(iter_weight_matrices(model))

    def moments() -> dict[str, float]:
        with undisturbed(model), tap_moments(model) as sums:
            sums.batch = example_inputs(name)
            forward_outputs(model, sums.batch)
        return sums.moments()

    with torch.no_grad():  # an offset is not scaled: only the map is
        for tensor_name, parameter in model.named_parameters():
            if tensor_name.endswith("bias"):
                parameter.zero_()
    before = moments()
    assert {tap.name for tap in found} == before.keys() != set()
    assert {tap.role for tap in found} == ({"attn"} if name == "mamba" else {"attn", "ffn"})
    last = found[-1].name
    with torch.no_grad():
        for matrix in matrices:
            if matrix.name in writers(last, matrices):
                matrix.load().mul_(2.0)
    after = moments()
    assert after[last] == pytest.approx(4.0 * before[last], rel=1e-4)
    assert all(writers(tap.name, matrices) for tap in found)


def test_tied_refused_and_adapted_projections_are_left_alone():
    one = next(matrix for matrix in iter_weight_matrices(build("llama")) if matrix.name == f"{DOWN}.weight")
    assert writers(DOWN, [one]) == (one.name,)
    for changed in (replace(one, tied_names=("x",)), replace(one, refusal="x"), replace(one, is_view=False)):
        assert writers(DOWN, [changed]) == ()
    assert writers(DOWN, [one, replace(one, name=f"{DOWN}.lora_A.default.weight")]) == ()


def test_wrong_limits_are_refused():
    for key, value in {
        "equalise": 1, "max_equalised": 0, "equalise_min_scale": 1.2, "equalise_max_scale": 0.9,
        "equalise_deadband": -0.1, "equalise_min_effect": math.nan,
    }.items():  # fmt: skip
        with pytest.raises(Exception, match=key):
            VarianceLimits(**{key: value})
    assert VarianceLimits().equalise is False
    assert all(load_policy(tier).limits["variance"]["equalise"] is False for tier in ("balanced", "conservative"))


# ---- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama"])  # GPT-2 keeps its matrices turned
def test_taking_back_gives_the_same_bits_also_twice(name, dtype):
    model = build(name).to(dtype)
    matrices = list(iter_weight_matrices(model))
    with torch.no_grad():
        matrices[-1].load()[0, :2] = torch.tensor([-0.0, 1e-38])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    kept = MatrixBits(matrices)
    for _ in range(2):
        with torch.no_grad():
            for matrix in matrices:
                matrix.load().add_(1.0).mul_(1.12)
        kept.put_back()
        kept.put_back()
        for key, tensor in model.state_dict().items():
            bits = tensor.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
            assert torch.equal(bits, before[key].view(bits.dtype)), key


def test_values_are_scaled_once_and_rounded_once():
    values = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16)
    assert torch.equal(scaled(values, 1.1), (values.double() * 1.1).to(torch.bfloat16))


# ---- in a session ---------------------------------------------------------------------------------------------------


def shrink(model, factor: float = 0.85) -> None:
    with torch.no_grad():
        for layer in range(3):
            model.get_parameter(f"model.layers.{layer}.self_attn.o_proj.weight").mul_(factor)


def test_a_shrunken_output_is_scaled_back_and_recorded():
    model = load("llama").model
    before = model.get_parameter(f"{OUTPUT}.weight").detach().clone()
    session = GuardSession(model, policy=policy(), retain=windows())
    with session.edit("shrunk") as step:
        shrink(model)
        edited = model.get_parameter(f"{OUTPUT}.weight").detach().clone()
    assert step.applied == "kept", step.decision.reason  # type: ignore[union-attr]
    record = step.record
    assert record is not None
    assert {text.rpartition(" by ")[0] for text in record.corrections} >= {f"equalise {OUTPUT}.weight"}
    now = model.get_parameter(f"{OUTPUT}.weight").detach()
    alpha = float(next(text for text in record.corrections if OUTPUT in text).rpartition(" ")[2])
    assert alpha == pytest.approx(1.12)
    torch.testing.assert_close(now, edited * alpha, rtol=1e-5, atol=0.0)
    assert (now - before).norm() < 0.5 * (edited - before).norm()
    assert record.digest_after == session.model_digest
    written = session.certificate().statement["predicate"]["steps"][-1]["record"]  # type: ignore[index]
    assert list(record.corrections) == list(written["corrections"])


def test_scales_that_do_not_help_leave_no_trace():
    model = load("llama").model
    session = GuardSession(model, policy=policy(equalise_min_effect=5.0), retain=windows())
    with session.edit("shrunk") as step:
        shrink(model)
        edited = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert step.record.corrections == ()  # type: ignore[union-attr]
    if step.applied == "kept":
        assert all(torch.equal(tensor, edited[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("what", ["off", "monitor", "no data", "other targets"])
def test_nothing_is_scaled_without_leave(what):
    model = load("llama").model
    chosen = (
        load_policy("aggressive").override({"loss": FLOORS, "divergence": {"kl": 0.5}}) if what == "off" else policy()
    )  # type: ignore[arg-type]
    session = GuardSession(model, policy=chosen, retain=None if what == "no data" else windows())
    targets = [OUTPUT] if what == "other targets" else None
    with session.edit("shrunk", None, targets, "monitor" if what == "monitor" else "rollback") as step, torch.no_grad():
        if what == "other targets":
            model.get_parameter(f"{OUTPUT}.weight").mul_(0.5)  # beyond the clamp; only this one may be scaled
        else:
            shrink(model)
    scaled_names = {text.rpartition(" by ")[0].removeprefix("equalise ") for text in step.record.corrections}  # type: ignore[union-attr]
    assert scaled_names <= ({f"{OUTPUT}.weight"} if what == "other targets" else set())


def test_equalisation_accepts_nothing_that_the_guards_reject():
    model = load("llama").model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    session = GuardSession(model, policy=policy(), retain=windows())
    with session.edit("broken") as step:
        shrink(model, 0.2)
        with torch.no_grad():
            model.get_parameter("model.norm.weight").neg_()
    assert (step.applied, str(step.decision.action)) == ("restored", "ROLLBACK")  # type: ignore[union-attr]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_contract_of_a_quantization_is_that_of_the_edit_and_not_of_the_scales():
    model = load("llama").model
    session = GuardSession(model, policy=policy(equalise_deadband=0.0001, equalise_min_effect=0.0), retain=windows())
    step = session.apply(edits.RTN(3))
    assert step.record is not None
    contract = {one.target for one in step.record.contract if one.value is not None}
    assert f"{OUTPUT}.weight" in contract
    assert next(v for v in step.verdicts if v.guard == "invariants").outcome != "FAIL"


def test_a_trial_that_fails_midway_is_taken_back():
    model = load("llama").model
    session = GuardSession(model, policy=policy(), retain=windows())
    before = model.get_parameter(f"{OUTPUT}.weight").detach().clone()
    probe = session.guarded.assessor.loss

    class Broken:
        def again(self, **limits):
            trial = probe.again(**limits)
            trial.measure = lambda: (_ for _ in ()).throw(InputError("the disk is gone"))  # type: ignore[method-assign]
            return trial

    scales = [Scale(OUTPUT, 0.9, (f"{OUTPUT}.weight",))]
    with pytest.raises(InputError, match="the disk is gone"):
        equalise(model, scales, Broken(), 0.0, session.processes)  # type: ignore[arg-type]
    assert torch.equal(model.get_parameter(f"{OUTPUT}.weight"), before)


def _on_each(rank: int, size: int) -> list[tuple[str, tuple[str, ...]]]:
    """What was done and what was scaled: replicas, then shards."""
    del rank, size
    found: list[tuple[str, tuple[str, ...]]] = []
    for is_sharded in (False, True):
        model = shard(load("llama").model) if is_sharded else load("llama").model
        session = GuardSession(model, policy=policy(), retain=windows())
        with session.edit("shrunk") as step, torch.no_grad():
            for layer in range(3):
                local_of(model.get_parameter(f"model.layers.{layer}.self_attn.o_proj.weight")).mul_(0.85)
        found.append((str(step.applied), step.record.corrections))  # type: ignore[union-attr]
        session.close()
    return found


def test_two_processes_scale_alike_whole_or_sharded():
    first, second = run_world(_on_each, 2)
    assert first == second
    assert [applied for applied, _ in first] == ["kept", "kept"]
    assert len(first[0][1]) == len(first[1][1]) >= 3
