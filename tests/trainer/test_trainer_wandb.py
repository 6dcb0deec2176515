"""W&B in a guarded Trainer run: one shared run that holds everything, and verdicts that do not depend on it."""

from __future__ import annotations

import math

from tests.support.wandb_records import read_offline_run
from tests.trainer.markov import Fault, fill, trainer_for

from weightproof.edits import RTN
from weightproof_callbacks.trainer import GuardCallback
from weightproof_callbacks.wandb_tracker import STEP_METRIC, TABLE_COLUMNS


def decisions(guard):
    return [(step.step, step.name, str(step.decision.action), step.applied) for step in guard.history]


def guarded_run(folder, **changes):
    guard = GuardCallback(every=20, edits={50: RTN(8), 55: RTN(2)})
    trainer = trainer_for(folder, [Fault(38, fill(math.nan)), guard], steps=60, **changes)
    trainer.train()
    return guard


def test_offline_run_of_the_trainer_holds_the_evidence(wandb, tmp_path):
    guarded_run(tmp_path / "out", report_to=["wandb"])
    assert wandb.run is not None, "the run stays open: Trainer opened it, its owner finishes it"
    wandb.finish()

    run = read_offline_run(tmp_path)  # asserts that there is one run only
    judged = [row for row in run.history if "guard/decision/keep" in row]
    assert [row[STEP_METRIC] for row in judged] == [20, 40, 50, 50, 55, 55, 60]
    assert all(row["guard/step"] == row[STEP_METRIC] for row in judged)
    assert [row["guard/decision/restored"] for row in judged] == [0, 1, 0, 0, 0, 1, 0]
    statistics = {key for row in judged for key in row if key.count("/") == 3 and key.startswith("guard/")}
    assert {key.split("/")[1] for key in statistics} >= {"invariants", "spectral", "rmt", "divergence"}
    assert ("guard/*", STEP_METRIC) in [(metric.glob_name, metric.step_metric) for metric in run.metrics]
    assert [row["train/loss"] for row in run.history if "train/loss" in row], "Trainer's own rows are there"

    with_table = [row for row in judged if "guard/worst/path" in row]
    assert [row[STEP_METRIC] for row in with_table] == [40, 50, 55]
    table = run.table(with_table[-1], "guard/worst")
    assert table["columns"] == list(TABLE_COLUMNS)
    assert {"rtn-int2-channel"} == {row[1] for row in table["data"]}

    pictures = run.rows_with("guard/spectrum")
    assert {50, 55} <= {row[STEP_METRIC] for row in pictures}
    assert run.media(pictures[-1], "guard/spectrum").startswith(b"\x89PNG")

    assert [alert.title for alert in run.alerts] == [
        "weightproof rolled back train",
        "weightproof rolled back rtn-int2-channel",
    ]
    certificates = [artifact for artifact in run.artifacts if artifact.type == "certificate"]
    aliases = {alias for artifact in certificates for alias in artifact.aliases}
    assert {"step-50", "step-55", "step-60", "verdict-keep", "verdict-rollback"} <= aliases
    assert run.summary["guard/verdict"] == "KEEP"


def test_wandb_never_changes_a_verdict(wandb, monkeypatch, tmp_path):
    expected = decisions(guarded_run(tmp_path / "without"))

    def broken(*_args, **_kwargs):
        raise ConnectionError("no network")

    run = wandb.init(project="guard", dir=tmp_path)
    monkeypatch.setattr(run, "log", broken)
    assert decisions(guarded_run(tmp_path / "broken")) == expected
    wandb.finish()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb.init(project="guard", dir=tmp_path)
    assert decisions(guarded_run(tmp_path / "disabled")) == expected


def test_run_that_is_live_is_joined_without_report_to(wandb, tmp_path):
    wandb.init(project="guard", dir=tmp_path)
    trainer_for(tmp_path / "out", [GuardCallback(every=10)], steps=20).train()
    wandb.finish()
    run = read_offline_run(tmp_path)
    assert [row[STEP_METRIC] for row in run.history if "guard/decision/keep" in row] == [10, 20]


def test_no_run_is_opened_by_the_guard(wandb, tmp_path):
    trainer_for(tmp_path / "out", [GuardCallback(every=10, trackers=["wandb"])], steps=10).train()
    assert wandb.run is None
    assert not (tmp_path / "wandb").exists()
