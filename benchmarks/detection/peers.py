"""The same edits, judged by two other tools with their own thresholds: invarlock 0.12.1 and weightwatcher 0.7.7.

Run by the environment that has them (`make benchmark-detection-peers`), one row a case in
`.cache/detection/peers-<model>.jsonl`, resumable; `run.py --score` puts them beside ours, and says "not run" without.

**invarlock**: its four guards in its order (invariants, spectral, rmt, variance), from its registry, by its own two
functions for that (`prepare_guards_phase` on the untouched model, the edit in place, `guard_phase`), with the policy
of its tier `balanced` and its profile `ci`, its adapter for the model's kind, and our retain windows in its own form of
calibration data. Its runner calls no `after_edit` (`validate` measures), and so do we not: `CoreRunner.execute` around
the same edits gives every guard the same outcome (tried on five edits of each architecture). A guard "warns" where it
passes and says "monitor", and is "unsupported" where it says so itself (its runner would take that for a failure; here
it is neither a find nor a false alarm). An exception is an error: neither a find nor a pass. It also has a limit on the
ratio of perplexities (`ratio`, from the same tier); that ratio is taken here by us, on all retain windows and without
its floor of 50,000 tokens, in its favour. Its guard spectral fails bert-0 untouched, in its own runner too:
the MLPs of BERT are of its family "other", of which the tier's limit on z is 0. So the tables show its figures also
without the models that it fails untouched.
Not driven: its comparison of reports (`evaluate`), its retries and its rollback. It is written for Python 3.12 and
pretrained models of the sizes in use; here it judges models of 0.5 M parameters, as everything does in this benchmark.

**weightwatcher**: `analyze()` as it comes, before and after; the mean and the largest change of alpha over the layers
that have one before and after. It has no threshold for a change. Layers of fewer than `min_evals` eigenvalues have no
alpha, and a power law fitted to 96 eigenvalues is a rough one: `layers` says how many were fitted, of how many.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import io
import json
import logging
import math
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "support"))  # the weight edits that the tests use, too

import torch  # noqa: E402
from catalogue import Case, catalogue  # noqa: E402
from detection_models import ARCHITECTURES, CACHE, Recipe, Trained, load, num_scored, token_losses  # noqa: E402
from measure import VERSION, joined, planned, rows_of  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402
from writes import Write  # noqa: E402

GUARDS = ("invariants", "spectral", "rmt", "variance")
TIER = "balanced"
VERSIONS = {"invarlock": "0.12.1", "weightwatcher": "0.7.7"}
Alphas = dict[str, float]


def peers_path(recipe: Recipe) -> Path:
    """Where the rows of one model are kept."""
    return CACHE / f"peers-{recipe.folder.name}.jsonl"


def installed() -> dict[str, bool]:
    """Which of the peers this environment has, in the version that the tables name."""
    found: dict[str, bool] = {}
    for name, wanted in VERSIONS.items():
        try:
            found[name] = importlib.metadata.version(name) == wanted
        except importlib.metadata.PackageNotFoundError:
            found[name] = False
    return found


def write_of(trained: Trained, case: Case) -> Write:
    """What the case does to a model, as measure.py does it."""
    return case.write or planned(trained, case.edit, trained.retain)


def attempt(action: Callable[[], Any]) -> tuple[Any, str | None, float]:
    """What it returns, what it raised as text, and its seconds. Whatever another tool raises is a finding of a row."""
    started = time.perf_counter()
    result, error = None, None
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = action()
    except Exception as raised:  # noqa: BLE001 - recorded in the row as an error
        error = f"error: {type(raised).__name__}: {str(raised)[:300]}"
    return result, error, round(time.perf_counter() - started, 4)


# ---------------------------------------------------------------- invarlock


class Invarlock:
    """Its guards around one edit of one model."""

    def __init__(self, trained: Trained) -> None:
        from invarlock.core.auto_tuning import resolve_tier_policies
        from invarlock.core.registry import get_registry

        self.trained = trained
        self.registry = get_registry()
        self.masked = trained.recipe.architecture == "bert"
        self.adapter = self.registry.get_adapter("hf_mlm" if self.masked else "hf_causal")
        limits = resolve_tier_policies(TIER)["metrics"]["pm_ratio"]
        self.limit = float(limits["ratio_limit_base"]) + float(limits["hysteresis_ratio"])
        self.windows = [self._window(index, row) for index, row in enumerate(trained.retain)]
        self.given = joined(trained.retain)
        self.loss_before = self._loss(trained.model)

    def _window(self, index: int, row: dict[str, torch.Tensor]) -> dict[str, Any]:
        ids = row["input_ids"][0].tolist()
        window: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids), "window_id": f"preview::{index}"}
        if self.masked:
            labels = row["labels"][0].tolist()
            window |= {"labels": labels, "mlm_masked": sum(label != -100 for label in labels)}
        return window

    @torch.no_grad()
    def _loss(self, model: nn.Module) -> float:
        architecture = self.trained.recipe.architecture
        total = sum(float(token_losses(model, batch, architecture).double().sum()) for batch in self.given)
        return total / sum(int(num_scored(batch, architecture).sum()) for batch in self.given)

    def _ratio(self, model: nn.Module) -> dict[str, Any]:
        rise, error, seconds = attempt(lambda: self._loss(model) - self.loss_before)
        if error is not None:
            return {"outcome": error, "seconds": seconds}
        within = math.isfinite(rise) and rise <= math.log(self.limit)
        return {"outcome": "pass" if within else "fail", "log_ratio": _finite(rise), "seconds": seconds}

    def judge(self, name: str, write: Write, generator: torch.Generator) -> dict[str, Any]:
        """Every guard's outcome: prepared before the edit, asked after it."""
        from invarlock.core.api import RunReport

        model = copy.deepcopy(self.trained.model)
        report = RunReport()
        report.context = {"profile": "ci", "auto": {"tier": TIER, "enabled": True}}
        guards = {guard: self.registry.get_guard(guard) for guard in GUARDS}
        prepared = {guard: self._prepare(model, guards[guard], report) for guard in GUARDS}
        with torch.no_grad():
            write(model, generator)
        report.edit = {"name": name}
        ratio = self._ratio(model)  # before the guards: that of variance may scale a matrix
        found = {guard: self._ask(model, guards[guard], report, *prepared[guard]) for guard in GUARDS}
        return found | {"ratio": ratio}

    def _prepare(self, model: nn.Module, guard: Any, report: Any) -> tuple[str | None, float]:
        from invarlock.core.runner import CoreRunner
        from invarlock.core.runner_guards import prepare_guards_phase

        auto = report.context["auto"]
        _, error, seconds = attempt(
            lambda: prepare_guards_phase(CoreRunner(), model, self.adapter, [guard], self.windows, report, auto)
        )
        return error, seconds

    def _ask(self, model: nn.Module, guard: Any, report: Any, error: str | None, prepare: float) -> dict[str, Any]:
        from invarlock.core.runner import CoreRunner
        from invarlock.core.runner_guards import guard_phase

        if error is not None:
            return {"outcome": error, "prepare_seconds": prepare, "seconds": 0.0}
        answer, error, seconds = attempt(lambda: guard_phase(CoreRunner(), model, self.adapter, [guard], report))
        outcome = error or outcome_of(answer[guard.name])
        said = [] if error else [str(one.get("message", one)) for one in answer[guard.name]["violations"]]
        return {"outcome": outcome, "said": said[:3], "prepare_seconds": prepare, "seconds": seconds}


def outcome_of(result: dict[str, Any]) -> str:
    """pass, warn, fail, or unsupported, of one of its results."""
    if result.get("supported") is False:
        return "unsupported"
    if not result["passed"]:
        return "fail"
    return "warn" if result["decision"] == "monitor" else "pass"


# ---------------------------------------------------------------- weightwatcher


def alphas(model: nn.Module) -> Alphas:
    """Alpha of each layer that weightwatcher reports, NaN where it has none."""
    import weightwatcher

    logging.getLogger("weightwatcher").setLevel(logging.CRITICAL)
    details = weightwatcher.WeightWatcher(model=model).analyze(model=model)
    names = details["longname"] if "longname" in details else details["name"]
    values = details["alpha"] if "alpha" in details else [math.nan] * len(details)
    return {str(name): float(value) for name, value in zip(names, values, strict=True)}


def _defined(value: float) -> bool:
    return math.isfinite(value) and value > 0  # a fit that failed is -1 there


def alpha_shift(before: Alphas, after: Alphas) -> dict[str, Any]:
    """Mean and largest change of alpha over the layers that have one before and after; None where no layer has."""
    both = [name for name in before if _defined(before[name]) and _defined(after.get(name, math.nan))]
    shifts = {name: abs(after[name] - before[name]) for name in both}
    return {
        "mean": sum(shifts.values()) / len(shifts) if shifts else None,
        "largest": max(shifts.values(), default=None),
        "layers": len(both),
        "of": len(before),
    }


class Weightwatcher:
    """Alpha of the layers before and after."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.before, self.error, self.baseline_seconds = attempt(lambda: alphas(trained.model))

    def judge(self, name: str, write: Write, generator: torch.Generator) -> dict[str, Any]:
        """The shift of alpha."""
        if self.error is not None:
            return {"outcome": self.error, "seconds": 0.0}
        model = copy.deepcopy(self.trained.model)
        with torch.no_grad():
            write(model, generator)
        after, error, seconds = attempt(lambda: alphas(model))
        shift = {} if error else alpha_shift(self.before, after)
        return {"outcome": error or "measured", **shift, "seconds": seconds}


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # the rows are JSON


# ---------------------------------------------------------------- all cases

TOOLS: dict[str, Any] = {"invarlock": Invarlock, "weightwatcher": Weightwatcher}


class Bench:
    """One model with the tools that are prepared for it, and the file of its rows."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.path = peers_path(recipe)
        self.done = {row["case"]: row for row in rows_of(self.path)}
        self.path.write_text("".join(f"{json.dumps(row)}\n" for row in self.done.values()), encoding="utf-8")
        self.trained = load(recipe)
        self.tools = {name: tool(self.trained) for name, tool in TOOLS.items()}

    def missing(self) -> list[Case]:
        """Cases that have no row yet."""
        return [case for case in catalogue(self.trained) if case.name not in self.done]

    def judge(self, case: Case) -> None:
        """Make the row of one case."""
        write = write_of(self.trained, case)
        row: dict[str, Any] = {"version": VERSION, "model": self.recipe.name, "case": case.name}
        row |= {name: tool.judge(case.name, write, case.generator()) for name, tool in self.tools.items()}
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")


def judge_all(benches: Sequence[Bench], wanted: Callable[[Case], bool]) -> None:
    """Every wanted case that has no row yet; in an order of its own, so that an interrupted run is a fair sample."""
    waiting = [(bench, case) for bench in benches for case in bench.missing() if wanted(case)]
    waiting.sort(key=lambda one: zlib.crc32(one[1].name.encode()))
    for bench, case in tqdm(waiting, desc="peers", unit="edit", mininterval=10.0):
        bench.judge(case)


def recipes(wanted: str) -> Iterator[Recipe]:
    """The models asked for, all by default."""
    for seed in (0, 1):
        for architecture in ARCHITECTURES:
            recipe = Recipe(architecture, seed)
            if not wanted or recipe.name in wanted.split(","):
                yield recipe


def main() -> None:
    """Judge what has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="names such as llama-0, separated by commas")
    parser.add_argument("--cases", default="", help="only the cases of these names, separated by semicolons")
    given = parser.parse_args()
    if missing := [f"{name} {VERSIONS[name]}" for name, there in installed().items() if not there]:
        raise SystemExit(f"{' and '.join(missing)} not installed here: run `make benchmark-detection-peers`")
    names = {name.strip() for name in given.cases.split(";") if name.strip()}
    judge_all([Bench(recipe) for recipe in recipes(given.models)], lambda case: not names or case.name in names)


if __name__ == "__main__":
    main()
