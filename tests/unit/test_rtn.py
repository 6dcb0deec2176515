"""Round-to-nearest edits against a slow float64 oracle, and which matrices they choose."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from weightproof.edits import RTN, Edit
from weightproof.errors import InputError
from weightproof.kinds import Quantize
from weightproof.types import WeightMatrix

_SPEC = importlib.util.spec_from_file_location("oracle_rtn", Path(__file__).parents[1] / "oracles" / "rtn.py")
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)

GRIDS = [("channel", None), ("tensor", None), ("group", 8), ("group", 7)]


def matrix_of(weight, name="layers.0.mlp.up_proj.weight", family="ffn", refusal=None):
    rows, cols = weight.shape
    return WeightMatrix(name, family, rows, cols, weight.dtype, (), name, lambda: weight, refusal=refusal)


def gaussian(rows=12, cols=20, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("granularity", "size"), GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equals_the_float64_oracle_up_to_storage_rounding_and_ties(bits, granularity, size, dtype):
    weight = gaussian(seed=bits).to(dtype)
    weight[3] = 0
    planned = RTN(bits, granularity, size).plan(matrix_of(weight))
    assert planned.dtype == dtype
    assert planned.shape == weight.shape
    wanted, steps = oracle.round_to_nearest(weight.double().numpy(), bits, granularity, size)
    difference = np.abs(planned.double().numpy() - wanted)
    rounding = (torch.finfo(dtype).eps / 2 + 1e-6) * np.abs(wanted) + 1e-7
    # An element whose quotient lies within float32 rounding of a tie may go to either level.
    quotient = np.abs(weight.double().numpy()) / np.where(steps == 0, 1, steps)
    tie = np.abs(quotient - np.floor(quotient) - 0.5) < 1e-4
    assert (difference[~tie] <= rounding[~tie]).all()
    assert (difference <= steps * (1 + 1e-5) + rounding).all()
    assert not planned[3].any()


def test_chunks_of_rows_do_not_change_the_result(monkeypatch):
    weight = gaussian(33, 18)
    whole = RTN(4, "group", 5).plan(matrix_of(weight))
    monkeypatch.setattr("weightproof.edits.rtn._CHUNK_ELEMENTS", 40)
    assert torch.equal(whole, RTN(4, "group", 5).plan(matrix_of(weight)))
    assert torch.equal(RTN(3, "tensor").plan(matrix_of(weight)), RTN(3, "tensor").plan(matrix_of(weight)))


def test_a_plan_reads_and_never_writes():
    weight = gaussian()
    kept = weight.clone()
    planned = RTN(2).plan(matrix_of(weight))
    assert torch.equal(weight, kept)
    assert planned.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_hidden(broken):
    weight = gaussian()
    weight[2, 3] = broken
    planned = RTN(8).plan(matrix_of(weight))
    assert not torch.isfinite(planned[2]).all()
    assert torch.isfinite(planned[[0, 1, 3]]).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 8)])
def test_small_shapes_and_groups_wider_than_a_row(shape):
    planned = RTN(8, "group", 100).plan(matrix_of(gaussian(*shape)))
    assert torch.equal(planned, RTN(8, "channel").plan(matrix_of(gaussian(*shape))))


SELECTION = [
    # include, exclude, name, family, chosen
    (("*",), (), "h.0.attn.c_attn.weight", "attn", True),
    (("*",), (), "h.0.mlp.experts.up[3]", "expert", True),
    (("*",), (), "embed.weight", "embed", False),
    (("*",), (), "lm_head.weight", "head", False),
    (("*",), (), "mlp.gate.weight", "router", False),
    (("*",), (), "conv.weight", "conv", False),
    (("*",), (), "something.weight", "other", False),
    (("ffn",), (), "h.0.attn.c_attn.weight", "attn", False),
    (("ffn",), (), "h.0.mlp.c_fc.weight", "ffn", True),
    (("head",), (), "lm_head.weight", "head", True),
    (("*", "other"), (), "something.weight", "other", True),
    (("lm_head.weight",), (), "lm_head.weight", "head", True),
    (("*head*",), (), "lm_head.weight", "head", False),
    (("*.mlp.*",), (), "h.0.mlp.c_fc.weight", "ffn", True),
    (("*.mlp.*",), (), "h.0.mlp.gate.weight", "router", False),
    (("*",), ("*.0.*",), "h.0.mlp.c_fc.weight", "ffn", False),
    (("*",), ("ffn",), "h.0.mlp.c_fc.weight", "ffn", False),
]


@pytest.mark.parametrize(("include", "exclude", "name", "family", "chosen"), SELECTION)
def test_include_and_exclude_choose_by_name_and_family(include, exclude, name, family, chosen):
    edit = RTN(8, include=include, exclude=exclude)
    matrix = matrix_of(gaussian(), name, family)
    assert edit.selects(matrix) is chosen
    assert (edit.plan(matrix) is not None) is chosen


def test_a_refused_matrix_is_never_touched():
    matrix = matrix_of(gaussian(), refusal="A_log is not a linear map")
    assert not RTN(8).selects(matrix)
    assert RTN(8).plan(matrix) is None


BAD = [
    ({"bits": 1}, "bits"),
    ({"bits": 9}, "bits"),
    ({"bits": 4.0}, "bits"),
    ({"bits": True}, "bits"),
    ({"bits": 8, "granularity": "chanel"}, "did you mean 'channel'"),
    ({"bits": 8, "granularity": "group"}, "group_size"),
    ({"bits": 8, "granularity": "group", "group_size": 0}, "group_size"),
    ({"bits": 8, "group_size": 32}, "use 'group'"),
    ({"bits": 8, "include": ()}, "include is empty"),
    ({"bits": 8, "exclude": 3}, "exclude"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_parameters_are_refused_in_words(arguments, words):
    with pytest.raises(InputError, match=words):
        RTN(**arguments)


def test_name_kind_and_parameters_describe_the_edit():
    edit = RTN(4, "group", 32, include="ffn")
    assert edit.name == "rtn-int4-group32"
    assert RTN(8).name == "rtn-int8-channel"
    assert edit.kind == Quantize(4, "group", 32)
    assert json.loads(json.dumps(edit.params()))["include"] == ["ffn"]
    assert isinstance(edit, Edit)
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.bits = 2
