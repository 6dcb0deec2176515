"""Numbers that README and pages quote are those of the committed results; commands and files that they name exist.

A claim is a piece of a page, made here from the result file as it stands: where either moves alone, the piece is no
longer on the page. Tables that a benchmark writes itself are made again by its own function. What has no committed
result (what a command prints) is no business of this file: docs/claims.md says which command shows it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"])
Claim = tuple[str, str]


@cache
def page(name: str) -> str:
    """A page with every run of white space as one blank: a sentence may wrap."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


@cache
def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))


@cache
def last_run(name: str) -> str:
    return (ROOT / "tests" / name).read_text(encoding="utf-8")


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"claims_of_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def bare(value: float, digits: int) -> str:
    """A number as the prose writes it: `.6` for 0.6."""
    return f"{value:.{digits}f}".removeprefix("0")


def kib(row: dict[str, Any]) -> str:
    return f"{row['quantized_bytes'] / 1024:,.0f} KiB"


# ---------------------------------------------------------------- what the pages say


def of_detection() -> Iterator[Claim]:
    found = json.loads((ROOT / "benchmarks" / "detection" / "results.json").read_text(encoding="utf-8"))

    def of(one: dict[str, Any], *, interval: bool = True) -> str:
        low, high = (f"{100 * one[end]:.1f}".removesuffix(".0") for end in ("lower", "upper"))
        return f"{one['hits']} of {one['of']}" + (f" [{low} %, {high} %]" if interval else "")

    for row, name in (("everything, with data", "all"), ("weights and outputs, no loss", "outputs")):
        choice = found["choices"][name]
        yield "README.md", f"| {row} | {of(choice['tpr'])} | {of(choice['fpr'])} |"
    alone = {name: of(one["tpr"], interval=False) for name, one in found["weights_alone"].items()}
    assert all(one["fpr"]["hits"] == 0 for one in found["weights_alone"].values())
    yield "README.md", f"nothing benign flagged | declared {alone['declared']}, undeclared {alone['undeclared']} | 0 |"
    preserving = found["choices"]["all"]["false_alarms_preserving"]
    assert preserving["hits"] == 0
    yield "README.md", f"None of the {preserving['of']} edits that preserve the function"
    yield "README.md", f"{of(found['localisation']['undeclared']['top1_block'], interval=False)} faults of one block"
    edits = sum(sum(counts.values()) for counts in found["models"].values())
    yield "README.md", f"{edits:,} edits of six small trained models"


def of_speed_peers() -> Iterator[Claim]:
    rows = result("speed_peers")["rows"]["124m"]
    took = {name: f"{rows[name]['processor_seconds']:.1f} s" for name in rows if "processor_seconds" in rows[name]}
    yield "README.md", f"takes {took['check_weights']} of the processor without a forward pass"
    yield "README.md", f"and {took['check_outputs']} with outputs, the baseline {took['baseline']} once"
    yield "README.md", f"guards take {took['invarlock_check']} to check, `svdvals` of every matrix {took['svdvals']}"


def of_planner() -> Iterator[Claim]:
    rows: dict[float, list[dict[str, Any]]] = {}
    for row in result("planner")["budgets"]:
        rows.setdefault(row["budget"], []).append(row)
    for budget, group in rows.items():
        plan, *widths = group
        kept = [row for row in widths if row["accepted"]]
        best = min(kept, key=lambda row: row["quantized_bytes"])
        int8 = next(row for row in widths if row["plan"].startswith("int8"))
        assert plan["accepted"]
        if budget != 1.02:  # the short table of the README leaves one out
            name = best["plan"].removesuffix(" for all")
            yield "README.md", f"| {budget:g} | {kib(plan)} | {name}, {kib(best)} | {kib(int8)} |"
        saved = 100 * (1 - plan["quantized_bytes"] / best["quantized_bytes"])
        yield "docs/planner.md", f"{saved:.1f} % at {budget:g}" if saved < 5 else f"{saved:.0f} %"
    for row in result("planner")["budgets"]:
        ends = f"{row['ratio']:.4f} [{row['lower']:.4f}, {row['upper']:.4f}]"
        truth = f"{math.exp(row['truth_nats']):.4f} ± {row['truth_half_interval']:.4f}"
        accepted = ("yes" if row["accepted"] else "no") + (f", {row['rounds']} rounds" if "rounds" in row else "")
        yield "docs/planner.md", f"| {kib(row)} | {row['bits_per_weight']:.2f} | {ends} | {accepted} | {truth} |"
    for row in result("planner")["sizes"]:
        yield "docs/planner.md", f"{row['truth_nats']:.4f} ± {row['truth_half_interval']:.4f}"
    sizes = {(row["plan"], row["size"]): row["truth_nats"] for row in result("planner")["sizes"]}
    ours = "planner (measured KL)"
    narrow = sorted({size for plan, size in sizes if plan == ours})[:3]
    by_norm = [sizes["squared Frobenius error", size] / sizes[ours, size] for size in narrow]
    yield "README.md", f"costs {min(by_norm):.1f} to {max(by_norm):.1f} times as much loss on unseen text at equal size"
    order = [
        sizes[f"layer order, {end} layers narrow", s] / sizes[ours, s] for s in narrow for end in ("first", "last")
    ]
    yield "README.md", f"in layer order up to {max(order):.0f} times"


def of_health() -> Iterator[Claim]:
    found = result("health")
    share = found["share_of_training_percent"]
    yield "README.md", f"it costs {bare(share, 1)} % of a training by default"
    yield "docs/health.md", f"that is {share:.2f} % of the training"
    seconds = f"({found['report_ms'] / 1000:.1f} s against {found['step_ms'] / 1000:.2f} s of one core"
    yield "docs/health.md", seconds
    yield "docs/health.md", f"{found['report_in_steps']:.1f} training steps of {found['tokens_of_a_step']} tokens"


def of_distributed() -> Iterator[Claim]:
    rows = {
        ("exact", "replicated"): "exact check, replicated (DDP)",
        ("exact", "rows"): "exact check, rows sharded (FSDP2)",
        ("int8", "replicated"): "whole int8 transaction, replicated",
        ("int8", "rows"): "whole int8 transaction, rows sharded",
    }
    for (what, cut), words in rows.items():
        found = result("distributed")["scaling"][what][cut]
        yield "docs/scaling.md", f"| {words} | {found['ratio_wall']:.2f} | {found['ratio_cpu']:.2f} |"
    for row in result("distributed")["memory"]:
        allowed = f"{row['allowed_bytes'] / 2**20:.0f} MiB"
        numbers = f"{allowed} | {row['exact']:.3f} | {row['int8']:.3f} |"
        yield "docs/scaling.md", f"| {row['cut']} | {row['matrix']} | {numbers}"
    assert all(
        row["ratio"] == pytest.approx(1.0, abs=0.02) or row["ratio"] < 1 for row in result("distributed")["bytes"]
    )


def of_rolling() -> Iterator[Claim]:
    runs = [result("rolling")[name] for name in ("demo", "124m")]
    shares = " | ".join(f"{run['gradient_norm_percent']:.2f} %" for run in runs)
    yield "docs/rolling.md", f"| gradient norm at every step | {shares} |"
    states = [[run["rollback"][how]["good_state_share_percent"] for how in ("full", "weights")] for run in runs]
    cells = " | ".join(f"{full:.2f} % ({weights:.2f} %)" for full, weights in states)
    yield "docs/rolling.md", f'| good state in memory, `"full"` (`"weights"`) | {cells} |'
    checks = [sorted(run["rollback"][how]["screen_share_percent"] for how in ("full", "weights")) for run in runs]
    spans = " | ".join(f"{low:.1f} to {high:.1f} %" for low, high in checks)
    yield "docs/rolling.md", f"| check, with everything that it reads | {spans} |"
    speeds = " | ".join(f"{run['copies']['good_state_GB_per_s']:.2f}" for run in runs)
    yield "docs/rolling.md", f"| its copies, in GB/s | {speeds} |"


def of_speed() -> Iterator[Claim]:
    cost, decisions = result("speed")["cost"], result("speed")["decisions"]
    ladder = cost["ladder_int8_limit_.10"]
    times = round(ladder["svdvals_over_this"] / 10) * 10
    exact = cost["exact_spectra"]["svdvals_over_this"]
    yield "README.md", f"costs {ladder['in_reads']:.1f} reads of the weights, {times} times less than `svdvals`"
    yield "README.md", f"exact spectra of everything {exact:.1f} times less"
    assert decisions["wrong_side_of_the_limit"] == 0
    yield "README.md", f"no wrong decision in {decisions['cases']} cases"


def of_snapshots() -> Iterator[Claim]:
    words = {
        "memcpy": "copy in memory",
        "digests": "digests (two threads)",
        "write and fsync": "the same bytes to one file, fsync, nothing proven",
    }
    for name, row in result("snapshots")["rows"].items():
        rate = f"{row['GB/s']:g}" if row["GB/s"] != 1 else "1.0"
        numbers = f"{1000 * row['seconds']:.0f} | {rate} | {row['memcpys']:.1f} |"
        yield "docs/snapshots.md", f"| {words.get(name, name)} | {numbers}"
    for line in last_run("faults/last_run.txt").splitlines():
        if found := re.match(r" *(\d+) +(\d+) +\d+  SIGKILL at a random time", line):
            done, good = (f"{int(number):,}" for number in found.groups())
            yield "docs/snapshots.md", f"or the next; exact | {good} of {done} |"
        if found := re.match(r" *(\d+) +(\d+) +\d+  power lost before every call of a save and after it", line):
            done, good = (f"{int(number):,}" for number in found.groups())
            yield "docs/snapshots.md", f"new once save returned | {good} of {done} |"


def of_edits() -> Iterator[Claim]:
    for name, row in result("edits")["rows"].items():
        yield "docs/edits.md", f"| {name} | {row['ms']:g} | {row['reads']:g} |"


def of_candidates() -> Iterator[Claim]:
    for name, row in result("candidates")["jobs"].items():
        seconds = "0.004" if row["cpu_seconds"] < 0.01 else f"{row['cpu_seconds']:#.3g}"
        yield "docs/deltas.md", f"| {name} | {seconds} s | {row['added_mib']:.0f} MiB |"


def of_curvature() -> Iterator[Claim]:
    edits = [one for one in result("curvature")["edits"] if one["predicted"]["curvature"] < 0.1]
    ratios = [one["kl"] / one["predicted"]["curvature"] for one in edits]
    close = sum(3 / 4 <= ratio <= 4 / 3 for ratio in ratios)
    double = sum(0.5 <= ratio <= 2 for ratio in ratios)
    mask = result("factors")["mask"]["ms"].values()
    assert 5 < statistics.mean(mask) < 15  # "about 10 ms"
    yield (
        "docs/kfac.md",
        f"Of the {len(edits)} edits predicted below .1 nats {close} were off by less than a third and {double} by less",
    )


def of_kronfluence() -> Iterator[Claim]:
    lines = last_run("kronfluence/last_run.txt").splitlines()
    worst = {
        dtype: max(float(line.split()[-1]) for line in lines if f"[{dtype}-" in line and "difference" in line)
        for dtype in ("float32", "float64")
    }
    text = [re.sub(r"e-0?(\d+)", r"e-\1", f"{worst[dtype]:.1e}") for dtype in worst]
    yield "docs/kfac.md", f"differ by at most {text[0]} (float32) and {text[1]} (float64)"


def of_coverage() -> Iterator[Claim]:
    shares = [f"{100 * row['false_accepts']:.1f}" for row in result("coverage")["rare_harm"][1:4]]
    yield "docs/guards/loss.md", f"wrongly in {shares[0]}, {shares[1]} or {shares[2]} % of its runs"


def of_certify() -> Iterator[Claim]:
    found = result("certify")
    for name, words in (("int8", "int8, 112 of 114 matrices"), ("one_layer", "one layer, 7 of 114 matrices")):
        row = found[name]
        peak = row["peak_gib_above_import"]
        memory = f"{peak:.2f} GiB ({peak / found['largest_tensor_gib']:.1f} largest tensors)"
        reads = f"{row['in_reads_from_disk']} | {row['in_reads_from_page_cache']} | {row['in_hashes']} |"
        yield "benchmarks/README.md", f"| {words} | {memory} | {row['seconds']} | {reads}"


def of_factors() -> Iterator[Claim]:
    for name, row in result("factors")["fit"].items():
        yield "docs/kfac.md", f"| {name} | {row['s']:.1f} | {row['ratio']:.2f} |"


def of_equal_size() -> Iterator[Claim]:
    rows = {(row["model"], row["average"], row["predictor"]): row["truth_nats"] for row in result("equal_size")["rows"]}
    by_norm = sorted(
        loss / rows[model, average, "squared Frobenius error"]
        for (model, average, predictor), loss in rows.items()
        if predictor == "curvature"
    )
    middle, low, high = (bare(value, 2) for value in (statistics.median(by_norm), by_norm[0], by_norm[-1]))
    yield "docs/planner.md", f"the loss is about half (median {middle}, from {low} to {high})"


SOURCES = (
    of_detection, of_speed_peers, of_planner, of_health, of_distributed, of_rolling, of_speed, of_snapshots, of_edits,
    of_candidates, of_curvature, of_kronfluence, of_coverage, of_certify, of_factors, of_equal_size,
)  # fmt: skip


@pytest.mark.parametrize("source", SOURCES, ids=lambda one: one.__name__.removeprefix("of_"))
def test_pages_say_what_was_measured(source):
    claims = list(source())
    assert claims
    missing = [f"{name}: {words}" for name, words in claims if " ".join(words.split()) not in page(name)]
    assert not missing, "not on the page any more, or not what the committed result says:\n" + "\n".join(missing)


def test_a_number_that_drifts_is_found(monkeypatch):
    drifted = json.loads(json.dumps(result("health")))
    drifted["share_of_training_percent"] *= 1.5
    monkeypatch.setattr(sys.modules[__name__], "result", lambda _: drifted)
    assert any(" ".join(words.split()) not in page(name) for name, words in of_health())


def test_tables_between_marks_are_those_of_the_benchmarks():
    coverage = benchmark("coverage")
    text = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    assert coverage.with_tables(text, coverage.tables(result("coverage"))) == text


# ---------------------------------------------------------------- what the pages name


def test_the_outputs_of_edits_are_those_of_the_last_run():
    module = benchmark("edit_outputs")
    text = (ROOT / "docs" / "edits.md").read_text(encoding="utf-8")
    assert module.BEGIN in text
    assert module.with_table(text, result("edit_outputs")) == text


def test_every_make_target_that_a_page_names_exists():
    rules = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        (path.name, target)
        for path in PAGES
        for target in re.findall(r"`make ([a-z-]+)|^\$ make ([a-z-]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        for target in target
        if target
    }
    assert named
    assert not {(name, target) for name, target in named if target not in rules}


def test_every_file_and_test_that_a_page_names_exists():
    """A result that was not measured yet (a GPU's, say) must at least be what a benchmark writes."""
    writers = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").rglob("*.py"))
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    missing = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        missing += [
            f"{path.name}: {name}"
            for name in re.findall(r"\b((?:tests|benchmarks|examples|recipes)/[\w./-]+\.(?:py|json|txt|yaml))\b", text)
            if not (ROOT / name).exists()
            and path.name != "comparison.md"  # paths in other repositories
            and not (name.endswith(".json") and Path(name).stem.removesuffix("_cuda") in writers)
        ]
        missing += [
            f"{path.name}: {name}" for name in re.findall(r"\b(test_\w{12,})`", text) if f"def {name}(" not in tests
        ]
    assert not missing, "\n".join(missing)


PINNED = {  # what docs/comparison.md calls a tool -> its pin, and the file that has it
    "invarlock 0.12.1": ("invarlock==0.12.1", "Makefile"),
    "weightwatcher 0.7.7": ("weightwatcher==0.7.7", "Makefile"),
    "kronfluence 1.0.1": ("kronfluence==1.0.1", "tests/kronfluence/constraints.txt"),
    "Version 0.2.7": ("optimum-quanto==0.2.7", "tests/quantizers/constraints.txt"),
    "Version 0.14.0.1": ("llmcompressor==0.14.0.1", "tests/llm_compressor/constraints.txt"),
    "Version 0.21.2": ("peft==0.21.2", "constraints.txt"),
}


@pytest.mark.parametrize("words", PINNED)
def test_versions_that_are_compared_are_those_that_are_run(words):
    pin, file = PINNED[words]
    assert words in page("docs/comparison.md")
    assert pin in (ROOT / file).read_text(encoding="utf-8")


def test_the_page_of_claims_names_a_command_in_every_row():
    text = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| claim"))]
    assert len(rows) >= 40
    shown = re.compile(r"`(make |python |weightproof |tests/|test_|PYTHONPATH=)")
    assert not [row for row in rows if not shown.search(row.split(" | ")[-2] + row.split(" | ")[-1])]
