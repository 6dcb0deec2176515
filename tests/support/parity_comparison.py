"""Where a guarded run of many processes does not agree with that of one, and by how much it may."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from parity import Seen

from weightproof.policy import with_digests
from weightproof.types import EditRecord, MatrixReading, Measurement, Readings, TensorReading, WindowReading


@dataclass
class Comparison:
    """A run against that of one process, step by step.

    Everything must be equal, numbers to the last bit, but for the norms of matrices that were screened in lockstep
    over their shards, in this step or an earlier one of the session. These may differ by `tolerance`, relative to
    the norm, and by `share` of the errors that both are certified to; what they say must not.

    Attributes:
        tolerance: Relative, for screened matrices.
        share: Of the certified errors, for norms that were bracketed.
        found: What differs, in words.
        largest: Largest relative deviation by statistic.
        exact: Measurements that were compared to the last bit.
        screened: Those that were not.
        resumed: The readings before the first step may come from a screen already.
    """

    tolerance: float
    share: float
    resumed: bool = False
    found: list[str] = field(default_factory=list)
    largest: dict[str, float] = field(default_factory=dict)
    exact: int = 0
    screened: int = 0
    _names: set[str] = field(default_factory=set)
    _session: int = 0

    def compare(self, alone: Seen, here: Seen) -> None:
        """One step."""
        if here.session != self._session:
            self._session, self._names = here.session, set()
        for run in (alone, here):
            matrices = run.after.matrices.items()
            self._names |= {name for name, one in matrices if self.resumed or one.method.startswith("sharded")}
        at = f"{alone.name} (session {alone.session}, step {alone.decision.step})"
        for what in ("name", "applied", "accepted", "bits"):
            self._same(f"{at}: {what}", getattr(alone, what), getattr(here, what))
        for what in ("action", "situation", "warned", "assurance", "step", "policy_digest"):
            self._same(f"{at}: {what}", getattr(alone.decision, what), getattr(here.decision, what))
        self._verdicts(at, alone, here)
        self._record(at, alone.record, here.record)
        self._readings(at, alone.after, here.after)
        self._same(f"{at}: decision digest", alone.decision.digest, here.decision.digest)
        if not self._names and not any(one.nonfinite_ranks for one in here.after.tensors.values()):
            # Every number, every sentence.
            self._same(f"{at}: evidence", _evidence(alone), _evidence(here))

    def _same(self, at: str, alone: Any, here: Any) -> bool:
        # NaN is not equal to itself, but says the same.
        if alone == here or repr(alone) == repr(here):
            return True
        self.found.append(f"{at}: {alone} alone, {here} here")
        return False

    def _close(self, at: str, what: str, alone: float | None, here: float | None, slack: float = 0.0) -> None:
        """Numbers of a screen. Logarithms are relative already."""
        if alone is None or here is None or not (math.isfinite(alone) and math.isfinite(here)):
            self._same(at, alone, here)
            return
        size = 1.0 if what.startswith("log_") else abs(alone)
        deviation = abs(alone - here) / size if size else abs(here)
        self.largest[what] = max(self.largest.get(what, 0.0), deviation)
        if deviation > self.tolerance + self.share * slack:
            self.found.append(f"{at}: {alone} alone, {here} here, off by {deviation:.2g}")

    def _verdicts(self, at: str, alone: Seen, here: Seen) -> None:
        for then, now in zip(alone.decision.verdicts, here.decision.verdicts, strict=True):
            coverage = [(one.guard, one.outcome, one.num_measured, one.num_eligible) for one in (then, now)]
            self._same(f"{at}: verdict", *coverage)
            self._measurements(f"{at}: {then.guard}", then.measurements, now.measurements, (alone, here))
        self._measurements(f"{at}: reported", alone.decision.reported, here.decision.reported, (alone, here))

    def _measurements(
        self, at: str, old: Sequence[Measurement], new: Sequence[Measurement], runs: tuple[Seen, Seen]
    ) -> None:
        said = [[(m.target, m.statistic, m.family, str(m.outcome)) for m in one] for one in (old, new)]
        lost, added = ([x for x in one if x not in other] for one, other in (said, said[::-1]))
        if not self._same(f"{at}: measurements", lost, added) or not self._same(f"{at}: their order", *said):
            return
        for then, now in zip(old, new, strict=True):
            where = f"{at}: {then.statistic} of {then.target}"
            if then.guard == "spectral" and then.target in self._names:
                self._screened_measurement(where, then, now, runs)
            elif then.statistic in _MOVES and self._names:
                # Changes of shards are summed over ranks: the last bits differ.
                self._close(where, then.statistic, then.value, now.value)
                self._same(where, replace(then, value=None), replace(now, value=None))
            else:
                self._same(where, _placeless(then), _placeless(now))
                self.exact += 1

    def _screened_measurement(self, at: str, then: Measurement, now: Measurement, runs: tuple[Seen, Seen]) -> None:
        width = [sum(_width(getattr(run, when), then.target) for run in runs) for when in ("before", "after")]
        # A stable rank has the square of the norm.
        power = {"log_spectral_norm_ratio": 1, "log_stable_rank_ratio": 2}.get(then.statistic, 0)
        self._close(at, then.statistic, then.value, now.value, power * sum(width))
        self._close(f"{at}: reference", "reference", then.reference, now.reference, power * width[0])
        self._same(f"{at}: limit", then.limit, now.limit)
        self.screened += 1

    def _record(self, at: str, old: EditRecord, new: EditRecord) -> None:
        for item in fields(EditRecord):
            if item.name != "relative_delta":
                self._same(f"{at}: record.{item.name}", getattr(old, item.name), getattr(new, item.name))
        if self._same(f"{at}: record.relative_delta", list(old.relative_delta), list(new.relative_delta)):
            for name, then in old.relative_delta.items():
                if name in self._names:
                    self._close(f"{at}: change of {name}", "relative_delta", then, new.relative_delta[name])
                else:
                    self._same(f"{at}: change of {name}", then, new.relative_delta[name])

    def _readings(self, at: str, alone: Readings, here: Readings) -> None:
        for item in fields(Readings):
            if item.name in ("tensors", "bulks", "second_moments"):
                self._mapping(f"{at}: {item.name}", getattr(alone, item.name), getattr(here, item.name))
            elif item.name == "window" and self._names:
                self._window(f"{at}: window", alone.window, here.window)
            elif item.name not in ("matrices", "edit"):
                self._same(f"{at}: readings.{item.name}", getattr(alone, item.name), getattr(here, item.name))
        if not self._same(f"{at}: matrices", list(alone.matrices), list(here.matrices)):
            return
        for name, then in alone.matrices.items():
            now = here.matrices[name]
            if name in self._names:
                self._screened_reading(f"{at}: reading of {name}", then, now)
            else:
                self._same(f"{at}: reading of {name}", then, now)

    def _window(self, at: str, alone: WindowReading | None, here: WindowReading | None) -> None:
        """What was seen of a window of training; reports of how far weights moved to the screens' tolerance."""
        if alone is None or here is None:
            self._same(at, alone, here)
            return
        for then, now in zip(alone.reports, here.reports, strict=True):
            if then.statistic in _MOVES:
                self._close(f"{at}: {then.statistic}", then.statistic, then.value, now.value)
        rounded = [
            replace(one, reports=tuple(replace(r, value=None) if r.statistic in _MOVES else r for r in one.reports))
            for one in (alone, here)
        ]
        moves = [dict(one.usual_moves or {}) for one in (alone, here)]
        if self._same(f"{at}: usual moves", list(moves[0]), list(moves[1])):
            for name, then in moves[0].items():
                self._close(f"{at}: usual move of {name}", "usual_move", then, moves[1][name])
        self._same(at, *(replace(one, usual_moves={}) for one in rounded))

    def _mapping(self, at: str, alone: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        if self._same(f"{at}: names", list(alone), list(here)):
            for name, then in alone.items():
                self._same(f"{at}: {name}", _placeless(then), _placeless(here[name]))

    def _screened_reading(self, at: str, then: MatrixReading, now: MatrixReading) -> None:
        errors = (then.spectral_norm_error or 0.0) + (now.spectral_norm_error or 0.0)
        slack = errors / then.spectral_norm if then.spectral_norm else 0.0
        for what in ("frobenius_norm", "norm_collapse", "spectral_norm"):
            allowed = slack if what == "spectral_norm" else 0.0
            self._close(f"{at}: {what}", what, getattr(then, what), getattr(now, what), allowed)
        # How a norm was found may differ: brackets that decide the same limit need not be of the same rung.
        loose = dict.fromkeys(("frobenius_norm", "norm_collapse", "spectral_norm", "spectral_norm_error"))
        self._same(at, replace(then, **loose, method=""), replace(now, **loose, method=""))


_MOVES = ("gain_move", "weight_move")


def _placeless(one: Any) -> Any:
    """What was found, without the ranks that it was found on: one process has none to name."""
    if isinstance(one, TensorReading):
        return replace(one, nonfinite_ranks=())
    if isinstance(one, Measurement) and one.reason is not None:
        return replace(one, reason=re.sub(r", on rank [0-9, ]+ only", "", one.reason))
    return one


def _width(readings: Readings, name: str) -> float:
    """Half the width of what is known of the logarithm of a norm."""
    one = readings.matrices.get(name)
    if one is None or not one.spectral_norm or one.spectral_norm_error is None:
        return 0.0
    return one.spectral_norm_error / max(one.spectral_norm - one.spectral_norm_error, 1e-30)


def _evidence(seen: Seen) -> str:
    """Digest of every field of the decision, as one process would have given it."""
    return with_digests(replace(seen.decision, world_size=1)).evidence_digest


def compared(alone: Sequence[Seen], ranks: Sequence[Sequence[Seen]], comparison: Comparison) -> Comparison:
    """A run of many processes against one: its ranks must say the same, to the last bit."""
    for rank, seen in enumerate(ranks):
        for ours, theirs in zip(ranks[0], seen, strict=True):
            if repr(ours) != repr(theirs):
                comparison.found.append(f"{ours.name}: rank {rank} says something else than rank 0")
            assert theirs.decision.evidence_digest == ours.decision.evidence_digest
            assert theirs.decision.world_size == len(ranks)
    for one, other in zip(alone, ranks[0], strict=True):
        comparison.compare(one, other)
    return comparison


def lines(seen: Sequence[Seen]) -> str:
    """What became of each step."""
    return "\n".join(
        f"  {one.name:24} {one.decision.action:9} {one.applied:9} {one.decision.situation}" for one in seen
    )
