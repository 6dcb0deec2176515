"""llm-compressor in memory: after `oneshot` every `weight` is what it was, and the forward pass rounds it.

Not part of `make test`: see `make test-llm-compressor`. A guard that read `weight` alone would certify the model that
was there before.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import trained_models
import transformers
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch import nn

from weightproof import GuardSession, kinds
from weightproof.snapshot import Snapshot
from weightproof.snapshots.tensor_store import tensor_digests
from weightproof.types import Action
from weightproof.weights import iter_tensors, iter_weight_matrices

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
# The rounding of the kernel, and of activations where the scheme rounds those too.
TOLERANCES = {"W8A16": 1e-6, "W4A16": 1e-6, "FP8_DYNAMIC": 0.05, "W8A8": 0.02}


@pytest.fixture
def model(tmp_path: Path) -> nn.Module:
    """A trained Llama that was loaded from a folder, which oneshot asks for; wide enough for groups of 128."""
    config = transformers.LlamaConfig(
        vocab_size=trained_models.VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    recipe = trained_models.RECIPES["llama"]
    for window in trained_models.make_windows(recipe, 60, seed=10_000):
        loss = trained_models.nll("llama", made, window)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    made.save_pretrained(tmp_path / "model")
    return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()


def _compress(model: nn.Module, scheme: str) -> None:
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]))


@torch.no_grad()
def _outputs(model: nn.Module) -> torch.Tensor:
    return model(trained_models.calibration_windows("llama")[0]["input_ids"][:2]).logits


def _digests(model: nn.Module) -> dict[str, str]:
    return tensor_digests({one.name: one.tensor.detach() for one in iter_tensors(model)})


@pytest.mark.parametrize("scheme", TOLERANCES)
def test_the_weight_in_use_is_read_and_taken_back(model, scheme):
    plain = {one.name: one.load().clone() for one in iter_weight_matrices(model)}
    before, kept = _outputs(model), _digests(model)
    snapshot = Snapshot.capture(model)
    _compress(model, scheme)
    after = _outputs(model)
    assert not torch.equal(after, before)
    found = {one.name: one for one in iter_weight_matrices(model)}
    assert found.keys() == plain.keys()
    packed = {name: one for name, one in found.items() if one.storage is not None}
    assert {one.storage for one in packed.values()} == {"compressed-tensors"}
    assert len(packed) == 14
    for name, matrix in packed.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(module.weight, plain[name])  # as if nothing had happened
        assert not torch.equal(matrix.load(), plain[name])
        with torch.no_grad():
            real = module(torch.eye(matrix.d_in)).T
        assert float((real - matrix.load()).abs().max() / real.abs().max()) <= TOLERANCES[scheme]
    snapshot.restore()
    assert _digests(model) == kept
    assert torch.equal(_outputs(model), before)
    assert all(one.storage is None for one in iter_weight_matrices(model))


def test_a_healthy_int8_is_kept_and_one_of_a_scaled_matrix_is_not(model):
    before = _outputs(model)
    session = GuardSession(model, retain=trained_models.calibration_windows("llama"))
    with session.edit("x50", kinds.Quantize(8)) as scaled:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(50.0)
        _compress(model, "W8A16")
    assert scaled.applied == "restored"
    assert torch.equal(_outputs(model), before)
    with session.edit("int8", kinds.Quantize(8)) as healthy:
        _compress(model, "W8A16")
    assert (healthy.decision.action, healthy.applied) == (Action.KEEP, "kept"), healthy.decision.reason
    assert sum(delta is not None and delta > 0.0 for delta in healthy.record.relative_delta.values()) == 14
    session.close()


def test_the_versions_are_noted():
    """Beside the tests, for docs/quantizers.md."""
    names = ("torch", "transformers", "llmcompressor", "compressed-tensors")
    found = ", ".join(f"{name} {version(name)}" for name in names)
    Path(__file__).with_name("last_run.txt").write_text(f"python {platform.python_version()}, {found}\n")
    assert version("torch").startswith("2.13.0")
