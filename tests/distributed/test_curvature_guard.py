"""The curvature guard in two processes, whole and sharded: the readings of one process, on both."""

import pytest
import trained_models
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from worlds import run_world

from weightproof import GuardSession, InputError, edits, fit_factors
from weightproof.errors import WeightproofError


def _factors(include):
    model = trained_models.load("llama").model
    windows = trained_models.make_windows(trained_models.RECIPES["llama"], 4, seed=70_000)
    return fit_factors(model, [{"input_ids": one["input_ids"]} for one in windows], include, progress=False)


def _foretold(rank, size, form, factors):
    """Verdict and readings of two edits, and the digest of each decision."""
    model = trained_models.load("llama").model
    if form == "sharded":
        mesh = init_device_mesh("cpu", (size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    session = GuardSession(model, policy="aggressive", factors=factors)
    found = []
    for bits in (8, 2):
        step = session.apply(edits.RTN(bits=bits))
        verdict = next(one for one in step.decision.verdicts if one.guard == "curvature")
        forecast = step.judged.after.curvature
        found.append((step.decision.action, verdict.outcome, verdict.reason, forecast, step.decision.digest))
    session.close()
    return found


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("factors")
    return [str(_factors(glob).save(folder / str(place))) for place, glob in enumerate(["*.mlp.*", "*.gate_proj.*"])]


def test_two_processes_foretell_what_one_does(paths):
    (alone,) = run_world(_foretold, 1, "whole", paths[0])
    for form in ("whole", "sharded"):
        first, second = run_world(_foretold, 2, form, paths[0], timeout=120)
        assert first == second
        for ours, theirs in zip(alone, first, strict=True):
            assert ours[:2] == theirs[:2]
            assert [one.name for one in ours[3].matrices] == [one.name for one in theirs[3].matrices]
            for one, other in zip(ours[3].matrices, theirs[3].matrices, strict=True):
                assert (one.family, one.reason) == (other.family, other.reason)
                assert one.predicted == pytest.approx(other.predicted, rel=1e-12)
            assert len(ours[3].matrices) == 9


def _refused(rank, size, paths, case):
    """What each rank is told where factors are of other weights, or not the same on every process."""
    model = trained_models.load("llama").model
    if case == "other weights":
        model.model.layers[2].mlp.down_proj.weight.data.mul_(2.0)
    factors = None if case == "only one" and rank else paths[1 if case == "another file" and rank else 0]
    try:
        GuardSession(model, factors=factors)
    except WeightproofError as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("other weights", "belong to other weights: model.layers.2.mlp.down_proj.weight"),
        ("only one", "factors: not the same on every process"),
        ("another file", "factors: not the same on every process"),
    ],
)
def test_every_process_refuses_and_says_why(case, words, paths):
    for kind, said in run_world(_refused, 2, paths, case):
        assert kind is InputError
        assert words in said
