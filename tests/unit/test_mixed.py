"""Mixed precision: a width of its own for each matrix, with the contract of each."""

import pytest
import torch
from torch import nn

from weightproof.edits import RTN, Mixed
from weightproof.errors import InputError
from weightproof.kinds import Quantize
from weightproof.snapshot import write_matrix
from weightproof.weights import iter_weight_matrices


@pytest.fixture
def matrices():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 16))
    return {matrix.name: matrix for matrix in iter_weight_matrices(model)}


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_matrix_is_what_rtn_makes_of_it_at_its_width(matrices, symmetric):
    edit = Mixed({"0.weight": 4, "1.weight": 2}, "group", 16, symmetric)
    for name, bits in (("0.weight", 4), ("1.weight", 2)):
        alone = RTN(bits, "group", 16, symmetric, include=(name,))
        assert torch.equal(edit.plan(matrices[name]), alone.plan(matrices[name]))


def test_a_matrix_without_a_width_stays(matrices):
    edit = Mixed({"0.weight": 4})
    assert edit.plan(matrices["1.weight"]) is None
    assert not edit.selects(matrices["1.weight"])
    assert edit.unmatched(matrices.values()) == ()
    assert Mixed({"0.weight": 4, "9.weight": 4}).unmatched(matrices.values()) == ("9.weight",)


def test_the_contract_holds_each_matrix_to_its_own_width(matrices):
    edit = Mixed({"0.weight": 8, "1.weight": 3})
    for name, width in edit.bits.items():
        before, after = matrices[name].load().detach().clone(), edit.plan(matrices[name])
        assert edit.kind.measure(name, before, after) == Quantize(width).measure(name, before, after)
        assert all(one.value <= one.limit for one in edit.kind.measure(name, before, after))
    coarse = RTN(3, include="0.weight").plan(matrices["0.weight"])  # 3 bits where 8 were declared
    readings = edit.kind.measure("0.weight", matrices["0.weight"].load().detach(), coarse)
    assert [one.statistic for one in readings if one.value > one.limit and one.rigorous] == ["error_over_half_step"]


def test_the_contract_forbids_any_change_of_another_matrix(matrices):
    kind, matrix = Mixed({"0.weight": 8}).kind, matrices["1.weight"]
    before = matrix.load().detach().clone()
    assert [one.value for one in kind.measure("1.weight", before, before)] == [0.0]
    changed = before.clone()
    changed[0, 0] += 1.0
    write_matrix(matrix, changed)
    (reading,) = kind.measure("1.weight", before, matrix.load())
    assert reading.rigorous
    assert reading.value == 1 / before.numel() > reading.limit


@pytest.mark.parametrize("bits", [{}, {"0.weight": 0}, {"0.weight": 9}, {"0.weight": True}, {3: 4}, [4], None])
def test_widths_that_make_no_sense_are_refused(bits):
    with pytest.raises(InputError, match="bits must be"):
        Mixed(bits)


def test_a_wrong_width_is_named_with_its_matrix():
    with pytest.raises(InputError, match=r"^layers\.0\.up: bits must be a whole number from 2 to 8, not 16"):
        Mixed({"layers.0.up": 16})
