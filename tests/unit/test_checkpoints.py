"""The walker over a model folder: the same matrices as in memory, and one clear sentence for bad input."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, build
from safetensors.torch import load_file, save_file

from weightproof.errors import InputError
from weightproof.weights import iter_checkpoint_matrices, iter_weight_matrices


def _compare(model, folder):
    """The two readers give the same names, families, orientation, refusals and values."""
    in_memory = {matrix.name: matrix for matrix in iter_weight_matrices(model)}
    on_disk = {matrix.name: matrix for matrix in iter_checkpoint_matrices(folder)}
    assert set(on_disk) == set(in_memory)
    for name, ours in in_memory.items():
        theirs = on_disk[name]
        assert (theirs.family, theirs.d_out, theirs.d_in) == (ours.family, ours.d_out, ours.d_in), name
        assert (theirs.dtype, theirs.refusal) == (ours.dtype, ours.refusal), name
        assert torch.equal(theirs.load(), ours.load()), name
        assert not theirs.is_view


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_saved_model_has_the_matrices_of_the_model_in_memory(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    _compare(model, tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_a_sharded_checkpoint_is_read_through_its_index(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    _compare(model, tmp_path)


def test_bfloat16_is_read_as_stored(tmp_path):
    model = build("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    _compare(model, tmp_path)


def test_experts_stored_turned_are_known_by_the_configuration(tmp_path):
    config = transformers.GptOssConfig(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_local_experts=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=64,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    model.save_pretrained(tmp_path)
    _compare(model, tmp_path)


@pytest.mark.parametrize("kind", ["GPTNeoX", "Qwen3Moe", "GraniteMoe", "DeepseekV3"])
def test_models_whose_files_keep_older_names_are_read_under_the_names_in_memory(kind, tmp_path):
    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4,
        "q_lora_rank": 8, "kv_lora_rank": 8, "pad_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.save_pretrained(tmp_path)
    _compare(model, tmp_path)


def test_one_tensor_per_expert_is_joined_into_the_stack(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    parts = {
        f"model.layers.0.mlp.experts.{i}.{part}_proj.weight": torch.randn(6, 4)
        for i in range(11)
        for part in ("gate", "up")
    }
    save_file(parts, tmp_path / "model.safetensors")
    matrices = list(iter_checkpoint_matrices(tmp_path))
    assert [matrix.name for matrix in matrices] == [f"model.layers.0.mlp.experts.gate_up_proj[{i}]" for i in range(11)]
    gate, up = (parts[f"model.layers.0.mlp.experts.10.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.equal(matrices[10].load(), torch.cat([gate, up]))
    assert (matrices[10].d_out, matrices[10].d_in) == (12, 4)


def test_gpt2_names_alone_do_not_turn_a_matrix(tmp_path):
    """gpt_bigcode has c_attn and c_proj too, as plain Linear layers."""
    weight = torch.randn(6, 4)
    save_file({"transformer.h.0.attn.c_attn.weight": weight}, tmp_path / "model.safetensors")
    for model_type, expected in (("gpt_bigcode", weight), ("gpt2", weight.T)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        (matrix,) = iter_checkpoint_matrices(tmp_path)
        assert torch.equal(matrix.load(), expected)


def test_a_gpt2_inside_another_model_is_turned_too(tmp_path):
    save_file({"decoder.transformer.h.0.mlp.c_fc.weight": torch.randn(6, 4)}, tmp_path / "model.safetensors")
    config = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (matrix,) = iter_checkpoint_matrices(tmp_path)
    assert (matrix.d_out, matrix.d_in) == (4, 6)


def test_packed_weights_are_refused_and_old_buffers_are_no_matrices(tmp_path):
    tensors = {
        "model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 4, dtype=torch.int32),
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "embeddings.position_ids": torch.arange(8)[None],
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (matrix,) = iter_checkpoint_matrices(tmp_path)
    assert "int32" in matrix.refusal


# ---------------------------------------------------------------- bad input


@pytest.fixture
def saved(tmp_path):
    build("llama").save_pretrained(tmp_path)
    return tmp_path


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        iter_checkpoint_matrices(tmp_path / "nowhere")


def test_a_file_instead_of_a_folder_is_named(saved):
    with pytest.raises(InputError, match="is a file; give the model folder"):
        iter_checkpoint_matrices(saved / "model.safetensors")


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no safetensors weights"):
        iter_checkpoint_matrices(tmp_path)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json"])
def test_a_pickle_only_checkpoint_is_refused_by_name_with_what_to_do(pickle, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / pickle).write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=rf"{pickle}.*save_pretrained"):
        iter_checkpoint_matrices(tmp_path)


def test_an_adapter_alone_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="PEFT adapter only"):
        iter_checkpoint_matrices(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -1])
def test_a_truncated_file_is_named(num_bytes, saved):
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:num_bytes])
    with pytest.raises(InputError, match=r"model\.safetensors is not a complete safetensors file"):
        iter_checkpoint_matrices(saved)


def test_a_corrupt_header_is_named(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:8] + b"#" * 400)
    with pytest.raises(InputError, match="not a complete safetensors file"):
        iter_checkpoint_matrices(saved)


def test_a_file_that_vanishes_before_it_is_read_is_named(saved):
    matrix = next(iter_checkpoint_matrices(saved))
    (saved / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        matrix.load()


def test_a_missing_configuration_is_named(saved):
    (saved / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        iter_checkpoint_matrices(saved)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_an_unreadable_configuration_is_named(content, saved):
    (saved / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        iter_checkpoint_matrices(saved)


def test_an_index_that_names_a_missing_shard_or_tensor_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    shards = sorted(tmp_path.glob("*.safetensors"))
    tensors = load_file(shards[0])
    lost = next(iter(tensors))
    save_file({"other": torch.zeros(1)}, shards[0])
    with pytest.raises(InputError, match=r"lacks .*, which the index places there"):
        iter_checkpoint_matrices(tmp_path)
    assert lost in json.loads(index.read_text())["weight_map"]
    shards[0].unlink()
    with pytest.raises(InputError, match=f"names {shards[0].name}, which is not in the folder"):
        iter_checkpoint_matrices(tmp_path)
    index.write_text("{}")
    with pytest.raises(InputError, match="no weight_map"):
        iter_checkpoint_matrices(tmp_path)
