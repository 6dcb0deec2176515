"""Batches and generators, compared by digest: what is wrong is named, what is right is passed over."""

import hashlib
import random

import numpy as np
import pytest
import torch

from weightproof import rng
from weightproof.parallel.run_agreement import (
    LARGEST_ROW,
    BatchLedger,
    Given,
    Skew,
    batch_digest,
    generator_digests,
    generators_differing,
    proven_skew,
    row_digests,
    shared_batches,
    skew_of,
)


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


# ---- what proves a fault --------------------------------------------------------------------------------------------


def streams(*ranks: str, rows: int = 2, passing: int | None = 0, last: str = "") -> list[list[Given]]:
    """One letter for each batch: equal letters are equal batches, of rows that no other batch has."""
    return [
        [Given(one, tuple(f"{one}{i}" for i in range(rows)), passing, one in last) for one in letters]
        for letters in ranks
    ]


EACH = ((0,), (1,))


def test_a_batch_that_is_given_again_is_proven_where_another_rank_goes_on():
    skew = proven_skew(streams("aab", "xyz"), EACH, before=30)
    (said,) = skew.proven
    assert said.startswith("batch 32 of rank 0 is batch 31 of rank 0 again (sha256 a")
    assert skew.unproven == ()


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ("abc", "xbz", "batch 2 of rank 1 is batch 2 of rank 0 again"),  # both at once
        ("abc", "xaz", "batch 2 of rank 1 is batch 1 of rank 0 again"),
        ("abcd", "wabc", "batch 2 of rank 1 is batch 1 of rank 0 again"),  # it lags behind, for good
        ("abcde", "vwxvy", "batch 4 of rank 1 is batch 1 of rank 1 again"),
    ],
)
def test_batches_of_another_rank_or_place_are_proven(first, second, says):
    found = proven_skew(streams(first, second), EACH).proven
    assert found
    assert found[0].startswith(says)


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        ("abcabc", "xyzxyz", "the data begin anew, on all ranks"),
        ("acb", "bda", "a stream begins anew in the middle of a step; the place after it has not been seen"),
        ("aceb", "bdac", "and all ranks go on in it"),
        ("abab", "xyxy", "one batch after the other is trained on twice (PPO)"),
        ("aabb", "xxyy", "every batch is given to the model twice (SimCSE)"),
        ("aaaa", "aaaa", "one batch, to see whether the model can learn it by heart"),
    ],
)
def test_what_data_and_loops_do_on_purpose_is_not_proven(first, second, why):
    assert proven_skew(streams(first, second), EACH).proven == (), why


def test_the_next_pass_may_give_everything_again():
    given = [[*streams("abc")[0], *streams("abd", passing=1)[0]], [*streams("xyz")[0], *streams("uvw", passing=1)[0]]]
    assert proven_skew(given, EACH) == Skew()


def test_a_loader_that_fills_its_last_batch_up_is_let_be():
    assert proven_skew(streams("aba", "xyz", last="a"), EACH) == Skew()


def test_data_that_are_streamed_or_unknown_prove_nothing():
    assert proven_skew(streams("aab", "xyz", passing=None), EACH) == Skew()


def test_a_single_row_proves_nothing_and_is_said():
    skew = proven_skew(streams("aab", "xyz", rows=1), EACH)
    assert skew.proven == ()
    assert skew.unproven


def test_data_with_rows_that_repeat_prove_nothing_and_are_said():
    given = streams("aabc", "wxyz")
    given[1][3] = Given("z", ("a0", "z1"), 0)
    assert proven_skew(given, EACH).proven == ()
    assert proven_skew(given, EACH).unproven
    twice = streams("aab", "xyz")
    twice[1][0] = Given("x", ("x0", "x0"), 0)
    assert proven_skew(twice, EACH).proven == ()


def test_ranks_that_share_their_batches_all_along_are_one_voice():
    given = streams("abcd", "abcd", "wxyz", "wxyz")
    groups = shared_batches(given)
    assert groups == ((0, 1), (2, 3))
    assert proven_skew(given, groups) == Skew()
    assert proven_skew(streams("abbc", "abbc", "wxyz", "wxyz"), groups).proven


def test_another_number_of_batches_is_said_and_proves_nothing():
    skew = proven_skew(streams("ab", "x"), EACH)
    assert skew.proven == ()
    assert "2 on rank 0, 1 on rank 1" in skew.unproven[0]


def test_rows_are_told_apart_whatever_else_a_batch_holds():
    batch = {
        "input_ids": torch.arange(6).reshape(3, 2),
        "labels": torch.tensor([0, 1, 0]),
        "position_ids": torch.arange(2)[None],
        "items": torch.tensor(5),
        "empty": torch.zeros(0, 4),
    }
    whole, rows = row_digests(batch)
    assert len(rows) == len(set(rows)) == 3
    other, same_rows = row_digests({**batch, "position_ids": torch.arange(1, 3)[None]})
    assert same_rows == rows
    assert other != whole
    _, moved = row_digests({**batch, "labels": torch.tensor([0, 1, 1])})
    assert [a == b for a, b in zip(rows, moved, strict=True)] == [True, True, False]
    assert row_digests({}) == (hashlib.sha256().hexdigest(), ())


def test_of_large_rows_evenly_spaced_elements_are_read():
    large = torch.randn(2, 3 * LARGEST_ROW, generator=torch.Generator().manual_seed(0))
    changed = large.clone()
    changed[1, :] += 1.0
    assert row_digests(large)[1][0] == row_digests(changed)[1][0]
    assert row_digests(large)[1][1] != row_digests(changed)[1][1]
