"""The W&B tracker: what an offline run holds after guard events, and that a failing W&B only warns."""

from __future__ import annotations

import io
import json
import logging
import math
from types import SimpleNamespace

import pytest
from PIL import Image
from report_cases import certificate as case
from tests.support.wandb_records import read_offline_run

from weightproof import report
from weightproof.certificate import Certificate
from weightproof.signing import generate_key
from weightproof.trackers import GuardEvent
from weightproof.types import Measurement, Outcome
from weightproof_callbacks.wandb_tracker import STEP_METRIC, TABLE_COLUMNS, WandbTracker, needs_table, table_rows

WORST = (
    Measurement("invariants", "lm_head.weight", "nonfinite", math.nan, 0.0, 0.0, "head", Outcome.FAIL, "NaN"),
    Measurement("spectral", "layers.0.q_proj", "log_s1_ratio", 2.5, 0.0, 2.3, "attn", Outcome.FAIL),
    Measurement("rmt", "layers.0.k_proj", "num_spikes", None, 3.0, 4.0, "attn", Outcome.NOT_MEASURED, "too small"),
)


def event(**changes) -> GuardEvent:
    settings = {
        "name": "int2", "step": 40, "kind": "quantize", "action": "ROLLBACK", "applied": "restored",
        "situation": "divergence FAIL", "reason": "divergence on random", "warned": False, "monitor": False,
        "rows": {"guard/spectral/attn/log_s1_ratio": 2.5}, "worst": WORST, "seconds": 0.25,
    }  # fmt: skip
    return GuardEvent(**{**settings, **changes})


QUIET = {"name": "train", "kind": "train", "action": "KEEP", "applied": "kept", "worst": ()}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "white").save(buffer, "PNG")
    return buffer.getvalue()


def test_offline_run_holds_rows_axis_table_picture_alert_and_artifact(wandb, tmp_path):
    key = generate_key()
    certificate = case().save(tmp_path / "certificate.json", key=key)
    wandb.init(project="guard", dir=tmp_path)
    tracker = WandbTracker()
    tracker.log_event(event(**QUIET, step=20))
    tracker.log_event(event())
    tracker.log_picture("spectrum", png(), 40)
    tracker.log_certificate(certificate, action="ROLLBACK", step=40)
    tracker.close()
    assert wandb.run is not None, "the tracker must leave the run open"
    wandb.finish()

    run = read_offline_run(tmp_path)
    quiet, rejected, picture, page = run.history
    assert quiet[STEP_METRIC] == 20
    assert quiet["guard/decision/keep"] == 1
    assert not [key for key in quiet if key.startswith("guard/worst")]
    assert rejected[STEP_METRIC] == rejected["guard/step"] == 40
    assert rejected["guard/spectral/attn/log_s1_ratio"] == 2.5
    assert (rejected["guard/decision/keep"], rejected["guard/decision/restored"]) == (0, 1)
    table = run.table(rejected, "guard/worst")
    assert table["columns"] == list(TABLE_COLUMNS)
    assert [row[3] for row in table["data"]] == [worst.target for worst in WORST]
    assert math.isnan(float(table["data"][0][7])), "a NaN stays visible"
    assert picture["guard/spectrum/_type"] == "image-file"
    assert run.media(picture, "guard/spectrum").startswith(b"\x89PNG")
    assert page["guard/report/_type"] == "html-file"
    assert page[STEP_METRIC] == 40
    assert run.media(page, "guard/report").decode() == report.html(Certificate.load(certificate))
    axes = [(m.glob_name, m.step_metric) for m in run.metrics if m.glob_name]
    assert axes == [("guard/*", STEP_METRIC), ("health/*", STEP_METRIC)]
    (alert,) = run.alerts
    assert (alert.title, alert.level) == ("weightproof rolled back int2", "WARN")
    (artifact,) = [artifact for artifact in run.artifacts if artifact.type == "certificate"]
    assert {"step-40", "verdict-rollback", "signed"} <= set(artifact.aliases)
    metadata = json.loads(artifact.metadata)
    assert (metadata["action"], metadata["signed"]) == ("ROLLBACK", True)
    assert metadata["key_ids"] == list(Certificate.load(certificate).signatures)
    assert [entry.path for entry in artifact.manifest.contents] == ["certificate.json"]
    assert run.summary["guard/verdict"] == "ROLLBACK"


def test_unsigned_certificate_is_not_called_signed(wandb, tmp_path):
    path = case().save(tmp_path / "certificate.json")
    wandb.init(project="guard", dir=tmp_path)
    WandbTracker().log_certificate(path, action="KEEP", step=1)
    wandb.finish()
    (artifact,) = [item for item in read_offline_run(tmp_path).artifacts if item.type == "certificate"]
    assert "signed" not in artifact.aliases
    assert json.loads(artifact.metadata)["key_ids"] == []


def test_file_that_is_no_certificate_is_kept_as_an_artifact_and_warned_of(wandb, tmp_path, caplog):
    path = tmp_path / "certificate.json"
    path.write_text("{}")
    wandb.init(project="guard", dir=tmp_path)
    with caplog.at_level(logging.WARNING, "weightproof"):
        WandbTracker().log_certificate(path, action="KEEP", step=1)
    wandb.finish()
    assert "could not log the report" in caplog.text
    assert [item.type for item in read_offline_run(tmp_path).artifacts if item.type == "certificate"] == ["certificate"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (QUIET, False),
        ({**QUIET, "warned": True}, True),
        ({**QUIET, "action": "ROLLBACK"}, True),
        ({**QUIET, "kind": "quantize"}, True),
    ],
)
def test_table_for_every_edit_and_every_loud_window(changes, expected):
    assert needs_table(event(**changes)) is expected


def test_unmeasured_value_is_none_with_its_reason():
    row = dict(zip(TABLE_COLUMNS, table_rows(event())[2], strict=True))
    assert row["value"] is None
    assert (row["outcome"], row["reason"]) == ("NOT_MEASURED", "too small")


def test_no_open_run_warns_once_and_opens_none(wandb, caplog):
    tracker = WandbTracker()
    with caplog.at_level(logging.WARNING, "weightproof"):
        tracker.log_event(event())
        tracker.log_picture("spectrum", png(), 1)
    assert wandb.run is None
    assert [record.message[:20] for record in caplog.records] == ["no W&B run is open i"]


class MailboxClosedError(Exception):
    """Stands for the wandb errors that derive from Exception itself."""


@pytest.mark.parametrize("error", [MailboxClosedError("gone"), OSError("disk full"), ValueError("bad media")])
def test_failing_run_warns_once_and_never_raises(error, caplog, tmp_path):
    def fail(*_args, **_kwargs):
        raise error

    run = SimpleNamespace(id="r", define_metric=fail, log=fail, log_artifact=fail, alert=fail)
    tracker = WandbTracker(run)
    with caplog.at_level(logging.WARNING, "weightproof"):
        tracker.log_event(event())
        tracker.log_picture("spectrum", png(), 1)
        tracker.log_certificate(tmp_path / "missing.json", action="KEEP", step=1)
    assert len(caplog.records) == 1
    assert type(error).__name__ in caplog.text


def test_finished_run_warns_and_never_raises(wandb, caplog, tmp_path):
    run = wandb.init(project="guard", dir=tmp_path)
    tracker = WandbTracker(run)
    wandb.finish()
    with caplog.at_level(logging.WARNING, "weightproof"):
        tracker.log_event(event())
    assert "could not log a guard event" in caplog.text


def test_disabled_wandb_accepts_everything(wandb, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb.init(project="guard", dir=tmp_path)
    tracker = WandbTracker()
    with caplog.at_level(logging.WARNING, "weightproof"):
        tracker.log_event(event())
        tracker.log_picture("spectrum", png(), 1)
    assert not [record for record in caplog.records if record.name.startswith("weightproof")]
