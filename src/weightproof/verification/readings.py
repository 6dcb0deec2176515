"""Level 2, the weights: the readings in the certificate against readings taken here.

Digests, shapes and counts must agree exactly. Numbers may differ by what other machines differ by: `TOLERANCES`, and
beside them whatever error a reading states of itself. A count that is a bound must contain the exact count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from weightproof.types import (
    BulkReading,
    CircuitReading,
    ContractReading,
    EditRecord,
    MatrixReading,
    Readings,
    TensorReading,
)
from weightproof.verification.result import Findings


@dataclass(frozen=True, slots=True)
class Tolerance:
    """|a - b| <= absolute + relative * max(|a|, |b|)."""

    relative: float = 0.0
    absolute: float = 0.0

    def allows(self, one: float, other: float, error: float = 0.0) -> bool:
        """Whether two numbers agree, `error` being what they state of themselves."""
        if not (math.isfinite(one) and math.isfinite(other)):
            return one == other or (math.isnan(one) and math.isnan(other))
        return abs(one - other) <= self.absolute + self.relative * max(abs(one), abs(other)) + error


TOLERANCES: Mapping[str, Tolerance] = {
    "frobenius_norm": Tolerance(1e-5),
    "spectral_norm": Tolerance(1e-5),
    "norm_collapse": Tolerance(1e-4, 1e-9),
    "sigma_mp": Tolerance(1e-2),
    "edge_plus": Tolerance(1e-2),
    "top_over_edge": Tolerance(1e-2),
    "spike_energy": Tolerance(1e-2, 1e-3),
    "ks_distance": Tolerance(0.0, 2e-2),
    "num_spikes": Tolerance(0.0, 1.0),
    "relative_delta": Tolerance(1e-4, 1e-9),
    "contract": Tolerance(1e-4, 1e-9),
    "merge_error": Tolerance(1e-4, 2.0**-20),
    "circuit": Tolerance(1e-3, 1e-9),
}
"""By statistic. A Marchenko-Pastur fit is a search whose end moves with the last bits of the spectrum; the error of a
right merge in float32 is the rounding of B @ A, which is another on every machine."""

Pair = tuple[float | None, float | None]
BOUND = "weyl-bound("
"""How the method of a spike count begins that is a bound, made from the fit of the baseline."""


def compare_readings(  # noqa: PLR0913 - two readings, and how much of them must agree
    side: str, stated: Readings, found: Readings, findings: Findings, *, of_files: bool, whole: bool = True
) -> None:
    """Hold the readings of one model in a certificate against those taken here.

    Args:
        side: "subject" or "baseline", for the differences.
        stated: From the certificate; of a model in memory it may have tensors that no file holds.
        found: Taken from the weights.
        findings: Where differences go.
        of_files: Whether the certificate is of a folder too, so that what its files say of a tensor must agree.
        whole: Whether everything that can be read was to be read; not so in windows of training.
    """
    for name in (name for name in stated.tensors if name in found.tensors):
        _tensor(f"{side} {name}", stated.tensors[name], found.tensors[name], findings, of_files=of_files)
    for name, theirs in stated.matrices.items():
        ours = found.matrices.get(name)
        if ours is None:
            findings.misstated(f"{side} {name}", "matrix", None, "a reading")
        else:
            _matrix(f"{side} {name}", theirs, ours, findings)
    for name in (name for name in found.matrices if name not in stated.matrices):
        findings.misstated(f"{side} {name}", "matrix", "a reading", None)
    if whole:
        _none_left_out(side, "bulk", stated.bulks, found.bulks, findings)
        _none_left_out(side, "circuit", stated.circuits, found.circuits, findings)
    for name in (name for name in stated.bulks if name in found.bulks):
        _bulk(f"{side} {name}", stated.bulks[name], found.bulks[name], findings)
    _circuits(side, stated, found, findings)
    _untrained(side, stated, found, findings)


def _none_left_out(
    side: str, what: str, stated: Mapping[str, object], found: Mapping[str, object], findings: Findings
) -> None:
    """A reading left out is a guard that could not speak."""
    for name in (name for name in found if name not in stated):
        findings.misstated(f"{side} {name}", what, "a reading", None)


def _tensor(where: str, stated: TensorReading, found: TensorReading, findings: Findings, *, of_files: bool) -> None:
    """Facts about one tensor; its digest is compared where a folder is compared with a list of tensors."""
    names = ["dtype", "num_nonfinite"]
    if stated.num_nan is not None and found.num_nan is not None:
        names.append("num_nan")
    if of_files or stated.num_nonfinite:  # inf is no breach in a buffer
        names += ["is_buffer", "storage"]
    for name in names:
        findings.require_stated(where, name, getattr(found, name), getattr(stated, name))
    findings.require_stated(where, "shape", str(list(found.shape)), str(list(stated.shape)))


def _matrix(where: str, stated: MatrixReading, found: MatrixReading, findings: Findings) -> None:
    for name in ("family", "d_out", "d_in", "zero_rows", "zero_cols"):
        findings.require_stated(where, name, getattr(found, name), getattr(stated, name))
    findings.require_stated(where, "measured", found.reason is None, stated.reason is None)
    error = (stated.spectral_norm_error or 0.0) + (found.spectral_norm_error or 0.0)
    _number(where, "spectral_norm", _pair(stated, found, "spectral_norm"), findings, error=error)
    for name in ("frobenius_norm", "norm_collapse"):
        _number(where, name, _pair(stated, found, name), findings)
    # An error so wide that any norm would do says nothing: a reading is decided to within its band.
    if stated.spectral_norm and (stated.spectral_norm_error or 0.0) > stated.spectral_norm:
        findings.misstated(where, "spectral_norm_error", found.spectral_norm_error, stated.spectral_norm_error)


def _bulk(where: str, stated: BulkReading, found: BulkReading, findings: Findings) -> None:
    for name in ("null", "family"):
        findings.require_stated(where, name, getattr(found, name), getattr(stated, name))
    findings.require_stated(where, "measured", found.reason is None, stated.reason is None)
    low, high, count = stated.num_spikes_low, stated.num_spikes_high, found.num_spikes
    if (count is None) != (stated.num_spikes is None):
        findings.misstated(where, "num_spikes", count, stated.num_spikes)
    elif count is not None and low is not None and high is not None:
        slack = TOLERANCES["num_spikes"].absolute
        # What is known here may be a bound too.
        ours = found.num_spikes_low or count, found.num_spikes_high or count
        if ours[1] < low - slack or ours[0] > high + slack:
            findings.misstated(where, "num_spikes", count, f"{low} to {high}" if low != high else low)
    ends = stated.num_spikes_low, stated.num_spikes, stated.num_spikes_high
    known = [one for one in ends if one is not None]
    if known != sorted(known):
        findings.misstated(where, "num_spikes", f"{low} to {high}", stated.num_spikes)
    if stated.method.startswith(BOUND) != found.method.startswith(BOUND):
        return  # a bound repeats the fit of the baseline: its other numbers are not those of this matrix
    for name in ("sigma_mp", "edge_plus", "top_over_edge", "spike_energy", "ks_distance"):
        _number(where, name, _pair(stated, found, name), findings)


def _number(where: str, name: str, pair: Pair, findings: Findings, *, error: float = 0.0) -> None:
    """Hold what is stated, the first of the pair, against what was found."""
    stated, found = pair
    if stated is None or found is None:
        if stated is not found:
            findings.misstated(where, name, found, stated)
    elif not TOLERANCES[name].allows(stated, found, error):
        findings.misstated(where, name, found, stated)


def _pair(stated: object, found: object, name: str) -> Pair:
    return getattr(stated, name), getattr(found, name)


def _circuits(side: str, stated: Readings, found: Readings, findings: Findings) -> None:
    both = [name for name in stated.circuits if name in found.circuits]
    for name in both:
        one, other = stated.circuits[name], found.circuits[name]
        findings.require_stated(f"{side} {name}", "kind", other.kind, one.kind)
        findings.require_stated(f"{side} {name}", "matrices", ", ".join(other.matrices), ", ".join(one.matrices))
        findings.require_stated(f"{side} {name}", "measured", other.reason is None, one.reason is None)
        if one.values is None or other.values is None:
            if (one.values is None) != (other.values is None):
                findings.misstated(f"{side} {name}", "circuit", _count(other), _count(one))
            continue
        top = max([abs(value) for value in (*one.values, *other.values)], default=0.0)
        allowed = Tolerance(0.0, TOLERANCES["circuit"].absolute + TOLERANCES["circuit"].relative * top)
        pairs = zip(one.values, other.values, strict=False)
        wrong = next((pair for pair in pairs if not allowed.allows(*pair)), None)
        if len(one.values) != len(other.values):
            findings.misstated(f"{side} {name}", "number of singular values", len(other.values), len(one.values))
        elif wrong is not None:
            findings.misstated(f"{side} {name}", "singular value of the circuit", wrong[1], wrong[0])
    if len(both) < len(stated.circuits):
        lacking = len(stated.circuits) - len(both)
        findings.unchecked.append(f"{lacking} circuits of the {side}: files alone do not say which matrices form them")


def _count(reading: CircuitReading) -> str:
    return "not measured" if reading.values is None else f"{len(reading.values)} values"


def _untrained(side: str, stated: Readings, found: Readings, findings: Findings) -> None:
    """A trained matrix called untrained is judged on finiteness only: that must not be claimed of others."""
    known = {name for name in found.bulks if found.bulks[name].pure_bulk is not None and name in stated.bulks}
    for name in sorted((stated.untrained ^ found.untrained) & known):
        close = {stated.bulks[name].num_spikes, found.bulks[name].num_spikes} <= {0, 1}
        if not close:
            findings.misstated(f"{side} {name}", "untrained", name in found.untrained, name in stated.untrained)
    for name in sorted(found.bulks.keys() & stated.bulks.keys()):
        ours, theirs = found.bulks[name], stated.bulks[name]
        close = {theirs.num_spikes, ours.num_spikes} <= {0, 1}
        if ours.pure_bulk != theirs.pure_bulk and not close and not theirs.method.startswith(BOUND):
            findings.misstated(f"{side} {name}", "pure_bulk", ours.pure_bulk, theirs.pure_bulk)


def compare_records(where: str, stated: EditRecord, found: EditRecord, findings: Findings) -> None:
    """Hold what is stated to have changed against what changed between the two folders."""
    _names(where, "changed_names", stated.changed_names, found.changed_names, findings)
    for name, ours in found.relative_delta.items():
        theirs = stated.relative_delta.get(name)
        _number(f"{where}, {name}", "relative_delta", (theirs, ours), findings)
    theirs = {(one.target, one.statistic): one for one in stated.contract}
    for ours in found.contract:
        other = theirs.pop((ours.target, ours.statistic), None)
        at = f"{where}, {ours.target}"
        if other is None:
            findings.misstated(at, ours.statistic, ours.value, None)
            continue
        if ours.limit != other.limit and not _same_rounding(ours, other):
            findings.misstated(at, f"{ours.statistic} (limit)", ours.limit, other.limit)
        findings.require_stated(at, f"{ours.statistic} (measured)", ours.reason is None, other.reason is None)
        findings.require_stated(at, f"{ours.statistic} (rigorous)", ours.rigorous, other.rigorous)
        both = ours.value is not None and other.value is not None
        if (ours.value is None) != (other.value is None) or (
            both
            and not TOLERANCES.get(ours.statistic, TOLERANCES["contract"]).allows(other.value or 0.0, ours.value or 0.0)
        ):
            findings.misstated(at, ours.statistic, ours.value, other.value)
    known = {one.statistic for one in found.contract}  # a session holds its own edits to their plan besides
    for target, statistic in (one for one in theirs if one[1] in known):
        findings.misstated(f"{where}, {target}", statistic, None, "a reading")


def _same_rounding(ours: ContractReading, other: ContractReading) -> bool:
    """Whether two limits of a merge agree: they are sums over the weights, whose last bits are those of a machine."""
    return ours.statistic == "merge_error" and TOLERANCES["contract"].allows(other.limit, ours.limit)


def _names(where: str, what: str, stated: Iterable[str], found: Iterable[str], findings: Findings) -> None:
    for name in sorted(set(stated) ^ set(found)):
        findings.misstated(where, what, name if name in set(found) else None, name if name in set(stated) else None)
