"""Packed weights without any quantizer installed: masks, parametrizations, torch's own, and containers made by hand."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import trained_models
from containers import AwqContainer, CompressedContainer, GptqContainer
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, prune

from weightproof import GuardSession, kinds
from weightproof.errors import InputError, SnapshotError
from weightproof.folders import readers
from weightproof.folders.readers import PackedWeight, read_packed
from weightproof.snapshot import Snapshot, write_matrix
from weightproof.snapshots.tensor_store import tensor_digests
from weightproof.types import Action
from weightproof.weights import iter_tensors, iter_weight_matrices
from weightproof_callbacks.quantizers import packages

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning"),
]


def _dynamic(layer: nn.Linear) -> nn.Module:
    return quantize_dynamic(nn.ModuleList([layer]), {nn.Linear}, dtype=torch.qint8)[0]


def _pruned(layer: nn.Linear) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=0.05)


def _twice_pruned(layer: nn.Linear) -> nn.Module:
    return prune.random_unstructured(_pruned(layer), "weight", amount=0.3)


STORAGES = {
    "prune mask": ("prune-mask", _pruned),
    "two prune masks": ("prune-mask", _twice_pruned),
    "weight norm": ("parametrization", parametrizations.weight_norm),
    "spectral norm": ("parametrization", lambda layer: parametrizations.spectral_norm(layer).eval()),
    "torch dynamic": ("torch-dynamic", _dynamic),
    "gptq, 4 bits": ("gptq", GptqContainer),
    "gptq, 8 bits": ("gptq", lambda layer: GptqContainer(layer, 8)),
    "gptq, 2 bits, newer format": ("gptq", lambda layer: GptqContainer(layer, 2, 32, qzeros_format=2)),
    "awq": ("awq", AwqContainer),
    "compressed-tensors, 4 bits": ("compressed-tensors", CompressedContainer),
    "compressed-tensors, 3 bits": ("compressed-tensors", lambda layer: CompressedContainer(layer, 3, 32)),
    "compressed-tensors, 8 bits": ("compressed-tensors", lambda layer: CompressedContainer(layer, 8, 64)),
}
each_storage = pytest.mark.parametrize("name", STORAGES)


def _block(name: str | None = None, seed: int = 0) -> nn.ModuleDict:
    """One layer under a name of the blocks, packed or not."""
    torch.manual_seed(seed)
    layer = nn.Linear(64, 48)
    return nn.ModuleDict({"up_proj": layer if name is None else STORAGES[name][1](layer)})


def _digests(model: nn.Module) -> dict[str, str]:
    return tensor_digests({one.name: one.tensor.detach() for one in iter_tensors(model)})


@torch.no_grad()
def _in_use(module: nn.Module) -> torch.Tensor:
    """What a module really multiplies by: what it makes of the identity."""
    bias = module.bias() if callable(module.bias) else module.bias
    return (module(torch.eye(64)) - bias).T


@each_storage
def test_what_is_read_is_what_the_module_multiplies_by(name):
    model = _block(name)
    (matrix,) = iter_weight_matrices(model)
    assert (matrix.name, matrix.family, matrix.d_out, matrix.d_in) == ("up_proj.weight", "ffn", 48, 64)
    assert (matrix.storage, matrix.refusal, matrix.is_view) == (STORAGES[name][0], None, False)
    # torch's dynamic layer rounds its inputs too.
    tolerance = 0.02 if name == "torch dynamic" else 1e-6
    torch.testing.assert_close(matrix.load(), _in_use(model["up_proj"]), rtol=0.0, atol=tolerance)
    names = {one.name for one in iter_tensors(model)}
    assert set(matrix.parts.values()) <= names
    assert "up_proj.bias" in names
    assert {one.name for one in iter_tensors(model) if one.part_of} == set(matrix.parts.values())


@each_storage
def test_a_plain_weight_comes_back_from_under_it(name):
    model = _block()
    x, layer, weight = torch.randn(5, 64), model["up_proj"], model["up_proj"].weight
    before, kept = layer(x), _digests(model)
    snapshot = Snapshot.capture(model)
    model["up_proj"] = STORAGES[name][1](layer)
    assert "up_proj.weight" in snapshot.changed_names()
    snapshot.restore()
    assert model["up_proj"] is layer
    assert layer.weight is weight
    assert type(layer) is nn.Linear
    assert torch.equal(model["up_proj"](x), before)
    assert _digests(model) == kept
    assert set(vars(layer)) == set(vars(nn.Linear(1, 1)))


@each_storage
def test_a_packed_weight_comes_back_bit_for_bit(name, tmp_path):
    model = _block(name)
    x, packed = torch.randn(5, 64), model["up_proj"]
    before, kept = packed(x), _digests(model)
    (matrix,) = iter_weight_matrices(model)
    values = matrix.load()
    snapshot = Snapshot.capture(model, tmp_path)
    with torch.no_grad():
        for one in iter_tensors(model):
            if one.part_of is not None and one.tensor.numel() > 1:
                one.tensor.data.view(torch.uint8).bitwise_xor_(1)
    if name != "torch dynamic":
        assert set(snapshot.changed_names()) == {one.name for one in iter_tensors(model) if one.tensor.numel() > 1} - {
            "up_proj.bias"
        }
    assert torch.equal(snapshot.original_matrix(matrix), values)
    snapshot.restore()
    assert torch.equal(packed(x), before)
    assert _digests(model) == kept
    model["up_proj"] = nn.Linear(64, 48)
    (plain,) = iter_weight_matrices(model)
    assert torch.equal(snapshot.original_matrix(plain), values)
    snapshot.restore()
    assert model["up_proj"] is packed
    assert torch.equal(packed(x), before)
    snapshot.discard()


def test_repacked_objects_go_back_as_they_were():
    """torch's dynamic layer takes new weights by a new packed object: the old object goes back."""
    model = _block("torch dynamic")
    packed, x = model["up_proj"], torch.randn(5, 64)
    before, held = packed(x), packed._packed_params._packed_params
    snapshot = Snapshot.capture(model)
    packed.set_weight_bias(torch.quantize_per_tensor(torch.randn(48, 64), 0.1, 0, torch.qint8), packed.bias())
    assert not torch.equal(packed(x), before)
    assert "up_proj.weight.int_repr" in snapshot.changed_names()
    snapshot.restore()
    assert packed._packed_params._packed_params is held
    assert torch.equal(packed(x), before)


def test_a_mask_that_grows_in_training_goes_back_in_place():
    """The optimizer's tensors stay the objects they are, and are written to in place."""
    model = _block("prune mask")
    original = model["up_proj"].weight_orig
    optimizer = torch.optim.SGD([original], lr=0.1)
    snapshot = Snapshot.capture(model)
    memory = original.data_ptr()
    model["up_proj"](torch.randn(5, 64)).square().sum().backward()
    optimizer.step()
    prune.l1_unstructured(model["up_proj"], "weight", amount=0.5)
    snapshot.restore()
    assert model["up_proj"].weight_orig is original
    assert original.data_ptr() == memory
    assert snapshot.changed_names() == ()


def test_conv1d_under_a_mask_is_turned_as_without_it():
    model = trained_models.untrained("gpt2")
    layer = model.transformer.h[0].mlp.c_fc
    expected = {one.name: (one.d_out, one.d_in) for one in iter_weight_matrices(model)}
    prune.l1_unstructured(layer, "weight", amount=0.5)
    found = {one.name: one for one in iter_weight_matrices(model)}
    assert {name: (one.d_out, one.d_in) for name, one in found.items()} == expected
    values = found["transformer.h.0.mlp.c_fc.weight"].load()
    torch.testing.assert_close(values, (layer.weight_orig * layer.weight_mask).T)


def test_packed_weights_cannot_be_written():
    model = _block("awq")
    (matrix,) = iter_weight_matrices(model)
    with pytest.raises(InputError, match="stored by awq"):
        write_matrix(matrix, matrix.load())


def test_a_layer_used_twice_is_one_packed_weight():
    model = _block("awq")
    model["gate_proj"] = model["up_proj"]
    (matrix,) = iter_weight_matrices(model)
    assert matrix.tied_names == ("gate_proj.weight",)
    assert len({one.name for one in iter_tensors(model)}) == 4


def test_a_kernel_that_takes_zero_points_as_they_are_is_read_so():
    """GPTQModel converts zero points while it loads and leaves the number of their format."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    converted = GptqContainer(layer, qzeros_format=2)
    expected = converted.weight_in_use()
    converted._qzeros_format, converted.REQUIRES_FORMAT_V2 = 1, True
    (matrix,) = iter_weight_matrices(nn.ModuleDict({"up_proj": converted}))
    torch.testing.assert_close(matrix.load(), expected)


def test_tensors_that_were_made_in_inference_mode_are_restored_in_it():
    with torch.inference_mode():
        model = _block("gptq, 4 bits")
    kept = _digests(model)
    snapshot = Snapshot.capture(model)
    with torch.inference_mode():
        model["up_proj"].qweight.zero_()
    snapshot.restore()
    assert _digests(model) == kept


# ---- what cannot be read


def test_codes_of_an_unknown_width_are_refused_by_name():
    model = _block("awq")
    model["up_proj"].w_bit = 3
    (matrix,) = iter_weight_matrices(model)
    assert (
        matrix.refusal
        == "it is stored by awq, and cannot be read: codes of 3 bits in torch.int32: only 4 bits in int32 are known"
    )
    assert (matrix.d_out, matrix.d_in, matrix.storage) == (48, 64, "awq")
    with pytest.raises(InputError, match="awq"):
        matrix.load()
    snapshot = Snapshot.capture(model)  # its bytes can be kept all the same
    model["up_proj"].qweight.zero_()
    snapshot.restore()
    assert int(model["up_proj"].qweight.count_nonzero()) > 0


class Params4bit(nn.Parameter):
    """As bitsandbytes names its packed parameters."""


def test_codes_of_a_quantizer_that_is_not_installed_name_the_extra(monkeypatch):
    monkeypatch.setattr(packages, "_is_installed", lambda package: False)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    model = nn.ModuleDict({"up_proj": nn.Linear(4, 4)})
    model["up_proj"].weight = Params4bit(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    model["up_proj"].weight.quant_state = SimpleNamespace(shape=(4, 4))
    (matrix,) = iter_weight_matrices(model)
    assert "bitsandbytes is not installed" in matrix.refusal
    assert "pip install 'weightproof[quantization]'" in matrix.refusal


def test_a_backend_of_an_unknown_version_is_refused_and_not_an_error():
    model = _block("compressed-tensors, 4 bits")
    del model["up_proj"].quantization_scheme.weights.strategy
    (matrix,) = iter_weight_matrices(model)
    assert "compressed-tensors" in matrix.refusal
    assert "strategy" in matrix.refusal


def test_a_guard_does_not_measure_what_cannot_be_read_and_says_so():
    model = nn.ModuleDict({"up_proj": AwqContainer(nn.Linear(64, 48)), "down_proj": nn.Linear(48, 64)})
    model["up_proj"].w_bit = 3
    session = GuardSession(model)
    reading = session.baseline.readings.matrices["up_proj.weight"]
    assert reading.frobenius_norm is None
    assert "awq" in reading.reason
    session.close()


class _Unknown(torch.Tensor):
    pass


def test_a_subclass_that_no_reader_knows_is_refused_as_before():
    model = nn.ModuleDict({"up_proj": nn.Linear(4, 4)})
    model["up_proj"].weight = nn.Parameter(torch.ones(4, 4).as_subclass(_Unknown))
    (matrix,) = iter_weight_matrices(model)
    assert "_Unknown" in matrix.refusal
    with pytest.raises(SnapshotError, match=r"no reader knows \(docs/quantizers.md\)"):
        Snapshot.capture(model)


def test_plain_layers_are_not_shown_to_readers(monkeypatch):
    def never():
        raise AssertionError

    monkeypatch.setattr(readers, "readers", never)
    for layer in (nn.Linear(2, 2), nn.Embedding(3, 2), nn.LayerNorm(2)):
        assert read_packed(layer) == ()


# ---- readers of one's own


class _Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.arange(12, dtype=torch.int8).reshape(3, 4), requires_grad=False)


class _HalvedReader:
    name = "halved"

    def read(self, module: nn.Module) -> PackedWeight | None:
        if not isinstance(module, _Halved):
            return None
        return PackedWeight(
            name="weight",
            backend=self.name,
            d_out=3,
            d_in=4,
            dtype=torch.float32,
            registered=("codes",),
            tensors={"codes": module.codes},
            dequantize=lambda: module.codes.float() / 2,
            rebuild=lambda tensors: tensors["codes"].float() / 2,
        )


def test_a_reader_of_ones_own_is_enough(monkeypatch):
    monkeypatch.setattr(readers, "readers", lambda: (_HalvedReader(),))
    model = nn.ModuleDict({"up_proj": _Halved()})
    (matrix,) = iter_weight_matrices(model)
    assert (matrix.name, matrix.storage) == ("up_proj.weight", "halved")
    assert torch.equal(matrix.load(), torch.arange(12.0).reshape(3, 4) / 2)
    snapshot = Snapshot.capture(model)
    model["up_proj"].codes.data.zero_()
    assert torch.equal(snapshot.original_matrix(matrix), torch.arange(12.0).reshape(3, 4) / 2)
    snapshot.restore()
    assert int(model["up_proj"].codes.sum()) == 66


def test_what_is_no_reader_is_refused(monkeypatch):
    monkeypatch.setattr(readers, "plugins", lambda group: {"odd": None})
    monkeypatch.setattr(readers, "load_plugin", lambda group, name: object())
    readers.readers.cache_clear()
    try:
        with pytest.raises(InputError, match="'odd'"):
            readers.readers()
    finally:
        readers.readers.cache_clear()


# ---- judged


def _quantized(model: nn.Module) -> None:
    for layer in model.model.layers:
        quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8, inplace=True)


def test_a_healthy_int8_is_kept_and_one_of_a_scaled_matrix_is_not():
    model = trained_models.load("llama").model
    window = trained_models.calibration_windows("llama")
    with torch.no_grad():
        before = model(**window[0]).logits
    session = GuardSession(model, retain=window)
    with session.edit("x50", kinds.Quantize(8, "tensor")) as scaled:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(50.0)
        _quantized(model)
    assert scaled.applied == "restored"
    assert torch.equal(model(**window[0]).logits, before)
    with session.edit("int8", kinds.Quantize(8, "tensor")) as healthy:
        _quantized(model)
    assert healthy.decision.action is Action.KEEP
    measured = next(one for one in healthy.verdicts if one.guard == "spectral")
    assert measured.num_measured == measured.num_eligible
    assert all(name.endswith(".weight") for name in healthy.record.relative_delta)
    assert {name for name, delta in healthy.record.relative_delta.items() if delta} == {
        name for name in session.baseline.readings.matrices if "layers" in name
    }
    session.close()


def test_experts_that_a_quantizer_leaves_alone_are_named_with_their_share():
    from architectures import build

    model = build("mixtral")
    session = GuardSession(model)
    with session.edit("int8", kinds.Quantize(8, "tensor"), on_violation="monitor") as step:
        for layer in model.model.layers:
            quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8, inplace=True)
    reach = step.record.reach
    matrices = list(iter_weight_matrices(model))
    sizes = {one.name: one.d_out * one.d_in for one in matrices}
    touched = sum(sizes[one.name] for one in matrices if one.storage == "torch-dynamic")
    assert reach.touched_fraction == pytest.approx(touched / sum(sizes.values()))
    assert 0.0 < reach.touched_fraction < 0.5
    assert reach.untouched_fraction["expert"] == 1.0
    assert "model.layers.0.mlp.experts.gate_up_proj" in reach.untouched["expert"]
    (warning,) = [
        item
        for verdict in step.verdicts
        for item in verdict.measurements
        if item.statistic == "untouched_fraction" and item.target == "expert"
    ]
    assert warning.outcome == "WARN"
    assert "100.0% of the expert parameters were left as they were: model.layers.0.mlp.experts" in warning.reason
    session.close()
