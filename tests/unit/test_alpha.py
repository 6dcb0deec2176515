"""How far alpha may go: foretold from spectra, found by the guards, every trial taken back."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import trained_models
from torch import nn
from trained_adapters import adapter_folder

from weightproof import Action, Delta, GuardSession, InputError
from weightproof.deltas import LowRank
from weightproof.numerics.random_matrix import observed_spike, visible_threshold
from weightproof.policy import load_policy
from weightproof.snapshots.tensor_store import model_digest, tensor_digest
from weightproof.steering import Trial, safe_alpha, search_alpha, steer
from weightproof.weights import iter_tensors, iter_weight_matrices

ROWS, COLUMNS, DEVIATION = 512, 256, 0.02


def noise(seed=0):
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.standard_normal((ROWS, COLUMNS)) * DEVIATION).float()


def a_direction(seed=1):
    """A unit direction u v' of the shape of the noise, as factors."""
    generator = np.random.default_rng(seed)
    u, v = (torch.from_numpy(generator.standard_normal(size)).float() for size in (ROWS, COLUMNS))
    return LowRank((u / u.norm())[:, None], (v / v.norm())[None])


def of_noise(seed=0):
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(noise(seed))
    return model


# ---------------------------------------------------------------- random matrix theory, by hand


BY_HAND = [(0.3, 0.771, 0.7725), (0.5, 0.801, 0.8007), (1.0, 1.156, 1.1525)]


@pytest.mark.parametrize(("theta", "measured", "predicted"), BY_HAND)
def test_where_a_direction_is_seen_in_noise(theta, measured, predicted):
    # s (m n)^(1/4) = .02 * 131072^(1/4) = .3805: .3 stays inside, whose edge is .02 (sqrt(512) + sqrt(256)) = .7725.
    assert visible_threshold(ROWS, COLUMNS, DEVIATION) == pytest.approx(0.3805, abs=1e-4)
    assert observed_spike(theta, ROWS, COLUMNS, DEVIATION) == pytest.approx(predicted, abs=1e-4)
    model, delta = of_noise(), Delta({"0.weight": a_direction()})
    (row,) = safe_alpha(model, delta)
    assert row.predicted_norm(theta) == pytest.approx(predicted, rel=0.01)
    seen = []
    for seed in range(8):
        drawn = of_noise(seed)
        with steer(drawn, delta, theta):
            seen.append(float(torch.linalg.matrix_norm(drawn[0].weight.detach().double(), 2)))
    # A visible spike fluctuates by the deviation s of one entry: the mean of 8 draws by s / sqrt(8), one draw by s.
    assert np.mean(seen) == pytest.approx(predicted, abs=3 * DEVIATION / math.sqrt(8))
    assert measured == pytest.approx(np.mean(seen), abs=3 * DEVIATION)
    assert row.emergence is not None
    assert (theta > row.emergence) == (theta > 0.3805)


def test_the_emergence_is_told_for_a_pure_bulk_and_doubted_elsewhere():
    model = of_noise()
    (row,) = safe_alpha(model, Delta({"0.weight": a_direction()}).scaled(2.0))
    assert row.emergence == pytest.approx(0.3805 / 2, rel=0.02)
    assert row.noise == pytest.approx(DEVIATION, rel=0.01)
    assert row.reason is None
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(-1, 1, ROWS)[:, None] * torch.linspace(0.1, 1, COLUMNS) + 0.1 * noise())
        model[0].weight[: ROWS // 2] *= 20
    (row,) = safe_alpha(model, Delta({"0.weight": a_direction()}))
    assert row.reason is not None
    assert "far from noise" in row.reason


# ---------------------------------------------------------------- bounds


def test_the_bound_is_weyls_and_names_the_matrix_that_binds():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([4.0, 1.0, 1.0])))
        model[1].weight.copy_(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
    top = torch.zeros(3, 3)
    top[0, 0] = 1.0
    delta = Delta({"0.weight": top, "1.weight": 2 * top})
    policy = load_policy("balanced").override({"spectral": {"kappa": math.log(1.5)}})
    table = safe_alpha(model, delta, policy)
    assert [row.bound for row in table] == pytest.approx([0.5 * 4.0, 0.5 * 2.0 / 2.0])
    assert [row.shrink_bound for row in table] == pytest.approx([4.0 / 3, 1.0 / 3])
    assert table.binding is not None
    assert (table.bound, table.binding.name) == (pytest.approx(0.5), "1.weight")
    assert table.shrink_bound == pytest.approx(1 / 3)
    # The direction is the worst there is: at the bound the norm has grown by exactly the limit, beyond it by more.
    for alpha, ratio in ((0.5, 1.5), (0.6, 1.6)):
        with steer(model, delta, alpha):
            assert float(torch.linalg.matrix_norm(model[1].weight.detach(), 2)) / 2.0 == pytest.approx(ratio)
    assert table.to_json()["binding"] == "1.weight"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_norm_leaves_its_limit_within_the_bounds_on_a_trained_model(name):
    model, delta = trained_models.load(name).model, Delta.load(adapter_folder(name))
    table = safe_alpha(model, delta)
    assert table.shrink_bound is not None
    tight = {row.name: float(torch.linalg.matrix_norm(_dense(model, row.name), 2)) for row in table}
    assert all(row.sigma_weight == pytest.approx(tight[row.name], rel=1e-5) for row in table)
    for sign in (1.0, -1.0):
        with steer(model, delta, sign * table.shrink_bound):
            for row in table:
                now = float(torch.linalg.matrix_norm(_dense(model, row.name), 2))
                assert 1 / row.limit <= now / tight[row.name] <= row.limit


def _dense(model, name):
    return next(one.load() for one in iter_weight_matrices(model) if one.name == name).double()


def test_a_zero_delta_and_weights_that_cannot_be_read_have_no_bound():
    model = of_noise()
    zero = safe_alpha(model, Delta({"0.weight": torch.zeros(ROWS, COLUMNS)}))
    assert (zero.bound, zero.rows[0].reason) == (None, "its delta is zero")
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    broken = safe_alpha(model, Delta({"0.weight": a_direction()}))
    assert broken.bound is None
    assert broken.rows[0].reason
    with pytest.raises(InputError, match=r"did you mean '0\.weight'"):
        safe_alpha(model, Delta({"0.weigth": a_direction()}))


def test_nothing_is_foretold_for_other_weights_unless_asked_for():
    model, other = of_noise(), of_noise(seed=1)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight.add_(a_direction().dense())
    delta = Delta.between(model, changed)
    assert safe_alpha(model, delta).bound is not None
    with pytest.raises(InputError, match=r"made for another base: 0\.weight had the digest"):
        safe_alpha(other, delta)
    assert safe_alpha(other, delta, same_base=False).bound is not None


# ---------------------------------------------------------------- the guards as judges


def snapshot_digest(model):
    return model_digest({one.name: tensor_digest(one.tensor.detach()) for one in iter_tensors(model)})


@pytest.fixture(scope="module")
def guarded():
    session = GuardSession(trained_models.load("llama").model)  # without data the outputs decide, and faster
    yield session, Delta.load(adapter_folder("llama"))
    session.close()


def test_the_largest_alpha_that_is_kept_and_nothing_stays(guarded):
    session, delta = guarded
    was, told = session.model_digest, []
    found = search_alpha(session, delta, bracket=(0.0, 0.4), tolerance=0.3, on_trial=told.append)
    assert found.alpha is not None
    assert found.smallest_rejected is not None
    assert 0.0 < found.alpha < found.smallest_rejected <= 0.4
    assert found.smallest_rejected - found.alpha <= 0.3 * found.smallest_rejected
    assert list(found.trials) == told
    assert all(one.loss is None and one.kl is not None for one in found.trials)
    assert session.history == ()
    assert snapshot_digest(session.model) == was
    again = search_alpha(session, delta, [found.alpha, found.smallest_rejected, 0.0, 0.001])
    assert [(one.alpha, one.is_kept) for one in again.trials] == [(found.smallest_rejected, False), (found.alpha, True)]
    assert again.step is None


def test_from_the_bound_of_the_spectra_upwards(guarded):
    session, delta = guarded
    found = search_alpha(session, delta, tolerance=0.5)
    bound = safe_alpha(session.model, delta).bound
    assert bound is not None
    assert found.trials[0].alpha == pytest.approx(bound / 2)
    assert found.trials[0].is_kept
    tried = [one.alpha for one in found.trials]
    doubled = next(place for place, one in enumerate(found.trials) if not one.is_kept)
    assert tried[:doubled] == pytest.approx([bound / 2 * 2**power for power in range(doubled)])
    assert found.alpha == max(one.alpha for one in found.trials if one.is_kept)
    assert len(search_alpha(session, delta, max_trials=1).trials) == 1


def test_where_nothing_is_kept_there_is_no_alpha(guarded):
    session, delta = guarded
    found = search_alpha(session, delta, [-3.0, 2.0])
    assert found.alpha is None
    assert [one.alpha for one in found.trials] == [-3.0, 2.0]
    assert search_alpha(session, delta, bracket=(2.0, 4.0)).alpha is None


def test_what_was_found_can_be_kept_with_a_certificate():
    trained = trained_models.load("gpt2")
    delta = Delta.load(adapter_folder("gpt2"))
    session = GuardSession(trained.model, retain=trained.heldout)
    found = search_alpha(session, delta, [0.02, 2.0], keep=True)
    assert found.alpha == 0.02
    assert all(one.loss is not None and one.kl is not None for one in found.trials)
    assert found.step is not None
    assert found.step.decision is not None
    assert (found.step.decision.action, found.step.applied) == (Action.KEEP, "kept")
    assert [one.name for one in session.history] == ["steer-0.02"]
    record = found.step.record
    assert record is not None
    assert record.params["alpha"] == 0.02
    assert record.params["delta"]["digest"] == delta.digest
    session.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alphas": []}, "alphas is empty"),
        ({"alphas": [0.0]}, "alphas is empty"),
        ({"alphas": [math.nan]}, "finite number"),
        ({"alphas": [1.0], "bracket": (0.0, 1.0)}, "not both"),
        ({"bracket": (-1.0, 1.0)}, "bracket must be two numbers of the same sign"),
        ({"bracket": (0.0, 0.0)}, "bracket must be two numbers"),
        ({"bracket": (0.0, 1.0), "max_trials": 0}, "max_trials"),
    ],
)
def test_what_cannot_be_searched_is_refused(guarded, options, words):
    session, delta = guarded
    with pytest.raises(InputError, match=words):
        search_alpha(session, delta, **options)


def test_a_trial_is_kept_only_by_a_decision_to_keep():
    made = {"situation": "", "reason": "", "kl": None, "loss": None, "seconds": 0.0}
    assert [Trial(1.0, action, **made).is_kept for action in ("KEEP", "ROLLBACK", "HALT")] == [True, False, False]
