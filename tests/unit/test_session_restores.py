"""Rollback is bit-exact over kinds of model and of change; corrections meet the limit they are judged by."""

import math

import pytest
import torch
from architectures import build
from torch import nn

from weightproof import GuardSession, load_policy
from weightproof.errors import RestoreError
from weightproof.snapshot import tensor_digest
from weightproof.types import Action, Outcome
from weightproof.weights import iter_tensors

C_FC = "transformer.h.0.mlp.c_fc.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def digests(model):
    return {t.name: (tensor_digest(t.tensor), t.tied_names) for t in iter_tensors(model)}


def break_tied_embedding(model):
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1000)


def untie_head(model):
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))


def scale_down_proj(model):
    with torch.no_grad():
        model.get_parameter(DOWN).mul_(1e4)


def replace_linear(model):
    old = model.model.layers[1].mlp.gate_proj
    fresh = nn.Linear(old.in_features, old.out_features, bias=False, dtype=old.weight.dtype)
    with torch.no_grad():
        fresh.weight.mul_(1e4)
    model.model.layers[1].mlp.gate_proj = fresh


def poison_buffer(model):
    model.model.rotary_emb.inv_freq.fill_(float("nan"))


def change_dtype_and_break(model):
    model.to(torch.float16)
    scale_down_proj(model)


def drop_layer(model):
    del model.model.layers[1]


CASES = {
    "tied gpt2, embedding scaled": ("gpt2", torch.float32, break_tied_embedding),
    "tied gpt2, tie broken": ("gpt2", torch.float32, untie_head),
    "bf16 llama, matrix scaled": ("llama", torch.bfloat16, scale_down_proj),
    "bf16 llama, module replaced": ("llama", torch.bfloat16, replace_linear),
    "llama, module replaced": ("llama", torch.float32, replace_linear),
    "llama, NaN in a buffer": ("llama", torch.float32, poison_buffer),
    "llama, dtype changed and broken": ("llama", torch.float32, change_dtype_and_break),
    "llama, layer dropped": ("llama", torch.float32, drop_layer),
}


@pytest.mark.parametrize("case", CASES)
def test_rollback_is_bit_exact(case):
    architecture, dtype, change = CASES[case]
    model = build(architecture)
    with torch.no_grad():  # a small random head says almost the same whatever it reads
        model.lm_head.weight.mul_(4.0 if architecture == "llama" else 1.0)
    model = model.to(dtype)
    objects = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    before = digests(model)
    session = GuardSession(model)
    with session.edit(case) as step:
        change(model)
    assert step.decision.action is Action.ROLLBACK, step.decision.reason
    assert step.applied == "restored"
    assert digests(model) == before
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == objects
    if architecture == "gpt2":
        assert model.lm_head.weight is model.transformer.wte.weight


def top(model, name):
    return float(
        torch.linalg.matrix_norm(dict(model.named_parameters(remove_duplicate=False))[name].detach().double(), 2)
    )


def gpt2_with_structure():
    """A GPT-2 whose c_fc has spikes, so that clipping them is not rescaling the whole matrix."""
    model = build("gpt2")
    with torch.no_grad():
        weight = model.get_parameter(C_FC)
        left, right = torch.randn(weight.shape[0], 1), torch.randn(1, weight.shape[1])
        weight.add_(left @ right * (3 * torch.linalg.matrix_norm(weight, 2) / (left.norm() * right.norm())))
    return model


def grow_top_direction(model, factor):
    with torch.no_grad():
        weight = model.get_parameter(C_FC)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        weight.add_((factor - 1) * values[0] * left[:, :1] @ right[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["scale", "clip"])
def test_correction_meets_the_limit_it_is_judged_by(mode, dtype):
    model = gpt2_with_structure().to(dtype)
    policy = load_policy("balanced").override(limits={"spectral": {"correct": mode}})
    session = GuardSession(model, policy=policy)
    kappa = policy.limits["spectral"]["kappa"]["default"]
    base = top(model, C_FC)
    with session.edit("grow") as step:
        grow_top_direction(model.float(), 1.6)
        model.to(dtype)
    growth = math.log(top(model, C_FC) / base)
    spectral = next(v for v in step.verdicts if v.guard == "spectral")
    judged = [m for m in spectral.measurements if m.statistic == "log_spectral_norm_ratio"]
    assert [m for m in judged if m.outcome is not Outcome.PASS] == []
    assert step.applied == "kept", step.decision.reason
    assert kappa / 2 < growth <= kappa
    assert step.record.corrections == (f"{mode} {C_FC}",)


def test_tied_copy_is_corrected_once():
    model = build("gpt2")
    policy = load_policy("balanced").override(limits={"spectral": {"correct": "scale"}})
    session = GuardSession(model, policy=policy)
    base = top(model, "lm_head.weight")
    with session.edit("grow") as step, torch.no_grad():
        model.transformer.wte.weight.mul_(3)
    assert len(step.record.corrections) == 1
    growth = top(model, "lm_head.weight") / base
    assert 1.0 < growth <= math.exp(policy.limits["spectral"]["kappa"]["default"])
    assert model.lm_head.weight is model.transformer.wte.weight


def test_without_correct_nothing_is_written():
    model = gpt2_with_structure()
    session = GuardSession(model)
    with session.edit("grow", on_violation="monitor") as step:
        grow_top_direction(model, 1.6)
    after = digests(model)
    assert step.record.corrections == ()
    assert session.current.readings.tensors[C_FC].digest == after[C_FC][0]


class DeafMasters:
    """An optimizer's copies of the weights that take nothing: its next step writes the old values back."""

    def tensors(self):
        return {}

    def refresh(self, names):
        self.asked = names

    def stale(self):
        return [DOWN]


def test_an_edit_that_the_next_step_would_undo_is_taken_back_and_named():
    model, masters = build("llama"), DeafMasters()
    before = digests(model)
    session = GuardSession(model, masters=masters)
    with pytest.raises(RestoreError, match=f"next step would undo it: {DOWN}"), session.edit("tiny"):
        model.get_parameter(DOWN).data.mul_(1.0001)
    assert DOWN in masters.asked
    assert digests(model) == before
