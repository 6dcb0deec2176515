"""Edits by two processes: the same weights as in one, however the model is stored."""

from __future__ import annotations

import copy

import pytest
import torch
import trained_models
from edit_cases import Session
from sharded_models import ToyModel, ids, partition_all, shard
from sharding import shard as shard_blocks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard as Cut
from torch.nn.parallel import DistributedDataParallel
from worlds import run_world

from weightproof import edits
from weightproof.collective import Processes
from weightproof.errors import InputError
from weightproof.families import unwrap
from weightproof.forward.calibration import calibration_windows
from weightproof.judgement.plans import prepared, rewrite, selected
from weightproof.parallel.shards import assemble, shard_of
from weightproof.session import GuardSession
from weightproof.types import Action, Outcome
from weightproof.weights import iter_tensors


def whole_values(model, processes):
    """Every tensor of a model, whole, on every rank."""
    found = {}
    for named in iter_tensors(model):
        part = shard_of(named.tensor)
        if part is None:
            found[named.name] = named.tensor.detach().clone()
            continue
        wholes = [assemble(processes, named.name, [(owner, part)])[0] for owner in range(processes.size)]
        found[named.name] = wholes[processes.rank].clone()
    return found


def carry_out(edit, model, processes):
    edit = prepared(edit, Session(model, processes=processes))
    rewrite(processes, edit.name, selected(model, edit), edit.plan)


def fsdp(rank, size):
    model = ToyModel()
    for layer in model.layers:
        fully_shard(layer.c_fc)
    return shard(model)


def fsdp_columns(rank, size):
    return shard(ToyModel(), shard_placement_fn=lambda p: Cut(1) if p.ndim > 1 and p.shape[1] % size == 0 else None)


def zero3(rank, size):
    return partition_all(ToyModel(), rank, size)


def replicated(rank, size):
    return DistributedDataParallel(ToyModel())


STORED = {"ddp": replicated, "fsdp": fsdp, "fsdp columns": fsdp_columns, "zero3": zero3}


def toy_deltas():
    """A change of a matrix, a turned one, one of a stack, a bias and a norm."""
    generator = torch.Generator().manual_seed(4)
    shapes = {
        "layers.0.q_proj.weight": (16, 16),
        "layers.0.c_fc.weight": (9, 16),
        "layers.1.experts.up_proj[2]": (10, 16),
        "layers.1.c_fc.bias": (9,),
        "layers.0.norm.weight": (16,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def toy_edits():
    return [
        edits.Prune(0.43, scope="global"),
        edits.Prune(0.3),
        edits.RTN(3, "group", 8, symmetric=False),
        edits.SVD(rank=5),
        edits.TaskArithmetic(toy_deltas(), weight=0.5),
    ]


def equal_to_one_process(rank, size, stored):
    processes = Processes.join(timeout=30)
    for edit in toy_edits():
        plain, model = ToyModel(), STORED[stored](rank, size)
        carry_out(edit, plain, Processes.alone())
        carry_out(edit, model, processes)
        wanted = {named.name: named.tensor.detach() for named in iter_tensors(plain)}
        for name, values in whole_values(unwrap(model), processes).items():
            assert torch.equal(values, wanted[name]), (edit.name, name)
    return True


@pytest.mark.parametrize("stored", STORED)
def test_every_edit_writes_the_weights_of_one_process(stored):
    assert run_world(equal_to_one_process, 2, stored) == [True, True]


# ---- guarded, on a trained model ------------------------------------------------------------------------------------


def guarded(rank, size, stored):
    """What a guarded prune and a guarded GPTQ came to, beside GPTQ in one process."""
    base = trained_models.load("llama").model
    retain = trained_models.calibration_windows("llama")
    plain = copy.deepcopy(base)
    single = comparison_with_one_process(plain, retain)
    facts = []
    for edit in (edits.Prune(0.1, scope="global", include=("*", "head")), edits.GPTQ(4, "group", 16)):
        model = copy.deepcopy(base)
        model = DistributedDataParallel(model) if stored == "ddp" else shard_blocks(model)
        session = GuardSession(model, retain=retain, timeout=60)
        with torch.no_grad():
            model(input_ids=retain[0]["input_ids"][:1])  # FSDP2 leaves the root's weights whole after this
        step = session.apply(edit, on_violation="monitor")
        invariants = next(one for one in step.verdicts if one.guard == "invariants")
        ours = whole_values(unwrap(model), session.processes)
        same = single(edit, ours)
        facts.append((step.decision.digest, invariants.outcome, invariants.reason, same))
        session.close()
    return facts


def comparison_with_one_process(plain, retain):
    """Share of elements that are bit for bit what one process writes."""
    windows = (calibration_windows(retain, plain, count=8),)

    def compare(edit, ours):
        model = copy.deepcopy(plain)
        edit = prepared(edit, Session(model, windows))
        rewrite(Processes.alone(), edit.name, selected(model, edit), edit.plan)
        names = [matrix.tensor_name for matrix in selected(model, edit)]
        theirs = {named.name: named.tensor.detach() for named in iter_tensors(model)}
        equal = sum(int((ours[name] == theirs[name]).sum()) for name in names)
        return equal / sum(ours[name].numel() for name in names)

    return compare


@pytest.mark.parametrize("stored", ["ddp", "fsdp"])
def test_global_pruning_and_gptq_are_guarded_alike_on_every_rank(stored):
    trained_models.load("llama")  # into the cache, before two processes want it
    ours, theirs = run_world(guarded, 2, stored, timeout=120)
    assert ours == theirs
    for _, outcome, reason, _ in ours:
        assert outcome is Outcome.PASS, reason
    pruned, rounded = ours[0][3], ours[1][3]
    assert pruned == 1.0
    assert rounded > 0.98  # sums of second moments in another order move what lies on a tie


# ---- what cannot be done --------------------------------------------------------------------------------------------


class HalfUsed(nn.Module):
    """The second map is never reached."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up_proj = nn.Linear(6, 6)
        self.down_proj = nn.Linear(6, 6)

    def forward(self, x):
        return self.up_proj(x)


def refused_alike(rank, size):
    said = []
    session = GuardSession(HalfUsed(), retain=[{"x": torch.ones(1, 6)}, {"x": torch.zeros(1, 6)}], timeout=30)
    toy = GuardSession(ToyModel(), retain=[{"ids": ids()}], timeout=30)
    for one, edit in (
        (session, edits.GPTQ(4, include=("*_proj.weight",))),
        (session, edits.Prune(pattern="2:4", include=("*_proj.weight",))),
        (toy, edits.GPTQ(4)),
        (toy, edits.RTN(4, include=("*.nothing.*",))),
    ):
        with pytest.raises(InputError) as caught:
            one.apply(edit)
        said.append(str(caught.value))
    with pytest.raises(InputError) as caught:
        toy.apply(edits.GPTQ(8, exclude=("expert",), data=[{"ids": ids(seed=rank)}]))
    said.append(str(caught.value))
    step = toy.apply(edits.GPTQ(8, exclude=("expert",), data=[{"ids": ids()}]), on_violation="monitor")
    assert step.decision.action in (Action.KEEP, Action.ROLLBACK)
    session.close()
    toy.close()
    return said


def test_what_cannot_be_done_is_refused_on_every_rank_by_name():
    ours, theirs = run_world(refused_alike, 2)
    assert ours == theirs
    assert "no calibration window reaches down_proj.weight" in ours[0]
    assert "up_proj.weight has 6 inputs" in ours[1]
    assert "exclude=('expert',)" in ours[2]
    assert "selects no weight matrix" in ours[3]
    assert "rank 1 was given other calibration data than rank 0" in ours[4]
