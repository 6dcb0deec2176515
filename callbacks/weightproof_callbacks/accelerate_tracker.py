"""Accelerate tracker: mirrors guard events into every tracker that the `Accelerator` has open.

| tracker | rows | pictures | certificate |
| --- | --- | --- | --- |
| `wandb` | as `WandbTracker` writes them, with tables and alerts | yes | artifact |
| `mlflow` | numbers | no | artifact |
| `tensorboard`, `aim`, `clearml`, `swanlab` | numbers | yes | no |
| `trackio`, `comet_ml`, `dvclive` | numbers | no | no |
| your own `GeneralTracker` | numbers | where it has `log_images` | where it has `log_artifact` |

Rows go through the tracker's own `log(row, step=...)`. It opens and closes nothing:
`accelerator.init_trackers` and `accelerator.end_training` do. The certificate on disk is the truth:
whatever a tracker raises is reported once and changes no verdict.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightproof_callbacks.wandb_tracker import WandbTracker, event_row

if TYPE_CHECKING:
    from weightproof.trackers import GuardEvent

logger = logging.getLogger("weightproof.accelerate")

ONE_PICTURE = ("aim", "clearml")  # trackers whose log_images takes one picture a name, not a list


class AccelerateTracker:
    """Mirror guard events into `accelerator.trackers` (registered as tracker `accelerate`).

    The list is read at every event, so that trackers may be initialised after the guard is attached.
    Only the main process writes; elsewhere every method does nothing.

    Args:
        accelerator: The `accelerate.Accelerator` of the run, made with `log_with=`.
    """

    name = "accelerate"

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._wandb: WandbTracker | None = None
        self._said: set[str] = set()

    def log_event(self, event: GuardEvent) -> None:
        """Log the numbers of one judged change."""
        self._each(
            "log a guard event",
            lambda tracker: tracker.log(event_row(event), step=event.step),
            lambda wandb: wandb.log_event(event),
        )

    def log_picture(self, key: str, png: bytes, step: int) -> None:
        """Log a PNG as `guard/<key>`, where the tracker takes pictures."""
        self._each(
            "log a picture",
            lambda tracker: self._log_picture(tracker, key, png, step),
            lambda wandb: wandb.log_picture(key, png, step),
        )

    def log_metrics(self, rows: Mapping[str, float], step: int) -> None:
        """Log numbers under their own names."""
        self._each(
            "log metrics",
            lambda tracker: tracker.log(dict(rows), step=step),
            lambda wandb: wandb.log_metrics(rows, step),
        )

    def log_certificate(self, path: Path, *, action: str, step: int) -> None:
        """Log the certificate file, where the tracker takes files."""
        self._each(
            "log the certificate",
            lambda tracker: tracker.log_artifact(str(path)) if hasattr(tracker, "log_artifact") else None,
            lambda wandb: wandb.log_certificate(path, action=action, step=step),
        )

    def close(self) -> None:
        """Leave the trackers open: `accelerator.end_training()` finishes them."""

    def _each(self, what: str, log: Callable[[Any], None], log_wandb: Callable[[WandbTracker], None]) -> None:
        if not self._accelerator.is_main_process:
            return
        if not self._accelerator.trackers:
            self._say("none", "the Accelerator has no tracker open: call accelerator.init_trackers(...) to see events")
        for tracker in self._accelerator.trackers:
            try:
                if tracker.name == "wandb":
                    log_wandb(self._wandb_tracker(tracker.tracker))
                else:
                    log(tracker)
            # Trackers share no base of their errors, and users write their own. A verdict must not depend
            # on any of them; the evidence is on disk by now.
            except Exception as error:  # noqa: BLE001
                self._say(
                    f"failed {tracker.name}",
                    f"the tracker {tracker.name} could not {what} ({type(error).__name__}: {error}); verdicts, files "
                    "and training go on without it",
                )

    def _wandb_tracker(self, run: Any) -> WandbTracker:
        if self._wandb is None:
            self._wandb = WandbTracker(run)
        return self._wandb

    def _log_picture(self, tracker: Any, key: str, png: bytes, step: int) -> None:
        if not hasattr(tracker, "log_images"):
            self._say(f"pictures {tracker.name}", f"the tracker {tracker.name} takes no pictures: they are left out")
            return
        key = key if key.startswith("guard/") else f"guard/{key}"
        pixels = _pixels(png)
        # TensorBoard reads channels first unless it is told otherwise; most others take a list of (H, W, 3) arrays.
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({key: pixels if tracker.name in ONE_PICTURE else pixels[None]}, step=step, **layout)

    def _say(self, topic: str, message: str) -> None:
        if topic not in self._said:
            logger.warning(message)
        self._said.add(topic)


def _pixels(png: bytes) -> np.ndarray:
    """The picture as (height, width, 3) bytes."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGB"))
