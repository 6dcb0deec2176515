"""Our metrics as `evaluate` sees them: alone, in batches, combined with a user's own; offline, nothing left behind."""

import gc
import json
import socket
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest

from weightproof.errors import InputError
from weightproof.statistics.paired import PairedSums, interval
from weightproof_callbacks.metrics import PairedAccuracy, PairedLoss


class ShareEqual(evaluate.Metric):
    """A user's own metric, with the two usual inputs."""

    def _info(self):
        features = datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"share_equal": float(np.mean(np.equal(predictions, references)))}


@pytest.fixture
def batches():
    rng = np.random.default_rng(0)
    made = []
    for _ in range(2):
        references = rng.integers(0, 3, 30)
        baseline = np.where(rng.random(30) < 0.8, references, 0)
        weights = rng.integers(50, 60, 30).astype(float)
        made.append(
            {
                "predictions": np.where(rng.random(30) < 0.9, baseline, 1),
                "references": references,
                "baseline_predictions": baseline,
                "loss_sums": 3.01 * weights + rng.normal(size=30),
                "baseline_loss_sums": 3 * weights,
                "weights": weights,
            }
        )
    return made


@pytest.fixture(autouse=True)
def offline_in_a_home_of_its_own(monkeypatch, tmp_path):
    def refuse(*_):
        raise AssertionError("a metric went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "home"))


def test_loss_is_the_library_s_interval(batches):
    metric = PairedLoss()
    for batch in batches:
        metric.add_batch(**{name: batch[name] for name in ("loss_sums", "baseline_loss_sums", "weights")})
    found = metric.compute(limit=1.05)
    arrays = (np.concatenate([b[name] for b in batches]) for name in ("baseline_loss_sums", "loss_sums", "weights"))
    expected = interval(PairedSums(*arrays))
    assert (found["nll_difference"], found["nll_lower"], found["nll_upper"]) == (
        expected.estimate,
        expected.lower,
        expected.upper,
    )
    assert found["perplexity_ratio_upper"] == pytest.approx(np.exp(expected.upper))
    assert found["nll"] - found["baseline_nll"] == pytest.approx(expected.estimate)
    assert (found["decision"], found["loss_undecided"]) == ("accept", None)
    json.dumps(found, allow_nan=False)


def test_accuracy_one_example_at_a_time():
    metric = PairedAccuracy()
    for prediction, baseline in [(1, 1)] * 30 + [(0, 1)] * 9 + [(1, 0)] + [(1, -1)] * 5 + [(-1, 1)]:
        metric.add(prediction=prediction, reference=1, baseline_predictions=baseline)
    found = metric.compute()
    assert (found["lost"], found["gained"], found["excluded"]) == (10, 1, 5)
    assert found["accuracy_difference"] == pytest.approx(-9 / 41)
    assert found["accuracy_upper"] < 0
    assert found["mcnemar_p"] < found["mcnemar_exact_p"] < 0.05
    assert type(found["lost"]) is int


def test_combined_with_a_users_own(batches, tmp_path):
    own = ShareEqual(keep_in_memory=True, cache_dir=str(tmp_path / "own"))
    combined = evaluate.combine([PairedLoss(), PairedAccuracy(), own])
    for batch in batches:
        combined.add_batch(**batch)
    found = combined.compute()
    assert found["share_equal"] == found["accuracy"]
    assert {"perplexity_ratio", "mcnemar_p", "loss_undecided", "accuracy_undecided"} <= set(found)


def test_nothing_is_left_behind(batches, tmp_path):
    metric = PairedLoss()
    metric.compute(**{name: batches[0][name] for name in ("loss_sums", "baseline_loss_sums", "weights")})
    assert not any(path.is_file() for path in (tmp_path / "temporary").rglob("*"))
    del metric
    gc.collect()
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not (tmp_path / "home").exists()


def test_several_processes_share_files_in_a_folder_they_are_given(batches, tmp_path):
    with pytest.raises(InputError, match="cache_dir"):
        PairedAccuracy(num_process=2, process_id=0)
    one = PairedAccuracy(num_process=1, keep_in_memory=False, cache_dir=str(tmp_path / "shared"), experiment_id="run")
    names = ("predictions", "references", "baseline_predictions")
    found = one.compute(**{name: batches[0][name] for name in names})
    assert found == PairedAccuracy().compute(**{name: batches[0][name] for name in names})
    assert not list(Path(tmp_path / "shared").rglob("*.arrow"))


def test_bad_input_is_one_sentence():
    with pytest.raises(InputError, match="after of group 1 is not finite"):
        PairedLoss().compute(loss_sums=[1.0, float("nan")], baseline_loss_sums=[1.0, 1.0], weights=[1.0, 1.0])
    with pytest.raises(InputError, match="perplexity ratio"):
        PairedLoss().compute(loss_sums=[1.0], baseline_loss_sums=[1.0], weights=[1.0], limit=0)
    with pytest.raises(InputError, match="alpha"):
        PairedAccuracy().compute(predictions=[1], references=[1], baseline_predictions=[1], confidence=95)
