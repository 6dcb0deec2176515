"""Merging adapters: against PEFT's own merge in float32, and once rounded where PEFT rounds twice."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import trained_models
from edit_cases import Session
from peft import LoraConfig, get_peft_model
from torch import nn

from weightproof.collective import Processes
from weightproof.edits import Edit, LoraMerge
from weightproof.errors import InputError
from weightproof.judgement.plans import prepared, rewrite, selected
from weightproof.lora.adapters import Adapter, AdapterDelta, read_adapter, record_base
from weightproof.session import GuardSession
from weightproof.types import Outcome
from weightproof.weights import iter_tensors

TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "llama": ["q_proj", "v_proj", "down_proj"]}
HEAD = {"gpt2": "ln_f", "llama": "lm_head"}

VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "lora bias": {"lora_bias": True},
    "saved module": {"modules_to_save": True},
    "embeddings": {"embeddings": True},
    "ranks": {"rank_pattern": {".*0.*": 3}, "alpha_pattern": {".*1.*": 20}},
}
NOT_THERE = {("llama", "biases"): "no biases", ("llama", "lora bias"): "no biases"}
PAIRS = [(name, variant) for name in TARGETS for variant in VARIANTS if (name, variant) not in NOT_THERE]


def adapted(name, variant, dtype=torch.float32, *, autocast=True):
    """(base model, the same with an adapter whose every part was moved as training moves it)."""
    options = dict(VARIANTS[variant])
    targets = list(TARGETS[name])
    if options.pop("embeddings", False):
        targets.append("wte" if name == "gpt2" else "embed_tokens")
    if options.pop("modules_to_save", False):
        options["modules_to_save"] = [HEAD[name]]
    base = trained_models.untrained(name).to(dtype)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, fan_in_fan_out=name == "gpt2", **options)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(2)
        model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=autocast)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.add_(noise.to(parameter.dtype))
    return base, model.eval()


def saved(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def merged_by_peft(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {named.name: named.tensor.detach() for named in iter_tensors(model.merge_and_unload())}


def apply(edit, model):
    edit = prepared(edit, Session(model))
    chosen = selected(model, edit)
    rewrite(Processes.alone(), edit.name, chosen, edit.plan)
    return {matrix.tensor_name for matrix in chosen}


@pytest.mark.parametrize("source", ["folder", "live"])
@pytest.mark.parametrize(("name", "variant"), PAIRS)
def test_equals_pefts_merge_to_float32_rounding(name, variant, source, tmp_path):
    if (variant, source) == ("biases", "live"):
        pytest.skip("biases that were trained in place belong to the live model, not to its adapter")
    base, model = adapted(name, variant)
    edit = LoraMerge(saved(model, tmp_path) if source == "folder" else model)
    before = {named.name: named.tensor.detach().clone() for named in iter_tensors(base)}
    touched = apply(edit, base)
    wanted = merged_by_peft(model)
    for named in iter_tensors(base):
        ours, theirs = named.tensor.detach(), wanted[named.name]
        scale = float(theirs.abs().max())
        rounding = 1e-6 if variant == "dora" else 1.2e-7  # lengths of rows, and a ratio, are rounded beside the sum
        assert torch.allclose(ours, theirs, rtol=0, atol=rounding * scale), named.name
        assert torch.equal(ours, before[named.name]) or named.name in touched
    assert any(not torch.equal(named.tensor, before[named.name]) for named in iter_tensors(base))


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_half_precision_is_rounded_once(name, variant, tmp_path):
    base, model = adapted(name, variant, torch.bfloat16, autocast=False)
    adapter = read_adapter(saved(model, tmp_path))
    exact = {
        matrix.name: matrix.load().double() + _exact_delta(adapter.deltas[matrix.name], matrix.load())
        for matrix in selected(base, LoraMerge(adapter))
        if matrix.name in adapter.deltas
    }
    theirs = merged_by_peft(model)
    apply(LoraMerge(adapter), base)
    ours_off = theirs_off = 0.0
    for matrix in selected(base, LoraMerge(adapter)):
        wanted = exact[matrix.name]
        ours_off += float((matrix.load() != wanted.to(torch.bfloat16)).double().sum())
        merged = matrix.select(theirs[matrix.tensor_name])
        theirs_off += float((merged != wanted.to(torch.bfloat16)).double().sum())
    total = sum(values.numel() for values in exact.values())
    assert ours_off <= 1e-3 * total
    assert theirs_off > 10 * max(ours_off, 1.0)


def _exact_delta(delta, weight):
    update = delta.scaling * delta.b.double() @ delta.a.double()
    if delta.magnitude is None:
        return update
    merged = weight.double() + update
    return delta.magnitude.double()[:, None] * merged / merged.norm(dim=1, keepdim=True) - weight.double()


def test_float64_weights_are_merged_in_float64():
    weight = torch.randn(6, 5, dtype=torch.float64)
    model = nn.ModuleDict({"mlp": nn.Linear(5, 6, bias=False, dtype=torch.float64)})
    with torch.no_grad():
        model["mlp"].weight.copy_(weight)
    delta = AdapterDelta("mlp.weight", torch.randn(2, 5), torch.randn(6, 2), 0.7)
    apply(LoraMerge(Adapter({"mlp.weight": delta})), model)
    wanted = weight + 0.7 * delta.b.double() @ delta.a.double()
    assert torch.allclose(model["mlp"].weight, wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("name", "variant"), [("gpt2", "lora bias"), ("llama", "dora"), ("llama", "saved module")])
def test_a_guarded_merge_keeps_its_contract(name, variant, tmp_path):
    base, model = adapted(name, variant)
    session = GuardSession(base)
    step = session.apply(LoraMerge(saved(model, tmp_path)), on_violation="monitor")
    session.close()
    verdict = next(one for one in step.verdicts if one.guard == "invariants")
    assert verdict.outcome is Outcome.PASS, verdict.reason
    merges = [one for one in verdict.measurements if one.statistic == "contract_merge_error"]
    assert {one.target for one in merges} >= set(read_adapter(tmp_path).deltas)
    assert step.record.kind == "lora_merge"
    assert isinstance(step.edit.adapter, Adapter)


def test_patterns_leave_parts_of_the_adapter_out(tmp_path):
    base, model = adapted("llama", "lora")
    touched = apply(LoraMerge(saved(model, tmp_path), include=("*q_proj*",), exclude=("*.0.*",)), base)
    assert touched == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (1, 2)}


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused(tmp_path):
    base, model = adapted("llama", "lora")
    folder = saved(model, tmp_path)
    record_base(folder, base)
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    with pytest.raises(InputError, match=r"trained on another base.*digest"):
        prepared(LoraMerge(folder), Session(base))
    assert prepared(LoraMerge(folder, same_base=False), Session(base)) is not None
    with pytest.raises(InputError, match="does not fit this model"):
        prepared(LoraMerge(folder), Session(trained_models.untrained("gpt2")))


def test_a_model_that_applies_the_adapter_already_is_refused():
    _, model = adapted("llama", "lora")
    with pytest.raises(InputError, match="live LoRA layers, which would be applied on top"):
        prepared(LoraMerge(model), Session(model))


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        LoraMerge(tmp_path)


def test_it_is_an_edit(tmp_path):
    _, model = adapted("llama", "lora")
    edit = LoraMerge(saved(model, tmp_path))
    assert isinstance(edit, Edit)
    assert edit.name == "lora-merge"
    assert json.loads(json.dumps(edit.params()))["digest"] == edit.content.digest
    with pytest.raises(InputError, match="chooses no weight matrix"):
        selected(trained_models.untrained("llama"), LoraMerge(tmp_path, include=("*q_proj*", "*k_proj*")))
