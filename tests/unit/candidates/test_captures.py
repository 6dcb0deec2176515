from __future__ import annotations

import pytest
import torch
import trained_models
import transformers
from architectures import VOCAB, build
from torch import nn

from weightproof.candidates.capturing import capture, chosen_blocks
from weightproof.deltas import Delta
from weightproof.errors import InputError
from weightproof.weights import iter_weight_matrices

LENGTHS = (9, 4, 7, 4, 9, 2)
# The module that an MLP's parts are in, and their names.
MLPS = {"llama": ("mlp", "up_proj", "down_proj"), "gpt2": ("mlp", "c_fc", "c_proj")}


def prompts(side: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of several lengths, padded on one side with a token that also occurs as a real one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(LENGTHS), max(LENGTHS)), 5)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(max(LENGTHS) - length, None)
        ids[row, place] = torch.randint(3, VOCAB, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def alone(batch: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    return batch["input_ids"][row, batch["attention_mask"][row].bool()][None]


def block_list(model: nn.Module) -> list[nn.Module]:
    return [block.module for block in chosen_blocks(model)]


def state_of(model: nn.Module) -> list[object]:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    flags = [m.training for m in model.modules()]
    weights = [p.detach().clone() for p in model.parameters()]
    return [hooks, flags, model.config._attn_implementation, weights]


def assert_same(one: list[object], other: list[object]) -> None:
    assert one[:3] == other[:3]
    assert all(torch.equal(a, b) for a, b in zip(one[3], other[3], strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral"])
def test_the_last_real_token_of_every_layer_on_either_side_of_the_padding(name):
    model = build(name).train()
    before = state_of(model)
    left, right = (capture(model, prompts(side)) for side in ("left", "right"))
    assert_same(state_of(model), before)
    assert torch.equal(left.clean.stream, right.clean.stream)
    assert torch.equal(left.clean.first, right.clean.first)
    model.eval()
    for row in range(len(LENGTHS)):
        with torch.no_grad():
            found = model(alone(prompts("right"), row), output_hidden_states=True).hidden_states
        for layer, states in enumerate(found[:-1]):  # the last one is what is left after the final norm
            assert torch.allclose(left.clean.stream[layer, row], states[0, -1], atol=1e-5)
            assert torch.allclose(left.clean.first[layer, row], states[0, 0], atol=1e-5)
    assert left.clean.stream.shape == (3, len(LENGTHS), 32)
    assert left.clean.stream.dtype is torch.float32


def test_what_leaves_the_last_block_is_before_the_final_norm():
    model, seen = build("llama"), []
    handle = block_list(model)[-1].register_forward_hook(lambda *parts: seen.append(parts[-1]))
    with torch.no_grad():
        model(alone(prompts("left"), 0))
    handle.remove()
    found = capture(model, prompts("left"))
    assert torch.allclose(found.clean.stream[-1, 0], seen[0][0, -1], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_attention_of_the_last_token_is_read_whatever_implementation_the_model_uses(name):
    model = build(name, attn_implementation="sdpa")
    found = capture(model, prompts("left"), prompts("left", 1), prompts("right", 2))
    assert model.config._attn_implementation == "sdpa"
    eager = build(name, attn_implementation="eager")
    for side, seed, padding in ((found.positive, 1, "left"), (found.negative, 2, "right")):
        assert side is not None
        for row, length in enumerate(LENGTHS):
            with torch.no_grad():
                output = eager(alone(prompts(padding, seed), row), output_attentions=True, output_hidden_states=True)
            expected = torch.stack([weights[0, :, -1].mean(0) for weights in output.attentions])
            assert side.attention[row].shape == (2, length)
            assert torch.allclose(side.attention[row], expected, atol=1e-5)
            assert torch.allclose(side.sequences[row][0], output.hidden_states[1][0], atol=1e-5)
    assert found.gap("attention") is None


def test_attention_that_gives_no_weights_is_a_gap_with_a_reason():
    model = build("mamba")
    found = capture(model, prompts("left"), prompts("left", 1), prompts("left", 2))
    assert "does not give weights" in (found.gap("attention") or "")
    assert "no MLP" in (found.gap("mlp") or "")
    assert found.gap("contrast") is None


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_an_mlp_is_given_and_what_its_down_projection_gets(name):
    model, (holder, up, down) = build(name), MLPS[name]
    found = capture(model, prompts("left"))
    mlp = getattr(block_list(model)[1], holder)
    seen: dict[str, torch.Tensor] = {}
    handles = [
        getattr(mlp, up).register_forward_hook(lambda _m, args, out: seen.update(x=args[0][0, -1], u=out[0, -1])),
        getattr(mlp, down).register_forward_hook(lambda _m, args, _o: seen.update(a=args[0][0, -1])),
    ]
    with torch.no_grad():
        model(alone(prompts("left"), 2))
    for handle in handles:
        handle.remove()
    for key, place in (("up_input", "x"), ("up_output", "u"), ("activated", "a")):
        assert torch.allclose(found.clean.mlp[1][key][2], seen[place], atol=1e-5)
    assert ("gate_output" in found.clean.mlp[1]) == (name == "llama")
    if name == "llama":
        gate = found.clean.mlp[1]["gate_output"]
        expected = nn.functional.silu(gate) * found.clean.mlp[1]["up_output"]
        assert torch.allclose(found.clean.mlp[1]["activated"], expected, atol=1e-5)


def test_fused_gate_and_up_projections_are_told_apart():
    settings = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**settings, **heads)).eval()
    mlp = capture(model, prompts("left")).clean.mlp[1]
    expected = nn.functional.silu(mlp["gate_output"]) * mlp["up_output"]
    assert mlp["gate_output"].shape == (len(LENGTHS), 48)
    assert torch.allclose(mlp["activated"], expected, atol=1e-5)


def test_an_mlp_that_does_not_call_its_projections_is_a_gap():
    model = build("gpt2")
    mlp = model.transformer.h[1].mlp
    mlp.forward = lambda states: states @ mlp.c_fc.weight @ mlp.c_proj.weight
    assert "are not called as modules" in (capture(model, prompts("left")).gap("mlp") or "")


def test_stacked_experts_are_a_gap_of_the_mlp_alone():
    found = capture(build("mixtral"), prompts("left"))
    assert "experts are stacked" in (found.gap("mlp") or "")
    assert found.gap("clean") is None


def small_delta(model: nn.Module, scale: float = 0.05) -> Delta:
    generator = torch.Generator().manual_seed(4)
    chosen = [one for one in iter_weight_matrices(model) if "mlp" in one.name and one.d_out == 32]
    return Delta({one.name: scale * torch.randn(one.d_out, one.d_in, generator=generator) for one in chosen}, {})


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_change_of_the_weights_is_read_at_both_multiples(name):
    model = build(name)
    delta, before = small_delta(model), state_of(model)
    found = capture(model, prompts("left"), delta=delta)
    assert_same(state_of(model), before)
    streams = []
    for alpha in (1.0, -1.0):
        other = build(name)
        with torch.no_grad():
            for matrix in iter_weight_matrices(other):
                if matrix.name in delta.parts:
                    matrix.load().add_(alpha * delta.dense(matrix.name))
        streams.append(capture(other, prompts("left")).clean.stream[1:])
    assert found.steered is not None
    assert torch.allclose(found.steered, streams[0] - streams[1], atol=1e-5)
    on_off = capture(model, prompts("left"), delta=delta, alphas=(1.0, 0.0))
    assert on_off.steered is not None
    assert torch.allclose(on_off.steered, streams[0] - found.clean.stream[1:], atol=1e-5)
    assert found.difference(1).shape == (3, 32)
    assert "no change of the weights" in (capture(model, prompts("left")).gap("delta") or "")


def test_halves_share_no_prompt_and_every_seed_has_its_own():
    found = capture(build("llama"), prompts("left"))
    splits = []
    for one in (found, found.with_seed(0), found.with_seed(1)):
        halves = [one.half(7, which).tolist() for which in ("fit", "eval")]
        assert sorted(halves[0] + halves[1]) == list(range(7))
        assert [len(half) for half in halves] == [4, 3]
        splits.append(halves)
    assert splits[0][0] == [0, 2, 4, 6]
    assert splits[1] != splits[2]
    assert found.with_seed(0).half(7).tolist() == splits[1][0]
    found.require_rank(3)
    with pytest.raises(InputError, match=r"rank 4 needs at least 8 clean prompts.*there are 6"):
        found.require_rank(4)


def test_the_model_is_as_it_was_after_a_pass_that_fails():
    model = build("llama")
    before = state_of(model)
    handle = model.lm_head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("broken")))
    with pytest.raises(InputError, match="broken"):
        capture(model, prompts("left"), prompts("left"), prompts("left"))
    handle.remove()
    assert_same(state_of(model), before)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"activations of model\.layers\.0 are not finite"):
        capture(model, prompts("left"))


def test_blocks_are_found_or_named():
    assert [block.name for block in chosen_blocks(build("llama"))] == ["model.layers.0", "model.layers.1"]
    with pytest.raises(InputError, match=r"2 lists of blocks \(encoder\.block, decoder\.block\).*block_names"):
        chosen_blocks(build("t5"))
    named = chosen_blocks(build("t5"), "decoder.block")
    assert [block.name for block in named] == ["decoder.block.0", "decoder.block.1"]
    plain = nn.Sequential(nn.Embedding(VOCAB, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(InputError, match="Sequential has no list of repeated blocks"):
        chosen_blocks(plain)
    with pytest.raises(InputError, match="no module 'layers'"):
        chosen_blocks(plain, "layers")


class Plain(nn.Module):
    """A stream of two linear blocks that no table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 8)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        stream = self.table(input_ids)
        for block in (self.one, self.two):
            stream = block(stream)
        return stream


def test_any_modules_that_the_user_names_are_blocks():
    model = Plain()
    found = capture(model, prompts("right"), block_names=["one", "two"])
    with torch.no_grad():
        entering = model.table(alone(prompts("right"), 3))[0, -1]
        leaving = model.two(model.one(entering))
    assert found.layers == ("one", "two")
    assert torch.allclose(found.clean.stream[0, 3], entering)
    assert torch.allclose(found.clean.stream[2, 3], leaving, atol=1e-6)


@pytest.mark.parametrize(
    ("clean", "positive", "negative", "message"),
    [
        ({"input_ids": torch.ones(1, 4, dtype=torch.long)}, None, None, "at least two clean prompts"),
        ({"input_ids": torch.ones(4, dtype=torch.long)}, None, None, "must be tokenised"),
        (prompts("left"), prompts("left"), None, "one of them is missing"),
        (prompts("left"), prompts("left"), {"input_ids": torch.ones(2, 4, dtype=torch.long)}, "in pairs: there are 6"),
    ],
)
def test_bad_prompts_are_refused_in_a_sentence(clean, positive, negative, message):
    with pytest.raises(InputError, match=message):
        capture(build("llama"), clean, positive, negative)


def test_a_trained_model_is_read_in_batches_as_one_by_one():
    model = trained_models.load("llama").model
    batch = {"input_ids": trained_models.chain_samples(10, 12, seed=5)}
    whole, single = capture(model, batch), capture(model, batch, batch_size=1)
    assert torch.allclose(whole.clean.stream, single.clean.stream, atol=1e-4)
