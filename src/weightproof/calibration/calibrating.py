"""Calibrate a model: draw, measure, fit; or fit again from draws that were kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from weightproof import __version__
from weightproof.calibration.conformal import draws_for_rank
from weightproof.calibration.drawing import SAFE_WORDS, VERSION, WORDS, draw
from weightproof.calibration.draws import Draw
from weightproof.calibration.fitting import LEVEL_SHARE, Fit, fit
from weightproof.calibration.journal import Journal
from weightproof.calibration.measuring import Bench
from weightproof.calibration.targets import DIVISIONS
from weightproof.errors import InputError
from weightproof.policy import TIERS, Policy, load_policy

FALSE_ALARMS = 0.05
# Of draws whose truth is measured at least so many are expected to be benign.
_BENIGN_SHARE = 0.6


@dataclass(frozen=True)
class Provenance:
    """Where draws come from.

    Attributes:
        model_digest: Of the model.
        data_digest: Of the windows that told the truth; None where only harmless edits were drawn.
        seed: Of the draws.
        distribution: What was drawn, in words.
        notes: What the model did not admit.
        version: Of weightproof.
        command: That made them.
    """

    model_digest: str
    data_digest: str | None
    seed: int
    distribution: str
    notes: tuple[str, ...]
    version: str
    command: str


@dataclass(frozen=True)
class Calibration:
    """Limits with everything they rest on.

    Attributes:
        fit: The limits, what they promise, and how other draws judge them.
        tier: The policy that they extend.
        provenance: Where the draws come from.
        draws: All of them.
    """

    fit: Fit
    tier: Policy
    provenance: Provenance
    draws: tuple[Draw, ...]


def default_draws(false_alarms: float = FALSE_ALARMS, *, has_truth: bool = True) -> int:
    """Draws after which each limit is likely bounded by itself.

    Example:
        >>> default_draws(0.05), default_draws(0.05, has_truth=False)
        (520, 312)
    """
    share = LEVEL_SHARE * (_BENIGN_SHARE if has_truth else 1.0)
    return math.ceil(draws_for_rank(len(DIVISIONS[0]), false_alarms) / share)


def calibrate(  # noqa: PLR0913 - the options of the verb
    model: nn.Module,
    *,
    retain: Any = None,
    tier: str = "balanced",
    draws: int | None = None,
    false_alarms: float = FALSE_ALARMS,
    seed: int = 0,
    journal: Path | None = None,
    command: str = "weightproof.calibration.calibrate",
    on_draw: Callable[[int, int], None] = lambda done, wanted: None,
) -> Calibration:
    """Draw edits of a model, measure them, and fit the limits of a tier; the model is as it was.

    Args:
        model: Any model that can be run; one process.
        retain: Data as `GuardSession(retain=...)` takes it. Half of it (by documents) is given to the guards, the other
            half tells the truth about each edit. Without it only edits that are harmless by construction are drawn.
        tier: What is extended; its tau says what is benign.
        draws: How many; a number that is likely enough if None.
        false_alarms: Share of benign edits that may break any limit.
        seed: Of the draws.
        journal: File in which draws are kept as they are made: what is there is not made again.
        command: For the provenance.
        on_draw: Told after each draw how many there are, of how many.

    Raises:
        InputError: The model cannot be run, the data are too few, or there are too few benign draws.
        BaselineError: The model's outputs are not finite.
    """
    policy = _tier(tier)
    bench = Bench(model, policy, retain)
    is_safe = bench.choices.safe
    wanted = default_draws(false_alarms, has_truth=not is_safe) if draws is None else draws
    header = {"calibration": VERSION, "model": bench.digest, "data": bench.data_digest, "seed": seed}
    made = list(_kept(journal, header))
    for number in range(len(made), wanted):
        one = bench.measure(draw(seed, number, bench.choices))
        made.append(one)
        if journal is not None:
            Journal(journal, header).add(one)
        on_draw(len(made), wanted)
    words = SAFE_WORDS if is_safe else WORDS
    source = Provenance(bench.digest, bench.data_digest, seed, words, bench.notes, __version__, command)
    chosen = tuple(made[:wanted])
    return Calibration(fit(chosen, policy, false_alarms=false_alarms), policy, source, chosen)


def _kept(path: Path | None, header: Mapping[str, Any]) -> list[Draw]:
    return [] if path is None else Journal(path, header).draws


def refit(
    path: Path, *, tier: str | None = None, false_alarms: float | None = None, command: str | None = None
) -> Calibration:
    """Fit again from a file of draws, without the model.

    Args:
        path: What `output.save` wrote beside a policy.
        tier: What is extended; as in the file if None.
        false_alarms: The same.
        command: For the provenance; as in the file if None.

    Raises:
        InputError: If the file holds no draws, or too few of them are benign.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is no file of draws: give the .draws.json beside a calibrated policy") from error
    try:
        body = cast("dict[str, Any]", content)
        source = Provenance(**{**body["provenance"], "notes": tuple(body["provenance"]["notes"])})
        rows, then = body["draws"], body["fit"]
        chosen, level = tier or str(then["tier"]), false_alarms or float(then["false_alarms"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is no file of draws ({error!r}): give the .draws.json beside a calibrated policy"
        ) from error
    policy, draws = _tier(chosen), tuple(Draw.from_json(row) for row in rows)
    source = source if command is None else replace(source, command=f"{command}; draws by {source.command}")
    return Calibration(fit(draws, policy, false_alarms=level), policy, source, draws)


def _tier(name: str) -> Policy:
    if name not in TIERS:
        raise InputError(f"a calibration extends a tier ({', '.join(TIERS)}), not {name!r}")
    return load_policy(name)
