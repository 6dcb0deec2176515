"""Every case of one model, measured: what it truly does, and what each guard says; a row for each.

Truth is the paired change of the loss on windows that no guard sees, with a bootstrap over files; for edits that
preserve the function also the largest change of a logit. The guard is a session as a user has it, with retain windows.
From its verdicts the decision is made again with fewer guards, by the same pure function: that is the ablation.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from catalogue import Case, Write, catalogue
from detection_models import CACHE, Recipe, Trained, load, num_scored, token_losses
from torch import nn
from tqdm import tqdm

from weightproof import GuardSession, load_policy
from weightproof.folders.jsonable import json_digest
from weightproof.judgement.situations import gather, situation_of
from weightproof.registry import load_plugin, plugins
from weightproof.types import Outcome, Verdict

Batch = dict[str, torch.Tensor]
# Tiers whose verdicts a decision may use: weights alone, outputs as well, the loss as well.
TIERS = {"weights": ("T0", "T1"), "outputs": ("T0", "T1", "T2"), "all": ("T0", "T1", "T2", "T3")}
# Statistics of weights that are averaged over the model, too.
AVERAGED = {
    "circuits/relative_distance",
    "circuits/log_size_ratio",
    "spectral/log_spectral_norm_ratio",
    "spectral/log_stable_rank_ratio",
    "rmt/num_spikes",
}
# Guards whose word without the others is of interest.
ALONE = (("invariants",), ("invariants", "circuits"))
TIER = "balanced"
REPLICATES = 2000
VERSION = 1


@dataclass(frozen=True)
class Truth:
    """Change of the held-out loss in nats per token, and its 95 % interval over files."""

    delta: float
    lower: float
    upper: float
    max_logit: float | None


def joined(rows: Sequence[Batch]) -> list[Batch]:
    """Windows of one row put together, a few tens a batch."""
    chunks = [rows[start : start + 32] for start in range(0, len(rows), 32)]
    return [{key: torch.cat([row[key] for row in chunk]) for key in chunk[0]} for chunk in chunks]


def guards_by_tier() -> dict[str, str]:
    """Tier of every registered guard."""
    return {name: load_plugin("weightproof.guards", name).tier for name in plugins("weightproof.guards")}


class Judge:
    """What no guard sees: the losses of the held-out windows before any edit, and after one."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        architecture = trained.recipe.architecture
        self.weights = torch.cat([num_scored(batch, architecture) for batch in trained.truth]).double().numpy()
        self.before = self._losses(trained.model, trained.truth)
        self.given = joined(trained.retain)
        self.given_weights = torch.cat([num_scored(batch, architecture) for batch in self.given]).double().numpy()
        self.given_before = self._losses(trained.model, self.given) / self.given_weights
        self.logits = self._logits(trained.model)
        documents = np.asarray(trained.documents)  # a file is what is exchangeable
        self.groups = [np.flatnonzero(documents == one) for one in np.unique(documents)]

    @torch.no_grad()
    def _losses(self, model: nn.Module, batches: Sequence[Batch]) -> np.ndarray:
        architecture = self.trained.recipe.architecture
        return torch.cat([token_losses(model, batch, architecture).sum(dim=1) for batch in batches]).double().numpy()

    def simple_scores(self, model: nn.Module) -> dict[str, float]:
        """What simpler tools decide by, on the windows that the guard has: a point, and z as if unpaired."""
        after = self._losses(model, self.given) / self.given_weights
        finite = bool(np.isfinite(after).all()) and all(bool(p.isfinite().all()) for p in model.parameters())
        if not finite:
            return {"simple/not finite": 1.0, "simple/point": math.inf, "simple/unpaired z": math.inf}
        rise = float(after.mean() - self.given_before.mean())
        spread = math.sqrt((after.var(ddof=1) + self.given_before.var(ddof=1)) / len(after))
        return {"simple/not finite": 0.0, "simple/point": rise, "simple/unpaired z": rise / spread}

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> torch.Tensor:
        return model(input_ids=self.trained.truth[0]["input_ids"]).logits.float()

    def judge(self, model: nn.Module, *, logits: bool) -> Truth:
        """The truth about an edited model."""
        after = self._losses(model, self.trained.truth)
        largest = float((self._logits(model) - self.logits).abs().max()) if logits else None
        if not np.isfinite(after).all():
            return Truth(math.inf, math.inf, math.inf, largest)
        change = np.asarray([(after - self.before)[rows].sum() for rows in self.groups])
        tokens = np.asarray([self.weights[rows].sum() for rows in self.groups])
        drawn = np.random.default_rng(0).integers(0, len(tokens), size=(REPLICATES, len(tokens)))
        ratios = change[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
        lower, upper = np.quantile(ratios, (0.025, 0.975))
        return Truth(float(change.sum() / tokens.sum()), float(lower), float(upper), largest)


def situations(verdicts: Sequence[Verdict], tiers: dict[str, str], kind: str) -> dict[str, str]:
    """What a policy would be asked to act on, for each choice of guards: by tier, and all but one."""
    choices = {name: [v for v in verdicts if tiers[v.guard] in kept] for name, kept in TIERS.items()}
    choices |= {f"all without {left}": [v for v in verdicts if v.guard != left] for left in sorted(tiers)}
    choices |= {" and ".join(kept): [v for v in verdicts if v.guard in kept] for kept in ALONE}
    return {
        name: situation_of(gather(chosen, tiers), (), training=kind == "train")[0] for name, chosen in choices.items()
    }


def statistics(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Of each statistic the value furthest from no change over all its targets; inf where it is not finite.

    Beside it the root mean square over all targets, and of the divergence each kind of window by itself.
    """
    found: dict[str, float] = {}
    sizes: dict[str, list[float]] = {}
    for verdict in verdicts:
        for one in verdict.measurements:
            key = f"{one.guard}/{one.statistic}"
            size = _size(one.value, one.reference, one.statistic)
            if size is not None:
                found[key] = max(found.get(key, 0.0), size)
                sizes.setdefault(key, []).append(size)
                if one.guard == "divergence":
                    found[f"{key}, {one.target}"] = size
        beyond = [one for one in verdict.measurements if one.outcome is not Outcome.PASS]
        found[f"{verdict.guard}/share raised"] = len(beyond) / max(1, len(verdict.measurements))
    for key in AVERAGED & sizes.keys():
        found[f"{key}, rms"] = math.sqrt(sum(size * size for size in sizes[key]) / len(sizes[key]))
    return found


def _size(value: float | None, reference: float | None, statistic: str) -> float | None:
    if value is None:
        return None
    if not math.isfinite(value):
        return math.inf
    if statistic.startswith(("log_", "relative_")) or reference is None:
        return abs(value)
    if value > 0 and reference > 0:
        return abs(math.log(value / reference))
    return abs(value - reference)


def blamed_blocks(step: Any) -> list[int]:
    """Blocks by how far each is off when it is fed what it was fed before, worst first."""
    found: dict[int, float] = {}
    for reading in step.divergence:
        for one in reading.blocks:
            number = next((int(part) for part in one.block.split(".") if part.isdigit()), None)
            if number is not None:
                error = one.relative_error if math.isfinite(one.relative_error) else math.inf
                found[number] = max(found.get(number, 0.0), error)
    return sorted(found, key=lambda block: -found[block])


class Untouched:
    """What a session knows of the model before any edit: the same for every case, read once."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self._session = GuardSession(trained.model, policy=TIER, retain=trained.retain)
        self._session.guarded.assessor.capture_losses()
        self.limits = what_decides()

    def session(self, model: nn.Module) -> GuardSession:
        """A session on a copy of the model."""
        begun = GuardSession(model, policy=TIER, retain=self.trained.retain, baseline=self._session.baseline)
        begun.guarded.assessor.loss.adopt(self._session.guarded.assessor.loss)
        return begun

    def close(self) -> None:
        """End the session on the untouched model."""
        self._session.close()


def measure(case: Case, judge: Judge, untouched: Untouched, tiers: dict[str, str]) -> dict[str, Any]:
    """One row: the session only watches, so that the edited model is there for the truth."""
    trained = untouched.trained
    model = copy.deepcopy(trained.model)
    write = case.write or (planned(trained, case.edit) if case.kind is None else None)
    session = untouched.session(model)
    try:
        started = time.perf_counter()
        step = _edited(session, case, write)
        seconds = time.perf_counter() - started
        truth = judge.judge(model, logits=case.preserving)
        simple = judge.simple_scores(model)
    finally:
        session.close()
    assert step.decision is not None
    return {
        "version": VERSION,
        "policy": untouched.limits,
        "model": trained.recipe.name,
        "case": case.name,
        "group": case.group,
        "declared": case.kind is not None,
        "broken": "broken" in case.tags,
        "preserving": case.preserving,
        "block": case.block,
        "truth": asdict(truth),
        "outcomes": {verdict.guard: str(verdict.outcome) for verdict in step.verdicts},
        "action": str(step.decision.action),
        "situations": situations(step.verdicts, tiers, step.kind.name),
        "statistics": statistics(step.verdicts) | simple,
        "blamed": blamed_blocks(step),
        "seconds": round(seconds, 4),
        "check_seconds": round(step.seconds, 4),
    }


def _edited(session: GuardSession, case: Case, write: Write | None) -> Any:
    if write is None:
        return session.apply(case.edit, on_violation="monitor")
    given = {} if case.kind is None else {"kind": case.kind}
    with session.edit(case.name, on_violation="monitor", **given) as step, torch.no_grad():
        write(session.model, case.generator())
    return step


def planned(trained: Trained, edit: Any, retain: Sequence[Batch] | None = None) -> Write:
    """One of our own edits as a plain write: what it makes of a copy, without telling what it is."""
    scratch = copy.deepcopy(trained.model)
    session = GuardSession(scratch, policy=TIER, retain=retain)
    session.apply(edit, on_violation="monitor")
    session.close()
    values = dict(scratch.named_parameters())

    def write(model: nn.Module, generator: torch.Generator) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])

    return write


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows that were made, an unfinished last line apart."""
    found: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return [row for row in found if row["version"] == VERSION]


def what_decides() -> str:
    """Digest of the tier's limits and actions, without the words about where they come from."""
    policy = load_policy(TIER)
    return json_digest({"limits": policy.limits, "actions": policy.actions, "required": policy.required})


def current_rows(recipe: Recipe) -> list[dict[str, Any]]:
    """Our rows of one model that were made under the limits that the tier has now: others are made again."""
    digest = what_decides()
    return [row for row in rows_of(CACHE / f"rows-{recipe.folder.name}.jsonl") if row.get("policy") == digest]


def measure_all(recipe: Recipe, only: str = "") -> None:
    """Every case of one model that has no row yet; what is done is kept when this is interrupted."""
    path = CACHE / f"rows-{recipe.folder.name}.jsonl"
    done = {row["case"]: row for row in current_rows(recipe)}
    trained = load(recipe)
    judge, tiers = Judge(trained), guards_by_tier()
    untouched = Untouched(trained)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in done.values()), encoding="utf-8")
    cases = [case for case in catalogue(trained) if case.name not in done and only in case.name]
    with path.open("a", encoding="utf-8") as out:
        for case in tqdm(cases, desc=recipe.name, unit="edit", mininterval=10.0):
            out.write(json.dumps(measure(case, judge, untouched, tiers)) + "\n")
            out.flush()
    untouched.close()
