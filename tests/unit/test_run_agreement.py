"""Batches and generators, compared by digest: what is wrong is named, what is right is passed over."""

import random

import numpy as np
import pytest
import torch

from weightproof import rng
from weightproof.run_agreement import BatchLedger, batch_digest, generator_digests, generators_differing, skew_of


def test_batches_that_all_differ_are_no_skew():
    assert skew_of([("a", "b"), ("c", "d")]) == ()
    assert skew_of([]) == ()
    assert skew_of([()]) == ()


def test_a_batch_of_another_rank_is_named():
    (said,) = skew_of([("a", "b", "c"), ("d", "a", "e")])
    assert said.startswith("batch 2 of rank 1 is batch 1 of rank 0 again")


def test_a_batch_that_a_rank_had_before_is_named():
    (said,) = skew_of([("a", "b", "b")])
    assert said.startswith("batch 3 of rank 0 is batch 2 of rank 0 again")


def test_another_number_of_batches_is_named():
    (said,) = skew_of([("a", "b"), ("c",), ("d", "e")])
    assert said == "rank 1 was given 1 batches, the others 2"


@pytest.mark.parametrize(
    "other",
    [
        {"input_ids": torch.tensor([[1, 2, 4]])},
        {"labels": torch.tensor([[1, 2, 3]])},
        {"input_ids": torch.tensor([1, 2, 3])},
        {"input_ids": torch.tensor([[1, 2, 3]], dtype=torch.int32)},
    ],
)
def test_a_digest_tells_batches_apart(other):
    batch = {"input_ids": torch.tensor([[1, 2, 3]])}
    assert batch_digest(batch) != batch_digest(other)
    assert batch_digest(batch) == batch_digest({"input_ids": torch.tensor([[1, 2, 3]])})


def test_a_ledger_notes_what_passes_and_forgets_what_was_looked_at():
    ledger, batches = BatchLedger(), [torch.tensor([i]) for i in range(3)]
    assert [int(batch) for batch in ledger.over(batches)] == [0, 1, 2]
    assert ledger.drain() == tuple(batch_digest(batch) for batch in batches)
    assert ledger.drain() == ()


DRAWS = {
    "Python": random.random,
    "numpy": np.random.rand,
    "torch CPU": lambda: torch.rand(()),
}


@pytest.mark.parametrize("name", sorted(DRAWS))
def test_a_single_draw_moves_its_generator_alone(name):
    with rng.preserved_rng():
        kept = generator_digests()
        assert generators_differing(kept) == ()
        DRAWS[name]()
        assert generators_differing(kept) == (name,)


def test_a_normal_that_numpy_and_python_hold_back_counts():
    with rng.preserved_rng():
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        kept = generator_digests()
        state = random.getstate()
        random.setstate((state[0], state[1], 0.5))
        np.random.set_state({**np.random.get_state(legacy=False), "has_gauss": 1, "gauss": 0.5})  # noqa: NPY002
        assert generators_differing(kept) == ("Python", "numpy")


def test_a_generator_that_was_not_kept_differs():
    kept = generator_digests()
    assert generators_differing({**kept, "CUDA 0": "00"}) == ("CUDA 0",)
