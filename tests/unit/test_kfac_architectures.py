"""What hooks cannot see, what is stored the other way round, tied or too large: refused by name, or edited rightly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from trained_models import VOCAB_SIZE, untrained
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from weightproof import GuardSession, InputError, edits, fit_factors
from weightproof.curvature import Factors
from weightproof.curvature.fitting import fit_cost
from weightproof.curvature.projection import edit_matrix
from weightproof.weights import iter_weight_matrices

TINY = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip


def fitted(model: nn.Module, include, vocabulary: int = VOCAB_SIZE, **given) -> Factors:
    ids = torch.randint(3, vocabulary, (12, 24), generator=torch.Generator().manual_seed(0))
    options = {"labels": "empirical", "progress": False} | given
    return fit_factors(model, [{"input_ids": ids}], include, **options)


def matrix_of(model: nn.Module, name: str):
    return next(one for one in iter_weight_matrices(model) if one.name == name)


def test_a_square_conv1d_is_the_transpose_of_a_linear_layer():
    """Square, so that no shape tells: stored (in, out), edited as (out, in)."""
    model, name = untrained("gpt2"), "transformer.h.0.attn.c_proj.weight"
    stored = model.transformer.h[0].attn.c_proj
    linear = copy.deepcopy(model)
    replaced = nn.Linear(*stored.weight.shape)
    with torch.no_grad():
        replaced.weight.copy_(stored.weight.T)
        replaced.bias.copy_(stored.bias)
    linear.transformer.h[0].attn.c_proj = replaced
    plans = []
    for one in (model, linear):
        factors = fitted(one, name, require_full_rank=False)
        plans.append(edits.KFAC(factors, energy=0.7, include="*.c_proj*").plan(matrix_of(one, name)))
    assert torch.allclose(*plans, atol=1e-5)
    factors = fitted(model, name, require_full_rank=False)[name]
    wrong = edit_matrix(stored.weight, factors.activation_covariance, factors.gradient_covariance, 0.7)
    assert float((wrong.T - plans[0]).norm()) > 0.1 * float(plans[0].norm()), "the other orientation is another edit"
    session = GuardSession(model)
    session.apply(
        edits.KFAC(fitted(model, name, require_full_rank=True), energy=0.7, include="*.attn.c_proj*"),
        on_violation="monitor",
    )
    assert torch.equal(stored.weight.T, plans[0])


def test_a_tied_matrix_is_edited_once_and_reported_once():
    model = untrained("llama")
    one, two = (model.model.layers[i].mlp for i in (0, 1))
    two.up_proj.weight = one.up_proj.weight
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    factors = fitted(model, "*.up_proj*")
    assert names[0] in factors
    assert names[1] not in factors
    before = one.up_proj.weight.detach().clone()
    place = one.up_proj.weight.data_ptr()
    step = GuardSession(model).apply(edits.KFAC(factors, energy=0.7), on_violation="monitor")
    covariances = factors[names[0]].activation_covariance, factors[names[0]].gradient_covariance
    once = edit_matrix(before, *covariances, 0.7)
    assert torch.equal(one.up_proj.weight, once)
    assert two.up_proj.weight is one.up_proj.weight
    assert one.up_proj.weight.data_ptr() == place
    assert [name for name in step.record.changed_names if name in names] == [names[0]]


def test_stacked_experts_are_refused_by_name_and_the_rest_is_fitted():
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=VOCAB_SIZE, num_local_experts=3, num_experts_per_tok=2, **TINY)
    ).eval()
    factors = fitted(model, None)
    assert all("self_attn" in name for name in factors)
    assert factors.refused
    assert all("experts" in name and "stacked in one parameter" in why for name, why in factors.refused.items())
    expert = next(iter(factors.refused))
    with pytest.raises(InputError, match="experts are stacked"):
        fitted(model, "*experts*")
    with pytest.raises(InputError, match="experts are stacked"):
        _ = factors[expert]
    with pytest.raises(InputError, match=r"experts.*stacked in one parameter"):
        GuardSession(model).apply(edits.KFAC(factors, include="*experts*"))


def test_the_head_of_a_large_vocabulary_is_refused_with_its_size():
    vocabulary = 66_000
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=False, **TINY)).eval()
    for run in (fitted, lambda *given, **_: fit_cost(*given[:2])):
        with pytest.raises(InputError, match=r"lm_head\.weight: a factor of 66000 x 66000 would take 1[67]\.\d G"):
            run(model, "lm_head*", vocabulary)
    assert "lm_head.weight" not in fit_cost(model).matrices
    factors = fitted(model, ["*.mlp.*", "lm_head*"], vocabulary)
    assert "lm_head.weight" not in factors
    assert "66000 x 66000" in factors.refused["lm_head.weight"]
    before = model.lm_head.weight.detach().clone()
    for known in (factors, fitted(model, "*.mlp.*", vocabulary)):
        with pytest.raises(InputError, match=r"lm_head.*66000 x 66000 would take"):
            GuardSession(model).apply(edits.KFAC(known, include="lm_head*"))
    assert torch.equal(model.lm_head.weight, before)
