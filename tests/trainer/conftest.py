"""W&B offline, in a folder of the test's own."""

import pytest


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    import wandb

    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # W&B reads its environment once a process: an earlier test's folder would be used
    yield wandb
    if wandb.run is not None:
        wandb.finish()
    wandb.teardown()
