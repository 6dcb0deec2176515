"""Hessian-aware rounding: against a literal optimal brain surgeon, against RTN on trained models, and its contract."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import trained_models
from edit_cases import CASES, Session, case, matrices, matrix_of, oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded_models import ToyModel
from torch import nn

from weightproof.collective import Processes
from weightproof.divergence import capture_outputs, measure_divergence
from weightproof.edits import GPTQ, RTN, Edit
from weightproof.edits.gptq import Compensated, compensated, grid_of, row_errors
from weightproof.edits.hessians import input_hessians
from weightproof.errors import InputError
from weightproof.forward.calibration import calibration_windows
from weightproof.forward.windows import Windows
from weightproof.judgement.plans import prepared, rewrite, selected
from weightproof.kinds import Quantize

slow = oracle("edits")
NAME = "layers.0.mlp.up_proj.weight"


def inputs(width, count=200, seed=3):
    """Correlated inputs (count, width): a few directions carry most of the energy."""
    rng = np.random.default_rng(seed)
    mixing = np.linalg.qr(rng.standard_normal((width, width)))[0] * np.exp(-np.arange(width) / 8)
    return torch.from_numpy(rng.standard_normal((count, width)) @ mixing.T)


def moments(x):
    return 2 * x.T @ x / len(x)


def knowing(edit, hessian, name=NAME):
    return edit.knowing(hessians={name: hessian})


GRIDS = [("channel", None), ("tensor", None), ("group", 8)]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("granularity", "size"), GRIDS)
def test_equals_a_literal_brain_surgeon(granularity, size, symmetric, act_order):
    weight, hessian = case("random", torch.float64)[:6], moments(inputs(40))
    grid = grid_of(weight, Quantize(3, granularity, size), symmetric=symmetric)

    def nearest(row, column, value):
        one = grid._replace(delta=grid.delta[row, column], zero=grid.zero[row, column])
        return float(one.nearest(torch.tensor(value, dtype=torch.float64)))

    order = np.argsort(-np.diag(hessian.numpy()), kind="stable") if act_order else np.arange(40)
    wanted = slow.compensated(weight.numpy(), hessian.numpy(), nearest, 0.01, list(order))
    found = compensated(weight, hessian, grid, 0.01, act_order=act_order)
    assert np.abs(found.numpy() - wanted).max() <= 1e-9 * np.abs(wanted).max()


def test_blocks_of_columns_do_not_change_the_result(monkeypatch):
    weight, hessian = case("random", torch.float64), moments(inputs(40))
    grid = grid_of(weight, Quantize(4), symmetric=True)
    whole = compensated(weight, hessian, grid, 0.01, act_order=False)
    monkeypatch.setattr("weightproof.edits.gptq._BLOCK", 7)
    assert torch.allclose(whole, compensated(weight, hessian, grid, 0.01, act_order=False), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("one column", "one entry")])
def test_no_row_is_worse_than_rtn_and_the_contract_holds(name, bits):
    weight = case(name)
    hessian = moments(inputs(weight.shape[1])).float()
    edit = knowing(GPTQ(bits), hessian)
    planned = edit.plan(matrix_of(weight))
    nearest = grid_of(weight.double(), Quantize(bits), symmetric=True).nearest(weight.double()).float()
    ours, theirs = (row_errors(weight.double(), one, hessian.double()) for one in (planned, nearest))
    assert bool((ours <= theirs).all())
    readings = edit.kind.measure(NAME, weight, planned)
    assert [one.statistic for one in readings if one.rigorous] == [
        "levels_per_group", "off_grid_fraction", "output_error_over_rtn",
    ]  # fmt: skip
    assert all(one.value <= one.limit for one in readings if one.rigorous), readings


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["random", "positive", "heavy tails"])
def test_the_contract_holds_in_every_dtype(name, dtype, symmetric):
    weight = case(name, dtype)
    for bits in (3, 8):
        edit = knowing(GPTQ(bits, symmetric=symmetric), moments(inputs(40)).float())
        planned = edit.plan(matrix_of(weight))
        assert planned.dtype == dtype
        readings = edit.kind.measure(NAME, weight, planned)
        assert all(one.value <= one.limit for one in readings if one.rigorous), readings


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 30), st.integers(2, 8), st.booleans(), st.booleans())
def test_the_contract_holds_for_any_shape_and_few_inputs(rows, cols, count, bits, symmetric, act_order):
    generator = torch.Generator().manual_seed(rows * 1000 + cols * 10 + bits)
    weight, x = torch.randn(rows, cols, generator=generator), torch.randn(count, cols, generator=generator).double()
    x[:, 0] = 0  # an input that never fires
    edit = knowing(GPTQ(bits, symmetric=symmetric, act_order=act_order), moments(x))
    readings = edit.kind.measure(NAME, weight, edit.plan(matrix_of(weight)))
    assert all(one.value <= one.limit for one in readings if one.rigorous), readings


DAMAGE = {
    "scaled": lambda planned: 50 * planned,
    "sign of a row": lambda planned: torch.cat([-planned[:1], planned[1:]]),
    "rows shuffled": lambda planned: planned.flip(0),
    "columns shuffled": lambda planned: planned.flip(1),
    "zero": torch.zeros_like,
    "some off their grid": lambda planned: planned + torch.eye(*planned.shape) * 1.3e-3,
    "NaN": lambda planned: planned * float("nan"),
}


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("name", DAMAGE)
def test_the_contract_catches_damage(name, bits):
    weight = case("random")
    edit = knowing(GPTQ(bits), moments(inputs(40)))
    readings = edit.kind.measure(NAME, weight, DAMAGE[name](edit.plan(matrix_of(weight))))
    assert any(one.value > one.limit for one in readings if one.rigorous), readings


# ---- what the layers are fed ----------------------------------------------------------------------------------------


class Fed(nn.Module):
    """Two linear maps, one of them turned, behind an embedding."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6)
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(8, 6), "down_proj": nn.Linear(8, 6)})
        self.unused_proj = nn.Linear(6, 6)

    def forward(self, ids, attention_mask=None):
        del attention_mask
        return self.mlp["down_proj"](torch.relu(self.mlp["c_fc"](self.embed(ids))))


def windows_of(*batches):
    return Windows("calibration", tuple(batches), "0" * 64, 1)


def test_second_moments_are_those_of_the_inputs_without_padding():
    model = Fed()
    ids = torch.randint(0, 9, (3, 5))
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, 3:] = 0
    chosen = [matrices(model)[f"mlp.{name}.weight"] for name in ("c_fc", "down_proj")]
    windows = (windows_of({"ids": ids[:1]}, {"ids": ids, "attention_mask": mask}),)
    found = input_hessians(model, chosen, windows, Processes.alone())
    rows = torch.cat([model.embed(ids[:1]).reshape(-1, 6), model.embed(ids)[mask.bool()]]).detach().double()
    assert torch.allclose(found["mlp.c_fc.weight"].double(), 2 * rows.T @ rows / len(rows), rtol=1e-5)
    hidden = torch.relu(model.mlp["c_fc"](rows.float())).detach().double()
    assert torch.allclose(
        found["mlp.down_proj.weight"].double(), 2 * hidden.T @ hidden / len(rows), rtol=1e-5, atol=1e-6
    )
    assert not model._forward_pre_hooks
    assert not model.mlp["c_fc"]._forward_pre_hooks


def test_what_cannot_be_seen_is_refused_by_name():
    model = Fed()
    windows = windows_of({"ids": torch.zeros(1, 3, dtype=torch.long)})
    with pytest.raises(InputError, match=r"no calibration window reaches unused_proj\.weight"):
        prepared(GPTQ(4, include=("unused_proj.weight",)), Session(model, (windows,)))
    stacked = ToyModel()
    with pytest.raises(InputError, match=r"experts\.up_proj\[0\].*exclude=\('expert',\)"):
        prepared(GPTQ(4), Session(stacked, (windows_of({"ids": torch.zeros(1, 3, dtype=torch.long)}),)))
    with pytest.raises(InputError, match="needs windows"):
        prepared(GPTQ(4), Session(model))
    with pytest.raises(InputError, match="has not seen the inputs"):
        GPTQ(4).plan(matrix_of(case("random")))
    with torch.no_grad():
        model.embed.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"inputs of mlp\.c_fc\.weight are not finite"):
        prepared(GPTQ(4, exclude=("unused*",)), Session(model, (windows,)))


def test_a_matrix_that_is_not_finite_is_named():
    weight = case("random")
    weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=rf"{NAME} holds NaN or inf"):
        knowing(GPTQ(4), moments(inputs(40))).plan(matrix_of(weight))


def test_without_the_second_moments_the_contract_is_not_measured():
    weight = case("random")
    (last,) = [one for one in Compensated(4).measure(NAME, weight, weight) if one.statistic.startswith("output")]
    assert last.value is None
    assert "not at hand" in last.reason


BAD = [
    ({"bits": 0}, "bits must be a whole number from 2 to 8"),
    ({"bits": 4, "damping": 0.0}, "damping must be a share"),
    ({"bits": 4, "damping": 2}, "damping must be a share"),
    ({"bits": 4, "granularity": "group"}, "group_size"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_parameters_are_refused_in_words(arguments, words):
    with pytest.raises(InputError, match=words):
        GPTQ(**arguments)


def test_it_is_an_edit():
    assert isinstance(GPTQ(4), Edit)
    assert GPTQ(3, "group", 16, symmetric=False).name == "gptq-int3-group16-asym"
    assert GPTQ(4).kind.params()["method"] == "gptq"
    assert GPTQ(4, damping=0.1).params()["damping"] == 0.1


# ---- on trained models ----------------------------------------------------------------------------------------------


def layer_error(name, model, batch):
    """Squared error of each linear map's outputs against the unedited model's, summed, when fed what that is fed."""
    total = 0.0
    handles, fed = [], {}
    base = trained(name)
    for path, module in base.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            handles.append(module.register_forward_hook(lambda _, x, y, path=path: fed.__setitem__(path, (x[0], y))))
    with torch.no_grad():
        base(**batch)
        for path, (x, y) in fed.items():
            total += float((model.get_submodule(path)(x) - y).square().sum() / y.square().sum())
    for handle in handles:
        handle.remove()
    return total


_TRAINED = {}


def trained(name):
    if name not in _TRAINED:
        _TRAINED[name] = trained_models.load(name).model
    return _TRAINED[name]


def edited(name, edit, session):
    model = copy.deepcopy(trained(name))
    edit = prepared(edit, session)
    rewrite(Processes.alone(), edit.name, selected(model, edit), edit.plan)
    return model


@pytest.mark.parametrize("grid", [(4,), (3,), (3, "group", 16)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_outputs_of_a_trained_model_stay_nearer_than_with_rtn(name, grid):
    base = trained(name)
    data = trained_models.make_windows(trained_models.RECIPES[name], 2, seed=50_000)
    session = Session(base, (calibration_windows(data, base, count=64),))
    heldout = trained_models.make_windows(trained_models.RECIPES[name], 1, seed=20_000)[0]
    batch = {"input_ids": heldout["input_ids"]}
    judged = calibration_windows([heldout], base, count=32)
    cache = capture_outputs(base, (judged,), processes=Processes.alone())
    errors, kls = [], []
    for edit in (RTN(*grid), GPTQ(*grid)):
        model = edited(name, edit, session)
        errors.append(layer_error(name, model, batch))
        kls.append(measure_divergence(model, cache, processes=Processes.alone()).divergence[0].kl)
    assert errors[1] < 0.75 * errors[0], errors
    assert kls[1] < 0.75 * kls[0], kls
