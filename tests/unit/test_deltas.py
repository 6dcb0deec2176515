"""Deltas: out of real PEFT adapters, pairs and checkpoints; kept factored; saved with what they were made for."""

from __future__ import annotations

import copy
import json
import math
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from trained_adapters import adapted, configuration
from trained_models import untrained

from weightproof import Delta, InputError
from weightproof.deltas import LowRank
from weightproof.differences.factors import added, frobenius, inner, largest_element
from weightproof.lora.adapters import record_base
from weightproof.weights import iter_weight_matrices

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about layers that are tied or turned
DOWN = "model.layers.0.mlp.down_proj.weight"


def with_adapter(name, seed=3, **options):
    """(base, the same with an adapter whose every factor was moved as training moves it)."""
    base = untrained(name)
    model = adapted(copy.deepcopy(base), configuration(name, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_" in key or "modules_to_save" in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return base, model.eval()


def merged(model):
    return {one.name: one.load().clone() for one in iter_weight_matrices(model.merge_and_unload(safe_merge=True))}


def before_and_after(base, model):
    before = {one.name: one.load().clone() for one in iter_weight_matrices(base)}
    after = merged(model)
    return {name: after[name] - value for name, value in before.items() if not torch.equal(after[name], value)}


def low_rank(d_out=6, d_in=5, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(d_out, rank, generator=generator), torch.randn(rank, d_in, generator=generator))


# ---------------------------------------------------------------- factors


def test_factors_answer_as_the_dense_matrix_does():
    first, second = low_rank(seed=1), low_rank(rank=3, seed=2)
    dense = first.dense()
    assert torch.allclose(first.singular_values(), torch.linalg.svdvals(dense.double())[:2], rtol=1e-5)
    assert frobenius(first) == pytest.approx(float(dense.norm()), rel=1e-6)
    for one, two in ((first, second), (dense, second), (first, second.dense()), (dense, second.dense())):
        assert inner(one, two) == pytest.approx(float((dense * second.dense()).sum()), rel=1e-4)
        assert isinstance(added(one, two), LowRank) == (isinstance(one, LowRank) and isinstance(two, LowRank))
        total = added(one, two, -2.0)
        total = total.dense() if isinstance(total, LowRank) else total
        assert torch.allclose(total, dense - 2 * second.dense(), atol=1e-5)
    assert largest_element(first) >= float(dense.abs().max())
    assert largest_element(dense) == float(dense.abs().max())


@pytest.mark.parametrize(
    "make",
    [
        lambda: LowRank(torch.ones(3, 2), torch.ones(1, 4)),
        lambda: LowRank(torch.ones(3), torch.ones(1, 4)),
        lambda: Delta({}),
        lambda: Delta({"a": torch.ones(3)}),
        lambda: Delta({"a": torch.ones(2, 2, dtype=torch.int32)}),
    ],
)
def test_what_is_no_delta_is_refused(make):
    with pytest.raises(InputError):
        make()


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("source", ["folder", "live"])
def test_an_adapter_is_what_peft_merges_factored_and_turned(name, source, tmp_path):
    base, model = with_adapter(name, use_rslora=source == "folder")
    model.save_pretrained(tmp_path)
    delta = Delta.load(tmp_path) if source == "folder" else Delta.from_adapter(model)
    assert delta.is_factored
    assert delta.metadata["mode"] == "adapter"
    expected = before_and_after(base, model)
    assert set(delta.names) == set(expected)
    for key, change in expected.items():
        assert delta.dense(key).dtype == torch.float32
        assert torch.allclose(delta.dense(key), change, atol=1e-6), key
        assert delta.metadata["norms"][key] == pytest.approx(float(change.norm()), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dora_is_merged_minus_base_and_says_so(name, tmp_path):
    base, model = with_adapter(name, use_dora=True)
    model.save_pretrained(tmp_path)
    live, disk = Delta.from_adapter(model), Delta.from_adapter(tmp_path, base=base)
    with pytest.raises(InputError, match=r"DoRA.*Give base="):
        Delta.from_adapter(tmp_path)
    expected = before_and_after(base, model)
    for delta in (live, disk):
        assert not delta.is_factored
        assert any("DoRA: merged minus base" in note for note in delta.metadata["notes"])
        for key, change in expected.items():
            assert torch.allclose(delta.dense(key), change, atol=1e-6), key


def test_biases_and_replaced_matrices_are_named_and_never_silently_lost(tmp_path):
    base, model = with_adapter("gpt2", lora_bias=True, modules_to_save=["wpe"])
    model.save_pretrained(tmp_path)
    without, within = Delta.from_adapter(tmp_path), Delta.from_adapter(tmp_path, base=base)
    assert any(name.endswith("c_attn.bias") for name in without.metadata["not_included"])
    assert "give base=" in without.metadata["not_included"]["transformer.wpe.weight"]
    assert "transformer.wpe.weight" not in within.metadata["not_included"]
    change = before_and_after(base, model)["transformer.wpe.weight"]
    assert torch.allclose(within.dense("transformer.wpe.weight"), change, atol=1e-6)


def test_an_adapter_without_lora_weights_is_one_clear_sentence(tmp_path):
    _, model = with_adapter("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({"base_model.model.lm_head.weight": torch.ones(2, 2)}, file)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}))
    with pytest.raises(InputError, match="holds no LoRA weights"):
        Delta.load(tmp_path)
    with pytest.raises(InputError, match="no LoRA layers at all"):
        Delta.from_adapter(untrained("llama"))


def test_an_adapter_of_another_base_is_refused_by_shape_and_by_hash(tmp_path):
    base, model = with_adapter("llama")
    model.save_pretrained(tmp_path / "adapter")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    with pytest.raises(InputError, match=r"does not fit this model.*\(d_out, d_in\)"):
        Delta.from_adapter(tmp_path / "adapter", base=transformers.LlamaForCausalLM(config))
    with pytest.raises(InputError, match="does not fit this model: it changes"):
        Delta.from_adapter(tmp_path / "adapter", base=untrained("gpt2"))
    record_base(tmp_path / "adapter", base)
    untrained("llama", seed=5).save_pretrained(tmp_path / "other")
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"another base: .* had the digest"):
        Delta.from_adapter(tmp_path / "adapter", base=tmp_path / "other")
    found = Delta.from_adapter(tmp_path / "adapter", base=tmp_path / "base")
    assert set(found.base_digests) == set(found.names)


def test_a_folder_that_only_has_the_name_of_the_base_is_no_base(tmp_path, caplog):
    base, model = with_adapter("llama")
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    written = json.dumps(config | {"base_model_name_or_path": str(tmp_path / "base")})
    (tmp_path / "adapter" / "adapter_config.json").write_text(written)
    found = Delta.load(tmp_path / "adapter")
    assert set(found.base_digests) == set(found.names)
    assert found.base_digests == Delta.from_adapter(model).base_digests
    untrained("llama", seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"trained on another base: .* had the digest"):
        Delta.from_adapter(tmp_path / "adapter", base=tmp_path / "other")
    (tmp_path / "base" / "model.safetensors").unlink()
    assert Delta.load(tmp_path / "adapter").base_digests == {}
    assert "cannot be read" in caplog.text


def test_a_live_adapter_knows_the_weights_around_it():
    base, model = with_adapter("llama")
    delta = Delta.from_adapter(model)
    assert delta.base_digests == Delta.from_adapter(model, base=base).base_digests
    assert set(delta.base_digests) == set(delta.names)


# ---------------------------------------------------------------- differences and contrasts


def test_models_and_their_folders_give_the_same_difference(tmp_path):
    base, model = with_adapter("gpt2")
    tuned = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        tuned.transformer.ln_f.bias.add_(1.0)
    expected = before_and_after(base, model)
    base.save_pretrained(tmp_path / "before")
    tuned.save_pretrained(tmp_path / "after")
    for delta in (Delta.between(base, tuned), Delta.between(tmp_path / "before", str(tmp_path / "after"))):
        assert set(delta.names) == set(expected)
        assert set(delta.base_digests) == set(expected)
        assert list(delta.metadata["not_included"]) == ["transformer.ln_f.bias"]
        assert delta.metadata["notes"] == []
        for key, change in expected.items():
            assert torch.equal(delta.dense(key), change)


def test_a_difference_of_rounded_weights_says_what_it_lost():
    base, model = with_adapter("llama")
    half = copy.deepcopy(model).merge_and_unload().to(torch.bfloat16)
    delta = Delta.between(copy.deepcopy(base).to(torch.bfloat16), half)
    assert any("half precision" in note for note in delta.metadata["notes"])


def test_models_without_a_difference_or_of_two_shapes_are_refused():
    base = untrained("llama")
    with pytest.raises(InputError, match="no weight matrix differs"):
        Delta.between(base, copy.deepcopy(base))
    with pytest.raises(InputError, match="different architectures"):
        Delta.between(nn.Linear(3, 2), nn.Linear(4, 2))
    with pytest.raises(InputError, match=r"different architectures.*is not there"):
        Delta.between(base, untrained("gpt2"))


def test_a_contrast_stays_factored_and_counts_what_one_side_lacks_as_zero():
    first, second, shared, opposed = (low_rank(seed=seed) for seed in range(4))
    positive, negative = Delta({"a": first, "both": shared}), Delta({"b": second, "both": opposed})
    contrast = Delta.contrast(positive, negative)
    assert contrast.is_factored
    assert contrast.parts["both"].rank == 4
    assert torch.equal(contrast.dense("a"), first.dense())
    assert torch.equal(contrast.dense("b"), -second.dense())
    assert torch.allclose(contrast.dense("both"), shared.dense() - opposed.dense(), atol=1e-5)


def test_a_contrast_tells_how_alike_its_sides_are():
    # Two elements each, by hand: (3, 0) and (0, 4): cosine 0, ratio 3/4, ||d|| = 5, both drifts from (3, 4) / 2.
    sides = Delta.contrast(Delta({"a": torch.tensor([[3.0, 0.0]])}), Delta({"a": torch.tensor([[0.0, 4.0]])})).metadata[
        "sides"
    ]
    assert (sides["cosine"], sides["norm_ratio"], sides["norm"], sides["drift_ratio"]) == (0.0, 0.75, 5.0, 1.0)
    assert sides["drift_cosine"] == pytest.approx(7 / 25)  # (3, -4) and (3, 4)


def test_a_bisector_weighs_both_sides_alike_and_keeps_the_length():
    positive, negative = Delta({"a": torch.tensor([[3.0, 0.0]])}), Delta({"a": torch.tensor([[0.0, 4.0]])})
    found = Delta.contrast(positive, negative, mode="bisector").dense("a")
    assert torch.allclose(found, torch.tensor([[5.0, -5.0]]) / math.sqrt(2))
    with pytest.raises(InputError, match="bisector"):
        Delta.contrast(positive, positive, mode="bisector")
    with pytest.raises(InputError, match="mode must be one of"):
        Delta.contrast(positive, negative, mode="sum")  # pyright: ignore[reportArgumentType]


def test_sides_of_different_models_do_not_contrast():
    one = Delta({"a": torch.ones(2, 2)}, {"base": {"digests": {"a": "1" * 64}}})
    with pytest.raises(InputError, match="made for different weights"):
        Delta.contrast(one, Delta({"a": torch.ones(2, 2)}, {"base": {"digests": {"a": "2" * 64}}}))
    with pytest.raises(InputError, match="different models"):
        Delta.contrast(one, Delta({"a": torch.ones(2, 3)}))


def test_scaling_is_of_the_left_factor():
    delta = Delta({"a": low_rank(), "b": torch.ones(2, 2)}).scaled(-3.0)
    assert torch.allclose(delta.dense("a"), -3 * low_rank().dense(), atol=1e-5)
    assert torch.equal(delta.dense("b"), torch.full((2, 2), -3.0))
    assert delta.scaled(2.0).metadata["scale"] == -6.0


# ---------------------------------------------------------------- files


def test_a_saved_delta_comes_back_bit_for_bit_with_its_metadata(tmp_path):
    _, model = with_adapter("llama")
    delta = Delta.from_adapter(model)
    mixed = Delta({**delta.parts, "dense": torch.randn(3, 2)}, delta.metadata)
    for place in (tmp_path / "folder", tmp_path / "named.safetensors"):
        file = mixed.save(place)
        for path in (file, place):
            found = Delta.load(path)
            assert found.digest == mixed.digest
            assert found.metadata == mixed.metadata
    assert set(load_file(file)) == {f"{name}|{side}" for name in delta.names for side in ("left", "right")} | {"dense"}


def test_a_file_that_was_changed_or_is_of_another_kind_is_refused(tmp_path):
    file = Delta({"a": low_rank()}).save(tmp_path / "delta.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="was altered"):
        Delta.load(file)
    file.write_bytes(content[:-8])
    with pytest.raises(InputError, match="torn"):
        Delta.load(file)
    save_file({"a": torch.ones(2, 2)}, file)
    with pytest.raises(InputError, match="no delta of weightproof"):
        Delta.load(file)
    with pytest.raises(InputError, match="there is no such file"):
        Delta.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no delta.safetensors and no PEFT adapter"):
        Delta.load(tmp_path / "empty")


def test_no_pickle_is_opened(tmp_path):
    _, model = with_adapter("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match="pickle"):
        Delta.load(tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers, of an attribute that PEFT asks for
def test_other_methods_than_lora_are_merged_by_peft_minus_base(tmp_path):
    base = untrained("llama")
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = peft.get_peft_model(copy.deepcopy(base), config)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "ia3_" in key:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"of the method IA3.*Give base="):
        Delta.load(tmp_path)
    live, disk = Delta.from_adapter(model), Delta.from_adapter(tmp_path, base=base)
    for name, change in before_and_after(base, model).items():
        assert torch.allclose(live.dense(name), change, atol=1e-6)
        assert torch.allclose(disk.dense(name), change, atol=1e-6)
    assert disk.metadata["notes"] == ["IA3: merged minus base, dense, by PEFT"]
    assert set(disk.base_digests) == set(disk.names)
    assert DOWN in disk.names


@pytest.mark.parametrize(("deviation", "error"), [(3e-4, 0.11), (1e-4, 0.32), (3e-5, 0.70)])
def test_how_much_of_a_delta_rounded_merges_lose(deviation, error):
    generator = torch.Generator().manual_seed(0)
    before, after = (nn.Linear(256, 256, bias=False) for _ in range(2))
    weight = torch.randn(256, 256, generator=generator) * 0.02
    change = torch.randn(256, 256, generator=generator) * deviation
    with torch.no_grad():
        before.weight.copy_(weight)
        before.to(torch.bfloat16)
        after.weight.copy_(before.weight.float() + change)
        after.to(torch.bfloat16)
    found = Delta.between(before, after).dense("weight")
    assert float((found - change).norm() / change.norm()) == pytest.approx(error, rel=0.1)
