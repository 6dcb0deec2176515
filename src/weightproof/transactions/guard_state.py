"""The sidecar files of a checkpoint: history, the baseline, and the present readings where they differ.

They describe whole tensors and matrices, so that a run may resume with another number of processes.
The baseline's outputs are not kept: after a resume outputs are compared with those of the resumed weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightproof.baseline import Baseline
from weightproof.errors import BaselineError
from weightproof.folders.files import write_atomically
from weightproof.folders.sealed_json import open_sealed, seal
from weightproof.probes import State

STATE_FILE = "guard_state.json"
STATE_FORMAT = "weightproof-state-v2"
CURRENT_FILE = "guard_current.safetensors"


@dataclass(frozen=True)
class GuardState:
    """What a session must remember to go on in another process.

    Attributes:
        baseline: What edits are judged against.
        current: Readings of the weights that the last judged change left.
        losses: Raw losses of the last windows that were kept, oldest first.
        outputs_stale: Whether training moved the model since its outputs were captured.
        steps: Every judged step, as the certificate carries it.
        policy_digest: Of the policy that judged them.
        turns: Whose turn it is to be read in windows of training (`TrainingTurns.state`).
    """

    baseline: Baseline
    current: State
    losses: tuple[float, ...]
    outputs_stale: bool
    steps: tuple[Any, ...]
    policy_digest: str
    turns: tuple[int, ...] = (0, 0, 0)

    def save(self, folder: Path) -> None:
        """Write the files; the JSON file, which refers to the others and carries its own digest, comes last."""
        moved = self.current.readings.model_digest != self.baseline.model_digest
        content = {
            "format": STATE_FORMAT,
            "model_digest": self.current.readings.model_digest,
            "policy_digest": self.policy_digest,
            "losses": list(self.losses),
            "moved": moved,
            "outputs_stale": self.outputs_stale,
            "steps": list(self.steps),
            "turns": list(self.turns),
        }
        self.baseline.save(folder)
        if moved:
            replace(self.baseline, readings=self.current.readings, fits=self.current.fits).save(folder / CURRENT_FILE)
        write_atomically(folder / STATE_FILE, seal(content, allow_nan=False))

    @classmethod
    def load(cls, folder: Path) -> GuardState:
        """Read the files back.

        Raises:
            BaselineError: If one is missing, torn, altered, of another format, or of another moment than the others.
        """
        path = folder / STATE_FILE
        try:
            text = path.read_bytes()
            content = json.loads(text)
        except (OSError, ValueError) as error:
            raise BaselineError(f"no usable guard state at {path} ({error})") from error
        if not isinstance(content, dict) or content.get("format") != STATE_FORMAT:
            raise BaselineError(f"{path} is no guard state that this version reads (format {STATE_FORMAT})")
        saved = Baseline.load(folder)
        try:
            current = Baseline.load(folder / CURRENT_FILE) if content["moved"] else saved
            state = cls(
                baseline=saved,
                current=State(current.readings, current.fits),
                losses=tuple(content["losses"]),
                outputs_stale=content["outputs_stale"],
                steps=tuple(content["steps"]),
                policy_digest=content["policy_digest"],
                turns=tuple(content["turns"]),
            )
            is_as_written = bool(content["digest"]) and open_sealed(text) is not None
            is_of_these_files = content["model_digest"] == current.readings.model_digest
        except (KeyError, TypeError) as error:
            raise BaselineError(f"{path} was altered: {error} is missing or of another kind") from error
        if not is_as_written:
            raise BaselineError(f"{path} was altered after it was written: its digest does not match")
        if not is_of_these_files:
            raise BaselineError(f"{path} and the readings beside it are of different moments: was a save cut short?")
        return state
