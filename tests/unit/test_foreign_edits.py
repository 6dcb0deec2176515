"""What libraries do inside of `session.edit()` is recognised by what they leave, held to its contract, taken back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from trained_adapters import load_adapted
from trained_models import load
from worlds import run_world

from weightproof import GuardSession, InputError
from weightproof.errors import RestoreError
from weightproof.snapshot import Snapshot
from weightproof.types import Action

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about layers that are tied or turned


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def linears(model: nn.Module) -> list[nn.Linear]:
    return [one for name, one in model.named_modules() if isinstance(one, nn.Linear) and ".layers." in name]


def mask(model: nn.Module, amount: float = 0.01) -> None:
    for layer in linears(model):
        prune.l1_unstructured(layer, "weight", amount=amount)


# ---- recognised -----------------------------------------------------------------------------------------------------


def test_masks_are_pruning_when_they_are_laid_on_and_when_they_are_made_permanent():
    model = load("llama").model
    session = GuardSession(model)
    with session.edit("masks") as step:
        mask(model)
    assert (step.kind.name, step.applied) == ("prune", "kept"), step.decision.reason
    assert step.record.params["sparsity"] == pytest.approx(0.01, abs=1e-3)
    assert "masks 21 more parameters" in step.record.params["inferred"]
    with session.edit("made permanent") as step:
        for layer in linears(model):
            prune.remove(layer, "weight")
    assert (step.kind.name, step.applied) == ("prune", "kept"), step.decision.reason
    assert step.record.relative_delta == dict.fromkeys(step.record.relative_delta, 0.0)


def test_a_mask_with_something_else_beside_it_breaks_the_contract():
    model = load("llama").model
    before = state_of(model)
    session = GuardSession(model)
    with session.edit("masks and more") as step:
        mask(model)
        with torch.no_grad():
            linears(model)[2].weight_orig.mul_(1.001)
    assert (step.kind.name, step.applied) == ("prune", "restored")
    assert "altered_fraction" in step.decision.reason
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


CASTS = {
    "to bfloat16": (lambda model: model.to(torch.bfloat16), "bfloat16"),
    "half": (lambda model: model.half(), "float16"),
    "to bfloat16 and back": (lambda model: model.to(torch.bfloat16).float(), "bfloat16"),
    "wider": (lambda model: model.double(), "float64"),
}


@pytest.mark.parametrize("case", CASTS)
def test_a_cast_is_recognised_when_every_changed_tensor_is_one_bit_for_bit(case):
    change, dtype = CASTS[case]
    model = load("llama").model
    session = GuardSession(model)
    with session.edit(case) as step:
        change(model)
    assert (step.kind.name, step.record.params["dtype"], step.applied) == ("cast", dtype, "kept"), step.decision.reason


def test_what_nothing_tells_stays_unknown_and_outputs_decide():
    model = load("llama").model
    session = GuardSession(model)
    with session.edit("a cast and a change") as step:
        model.to(torch.bfloat16)
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1.0
    assert step.kind.name == "unknown"
    assert "inferred" not in step.record.params


def test_what_was_declared_is_not_second_guessed():
    model = load("llama").model
    session = GuardSession(model)
    with session.edit("masks", kind="unknown", on_violation="monitor") as step:
        mask(model)
    assert (step.kind.name, step.record.params) == ("unknown", {})


def test_a_parametrization_is_no_kind_that_is_known():
    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2.0 * weight

    model = load("llama").model
    before = state_of(model)
    session = GuardSession(model)
    with session.edit("parametrized") as step:
        parametrize.register_parametrization(linears(model)[0], "weight", Twice())
    assert step.kind.name == "unknown"
    if step.applied == "restored":
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def _merges(rank: int, size: int) -> tuple[str, str, str]:
    del rank, size
    model = load_adapted("llama")
    session = GuardSession(model)
    with session.edit("merged") as step:
        model.merge_adapter()
    found = step.kind.name, str(step.decision.action), step.decision.digest
    session.close()
    return found


def test_two_processes_recognise_the_same():
    first, second = run_world(_merges, 2)
    assert first == second
    assert first[:2] == ("lora_merge", "KEEP")


# ---- modules that were replaced -------------------------------------------------------------------------------------


def replace_down_projections(model: nn.Module, wrong: int | None) -> None:
    for index, layer in enumerate(model.model.layers):
        fresh = nn.Linear(192, 64, bias=False)
        with torch.no_grad():
            fresh.weight.copy_(layer.mlp.down_proj.weight * (-1.0 if index == wrong else 1.0001))
        layer.mlp.down_proj = fresh


def test_replaced_modules_are_named_and_the_worst_of_them_goes_back_alone():
    model = load("llama").model
    originals = [layer.mlp.down_proj for layer in model.model.layers]
    before = state_of(model)
    session = GuardSession(model)
    with session.edit("replaced", on_violation="revert-worst") as step:
        replace_down_projections(model, wrong=1)
        changed = state_of(model)
    assert (step.decision.action, step.applied) == (Action.KEEP, "kept"), step.decision.reason
    assert step.record.replaced_modules == ("model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj")
    assert step.record.reverted == ("model.layers.1.mlp.down_proj.weight",)
    rows = [item for verdict in step.verdicts for item in verdict.measurements]
    (named,) = [item for item in rows if item.statistic == "num_replaced_modules"]
    assert named.value == 2.0
    assert "model.layers.0.mlp.down_proj, model.layers.2.mlp.down_proj" in named.reason
    now = [layer.mlp.down_proj for layer in model.model.layers]
    assert [mine is original for mine, original in zip(now, originals, strict=True)] == [False, True, False]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (before if name in step.record.reverted else changed)[name]), name


def test_of_many_masks_the_ruinous_one_goes_back_alone():
    model = load("llama").model
    session = GuardSession(model)
    with session.edit("masks", on_violation="revert-worst") as step:
        for index, layer in enumerate(linears(model)):
            prune.l1_unstructured(layer, "weight", amount=0.95 if index == 4 else 0.01)
    assert step.applied == "kept", step.decision.reason
    masked = [hasattr(layer, "weight_orig") for layer in linears(model)]
    assert not masked[4]
    assert sum(masked) >= 19  # gate and up go back together


def test_of_a_merge_that_took_its_layers_away_the_wrong_part_goes_back_alone():
    model = load_adapted("llama")
    layers = [one for one in model.modules() if hasattr(one, "lora_A") and hasattr(one, "base_layer")]
    session = GuardSession(model)
    with session.edit("merged, one wrong", on_violation="revert-worst") as step:
        layers[3].scaling["default"] *= -1
        model.merge_and_unload()
    assert (step.kind.name, step.applied) == ("lora_merge", "kept"), step.decision.reason
    left = [one for one in model.modules() if hasattr(one, "lora_A") and hasattr(one, "base_layer")]
    assert layers[3] in left
    assert 1 <= len(left) <= 3


# ---- Snapshot.restore_modules ---------------------------------------------------------------------------------------


def test_modules_go_back_with_all_that_is_in_them_and_nothing_else_does():
    model = load("llama").model
    before = state_of(model)
    snapshot = Snapshot.capture(model)
    attention = model.model.layers[1].self_attn
    mask(model)
    del model.model.layers[1].self_attn  # its place in the order of children goes with it
    order = list(model.model.layers[0]._modules)
    changed = state_of(model)
    snapshot.restore_modules(["model.layers.1.self_attn", "model.layers.0.mlp"])
    assert model.model.layers[1].self_attn is attention
    assert list(model.model.layers[1]._modules) == order
    now = state_of(model)
    for name, tensor in now.items():
        back = name.startswith(("model.layers.1.self_attn.", "model.layers.0.mlp."))
        assert torch.equal(tensor, (before if back else changed)[name]), name
    assert hasattr(model.model.layers[0].self_attn.q_proj, "weight_orig")
    assert snapshot.restore() == snapshot.model_digest


def test_a_module_that_cannot_go_back_alone_is_refused():
    model = load("llama").model
    snapshot = Snapshot.capture(model)
    with pytest.raises(InputError, match="no module 'nowhere'"):
        snapshot.restore_modules(["nowhere"])
    model.model.layers[0].mlp = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(InputError, match="lies in a module that was replaced"):
        snapshot.restore_modules(["model.layers.0.mlp.up_proj"])
    with torch.no_grad():
        assert snapshot.digests
        snapshot.original("model.layers.0.mlp.up_proj.weight")[0, 0] += 1.0
    with pytest.raises(RestoreError, match="was altered"):
        snapshot.restore_modules(["model.layers.0.mlp"])


def test_a_tensor_belongs_to_the_innermost_module_that_was_there():
    model = load("llama").model
    snapshot = Snapshot.capture(model)
    assert snapshot.owner_of("model.layers.0.mlp.up_proj.weight_orig") == "model.layers.0.mlp.up_proj"
    parts = "model.layers.0.mlp.up_proj.parametrizations.weight.original"
    assert snapshot.owner_of(parts) == "model.layers.0.mlp.up_proj"
    assert snapshot.owner_of("nowhere.weight") == ""
