"""W&B tracker: mirrors guard events into the run that is already open. It opens and closes none.

What one judged change writes, all against `train/global_step`:

| key | what |
| --- | --- |
| `guard/<guard>/<family>/<statistic>` | the number farthest from its reference, per family |
| `guard/decision/{keep,restored,warned}` | 1 or 0 |
| `guard/step`, `guard/seconds` | the step judged, and what judging it cost |
| `guard/worst` | table of the worst matrices: for every edit, and for whatever is not a quiet KEEP |
| `guard/<picture>` | a spectrum with its Marchenko-Pastur bulk |
| an alert | on ROLLBACK and HALT |
| artifact (`certificate`) | aliases `step-<n>`, `verdict-<action>`, `signed`; metadata: action, step, sha256, keys |
| `guard/report` | the report of that certificate, as an HTML panel |
| `health/...` | training health, where `HealthCallback` reports |

The certificate on disk is the truth. Whatever W&B raises is reported once and changes no verdict.
"""

from __future__ import annotations

import hashlib
import io
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightproof import report
from weightproof.certificate import Certificate
from weightproof.errors import InputError
from weightproof.types import Action

if TYPE_CHECKING:
    from weightproof.trackers import GuardEvent

logger = logging.getLogger("weightproof.wandb")

STEP_METRIC = "train/global_step"
TABLE_COLUMNS = (
    "step",
    "name",
    "decision",
    "matrix",
    "family",
    "guard",
    "statistic",
    "value",
    "reference",
    "limit",
    "outcome",
    "reason",
)
_TITLE_LENGTH = 63  # W&B refuses longer alert titles


def live_run() -> Any | None:
    """The run this process has open, without importing wandb where nobody else has."""
    module = sys.modules.get("wandb")
    return None if module is None else module.run


class WandbTracker:
    """Mirror guard events into a W&B run (registered as tracker `wandb`).

    `step=` is never passed to `run.log`: W&B drops a row whose step lies behind its own counter,
    so the step travels as a column and `define_metric` makes it the axis.

    Args:
        run: The run to write to. By default the live `wandb.run` at the time of each event, so
            that the run which `Trainer` opened is shared; None there means: warn once, do nothing
            (which is also what happens on processes other than the main one).
    """

    name = "wandb"

    def __init__(self, run: Any | None = None) -> None:
        self._given_run = run
        self._defined_for: str | None = None
        self._warned = False

    def log_event(self, event: GuardEvent) -> None:
        """Log the rows of one judged change, the table of its worst matrices, and an alert if it was rejected."""
        self._attempt("log a guard event", lambda run: _log_event(run, event))

    def log_picture(self, key: str, png: bytes, step: int) -> None:
        """Log a PNG as `guard/<key>`."""
        self._attempt("log a picture", lambda run: _log_picture(run, key, png, step))

    def log_metrics(self, rows: Mapping[str, float], step: int) -> None:
        """Log numbers under their own names, `health/...` among them."""
        self._attempt("log metrics", lambda run: run.log({**rows, STEP_METRIC: step}))

    def log_certificate(self, path: Path, *, action: str, step: int) -> None:
        """Log the certificate file as an artifact, the verdict into the summary, and the report as a panel."""
        self._attempt("log the certificate", lambda run: _log_certificate(run, path, action, step))
        self._attempt("log the report", lambda run: _log_report(run, path, step))

    def close(self) -> None:
        """Leave the run open: whoever opened it finishes it."""

    def _attempt(self, what: str, log: Callable[[Any], None]) -> None:
        run = self._given_run if self._given_run is not None else live_run()
        if run is None:
            self._warn_once("no W&B run is open in this process, so nothing is mirrored to W&B; call wandb.init first")
            return
        try:
            if self._defined_for != run.id:
                run.define_metric("guard/*", step_metric=STEP_METRIC)
                run.define_metric("health/*", step_metric=STEP_METRIC)
                self._defined_for = run.id
            log(run)
        # wandb has no common base: MailboxClosedError, WandbServiceConnectionError and others derive from
        # Exception itself. A verdict must not depend on any of them; the evidence is on disk by now.
        except Exception as error:  # noqa: BLE001
            self._warn_once(
                f"W&B could not {what} ({type(error).__name__}: {error}); verdicts, files and training go on without it"
            )

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            logger.warning(message)
        self._warned = True


def event_row(event: GuardEvent) -> dict[str, float]:
    """The finite numbers of one judged change, by their logged names."""
    return {
        **event.rows,
        "guard/decision/keep": int(event.action == Action.KEEP),
        "guard/decision/restored": int(event.applied == "restored"),
        "guard/decision/warned": int(event.warned),
        "guard/seconds": event.seconds,
        "guard/step": event.step,
    }


def _log_event(run: Any, event: GuardEvent) -> None:
    import wandb

    row: dict[str, Any] = {**event_row(event), STEP_METRIC: event.step}
    if needs_table(event):
        row["guard/worst"] = wandb.Table(columns=list(TABLE_COLUMNS), data=table_rows(event), allow_mixed_types=True)
    run.log(row)
    if event.action != Action.KEEP:
        verb = "would have rolled back" if event.monitor else "rolled back"
        title = f"weightproof {'halted' if event.action == Action.HALT else verb} {event.name}"
        text = f"step {event.step}: {event.action} ({event.situation}), {event.applied}: {event.reason}"
        level = "ERROR" if event.action == Action.HALT else "WARN"
        # A second rollback within the default minute is news too: no rate limit of our own.
        run.alert(title=title[:_TITLE_LENGTH], text=text, level=level, wait_duration=0)


def needs_table(event: GuardEvent) -> bool:
    """Every edit, and every training window that is not a quiet KEEP."""
    return event.kind != "train" or event.action != Action.KEEP or event.warned


def table_rows(event: GuardEvent) -> list[Any]:
    """The worst measurements as rows of `TABLE_COLUMNS`; an unmeasured value is None, with its reason."""
    return [
        [
            event.step,
            event.name,
            event.action,
            worst.target,
            worst.family,
            worst.guard,
            worst.statistic,
            worst.value,
            worst.reference,
            worst.limit,
            str(worst.outcome),
            worst.reason,
        ]
        for worst in event.worst
    ]


def _log_picture(run: Any, key: str, png: bytes, step: int) -> None:
    import wandb
    from PIL import Image

    key = key if key.startswith("guard/") else f"guard/{key}"
    with Image.open(io.BytesIO(png)) as picture:
        run.log({key: wandb.Image(picture, caption=f"step {step}"), **_axis(step)})


def _log_certificate(run: Any, path: Path, action: str, step: int) -> None:
    import wandb

    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    keys = _key_ids(content)
    artifact = wandb.Artifact(
        name=f"certificate-{run.id}",
        type="certificate",
        metadata={"action": str(action), "step": step, "sha256": sha256, "signed": bool(keys), "key_ids": keys},
    )
    artifact.add_file(str(path), name=path.name)
    aliases = [f"step-{step}", f"verdict-{str(action).lower()}", *(["signed"] if keys else [])]
    run.log_artifact(artifact, aliases=aliases)
    run.summary.update({"guard/verdict": str(action), "guard/certificate_sha256": sha256})


def _key_ids(content: bytes) -> list[str]:
    """Key ids that a signed certificate names; none where it is not signed, or is no certificate."""
    try:
        return list(Certificate.from_json(content).signatures)
    except InputError:  # the file is logged as it is; that it cannot be read is said with the report
        return []


def _log_report(run: Any, path: Path, step: int) -> None:
    import wandb

    page = report.html(Certificate.load(path))
    run.log({"guard/report": wandb.Html(page, inject=False, data_is_not_path=True), **_axis(step)})


def _axis(step: int) -> dict[str, int]:
    return {STEP_METRIC: step, "guard/step": step}
