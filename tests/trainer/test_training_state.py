"""The state of a run beside its weights: kept, put back in place, proven, or refused by name."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import EarlyStoppingCallback

from weightproof.errors import InputError, RestoreError, SnapshotError
from weightproof_callbacks.trainer_mixin import CallbackState
from weightproof_callbacks.training_state import (
    ReplayableLoader,
    TrainingState,
    clear_optimizer_state,
    require_restorable,
)

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(
        p, lr=0.01, initial_accumulator_value=0.5
    ),  # its state is there before a step
}
MORE_OPTIMIZERS = {
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}
SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 6)),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 3, 5]),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 9)], milestones=[3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def state_tensors(optimizer):
    return {
        (i, name): value
        for i, state in enumerate(optimizer.state.values())
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_step_after_clearing_equals_a_first_step(name, wrapped):
    torch.manual_seed(0)
    used, fresh = nn.Linear(4, 3), nn.Linear(4, 3)
    inner = OPTIMIZERS[name](used.parameters())
    optimizer = Accelerator(cpu=True).prepare(inner) if wrapped else inner
    step(used, optimizer, seed=1)
    fresh.load_state_dict(used.state_dict())
    assert clear_optimizer_state(optimizer) == 2
    assert clear_optimizer_state(optimizer) == (2 if name == "adagrad" else 0)
    step(used, optimizer, seed=2)
    step(fresh, OPTIMIZERS[name](fresh.parameters()), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(used.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("name", {**OPTIMIZERS, **MORE_OPTIMIZERS})
def test_an_optimizer_goes_on_from_where_it_was_in_the_same_tensors(name, model):
    optimizer = {**OPTIMIZERS, **MORE_OPTIMIZERS}[name](model.parameters())
    require_restorable(optimizer, model)
    untouched = TrainingState.capture(optimizer=optimizer)
    step(model, optimizer, seed=1)
    state, weights = TrainingState.capture(optimizer=optimizer), [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, seed=2)
    expected = TrainingState.capture(optimizer=optimizer).digest

    objects = state_tensors(optimizer)
    optimizer.param_groups[0]["lr"] = 9.0
    step(model, optimizer, seed=3)
    with torch.no_grad():
        for parameter, kept in zip(model.parameters(), weights, strict=True):
            parameter.copy_(kept)
    state.restore()
    assert TrainingState.capture(optimizer=optimizer).digest == state.digest
    assert (state.digest == expected) is (name == "sgd"), "which keeps nothing"
    assert all(state_tensors(optimizer)[key] is tensor for key, tensor in objects.items()), "written in place"
    step(model, optimizer, seed=2)
    assert TrainingState.capture(optimizer=optimizer).digest == expected

    clear_optimizer_state(optimizer)
    state.restore()
    assert TrainingState.capture(optimizer=optimizer).digest == state.digest, "made anew where it was gone"
    untouched.restore()
    assert len(optimizer.state) == (2 if name == "adagrad" else 0), "what did not exist at capture is gone"


def test_groups_added_since_are_taken_out_again(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = TrainingState.capture(optimizer=optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 3.0})
    optimizer.param_groups[0]["something"] = 1
    state.restore()
    (group,) = optimizer.param_groups
    assert (group["lr"], len(group["params"]), "something" in group) == (0.1, 2, False)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_goes_on_from_where_it_was(name, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    loss = iter([1.0, 1.1, 1.2, 1.3, 1.2, 1.3, 1.4, 1.5])

    def advance():
        optimizer.step()
        scheduler.step(*[next(loss)] if name == "plateau" else [])
        return optimizer.param_groups[0]["lr"]

    first = [advance() for _ in range(2)]
    state = TrainingState.capture(optimizer=optimizer, scheduler=scheduler)
    second = [advance() for _ in range(3)]
    assert len({*first, *second}) > 1
    state.restore()
    loss = iter([1.2, 1.3, 1.2])
    assert [advance() for _ in range(3)] == second
    assert state.covered[1] == f"learning-rate schedule {type(scheduler).__name__}"


def test_a_gradient_scaler_is_put_back():
    model = nn.Linear(2, 2)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))  # lazily begun
    state = TrainingState.capture(optimizer=optimizer, scaler=scaler)
    scaler.scale(model(torch.full((1, 2), math.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    state.restore()
    assert scaler.get_scale() == 8.0
    assert "gradient scaler" in state.covered
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    assert "gradient scaler" not in TrainingState.capture(optimizer=optimizer, scaler=disabled).covered


def test_every_generator_is_put_back(model):
    own = [torch.Generator().manual_seed(1), np.random.default_rng(2), random.Random(3), np.random.RandomState(4)]

    def draw():
        return (
            random.random(), np.random.rand(), torch.randn(()).item(),  # noqa: NPY002
            torch.rand((), generator=own[0]).item(), own[1].random(), own[2].gauss(0, 1), own[3].randn(),
        )  # fmt: skip

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    draw()
    state = TrainingState.capture(optimizer=optimizer, generators=own)
    first = draw()
    assert draw() != first
    state.restore()
    assert draw() == first
    assert "random generators of Python, numpy, torch CPU, 4 further ones" in state.covered
    assert not torch.cuda.is_initialized()
    with pytest.raises(InputError, match="7 is no random generator"):
        TrainingState.capture(optimizer=optimizer, generators=[7])


def test_moving_averages_and_callbacks_are_put_back(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    patience = EarlyStoppingCallback(3)
    step(model, optimizer, seed=1)
    ema.update_parameters(model)
    patience.early_stopping_patience_counter = 1
    state = TrainingState.capture(optimizer=optimizer, extra={"ema": ema, "patience": CallbackState(patience)})
    kept = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    step(model, optimizer, seed=2)
    ema.update_parameters(model)
    patience.early_stopping_patience_counter = 3
    state.restore()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in ema.state_dict().items())
    assert patience.early_stopping_patience_counter == 1
    assert {"ema", "patience"} <= set(state.covered)
    with pytest.raises(InputError, match=r"odd \(object\) has no state_dict"):
        TrainingState.capture(optimizer=optimizer, extra={"odd": object()})


class Keeper:
    """Keeps what it is given."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return self.value

    def load_state_dict(self, value):
        self.value = value


def test_a_state_goes_through_files_unchanged(model, tmp_path):
    from safetensors.torch import load_file, save_file

    odd = {
        "numbers": [1, 2.5, math.nan, math.inf, -0.0, True, None, 2**70], "text": "é", ("a", 1): (1, [2]),
        "counter": Counter({3: 2}), "array": np.arange(3, dtype=np.uint32), "dtype": torch.bfloat16,
        "device": torch.device("cpu"), "set": {1, 2}, "half": torch.tensor([1.5], dtype=torch.bfloat16),
    }  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scheduler = SCHEDULERS["multistep"](optimizer)
    step(model, optimizer, seed=1)
    scheduler.step()
    own = torch.Generator().manual_seed(4)
    given = {"scheduler": scheduler, "extra": {"odd": Keeper({"odd": odd})}, "generators": [own]}
    state = TrainingState.capture(optimizer=optimizer, **given)
    save_file(dict(state.tensors()), tmp_path / "state.safetensors")
    values = json.loads(json.dumps(state.values(), allow_nan=False))
    expected = torch.rand(3), torch.rand(3, generator=own)

    fresh = torch.optim.AdamW(model.parameters(), lr=5.0, fused=True)
    later = {"scheduler": SCHEDULERS["multistep"](fresh), "extra": {"odd": Keeper({})}, "generators": [own]}
    tensors = load_file(tmp_path / "state.safetensors")
    read = TrainingState.from_parts(tensors, values, optimizer=fresh, **later)
    assert read.digest == state.digest
    read.restore()
    assert TrainingState.capture(optimizer=fresh, **later).digest == state.digest
    assert torch.equal(torch.rand(3), expected[0])
    assert torch.equal(torch.rand(3, generator=own), expected[1])
    found = later["extra"]["odd"].value["odd"]
    assert (found[("a", 1)], found["counter"], found["set"]) == ((1, [2]), Counter({3: 2}), {1, 2})
    assert (found["dtype"], found["array"].dtype, found["half"]) == (torch.bfloat16, np.uint32, odd["half"])
    assert repr(found["numbers"]) == repr(odd["numbers"])

    for kind, change in {
        "of AdamW, and this optimizer is SGD": {"optimizer": torch.optim.SGD(model.parameters())},
        r"groups of \[2\] parameters, and this optimizer of \[1\]": {
            "optimizer": torch.optim.AdamW([model.weight], fused=True)
        },
        "scheduler was kept, but this run has none": {"scheduler": None},
        "has 1 further generators, and 0 were given": {"generators": []},
    }.items():
        with pytest.raises(InputError, match=kind):
            TrainingState.from_parts(tensors, values, **{"optimizer": fresh, **later, **change})
    with pytest.raises(InputError, match="no training state of format"):
        TrainingState.from_parts(tensors, {"format": "x"}, optimizer=fresh)


def test_nothing_is_written_from_an_altered_copy(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer, seed=1)
    state = TrainingState.capture(optimizer=optimizer)
    assert state.digest
    step(model, optimizer, seed=2)
    now = TrainingState.capture(optimizer=optimizer).digest
    name = "optimizer/optimizer.states.1.exp_avg_sq"
    state.tensors()[name].view(torch.int32)[0] ^= 1
    with pytest.raises(RestoreError, match=r"optimizer\.states\.1\.exp_avg_sq was altered: nothing was restored"):
        state.restore()
    assert TrainingState.capture(optimizer=optimizer).digest == now


def test_what_does_not_take_its_state_is_found(model):
    class Stubborn(Keeper):
        def load_state_dict(self, value):
            self.value = {"steps": value["steps"] + 1}

    stubborn, optimizer = Stubborn({"steps": 1}), torch.optim.SGD(model.parameters(), lr=0.1)
    state = TrainingState.capture(optimizer=optimizer, extra={"stubborn": stubborn})
    with pytest.raises(RestoreError, match="after restoring: do not train on"):
        state.restore()


def test_copies_need_no_more_memory_than_themselves(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer, seed=1)
    state = TrainingState.capture(optimizer=optimizer, device="cpu")
    moments = sum(tensor.nbytes for tensor in state_tensors(optimizer).values())
    generators = sum(tensor.nbytes for name, tensor in state.tensors().items() if name.startswith("generators"))
    assert state.nbytes == moments + generators
    own = {tensor.untyped_storage().data_ptr() for tensor in state.tensors().values()}
    assert not own & {tensor.untyped_storage().data_ptr() for tensor in state_tensors(optimizer).values()}


# ---- refusals -------------------------------------------------------------------------------------------------------


class Wrapping(torch.optim.SGD):
    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.base = torch.optim.Adam(self.param_groups[0]["params"])


class Hiding(torch.optim.SGD):
    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.buffers = [torch.zeros(3)]


class Projecting(torch.optim.SGD):
    """Keeps an object in its state, from its first step on."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["projector"] = object()


class NeedsModel(torch.optim.SGD):
    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.1)


class Lomo(torch.optim.SGD):
    pass


class OfItsOwn(torch.optim.SGD):
    """Unknown, but all that it keeps is in its state: fine."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["seen"] = torch.ones(2)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Wrapping, r"Wrapping cannot be restored: it holds other optimizers \(base\)"),
        (Hiding, r"Hiding cannot be restored: it keeps tensors outside of its state \(buffers\)"),
        (Projecting, r"Projecting cannot be restored: its state\.0\.projector is a builtins\.object"),
        (Lomo, "Lomo cannot be restored: it changes the weights inside of the backward pass"),
    ],
)
def test_an_optimizer_of_which_not_all_is_known_is_refused_before_it_has_trained(kind, words, model):
    optimizer, before = kind(model.parameters(), lr=0.1), [p.detach().clone() for p in model.parameters()]
    drawn = torch.get_rng_state()
    with pytest.raises(InputError, match=f'{words}.*Choose rollback="weights"'):
        require_restorable(optimizer, model)
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_other_refusals_and_an_unknown_optimizer_that_can_be_kept(model):
    with pytest.raises(InputError, match="NeedsModel cannot be restored: it is not known, and a trial step"):
        require_restorable(NeedsModel(model), model)
    with pytest.raises(InputError, match=r"builtins\.str cannot be restored: it is no torch optimizer"):
        require_restorable("adam", model)
    require_restorable(OfItsOwn(model.parameters(), lr=0.1), model)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight] = {"copy": model.weight.view(-1)}
    with pytest.raises(SnapshotError, match="shares memory with a weight"):
        TrainingState.capture(optimizer=optimizer)
    optimizer.state.clear()
    optimizer.state[nn.Parameter(torch.ones(1))] = {"step": 1}
    with pytest.raises(SnapshotError, match="in none of its parameter groups"):
        TrainingState.capture(optimizer=optimizer)


class Packed(nn.Parameter):
    pass


def test_parameters_that_cannot_be_taken_back_are_refused_by_name():
    def refused(model, words):
        with pytest.raises(InputError, match=words):
            require_restorable(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), model)

    refused(nn.Linear(2, 2, device="meta"), "weight could not be restored: it is on the meta device")
    packed = nn.Linear(2, 2)
    packed.weight = Packed(torch.ones(2, 2))
    refused(nn.Sequential(packed), r"0\.weight could not be restored: it is a Packed, whose packed or wrapped values")
    offloaded = nn.Sequential(nn.Linear(2, 2))
    from accelerate import cpu_offload

    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    refused(offloaded, "the parameters of 0 are offloaded by accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated once in a process
        dynamic = torch.ao.nn.quantized.dynamic.Linear(2, 2)
    refused(nn.Sequential(dynamic), "0 is a Linear, which packs its weights out of reach")


def test_replay_is_refused_before_anything_is_written(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = TrainingState.capture(optimizer=optimizer, loader=[1, 2])
    assert state.uncovered == (
        "learning-rate schedule: none was given",
        "data position: list cannot give batches again, so the data goes on from where it is",
    )
    optimizer.param_groups[0]["lr"] = 5.0
    for data, words in {"replay": "wrap it as ReplayableLoader", "rewind": "data must be one of skip, replay"}.items():
        with pytest.raises(InputError, match=words):
            state.restore(data)
    assert optimizer.param_groups[0]["lr"] == 5.0
    assert "data position" in TrainingState.capture(optimizer=optimizer, loader=ReplayableLoader([1])).covered


# ---- tensors of several parts ---------------------------------------------------------------------------------------


class Halves(torch.Tensor):
    """A float tensor kept as 8-bit codes and one scale, as 8-bit optimizers keep theirs."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, context, shape, stride):
        return cls(parts["codes"], parts["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(func)


class EightBit(torch.optim.Optimizer):
    """Keeps the last gradient in 8 bits."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                scale = parameter.grad.abs().max() / 127
                self.state[parameter]["last"] = Halves((parameter.grad / scale).to(torch.int8), scale)
                parameter.sub_(parameter.grad, alpha=group["lr"])


def test_tensors_of_several_parts_are_kept_part_by_part(model):
    optimizer = EightBit(model.parameters())
    step(model, optimizer, seed=1)
    state = TrainingState.capture(optimizer=optimizer)
    assert state.tensors()["optimizer/optimizer.states.0.last.codes"].dtype is torch.int8
    held = optimizer.state[model.weight]["last"]
    held.codes.zero_()
    state.restore()
    assert optimizer.state[model.weight]["last"] is held, "written in place"
    assert held.codes.count_nonzero() > 0
    optimizer.state.clear()
    state.restore()
    assert TrainingState.capture(optimizer=optimizer).digest == state.digest
    assert type(optimizer.state[model.weight]["last"]) is Halves

    read = TrainingState.from_parts(state.tensors(), state.values(), optimizer=optimizer)
    held = optimizer.state[model.weight]["last"]
    held.codes.zero_()
    read.restore()
    assert TrainingState.capture(optimizer=optimizer).digest == state.digest
    optimizer.state.clear()
    optimizer.param_groups[0]["lr"] = 5.0
    with pytest.raises(RestoreError, match=r"last is a .*Halves of several parts.*let the optimizer take one step"):
        read.restore()
    assert optimizer.param_groups[0]["lr"] == 5.0, "nothing was restored"
