"""weightproof: prove, step by step, that a change of weights did not break the model.

A tour, in the order in which a change travels:

- `weights` and `families` walk a model and name every weight matrix: the only walker.
- `spectrum` and `marchenko_pastur` are pure numerics on arrays; `activations` and `divergence`
  read what needs a forward pass; `probes` turns a model into frozen `types.Readings`.
- `baseline` keeps the readings taken before any change, saved and digested.
- `edits` plan changes, `kinds` are the contracts they declare, `snapshot` is the only writer.
- `health` diagnoses a training: scale of the residual stream, gradients, use of blocks; its parts in `diagnostics`.
- `curvature` fits Kronecker factors and foresees the loss change of an edit.
- `deltas` keep what a training added as factors, `steering` puts it into a model while a block lasts; `subspace`
  says how much of it lies in a few directions, `candidates` guess which, and `delta_report` tells of all of them.
- `guards` judge readings with pure functions; `policy` turns verdicts into one decision; `calibration` fits its limits
  on random edits that are known to be benign.
- `losses` pairs the loss before and after on data, `statistics` turns that into an interval: only it may accept.
- `judgement` applies guards and policy to readings, the same in a session, in `certify` and in `verify`.
- `session` binds these into a transaction: snapshot, change, measure, judge, keep or restore.
- `transactions.rolling` and `snapshots.store` keep the last good states of a run, in memory or through a crash.
- `certifying` judges two model folders; `certificate`, `signing`, `verify`, `report`
  and `trackers` carry the evidence to files, W&B, people and whoever doubts it.
- `testing` injects faults, to see that all of this notices.

A module at the top is a noun of this tour; its parts are in a package beside it: `numerics` of `spectrum`,
`readings` and `forward` of `probes`, `loss_data` of `losses`, `contracts` of `kinds`, `snapshots` of `snapshot`,
`transactions` of `session`, `procedure` of `recipe`, `reporting` of `report`, `verification` of `verify`,
`differences` of `deltas`, `alpha` of `steering`; `folders` and `lora` say what lies in model folders and adapters.

One process and many take this one path: `collective` lets the processes of a run meet; in `parallel`, `placements`
and `shards` say which part of a sharded tensor lies where; `numerics.lockstep` screens matrices where they lie.

`GuardCallback` and `GuardedTrainer` (for a Hugging Face Trainer), `attach` and `ReplayableLoader` (for a
loop of your own on Accelerate) live in `weightproof_callbacks` and are loaded on first use: importing
weightproof imports neither transformers nor wandb.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from weightproof import edits, kinds
    from weightproof.baseline import Baseline
    from weightproof.certificate import Certificate
    from weightproof.curvature import fit_factors, predict_loss_change
    from weightproof.deltas import Delta
    from weightproof.errors import EditRejectedError, InputError, WeightproofError
    from weightproof.losses import LossData
    from weightproof.marchenko_pastur import fit_bulk
    from weightproof.policy import Policy, load_policy
    from weightproof.session import GuardSession
    from weightproof.spectrum import measure_spectrum
    from weightproof.steering import steer
    from weightproof.types import Action, BulkFit, Decision, Outcome, Spectrum, Verdict, WeightMatrix
    from weightproof.weights import iter_weight_matrices
    from weightproof_callbacks.accelerator import attach
    from weightproof_callbacks.data_position import ReplayableLoader
    from weightproof_callbacks.health_callback import HealthCallback
    from weightproof_callbacks.trainer import GuardCallback
    from weightproof_callbacks.trainer_mixin import GuardedTrainer

_HOMES = {
    "GuardCallback": "weightproof_callbacks.trainer",
    "GuardedTrainer": "weightproof_callbacks.trainer_mixin",
    "attach": "weightproof_callbacks.accelerator",
    "ReplayableLoader": "weightproof_callbacks.data_position",
    "HealthCallback": "weightproof_callbacks.health_callback",
    "LossData": "weightproof.losses",
    "Delta": "weightproof.deltas",
    "steer": "weightproof.steering",
    "fit_factors": "weightproof.curvature",
    "predict_loss_change": "weightproof.curvature",
    "GuardSession": "weightproof.session",
    "Baseline": "weightproof.baseline",
    "Certificate": "weightproof.certificate",
    "Policy": "weightproof.policy",
    "load_policy": "weightproof.policy",
    "measure_spectrum": "weightproof.spectrum",
    "fit_bulk": "weightproof.marchenko_pastur",
    "iter_weight_matrices": "weightproof.weights",
    **dict.fromkeys(
        (
            "WeightproofError",
            "InputError",
            "PolicyError",
            "BaselineError",
            "SnapshotError",
            "RestoreError",
            "EditRejectedError",
            "CollectiveError",
        ),
        "weightproof.errors",
    ),
    **dict.fromkeys(
        ("Action", "Outcome", "Spectrum", "BulkFit", "Verdict", "Decision", "WeightMatrix"), "weightproof.types"
    ),
}
_MODULES = ("edits", "kinds")

__all__ = [  # noqa: RUF022 - grouped by what a reader is looking for
    # guard a model
    "GuardCallback",
    "GuardSession",
    "GuardedTrainer",
    "HealthCallback",
    "attach",
    "LossData",
    "ReplayableLoader",
    "Baseline",
    "Certificate",
    # policy
    "Policy",
    "load_policy",
    # what changes weights
    "edits",
    "kinds",
    "Delta",
    "steer",
    # curvature
    "fit_factors",
    "predict_loss_change",
    # numerics
    "measure_spectrum",
    "fit_bulk",
    "iter_weight_matrices",
    # nouns
    "Action",
    "BulkFit",
    "Decision",
    "Outcome",
    "Spectrum",
    "Verdict",
    "WeightMatrix",
    # errors; the rest of them in weightproof.errors
    "EditRejectedError",
    "InputError",
    "WeightproofError",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use (PEP 562)."""
    if name in _MODULES:
        return importlib.import_module(f"weightproof.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'weightproof' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
