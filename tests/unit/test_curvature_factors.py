"""Kronecker factors, held against per-token gradients made one by one."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from trained_models import VOCAB_SIZE, untrained
from worlds import run_world

from weightproof.curvature import Factors, fit_factors, moments, predict_loss_change
from weightproof.curvature.fitting import fit_cost
from weightproof.curvature.objectives import sample
from weightproof.errors import InputError
from weightproof.weights import iter_weight_matrices

NAMES = {
    "gpt2": "transformer.h.1.mlp.c_fc.weight",
    "llama": "model.layers.1.mlp.up_proj.weight",
    "bert": "bert.encoder.layer.1.intermediate.dense.weight",
    "t5": "decoder.block.1.layer.1.EncDecAttention.k.weight",
}


def batches(name: str = "llama", count: int = 3, seed: int = 0, length: int = 9) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(3, VOCAB_SIZE, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, -3:] = 0
        one = {"input_ids": ids, "attention_mask": mask}
        if name in ("bert", "t5"):
            labels = torch.randint(3, VOCAB_SIZE, (2, length - 2 * (name == "t5")), generator=generator)
            labels[0, :3] = -100
            if name == "bert":
                labels[mask == 0] = -100
            one["labels"] = labels
        found.append(one)
    return found


def fitted(name: str = "llama", data=None, **given) -> Factors:
    model = given.pop("model", None) or untrained(name)
    options = {"labels": "empirical", "require_full_rank": False, "progress": False, "include": NAMES[name]} | given
    return fit_factors(model, batches(name) if data is None else data, **options)


class Tapped(nn.Module):
    """A linear layer whose input is kept and whose output gets a term of which the gradient is g."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.weight = inner, inner.weight
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output = self.inner(inputs)
        added = torch.zeros_like(output, requires_grad=True)
        self.seen.append((inputs.detach(), added))
        return output + added


def oracle(name: str, data) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Sums over real tokens in float64, from the model's own summed loss; no hooks, no masks of ours."""
    model = untrained(name).double()
    path, _, _ = NAMES[name].rpartition(".")
    parent, _, last = path.rpartition(".")
    tapped = Tapped(model.get_submodule(path))
    setattr(model.get_submodule(parent), last, tapped)
    activation = gradient = torch.zeros(())
    tokens = 0
    for batch in data:
        labels = batch.get("labels", batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
        loss = model(**{**batch, "labels": labels}).loss
        scored = labels[:, 1:] if name in ("gpt2", "llama") else labels
        (loss * scored.ne(-100).sum()).backward()
        inputs, added = tapped.seen.pop()
        for row, position in itertools.product(*map(range, inputs.shape[:2])):
            # The source of the cross-attention's keys, and every text: padding is what the mask says. The last real
            # token of a causal window predicts nothing.
            real = bool(batch["attention_mask"][row, position])
            if name in ("gpt2", "llama"):
                real = real and position + 1 < int(batch["attention_mask"][row].sum())
            if real:
                a, g = inputs[row, position], added.grad[row, position]
                activation, gradient, tokens = activation + torch.outer(a, a), gradient + torch.outer(g, g), tokens + 1
    return activation, gradient, tokens


@pytest.mark.parametrize("name", NAMES)
def test_equals_gradients_made_token_by_token(name):
    data = batches(name)
    factor = fitted(name, data, model=untrained(name).double())[NAMES[name]]
    activation, gradient, tokens = oracle(name, data)
    assert factor.tokens == tokens
    assert torch.allclose(factor.activation_sum, activation, rtol=1e-10, atol=1e-12)
    scale = gradient.abs().max()
    # The model's own causal loss is computed in float32.
    assert torch.allclose(
        factor.gradient_sum / scale, gradient / scale, atol=1e-7 if name in ("gpt2", "llama") else 1e-12
    )
    single = fitted(name, data)[NAMES[name]]
    assert torch.allclose(single.gradient_sum / scale, gradient / scale, atol=1e-5)


def test_sampled_labels_are_those_of_the_model_and_of_the_seed():
    first, again, other = (fitted(labels="sampled", seed=seed) for seed in (0, 0, 1))
    name = NAMES["llama"]
    assert torch.equal(first[name].gradient_sum, again[name].gradient_sum)
    assert not torch.equal(first[name].gradient_sum, other[name].gradient_sum)
    assert torch.equal(first[name].activation_sum, other[name].activation_sum)
    logits = torch.tensor([[0.0, 1.0, -2.0, 0.5]]).expand(20_000, -1)
    drawn = sample(logits, torch.Generator().manual_seed(0)).bincount(minlength=4) / 20_000
    assert torch.allclose(drawn, logits[0].softmax(0), atol=0.01)


def test_the_model_is_left_as_it_was():
    model = untrained("llama").train()
    model.model.norm.weight.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fitted(model=model)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    for name, parameter in model.named_parameters():
        value, needed, gradient = before[name]
        assert torch.equal(parameter, value)
        assert (parameter.requires_grad, parameter.grad) == (needed, gradient)
    assert not any(module._forward_hooks for module in model.modules())
    assert not model.get_submodule("model.layers.1.mlp.up_proj")._backward_hooks
    passes = []

    def fail_the_second_time(*_):
        passes.append(1)
        if len(passes) == 2:
            raise IndexError

    planted = model.model.norm.register_forward_hook(fail_the_second_time)
    with pytest.raises(IndexError):
        fitted(model=model, data=batches(count=2))
    planted.remove()
    assert not any(module._forward_hooks for module in model.modules())
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize("labels", ["sampled", "empirical"])
def test_gradients_that_stood_on_the_parameters_stay(labels):
    """Also of a part frozen by its owner, also for the first layer, also when the data ends in an error."""
    model = untrained("llama").train()
    model.get_input_embeddings().weight.requires_grad_(False)
    model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    before = {name: None if p.grad is None else (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for data in (batches(count=2), [*batches(count=1), 3]):
        try:
            fitted(model=model, data=data, include="*.layers.0.*", labels=labels)
        except InputError as error:
            assert "int" in str(error)  # noqa: PT017 - the second of the two
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == flags[name]
            if before[name] is None:
                assert parameter.grad is None
            else:
                assert parameter.grad is before[name][0]
                assert torch.equal(*before[name])
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_once(reentrant):
    model = untrained("llama")
    expected = fitted(model=copy.deepcopy(model))
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = fitted(model=model)
    name = NAMES["llama"]
    assert found[name].tokens == expected[name].tokens > 0
    assert torch.allclose(found[name].gradient_sum, expected[name].gradient_sum, rtol=1e-5)


def products_made(monkeypatch, **given) -> tuple[Factors, list[int]]:
    """The factors, and the width of every product of rows that was made for them."""
    widths: list[int] = []
    plain = moments._add_products

    def counted(total, rows):
        widths.append(rows.shape[1])
        plain(total, rows)

    monkeypatch.setattr(moments, "_add_products", counted)
    return fitted(**given), widths


def test_layers_that_read_one_tensor_share_its_products(monkeypatch):
    data, mlp = batches(count=2), "model.layers.1.mlp.{}_proj.weight"
    alone = {one: fitted(data=data, include=mlp.format(one))[mlp.format(one)] for one in ("gate", "up", "down")}
    attention = {one: f"model.layers.1.self_attn.{one}_proj.weight" for one in "qkv"}
    given = {"data": data, "include": [*map(mlp.format, alone), *attention.values()]}
    together, widths = products_made(monkeypatch, **given)
    # Each batch: inputs of q, k, v; of gate and up; of down (192): and a gradient for each of six matrices.
    widest = len(untrained("llama").model.layers[1].mlp.down_proj.weight[0])
    assert len(widths) == 2 * (3 + 6)
    assert widths.count(widest) == 2 * 3
    for one, expected in alone.items():
        found = together[mlp.format(one)]
        assert torch.equal(found.activation_sum, expected.activation_sum)
        assert torch.equal(found.gradient_sum, expected.gradient_sum)
        assert found.tokens == expected.tokens
    gate, up, down = (together[mlp.format(one)].activation_sum for one in alone)
    assert gate is up
    assert down is not up
    assert len({id(together[name].activation_sum) for name in attention.values()}) == 1
    assert together.nbytes == sum(one.nbytes for one in together.by_name.values()) - up.nbytes * 3


def test_sums_stay_shared_when_saved_merged_and_resumed(tmp_path):
    data, names = batches(count=4), [f"model.layers.1.mlp.{one}_proj.weight" for one in ("gate", "up")]
    given = {"include": names, "labels": "sampled"}
    part = fitted(data=data[:2], **given)
    part.save(tmp_path)
    loaded = Factors.load(tmp_path)
    other = fitted(data=data[2:], **given)
    for factors in (loaded, loaded.merge(other), fitted(data=data, resume=loaded, **given)):
        gate, up = (factors[name].activation_sum for name in names)
        assert gate is up
        assert factors.nbytes == 8 * (64**2 + 2 * 192**2)
    assert (tmp_path / "factors.safetensors").stat().st_size < loaded.nbytes + 4096


def test_inputs_count_for_the_layers_of_which_the_gradient_came():
    """In every second pass nothing behind the up map reaches the loss: its input is then gate's alone."""
    model, data = untrained("llama"), batches(count=4)
    names = [f"model.layers.1.mlp.{one}_proj.weight" for one in ("gate", "up")]
    whole, half = fitted(data=data, include=names), fitted(data=data[::2], include=names)
    up, passes = model.model.layers[1].mlp.up_proj, itertools.count()

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, output):
            return output.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient if next(passes) % 2 == 0 else None

    class Cutting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = up

        def forward(self, inputs):
            return Cut.apply(self.inner(inputs))

    model.model.layers[1].mlp.up_proj = Cutting()
    # The matrix got another name; gate keeps its own.
    found = fitted(model=model, data=data, include=[names[0], "*up_proj.inner*"])
    gate, rest = found[names[0]], found["model.layers.1.mlp.up_proj.inner.weight"]
    assert (gate.tokens, rest.tokens) == (whole[names[0]].tokens, half[names[1]].tokens)
    assert torch.allclose(gate.activation_sum, whole[names[0]].activation_sum, rtol=1e-12)
    assert torch.allclose(rest.activation_sum, half[names[1]].activation_sum, rtol=1e-12)


def test_an_input_that_is_changed_in_place_is_refused():
    model = untrained("llama")

    def clear(module, arguments, output):
        arguments[0].detach().zero_()

    model.model.layers[1].mlp.register_forward_hook(clear)
    with pytest.raises(InputError, match="changed in place"):
        fitted(model=model)


def test_a_tied_matrix_is_fitted_once_with_the_tokens_of_both():
    model = untrained("llama")
    one, two = (model.model.layers[i].mlp for i in (0, 1))
    separate = fitted(model=copy.deepcopy(model), include="*.up_proj*")
    two.up_proj.weight = one.up_proj.weight
    tied = fitted(model=model, include="*.up_proj*")
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    assert names[1] not in tied
    assert tied[names[0]].tokens == 2 * separate[names[0]].tokens


def test_parts_merge_and_a_stopped_run_goes_on(tmp_path):
    data = batches(count=5)
    whole = fitted(data=data, labels="sampled")
    name = NAMES["llama"]
    stopped = fitted(data=data[:2], labels="sampled", checkpoint=tmp_path / "part.safetensors", checkpoint_every=2)
    part = Factors.load(tmp_path / "part.safetensors")
    assert part.digest == stopped.digest
    resumed = fitted(data=data, labels="sampled", resume=part)
    assert torch.allclose(resumed[name].gradient_sum, whole[name].gradient_sum, rtol=1e-14)
    assert resumed.source == whole.source
    with pytest.raises(InputError, match="not those on which"):
        fitted(data=batches(count=5, seed=9), labels="sampled", resume=part)
    with pytest.raises(InputError, match="no batch behind"):
        fitted(data=data[:2], labels="sampled", resume=part)
    parts = [fitted(data=data[:2]), fitted(data=data[2:])]
    merged, whole = parts[0].merge(parts[1]), fitted(data=data)
    assert torch.allclose(merged[name].activation_sum, whole[name].activation_sum, rtol=1e-13)
    assert merged[name].tokens == whole[name].tokens
    assert merged.source.data_digest == parts[1].merge(parts[0]).source.data_digest
    with pytest.raises(InputError, match="same data"):
        parts[0].merge(parts[0])
    with pytest.raises(InputError, match="labels is 'empirical'"):
        parts[0].merge(fitted(data=data[2:], labels="sampled"))


def test_saved_factors_come_back_and_any_altered_bit_is_found(tmp_path):
    factors = fitted(include="*.mlp.*")
    path = factors.save(tmp_path)
    back = Factors.load(tmp_path)
    assert back.digest == factors.digest
    assert list(back) == list(factors)
    # gate and up read the same input: its sum lies in the file once.
    gate, up = (factors[f"model.layers.0.mlp.{one}_proj.weight"] for one in ("gate", "up"))
    assert torch.equal(gate.activation_sum, up.activation_sum)
    assert path.stat().st_size < factors["model.layers.0.mlp.up_proj.weight"].nbytes * len(factors)
    content = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(content), (40,), generator=generator).tolist():
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(InputError):
            Factors.load(path)
        content[place] ^= 1 << place % 8
    with pytest.raises(InputError, match="fit them first"):
        Factors.load(tmp_path / "nowhere")


def test_a_file_from_before_there_was_an_origin_loads_with_the_same_digest(tmp_path):
    factors = fitted()
    path = factors.save(tmp_path)
    with safe_open(path, framework="pt") as handle:
        header = json.loads(handle.metadata()["header"])
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
    assert header["source"].pop("origin") == ""
    text = json.dumps(header)
    save_file(tensors, path, metadata={"header": text, "digest": hashlib.sha256(text.encode()).hexdigest()})
    old = Factors.load(path)
    assert old.digest == factors.digest
    assert old.source == factors.source


def test_memory_shared_out_over_passes_changes_nothing():
    model, data = untrained("llama"), batches()
    cost = fit_cost(model, "*.mlp.*")
    assert (len(cost.matrices), cost.passes) == (9, 1)
    one = max(8 * (m.d_in**2 + m.d_out**2) for m in iter_weight_matrices(model) if m.name in cost.matrices)
    many = fit_cost(model, "*.mlp.*", max_bytes=one)
    assert many.passes == 9
    assert many.bytes_at_once <= one
    whole, parts = (fitted(data=data, include="*.mlp.*", max_bytes=limit) for limit in (1 << 30, one))
    for name in whole:
        assert torch.equal(whole[name].gradient_sum, parts[name].gradient_sum)
    with pytest.raises(InputError, match="read only once"):
        fitted(data=iter(data), include="*.mlp.*", max_bytes=one)
    with pytest.raises(InputError, match=r"take .* more than the .* allowed"):
        fitted(include="*.mlp.*", max_bytes=one // 2)


def test_the_estimate_is_what_the_factors_take():
    """Sisters counted once: the estimate knows which read one input before the model runs."""
    model = untrained("llama")
    cost = fit_cost(model)
    factors = fitted(model=model, data=batches(count=1), include=None)
    assert cost.matrices == tuple(factors)
    assert len(cost.matrices) == 3 * 7
    assert cost.bytes_of_factors == cost.bytes_at_once == factors.nbytes
    assert cost.flops_per_token == 2 * factors.nbytes // 8


def test_nothing_below_the_lowest_layer_that_is_read_is_differentiated():
    model, needed = untrained("llama"), {}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda module, arguments, output, number=number: needed.update({number: output.requires_grad})
        )
    fitted(model=model, include="*layers.1.mlp.up_proj*")
    assert needed == {0: False, 1: True, 2: True}
    assert all(parameter.grad is None for parameter in model.parameters())


SISTERS = [f"model.layers.1.mlp.{one}_proj.weight" for one in ("gate", "up")]


def two(rank: int, size: int, name: str) -> list[torch.Tensor]:
    factor = fitted(name, batches(name, count=5), labels="sampled")[NAMES[name]]
    # One batch: the second process reads none, and does not see for itself that gate and up share their input.
    shared = fitted(data=batches(count=1), include=SISTERS)
    assert shared[SISTERS[0]].activation_sum is shared[SISTERS[1]].activation_sum
    assert shared[SISTERS[1]].tokens > 0
    return [factor.activation_sum, factor.gradient_sum, torch.tensor(factor.tokens), shared[SISTERS[1]].activation_sum]


def test_two_processes_give_the_factors_of_one():
    expected = fitted("gpt2", batches("gpt2", count=5), labels="sampled")[NAMES["gpt2"]]
    alone = fitted(data=batches(count=1), include=SISTERS)
    for activation, gradient, tokens, shared in run_world(two, 2, "gpt2"):
        assert int(tokens) == expected.tokens
        assert torch.allclose(activation, expected.activation_sum, rtol=1e-13)
        assert torch.allclose(gradient, expected.gradient_sum, rtol=1e-13)
        assert torch.equal(shared, alone[SISTERS[1]].activation_sum)


def bad_batch_on_one(rank: int, size: int, planted: bool) -> str:
    model, data = untrained("llama"), batches(count=4)
    if planted and rank == 1:

        def fail(*_):
            raise IndexError("planted")

        model.model.norm.register_forward_hook(fail)
    elif not planted:
        data[1] = {"input_ids": torch.full((1, 4), 10_000)}
    with pytest.raises(Exception, match="planted" if planted else "holds the token id 10000") as caught:
        fitted(model=model, data=data)
    return type(caught.value).__name__


def test_a_bad_batch_on_one_process_ends_both():
    assert run_world(bad_batch_on_one, 2, True) == ["CollectiveError", "IndexError"]
    assert run_world(bad_batch_on_one, 2, False) == ["InputError", "InputError"]


def test_factors_of_other_weights_are_refused_by_hash():
    model = untrained("llama")
    factors = fitted(model=model)
    factors.require_weights(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(InputError, match=r"other weights: .* has the hash \w{12} here and had \w{12}"):
        factors.require_weights(model)
    with pytest.raises(InputError, match="no matrix"):
        factors.require_weights(untrained("gpt2"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"include": "*.mpl.*"}, r"'\*.mpl.\*' matches no weight matrix"),
        ({"labels": "gold"}, "'sampled'"),
        ({"data": []}, "no batch"),
        ({"data": [3]}, "no dict of tensors but int"),
        ({"data": [{"text": "a"}]}, "holds no tensor"),
        ({"data": [{"mask": torch.ones(2, 9)}]}, r"batch 0 has no input_ids \(found: mask\)"),
        ({"data": [{"input_ids": torch.ones(2, 9)}]}, "batch 0 holds floating point numbers where token ids belong"),
        ({"data": [{"input_ids": torch.full((2, 9), 10**6)}]}, "batch 0 holds the token id 1000000, and the model has"),
        (
            {"data": [{"input_ids": torch.ones(2, 9).long(), "labels": torch.full((2, 9), -1)}], "labels": "empirical"},
            "batch 0 holds the label -1, and the model has",
        ),
        ({"require_full_rank": True}, r"fitted on 39 tokens and has 192 dimensions"),
    ],
)
def test_bad_input_is_named(given, message):
    with pytest.raises(InputError, match=message):
        fitted(**given)


def test_prediction_is_the_trace_formula_on_the_right_weights():
    torch.manual_seed(0)
    model = untrained("llama").double()
    name = NAMES["llama"]
    data = batches(count=8, length=16)
    factors = fit_factors(model, data, include=name, labels="sampled", seed=0, require_full_rank=False, progress=False)
    edited = copy.deepcopy(model)
    change = torch.randn(192, 64, dtype=torch.float64) * 1e-3
    with torch.no_grad():
        edited.get_submodule(name.removesuffix(".weight")).weight += change
    found = predict_loss_change(factors, model, edited)
    a, g = factors[name].activation_covariance, factors[name].gradient_covariance
    assert found.by_matrix[name] == pytest.approx(0.5 * float(torch.trace(g @ change @ a @ change.T)), rel=1e-10)
    assert found.total == found.by_matrix[name]
    with torch.no_grad():
        edited.lm_head.weight += 1
    assert predict_loss_change(factors, model, edited).not_covered == ("lm_head.weight",)
    with pytest.raises(InputError, match="other weights"):
        predict_loss_change(factors, edited.float(), model)
