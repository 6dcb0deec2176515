"""A drill end to end on a small model: harmful faults are taken back to the clean twin, mild ones are let pass."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from accelerate import Accelerator
from architectures import build
from tests.support.accelerate_loop import fresh_accelerate

from weightproof.cli import main
from weightproof.errors import InputError
from weightproof.testing import faults
from weightproof.testing.drill import (
    ACTED,
    HARMFUL,
    LEFT_OUT,
    NOTHING,
    PUT_BACK,
    ROLLED_BACK,
    Life,
    Procedure,
    Report,
    row_of,
)  # fmt: skip
from weightproof.types import Measurement
from weightproof_callbacks.fault_drill import Drill, learnable_windows, text_windows

PROCEDURE = Procedure(after=20)


@pytest.fixture(scope="module")
def trained():
    """A tiny Llama that has learned the windows, and windows that it has not seen."""
    torch.manual_seed(0)
    model = build("llama").train()
    windows = learnable_windows(64, 2000, 32, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for batch in windows[800:].split(8):
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), windows[:800]


@pytest.fixture(scope="module")
def drill(trained):
    fresh_accelerate()
    return Drill(Accelerator(cpu=True), *trained, PROCEDURE)


def digest_of(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_healthy_run_under_guard_is_the_run_without_it(drill):
    row = drill.clean_row()
    assert (row.action, row.loss, row.expected) == (NOTHING, 0.0, True)
    assert row.state == "equal to the clean twin, bit for bit"
    assert not row.told
    assert drill.watched().reported, "numbers are reported, and none of them noted"


@pytest.mark.parametrize(
    ("name", "action", "state"),
    [
        ("norm-gain-flip", ROLLED_BACK, "equal to the clean twin, bit for bit"),
        ("weight-bit-flip", ROLLED_BACK, "equal to the clean twin, bit for bit"),
        ("gradient-bit-flip", LEFT_OUT, "equal to the twin without 1 batch, bit for bit"),
        ("optimizer-bit-flip", ROLLED_BACK, "equal to the clean twin, bit for bit"),
        ("wrong-rng", PUT_BACK, "equal to the clean twin, bit for bit"),
    ],
)
def test_a_fault_is_found_and_the_run_is_as_if_it_had_never_been(drill, name, action, state):
    row = drill.row(faults.make_fault(name, at=PROCEDURE.fault_at))
    assert row.action == action
    assert row.action in ACTED
    assert row.state == state
    assert row.detected - row.at <= 2 * PROCEDURE.every
    assert row.expected


def test_a_second_moment_that_no_gradients_could_have_made_takes_the_window_back(drill):
    row = drill.row(faults.OptimizerBitFlip(at=PROCEDURE.fault_at, state="exp_avg_sq"))
    assert (row.action, row.state) == (ROLLED_BACK, "equal to the clean twin, bit for bit")
    assert row.by == "invariants impossible_moment (optimizer)"


def test_generators_that_a_resume_forgets_are_another_run_without_a_guard(drill):
    twin, life = drill.twin(), drill.live([faults.WrongRNG(at=PROCEDURE.fault_at)], guarded=False)
    assert (life.weights, life.training) != (twin.weights, twin.training)
    resumed = drill.live([faults.WrongRNG(at=PROCEDURE.fault_at, rank=7)], guarded=False)
    assert (resumed.weights, resumed.training) == (twin.weights, twin.training), "saving and loading change nothing"


def test_a_mild_fault_is_let_pass(drill):
    row = drill.row(faults.NormGainFlip(at=PROCEDURE.fault_at).mild())
    assert row.action not in ACTED
    assert row.harm <= HARMFUL
    assert row.expected
    assert row.told
    assert row.reported.startswith("change of a gain or bias")
    assert float(row.reported_clean) < 2.0


def test_too_little_data_is_refused(trained):
    model, windows = trained
    with pytest.raises(InputError, match="needs more than 416 windows"):
        Drill(Accelerator(cpu=True), model, windows[:416], PROCEDURE)


# ---- the judgement of a row ----------------------------------------------------------------------------------------


def judged(guarded: Life, *, harm: float = 1.0):
    twin = Life(loss=2.0)
    return row_of(
        "fault", "", Procedure(), twin=twin, matched=twin, unguarded=Life(loss=2.0 + harm), guarded=guarded, state=""
    )


def test_harm_that_nobody_acted_on_is_not_as_expected():
    assert not judged(Life(loss=2.0)).expected
    assert not judged(Life(loss=3.0), harm=float("nan")).expected
    assert judged(Life(loss=2.0), harm=0.0).expected


def test_a_run_that_ends_worse_than_the_twin_is_not_as_expected():
    assert not judged(Life(loss=2.0 + 2 * HARMFUL), harm=0.0).expected
    assert not judged(Life(loss=float("nan")), harm=0.0).expected


def reported(step: int, value: float, *, noted: bool) -> Report:
    reason = "noted: 4 or more" if noted else "noted from 4 on"
    return Report(
        step, Measurement("invariants", "optimizer", "moment_growth", value, 1.0, None, "window", reason=reason), noted
    )


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        pytest.param([], True, id="the clean run has no such number"),
        pytest.param([reported(35, 1.0, noted=False)], True, id="the clean run's is usual"),
        pytest.param([reported(35, 9.0, noted=True)], False, id="the clean run notes the same"),
        pytest.param([reported(40, 9.0, noted=True)], True, id="of another window"),
    ],
)
def test_a_report_counts_where_the_clean_run_has_none_in_the_same_window(theirs, told):
    twin, found = Life(loss=2.0), Life(loss=2.0, reported=[reported(35, 9.0, noted=True)])
    made = {"twin": twin, "matched": twin, "unguarded": twin, "guarded": found, "state": ""}
    row = row_of("fault", "", Procedure(), **made, clean=Life(reported=theirs))
    assert row.told is told
    late = Life(loss=2.0, reported=[reported(45, 9.0, noted=True)])
    assert not row_of("fault", "", Procedure(), **(made | {"guarded": late}), clean=Life()).told, "after two checks"


# ---- the command ---------------------------------------------------------------------------------------------------


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    fresh_accelerate()
    with pytest.raises(SystemExit) as stop:
        main(["drill", *arguments])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


@pytest.fixture
def folder(trained, tmp_path):
    trained[0].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command_prints_and_writes_the_table_and_leaves_the_model_alone(folder, tmp_path, capsys):
    held = digest_of(folder)
    code, out, _ = run(
        capsys, str(folder), "--faults", "norm-gain-flip", "--steps", "10", "--json", "-o", str(tmp_path / "out")
    )
    content = json.loads(out)
    assert code == 0
    assert content == json.loads((tmp_path / "out" / "drill.json").read_text())
    assert [row["fault"] for row in content["rows"]] == ["none", "norm-gain-flip", "norm-gain-flip"]
    assert content["rows"][1]["action"] == ROLLED_BACK
    assert digest_of(folder) == held


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--faults", "gremlin"), "no fault 'gremlin'"),
        (("--faults", "stuck-rank"), "needs a second process"),
        (("--faults", ","), "names none"),
        (("--data", "missing.txt"), "missing.txt"),
    ],
)
def test_wrong_usage_is_said_in_one_sentence(folder, capsys, arguments, says):
    code, _, err = run(capsys, str(folder), *arguments)
    assert code == 3
    assert says in err


def test_text_is_cut_into_whole_windows():
    assert text_windows(list(range(10)), 5, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert text_windows(list(range(10)), 1, 4).tolist() == [[0, 1, 2, 3]]


def test_generated_windows_have_something_to_learn():
    windows = learnable_windows(1000, 200, 16, 3)
    pairs = list(zip(windows[:, :-1].flatten().tolist(), windows[:, 1:].flatten().tolist(), strict=True))
    assert int(windows.max()) < 64
    assert len(set(pairs)) < len(pairs) / 2  # most are the usual successor
