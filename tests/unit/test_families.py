"""Names: clean names, the family of every matrix, blocks and taps of the nine architectures."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, build, example_inputs
from torch import nn

from weightproof.families import Block, blocks, clean_name, family_of, public_names, taps, unwrap


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("lm_head.weight", "lm_head.weight"),
        ("module.lm_head.weight", "lm_head.weight"),
        ("_orig_mod.module.lm_head.weight", "lm_head.weight"),
        ("module._orig_mod.lm_head.weight", "lm_head.weight"),
        ("model.layers.0._orig_mod.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", "model.layers.0.mlp.up_proj.weight"),
        ("base_model.model.h.0.mlp.lora_A.default.weight", "h.0.mlp.lora_A.default.weight"),
        ("base_model.model.mlp.experts.base_layer.base_layer.down_proj", "mlp.experts.down_proj"),
        ("base_model.model.score.modules_to_save.default.weight", "score.weight"),
        ("base_model.model.score.modules_to_save.default", "score"),
        ("base_model.model.score.original_module.weight", "score.original_module.weight"),
        ("h.0.module.weight", "h.0.module.weight"),
        ("base_model.embed.weight", "base_model.embed.weight"),
        ("", ""),
    ],
)
def test_clean_name_removes_wrappers_only(raw, clean):
    assert clean_name(raw) == clean


def test_public_names_never_meet():
    raw = ["base_model.model.q", "base_model.model.q.base_layer", "module.q", "module.v", "v"]
    assert public_names(raw) == {
        "base_model.model.q": "q",
        "base_model.model.q.base_layer": "q.base_layer",
        "module.q": "module.q",  # q is taken
        "module.v": "module.v",  # v is the raw name of another
        "v": "v",
    }


FAMILIES = {
    "attn": [
        "model.layers.0.self_attn.q_proj.weight",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.0.attention.output.dense.weight",
        "encoder.block.0.layer.0.SelfAttention.o.weight",
        "decoder.block.0.layer.1.EncDecAttention.v.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
        "transformer.h.0.self_attention.query_key_value.weight",
        "transformer.h.0.self_attention.dense.weight",
        "gpt_neox.layers.0.attention.dense.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.0.self_attn.q_b_proj.weight",
        "model.encoder.layers.0.self_attn.out_proj.weight",
        "backbone.layers.0.mixer.x_proj.weight",
        "layers.0.attention.wo.weight",
        "layers.0.self_attn.in_proj_weight",
    ],
    "ffn": [
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.gate_up_proj.weight",
        "transformer.h.0.mlp.c_proj.weight",
        "bert.encoder.layer.0.intermediate.dense.weight",
        "bert.encoder.layer.0.output.dense.weight",
        "decoder.block.0.layer.2.DenseReluDense.wi_0.weight",
        "model.decoder.layers.0.fc1.weight",
        "transformer.h.0.mlp.dense_4h_to_h.weight",
        "layers.0.feed_forward.w1.weight",
        "layers.0.linear2.weight",
        "model.layers.0.mlp.shared_expert.gate_proj.weight",
        "model.layers.0.mlp.shared_experts.down_proj.weight",
    ],
    "expert": [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj[3]",
        "model.layers.0.block_sparse_moe.experts.3.w1.weight",
        "encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight",
    ],
    "router": [
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.router.weight",
        "encoder.block.1.layer.1.mlp.router.classifier.weight",
        "model.layers.0.mlp.shared_expert_gate.weight",
        "model.layers.0.block_sparse_moe.router.layer.weight",
    ],
    "embed": [
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "shared.weight",
        "model.embed_tokens.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "model.decoder.embed_positions.weight",
        "backbone.embeddings.weight",
        "tok_embeddings.weight",
        "gpt_neox.embed_in.weight",
    ],
    "head": [
        "lm_head.weight",
        "proj_out.weight",
        "embed_out.weight",
        "classifier.weight",
        "score.weight",
        "cls.predictions.transform.dense.weight",
        "bert.pooler.dense.weight",
    ],
    "conv": ["backbone.layers.0.mixer.conv1d.weight", "model.encoder.conv2.weight"],
    "other": ["stem.weight", "weight", "0.weight", "aggregate.gateway.weight"],
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in FAMILIES.items() for name in names])
def test_family_is_read_from_whole_components(family, name):
    assert family_of(name) == family


def test_adapters_have_the_family_of_their_target():
    assert family_of("model.layers.0.mlp.up_proj.lora_A.default.weight") == "ffn"
    assert family_of("base_model.model.transformer.wte.lora_embedding_B.default") == "embed"
    assert family_of("score.original_module.weight") == "head"


def test_module_class_decides_where_the_name_says_nothing():
    assert family_of("table.weight", "Embedding") == "embed"
    assert family_of("patches.projection.weight", "Conv2d") == "conv"
    assert family_of("switch.weight", "MyTopKRouter") == "router"
    assert family_of("stuff.weight", "Linear") == "other"
    # GPT-2's Conv1D is a linear map, whatever its name says
    assert family_of("h.0.attn.c_proj.weight", "Conv1D") == "attn"


BLOCKS = {
    "gpt2": ["transformer.h"],
    "llama": ["model.layers"],
    "qwen3": ["model.layers"],
    "bert": ["bert.encoder.layer"],
    "t5": ["encoder.block", "decoder.block"],
    "mixtral": ["model.layers"],
    "vit": ["vit.layers"],
    "whisper": ["model.encoder.layers", "model.decoder.layers"],
    "mamba": ["backbone.layers"],
}

# per block list: (path, role) in order of registration
TAPS = {
    "gpt2": [[("attn.c_proj", "attn"), ("mlp.c_proj", "ffn")]],
    "llama": [[("self_attn.o_proj", "attn"), ("mlp.down_proj", "ffn")]],
    "qwen3": [[("self_attn.o_proj", "attn"), ("mlp.down_proj", "ffn")]],
    "bert": [[("attention.output.dense", "attn"), ("output.dense", "ffn")]],
    "t5": [
        [("layer.0.SelfAttention.o", "attn"), ("layer.1.DenseReluDense.wo", "ffn")],
        [
            ("layer.0.SelfAttention.o", "attn"),
            ("layer.1.EncDecAttention.o", "attn"),
            ("layer.2.DenseReluDense.wo", "ffn"),
        ],
    ],
    "mixtral": [[("self_attn.o_proj", "attn"), ("mlp", "ffn")]],
    "vit": [[("attention.o_proj", "attn"), ("mlp.fc2", "ffn")]],
    "whisper": [
        [("self_attn.out_proj", "attn"), ("fc2", "ffn")],
        [("self_attn.out_proj", "attn"), ("encoder_attn.out_proj", "attn"), ("fc2", "ffn")],
    ],
    "mamba": [[("mixer", "attn")]],
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_are_the_repeated_layers_in_forward_order(name):
    model = build(name)
    found = blocks(model)
    assert [block.name for block in found] == [f"{trunk}.{index}" for trunk in BLOCKS[name] for index in range(2)]
    assert all(model.get_submodule(block.name) is block.module for block in found)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_taps_are_the_outputs_of_attention_and_mlp(name):
    model = build(name)
    expected = [
        (f"{trunk}.{index}.{path}", f"{trunk}.{index}", role)
        for trunk, paths in zip(BLOCKS[name], TAPS[name], strict=True)
        for index in range(2)
        for path, role in paths
    ]
    found = taps(model)
    assert [(tap.name, tap.block, tap.role) for tap in found] == expected
    assert all(model.get_submodule(tap.name) is tap.module for tap in found)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tap_fires_once_in_a_forward_pass(name):
    model = build(name)
    fired = []
    for tap in taps(model):
        tap.module.register_forward_hook(lambda module, args, output, tap=tap: fired.append((tap.name, output)))
    with torch.no_grad():
        model(**example_inputs(name))
    assert [name for name, _ in fired] == [tap.name for tap in taps(model)]
    outputs = [output[0] if isinstance(output, tuple) else output for _, output in fired]
    assert all(output.shape[-1] == 32 for output in outputs)


class _Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh())])


class _Sub(_Layer):
    pass


class _Unknown(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.stack = layers
        self.tail = nn.ModuleList([nn.Sequential(nn.Linear(1, 1))])


def test_an_unknown_architecture_has_blocks_but_no_taps():
    model = _Unknown(nn.ModuleList([_Layer() for _ in range(3)]))
    assert [block.name for block in blocks(model)] == ["stack.0", "stack.1", "stack.2"]
    assert taps(model) == ()


def test_layers_of_several_classes_need_a_usual_name():
    mixed = nn.ModuleList([_Layer(), _Sub()])
    assert [block.name for block in blocks(nn.ModuleDict({"layers": mixed}))] == ["layers.0", "layers.1"]
    # under an unusual name only what repeats inside is a trunk
    assert [block.name for block in blocks(nn.ModuleDict({"mixed": mixed}))] == ["mixed.0.inner.0", "mixed.1.inner.0"]


def test_a_plain_sequential_of_layers_is_a_trunk_and_a_flat_network_has_none():
    assert [block.name for block in blocks(nn.Sequential(_Layer(), _Layer()))] == ["0", "1"]
    assert blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == ()


def test_torch_attention_has_no_tap_because_its_projection_never_runs():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    assert [block.name for block in blocks(encoder)] == ["layers.0", "layers.1"]
    assert taps(encoder) == ()


def test_compiled_models_and_layers_keep_their_names():
    model = build("llama")
    plain = [tap.name for tap in taps(model)]
    assert [tap.name for tap in taps(torch.compile(model, backend="eager"))] == plain
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    assert [tap.name for tap in taps(model)] == plain
    assert isinstance(blocks(model)[0], Block)
    assert type(blocks(model)[0].module).__name__ == "LlamaDecoderLayer"
    assert unwrap(torch.compile(model, backend="eager")) is model
