"""The walker over a model in memory: what is enumerated, how it is oriented, what is refused."""

from __future__ import annotations

from collections import Counter

import peft
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, build
from torch import nn
from torch.nn.utils import prune

from weightproof.weights import iter_tensors, iter_weight_matrices, read_structure

# two layers each; a refused matrix is counted in its own column
EXPECTED = {
    "gpt2": ({"embed": 2, "attn": 4, "ffn": 4}, 0),
    "llama": ({"embed": 1, "attn": 8, "ffn": 6, "head": 1}, 0),
    "qwen3": ({"embed": 1, "attn": 8, "ffn": 6, "head": 1}, 0),
    "bert": ({"embed": 3, "attn": 8, "ffn": 4, "head": 1}, 0),
    "t5": ({"embed": 1, "attn": 24, "ffn": 8}, 2),  # relative_attention_bias of encoder and decoder
    "mixtral": ({"embed": 1, "attn": 8, "router": 2, "expert": 16, "head": 1}, 0),
    "vit": ({"conv": 1, "attn": 8, "ffn": 4, "head": 1}, 2),  # cls_token, position_embeddings
    "whisper": ({"conv": 2, "embed": 3, "attn": 24, "ffn": 8}, 0),
    "mamba": ({"embed": 1, "attn": 8}, 4),  # A_log and the depthwise conv1d of each layer
}


def _by_name(model):
    return {matrix.name: matrix for matrix in iter_weight_matrices(model)}


def _count_independently(model):
    """2-D, convolution and stacked 3-D weights (per slice) of named_parameters, each storage once."""
    seen, total = set(), 0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim < 2 or parameter.data_ptr() in seen:
            continue
        seen.add(parameter.data_ptr())
        stacked = parameter.ndim == 3 and "experts" in name
        total += parameter.shape[0] if stacked else 1
    return total


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_weight_is_measured_or_refused_with_a_reason(name):
    model = build(name)
    matrices = list(iter_weight_matrices(model))
    families, num_refused = EXPECTED[name]
    assert Counter(matrix.family for matrix in matrices if matrix.refusal is None) == families
    refused = [matrix for matrix in matrices if matrix.refusal is not None]
    assert len(refused) == num_refused
    assert all(len(matrix.refusal) > 20 for matrix in refused)
    assert len(matrices) == sum(families.values()) + num_refused == _count_independently(model)
    assert len({matrix.name for matrix in matrices}) == len(matrices)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_matrix_loads_a_live_view_of_its_stated_shape(name):
    model = build(name)
    tensors = {tensor.name: tensor.tensor for tensor in iter_tensors(model)}
    for matrix in iter_weight_matrices(model):
        values, stored = matrix.load(), tensors[matrix.tensor_name]
        assert values.shape == (matrix.d_out, matrix.d_in)
        assert values.dtype == matrix.dtype
        assert not values.requires_grad
        assert matrix.is_view
        assert values.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
        assert torch.equal(matrix.select(stored.detach().clone()), values)


@pytest.mark.parametrize(
    ("name", "matrix_name"),
    [
        ("gpt2", "transformer.h.1.mlp.c_fc.weight"),
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj[2]"),
        ("vit", "vit.embeddings.patch_embeddings.projection.weight"),
        ("llama", "lm_head.weight"),
    ],
)
def test_a_write_through_the_view_changes_the_parameter(name, matrix_name):
    model = build(name)
    matrix = _by_name(model)[matrix_name]
    parameter = model.get_parameter(matrix.tensor_name)
    before = parameter.detach().clone()
    with torch.no_grad():
        matrix.load()[1, 2] += 1
    assert int((parameter != before).sum()) == 1


def test_gpt2_is_turned_so_that_a_matrix_maps_inputs_to_outputs():
    model = build("gpt2")
    layer, x = model.transformer.h[0].mlp.c_fc, torch.randn(3, 32)
    matrix = _by_name(model)["transformer.h.0.mlp.c_fc.weight"]
    assert (matrix.d_out, matrix.d_in) == (128, 32)
    torch.testing.assert_close(x @ matrix.load().T + layer.bias, layer(x))


def test_an_expert_slice_maps_inputs_to_outputs_in_both_layouts():
    mixtral = _by_name(build("mixtral"))["model.layers.0.mlp.experts.down_proj[1]"]
    assert (mixtral.d_out, mixtral.d_in) == (32, 48)
    config = transformers.GptOssConfig(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_local_experts=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=64,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    matrices = _by_name(model)
    stack = model.model.layers[0].mlp.experts
    # (E, in, out) with in == out: only the class can tell, never the shape
    turned = matrices["model.layers.0.mlp.experts.down_proj[3]"]
    assert torch.equal(turned.load(), stack.down_proj[3].T)
    assert matrices["model.layers.0.mlp.experts.gate_up_proj[0]"].d_out == 64
    assert "bias" in matrices["model.layers.0.mlp.experts.down_proj_bias"].refusal


def test_convolutions_are_out_times_in_times_kernel():
    convs = nn.ModuleDict(
        {
            "plain": nn.Conv2d(3, 8, (2, 4)),
            "grey": nn.Conv2d(1, 8, 3),
            "grouped": nn.Conv1d(8, 4, 3, groups=2),
            "depthwise": nn.Conv1d(6, 6, 3, groups=6),
            "up": nn.ConvTranspose2d(5, 3, 2),
        }
    )
    found = _by_name(convs)
    assert {name: (matrix.family, matrix.d_out, matrix.d_in) for name, matrix in found.items()} == {
        "plain.weight": ("conv", 8, 24),
        "grey.weight": ("conv", 8, 9),
        "grouped.weight": ("conv", 4, 12),
        "depthwise.weight": ("conv", 6, 3),
        "up.weight": ("conv", 12, 5),
    }
    assert [name for name, matrix in found.items() if matrix.refusal] == ["depthwise.weight"]
    x = torch.randn(1, 3, 2, 4)
    expected = found["plain.weight"].load() @ x.flatten() + convs["plain"].bias
    torch.testing.assert_close(convs["plain"](x).flatten(), expected)


def test_a_channels_last_convolution_is_still_a_live_view():
    conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    (matrix,) = iter_weight_matrices(conv)
    assert matrix.is_view
    with torch.no_grad():
        matrix.load().zero_()
    assert not conv.weight.any()


@pytest.mark.parametrize(
    ("name", "first", "others"),
    [
        ("gpt2", "transformer.wte.weight", ("lm_head.weight",)),
        ("bert", "bert.embeddings.word_embeddings.weight", ("cls.predictions.decoder.weight",)),
        (
            "t5",
            "shared.weight",
            ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
        ),
    ],
)
def test_tied_tensors_appear_once_with_their_other_names(name, first, others):
    model = build(name)
    matrices = _by_name(model)
    assert matrices[first].tied_names == others
    assert matrices[first].family == "embed"
    assert not set(others) & set(matrices)
    assert tuple(sorted((first, *others))) in read_structure(model).ties


def test_an_untied_model_has_no_ties_though_its_class_lists_tied_keys():
    model = build("llama")
    assert model._tied_weights_keys
    assert read_structure(model).ties == frozenset()
    assert read_structure(build("llama", tie_word_embeddings=True)).ties == {
        ("lm_head.weight", "model.embed_tokens.weight")
    }


def test_ties_are_seen_on_the_meta_device_and_everything_is_refused_there():
    with torch.device("meta"):
        model = build("gpt2")
    model.tie_weights()
    matrices = list(iter_weight_matrices(model))
    assert len(matrices) == 10
    assert all("meta device" in matrix.refusal for matrix in matrices)
    assert matrices[0].tied_names == ("lm_head.weight",)


def test_bfloat16_weights_are_measured_in_their_own_dtype():
    matrices = list(iter_weight_matrices(build("llama").to(torch.bfloat16)))
    assert {matrix.dtype for matrix in matrices} == {torch.bfloat16}
    assert all(matrix.refusal is None for matrix in matrices)


class _Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.codebook = nn.Embedding(5, 4)
        self.mixing = nn.Parameter(torch.randn(7, 3))
        self.stack = nn.Parameter(torch.randn(2, 3, 4))
        self.tensor = nn.Parameter(torch.randn(2, 3, 4, 5))
        self.A_log = nn.Parameter(torch.randn(3, 3))
        self.norm = nn.LayerNorm((3, 4))
        self.bilinear = nn.Bilinear(3, 4, 2)
        self.register_buffer("table", torch.randn(9, 9))


def test_an_unknown_architecture_is_enumerated_as_other():
    found = _by_name(_Unknown())
    measured = {name: (m.family, m.d_out, m.d_in) for name, m in found.items() if m.refusal is None}
    assert measured == {
        "stem.weight": ("other", 6, 4),
        "codebook.weight": ("embed", 5, 4),
        "mixing": ("other", 7, 3),
        "stack[0]": ("other", 3, 4),
        "stack[1]": ("other", 3, 4),
        "bilinear.weight[0]": ("other", 3, 4),
        "bilinear.weight[1]": ("other", 3, 4),
    }
    assert {name for name, matrix in found.items() if matrix.refusal} == {
        "tensor", "A_log", "norm.weight", "norm.bias",
    }  # fmt: skip


def test_buffers_are_tensors_and_never_matrices():
    tensors = {tensor.name: tensor for tensor in iter_tensors(_Unknown())}
    assert tensors["table"].is_buffer
    assert tensors["table"].persistent
    assert "table" not in _by_name(_Unknown())
    rotary = {tensor.name: tensor for tensor in iter_tensors(build("llama"))}["model.rotary_emb.inv_freq"]
    assert rotary.is_buffer
    assert not rotary.persistent


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensors_cover_every_parameter_and_buffer_once(name):
    model = build(name)
    tensors = list(iter_tensors(model))
    names = [name for tensor in tensors for name in (tensor.name, *tensor.tied_names)]
    expected = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    expected += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    assert sorted(names) == sorted(expected)


def test_packed_integers_and_foreign_tensor_types_are_refused():
    class Wrapped(torch.Tensor):
        """A stand-in for a quantizer's tensor: floating dtype, logical shape, no plain storage."""

    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    model[0].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    model[1].weight = nn.Parameter(torch.randn(4, 4).as_subclass(Wrapped))
    model[2].weight = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    model[2].weight_scale_inv = nn.Parameter(torch.ones(2, 2))
    packed, wrapped, eight_bits, scales = iter_weight_matrices(model)
    assert "float8" in eight_bits.refusal
    assert "scales" in scales.refusal
    assert "uint8" in packed.refusal
    assert "Wrapped" in wrapped.refusal


def test_weights_under_a_mask_or_parametrization_are_the_ones_in_use():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    nn.utils.parametrizations.orthogonal(model["a"])
    prune.l1_unstructured(model["b"], "weight", amount=0.5)
    with torch.no_grad():
        model["b"].weight_orig.mul_(2.0)  # as an optimizer's step does: `weight` is stale until the next forward pass
    found = _by_name(model)
    assert found.keys() == {"a.weight", "b.weight"}
    assert (found["a.weight"].storage, found["b.weight"].storage) == ("parametrization", "prune-mask")
    for name, matrix in found.items():
        layer = model[name[0]]
        torch.testing.assert_close((layer(torch.eye(3)) - layer.bias).T, matrix.load())
        assert not matrix.is_view
    assert int((found["b.weight"].load() == 0).sum()) == 4


def test_a_parametrization_that_is_no_matrix_is_refused():
    model = nn.ModuleDict({"c": nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3), dim=2)})
    found = _by_name(model)
    conv = [matrix for name, matrix in found.items() if name.startswith("c.")]
    assert len(conv) == 2
    assert all("remove the parametrization" in matrix.refusal for matrix in conv)


def test_an_empty_matrix_is_refused():
    (matrix,) = iter_weight_matrices(nn.ParameterDict({"w": torch.empty(0, 3)}))
    assert "no elements" in matrix.refusal


def test_one_module_under_two_names_is_one_matrix():
    shared = nn.Linear(3, 3)
    (matrix,) = iter_weight_matrices(nn.ModuleDict({"a": shared, "b": shared}))
    assert matrix.tied_names == ("b.weight",)


def test_structure_names_classes_and_embedding_sizes():
    structure = read_structure(build("t5"))
    assert structure.modules[""] == "T5ForConditionalGeneration"
    assert structure.modules["encoder.block.0.layer.1.DenseReluDense.wo"] == "Linear"
    assert structure.embedding_sizes["shared"] == 64
    assert structure.embedding_sizes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias"] == 32


# ---------------------------------------------------------------- wrappers


def _summary(model):
    return [(m.name, m.family, m.d_out, m.d_in, m.tied_names, m.refusal) for m in iter_weight_matrices(model)]


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("process_group")
def test_ddp_changes_nothing():
    model = build("gpt2")
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert _summary(wrapped) == _summary(model)
    assert read_structure(wrapped) == read_structure(model)
    assert _summary(torch.compile(wrapped, backend="eager")) == _summary(model)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "whisper"])
def test_compile_changes_nothing(name):
    model = build(name)
    plain, structure = _summary(model), read_structure(model)
    compiled = torch.compile(model, backend="eager")
    assert _summary(compiled) == plain
    assert read_structure(compiled) == structure


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("process_group")
def test_a_tensor_sharded_over_one_process_is_an_ordinary_matrix():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    layer = nn.Linear(4, 3, bias=False)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (1,))))
    (matrix,) = iter_weight_matrices(layer)
    assert (matrix.refusal, matrix.shard, matrix.d_out, matrix.d_in) == (None, None, 3, 4)
    assert matrix.is_view
    assert type(matrix.load()) is torch.Tensor
    assert matrix.load().data_ptr() == layer.weight.to_local().data_ptr()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "target"), [("gpt2", "c_attn"), ("llama", "down_proj"), ("bert", "query")])
def test_lora_keeps_the_names_of_the_base_and_adds_its_own(name, target):
    plain = _summary(build(name))
    config = peft.LoraConfig(r=4, target_modules=[target], fan_in_fan_out=name == "gpt2")
    wrapped = _summary(peft.get_peft_model(build(name), config))
    adapters = [row for row in wrapped if ".lora_" in row[0]]
    assert [row for row in wrapped if row not in adapters] == plain
    families = {row[0]: row for row in plain}
    assert len(adapters) == 4
    for row in adapters:
        base = families[f"{row[0].partition('.lora_')[0]}.weight"]
        assert row[1] == base[1]
        assert row[2:4] == ((4, base[3]) if ".lora_A." in row[0] else (base[2], 4))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_module_saved_by_peft_keeps_its_name_and_the_original_is_told_apart():
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(build("llama"), config)
    found = _by_name(model)
    in_use = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert found["lm_head.weight"].load().data_ptr() == in_use.data_ptr()
    assert found["lm_head.original_module.weight"].family == "head"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_on_stacked_experts_keeps_the_slices():
    config = peft.LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    wrapped = _summary(peft.get_peft_model(build("mixtral"), config))
    assert [row for row in wrapped if ".lora_" not in row[0]] == _summary(build("mixtral"))
    adapters = [row for row in wrapped if ".lora_" in row[0]]
    assert len(adapters) == 8
    assert {row[1] for row in adapters} == {"expert"}
