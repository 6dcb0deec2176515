"""The sharded screen in real processes, on DTensors as FSDP version 2 makes them."""

import math

import matrix_cases as cases
import numpy as np
import pytest
import torch
from tests.oracles import spectra as oracle
from worlds import run_world

from weightproof.collective import Processes
from weightproof.errors import CollectiveError, InputError
from weightproof.numerics.lockstep import ScreenRequest, predicted_bytes, screen
from weightproof.numerics.norms import NormReference
from weightproof.parallel.shards import shard_of
from weightproof.spectrum import profile, track_norm

PLACES = ("rows", "columns")


def _broken():
    whole = cases.make("spiked")
    whole[-1, -1] = math.nan  # on the last rank that holds anything
    return whole


def _changes():
    """(name, before, after): what the ladder must tell apart."""
    for index, before in cases.ladder_matrices(every=8):
        yield f"int8 {index}", before, cases.rounded(before, 8)
        yield f"int4 {index}", before, cases.rounded(before, 4)
        yield f"planted {index}", before, cases.planted(before, 1.3 * oracle.spectral_norm(before), index)
    before = cases.make("power law")
    yield "none", before, before.clone()
    yield "cast", before, before.bfloat16()
    yield "half precision", before.bfloat16(), cases.rounded(before, 4).bfloat16()
    yield "NaN on one rank", cases.make("spiked"), _broken()


def _reference(before):
    norm = oracle.spectral_norm(before)
    return NormReference(norm), (norm / 1.1, norm * 1.1)


def _scales(matrix):
    rng = np.random.default_rng(5)
    return [torch.from_numpy(np.exp(0.3 * rng.standard_normal(side))) for side in matrix.shape]


def _sharded(matrix, place, size):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (size,))
    tensor = distribute_tensor(matrix, mesh, [Shard(PLACES.index(place))])
    assert type(tensor) is DTensor
    shard = shard_of(tensor)
    assert shard is not None
    assert shard.layout == place
    return shard


def _screen_all(rank, size, place):
    """Every matrix and every change in one screen; what was found, and what it cost."""
    processes = Processes.join(timeout=30)
    assert (processes.size, processes.rank) == (size, rank)
    requests = [ScreenRequest(name, _sharded(cases.make(name), place, size)) for name in cases.MAKERS]
    for name, before, after in _changes():
        reference, limit = _reference(before)
        rows, cols = _scales(before)
        parts = _sharded(after, place, size), _sharded(before, place, size)
        requests.append(ScreenRequest(name, *parts, reference, limit, rows, cols))
    operations = []
    summed = processes.sum
    processes.sum = lambda operation, tensors: operations.append(operation) or summed(operation, tensors)
    return screen(processes, requests), operations


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_sharded_matrices_read_as_whole_ones_on_every_rank(size, place):
    results = run_world(_screen_all, size, place)
    assert len(results) == size
    found, operations = results[0]
    assert all(other == found for other, _ in results)
    assert len(operations) <= 1 + (4 + 1) + (24 + 4)  # energies, the changes, steps and looks on the matrices
    matrices = dict(zip(cases.MAKERS, found, strict=False))
    for name, screened in matrices.items():
        whole = cases.make(name)
        _assert_same_profile(screened.profile, profile(whole))
        if screened.norm is not None:
            assert abs(screened.norm.value - oracle.spectral_norm(whole)) <= screened.norm.error
    assert {name for name, screened in matrices.items() if screened.norm is not None} >= {
        "tall noise",
        "wide noise",
        "spiked",
        "power law",
        "zero",
        "a zero row",
    }
    for (name, before, after), screened in zip(_changes(), found[len(cases.MAKERS) :], strict=True):
        _assert_same_profile(screened.profile, profile(after))
        if name == "NaN on one rank":
            assert screened.profile.num_nonfinite == 1
            assert screened.norm is screened.whitened_delta is None
        else:
            _check_change(name, before, after, screened)


def _assert_same_profile(found, expected):
    for field in ("num_nonfinite", "zero_rows", "zero_cols"):
        assert getattr(found, field) == getattr(expected, field), field
    for field in ("frobenius_norm", "max_abs", "norm_collapse"):
        value = getattr(expected, field)
        assert getattr(found, field) == (None if value is None else pytest.approx(value, rel=1e-6, abs=0)), field


def _check_change(name, before, after, screened):
    reference, limit = _reference(before)
    true = oracle.spectral_norm(after)
    assert screened.norm is not None, name
    assert abs(screened.norm.value - true) <= screened.norm.error
    inside = limit[0] <= screened.norm.value <= limit[1]
    assert inside == (limit[0] <= true <= limit[1]) == (not name.startswith("planted"))
    whole = track_norm(after, before, reference, limit, key=name)
    assert inside == (limit[0] <= whole.value <= limit[1])
    delta = oracle.to_float64(after) - oracle.to_float64(before)
    size = np.linalg.norm(oracle.to_float64(before))
    assert screened.relative_delta == pytest.approx(np.linalg.norm(delta) / size, rel=1e-5)
    rows, cols = (scale.numpy() for scale in _scales(before))
    whitened = rows[:, None] * delta * cols
    assert np.linalg.norm(whitened, 2) <= screened.whitened_delta * (1 + 1e-6)
    assert screened.whitened_delta <= 1.0001 * np.linalg.norm(whitened)


def _screen_fsdp(rank, size):
    """The linear layers of an FSDP model, before and after an edit of their parts."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 65), torch.nn.Linear(65, 33))
    whole = [layer.weight.detach().clone() for layer in model]
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    processes = Processes.join(timeout=30)
    results = []
    for factor in (1.0, 0.5):
        requests = []
        for index, layer in enumerate(model):
            with torch.no_grad():
                layer.weight.to_local().mul_(factor)
            requests.append(ScreenRequest(f"{index}.weight", shard_of(layer.weight)))
        sent = processes.bytes_sent
        found = screen(processes, requests)
        steps = [int(item.norm.method.removeprefix("sharded lanczos-").split(",")[0]) for item in found]
        predicted = sum(predicted_bytes(r, size, norm_steps=k) for r, k in zip(requests, steps, strict=True))
        assert processes.bytes_sent - sent == pytest.approx(predicted, abs=100)
        results += zip([weight * factor for weight in whole], found, strict=True)
    return results


@pytest.mark.parametrize("size", [2, 3])
def test_the_parts_of_an_fsdp_model_are_read_where_they_lie(size):
    results = run_world(_screen_fsdp, size)
    assert all([found for _, found in other] == [found for _, found in results[0]] for other in results)
    for weight, found in results[0]:
        true = oracle.spectral_norm(weight)
        assert abs(found.norm.value - true) <= found.norm.error <= 0.06 * true
        _assert_same_profile(found.profile, profile(weight))


def _screen_apart(rank, size):
    """Ranks that ask for different things end with an error that names it, not in a hang."""
    processes = Processes.join(timeout=20)
    names = ("spiked", "power law") if rank else ("spiked",)
    requests = [ScreenRequest(name, _sharded(cases.make(name), "rows", size)) for name in ("spiked", "power law")]
    with pytest.raises(CollectiveError, match="energies of"):
        screen(processes, requests[: len(names)])
    return True


def test_ranks_that_ask_for_different_screens_are_told_so():
    assert run_world(_screen_apart, 2) == [True, True]


def _screen_badly(rank, size):
    """A request that only one rank gets wrong: the others learn of it."""
    processes = Processes.join(timeout=20)
    shard = _sharded(cases.make("spiked"), "rows", size)
    limit = (2.0, 1.0) if rank == 1 else (1.0, 2.0)
    with pytest.raises(InputError, match="low <= high"), processes.together("screening"):
        screen(processes, [ScreenRequest("w", shard, limit=limit)])
    return True


def test_a_request_that_one_rank_gets_wrong_ends_the_screen_on_all():
    assert run_world(_screen_badly, 2) == [True, True]
