"""benchmarks/speed_peers.py: rows that resume, fail alone and are never filled; docs show what the last run wrote."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {"cpu": "speed.md", "cuda": "gpu.md"}


@pytest.fixture(scope="module")
def script():
    """The script, its tables beside it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("speed_peers", ROOT / "benchmarks" / "speed_peers.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def tables(script):
    return sys.modules["speed_tables"]


def measured(seconds, **more):
    row = {"status": "measured", "seconds": seconds, "processor_seconds": seconds, "peak_bytes": 3 << 20}
    return row | more


MADE = {
    "device": "cpu",
    "settings": "full",
    "threads": 1,
    "at_once": 2,
    "machine": "M",
    "code": "c",
    "versions": {"torch": "2"},
}


# ---- tables ---------------------------------------------------------------------------------------


def cells(text, what):
    line = next(line for line in text.splitlines() if line.startswith(f"| {what}"))
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


def test_ratios_are_to_one_read_and_of_ours_to_theirs(tables):
    rows = {"read": measured(0.02), "spectra": measured(2.0), "svdvals": measured(8.0)}
    assert cells(tables.table(rows, "cpu"), "`torch.linalg.svdvals`")[:3] == ["8", "8", "400"]
    assert cells(tables.table(rows, "cpu"), "`torch.linalg.svdvals`")[3] == "0.25 (exact spectra of every matrix)"
    assert cells(tables.table(rows, "cpu"), "exact spectra of")[3:] == ["", "3 MiB"]


def test_ratios_are_of_processor_seconds(tables):
    rows = {"read": measured(0.02), "spectra": measured(20.0) | {"processor_seconds": 2.0}, "svdvals": measured(8.0)}
    assert cells(tables.table(rows, "cpu"), "exact spectra of")[:3] == ["20", "2", "100"]
    assert cells(tables.table(rows, "cpu"), "`torch.linalg.svdvals`")[3].startswith("0.25 ")


def test_one_block_multiplied_says_so_and_ours_is_never_compared_on_less(tables):
    rows = {"read": measured(0.5), "spectra": measured(2.0, times=16), "svdvals": measured(8.0, times=16, note="so")}
    assert cells(tables.table(rows, "cpu"), "`torch.linalg.svdvals`")[:3] == [
        "128 (x16 from one block: 8; so)",
        "128",
        "256",
    ]
    assert cells(tables.table(rows, "cpu"), "`torch.linalg.svdvals`")[3].startswith("0.25 ")
    rows["spectra"] = measured(32.0)
    assert cells(tables.table(rows, "cpu"), "`torch.linalg.svdvals`")[3].startswith("0.25 ")
    rows |= {"spectra": measured(2.0, times=16), "svdvals": measured(128.0)}
    assert cells(tables.table(rows, "cpu"), "`torch.linalg.svdvals`")[3] == ""


def test_what_was_not_run_or_failed_has_a_reason_and_no_number(tables):
    rows = {"read": measured(0.5), "spectra": {"status": "failed", "reason": "RuntimeError: a | b"}}
    rows["weightwatcher"] = {"status": "not run", "reason": "no environment at x"}
    text = tables.table(rows, "cpu")
    assert cells(text, "`analyze()`") == ["not run: no environment at x", "", "", "", ""]
    assert cells(text, "exact spectra of") == ["failed: RuntimeError: a / b", "", "", "", ""]
    assert cells(text, "baseline")[0] == "not run"


def test_without_one_read_there_is_no_ratio_to_it(tables):
    assert cells(tables.table({"spectra": measured(2.0)}, "cpu"), "exact spectra of")[2] == "not measured"


def test_every_model_measured_so_far_is_on_the_page_between_its_marks(tables):
    report = {"made": MADE, "rows": {"124m": {"read": measured(0.5)}}}
    page = "a\n<!-- speed on cpu: benchmarks/speed_peers.py -->\nstale run\n<!-- end -->\nb <!-- end -->\n"
    new = tables.with_tables(page, report)
    assert new.startswith("a\n")
    assert new.endswith("<!-- end -->\nb <!-- end -->\n")
    assert "stale run" not in new
    assert tables.MODELS["124m"] in new
    assert tables.MODELS["1b"] not in new
    with pytest.raises(ValueError, match="no place"):
        tables.with_tables("nothing here", report)


@pytest.mark.parametrize("device", PAGES)
def test_the_page_holds_the_last_run(tables, device):
    stem = "speed_peers" if device == "cpu" else "speed_peers_cuda"
    path = ROOT / "benchmarks" / f"{stem}.json"
    page = (ROOT / "docs" / PAGES[device]).read_text(encoding="utf-8")
    if not path.exists():
        assert "not measured" in page.partition(f"<!-- speed on {device}:")[2].partition("<!-- end -->")[0]
        return
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["made"]["settings"] == "full"
    assert tables.with_tables(page, report) == page


# ---- rows -----------------------------------------------------------------------------------------


def test_rows_of_this_code_and_machine_are_kept_and_others_are_not(script, tmp_path):
    path = tmp_path / "rows.json"
    script.Report(path, MADE, again=False).add("124m", {"spectra": measured(1.0)})
    script.Report(path, MADE, again=False).add("124m", {"read": measured(0.1)})
    again = script.Report(path, MADE, again=False)
    assert list(again.rows("124m")) == ["read", "spectra"]
    assert not again.lacks("124m", "spectra")
    assert again.lacks("124m", "svdvals")
    assert again.lacks("1b", "spectra")
    assert script.Report(path, MADE, again=True).lacks("124m", "spectra")
    assert script.Report(path, MADE | {"code": "d"}, again=False).lacks("124m", "spectra")


def test_a_row_that_failed_is_tried_again(script, tmp_path):
    path = tmp_path / "rows.json"
    report = script.Report(path, MADE, again=False)
    report.add("124m", {"check_outputs": measured(1.0), "guarded_edit": {"status": "failed", "reason": "x"}})
    assert report.lacks("124m", "check_outputs")


def test_unknown_names_are_refused(script):
    with pytest.raises(SystemExit, match="unknown: 7b; there are 124m, 1b"):
        script.chosen("7b", tuple(script.MODELS))
    assert script.chosen("1b, 124m", tuple(script.MODELS)) == ["124m", "1b"]


def test_a_gpu_that_is_not_there_is_refused(script, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        script.main(["--device", "cuda", "--smoke"])


def test_every_row_has_a_job_and_compares_with_a_row_of_ours(tables):
    names = {line.name: line for line in tables.LINES}
    assert len(names) == len(tables.LINES)
    assert {line.job for line in tables.LINES} == set(tables.JOBS)
    assert {names[line.against].tool for line in tables.LINES if line.against} == {tables.OURS}


# ---- running --------------------------------------------------------------------------------------


class Scripted:
    """An interpreter that answers each job as told, and is there."""

    def __init__(self, answers):
        self.answers = answers
        self.asked = []

    def missing(self, tool):
        return None

    def run(self, arguments, limit):
        job, out = arguments[3], Path(arguments[5])
        self.asked.append(job)
        answer = self.answers.get(job, {})
        if isinstance(answer, dict):
            out.write_text(json.dumps(answer))
            return subprocess.CompletedProcess(arguments, 0, "", "")
        if answer == "slow":
            raise subprocess.TimeoutExpired(arguments, limit)
        return subprocess.CompletedProcess(
            arguments, answer, "", "Traceback\nRuntimeError: too bad\n" if answer > 0 else ""
        )


ROW = {"seconds": 1.0, "processor_seconds": 1.0, "peak_bytes": None}


def test_rows_that_fail_say_why_and_the_others_go_on(script, tmp_path):
    ours = Scripted({"svdvals": {"svdvals": ROW}, "spectra": 1, "fits": "slow", "snapshot": -9})
    tools = dict.fromkeys(("", "weightproof", script.INVARLOCK, script.RMT, script.WATCHER), ours)
    report = script.Report(tmp_path / "rows.json", MADE, again=False)
    jobs = ["svdvals", "spectra", "fits", "snapshot"]
    script.Measuring(report, script.Runner("smoke", "cpu", 5.0, tools), jobs, 1).model("124m")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]["124m"]
    assert rows["svdvals"] == {"status": "measured", **ROW}
    assert rows["spectra"] == {"status": "failed", "reason": "RuntimeError: too bad"}
    assert rows["fits"] == {"status": "failed", "reason": "not finished within 5 s"}
    assert "signal 9" in rows["snapshot"]["reason"]
    assert ours.asked == ["folders", *jobs]
    script.Measuring(report, script.Runner("smoke", "cpu", 5.0, tools), jobs, 1).model("124m")
    assert ours.asked[5:] == ["folders", "spectra", "fits", "snapshot"]


def test_two_rows_at_once_keep_the_order_that_jobs_need(script, tmp_path):
    ours = Scripted({job: {line.name: ROW for line in script.LINES if line.job == job} for job in script.JOBS})
    tools = dict.fromkeys(("", "weightproof", script.INVARLOCK, script.RMT, script.WATCHER), ours)
    report = script.Report(tmp_path / "rows.json", MADE, again=False)
    script.Measuring(report, script.Runner("smoke", "cpu", 5.0, tools), list(script.JOBS), 2).model("1b")
    assert ours.asked[:3] == ["folders", *script.ALONE]
    assert sorted(ours.asked[3:]) == sorted(set(script.JOBS) - set(script.ALONE))
    order = {job: index for index, job in enumerate(ours.asked)}
    assert order["baseline"] < order["check_weights"]
    assert order["baseline"] < order["check_outputs"]
    assert order["certify"] < order["verify_1"]
    assert order["certify"] < order["verify_2"]
    assert list(report.rows("1b")) == [line.name for line in script.LINES]


def test_files_have_no_rows_on_a_gpu(script, tmp_path):
    ours = Scripted({job: {} for job in script.JOBS})
    tools = dict.fromkeys(("", "weightproof", script.INVARLOCK, script.RMT, script.WATCHER), ours)
    report = script.Report(tmp_path / "rows.json", MADE, again=False)
    script.Measuring(report, script.Runner("smoke", "cuda", 5.0, tools), list(script.JOBS), 1).model("124m")
    assert not {"certify", "verify_1", "verify_2"} & set(ours.asked)
    assert "check_outputs" in ours.asked


def test_a_missing_peer_is_not_run_and_another_version_neither(script, tmp_path):
    older = tmp_path / "older"
    (older / "invarlock-0.3.7.dist-info").mkdir(parents=True)
    (older / "invarlock-0.3.7.dist-info" / "METADATA").write_text("Name: invarlock\nVersion: 0.3.7\n")
    out, page = tmp_path / "rows.json", tmp_path / "page.md"
    page.write_text("<!-- speed on cpu: benchmarks/speed_peers.py --><!-- end -->", encoding="utf-8")
    peers = ["--peers-python", str(tmp_path / "python"), "--older-invarlock", str(older)]
    rows = ["--rows", "invarlock,invarlock_rmt,weightwatcher", "--models", "1b"]
    script.main(["--smoke", "--folder", str(tmp_path), "--out", str(out), "--docs", str(page), *peers, *rows])
    found = json.loads(out.read_text(encoding="utf-8"))["rows"]["1b"]
    assert found["weightwatcher"] == {"status": "not run", "reason": f"no environment at {tmp_path / 'python'}"}
    assert found["invarlock_check"]["status"] == "not run"
    assert found["rmt_check"] == {"status": "not run", "reason": f"{older} has invarlock 0.3.7"}
    assert cells(page.read_text(encoding="utf-8"), "`analyze()`")[1:] == ["", "", "", ""]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["older", "page.md", "rows.json"]  # no model was made


@pytest.mark.parametrize("model", [pytest.param("124m", marks=pytest.mark.slow), "1b"])
def test_our_rows_measure(script, model, monkeypatch, tmp_path):
    import speed_models
    import speed_rows

    from weightproof.judgement import assessment

    monkeypatch.setattr(speed_models, "CACHE", tmp_path)
    monkeypatch.setattr(assessment, "random_windows", assessment.random_windows)  # the row check_weights replaces it
    job = speed_rows.Job(replace(speed_models.SMOKE[model]), "cpu")
    assert speed_rows.folders(job) == {}
    tables = sys.modules["speed_tables"]
    ours = dict.fromkeys(line.job for line in tables.LINES if line.tool in {"", tables.OURS})
    last = sorted(ours, key="check_weights".__eq__)  # what it replaces stays replaced
    rows = {name: row for name in last for name, row in speed_rows.JOBS[name](job).items()}
    assert set(rows) == {line.name for line in tables.LINES if line.job in ours}
    assert all(row["seconds"] > 0 for row in rows.values())
    alike = {name for name, row in rows.items() if row.get("times", 1) == 2}
    assert alike == ({"svdvals", "spectra", "fits"} if model == "1b" else set())
    assert rows["read"]["bytes"] == sum(value.nbytes for _, value in speed_models.tensors(job.shape, "base"))
    assert rows["check_outputs"]["situation"] == "no_loss_outputs_pass_quiet"
    assert rows["check_weights"]["situation"] == "no_forward_weights_pass"


def test_the_older_guard_is_given_every_linear_map_of_a_llama(script, monkeypatch, tmp_path):
    import speed_models
    import speed_rows

    monkeypatch.setattr(speed_models, "CACHE", tmp_path)
    shape = replace(speed_models.SMOKE["1b"])
    speed_models.make(shape)
    block = speed_models.load_block(shape)
    linear = [module for module in block.modules() if hasattr(module, "in_features")]
    named = dict(speed_rows.named_as_gpt2(block).named_modules())
    read = [module for name, module in named.items() if name.endswith(tuple(speed_rows.AS_GPT2.values()))]
    assert len(read) == len(linear) == 7
    assert {id(module) for module in read} == {id(module) for module in linear}
    before = read[0].weight.detach().clone()
    speed_models.put_int8(block, shape, speed_models.BLOCK)
    assert not before.equal(read[0].weight)


@pytest.mark.slow
def test_every_row_runs(script, tmp_path):
    script.main(["--smoke", "--folder", str(tmp_path)])
    rows = json.loads((tmp_path / "smoke.json").read_text(encoding="utf-8"))["rows"]
    for model in script.MODELS:
        for line in sys.modules["speed_tables"].LINES:
            row = rows[model][line.name]
            if line.tool == "weightproof" or not line.tool:
                assert row["status"] == "measured", (model, line.name, row)
                assert row["seconds"] > 0
            elif row["status"] == "measured":
                assert row["seconds"] > 0
