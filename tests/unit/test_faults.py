"""Injected faults: each does what it says, once, on its rank, from its seed, and leaves no hook behind."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from weightproof.errors import InputError
from weightproof.snapshots.tensor_store import same_bits
from weightproof.testing import faults, inject
from weightproof.testing.tampering import flip_bit, pick_element

VOCABULARY = 11


class Small(nn.Module):
    """Embedding, linear, norm, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.mix = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.norm(self.mix(self.embed(input_ids))))
        return cross_entropy(logits.flatten(0, 1), labels.flatten())


class Run:
    """A loop of a few steps, and what it left."""

    def __init__(self, steps: int = 4, **settings) -> None:
        torch.manual_seed(0)
        self.model = Small()
        self.settings = settings
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        generator = torch.Generator().manual_seed(1)
        self.batches = [torch.randint(VOCABULARY, (2, 6), generator=generator) for _ in range(steps)]
        self.seen: list[torch.Tensor] = []
        self.rates: list[float] = []
        self.losses: list[float] = []

    def train(self, *chosen: faults.Fault, **settings):
        def record(module, args, kwargs):
            self.seen.append(kwargs["input_ids"].clone())

        watch = self.optimizer.register_step_post_hook(
            lambda optimizer, *_: self.rates.append(optimizer.param_groups[0]["lr"])
        )
        with inject(chosen, self.model, self.optimizer, **settings) as injection:
            seen = self.model.register_forward_pre_hook(record, with_kwargs=True)
            for batch in injection.loader(self.batches):
                loss = self.model(input_ids=batch, labels=batch)
                loss.backward()
                self.losses.append(loss.item())
                self.optimizer.step()
                self.optimizer.zero_grad()
        watch.remove()
        seen.remove()
        return injection

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def hooks(self) -> int:
        modules = [m for m in self.model.modules() if m._forward_hooks or m._forward_pre_hooks]
        tensors = [p for p in self.model.parameters() if p._post_accumulate_grad_hooks]
        steps = [*self.optimizer._optimizer_step_pre_hooks, *self.optimizer._optimizer_step_post_hooks]
        return len(modules) + len(tensors) + len(steps)


def clean() -> Run:
    run = Run()
    run.train()
    return run


def masters_of(run: Run) -> dict[str, torch.Tensor]:
    return {"mix.weight": run.model.mix.weight.detach().clone()}


def every_fault(**settings) -> list[faults.Fault]:
    return [faults.make_fault(name, at=2, **settings) for name in faults.REGISTRY]


@pytest.mark.parametrize("name", sorted(set(faults.REGISTRY) - {"stuck-rank", "wrong-rng", "stale-masters"}))
def test_every_fault_changes_the_run_and_only_from_its_step_on(name):
    run, twin = Run(), clean()
    injection = run.train(faults.make_fault(name, at=2, rank=0))
    assert injection.fired
    assert {fired.step for fired in injection.fired} <= {2, 3, 4}
    assert run.losses[0] == twin.losses[0]
    assert any(not same_bits(run.weights()[key], twin.weights()[key]) for key in twin.weights())


@pytest.mark.parametrize("fault", every_fault(rank=3), ids=lambda fault: fault.name)
def test_on_other_ranks_nothing_happens(fault):
    run, twin = Run(), clean()
    assert run.train(fault, rank=0, masters=masters_of(run)).fired == []
    assert run.losses == twin.losses
    assert all(same_bits(run.weights()[key], twin.weights()[key]) for key in twin.weights())


@pytest.mark.parametrize("name", sorted(set(faults.REGISTRY) - {"stuck-rank"}))
def test_a_fault_is_the_same_for_the_same_seed(name):
    def lived() -> tuple[dict, list]:
        run = Run()
        fired = run.train(faults.make_fault(name, at=2, rank=0, seed=5), masters=masters_of(run)).fired
        return run.weights(), fired

    (weights, fired), (again, fired_again) = lived(), lived()
    assert fired == fired_again
    assert all(same_bits(weights[key], again[key]) for key in weights)


@pytest.mark.parametrize("fault", every_fault(rank=0), ids=lambda fault: fault.name)
def test_no_hook_and_no_learning_rate_is_left_behind(fault):
    run = Run()
    with (
        pytest.raises(KeyboardInterrupt),
        inject([fault], run.model, run.optimizer, masters=masters_of(run), steps_done=1),
    ):
        assert run.hooks() > 0
        run.optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        if fault.name in ("stuck-rank", "optimizer-bit-flip"):
            raise KeyboardInterrupt  # the one would sleep, the other has no moments in a first step
        run.model(input_ids=run.batches[0], labels=run.batches[0]).backward()
        run.optimizer.step()
    assert run.optimizer.param_groups[0]["lr"] == 0.01
    run.optimizer._optimizer_step_pre_hooks.popitem()
    if fault.name not in ("stuck-rank", "optimizer-bit-flip"):
        assert run.hooks() == 0


@pytest.mark.parametrize("name", sorted(set(faults.REGISTRY)))
def test_mild_is_weaker_and_hits_the_same(name):
    fault = faults.make_fault(name, at=3)
    if fault.weaker is None:
        with pytest.raises(InputError, match="no mild form"):
            fault.mild()
    else:
        assert fault.mild() != fault
        assert fault.mild().at == 3


def test_strength_is_told_in_words():
    assert faults.LearningRateSpike(at=3).strength == "factor=100, steps=5"
    assert faults.WeightBitFlip(tensor="mix.weight").strength == "tensor=mix.weight, bit=1"
    assert faults.WrongRNG(seed=4).strength == "moment=resume"


def test_the_learning_rate_is_back_after_its_steps():
    run = Run()
    run.train(faults.LearningRateSpike(at=2, steps=2, factor=100.0))
    # Recorded by a hook that runs before the fault's own.
    assert run.rates == [0.01, 1.0, 1.0, 0.01]
    assert run.optimizer.param_groups[0]["lr"] == 0.01


def test_a_bad_batch_replaces_tokens_and_leaves_the_loader_alone():
    run = Run()
    held = [batch.clone() for batch in run.batches]
    run.train(faults.BadBatch(at=2, steps=1))
    assert all(torch.equal(one, other) for one, other in zip(run.batches, held, strict=True))
    assert torch.equal(run.seen[0], held[0])
    assert not torch.equal(run.seen[1], held[1])
    assert int(run.seen[1].max()) < VOCABULARY


def test_a_share_of_a_bad_batch_is_a_share():
    run = Run()
    run.batches = [torch.zeros(64, 64, dtype=torch.long) for _ in range(2)]
    run.train(faults.BadBatch(at=2, steps=1, share=0.25, vocabulary=VOCABULARY))
    changed = float((run.seen[1] != 0).float().mean())
    assert changed == pytest.approx(0.25 * (VOCABULARY - 1) / VOCABULARY, abs=0.03)


def test_a_skewed_loader_gives_the_batch_before_again():
    run = Run()
    run.train(faults.LoaderSkew(at=3))
    assert torch.equal(run.seen[2], run.batches[1])
    assert torch.equal(run.seen[3], run.batches[3])


def test_a_flip_in_a_gradient_comes_before_clipping():
    run = Run()
    norms = []
    with inject([faults.GradientBitFlip(at=1)], run.model, run.optimizer):
        run.model(input_ids=run.batches[0], labels=run.batches[0]).backward()
        norms.append(float(nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)))
    assert norms[0] > 1e10 or not math.isfinite(norms[0])


def test_accumulated_gradients_are_hit_once_a_step():
    run = Run()
    with inject([faults.GradientBitFlip(at=1, bit=20)], run.model, run.optimizer) as injection:
        for batch in run.batches[:3]:
            run.model(input_ids=batch, labels=batch).backward()
        run.optimizer.step()
    assert len(injection.fired) == 1


def test_wrong_rng_reaches_every_generator():
    def drawn() -> tuple:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    run = Run(steps=1)
    run.train(faults.WrongRNG(at=1, seed=9, moment="step"))
    first = drawn()
    random.seed(9)
    np.random.seed(9)  # noqa: NPY002
    torch.manual_seed(9)
    assert first == drawn()


def test_wrong_rng_takes_the_file_of_its_rank_away_when_a_run_resumes(tmp_path):
    names = ["random_states_0.pkl", "random_states_1.pkl", "rng_state.pth", "model.safetensors"]
    for name in names:
        (tmp_path / name).touch()
    run = Run(steps=1)
    with inject([faults.WrongRNG(seed=9, rank=0)], run.model, run.optimizer, rank=0) as injection:
        torch.manual_seed(1)
        injection.resuming(tmp_path)
        assert float(torch.rand(())) == float(torch.rand((), generator=torch.Generator().manual_seed(9)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "random_states_1.pkl"]
    with inject([faults.WrongRNG(rank=1)], run.model, run.optimizer, rank=0) as injection:
        injection.resuming(tmp_path)
    assert injection.fired == []


def test_stale_masters_change_the_weight_alone():
    run = Run(steps=1)
    masters = masters_of(run)
    held = masters["mix.weight"].clone()
    run.train(faults.StaleMasters(at=1), masters=masters)
    assert same_bits(masters["mix.weight"], held)


def test_nan_reaches_weights_in_its_place_only():
    run = Run(steps=1)
    run.train(faults.RankNaN(at=1, tensor="mix.weight"))
    broken = {name: int(weight.isnan().sum()) for name, weight in run.weights().items()}
    assert broken.pop("mix.weight") == 1
    assert not any(broken.values())


def test_the_last_norm_gain_flips_its_sign():
    run, twin = Run(steps=1), Run(steps=1)
    twin.train()
    run.train(faults.NormGainFlip(at=1))
    assert torch.equal(run.model.norm.weight, -twin.model.norm.weight)
    assert torch.equal(run.model.head.weight, twin.model.head.weight)


def test_a_loss_scale_that_is_not_divided_out_multiplies_gradients():
    run = Run(steps=1)
    grads = []
    run.optimizer.register_step_pre_hook(lambda *_: grads.append(run.model.mix.weight.grad.clone()))
    with inject([faults.Overflow(at=1, where="loss scale", factor=1024.0)], run.model, run.optimizer):
        run.optimizer.register_step_pre_hook(lambda *_: grads.append(run.model.mix.weight.grad.clone()))
        run.model(input_ids=run.batches[0], labels=run.batches[0]).backward()
        run.optimizer.step()
    assert torch.equal(grads[1], 1024.0 * grads[0])


def test_steps_of_a_resumed_run_are_counted_on():
    run = Run()
    assert run.train(faults.WeightBitFlip(at=12), steps_done=10).fired[0].step == 12


# ---- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bit", [0, 1, 2, 9])
def test_a_flipped_bit_is_flipped_and_twice_is_not_at_all(dtype, bit):
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    held = tensor.clone()
    before, after = flip_bit(tensor, 7, bit)
    assert float(tensor[1, 2]) == after or math.isnan(after)
    assert before != after
    if bit == 0:
        assert after == -before
    if bit == 1:
        assert abs(after) > 1e4 * abs(before) or not math.isfinite(after)
    different = (tensor != held).sum()
    assert int(different) == 1
    flip_bit(tensor, 7, bit)
    assert same_bits(tensor, held)


def test_an_element_is_drawn_among_the_largest():
    values = torch.arange(100.0).reshape(10, 10) / 45
    drawn = {pick_element(values, seed) for seed in range(50)}
    assert min(drawn) >= 80
    assert max(drawn) < 90  # 2 and more has the top bit of its exponent set already
    assert len(drawn) > 5
    assert pick_element(torch.tensor([3.0]), 0) == 0


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: faults.make_fault("gremlin"), "no fault 'gremlin'"),
        (lambda: faults.make_fault("bad-batch", bit=3), "no parameter 'bit'"),
        (lambda: faults.WeightBitFlip(at=0), "count from 1"),
        (lambda: Run().train(faults.WeightBitFlip(tensor="nope")), "'nope', which is no trained parameter"),
        (lambda: Run().train(faults.WeightBitFlip(bit=32)), "no bit 32"),
        (lambda: Run().train(faults.WeightBitFlip(element=10**9)), "no element 1000000000"),
        (lambda: Run().train(faults.StaleMasters()), "give masters="),
        (lambda: Run().train(faults.Overflow(module="attic")), "no layer attic"),
        (lambda: Run().train(faults.Overflow(where="cellar")), "'cellar'"),
        (lambda: Run().train(faults.OptimizerBitFlip(at=2, state="momentum")), "holds no 'momentum'"),
        (lambda: inject([], Small(), object()), "not object"),
        (lambda: flip_bit(torch.zeros(0), pick_element(torch.zeros(0), 0), 1), "empty tensor"),
    ],
)
def test_what_cannot_be_injected_is_refused_in_words(make, says):
    with pytest.raises(InputError, match=says):
        make()


def test_a_refused_fault_leaves_no_hook():
    run = Run()
    with pytest.raises(InputError):
        inject([faults.Overflow(), faults.NormGainFlip(tensor="nope")], run.model, run.optimizer)
    assert run.hooks() == 0


@pytest.mark.parametrize("value", [1e-30, 3e-11, 2e-6, 1e-3, 0.05, 0.9, -0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bit_that_makes_a_number_larger_is_found_whatever_its_size(value, dtype):
    held = torch.full((3,), value, dtype=dtype)
    bit = faults.bits._raising_bit(held, 1)
    assert same_bits(held, torch.full((3,), value, dtype=dtype)), "the tensor itself is left as it is"
    before, after = flip_bit(held, 1, bit)
    assert abs(before) < abs(after) < 2.0
