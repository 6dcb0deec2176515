"""Quantizers inside of `session.edit()` without a declared kind, and an adapter merged into a base of four bits."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import trained_models
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from trained_adapters import adapter_folder

from weightproof import GuardSession, kinds
from weightproof.snapshots.tensor_store import tensor_digests
from weightproof.transactions.steps import Step
from weightproof.types import Outcome
from weightproof.weights import iter_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def digests(model: nn.Module) -> dict[str, str]:
    return tensor_digests({named.name: named.tensor.detach() for named in iter_tensors(model)})


def reasons(step: Step) -> str:
    invariants = next(verdict for verdict in step.verdicts if verdict.guard == "invariants")
    return "; ".join(str(item.reason) for item in invariants.measurements if item.outcome is Outcome.FAIL)


def in_four_bits(model: nn.Module) -> Any:
    """The linear maps of the blocks in bitsandbytes' nf4."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and ".layers." in path:
            parent, _, leaf = path.rpartition(".")
            fresh = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
            )
            fresh.weight = bnb.nn.Params4bit(module.weight.data.clone(), requires_grad=False, quant_type="nf4")
            setattr(model.get_submodule(parent), leaf, fresh.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def test_int8_by_torchao_is_recognised_and_held_to_its_grid():
    model = trained_models.load("llama").model
    before = digests(model)
    session = GuardSession(model)
    with session.edit("scaled, then int8") as step:
        with torch.no_grad():
            model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(50.0)
        quantize_(model, Int8WeightOnlyConfig())
    assert (step.kind.name, step.applied) == ("quantize", "restored")
    assert "the contract of 'quantize' is broken" in reasons(step)
    assert digests(model) == before
    with session.edit("int8") as step:
        quantize_(model, Int8WeightOnlyConfig())
    assert (step.kind.name, step.applied) == ("quantize", "kept"), step.decision.reason
    assert step.record.params["inferred"] == "torchao stores 22 matrices"
    statistics = {one.statistic for one in step.record.contract}
    assert {"error_over_half_step", "levels_per_group"} <= statistics


def test_of_matrices_that_a_quantizer_packed_the_ruined_one_goes_back_alone():
    model = trained_models.load("llama").model
    ruined = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    before = ruined.detach().clone()
    session = GuardSession(model)
    with session.edit("int8, one scaled", on_violation="revert-worst") as step:
        with torch.no_grad():
            ruined.mul_(-9.0)
        quantize_(model, Int8WeightOnlyConfig())
    assert step.applied == "kept", step.decision.reason
    assert {name.partition(".weight")[0] for name in step.record.reverted} == {"model.layers.1.mlp.down_proj"}
    now = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    assert now is ruined
    assert torch.equal(now, before)
    assert type(model.get_parameter("model.layers.0.mlp.down_proj.weight")) is not nn.Parameter


def test_four_bits_by_bitsandbytes_are_recognised_and_the_modules_that_it_put_in_are_named():
    model = trained_models.load("llama").model
    session = GuardSession(model)
    with session.edit("nf4", on_violation="monitor") as step:
        in_four_bits(model)
    assert step.kind.name == "quantize"
    assert len(step.record.replaced_modules) == 21
    assert step.record.params["inferred"] == "bitsandbytes-4bit stores 21 matrices"
    assert {one.statistic for one in step.record.contract} == {"relative_error"}


def test_an_adapter_merged_into_a_base_of_four_bits_is_named_and_taken_back():
    base = in_four_bits(trained_models.load("llama").model)
    model = peft.PeftModel.from_pretrained(base, str(adapter_folder("llama"))).eval()
    session = GuardSession(model)
    before = digests(model)  # after the first forward pass, in which bitsandbytes repacks its codes
    with session.edit("merged, undeclared") as step:
        model.merge_adapter()
    assert (step.kind.name, step.applied) == ("lora_merge", "restored")
    assert "the base is stored in 4 bits" in reasons(step)
    assert digests(model) == before
    with session.edit("merged", kind=kinds.LoraMerge(adapter_folder("llama"))) as step:
        model.merge_adapter()
    assert step.applied == "restored"
    assert "the base is stored in 4 bits" in reasons(step)
    assert digests(model) == before
