"""Divergence, localisation and the forward digest on tiny models of every kind."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, build
from torch import nn

from weightproof.activations import calibration_windows, random_windows
from weightproof.divergence import capture_outputs, forward_digest, locate_damage, measure_divergence
from weightproof.errors import BaselineError, InputError
from weightproof.families import blocks
from weightproof.forward import windows as windows_module
from weightproof.forward.distributions import Tally, compare, keep, kl_terms, merged, normalise

_SPEC = importlib.util.spec_from_file_location("oracle_kl", Path(__file__).parents[1] / "oracles" / "kl.py")
assert _SPEC is not None
assert _SPEC.loader is not None
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)


def _vit_trunk() -> nn.Module:
    import transformers

    settings = {**ARCHITECTURES["vit"][2]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.ViTModel(transformers.ViTConfig(**settings)).eval()


_KINDS = {**{name: lambda name=name: build(name) for name in ARCHITECTURES}, "vit-trunk": _vit_trunk}


def _perturb(module: nn.Module, scale: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def _capture(model: nn.Module, **options):
    windows = random_windows(model)
    assert windows is not None
    return capture_outputs(model, (windows,), **options)


# -- numbers ------------------------------------------------------------------------------------


def _logits(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    base = 3 * torch.randn(40, 50, generator=generator)
    noise = torch.randn(40, 50, generator=generator)
    return {
        "moderate": (base, base + 0.3 * noise),
        "far": (base, 5 * noise),
        "sharp": (20 * base, 20 * base + noise),
        "extreme": (500 * base, 700 * noise),
        "tiny": (base, base + 1e-4 * noise),
        "bf16": (base.bfloat16(), (base + 0.3 * noise).bfloat16()),
        "shifted": (base, base + 7.0),
    }[case]


def _compare(base: torch.Tensor, now: torch.Tensor, budget: float = math.inf) -> Tally:
    tally = Tally()
    compare(keep("logits", base, torch.arange(len(base)) // 10, budget), now, tally)
    return tally


@pytest.mark.parametrize("case", ["moderate", "far", "sharp", "tiny", "bf16", "shifted"])
def test_kl_equals_the_float64_oracle(case):
    base, now = _logits(case)
    expected = oracle.mean_kl(base.double().numpy(), now.double().numpy())
    tally = _compare(base, now)
    assert tally.mean_kl == pytest.approx(expected, rel=1e-5, abs=1e-11)
    worst = max(
        oracle.mean_kl(base[i : i + 10].double().numpy(), now[i : i + 10].double().numpy()) for i in range(0, 40, 10)
    )
    assert tally.max_kl == pytest.approx(worst, rel=1e-5, abs=1e-11)
    assert tally.flips == int(base.argmax(-1).ne(now.argmax(-1)).sum())


def test_sums_over_batches_are_those_over_everything():
    base, now = _logits("moderate")
    whole, parts = _compare(base, now), []
    for start in (0, 10, 20):  # 4 windows of 10 tokens: one, one and two of them
        end = start + 10 if start < 20 else 40
        parts.append(_compare(base[start:end], now[start:end]))
        assert set(parts[-1].tokens) == set(range((end - start) // 10))
    found = merged(parts)
    assert (found.kl, found.tokens, found.flips, found.finite) == (whole.kl, whole.tokens, whole.flips, True)
    assert merged([*parts, Tally(finite=False)]).finite is False
    assert merged([Tally(squares=(1.0, 4.0)), Tally(squares=(3.0, 0.0))]).relative_change == 1.0


@pytest.mark.parametrize("case", ["moderate", "far", "sharp", "tiny", "extreme"])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_bucketed_kl_equals_its_oracle_and_is_a_lower_bound(case, k):
    base, now = _logits(case)
    budget = 40 * (8 * k + 12)
    kept = keep("logits", base, torch.zeros(40), budget)
    assert kept.indices is not None
    assert kept.indices.shape == (40, k)
    tally = _compare(base, now, budget)
    assert tally.mean_kl <= _compare(base, now).mean_kl * (1 + 1e-6) + 1e-12
    if case != "extreme":  # beyond what the oracle's exp can represent
        expected = oracle.mean_bucketed_kl(base.double().numpy(), now.double().numpy(), k)
        assert tally.mean_kl == pytest.approx(expected, rel=1e-4, abs=1e-10)


@pytest.mark.parametrize("budget", [math.inf, 40 * 52])
def test_no_change_is_exactly_zero_and_symmetric_shapes_count_tokens(budget):
    base, _ = _logits("moderate")
    tally = _compare(base, base.clone(), budget)
    assert (tally.mean_kl, tally.max_kl, tally.flips, tally.num_tokens) == (0.0, 0.0, 0, 40)


def test_entries_ruled_out_on_both_sides_add_nothing():
    base, now = _logits("moderate")
    base[:, 3] = now[:, 3] = -torch.inf
    keep_columns = [i for i in range(50) if i != 3]
    expected = oracle.mean_kl(base[:, keep_columns].double().numpy(), now[:, keep_columns].double().numpy())
    assert _compare(base, now).mean_kl == pytest.approx(expected, rel=1e-5)
    now[:, 4] = -torch.inf  # ruled out now, possible before: infinitely far
    assert not _compare(base, now).finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_have_no_kl(value):
    base, now = _logits("moderate")
    now[7, 7] = value
    assert not _compare(base, now).finite


def test_kl_terms_are_never_negative():
    base, now = (torch.log_softmax(x.double(), -1) for x in _logits("extreme"))
    assert float(kl_terms(base, now).min()) >= 0.0


def test_normalised_hidden_states_do_not_see_scale_and_shift():
    hidden = torch.randn(6, 16)
    assert torch.allclose(normalise(3 * hidden + 2), normalise(hidden), atol=1e-5)
    assert torch.equal(normalise(torch.zeros(2, 4)), torch.zeros(2, 4))


# -- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", _KINDS)
def test_no_change_reads_zero_and_noise_reads_more(kind):
    model = _KINDS[kind]()
    cache = _capture(model)
    same = measure_divergence(model, cache)
    _perturb(model, 0.02)
    moved = measure_divergence(model, cache).divergence[0]
    reading = same.divergence[0]
    assert reading.finite
    assert reading.windows_digest == cache.windows[0].digest
    assert reading.num_tokens == moved.num_tokens > 0
    if kind == "vit-trunk":
        assert reading.kl is None
        assert reading.hidden_error == 0.0
        assert moved.hidden_error > 1e-3
    else:
        assert reading.hidden_error is None
        assert (reading.kl, reading.kl_max, reading.top1_flip_rate) == (0.0, 0.0, 0.0)
        assert 1e-5 < moved.kl <= moved.kl_max
    assert same.second_moments == cache.second_moments
    assert len(same.second_moments) >= len(blocks(model))
    assert all(key.startswith("random:") and value > 0 for key, value in same.second_moments.items())


def test_kl_of_a_model_equals_the_oracle_and_the_top_k_is_below():
    model = build("llama")
    cache, small = _capture(model), _capture(model, memory_cap_bytes=512 * 100)
    windows = cache.windows[0]
    with torch.no_grad():
        before = torch.cat([model(**batch).logits for batch in windows.batches]).flatten(0, 1)
        _perturb(model, 0.05)
        after = torch.cat([model(**batch).logits for batch in windows.batches]).flatten(0, 1)
    expected = oracle.mean_kl(before.double().numpy(), after.double().numpy())
    full = measure_divergence(model, cache).divergence[0]
    assert full.kl == pytest.approx(expected, rel=1e-4)
    assert full.top1_flip_rate == pytest.approx(float(before.argmax(-1).ne(after.argmax(-1)).double().mean()))
    bound = measure_divergence(model, small).divergence[0]
    assert torch.cat([batch[0].values for batch in small.scores[0]]).shape == (512, 11)
    assert sum(batch[0].nbytes for batch in small.scores[0]) <= 512 * 100 + 8 * 512
    assert 0 < bound.kl <= full.kl


def test_the_size_of_batches_changes_no_digest_and_no_reading(monkeypatch):
    readings = []
    for rows in (1, 2, 8):
        monkeypatch.setattr(windows_module, "_MAX_ROWS", rows)
        model = build("llama")
        cache = _capture(model)
        assert {len(batch["input_ids"]) for batch in cache.windows[0].batches} == {rows}
        _perturb(model, 0.05)
        readings.append((cache, measure_divergence(model, cache).divergence[0]))
    (cache, first), *others = readings
    for other, reading in others:
        assert (other.windows[0].digest, other.forward_digest) == (cache.windows[0].digest, cache.forward_digest)
        assert other.second_moments == pytest.approx(cache.second_moments, rel=1e-5)
        assert (reading.num_tokens, reading.windows_digest) == (first.num_tokens, first.windows_digest)
        assert (reading.kl, reading.kl_max) == pytest.approx((first.kl, first.kl_max), rel=1e-4)


def test_padded_positions_are_not_scored():
    model = build("llama")
    padded = [{"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}]
    plain = [{"input_ids": [5, 6, 7]}]
    caches = [capture_outputs(model, (calibration_windows(data, model),)) for data in (padded, plain)]
    _perturb(model, 0.05)
    with_padding, without = (measure_divergence(model, cache).divergence[0] for cache in caches)
    assert with_padding.num_tokens == without.num_tokens == 3
    assert with_padding.kl == pytest.approx(without.kl, rel=1e-4)


def test_several_windows_are_read_apart():
    model = build("gpt2")
    calibration = calibration_windows([[4, 5, 6, 7], [8, 9, 10]], model)
    cache = capture_outputs(model, (random_windows(model), calibration))
    names = [reading.windows for reading in measure_divergence(model, cache).divergence]
    assert names == ["random", "calibration"]
    assert {key.partition(":")[0] for key in cache.second_moments} == {"random", "calibration"}


def test_a_model_that_gives_nan_reads_not_finite():
    model = build("llama")
    cache = _capture(model)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    reading = measure_divergence(model, cache).divergence[0]
    assert not reading.finite
    assert (reading.kl, reading.kl_max, reading.top1_flip_rate, reading.hidden_error) == (None, None, None, None)


def test_a_broken_model_cannot_be_a_baseline():
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(BaselineError, match="NaN or inf before any change"):
        _capture(model)


def test_another_vocabulary_cannot_be_compared():
    model = build("llama")
    cache = _capture(model)
    model.lm_head = nn.Linear(32, 70, bias=False)
    with pytest.raises(InputError, match="cannot be compared"):
        measure_divergence(model, cache)


def test_no_windows_is_said_so():
    with pytest.raises(InputError, match="no windows"):
        capture_outputs(build("llama"), ())


class _Regression(nn.Module):
    """One output per row, small numbers: a softmax or a norm over one entry would see nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1e-3 * self.linear(x)


def test_damage_of_the_pooler_alone_is_seen():
    model = _vit_trunk()
    cache = _capture(model)
    _perturb(model.pooler, 0.2)
    assert measure_divergence(model, cache).divergence[0].hidden_error > 0.1
    assert {e.block for e in locate_damage(model, cache) if e.relative_error > 0} == {"head"}


def test_single_valued_outputs_are_compared_as_values():
    model = _Regression()
    cache = capture_outputs(model, (calibration_windows([{"x": torch.randn(8, 4)}], model),))
    assert cache.trace is None
    assert "no repeated blocks" in cache.trace_reason
    assert locate_damage(model, cache) == ()
    with torch.no_grad():
        model.linear.weight.mul_(1.5)
        model.linear.bias.mul_(1.5)
    reading = measure_divergence(model, cache).divergence[0]
    assert reading.kl is None
    assert reading.hidden_error == pytest.approx(0.5, rel=1e-5)


def test_measuring_disturbs_nothing():
    model = build("bert", hidden_dropout_prob=0.4).train()
    model.bert.encoder.layer[0].eval()
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    cache = _capture(model)
    measure_divergence(model, cache)
    locate_damage(model, cache)
    forward_digest(model, cache.windows)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_wrapped_models_are_measured_like_the_model_inside():
    model = build("llama")
    cache = _capture(model)
    wrapped = nn.DataParallel(model)
    assert random_windows(wrapped).digest == cache.windows[0].digest
    assert measure_divergence(wrapped, cache).divergence[0].kl == 0.0
    assert capture_outputs(wrapped, cache.windows).forward_digest == cache.forward_digest
    assert calibration_windows([[4, 5, 6]], wrapped).num_tokens == 3


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers for it
def test_an_adapter_counts_as_part_of_the_model():
    peft = pytest.importorskip("peft")
    model = build("llama")
    before = _capture(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert random_windows(adapted).digest == before.windows[0].digest
    cache = _capture(adapted)
    assert cache.forward_digest == before.forward_digest  # lora_B begins at zero
    for name, parameter in adapted.named_parameters():
        if "layers.1" in name and "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    assert measure_divergence(adapted, cache).divergence[0].kl > 1e-6
    errors = {error.block: error.relative_error for error in locate_damage(adapted, cache)}
    assert {block for block, error in errors.items() if error > 0} == {"model.layers.1"}


@pytest.mark.parametrize("name", ["llama", "t5", "whisper", "vit"])
def test_a_cast_to_bfloat16_is_measured_against_float32(name):
    model = build(name)
    cache = _capture(model)
    model.to(torch.bfloat16)
    reading = measure_divergence(model, cache).divergence[0]
    assert 0 < reading.kl < 1e-3
    assert max(error.relative_error for error in locate_damage(model, cache)) < 0.05
    low = _capture(model)
    assert measure_divergence(model, low).divergence[0].kl == 0.0


def test_one_score_per_token_is_not_a_distribution():
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 1)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.table(input_ids)[..., 0]

    model = Tagger()
    cache = capture_outputs(model, (calibration_windows([{"input_ids": torch.arange(12).reshape(2, 6)}], model),))
    with torch.no_grad():
        model.table.weight.add_(1.0)  # a softmax over positions would not see this
    reading = measure_divergence(model, cache).divergence[0]
    assert reading.kl is None
    assert reading.num_tokens == 12
    assert reading.hidden_error > 0.1


# -- forward digest -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "t5", "vit-trunk", "whisper"])
def test_forward_digest_is_exact(kind):
    model = _KINDS[kind]()
    cache = _capture(model)
    assert forward_digest(model, cache.windows) == forward_digest(model, cache.windows[0]) == cache.forward_digest
    parameter = list(model.parameters())[-1]
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.mul_(1.001).add_(1e-3)
        assert forward_digest(model, cache.windows) != cache.forward_digest
        parameter.copy_(kept)
    assert forward_digest(model, cache.windows) == cache.forward_digest


# -- localisation -------------------------------------------------------------------------------

_LOCATED = [(name, index) for name, count in (("gpt2", 3), ("llama", 3), ("bert", 3), ("t5", 4), ("whisper", 4))
            for index in range(count)]  # fmt: skip
_DEEPER = {"gpt2": {"n_layer": 3}, "llama": {"num_hidden_layers": 3}, "bert": {"num_hidden_layers": 3}}


@pytest.mark.parametrize(("name", "index"), _LOCATED)
def test_a_fault_in_one_block_is_found_in_that_block_alone(name, index):
    model = build(name, **_DEEPER.get(name, {}))
    cache = _capture(model)
    every = blocks(model)
    _perturb(every[index].module, 0.05)
    errors = {error.block: error.relative_error for error in locate_damage(model, cache)}
    assert errors[every[index].name] > 1e-3
    assert {block for block, error in errors.items() if error > 0} == {every[index].name}
    assert [block.name for block in every] == [block for block in errors if block in {b.name for b in every}]


@pytest.mark.parametrize(
    ("name", "module", "place"),
    [
        ("gpt2", "transformer.wpe", "embedding"),
        ("gpt2", "transformer.ln_f", "head"),
        ("llama", "model.embed_tokens", "embedding"),
        ("llama", "lm_head", "head"),
        ("bert", "bert.embeddings.LayerNorm", "embedding"),
        ("bert", "cls.predictions.transform", "head"),
        ("t5", "encoder.final_layer_norm", "encoder_output"),
        ("t5", "decoder.final_layer_norm", "head"),
        ("whisper", "model.encoder.conv1", "embedding"),
        ("whisper", "model.encoder.layer_norm", "encoder_output"),
        ("vit", "classifier", "head"),
        ("vit", "vit.embeddings", "embedding"),
        ("mamba", "backbone.norm_f", "head"),
    ],
)
def test_a_fault_outside_the_blocks_is_named_too(name, module, place):
    model = build(name)
    cache = _capture(model)
    _perturb(model.get_submodule(module), 0.05)
    errors = {error.block: error.relative_error for error in locate_damage(model, cache)}
    assert {block for block, error in errors.items() if error > 0} == {place}


def test_a_damaged_rotary_table_is_not_blamed_on_the_blocks():
    model = build("llama")
    cache = _capture(model)
    model.model.rotary_emb.inv_freq.mul_(1.5)
    errors = {error.block: error.relative_error for error in locate_damage(model, cache)}
    assert {block for block, error in errors.items() if error > 0} == {"embedding"}


def test_a_block_that_gives_nan_has_infinite_error_and_the_next_none():
    model = build("llama")
    cache = _capture(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    errors = {error.block: error.relative_error for error in locate_damage(model, cache)}
    assert errors["model.layers.0"] == math.inf
    assert errors["model.layers.1"] == 0.0


def test_a_trace_over_the_cap_is_left_out_with_a_reason():
    model = build("llama")
    cache = _capture(model, memory_cap_bytes=4096)
    assert cache.trace is None
    assert "MiB" in cache.trace_reason
    assert locate_damage(model, cache) == ()


def test_a_trace_holds_each_tensor_once():
    model = build("llama", num_hidden_layers=4)
    cache = _capture(model)
    tokens, hidden, width = 64, 32, 64
    distinct = (4 + 1) * tokens * hidden + tokens * width + 2 * tokens * 8  # hidden states, logits, cos and sin
    assert sum(tensor.numel() for tensor in cache.trace.tensors) == distinct


def test_readings_are_plain_numbers():
    model = build("gpt2")
    reading = measure_divergence(model, _capture(model)).divergence[0]
    assert isinstance(reading.kl, float)
    assert not isinstance(reading.kl, np.floating)
