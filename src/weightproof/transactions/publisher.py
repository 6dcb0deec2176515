"""What a judged step leaves behind: the certificate file first, then rows and pictures in the trackers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightproof import report
from weightproof.errors import WeightproofError
from weightproof.judgement import evidence
from weightproof.trackers import Tracker, open_trackers
from weightproof.types import Action

if TYPE_CHECKING:
    from torch import nn

    from weightproof.baseline import Baseline
    from weightproof.certificate import Certificate
    from weightproof.collective import Processes
    from weightproof.transactions.steps import Step

logger = logging.getLogger("weightproof")

CERTIFICATE = "certificate.json"
REPORT = "report.html"


class Publisher:
    """Carries judged steps to files and trackers. Every process calls it alike; only rank 0 writes.

    Args:
        processes: Who takes part.
        certificate: Makes the certificate as it is now.
        trackers: Trackers or their registered names; None: the JSONL log where there is a folder for it.
        output_dir: Folder for the certificate and the JSONL log; None: no certificate is written.
        accelerator: `accelerate.Accelerator` of the run, for trackers that log through it.

    Attributes:
        history: Every judged step, oldest first.
        trackers: Those that are open on this process: none where another one writes.

    Raises:
        InputError: A tracker is unknown or cannot be opened.
    """

    def __init__(
        self,
        processes: Processes,
        certificate: Callable[[], Certificate],
        trackers: Sequence[Tracker | str] | None,
        output_dir: Path | None,
        accelerator: Any,
    ) -> None:
        self._processes = processes
        self._certificate = certificate
        self._output_dir = output_dir
        self._picture: bytes | None = None
        self.history: list[Step] = []
        # The certificate on disk and after how many steps it was made: one that is made anew has other timings.
        self._saved: tuple[int, Certificate] | None = None
        with processes.together("opening the trackers"):
            self.trackers = open_trackers(trackers, output_dir, accelerator) if processes.is_main else ()
        self._wants_pictures = processes.broadcast("trackers", bool(self.trackers))

    def draw(self, step: Step, model: nn.Module, baseline: Baseline) -> None:
        """Keep pictures of an edit until it is published; called while the edited weights are in place."""
        if self._wants_pictures and step.kind.name != "train":
            self._picture, step.spectra = evidence.spectrum_of_worst(step, model, baseline, self._processes)

    def publish(self, step: Step) -> None:
        """Record a judged step: history, then the certificate file, then the trackers.

        Where writing fails the log says so, and the verdict stands.
        """
        self._record(step)
        with self._processes.together("writing the evidence"):
            try:
                self._write(step)
            except (OSError, WeightproofError) as error:
                # The verdict stands and was carried out: a full disk may not undo it, nor hide it behind another
                # error, nor end the run of the processes that do not write.
                logger.error("the evidence of step %d, %s, could not be written: %s", step.step, step.name, error)

    def _record(self, step: Step) -> None:
        self.history.append(step)
        # All readings of a step take room: kept of this one and of the one that made the present weights.
        present = next((one for one in reversed(self.history) if one.applied == "kept"), step)
        for one in self.history:
            if one is not step and one is not present:
                one.judged = None

    def complete(self) -> Certificate | None:
        """Write what the certificate still lacks after the last step, and its report; again and again the same.

        The report is written here and not after every step: it takes some 50 ms, and anyone can make it of the
        certificate at any time.

        Returns:
            The certificate on disk; None where nothing is written (another process does, or there is no folder).

        Raises:
            InputError: If it cannot be written.
        """
        if self._output_dir is None or not self._processes.is_main:
            return None
        if self._saved is None or self._saved[0] != len(self.history):
            self._save_certificate()
        assert self._saved is not None
        save_report(self._saved[1], self._output_dir)
        return self._saved[1]

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self.trackers:
            tracker.close()

    def _write(self, step: Step) -> None:
        picture, self._picture = self._picture, None
        # The certificate carries every step: written after each quiet window, a run would take quadratic time.
        path = None if _is_quiet(step) else self._save_certificate()
        event = evidence.event_of(step)
        for tracker in self.trackers:
            tracker.log_event(event)
            if picture is not None:
                tracker.log_picture("guard/spectrum", picture, step.step)
            if path is not None and step.kind.name != "train":
                tracker.log_certificate(path, action=event.action, step=step.step)

    def _save_certificate(self) -> Path | None:
        if self._output_dir is None or not self._processes.is_main:
            return None
        certificate = self._certificate()
        path = certificate.save(self._output_dir / CERTIFICATE)
        self._saved = len(self.history), certificate
        return path


def save_report(certificate: Certificate, folder: Path) -> None:
    """Write the report beside the certificate; where that fails the log says so, for the certificate has it all."""
    try:
        report.save(certificate, folder / REPORT)
    except (OSError, WeightproofError) as error:
        logger.error("the report could not be written: %s", error)


def _is_quiet(step: Step) -> bool:
    """Whether a step is a window of training that was kept without a warning: the event log suffices for it."""
    decision = step.decision
    return step.kind.name == "train" and decision is not None and decision.action is Action.KEEP and not decision.warned
