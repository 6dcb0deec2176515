"""Reading adapters: what PEFT merges is what was read, from a folder and from a live model; all else is refused."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from trained_adapters import adapted, configuration
from trained_models import untrained

from weightproof import GuardSession, InputError, kinds
from weightproof.lora.adapters import adapter_names, is_adapted, read_adapter, record_base, require_fits
from weightproof.lora.deltas import Adapter, AdapterDelta, combine
from weightproof.snapshots.tensor_store import tensor_digest
from weightproof.weights import iter_tensors, iter_weight_matrices

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about layers that are tied or turned
Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, head_dim=8,
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config).eval()


def with_convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 5))


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]}
CASES: dict[str, tuple[Callable[[], nn.Module], peft.LoraConfig]] = {
    "plain": (lambda: untrained("llama"), configuration("llama")),
    "conv1d": (lambda: untrained("gpt2"), configuration("gpt2")),
    "rank-stabilised, an embedding": (
        lambda: untrained("llama"),
        configuration("llama", target_modules=["q_proj", "embed_tokens"], use_rslora=True),
    ),
    "DoRA and a replaced head": (
        lambda: untrained("llama"),
        configuration("llama", use_dora=True, modules_to_save=["lm_head"]),
    ),
    "DoRA on Conv1D": (lambda: untrained("gpt2"), configuration("gpt2", use_dora=True)),
    "added biases": (lambda: untrained("gpt2"), configuration("gpt2", lora_bias=True)),
    "patterns": (
        lambda: untrained("gpt2"),
        configuration("gpt2", rank_pattern={"h.0.attn.c_attn": 2}, alpha_pattern={"h.1.attn.c_attn": 32}),
    ),
    "experts": (mixtral, peft.LoraConfig(r=4, rank_pattern={"experts.down_proj": 2}, **EXPERTS)),
    "turned experts": (gpt_oss, peft.LoraConfig(r=4, **EXPERTS)),
    "convolution": (with_convolution, peft.LoraConfig(r=2, target_modules=["0", "2"])),
}


def trained(model: nn.Module, config: peft.LoraConfig) -> Any:
    """The model with an adapter that changes something."""
    wrapped = adapted(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return wrapped.eval()


def saved(folder: Path, model: nn.Module | None = None, config: peft.LoraConfig | None = None) -> Path:
    trained(model or untrained("llama"), config or configuration("llama")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_is_what_peft_merges(case, tmp_path):
    make, config = CASES[case]
    base = make()
    wrapped = trained(copy.deepcopy(base), copy.deepcopy(config))
    wrapped.save_pretrained(tmp_path)
    disk, live = read_adapter(tmp_path), read_adapter(wrapped)
    assert disk.digest == live.digest or case.startswith("rank")  # PEFT saves a copy of an adapted embedding beside
    assert is_adapted(wrapped)
    assert adapter_names(wrapped) == ("default",)
    require_fits(disk, base)
    before = {one.name: one.load().clone() for one in iter_weight_matrices(base)}
    biases = {one.name: one.tensor.detach().clone() for one in iter_tensors(base) if one.tensor.ndim == 1}
    merged = wrapped.merge_and_unload()
    for adapter in (disk, live):
        assert adapter.deltas
        for matrix in iter_weight_matrices(merged):
            expected = adapter.replaced.get(matrix.name, before[matrix.name])
            if matrix.name in adapter.deltas:
                expected = expected + adapter.deltas[matrix.name].dense(expected)
            assert torch.allclose(matrix.load(), expected, atol=1e-6), matrix.name
        for one in iter_tensors(merged):
            if one.name in biases:
                assert torch.allclose(one.tensor, biases[one.name] + adapter.biases.get(one.name, 0.0), atol=1e-6)
    kind = kinds.LoraMerge(disk)
    for matrix in iter_weight_matrices(merged):
        (reading,) = kind.measure(matrix.name, before[matrix.name], matrix.load())
        assert reading.value <= reading.limit, reading


def test_biases_that_were_trained_with_the_adapter_are_read_as_replaced(tmp_path):
    config = configuration("gpt2", bias="lora_only")
    wrapped = trained(untrained("gpt2"), config)
    with torch.no_grad():
        bias = wrapped.base_model.model.transformer.h[1].attn.c_attn.base_layer.bias
        bias.add_(1.0)
    wrapped.save_pretrained(tmp_path)
    found = read_adapter(tmp_path).replaced
    assert len(found) == 9
    assert torch.equal(found["transformer.h.1.attn.c_attn.bias"], bias)


def test_the_adapter_of_a_name_is_read_from_its_own_folder(tmp_path):
    wrapped = trained(untrained("llama"), configuration("llama"))
    wrapped.add_adapter("second", configuration("llama", r=2))
    wrapped.save_pretrained(tmp_path)
    second = read_adapter(tmp_path, "second")
    assert {delta.a.shape[0] for delta in second.deltas.values()} == {2}
    assert second.digest == read_adapter(wrapped, "second").digest
    assert {delta.a.shape[0] for delta in read_adapter(tmp_path).deltas.values()} == {8}


def test_scaling_follows_rank_alpha_and_their_patterns(tmp_path):
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 4}, "alpha_pattern": {"v_proj": 64}}
    found = read_adapter(saved(tmp_path / "plain", config=configuration("llama", **patterns))).deltas
    assert found[Q].scaling == 16 / 4
    assert found[Q.replace("q_proj", "v_proj")].scaling == 64 / 8
    assert found[Q.replace(".0.", ".1.")].scaling == 16 / 8
    stable = read_adapter(saved(tmp_path / "stable", config=configuration("llama", use_rslora=True, **patterns))).deltas
    assert stable[Q].scaling == 16 / math.sqrt(4)


def test_a_delta_of_dora_needs_its_base():
    delta = AdapterDelta("w", torch.ones(1, 3), torch.ones(2, 1), 1.0, magnitude=torch.tensor([1.0, 2.0]))
    with pytest.raises(InputError, match="give base="):
        delta.dense()
    merged = torch.zeros(2, 3) + delta.dense(torch.zeros(2, 3))
    assert torch.allclose(merged.norm(dim=1), torch.tensor([1.0, 2.0]))


def test_adapters_merged_together_add_up_and_those_whose_order_counts_are_refused():
    def one(seed: int, magnitude: torch.Tensor | None = None) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 5, generator=generator), torch.randn(4, 2, generator=generator)
        return Adapter({"w": AdapterDelta("w", a, b, 0.5, magnitude)}, biases={"b": torch.ones(4)})

    both = combine([one(1), one(2)])
    assert torch.allclose(both.deltas["w"].dense(), one(1).deltas["w"].dense() + one(2).deltas["w"].dense(), atol=1e-6)
    assert torch.equal(both.biases["b"], torch.full((4,), 2.0))
    assert combine([one(1)]).digest == one(1).digest != one(2).digest
    with pytest.raises(InputError, match="DoRA"):
        combine([one(1), one(2, torch.ones(4))])
    whole = Adapter({}, replaced={"head": torch.ones(2)})
    with pytest.raises(InputError, match="replaced by two"):
        combine([whole, whole])


# ---- refused --------------------------------------------------------------------------------------------------------


def rewritten(folder: Path, **settings: Any) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


def restored(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def without_factors(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()
    tensors["base_model.model.lm_head.weight"] = torch.zeros(2)


def without_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another method": (lambda f: rewritten(f, peft_type="IA3"), "method 'IA3'"),
    "a setting": (lambda f: rewritten(f, use_qalora=True), "sets use_qalora, which may change what is merged"),
    "a residual start": (lambda f: rewritten(f, init_lora_weights="pissa_niter_4"), "pissa_niter_4.*does not add"),
    "another rank": (lambda f: rewritten(f, r=4), "has rank 8, the configuration says 4"),
    "no factors": (lambda f: restored(rewritten(f, modules_to_save=["lm_head"]), without_factors), "no LoRA weights"),
    "half a pair": (lambda f: restored(f, without_one), "q_proj has no lora_B, only lora_A"),
    "a stranger": (lambda f: restored(f, lambda t: t.update(stranger=torch.ones(2))), "stranger belongs to nothing"),
    "trained tokens": (
        lambda f: restored(f, lambda t: t.update({"x.trainable_tokens_delta": torch.ones(2)})),
        "trains single tokens",
    ),
    "torn": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x10" + b"\x00" * 7), "not a complete"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "but no adapter_model.safetensors"),
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "is a pickle, which can run code",
    ),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "a whole model": (
        lambda f: (f / "adapter_config.json").rename(f / "config.json"),
        "a whole model lies there",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_cannot_be_read_is_refused_in_words(case, tmp_path):
    spoil, words = BROKEN[case]
    spoil(saved(tmp_path))
    with pytest.raises(InputError, match=words):
        read_adapter(tmp_path)


def test_a_model_without_the_adapter_is_refused_in_words():
    with pytest.raises(InputError, match="no LoRA layers at all"):
        read_adapter(untrained("llama"))
    with pytest.raises(InputError, match="no LoRA adapter 'x': it has default"):
        read_adapter(trained(untrained("llama"), configuration("llama")), "x")
    assert not is_adapted(untrained("llama"))


def test_layers_of_other_methods_are_refused_by_name_and_do_not_stop_an_edit():
    config = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4, target_r=2)
    model = adapted(untrained("llama"), config)
    with pytest.raises(InputError, match="SVDLinear, which is not plain LoRA"):
        read_adapter(model)
    session = GuardSession(model)
    with session.edit("merged", on_violation="monitor") as step:
        model.merge_adapter()
    assert step.kind.name == "unknown"


def test_variants_that_merge_differently_are_refused_by_name():
    model = trained(untrained("llama"), configuration("llama"))

    class OddVariant:
        pass

    model.base_model.model.model.layers[0].self_attn.q_proj.lora_variant["default"] = OddVariant()
    with pytest.raises(InputError, match=r"q_proj is adapted by the variant OddVariant"):
        read_adapter(model)


def test_factors_that_do_not_belong_together_are_refused():
    with pytest.raises(InputError, match="do not fit"):
        AdapterDelta("w", torch.ones(2, 3), torch.ones(4, 3), 1.0)
    with pytest.raises(InputError, match="one length for each of the 4 rows"):
        AdapterDelta("w", torch.ones(2, 3), torch.ones(4, 2), 1.0, magnitude=torch.ones(3))


# ---- does it belong to the model ------------------------------------------------------------------------------------


def test_an_adapter_of_another_architecture_names_what_is_missing(tmp_path):
    adapter = read_adapter(saved(tmp_path))
    with pytest.raises(InputError, match=r"layers.*GPT2LMHeadModel does not have \(9 of 9 names are missing\)"):
        require_fits(adapter, untrained("gpt2"))


def test_an_adapter_of_another_size_names_both_shapes(tmp_path):
    adapter = read_adapter(saved(tmp_path))
    config = copy.deepcopy(untrained("llama").config)
    config.hidden_size, config.intermediate_size = 32, 96
    with pytest.raises(InputError, match=r"\[64, 192\] \(d_out, d_in\), the matrix \[32, 96\]"):
        require_fits(adapter, transformers.LlamaForCausalLM(config))


def test_the_base_that_was_noted_is_told_from_others_by_its_digest(tmp_path):
    base = untrained("llama")
    note = record_base(saved(tmp_path, copy.deepcopy(base)), base)
    assert note.name == "weightproof_base.json"
    adapter = read_adapter(tmp_path)
    require_fits(adapter, base)
    ours, other = (tensor_digest(model.get_parameter(DOWN)) for model in (base, untrained("llama", seed=1)))
    with pytest.raises(InputError, match=rf"another base: \S+ had the digest {ours[:16]} there, and has {other[:16]}"):
        kinds.LoraMerge(adapter).bound(untrained("llama", seed=1))
    require_fits(adapter, untrained("llama", seed=1), same_base=False)


def test_the_folder_that_an_adapter_names_as_its_base_is_compared(tmp_path):
    base: Any = untrained("llama")
    base.save_pretrained(tmp_path / "base")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    saved(tmp_path / "adapter", loaded)
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.base == str(tmp_path / "base")
    require_fits(adapter, base)
    require_fits(adapter, copy.deepcopy(base).to(torch.bfloat16))  # the same base, loaded in another dtype
    with pytest.raises(InputError, match="was trained on another base"):
        require_fits(adapter, untrained("llama", seed=1))


def test_a_base_folder_that_cannot_be_read_is_said_and_not_compared(tmp_path, caplog):
    adapter = read_adapter(saved(tmp_path / "adapter"))
    (tmp_path / "gone").mkdir()
    adapter = Adapter(adapter.deltas, base=str(tmp_path / "gone"))
    require_fits(adapter, untrained("llama", seed=1))
    assert "cannot be compared" in caplog.text


def test_several_parameters_of_an_unknown_stack_need_the_live_model(tmp_path):
    wrapped = trained(mixtral(), peft.LoraConfig(r=4, **EXPERTS))
    wrapped.save_pretrained(tmp_path)
    names = ["mlp.experts.odd", "mlp.experts.gate_up_proj"]
    with pytest.raises(InputError, match="give the live model"):
        read_adapter(rewritten(tmp_path, target_parameters=names))


def test_a_tied_matrix_is_held_under_the_name_that_the_model_reads_it_by():
    model = untrained("gpt2")
    delta = torch.ones_like(model.get_parameter("lm_head.weight"))
    kind = kinds.LoraMerge({"lm_head.weight": delta}).bound(model)
    assert kind.expected == {"transformer.wte.weight"}
    with pytest.raises(InputError, match="which the model does not have"):
        kinds.LoraMerge({"nothing.weight": delta}).bound(model)
