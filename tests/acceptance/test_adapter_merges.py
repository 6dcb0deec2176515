"""Adapters that PEFT trained, merged rightly and wrongly: the right merge is kept, each wrong one is called by name.

Nothing here is told by data: the sessions have none, and the contract is one of weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from trained_adapters import adapter_folder, load_adapted, mean_loss
from trained_models import load

from weightproof import GuardSession, edits, kinds
from weightproof.certifying.comparison import compare_folders
from weightproof.contracts.words import kind_from_words
from weightproof.judgement.judging import judge_all
from weightproof.lora.adapters import read_adapter
from weightproof.policy import load_policy
from weightproof.snapshot import write_matrix
from weightproof.snapshots.tensor_store import model_digest, tensor_digest
from weightproof.transactions.steps import Step
from weightproof.types import Outcome
from weightproof.verification.readings import compare_records
from weightproof.verification.result import Findings
from weightproof.verify import Demands, Status, verify
from weightproof.weights import iter_weight_matrices

NAMES = ("llama", "gpt2")


def weights_digest(model: nn.Module) -> str:
    return model_digest({name: tensor_digest(tensor) for name, tensor in model.state_dict().items()})


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]


def with_scaling(factor: float) -> Callable[[Any], None]:
    def merge(model: Any) -> None:
        for layer in lora_layers(model):
            layer.scaling["default"] *= factor
        model.merge_adapter()

    return merge


def twice(model: Any) -> None:
    model.merge_adapter()
    for layer in lora_layers(model):
        layer.merged_adapters.clear()  # what a script forgets that loads merged weights and merges again
    model.merge_adapter()


def all_but_one(model: Any) -> None:
    for layer in lora_layers(model)[1:]:
        layer.merge()


def onto_four_bits(model: Any) -> None:
    """Merge as into a 4-bit base: the sum is rounded to the base's levels again."""
    model.merge_adapter()
    four = edits.RTN(4, granularity="group", group_size=64)
    for matrix in list(iter_weight_matrices(model)):
        planned = four.plan(matrix, None) if four.selects(matrix) else None
        if planned is not None and ".lora_" not in matrix.name:
            write_matrix(matrix, planned)


def something_else(model: Any) -> None:
    model.merge_adapter()
    with torch.no_grad():
        lora_layers(model)[0].base_layer.weight.mul_(1.5)


WRONG = {
    "twice": (twice, "the delta was merged twice"),
    "wrong sign": (with_scaling(-1.0), "the delta was merged with the wrong sign"),
    "ten times": (with_scaling(10.0), "the delta was merged 10 times over, or with 10 times its scaling"),
    "half": (with_scaling(0.5), "the delta was merged with 0.5 times its scaling"),
    "not at all": (lambda model: None, "the merged model is byte-identical to the base: it was not merged"),
    "one layer left out": (all_but_one, "the delta was not merged: the matrix is byte-identical to the base"),
    "and something else": (something_else, "something else than this adapter's delta changed"),
}


def invariants(step: Step) -> Any:
    return next(verdict for verdict in step.verdicts if verdict.guard == "invariants")


def reasons(step: Step) -> str:
    return "; ".join(str(one.reason) for one in invariants(step).measurements)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_learns_what_its_base_does_not_know(name):
    model = load_adapted(name)
    with model.disable_adapter():
        before = mean_loss(name, model)
    assert mean_loss(name, model) < before - 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_right_merge_is_kept_and_each_wrong_one_is_named(name, dtype):
    model = load_adapted(name, dtype)
    session = GuardSession(model)
    digest = weights_digest(model)
    kind = kinds.LoraMerge(adapter_folder(name))
    for wrong, (merge, words) in WRONG.items():
        with session.edit(wrong, kind=kind) as step:
            merge(model)
        assert step.applied == "restored"
        assert invariants(step).outcome is Outcome.FAIL
        assert words in reasons(step)
        assert weights_digest(model) == digest
    with session.edit("once", kind=kind) as step:
        model.merge_adapter()
    assert (step.applied, invariants(step).outcome) == ("kept", Outcome.PASS), step.decision.reason


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_into_a_base_of_four_bits_is_named(name):
    model = load_adapted(name)
    kind = kinds.LoraMerge(model)
    four = edits.RTN(4, granularity="group", group_size=64)
    for matrix in list(iter_weight_matrices(model)):
        planned = four.plan(matrix, None) if four.selects(matrix) and ".lora_" not in matrix.name else None
        if planned is not None:
            write_matrix(matrix, planned)
    session = GuardSession(model)
    with session.edit("requantised", kind=kinds.LoraMerge(model, same_base=False)) as step:
        onto_four_bits(model)
    assert step.applied == "restored"
    assert "the base is stored in 4 bits" in reasons(step)
    with pytest.raises(Exception, match="another base"), session.edit("unasked", kind=kind):
        pass


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_a_merge_by_peft_is_recognised_and_held_to_its_contract(name, how):
    model = load_adapted(name)
    session = GuardSession(model)
    with session.edit("wrong, undeclared") as step:
        with_scaling(-1.0)(model)
    assert (step.kind.name, step.applied) == ("lora_merge", "restored")
    assert "wrong sign" in step.decision.reason
    with session.edit("right, undeclared") as step:
        getattr(model, how)()
    assert (step.kind.name, step.applied) == ("lora_merge", "kept"), step.decision.reason
    assert "adapters default" in step.record.params["inferred"]
    assert step.record.params["adapter"] == read_adapter(adapter_folder(name)).digest


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_a_merged_adapter_that_is_byte_identical_to_the_base_is_named(how):
    model = load_adapted("llama")
    with torch.no_grad():
        for layer in lora_layers(model):
            layer.lora_B["default"].weight.zero_()  # as before any training
    session = GuardSession(model)
    with session.edit("a no-op") as step:
        getattr(model, how)()
    assert step.applied == "restored"
    assert "byte-identical to the base: every delta of the adapter is zero" in reasons(step)


def test_unmerge_is_recognised_and_held_to_what_it_takes_out():
    model = load_adapted("llama")
    session = GuardSession(model)
    with session.edit("merge"):
        model.merge_adapter()
    with session.edit("unmerge") as step:
        model.unmerge_adapter()
    assert (step.kind.name, step.applied) == ("lora_merge", "kept")
    assert step.record.params["reverse"] is True


@pytest.mark.parametrize("name", NAMES)
def test_unmerge_in_half_precision_loses_bits_and_a_rollback_loses_none(name, capsys):
    model = load_adapted(name, torch.bfloat16)
    before = {n: tensor.clone() for n, tensor in model.state_dict().items() if "base_layer.weight" in n}
    session = GuardSession(model)
    with pytest.raises(RuntimeError, match="changed my mind"), session.edit("merge"):
        model.merge_adapter()
        raise RuntimeError("changed my mind")
    assert all(torch.equal(model.state_dict()[n], tensor) for n, tensor in before.items())
    model.merge_adapter()
    model.unmerge_adapter()
    after = model.state_dict()
    lost = sum(int((after[n] != tensor).sum()) for n, tensor in before.items())
    share = lost / sum(tensor.numel() for tensor in before.values())
    with capsys.disabled():
        print(
            f"\n{name}: unmerge in bfloat16 left {share:.1%} of the adapted weights other than they were; rollback: 0"
        )
    assert share > 0.01


def test_an_adapter_beside_those_in_use_preserves_the_function():
    model = load_adapted("llama")
    session = GuardSession(model)
    with session.edit("a second adapter") as step:
        model.add_weighted_adapter(["default"], [0.5], "second", combination_type="linear")
    assert (step.kind.name, step.applied) == ("preserving", "kept"), step.decision.reason
    assert "second was added" in step.record.params["inferred"]


def test_a_base_model_takes_a_merge_from_a_folder_and_refuses_that_of_another_base():
    base = load("llama").model
    session = GuardSession(base, policy="aggressive")
    folder = adapter_folder("llama")
    adapter = read_adapter(folder)
    with session.edit("by hand", kind=kinds.LoraMerge(folder), on_violation="monitor") as step:
        for matrix in list(iter_weight_matrices(base)):
            if matrix.name in adapter.deltas:
                write_matrix(matrix, matrix.load() + adapter.deltas[matrix.name].dense())
    assert invariants(step).outcome is Outcome.PASS, invariants(step).reason
    with pytest.raises(Exception, match="was trained on another base"):
        kinds.LoraMerge(folder).bound(base)
    with pytest.raises(Exception, match="GPT2LMHeadModel does not have"):
        kinds.LoraMerge(folder).bound(load("gpt2").model)


def test_folders_of_a_base_and_its_merge_are_certified_as_that_merge(tmp_path):
    load("llama").model.save_pretrained(tmp_path / "base")
    load_adapted("llama").merge_and_unload().save_pretrained(tmp_path / "merged")
    wrong = load_adapted("llama")
    with_scaling(2.0)(wrong)
    wrong.unload().save_pretrained(tmp_path / "wrong")
    kind = kind_from_words(f"lora_merge:{adapter_folder('llama')}")
    for subject, outcome in (("merged", Outcome.PASS), ("wrong", Outcome.FAIL), ("base", Outcome.FAIL)):
        compared = compare_folders(tmp_path / "base", tmp_path / subject, load_policy("balanced"), kind=kind)
        verdict = judge_all(load_policy("balanced"), compared.judged)["invariants"]
        assert verdict.outcome is outcome, verdict.reason
    load("gpt2").model.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(Exception, match="an adapter of another model"):
        compare_folders(tmp_path / "gpt2", tmp_path / "gpt2", load_policy("balanced"), kind=kind)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def certified(request, tmp_path_factory):
    """A base, its merge with a trained adapter, the session's certificate in the merged folder."""
    name, root = request.param, tmp_path_factory.mktemp(request.param)
    model = load(name).model
    model.save_pretrained(root / "base")
    session = GuardSession(model, policy="aggressive")
    session.apply(edits.LoraMerge(adapter_folder(name), same_base=False), on_violation="monitor")
    model.save_pretrained(root / "merged")
    session.certificate().save(root / "certificate.json")
    return name, root


def answer(root, *adapters, subject="merged"):
    demands = Demands(unsigned_ok=True, base=root / "base", adapters=adapters)
    return verify(root / "certificate.json", root / subject, 2, demands)


def test_a_merge_is_verified_with_its_adapter_and_undecided_without(certified):
    name, root = certified
    found = answer(root, adapter_folder(name))
    assert found.status is Status.VALID, found.findings
    assert any(one.startswith("digest of the adapter") for one in found.checked)
    found = answer(root)
    assert found.status is Status.UNDECIDED
    assert any("'lora_merge'" in one and "--adapter" in one for one in found.unchecked)


def test_another_adapter_is_a_difference_with_both_digests(certified):
    name, root = certified
    right = read_adapter(adapter_folder(name))
    other = replace(
        right, deltas={key: replace(one, scaling=2 * one.scaling) for key, one in right.deltas.items()}, digest=""
    )
    found = answer(root, other)
    assert found.status is Status.INVALID
    named = [one for one in found.differences if one.where.startswith("adapter ")]
    assert [(one.what, one.expected, one.found) for one in named] == [("digest", right.digest, other.digest)]


def test_a_merge_that_is_not_the_stated_one_is_a_difference(certified):
    name, root = certified
    kind = kinds.LoraMerge(adapter_folder(name))
    policy = load_policy("balanced")
    shutil.copytree(root / "base", root / "unmerged", dirs_exist_ok=True)
    right, none = (compare_folders(root / "base", root / one, policy, kind=kind) for one in ("merged", "unmerged"))
    findings = Findings()
    compare_records("the change", right.after.edit, right.after.edit, findings)
    assert not findings.differences
    lie = replace(none.after.edit, contract=right.after.edit.contract)
    compare_records("the change", lie, none.after.edit, findings)
    assert {one.what for one in findings.differences} >= {"merge_error"}


def test_an_adapter_for_a_certificate_without_a_merge_is_a_difference(tmp_path):
    model = load("llama").model
    session = GuardSession(model)
    session.apply(edits.RTN(8))
    model.save_pretrained(tmp_path / "merged")
    session.certificate().save(tmp_path / "certificate.json")
    found = verify(
        tmp_path / "certificate.json",
        tmp_path / "merged",
        1,
        Demands(unsigned_ok=True, adapters=[adapter_folder("llama")]),
    )
    assert found.status is Status.INVALID
    assert "names an adapter" in str(found.differences[0])
