"""A run that is killed and started again ends, bit for bit, as the run that never was."""

from __future__ import annotations

import os
import signal
import time

import crash_cases
import torch

from weightproof.snapshots.store import SnapshotFolder
from weightproof.snapshots.tensor_store import model_digest, tensor_digests
from weightproof_callbacks.training_state import TrainingState

STEPS = 30


class Run:
    """Training that draws random batches, with dropout, moments and a schedule."""

    def __init__(self):
        torch.manual_seed(3)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 8))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.step = 0

    def train_one(self):
        loss = (self.model(torch.randn(4, 8)) - 1).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1

    def state(self):
        return TrainingState.capture(optimizer=self.optimizer, scheduler=self.scheduler)

    def save(self, folder):
        state = self.state()
        weights = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        folder.save(self.step, {**weights, **state.tensors()}, state.values())

    def resume(self, saved):
        if saved is not None:
            weights = {name: saved.tensors[f"model/{name}"] for name in self.model.state_dict()}
            self.model.load_state_dict(weights)
            kept = {"optimizer": self.optimizer, "scheduler": self.scheduler}
            TrainingState.from_parts(saved.tensors, saved.values, **kept).restore()
            self.step = saved.step

    def digest(self):
        return model_digest(tensor_digests(self.model.state_dict())), self.state().digest


def test_a_run_killed_again_and_again_ends_as_its_undisturbed_twin(tmp_path):
    twin = Run()
    while twin.step < STEPS:
        twin.train_one()

    def guarded():
        run = Run()
        with SnapshotFolder(tmp_path / "run") as folder:
            run.resume(folder.latest())
            for _ in range(5):
                run.train_one()
                if run.step % 2 == 0:
                    run.save(folder)
            (tmp_path / "ready").touch()
            time.sleep(60)

    starts = set()
    for _ in range(4):
        child = crash_cases._forked(guarded)
        while not (tmp_path / "ready").exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended by itself"
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        (tmp_path / "ready").unlink()
        with SnapshotFolder(tmp_path / "run") as folder:
            starts.add(folder.opened.step)
    assert starts == {4, 8, 12, 16}, "each start went on from the last committed step"

    run = Run()
    with SnapshotFolder(tmp_path / "run") as folder:
        run.resume(folder.latest())
    while run.step < STEPS:
        run.train_one()
    assert run.digest() == twin.digest()
