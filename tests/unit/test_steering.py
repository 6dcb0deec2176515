"""Steering: checked before the first write, exact at 0, from the snapshot at every alpha, taken back bit for bit."""

from __future__ import annotations

import copy
import gc
import re
import warnings

import containers
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from trained_adapters import adapted, configuration
from trained_models import calibration_windows, untrained

import weightproof
from weightproof import Delta, InputError, steer
from weightproof.deltas import LowRank
from weightproof.errors import RestoreError
from weightproof.snapshots.tensor_store import model_digest, tensor_digest
from weightproof.weights import iter_tensors, iter_weight_matrices

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about layers that are tied or turned


def digest(model):
    return model_digest({one.name: tensor_digest(one.tensor.detach()) for one in iter_tensors(model)})


def small(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def a_delta(seed=1):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(8, 2, generator=generator), torch.randn(2, 6, generator=generator)
    return Delta({"0.weight": LowRank(left, right), "2.weight": torch.randn(5, 8, generator=generator)})


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def expected(before, delta, alpha):
    """W + alpha D in float32, rounded once, by the definition."""
    found = dict(before)
    for name in delta.parts:
        found[name] = (before[name].float() + alpha * delta.dense(name)).to(before[name].dtype)
    return found


def assert_close(model, wanted):
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor.float(), wanted[name].float(), rtol=1e-5, atol=1e-6), name


# ---------------------------------------------------------------- strength


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_alpha_is_added_in_float32_and_rounded_once_and_taken_back_exactly(dtype):
    model, delta = small(dtype), a_delta()
    before, was = values(model), digest(model)
    with steer(model, delta, 0.7) as steering:
        for name in delta.parts:
            work = before[name].to(torch.float64) + 0.7 * delta.dense(name).double()
            ulp = torch.finfo(dtype).eps
            assert ((model.state_dict()[name].double() - work).abs() <= 1.01 * ulp * work.abs() / 2 + 1e-6).all()
        assert steering.written == ("0.weight", "2.weight")
        assert steering.hooked == ()
    assert digest(model) == was


def test_alpha_0_is_an_exact_no_op():
    # -0.0 + 0 * D is +0.0: a sum would not do.
    model, delta = small(), a_delta()
    with torch.no_grad():
        model[0].weight[0].fill_(-0.0)
    was = digest(model)
    with steer(model, delta, 0.0) as steering:
        assert digest(model) == was
        steering.set(2.0)
        assert digest(model) != was
        steering.set(0.0)
        assert digest(model) == was
    assert digest(model) == was


def test_a_sweep_starts_from_the_snapshot_every_time():
    model, delta = small(torch.bfloat16), a_delta()
    once = {}
    for alpha in (0.25, -1.0, 3.0):
        with steer(model, delta, alpha):
            once[alpha] = digest(model)
    with steer(model, delta) as steering:
        for alpha in (3.0, 0.25, -1.0, 0.25, 3.0):
            steering.set(alpha)
            assert steering.alpha == alpha
            assert digest(model) == once[alpha]


# ---------------------------------------------------------------- nesting and exceptions


def test_nested_steerings_add_up_and_end_in_reverse_order():
    model, first, second = small(), a_delta(1), a_delta(2)
    before, was = values(model), digest(model)
    with steer(model, first, 0.5) as outer:
        inside = digest(model)
        with steer(model, second, -0.5):
            assert_close(model, expected(expected(before, first, 0.5), second, -0.5))
            with pytest.raises(InputError, match="another one that was begun in it"):
                outer.set(1.0)
        assert digest(model) == inside
        outer.set(1.0)
    assert digest(model) == was


def test_nested_restore_is_bit_exact_after_an_exception():
    model, was = small(torch.bfloat16), None
    was = digest(model)
    with pytest.raises(ZeroDivisionError), steer(model, a_delta(1), 0.5):  # noqa: SIM117
        with steer(model, a_delta(2), 5.0), steer(model, a_delta(3), -1.0) as innermost:
            innermost.set(7.0)
            with torch.no_grad():
                model[0].weight.zero_()  # what the block itself did to the weights goes too
            raise ZeroDivisionError
    assert digest(model) == was
    with steer(model, a_delta(1), 0.5):
        assert digest(model) != was
    assert digest(model) == was


def test_a_steering_ends_only_after_those_begun_in_it():
    model = small()
    was = digest(model)
    outer, inner = steer(model, a_delta(1)), steer(model, a_delta(2))
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(InputError, match="cannot end a steering while another"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    outer.__exit__(None, None, None)
    assert digest(model) == was


def test_a_steering_that_is_over_cannot_be_set_and_one_in_force_not_entered():
    model = small()
    steering = steer(model, a_delta())
    with pytest.raises(InputError, match="not in force"):
        steering.set(1.0)
    with steering, pytest.raises(InputError, match="in force already"):
        steering.__enter__()
    assert "not in force" in repr(steering)
    with steering:  # again
        assert "2 matrices written, in force" in repr(steering)


def test_nothing_of_a_model_is_held_when_it_is_over():
    from weightproof.steering import _ACTIVE

    model = small()
    with steer(model, a_delta()):
        pass
    known = len(_ACTIVE)
    del model
    gc.collect()
    assert len(_ACTIVE) < known


def test_an_error_while_writing_leaves_the_model_as_it_was(monkeypatch):
    model, was = small(), None
    was = digest(model)
    real, calls = weightproof.steering.write_matrix, []

    def failing(matrix, tensor):
        calls.append(matrix.name)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        real(matrix, tensor)

    monkeypatch.setattr("weightproof.steering.write_matrix", failing)
    with pytest.raises(RuntimeError, match="out of memory"), steer(model, a_delta()):
        pass
    assert len(calls) == 2
    assert digest(model) == was


def test_weights_that_were_replaced_in_the_block_are_told():
    model = small()
    with pytest.raises(RestoreError, match=r"0.weight was replaced inside the block"), steer(model, a_delta()):
        model[0] = nn.Linear(6, 8)
    with pytest.raises(RestoreError, match="was replaced inside the block"), steer(model, a_delta()):
        model.to(torch.bfloat16)


# ---------------------------------------------------------------- refused before anything is written


def names_of_a_typo():
    return Delta({"0.weight": torch.ones(8, 6), "2.wieght": torch.ones(5, 8)})


BAD = {
    "a typo": (names_of_a_typo, r"'2.wieght', which this model does not have .*did you mean '2.weight'"),
    "another shape": (
        lambda: Delta({"0.weight": torch.ones(6, 8)}),
        r"is \[6, 8\] \(d_out, d_in\), the matrix \[8, 6\]",
    ),
    "NaN": (lambda: Delta({"0.weight": torch.full((8, 6), torch.nan)}), "holds NaN or inf"),
    "inf in a factor": (
        lambda: Delta({"0.weight": LowRank(torch.full((8, 1), torch.inf), torch.ones(1, 6))}),
        "holds NaN or inf",
    ),
    "a bias": (lambda: Delta({"0.bias": torch.ones(1, 8)}), "does not have"),
    "another base": (
        lambda: Delta({"0.weight": torch.ones(8, 6)}, {"base": {"name": "b", "digests": {"0.weight": "0" * 64}}}),
        r"made for another base: 0.weight had the digest 0{16} then \(b\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_it_is_refused_before_any_write(case, monkeypatch):
    make, words = BAD[case]
    model = small()
    was = digest(model)
    monkeypatch.setattr("weightproof.steering.write_matrix", lambda *_: pytest.fail("it was written"))
    with pytest.raises(InputError, match=words), steer(model, make()):
        pytest.fail("the block was entered")
    assert digest(model) == was


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "1", True])
def test_alpha_must_be_a_finite_number(alpha):
    with pytest.raises(InputError, match="alpha must be a finite number"):
        steer(small(), a_delta(), alpha)


def test_an_alpha_out_of_the_range_of_the_dtype_is_refused_and_the_last_one_stays():
    model, delta = small(torch.float16), Delta({"0.weight": torch.ones(8, 6)})
    with steer(model, delta, 2.0) as steering:
        now = digest(model)
        with pytest.raises(InputError, match=r"takes 0.weight out of the range of torch.float16"):
            steering.set(1e5)
        assert digest(model) == now
        assert steering.alpha == 2.0
        steering.set(6e4)
        assert bool(model[0].weight.isfinite().all())


def test_another_base_can_be_asked_for():
    delta = Delta({"0.weight": torch.ones(8, 6)}, {"base": {"digests": {"0.weight": "0" * 64}}})
    with steer(small(), delta, same_base=False) as steering:
        assert steering.alpha == 1.0


def test_a_delta_made_for_the_base_steers_inside_a_steering_too():
    model = small()
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned[0].weight.add_(1.0)
    delta = Delta.between(model, tuned)
    with steer(model, delta), steer(model, delta), pytest.raises(InputError, match="another base"):
        with torch.no_grad():
            other = small(seed=5)
        with steer(other, delta):
            pass


def test_tied_names_are_one_matrix():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    change = torch.arange(20.0).reshape(5, 4)
    before = model["head"].weight.detach().clone()
    with steer(model, Delta({"head.weight": change})):
        assert torch.equal(model["embed"].weight, before + change)
    assert torch.equal(model["head"].weight, before)
    both = Delta({"head.weight": change, "embed.weight": change})
    with pytest.raises(InputError, match="twice, under the names of two tied tensors"), steer(model, both):
        pass


def test_the_backup_may_lie_elsewhere():
    model = small()
    was = digest(model)
    with steer(model, a_delta(), backup_device="cpu"):
        pass
    assert digest(model) == was


# ---------------------------------------------------------------- packed weights


@pytest.mark.parametrize("packed", [containers.GptqContainer, containers.AwqContainer, containers.CompressedContainer])
def test_packed_weights_are_steered_by_a_hook_and_not_written(packed):
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(32, 16)
    model = nn.Sequential(nn.Linear(32, 32), packed(plain))
    delta = Delta({"0.weight": torch.randn(32, 32, generator=generator), "1.weight": LowRank(
        torch.randn(16, 2, generator=generator), torch.randn(2, 32, generator=generator))})  # fmt: skip
    inputs = torch.randn(3, 7, 32, generator=generator)
    was, before = digest(model), model(inputs)
    with torch.no_grad():
        with steer(model, delta, 0.5) as steering:
            assert (steering.written, steering.hooked) == (("0.weight",), ("1.weight",))
            assert "1 by hooks on packed weights" in repr(steering)
            hidden = inputs @ (model[0].weight).T + model[0].bias
            weight = model[1].weight_in_use().float() + 0.5 * delta.dense("1.weight")
            wanted = hidden @ weight.T + model[1].bias
            assert torch.allclose(model(inputs), wanted, rtol=1e-4, atol=1e-4)
            steering.set(0.0)
            assert torch.equal(model(inputs), before)
            with steer(model, delta, 1.0), steer(model, delta, -1.0):
                assert torch.allclose(model(inputs), before, atol=1e-4)
            assert torch.equal(model(inputs), before)
        assert torch.equal(model(inputs), before)
    assert digest(model) == was
    assert not model[1]._forward_hooks


class Adapted(nn.Module):
    """A layer of PEFT around a packed one, as far as names go."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer

    def forward(self, x):
        return 2 * self.base_layer(x)


def test_inside_a_live_adapter_the_packed_layer_itself_is_steered():
    model = nn.ModuleDict({"up_proj": Adapted(containers.GptqContainer(nn.Linear(32, 16)))})
    inputs, delta = torch.randn(3, 32), Delta({"up_proj.weight": torch.randn(16, 32)})
    with torch.no_grad():
        before = model["up_proj"](inputs)
        with steer(model, delta) as steering:
            assert steering.hooked == ("up_proj.weight",)
            assert torch.allclose(
                model["up_proj"](inputs), before + 2 * inputs @ delta.dense("up_proj.weight").T, atol=1e-4
            )
        assert torch.equal(model["up_proj"](inputs), before)


def test_a_pruning_mask_is_steered_by_its_output_too():
    model = nn.Sequential(nn.Linear(6, 4))
    prune.random_unstructured(model[0], "weight", 0.5)
    inputs, delta = torch.randn(3, 6), Delta({"0.weight": torch.randn(4, 6)})
    was = digest(model)
    with torch.no_grad(), steer(model, delta, 0.5):
        wanted = inputs @ (model[0].weight + 0.5 * delta.dense("0.weight")).T + model[0].bias
        assert torch.allclose(model(inputs), wanted, atol=1e-5)
    assert digest(model) == was


# ---------------------------------------------------------------- real adapters, planted directions


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_real_adapter_steers_as_peft_merges_it(name):
    base = untrained(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(copy.deepcopy(base), configuration(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_" in key:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.05)
    delta, was = Delta.from_adapter(model), digest(base)
    window = calibration_windows(name, 1)[0]
    with torch.no_grad(), steer(base, delta, 1.0):
        steered = base(**window).logits
    with torch.no_grad():
        wanted = model.eval()(**window).logits
    assert torch.allclose(steered, wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(steered, base(**window).logits, atol=1e-2)
    assert digest(base) == was
    assert {one.name for one in iter_weight_matrices(base)} >= set(delta.names)


def planted(name, token, model):
    """A real PEFT adapter of rank 1 on the last output of the residual stream: outer(lm_head row of a token, v)."""
    last = {"llama": r".*layers\.2\.mlp\.down_proj", "gpt2": r".*h\.2\.mlp\.c_proj"}[name]
    config = configuration(name, r=1, lora_alpha=1, target_modules=last)
    wrapped = adapted(model, config)
    layer = next(one for path, one in wrapped.named_modules() if re.fullmatch(last, path))
    direction = model.get_output_embeddings().weight[token].detach()
    generator = torch.Generator().manual_seed(9)
    v = torch.randn(layer.in_features, generator=generator)
    with torch.no_grad():
        layer.lora_B["default"].weight.copy_(direction[:, None])
        layer.lora_A["default"].weight.copy_(v[None])
    return Delta.from_adapter(wrapped)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_planted_direction_moves_the_planted_logit_linearly(name):
    token, base = 7, untrained(name)
    delta = planted(name, token, copy.deepcopy(base))
    (matrix,) = delta.names
    # The last norm divides by the length of what it is given; without it the stream meets the head directly.
    norm = "norm" if name == "llama" else "ln_f"
    body = base.model if name == "llama" else base.transformer
    setattr(body, norm, nn.Identity())
    base.double()
    window = calibration_windows(name, 1)[0]
    alphas, found = [-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0], []
    with torch.no_grad(), steer(base, delta, 0.0, same_base=False) as steering:
        for alpha in alphas:
            steering.set(alpha)
            found.append(base(**window).logits[..., token])
    slope = found[-2] - found[3]
    assert float(slope.abs().min()) > 0.0
    for alpha, logit in zip(alphas, found, strict=True):
        assert torch.allclose(logit, found[3] + alpha * slope, rtol=1e-6, atol=1e-6)
    # ... by |row|^2 <v, x> of what the matrix reads
    seen = {}
    path = matrix.removesuffix(".weight")
    handle = base.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.setdefault("x", args[0]))
    with torch.no_grad():
        base(**window)
    handle.remove()
    part = delta.parts[matrix]
    assert isinstance(part, LowRank)
    row = base.get_output_embeddings().weight[token]
    assert torch.allclose(slope, (row @ part.left.double()[:, 0]) * (seen["x"] @ part.right.double()[0]), rtol=1e-5)
