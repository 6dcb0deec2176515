"""The subspace guard in two processes, whole and sharded: the readings of one process, on both."""

import pytest
import torch
import trained_models
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from worlds import run_world

from weightproof import Delta, GuardSession, InputError, edits, load_policy

NAMES = (
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.2.mlp.up_proj.weight",
)


def _change(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {NAMES[0]: (64, 64), NAMES[1]: (64, 192), NAMES[2]: (192, 64)}
    return Delta(
        {
            name: 3.0 * torch.outer(torch.randn(height, generator=generator), torch.randn(width, generator=generator))
            for name, (height, width) in shapes.items()
        }
    )


def _read(rank, size, form, path):
    """Verdict and readings of two merges, and the digest of each decision."""
    model = trained_models.load("llama").model
    if form == "sharded":
        mesh = init_device_mesh("cpu", (size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    policy = load_policy("balanced").override({"subspace": {"directions": path}}, mode="monitor")
    session = GuardSession(model, policy=policy)
    found = []
    for seed in (1, 2):
        step = session.apply(edits.steer(_change(seed)))
        verdict = next(one for one in step.decision.verdicts if one.guard == "subspace")
        found.append((verdict.outcome, step.judged.after.subspace, step.decision.digest))
    session.close()
    return found


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "directions.safetensors"
    save_file({"refusal": torch.randn(64, generator=torch.Generator().manual_seed(9))}, file)
    return str(file)


def test_two_processes_read_what_one_does(path):
    alone = _read(0, 1, "whole", path)
    for form in ("whole", "sharded"):
        first, second = run_world(_read, 2, form, path, timeout=120)
        assert first == second
        for ours, theirs in zip(alone, first, strict=True):
            assert ours[0] == theirs[0]
            assert ours[1].directions == theirs[1].directions
            for one, other in zip(ours[1].matrices, theirs[1].matrices, strict=True):
                assert (one.name, one.method, one.reason) == (other.name, other.method, other.reason)
                assert one.cosines == pytest.approx(other.cosines, abs=1e-6)
                assert one.earlier == pytest.approx(other.earlier, abs=1e-6)
                assert len(one.stored) == len(other.stored) == (one.name != NAMES[2])
            assert [one.name for one in ours[1].matrices] == list(NAMES)
        assert first[1][1].matrices[1].earlier


def _refused(rank, size, path):
    policy = load_policy("balanced").override({"subspace": {"directions": path if not rank else f"{path}.gone"}})
    try:
        GuardSession(trained_models.load("llama").model, policy=policy)
    except InputError as error:
        return str(error)
    return None


def test_every_process_refuses_where_they_were_given_different_files(path):
    found = run_world(_refused, 2, path)
    assert all("policy" in said or "cannot be read" in said for said in found)
