"""Candidates from weights against their definitions written out with full singular value decompositions."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trained_models
import transformers
from torch import Tensor, nn

from weightproof.candidates.candidate import AXIS_KINDS, NEEDS, Sources
from weightproof.candidates.from_weights import WEIGHT_CEILINGS, WEIGHT_SIDE, leading
from weightproof.candidates.registry import CANDIDATES
from weightproof.candidates.weight_side import WeightSide, stream_gram
from weightproof.deltas import Delta, LowRank
from weightproof.errors import InputError
from weightproof.subspace import principal_angles, recovery

RANK, BROAD = 4, 12
BY_NAME = {one.name: one for one in (*WEIGHT_SIDE, *WEIGHT_CEILINGS)}


@cache
def model_of(name: str) -> nn.Module:
    return trained_models.untrained(name)


@cache
def sources_of(name: str) -> Sources:
    return Sources(WeightSide.of(model_of(name)), rank=RANK, broad_rank=BROAD)


def basis(name: str, candidate: str, layer: int) -> Tensor | str:
    return sources_of(name).basis(BY_NAME[candidate], layer)


def left(matrix: Tensor, rank: int = RANK) -> Tensor:
    return torch.linalg.svd(matrix.double(), full_matrices=False).U[:, :rank]


def right(matrix: Tensor, rank: int = RANK) -> Tensor:
    return torch.linalg.svd(matrix.double(), full_matrices=False).Vh[:rank].T


def minus(columns: Tensor, *removed: Tensor) -> Tensor:
    others = torch.linalg.svd(torch.cat(removed, dim=1), full_matrices=False).U
    return left(columns - others @ (others.T @ columns))


# ---- the definitions, for Llama and for GPT-2, straight from their modules -----------------------------------------


def llama_layers(model: Any) -> list[dict[str, Tensor]]:
    found = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        found.append({
            "q": attention.q_proj.weight, "k": attention.k_proj.weight, "v": attention.v_proj.weight,
            "o": attention.o_proj.weight, "up": mlp.up_proj.weight, "gate": mlp.gate_proj.weight,
            "down": mlp.down_proj.weight,
        })  # fmt: skip
    return found


def gpt2_layers(model: Any) -> list[dict[str, Tensor]]:
    found = []
    for layer in model.transformer.h:
        q, k, v = layer.attn.c_attn.weight.T.chunk(3)
        found.append({
            "q": q, "k": k, "v": v, "o": layer.attn.c_proj.weight.T,
            "up": layer.mlp.c_fc.weight.T, "down": layer.mlp.c_proj.weight.T,
        })  # fmt: skip
    return found


def definitions(name: str, index: int) -> dict[str, Tensor]:
    model: Any = model_of(name)
    layers = {"llama": llama_layers, "gpt2": gpt2_layers}[name](model)
    layers = [{key: value.detach().double() for key, value in layer.items()} for layer in layers]
    head = model.lm_head.weight.detach().double()
    now = SimpleNamespace(**layers[index])
    repeats = now.q.shape[0] // now.k.shape[0]
    size = trained_models.HIDDEN // trained_models.HEADS
    keys, values = (
        part.reshape(-1, size, part.shape[1]).repeat_interleave(repeats, 0).reshape(-1, part.shape[1])
        for part in (now.k, now.v)
    )
    read = [layer[part] for layer in layers for part in ("q", "k", "v", "up", "gate") if part in layer]
    later = [layer[part] for layer in layers[index + 1 :] for part in ("q", "k", "v", "up", "gate") if part in layer]
    inputs = torch.cat([layers[index][part] for part in ("q", "k", "v", "up", "gate") if part in layers[index]])
    write = left(torch.cat([now.o, now.down], dim=1))
    everywhere = left(torch.cat([layer[part] for layer in layers for part in ("o", "down")], dim=1))
    global_read = right(torch.cat([*read, head]), BROAD)
    head_broad = right(head, BROAD)
    found = {
        "lm_head_read": right(head),
        "logits_null": torch.linalg.svd(head).Vh[-RANK:].T,
        "global_read": global_read[:, :RANK],
        "global_write": everywhere,
        "global_write_not_global_read": minus(everywhere, global_read),
        "write": write,
        "attn_write": left(now.o),
        "mlp_write": left(now.down),
        "write_not_lm_head_read": minus(write, head_broad),
        "write_not_global_read": minus(write, global_read),
        "write_not_downstream_read": minus(write, right(torch.cat([*later, head]), BROAD)),
        "mlp_up_read": right(now.up),
        "attn_qkv_read": right(torch.cat([now.q, now.k, now.v])),
        "attn_ov_write": left(now.o @ values),
        "mlp_roundtrip_write": left(now.down @ now.up),
        "qk_circuit": left(now.q.T @ keys),
        "input_super": right(inputs),
        "kv_super": right(torch.cat([now.k, now.v])),
        "causally_isolated": minus(write, right(inputs), right(torch.cat([now.k, now.v])), head_broad),
        "input_super_not_lm_read": minus(right(inputs), head_broad),
    }
    return found | ({"mlp_gate_read": right(now.gate)} if name == "llama" else {})


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_candidate_is_what_its_definition_says(name: str, index: int):
    expected = definitions(name, index)
    assert expected.keys() >= {one.name for one in WEIGHT_SIDE} - {"mlp_gate_read"}
    if name == "gpt2":
        assert basis(name, "mlp_gate_read", index) == f"transformer.h.{index}: its MLP has no gate"
    null = ("logits_null",)  # tied or of fewer rows than columns: any basis of the null space is right
    for candidate, wanted in expected.items():
        found = basis(name, candidate, index)
        assert isinstance(found, Tensor), (candidate, found)
        assert found.dtype == torch.float64
        assert found.shape == (64, RANK), candidate
        assert torch.allclose(found.T @ found, torch.eye(RANK, dtype=torch.float64), atol=1e-10)
        if candidate in null:
            model: Any = model_of(name)
            assert float((model.lm_head.weight.detach().double() @ found).abs().max()) < 1e-6
        else:
            assert float(principal_angles(found, wanted).max()) < 1e-5, candidate


def test_the_registry_names_every_candidate_once():
    names = [one.name for one in CANDIDATES]
    assert len(set(names)) == len(names) == 44
    assert sum(one.axis_kind == "ceiling" for one in CANDIDATES) == 2
    assert {one.axis_kind for one in CANDIDATES} == set(AXIS_KINDS)
    assert all(one.needs <= NEEDS and one.needs for one in CANDIDATES)
    reading = {one.family for one in CANDIDATES if one.axis_kind == "read"}
    assert reading == {"W:read", "W:unembed"}


def test_lanczos_finds_what_the_whole_decomposition_finds():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(640, 900, generator=generator)
    found = leading(stream_gram(matrix, writes=True), 8)
    assert float(principal_angles(found, left(matrix, 8)).max()) < 1e-6
    assert leading(torch.zeros(4, 4, dtype=torch.float64), 2).shape == (4, 0)
    assert leading(stream_gram(matrix[:, :3], writes=True), 8).shape == (640, 3)


# ---- other architectures --------------------------------------------------------------------------------------------


def defined(name: str, layer: int) -> dict[str, str]:
    found = {one.name: basis(name, one.name, layer) for one in WEIGHT_SIDE}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def test_bert_has_all_but_a_gate():
    assert defined("bert", 1).keys() == {"mlp_gate_read"}
    attention: Any = model_of("bert").bert.encoder.layer[1].attention  # pyright: ignore[reportAttributeAccessIssue]
    wanted = left(attention.output.dense.weight.detach())
    assert float(principal_angles(wanted, torch.as_tensor(basis("bert", "attn_write", 1))).max()) < 1e-5


def test_an_encoder_is_read_by_cross_attention_and_not_by_the_head():
    missing = defined("t5", 0)
    assert "the head does not read the stream of encoder.block.0" in missing["lm_head_read"]
    assert "write_not_downstream_read" not in missing
    assert defined("t5", 3).keys() == {"mlp_gate_read"}
    last: Any = model_of("t5").encoder.block[2]  # pyright: ignore[reportAttributeAccessIssue]
    decoder: Any = model_of("t5").decoder.block  # pyright: ignore[reportAttributeAccessIssue]
    crossing = [getattr(block.layer[1].EncDecAttention, part).weight for block in decoder for part in "kv"]
    write = left(torch.cat([last.layer[0].SelfAttention.o.weight, last.layer[1].DenseReluDense.wo.weight], dim=1))
    wanted = minus(write, right(torch.cat([one.detach() for one in crossing]), BROAD))
    assert float(principal_angles(wanted, torch.as_tensor(basis("t5", "write_not_downstream_read", 2))).max()) < 1e-5


def test_the_experts_of_a_mixture_write_together():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model: Any = transformers.MixtralForCausalLM(config)
    sources = Sources(WeightSide.of(model), rank=RANK, broad_rank=8)
    missing = {one.name for one in WEIGHT_SIDE if isinstance(sources.basis(one, 1), str)}
    assert missing == set()
    down = torch.cat(list(model.model.layers[1].mlp.experts.down_proj.detach()), dim=1)
    found = sources.basis(BY_NAME["mlp_write"], 1)
    assert float(principal_angles(torch.as_tensor(found), left(down)).max()) < 1e-5
    assert len(sources.weights.writers(1)) == 5


def test_a_vision_model_has_what_does_not_need_a_vocabulary():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4
    )
    sources = Sources(WeightSide.of(transformers.ViTModel(config)), rank=RANK, broad_rank=8)
    found = {one.name: sources.basis(one, 0) for one in WEIGHT_SIDE}
    missing = {key for key, value in found.items() if isinstance(value, str)}
    heads = {"lm_head_read", "logits_null", "write_not_lm_head_read", "causally_isolated", "input_super_not_lm_read"}
    assert missing == heads | {"mlp_gate_read"}
    assert "no head" in str(found["lm_head_read"])


def test_a_model_without_blocks_or_without_known_parts_is_refused():
    with pytest.raises(InputError, match="has no list of blocks"):
        WeightSide.of(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    strange = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mystery": nn.Linear(4, 4)}) for _ in range(2)])})
    with pytest.raises(InputError, match="nothing is known to write"):
        WeightSide.of(strange)


def test_a_broad_rank_that_fills_the_space_is_a_reason():
    sources = Sources(WeightSide.of(model_of("llama")), rank=RANK, broad_rank=64)
    found = sources.basis(BY_NAME["write_not_global_read"], 0)
    assert "fills all 64 dimensions" in str(found)


def test_reading_the_weights_does_not_change_them():
    model = trained_models.untrained("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sources = Sources(WeightSide.of(model), rank=RANK, broad_rank=BROAD)
    for one in WEIGHT_SIDE:
        sources.basis(one, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# ---- the change itself ----------------------------------------------------------------------------------------------


def test_the_ceiling_on_weights_is_the_best_for_the_balanced_change():
    q = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1))).Q
    o, down = (f"model.layers.0.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj"))
    delta = Delta({o: LowRank(q[:, :2], torch.randn(2, 64)), down: LowRank(1e4 * q[:, 2:4], torch.randn(2, 192))})
    sources = Sources(WeightSide.of(model_of("llama")), None, delta, RANK, BROAD)
    found = sources.basis(BY_NAME["dW_left_basis_ceiling"], 0)
    assert isinstance(found, Tensor)
    for name in (o, down):
        assert recovery(delta.parts[name], found).ratio == pytest.approx(64 / RANK, rel=1e-6)
    why = sources.basis(BY_NAME["dW_left_basis_ceiling"], 1)
    assert why == "the change touches no matrix of model.layers.1 that writes to the stream"
