"""Adding and taking away what fine-tuning changed: against float64, from folders and from deltas."""

from __future__ import annotations

import json

import pytest
import torch
import trained_models
from edit_cases import Session, case, matrices, matrix_of, small_mlp
from torch import nn
from transformers.pytorch_utils import Conv1D

from weightproof.collective import Processes
from weightproof.edits import Edit, TaskArithmetic
from weightproof.errors import InputError
from weightproof.judgement.plans import prepared, rewrite, selected, vectors

NAME = "layers.0.mlp.up_proj.weight"


def apply(edit, model):
    edit = prepared(edit, Session(model))
    rewrite(Processes.alone(), edit.name, selected(model, edit), edit.plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_deltas_are_added_in_high_precision_and_rounded_once(dtype):
    weight, first, second = case("random", dtype), case("heavy tails", dtype) / 7, case("spiked", dtype) / 3
    edit = TaskArithmetic([{NAME: first}, {NAME: second}], weight=[0.3, -0.7])
    planned = edit.plan(matrix_of(weight))
    exact = weight.double() + 0.3 * first.double() - 0.7 * second.double()
    assert planned.dtype == dtype
    facts = torch.finfo(dtype)
    smallest = facts.smallest_normal * facts.eps / 2 + 1e-8
    assert bool(((planned.double() - exact).abs() <= (facts.eps / 2 + 2e-7) * exact.abs() + smallest).all())
    if dtype in (torch.bfloat16, torch.float16):  # as near as the dtype allows, up to float32 ties
        assert float((planned != exact.to(dtype)).double().mean()) < 0.01


def test_one_delta_changes_what_it_names_and_nothing_else():
    model = small_mlp()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    delta = {"mlp.0.weight": torch.ones(16, 12), "mlp.0.bias": torch.arange(16.0)}
    apply(TaskArithmetic(delta, weight=2.0), model)
    for name, parameter in model.named_parameters():
        wanted = before[name] + 2 * delta[name] if name in delta else before[name]
        assert torch.equal(parameter, wanted), name


def literal_ties(weight, deltas, density, factor):
    """TIES, element by element, in float64."""
    trimmed = []
    for delta in deltas:
        flat = [float(value) for value in delta.double().flatten()]
        keep = max(1, int(density * len(flat) + 0.5))
        ranked = sorted(range(len(flat)), key=lambda i: (abs(flat[i]), i))[len(flat) - keep :]
        trimmed.append([flat[i] if i in set(ranked) else 0.0 for i in range(len(flat))])
    merged = []
    for values in zip(*trimmed, strict=True):
        sign = sum(values)
        agreeing = [value for value in values if value * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return weight.double() + factor * torch.tensor(merged, dtype=torch.float64).view(weight.shape)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    "names", [("random", "spiked", "heavy tails"), ("ties", "ties"), ("random",), ("zero", "ties")]
)
def test_ties_equals_its_definition(names, density):
    weight = case("low rank")
    deltas = [case(name).roll(place, dims=1) * (-1) ** place for place, name in enumerate(names)]
    edit = TaskArithmetic([{NAME: delta} for delta in deltas], weight=0.4, density=density)
    wanted = literal_ties(weight, deltas, density, 0.4)
    assert torch.allclose(
        edit.plan(matrix_of(weight)).double(), wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max())
    )
    assert edit.name == "ties-0.4"


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folders(request, tmp_path_factory):
    """(architecture, base folder, two folders that were trained on from it a little)."""
    home = tmp_path_factory.mktemp(request.param)
    base = trained_models.untrained(request.param)
    base.save_pretrained(home / "base")
    for seed in (1, 2):
        model = trained_models.untrained(request.param)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(home / f"task{seed}")
    return request.param, home / "base", [home / "task1", home / "task2"]


def test_a_folder_at_weight_one_gives_its_model(folders):
    name, _, tasks = folders
    model = trained_models.untrained(name)
    apply(TaskArithmetic(tasks[0]), model)
    wanted = trained_models.MODEL_CLASSES[name].from_pretrained(tasks[0])
    for (key, ours), theirs in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=2e-7 * float(theirs.detach().abs().max())), key


def test_two_folders_over_a_base_are_the_float64_sum(folders):
    name, base, tasks = folders
    model = trained_models.untrained(name, seed=5)
    read = trained_models.MODEL_CLASSES[name].from_pretrained
    start = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    apply(TaskArithmetic(tasks, weight=(0.5, -0.25), base=base), model)
    origin, first, second = (dict(read(folder).named_parameters()) for folder in (base, *tasks))
    for key, ours in model.named_parameters():
        exact = start[key].double() + sum(
            weight * (task[key].double() - origin[key].double()) for weight, task in ((0.5, first), (-0.25, second))
        )
        assert torch.allclose(ours.double(), exact, rtol=0, atol=2e-7), key


def test_patterns_leave_tensors_as_they_are(folders):
    name, _, tasks = folders
    model = trained_models.untrained(name)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    apply(TaskArithmetic(tasks[0], include=("ffn", "vector"), exclude=("*norm*", "*ln_*")), model)
    changed = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert changed
    assert all("mlp" in key or key.endswith("bias") for key in changed)
    assert not any("norm" in key or "ln_" in key for key in changed)


def test_a_folder_of_another_model_is_refused_by_name(folders):
    name, _, tasks = folders
    other = "llama" if name == "gpt2" else "gpt2"
    model = trained_models.untrained(other)
    with pytest.raises(InputError, match=r"task1 holds no .*which the model has"):
        apply(TaskArithmetic(tasks[0]), model)
    if name == "llama":
        return
    with torch.no_grad():
        model = trained_models.untrained("gpt2")
        model.transformer.h[0].mlp.c_fc = Conv1D(300, 64)
    with pytest.raises(InputError, match=r"c_fc\.weight as \[256, 64\] \(d_out, d_in\), the model as \[300, 64\]"):
        apply(TaskArithmetic(tasks[0]), model)


def test_scalars_and_vectors_are_columns_on_live_storage():
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.0))
    model.gain = nn.Parameter(torch.arange(3.0))
    found = {matrix.name: matrix for matrix in vectors(model)}
    assert found["scale"].load().shape == (1, 1)
    assert found["gain"].load().shape == (3, 1)
    assert found["gain"].load().data_ptr() == model.gain.data_ptr()
    assert not [matrix for matrix in vectors(small_mlp()) if matrix.name.endswith("weight")]


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD = [
    ({"tasks": []}, "tasks is empty"),
    ({"tasks": {}}, "empty, or not of tensors"),
    ({"tasks": {NAME: torch.ones(2, 3, dtype=torch.int64)}}, "not of tensors"),
    ({"tasks": 3.5}, "is not iterable|a task is a model folder"),
    ({"tasks": {NAME: torch.ones(2, 3)}, "weight": [1, 2]}, "one for each of the 1 tasks"),
    ({"tasks": {NAME: torch.ones(2, 3)}, "weight": float("nan")}, "finite number"),
    ({"tasks": "no/such/folder"}, "no/such/folder"),
    ({"tasks": {NAME: torch.ones(2, 3)}, "density": 1.5}, "density must be a share"),
    ({"tasks": [{NAME: torch.ones(2, 3)}] * 2, "density": 0.5, "weight": [1, 2]}, "one weight for all"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_parameters_are_refused_in_words(arguments, words):
    with pytest.raises(InputError, match=words):
        TaskArithmetic(**arguments)


def test_deltas_of_unknown_names_and_other_shapes_are_refused():
    model = small_mlp()
    with pytest.raises(InputError, match=r"a delta for mlp\.7\.weight, which this model does not have"):
        apply(TaskArithmetic({"mlp.7.weight": torch.ones(2, 3)}), model)
    with pytest.raises(InputError, match=r"delta of mlp\.0\.weight is \[12, 16\], the tensor \[16, 12\]"):
        apply(TaskArithmetic({"mlp.0.weight": torch.ones(12, 16)}), model)


def test_it_is_an_edit():
    edit = TaskArithmetic({NAME: torch.ones(24, 40)}, weight=-0.5)
    assert isinstance(edit, Edit)
    assert edit.name == "task-arithmetic--0.5"
    assert edit.kind.name == "unknown"
    assert len(json.loads(json.dumps(edit.params()))["tasks"][0][NAME]) == 64
    assert not edit.selects(matrices(small_mlp())["mlp.0.weight"])
