"""The table of docs/quantizers.md: every backend on two small trained models.

Read: what weightproof reads is what the backend multiplies by. Restore: bit for bit, the forward pass too, from every
state. Guard: a healthy int8 is kept, and one of a matrix that was scaled by 50 before is not.
"""

from __future__ import annotations

import pytest
import torch
import trained_models
from backends import BACKENDS, INT8, block_linears
from compressed_tensors.compressors import compress_module
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
MODELS = ("llama", "gpt2")
each_model = pytest.mark.parametrize("model_name", MODELS)
each_backend = pytest.mark.parametrize("backend_name", BACKENDS)


def _linear(conv: nn.Module) -> nn.Linear:
    """transformers' Conv1D as the linear layer that quantizers look for."""
    fresh = nn.Linear(*conv.weight.shape)
    fresh.load_state_dict({"weight": conv.weight.detach().T, "bias": conv.bias.detach()})
    return fresh


def load(name: str) -> nn.Module:
    """A trained model whose blocks hold nn.Linear, with a head of its own: quantizers pass over Conv1D and ties."""
    model = trained_models.load(name).model
    for parent in list(model.modules()):
        for child, module in list(parent.named_children()):
            if type(module).__name__ == "Conv1D":
                setattr(parent, child, _linear(module))
    return model.eval()


def inputs(name: str) -> torch.Tensor:
    return trained_models.calibration_windows(name)[0]["input_ids"][:4]


@torch.no_grad()
def outputs(model: nn.Module, name: str) -> torch.Tensor:
    return model(inputs(name)).logits


def digests(model: nn.Module) -> dict[str, str]:
    return tensor_digests({named.name: named.tensor.detach() for named in iter_tensors(model)})


def packed(model: nn.Module) -> dict[str, object]:
    return {matrix.name: matrix for matrix in iter_weight_matrices(model) if matrix.storage is not None}


@torch.no_grad()
def multiplied_by(module: nn.Module, d_in: int) -> torch.Tensor:
    """The matrix that a module really multiplies by: what it makes of the identity, (d_out, d_in)."""
    bias = module.bias() if callable(module.bias) else module.bias
    found = module(torch.eye(d_in))
    return (found if bias is None else found - bias).T


@each_model
@each_backend
def test_what_is_read_is_what_the_backend_multiplies_by(backend_name, model_name):
    backend, model = BACKENDS[backend_name], load(model_name)
    expected = {matrix.name: (matrix.d_out, matrix.d_in, matrix.family) for matrix in iter_weight_matrices(model)}
    num_linears = len(list(block_linears(model)))
    backend.apply(model)
    every = {matrix.name: matrix for matrix in iter_weight_matrices(model)}
    assert {name: (one.d_out, one.d_in, one.family) for name, one in every.items()} == expected
    found = packed(model)
    assert len(found) == num_linears
    for name, matrix in found.items():
        assert (matrix.storage, matrix.refusal, matrix.is_view) == (backend.storage, None, False)
        values = matrix.load()
        assert type(values) is torch.Tensor
        assert values.dtype == matrix.dtype
        real = multiplied_by(model.get_submodule(name.removesuffix(".weight")), matrix.d_in)
        assert float((real - values).abs().max() / values.abs().max()) <= backend.tolerance
        values.zero_()  # a copy: the model does not notice
    # The first forward pass may have arranged codes anew, or moved scales.
    for name, matrix in packed(model).items():
        real = multiplied_by(model.get_submodule(name.removesuffix(".weight")), matrix.d_in)
        values = matrix.load().float()
        assert float((real - values).abs().max() / values.abs().max()) <= backend.tolerance


@each_model
@each_backend
def test_plain_weights_come_back_from_under_a_quantizer(backend_name, model_name, tmp_path):
    model = load(model_name)
    kept, before, kinds_before = digests(model), outputs(model, model_name), [type(one) for one in model.modules()]
    objects = {name: id(tensor) for name, tensor in model.named_parameters()}
    snapshot = Snapshot.capture(model, tmp_path)
    BACKENDS[backend_name].apply(model)
    assert not torch.equal(outputs(model, model_name), before)
    assert snapshot.changed_names()
    assert snapshot.restore() == snapshot.model_digest
    assert digests(model) == kept
    assert torch.equal(outputs(model, model_name), before)
    assert [type(one) for one in model.modules()] == kinds_before
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == objects
    snapshot.discard()


@torch.no_grad()
def _damage(model: nn.Module) -> int:
    """Flip a bit in every packed tensor that can be written to."""
    parts = [named.tensor for named in iter_tensors(model) if named.part_of is not None and named.tensor.numel() > 1]
    for tensor in parts:
        tensor.data.view(torch.uint8).bitwise_xor_(1)
    return len(parts)


@each_model
@each_backend
def test_packed_weights_come_back_bit_for_bit(backend_name, model_name):
    model = load(model_name)
    BACKENDS[backend_name].apply(model)
    before = outputs(model, model_name)  # some backends move their scales at the first forward pass
    kept = digests(model)
    values = {name: matrix.load() for name, matrix in packed(model).items()}
    snapshot = Snapshot.capture(model)
    assert all(torch.equal(snapshot.original_matrix(one), values[name]) for name, one in packed(model).items())
    if backend_name != "torch dynamic int8":  # nothing of it can be written to
        assert _damage(model) > 0
        assert set(snapshot.changed_names()) > set()
        # The originals are those of the capture, whatever lies in their tensors now.
        assert all(torch.equal(snapshot.original_matrix(one), values[name]) for name, one in packed(model).items())
        snapshot.restore()
        assert digests(model) == kept
        assert torch.equal(outputs(model, model_name), before)
    # Then back to plain layers, and to the packed ones again.
    for name, matrix in packed(model).items():
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Linear(matrix.d_in, matrix.d_out))
    assert not torch.equal(outputs(model, model_name), before)
    now = {matrix.name: matrix for matrix in iter_weight_matrices(model)}
    assert all(torch.equal(snapshot.original_matrix(now[name]), value) for name, value in values.items())
    snapshot.restore()
    assert digests(model) == kept
    assert torch.equal(outputs(model, model_name), before)


@each_model
@pytest.mark.parametrize("backend_name", INT8)
def test_a_healthy_int8_is_kept_and_one_of_a_scaled_matrix_is_not(backend_name, model_name):
    backend, model = BACKENDS[backend_name], load(model_name)
    before = outputs(model, model_name)
    session = GuardSession(model, retain=trained_models.calibration_windows(model_name))
    with session.edit("x50", backend.int8) as scaled:
        layer = list(block_linears(model))[-1][2]
        with torch.no_grad():
            layer.weight.mul_(50.0)
        backend.apply(model)
    assert (scaled.decision.action, scaled.applied) == (Action.ROLLBACK, "restored")
    assert torch.equal(outputs(model, model_name), before)
    with session.edit("int8", backend.int8) as healthy:
        backend.apply(model)
    assert (healthy.decision.action, healthy.applied) == (Action.KEEP, "kept"), healthy.decision.reason
    invariants = next(one for one in healthy.verdicts if one.guard == "invariants")
    assert invariants.outcome != "FAIL"
    assert healthy.record.reach.untouched.keys() <= {"embed", "head"}
    tensors = digests(model)
    assert {name: one.digest for name, one in session.current.readings.tensors.items()} == tensors
    # A further edit of the packed model is judged and taken back too.
    after = outputs(model, model_name)
    with session.edit("dropped") as dropped, torch.no_grad():
        for name, matrix in list(packed(model).items())[:3]:
            parent, _, child = name.removesuffix(".weight").rpartition(".")
            fresh = nn.Linear(matrix.d_in, matrix.d_out)
            fresh.weight.zero_()
            setattr(model.get_submodule(parent), child, fresh)
    assert dropped.applied == "restored"
    assert torch.equal(outputs(model, model_name), after)
    session.close()


@pytest.mark.parametrize(
    "backend_name", ["compressed-tensors int8", "compressed-tensors int4", "compressed-tensors float8"]
)
def test_containers_of_compressed_tensors_hold_what_the_forward_pass_used(backend_name):
    model = load("llama")
    BACKENDS[backend_name].apply(model)
    used = {name: matrix.load() for name, matrix in packed(model).items()}
    for name in used:
        compress_module(model.get_submodule(name.removesuffix(".weight")))
    containers = packed(model)
    assert containers.keys() == used.keys()
    for name, matrix in containers.items():
        torch.testing.assert_close(matrix.load(), used[name], rtol=1e-6, atol=1e-7)
    kept = digests(model)
    snapshot = Snapshot.capture(model)
    assert _damage(model) > 0
    snapshot.restore()
    assert digests(model) == kept


def test_weights_that_wait_to_be_quantized_are_refused_by_name():
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from optimum.quanto import qint8, quantize

    model = nn.ModuleDict({"four": Linear4bit(8, 4), "eight": Linear8bitLt(8, 4), "quanto": nn.Linear(8, 4)})
    quantize(model, weights=qint8, include=["quanto"])
    refusals = {matrix.name: matrix.refusal for matrix in iter_weight_matrices(model)}
    assert "bitsandbytes-4bit" in refusals["four.weight"]
    assert "bitsandbytes-8bit" in refusals["eight.weight"]
    assert "freeze" in refusals["quanto.weight"]
    Snapshot.capture(model).restore()  # what cannot be read can be kept all the same


@pytest.mark.parametrize(
    "backend_name", ["torchao int8", "bitsandbytes int8", "bitsandbytes nf4", "quanto int8", "hqq int8"]
)
def test_stacked_experts_that_a_backend_leaves_alone_are_named(backend_name):
    """Of a mixture, all of these quantize attention alone: most of the weights stay as they were, without a word."""
    from architectures import build

    model = build("mixtral")
    session = GuardSession(model)
    with session.edit("quantized", kinds.Quantize(8), on_violation="monitor") as step:
        BACKENDS[backend_name].apply(model)
    reach = step.record.reach
    assert reach.untouched_fraction["expert"] == 1.0
    assert "attn" not in reach.untouched
    assert 0.0 < reach.touched_fraction < 0.5
    warned = [item for verdict in step.verdicts for item in verdict.measurements if item.target == "expert"]
    assert any(
        item.statistic == "untouched_fraction" and item.outcome == "WARN" and "experts.gate_up_proj" in item.reason
        for item in warned
    )
    session.close()


def test_adapters_are_trained_over_a_4_bit_base_under_guard():
    """QLoRA: windows of training are kept, a base that was damaged on the way comes back with the adapter."""
    from peft import LoraConfig, get_peft_model

    base = load("llama")
    BACKENDS["bitsandbytes nf4 at inference"].apply(base)
    base.is_loaded_in_4bit = True
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    windows = trained_models.calibration_windows("llama")
    session = GuardSession(model, retain=windows)
    session.watch()

    def train() -> list[float]:
        losses = []
        for window in windows:
            loss = trained_models.nll("llama", model, window)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    kept = session.check_window(step=2, raw_losses=train())
    assert (kept.decision.action, kept.applied) == (Action.KEEP, "kept"), kept.decision.reason
    good = digests(model)
    losses = train()
    with torch.no_grad():
        scale = next(named for named in iter_tensors(model) if named.name.endswith("mlp.down_proj.weight.absmax"))
        scale.tensor.mul_(float("nan"))
    broken = session.check_window(step=4, raw_losses=losses)
    assert broken.applied == "restored"
    assert digests(model) == good
    session.close()
