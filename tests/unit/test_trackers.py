"""Tracker events: finite rows only, worst first, one JSON object a line."""

import json
import math
import resource

import pytest

from weightproof import InputError
from weightproof.trackers import GuardEvent, JsonlTracker, metric_rows, worst_measurements
from weightproof.types import Measurement, Outcome, Verdict


def measurement(value, limit=1.0, outcome=Outcome.PASS, target="m", family="ffn", reference=0.0):
    return Measurement("spectral", target, "growth", value, reference, limit, family, outcome)


def verdict(*measurements):
    return Verdict("spectral", Outcome.PASS, measurements, "", len(measurements), len(measurements))


def test_rows_keep_the_value_farthest_from_its_reference_per_family():
    rows = metric_rows(
        [verdict(measurement(0.1), measurement(-0.4), measurement(0.2), measurement(9.0, family="attn"))]
    )
    assert rows == {"guard/spectral/ffn/growth": -0.4, "guard/spectral/attn/growth": 9.0}


def test_rows_leave_out_what_is_not_a_finite_number():
    assert metric_rows([verdict(measurement(None), measurement(math.nan), measurement(math.inf))]) == {}


def test_reported_measurements_are_rows_too():
    assert metric_rows([], [measurement(2.0, limit=None)]) == {"guard/spectral/ffn/growth": 2.0}


def test_worst_orders_by_outcome_then_by_distance_to_the_limit():
    found = worst_measurements(
        [
            verdict(
                measurement(0.9, target="near"),
                measurement(0.1, target="far"),
                measurement(1.5, outcome=Outcome.WARN, target="warned"),
                measurement(math.nan, outcome=Outcome.FAIL, target="nan"),
                measurement(None, outcome=Outcome.NOT_MEASURED, target="unmeasured"),
            )
        ],
        count=4,
    )
    assert [m.target for m in found] == ["nan", "unmeasured", "warned", "near"]


def test_jsonl_lines_parse_even_with_values_that_are_not_finite(tmp_path):
    tracker = JsonlTracker(tmp_path / "log" / "events.jsonl")
    worst = (measurement(math.nan, outcome=Outcome.FAIL),)
    event = GuardEvent("e", 3, "unknown", "KEEP", "kept", "s", "r", False, False, {"guard/a/b/c": 1.0}, worst, 0.1)
    tracker.log_event(event)
    tracker.log_picture("guard/spectrum", b"png", 3)
    tracker.close()
    rows = [json.loads(line) for line in (tmp_path / "log" / "events.jsonl").read_text().splitlines()]
    assert rows[0]["worst"][0]["value"] == "NaN"
    assert rows[0]["rows"] == {"guard/a/b/c": 1.0}
    assert (tmp_path / "log" / rows[1]["path"]).read_bytes() == b"png"


def test_two_pictures_of_one_step_are_both_kept(tmp_path):
    tracker = JsonlTracker(tmp_path / "events.jsonl")
    for content in (b"int8", b"int2"):
        tracker.log_picture("guard/spectrum", content, 100)
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == ["guard-spectrum-100.png", "guard-spectrum-100-2.png"]
    assert [(tmp_path / row["path"]).read_bytes() for row in rows] == [b"int8", b"int2"]


def test_unwritable_log_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot open the event log"):
        JsonlTracker(tmp_path / "file" / "events.jsonl")


def test_a_log_ratio_is_told_by_its_size_whatever_the_norm_it_refers_to():
    quiet = Measurement("spectral", "large", "log_norm_ratio", 0.0, 30.0, 1.0, "ffn")
    grown = Measurement("spectral", "small", "log_norm_ratio", 0.7, 1.0, 1.0, "ffn")
    assert metric_rows([verdict(quiet, grown)]) == {"guard/spectral/ffn/log_norm_ratio": 0.7}


def test_a_log_that_can_no_longer_be_written_is_named(tmp_path):
    tracker = JsonlTracker(tmp_path / "events.jsonl")
    (tmp_path / "events.jsonl").unlink()
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(InputError, match=r"cannot write to the event log .*events\.jsonl"):
        tracker.log_certificate(tmp_path / "certificate.json", action="KEEP", step=1)


def test_a_disk_that_fills_up_leaves_whole_lines(tmp_path):
    tracker = JsonlTracker(tmp_path / "events.jsonl")
    tracker.log_certificate(tmp_path / "certificate.json", action="KEEP", step=1)
    before = (tmp_path / "events.jsonl").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))  # the next line fits in part
    try:
        with pytest.raises(InputError, match="cannot write to the event log"):
            tracker.log_certificate(tmp_path / "certificate.json", action="KEEP", step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "events.jsonl").read_bytes() == before
    tracker.log_certificate(tmp_path / "certificate.json", action="KEEP", step=3)
    assert [json.loads(line)["step"] for line in (tmp_path / "events.jsonl").read_text().splitlines()] == [1, 3]
