"""What could not be taken back whole is refused by name before the first step, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from tests.support.accelerate_loop import fresh_accelerate
from tests.support.chains import tiny_llama

from weightproof import attach
from weightproof.errors import WeightproofError
from weightproof_callbacks.training_state import TrainingState


class Packed(torch.Tensor):
    """Stands for a tensor that a quantizer packed."""


class Hoarder(torch.optim.SGD):
    """Keeps what it knows where nobody can see it."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.hoard = torch.zeros(3)


def pack(model):
    packed = torch.nn.Parameter(torch.ones(4, 4).as_subclass(Packed), requires_grad=False)
    model.model.register_parameter("codes", packed)


def to_meta(model):
    model.model.register_parameter("later", torch.nn.Parameter(torch.empty(2, device="meta")))


CASES = {
    "unknown-optimizer": (
        None,
        Hoarder,
        r"Hoarder cannot be restored: it keeps tensors outside of its state \(hoard\)",
    ),
    "packed": (pack, torch.optim.SGD, "model.codes"),
    "meta": (to_meta, torch.optim.SGD, "model.later"),
    "offloaded": (lambda model: cpu_offload(model.model.norm), torch.optim.SGD, "model.norm"),
}


@pytest.mark.parametrize("snapshots", ["memory", "disk"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_could_not_be_taken_back_is_refused_by_name(tmp_path, case, snapshots):
    spoil, kind, message = CASES[case]
    fresh_accelerate()
    accelerator = Accelerator(cpu=True)
    model = tiny_llama()
    model, optimizer = accelerator.prepare(model, kind(model.parameters(), lr=0.1))
    if spoil is not None:
        spoil(model)
    sound = {name: one for name, one in model.named_parameters() if one.device.type != "meta"}
    before = {name: one.detach().clone() for name, one in sound.items()}
    folder = {"snapshot_dir": tmp_path / "states"} if snapshots == "disk" else {}
    with pytest.raises(WeightproofError, match=message):
        attach(accelerator, model, optimizer, snapshots=snapshots, **folder)
    assert all(torch.equal(one, before[name]) for name, one in sound.items())
    assert not list(tmp_path.rglob("*.json")), "no state was begun"
    inner = optimizer.optimizer
    assert not inner._optimizer_step_pre_hooks
    assert not inner._optimizer_step_post_hooks
    assert not inner.state


def test_weights_alone_are_taken_back_whatever_the_optimizer():
    fresh_accelerate()
    accelerator = Accelerator(cpu=True)
    model = tiny_llama()
    model, optimizer = accelerator.prepare(model, Hoarder(model.parameters(), lr=0.1))
    with attach(accelerator, model, optimizer, rollback="weights") as guard:
        assert guard.step == 0


def test_eight_bit_moments_go_back_with_the_run():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    fresh_accelerate()
    accelerator = Accelerator(cpu=True)
    model = tiny_llama()
    inner = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-3, min_8bit_size=1)
    model, optimizer = accelerator.prepare(model, inner)
    ids = torch.randint(0, 16, (4, 16), generator=torch.Generator().manual_seed(0))

    def step():
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()

    with attach(accelerator, model, optimizer, every=2) as guard:
        for _ in range(2):
            step()
        good = TrainingState.capture(optimizer=optimizer).digest
        weights = {name: one.detach().clone() for name, one in model.named_parameters()}
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        assert guard.check().applied == "restored"
        assert TrainingState.capture(optimizer=optimizer).digest == good
        assert all(torch.equal(one, weights[name]) for name, one in model.named_parameters())
        step()
