"""Counting quantization levels: what runs where the weights lie on another device counts as what runs on the CPU."""

import math

import pytest
import torch

from weightproof.contracts.quantities import distinct, levels_per_group, most_distinct, most_distinct_on_device

ROWS = {
    "levels": torch.randint(-7, 8, (64, 96), generator=torch.Generator().manual_seed(0)).float() * 0.125,
    "all different": torch.randn(16, 33, generator=torch.Generator().manual_seed(1)),
    "both zeros": torch.tensor([[0.0, -0.0, 1.0, 1.0]]),
    "nan and inf": torch.tensor([[math.nan, math.nan, 1.0, math.inf], [2.0, 2.0, 2.0, -math.inf]]),
    "one column": torch.ones(5, 1, dtype=torch.float64),
}
EXPECTED = {"levels": 15, "all different": 33, "both zeros": 2, "nan and inf": 4, "one column": 1}


@pytest.mark.parametrize("name", ROWS)
def test_both_ways_count_the_same(name):
    assert most_distinct(ROWS[name]) == most_distinct_on_device(ROWS[name]) == EXPECTED[name]


@pytest.mark.parametrize("name", ROWS)
def test_distinct_values_are_those_that_torch_finds_on_a_device(name):
    values = ROWS[name].flatten()
    assert torch.equal(distinct(values).nan_to_num(9.0), values.unique().nan_to_num(9.0))


def test_groups_are_counted_apart_and_the_last_may_be_shorter():
    row = torch.tensor([[0.0, 1.0, 2.0, 2.0, 5.0, 6.0, 7.0]])
    assert levels_per_group(row, None) == 6
    assert levels_per_group(row, 3) == 3
    assert levels_per_group(row, 2) == 2
