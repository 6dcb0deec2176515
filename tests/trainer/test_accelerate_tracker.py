"""The accelerate tracker: every tracker that the Accelerator has open gets the rows, and none can change a verdict."""

from __future__ import annotations

import io
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image
from tests.support.accelerate_loop import fresh_accelerate
from tests.support.wandb_records import read_offline_run
from tests.trainer.markov import tiny_llama

from weightproof import edits
from weightproof.errors import InputError
from weightproof.session import GuardSession
from weightproof.trackers import GuardEvent, open_trackers
from weightproof_callbacks.accelerate_tracker import AccelerateTracker

EVENT = GuardEvent(
    name="int2", step=40, kind="quantize", action="ROLLBACK", applied="restored", situation="divergence FAIL",
    reason="divergence on random", warned=False, monitor=False, rows={"guard/spectral/attn/log_s1_ratio": 2.5},
    worst=(), seconds=0.25,
)  # fmt: skip


class Memory(GeneralTracker):
    """A tracker as a user writes one: numbers only."""

    name = "memory"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.rows = []

    @property
    def tracker(self):
        return self.rows

    def log(self, values, step=None, **kwargs):
        self.rows.append((step, values))


class Album(Memory):
    """One that takes pictures and files, too."""

    name = "album"

    def __init__(self):
        super().__init__()
        self.images, self.files = [], []

    def log_images(self, values, step=None, **kwargs):
        self.images.append((step, values, kwargs))

    def log_artifact(self, local_path):
        self.files.append(local_path)


class Broken(Memory):
    """One whose every method fails."""

    name = "broken"

    def log(self, values, step=None, **kwargs):
        raise ConnectionError("gone")

    log_images = log


@pytest.fixture(autouse=True)
def clean_accelerate():
    fresh_accelerate()
    yield
    fresh_accelerate()


def png(width=4, height=3):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (255, 0, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def accelerator_with(*trackers, **settings):
    accelerator = Accelerator(cpu=True, log_with=list(trackers), **settings)
    accelerator.init_trackers("guard")
    return accelerator


def test_rows_are_finite_numbers_at_the_step_of_the_event():
    memory, album = Memory(), Album()
    AccelerateTracker(accelerator_with(memory, album)).log_event(EVENT)
    assert memory.rows == album.rows
    ((step, row),) = memory.rows
    assert step == row["guard/step"] == 40
    assert row["guard/spectral/attn/log_s1_ratio"] == 2.5
    assert (row["guard/decision/keep"], row["guard/decision/restored"], row["guard/seconds"]) == (0, 1, 0.25)
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in row.values())


def test_pictures_and_files_go_where_they_are_taken_and_what_is_left_out_is_said_once(caplog, tmp_path):
    memory, album = Memory(), Album()
    tracker = AccelerateTracker(accelerator_with(memory, album))
    with caplog.at_level(logging.WARNING, "weightproof"):
        tracker.log_picture("guard/spectrum", png(), 40)
        tracker.log_picture("spectrum", png(), 50)
        tracker.log_certificate(tmp_path / "certificate.json", action="KEEP", step=50)
    assert [(step, list(values)) for step, values, _ in album.images] == [
        (40, ["guard/spectrum"]),
        (50, ["guard/spectrum"]),
    ]
    pixels = album.images[0][1]["guard/spectrum"]
    assert pixels.shape == (1, 3, 4, 3), "one picture of height 3, width 4, RGB"
    assert pixels[0, 0, 0].tolist() == [255, 0, 7]
    assert album.files == [str(tmp_path / "certificate.json")]
    assert [record.getMessage() for record in caplog.records] == [
        "the tracker memory takes no pictures: they are left out"
    ]


def test_a_failing_tracker_warns_once_and_keeps_nothing_from_the_others(caplog, tmp_path):
    broken, memory = Broken(), Memory()
    tracker = AccelerateTracker(accelerator_with(broken, memory))
    with caplog.at_level(logging.WARNING, "weightproof"):
        tracker.log_event(EVENT)
        tracker.log_event(EVENT)
        tracker.log_certificate(tmp_path / "missing.json", action="KEEP", step=1)
    assert len(memory.rows) == 2
    (record,) = caplog.records
    assert "the tracker broken could not log a guard event (ConnectionError: gone)" in record.getMessage()


def test_no_tracker_open_is_said_once_and_trackers_opened_later_are_found(caplog):
    memory = Memory()
    accelerator = Accelerator(cpu=True, log_with=[memory])
    tracker = AccelerateTracker(accelerator)
    with caplog.at_level(logging.WARNING, "weightproof"):
        tracker.log_event(EVENT)
        tracker.log_event(EVENT)
    assert len(caplog.records) == 1
    assert "init_trackers" in caplog.text
    accelerator.init_trackers("guard")
    tracker.log_event(EVENT)
    assert len(memory.rows) == 1


def test_processes_other_than_the_main_one_write_nothing():
    memory = Memory()
    AccelerateTracker(SimpleNamespace(is_main_process=False, trackers=[memory])).log_event(EVENT)
    assert memory.rows == []


def test_wandb_gets_tables_pictures_alerts_and_artifacts_in_the_run_of_accelerate(wandb, tmp_path):
    certificate = tmp_path / "certificate.json"
    certificate.write_text("{}")
    memory = Memory()
    accelerator = accelerator_with("wandb", memory)
    tracker = AccelerateTracker(accelerator)
    tracker.log_event(EVENT)
    tracker.log_picture("spectrum", png(), 40)
    tracker.log_certificate(certificate, action="ROLLBACK", step=40)
    tracker.close()
    assert wandb.run is not None, "accelerate finishes the run, not the guard"
    accelerator.end_training()

    run = read_offline_run(tmp_path)
    rejected, picture = run.history
    assert rejected["train/global_step"] == 40
    assert rejected["guard/spectral/attn/log_s1_ratio"] == 2.5
    assert run.rows_with("guard/worst") == [rejected]
    assert run.media(picture, "guard/spectrum").startswith(b"\x89PNG")
    assert [alert.title for alert in run.alerts] == ["weightproof rolled back int2"]
    assert [artifact.type for artifact in run.artifacts if artifact.type == "certificate"] == ["certificate"]
    assert len(memory.rows) == 1


def test_tensorboard_is_asked_in_its_own_layout():
    """A stand-in with the signature of accelerate's TensorBoardTracker, which needs no tensorboard."""
    album = Album()
    tensorboard = SimpleNamespace(name="tensorboard", log_images=album.log_images)
    AccelerateTracker(SimpleNamespace(is_main_process=True, trackers=[tensorboard])).log_picture("s", png(), 3)
    ((_, values, kwargs),) = album.images
    assert kwargs == {"dataformats": "NHWC"}
    assert values["guard/s"].shape == (1, 3, 4, 3)


def test_a_session_opens_it_by_name_and_its_verdicts_do_not_depend_on_it(tmp_path):
    broken, memory = Broken(), Memory()
    accelerator = accelerator_with(broken, memory)
    model = tiny_llama()
    with torch.no_grad():  # a small random head says almost the same as none
        model.lm_head.weight.mul_(4.0)
    session = GuardSession(model, accelerator=accelerator, trackers=["accelerate"], output_dir=tmp_path)
    step = session.apply(edits.RTN(8), step=7)
    with session.edit("zero") as zeroed, torch.no_grad():
        session.model.lm_head.weight.zero_()
    session.close()
    assert (step.applied, zeroed.applied) == ("kept", "restored")
    assert [(step, row["guard/decision/keep"]) for step, row in memory.rows] == [(7, 1), (2, 0)]


def test_by_name_without_an_accelerator_it_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"the tracker 'accelerate' writes through an Accelerator: pass .*accelerator="
    ):
        open_trackers(["accelerate"], tmp_path)
