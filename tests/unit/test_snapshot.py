"""A snapshot takes any change back, bit for bit, into the same objects and storage, or says so."""

from __future__ import annotations

import errno
import gc
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from weightproof import snapshot as snapshot_module
from weightproof.errors import InputError, RestoreError, SnapshotError
from weightproof.snapshot import Snapshot, model_digest, tensor_digest, write_matrix
from weightproof.snapshots import tensor_store
from weightproof.types import WeightMatrix
from weightproof.weights import iter_tensors, iter_weight_matrices


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=16))


def llama_bf16():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=40)).to(torch.bfloat16)


def mixtral():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=1, vocab_size=40, num_local_experts=3))


class Mixed(nn.Module):
    """Linear maps, a convolution, a tie, buffers of every sort, and awkward tensors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 6, bias=False)
        self.third = nn.Linear(6, 8)
        self.third.weight = self.first.weight
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(6)
        self.scalar = nn.Parameter(torch.tensor(3.0))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.register_buffer("positions", torch.arange(5).expand(3, 5), persistent=False)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("phase", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("turned", torch.randn(4, 3).t())
        self.second.weight.requires_grad_(False)

    def forward(self, x):
        return self.third(self.norm(self.second(self.first(x))))


MODELS = {"tied GPT-2": gpt2, "bf16 Llama": llama_bf16, "Mixtral": mixtral, "mixed": Mixed}


def bits(tensor):
    """dtype, shape and bytes, without any code under test."""
    tensor = tensor.detach().contiguous()
    data = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return str(tensor.dtype), tuple(tensor.shape), bytes(data.reshape(-1).view(torch.uint8).tolist())


def portrait(model):
    """Everything that a restore must bring back: objects, storage, values, flags, module graph."""
    tensors = [
        (path, name, id(tensor), tensor.data_ptr(), tensor.stride(), tensor.requires_grad, bits(tensor))
        for path, module in model.named_modules(remove_duplicate=False)
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]
    modules = [
        (path, id(module), type(module), sorted(module._non_persistent_buffers_set), len(module._forward_pre_hooks))
        for path, module in model.named_modules(remove_duplicate=False)
    ]
    return tensors, modules, list(model.state_dict())


def linears(model):
    return [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def parent_of(model, path):
    parent, _, child = path.rpartition(".")
    return model.get_submodule(parent), child


# -- edits: what foreign code may do ---------------------------------------------------------------


def scale_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1000)


def poison(model):
    with torch.no_grad():
        next(iter(model.parameters())).fill_(math.nan)


def replace_module(model):
    path, old = linears(model)[-1]
    parent, child = parent_of(model, path)
    setattr(parent, child, nn.Linear(old.in_features, old.out_features, bias=old.bias is not None))


def replace_module_by_another_class(model):
    path, old = linears(model)[0]
    parent, child = parent_of(model, path)
    setattr(parent, child, nn.Sequential(old, nn.LayerNorm(old.out_features)))


def replace_parameter(model):
    module = linears(model)[0][1]
    module.weight = nn.Parameter(torch.zeros_like(module.weight))


def replace_data(model):
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter.data)


def cast_to_half(model):
    model.to(torch.float16)


def cast_to_double(model):
    model.double()


def write_buffers(model):
    for buffer in model.buffers():
        buffer.copy_(torch.zeros_like(buffer)) if not buffer._is_view() else None
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                setattr(module, name, buffer.clone() * 0)


def add_buffer_and_parameter(model):
    model.register_buffer("extra", torch.ones(3))
    linears(model)[0][1].register_parameter("scale", nn.Parameter(torch.ones(1)))


def change_persistence(model):
    for module in model.modules():
        for name in module._buffers:
            module._non_persistent_buffers_set ^= {name}


def add_module(model):
    model.add_module("adapter", nn.Linear(2, 2))
    linears(model)[0][1].add_module("lora", nn.Linear(2, 2))


def delete_module(model):
    parent, child = parent_of(model, linears(model)[0][0])
    delattr(parent, child)


def delete_parameter(model):
    del linears(model)[0][1].weight


def swap_modules(model):
    holding = [path for path, module in model.named_modules() if path and next(module.parameters(), None) is not None]
    one, two = holding[1:3]
    first, second = model.get_submodule(one), model.get_submodule(two)
    for path, module in ((one, second), (two, first)):
        parent, child = parent_of(model, path)
        parent._modules[child] = module


def freeze(model):
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad and parameter.is_floating_point())


def break_ties(model):
    seen = set()
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
            seen.add(id(parameter))


def tie_everything(model):
    first = linears(model)[0][1].weight
    for _, module in linears(model):
        module.weight = first


def parametrized(model):
    parametrize.register_parametrization(linears(model)[0][1], "weight", nn.Tanh())


def masked(model):
    prune.l1_unstructured(linears(model)[0][1], "weight", amount=0.5)


def wrapped_forward(model):
    module = linears(model)[0][1]
    plain = module.forward
    module.forward = lambda x: plain(x) * 2


def resized(model):
    module = linears(model)[0][1]
    module.weight = nn.Parameter(torch.zeros(module.out_features + 3, module.in_features))
    module.out_features += 3


EDITS = [
    scale_in_place,
    poison,
    replace_module,
    replace_module_by_another_class,
    replace_parameter,
    replace_data,
    cast_to_half,
    cast_to_double,
    write_buffers,
    add_buffer_and_parameter,
    change_persistence,
    add_module,
    delete_module,
    delete_parameter,
    swap_modules,
    freeze,
    break_ties,
    tie_everything,
    parametrized,
    masked,
    wrapped_forward,
    resized,
]


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_every_edit_is_taken_back_bit_for_bit(name, edit, place, tmp_path):
    model = MODELS[name]()
    before = portrait(model)
    kept = Snapshot.capture(model, tmp_path if place == "disk" else None)
    edit(model)
    digest = kept.restore()
    assert portrait(model) == before
    assert digest == kept.model_digest
    assert kept.changed_names() == ()
    assert kept.replaced_modules() == ()
    assert "weight" not in vars(linears(model)[0][1])
    kept.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", MODELS)
def test_the_forward_pass_is_the_same_after_all_edits_together(name):
    model = MODELS[name]().eval()
    inputs = (torch.randn(4, 6),) if name == "mixed" else (torch.arange(8).reshape(1, 8),)

    def outputs():
        with torch.no_grad():
            found = model(*inputs)
        return found if isinstance(found, torch.Tensor) else found.logits

    before = outputs()
    kept = Snapshot.capture(model)
    for edit in (scale_in_place, wrapped_forward, masked, break_ties, replace_module, cast_to_double):
        edit(model)
    kept.restore()
    assert torch.equal(outputs(), before)


def test_not_a_number_and_negative_zero_come_back_as_they_were():
    model = nn.Linear(4, 4)
    payloads = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000, 0x00000001], dtype=torch.int32).view(torch.float32)
    with torch.no_grad():
        model.weight[0] = payloads
    before = bits(model.weight)
    kept = Snapshot.capture(model)
    with torch.no_grad():
        model.weight.nan_to_num_(nan=1.0).add_(1)
    assert kept.changed_names() == ("weight",)
    kept.restore()
    assert bits(model.weight) == before


def test_changes_are_seen_bit_by_bit():
    model = Mixed()
    with torch.no_grad():
        model.first.weight[0, 0], model.scalar.data = 0.0, torch.tensor(math.nan)
    kept = Snapshot.capture(model)
    assert kept.changed_names() == ()
    with torch.no_grad():
        model.first.weight[0, 0] = -0.0
    assert kept.changed_names() == ("first.weight",)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_changed_names_tell_what_was_added_removed_cast_and_untied(place, tmp_path):
    model = Mixed()
    kept = Snapshot.capture(model, tmp_path if place == "disk" else None)
    model.third.weight = nn.Parameter(model.third.weight.detach() + 1)
    model.second.weight.data = model.second.weight.data.double()
    del model.scalar
    model.register_buffer("extra", torch.ones(2))
    model.first.bias.requires_grad_(False)
    assert sorted(kept.changed_names()) == ["extra", "scalar", "second.weight", "third.weight"]
    assert kept.replaced_modules() == ()


def test_replaced_modules_are_named_once_at_the_top():
    model = gpt2()
    kept = Snapshot.capture(model)
    model.transformer.h[1] = gpt2().transformer.h[1]
    model.adapter = nn.Linear(2, 2)
    del model.transformer.ln_f
    assert kept.replaced_modules() == ("adapter", "transformer.h.1", "transformer.ln_f")


# -- training goes on ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edit", [scale_in_place, cast_to_half, replace_data, replace_parameter, replace_module, masked]
)
@pytest.mark.parametrize("build", [gpt2, llama_bf16])
def test_the_optimizer_still_moves_the_live_weights(build, edit):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
    tokens = torch.arange(8).reshape(1, 8)

    def step():
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    kept = Snapshot.capture(model)
    edit(model)
    kept.restore()
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    step()
    assert set(kept.changed_names()) >= {named.name for named in iter_tensors(model) if named.tensor.ndim == 2}


def test_gradients_survive_a_restore_and_follow_the_dtype_back():
    model = Mixed()
    model(torch.randn(4, 6)).sum().backward()
    kept = Snapshot.capture(model)
    before = model.first.weight.grad.clone()
    scale_in_place(model)
    kept.restore()
    assert torch.equal(model.first.weight.grad, before)
    model.first.half()
    kept.restore()
    assert model.first.weight.grad.dtype == torch.float32
    assert torch.allclose(model.first.weight.grad, before, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_notes_of_a_merged_adapter_go_back_with_the_weights():
    model = get_peft_model(llama_bf16(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    tokens = torch.arange(8).reshape(1, 8)
    before, logits = portrait(model), model(tokens).logits
    kept = Snapshot.capture(model)
    model.merge_adapter()
    assert len(kept.changed_names()) == 2
    kept.restore()
    assert portrait(model) == before
    assert not any(getattr(module, "merged_adapters", ()) for module in model.modules())
    assert torch.equal(model(tokens).logits, logits)


def test_train_mode_and_hooks_of_untouched_modules_stay_as_they_are():
    model = Mixed()
    kept = Snapshot.capture(model)
    model.eval()
    handle = model.second.register_forward_hook(lambda *_: None)
    scale_in_place(model)
    kept.restore()
    assert not model.first.training
    assert len(model.second._forward_hooks) == 1
    handle.remove()


def test_a_snapshot_restores_more_than_once():
    model = Mixed()
    before = portrait(model)
    kept = Snapshot.capture(model)
    for edit in EDITS:
        edit(model)
        kept.restore()
    assert portrait(model) == before


# -- digests and originals -------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_digests_are_those_of_the_walker_wherever_the_copies_lie(name, tmp_path):
    model = MODELS[name]()
    wanted = {named.name: tensor_digest(named.tensor) for named in iter_tensors(model)}
    in_memory, on_disk = Snapshot.capture(model), Snapshot.capture(model, tmp_path)
    scale_in_place(model)
    assert dict(in_memory.digests) == dict(on_disk.digests) == wanted
    assert in_memory.model_digest == on_disk.model_digest == model_digest(wanted)
    assert in_memory.nbytes == on_disk.nbytes == sum(named.tensor.nbytes for named in iter_tensors(model))
    for tensor_name, digest in wanted.items():
        assert tensor_digest(in_memory.original(tensor_name)) == digest
        assert tensor_digest(on_disk.original(tensor_name)) == digest


def test_a_digest_covers_dtype_shape_and_bits_but_not_layout():
    weight = torch.randn(4, 6)
    assert tensor_digest(weight) == tensor_digest(weight.t().contiguous().t())
    others = [weight.half(), weight.double(), weight.reshape(6, 4), -weight, weight.view(torch.int32), weight[:3]]
    digests = {tensor_digest(other) for other in [weight, *others]}
    assert len(digests) == 7
    assert tensor_digest(torch.tensor([0.0])) != tensor_digest(torch.tensor([-0.0]))
    assert (
        model_digest({"a": "1", "b": "2"}) == model_digest({"b": "2", "a": "1"}) != model_digest({"a": "2", "b": "1"})
    )


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("name", MODELS)
def test_original_matrices_are_oriented_as_they_were_loaded(name, place, tmp_path):
    model = MODELS[name]()
    loaded = {matrix.name: matrix.load().clone() for matrix in iter_weight_matrices(model) if matrix.refusal is None}
    kept = Snapshot.capture(model, tmp_path if place == "disk" else None)
    scale_in_place(model)
    assert loaded
    for matrix in iter_weight_matrices(model):
        if matrix.refusal is None:
            assert torch.equal(kept.original_matrix(matrix), loaded[matrix.name])


def test_an_original_keeps_its_orientation_when_the_module_is_replaced():
    model = gpt2()
    kept = Snapshot.capture(model)
    wanted = model.transformer.h[0].attn.c_proj.weight.detach().t().clone()
    model.transformer.h[0].attn.c_proj = nn.Linear(16, 16)
    matrices = {matrix.name: matrix for matrix in iter_weight_matrices(model)}
    assert torch.equal(kept.original_matrix(matrices["transformer.h.0.attn.c_proj.weight"]), wanted)
    model.adapter = nn.Linear(2, 2)
    (added,) = [matrix for matrix in iter_weight_matrices(model) if matrix.name == "adapter.weight"]
    assert kept.original_matrix(added) is None


def test_originals_are_found_by_any_name_of_a_tie():
    kept = Snapshot.capture(gpt2())
    assert torch.equal(kept.original("lm_head.weight"), kept.original("transformer.wte.weight"))
    with pytest.raises(InputError, match=r"no tensor 'nothing.weight'"):
        kept.original("nothing.weight")


# -- no room, torn files ---------------------------------------------------------------------------


def test_too_little_free_space_is_said_before_anything_is_written(monkeypatch, tmp_path):
    model = gpt2()
    before = portrait(model)
    monkeypatch.setattr(tensor_store.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(SnapshotError, match=r"no room for a snapshot in .* are needed and 1000 B are free"):
        Snapshot.capture(model, tmp_path)
    assert portrait(model) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["save_file", "write_atomically"])
def test_a_disk_that_fills_up_leaves_no_partial_file(monkeypatch, tmp_path, target):
    model = gpt2()
    before = portrait(model)
    real = getattr(tensor_store, target)

    def full(*arguments):
        real(*arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_store, target, full)
    with pytest.raises(SnapshotError, match="the disk filled up"):
        Snapshot.capture(model, tmp_path)
    assert portrait(model) == before
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    with pytest.raises(SnapshotError, match=r"cannot use .*file"):
        Snapshot.capture(gpt2(), blocker)


def test_no_memory_is_said_in_one_sentence(monkeypatch):
    def fail(tensor):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\ntrace")

    monkeypatch.setattr(tensor_store, "_clone", fail)
    with pytest.raises(SnapshotError, match="keep snapshots on disk"):
        Snapshot.capture(gpt2())


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "forged":
        content[-2000] ^= 1
    elif how == "torn":
        del content[-100:]
    elif how == "no header":
        content[:16] = b"\xff" * 16
    path.unlink()
    if how != "gone":
        path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["forged", "torn", "no header", "gone"])
@pytest.mark.parametrize("edit", [scale_in_place, freeze])
def test_a_damaged_snapshot_file_is_found_before_anything_is_written(how, edit, tmp_path):
    model = gpt2()
    kept = Snapshot.capture(model, tmp_path)
    edit(model)
    changed = portrait(model)
    damage(next(tmp_path.rglob("*.safetensors")), how)
    with pytest.raises(RestoreError, match="snapshot file"):
        kept.restore()
    assert portrait(model) == changed


def test_a_damaged_copy_in_memory_is_found_by_its_digest():
    model = gpt2()
    kept = Snapshot.capture(model)
    assert kept.model_digest
    kept.original("transformer.h.0.ln_1.weight").zero_()
    with pytest.raises(RestoreError, match=r"transformer.h.0.ln_1.weight was altered: nothing was restored"):
        kept.restore()


def test_a_write_that_does_not_arrive_is_not_called_restored(monkeypatch):
    model = gpt2()
    kept = Snapshot.capture(model)
    scale_in_place(model)
    monkeypatch.setattr(snapshot_module, "_write", lambda target, value: None)
    with pytest.raises(RestoreError, match=r"transformer.wte.weight has another digest after restoring"):
        kept.restore()


def test_an_error_midway_is_an_error_of_the_restore(monkeypatch):
    model = gpt2()
    kept = Snapshot.capture(model)
    scale_in_place(model)

    def fail(target, value):
        raise RuntimeError("device lost")

    monkeypatch.setattr(snapshot_module, "_write", fail)
    with pytest.raises(RestoreError, match="midway, do not use the model: device lost"):
        kept.restore()


def test_a_manifest_of_digests_lies_beside_the_tensors(tmp_path):
    kept = Snapshot.capture(gpt2(), tmp_path)
    (folder,) = tmp_path.iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["tensors"] == dict(kept.digests)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "tensors.safetensors"}


def test_two_snapshots_share_a_folder_and_a_discarded_one_is_of_no_use(tmp_path):
    model = gpt2()
    first, second = Snapshot.capture(model, tmp_path), Snapshot.capture(model, tmp_path)
    first.discard()
    first.discard()
    scale_in_place(model)
    assert second.restore() == second.model_digest
    with pytest.raises(RestoreError, match="discarded"):
        first.restore()
    shutil.rmtree(tmp_path)
    second.discard()


def test_files_do_not_outlive_the_snapshot(tmp_path):
    kept = Snapshot.capture(gpt2(), tmp_path)
    assert kept.nbytes
    del kept
    gc.collect()
    assert list(tmp_path.iterdir()) == []


# -- what cannot be kept ---------------------------------------------------------------------------


class Quantized(torch.Tensor):
    """Stands for the tensor subclasses of quantizers and of sharded training."""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.randn(4, 4).as_subclass(Quantized), "it is a .*Quantized|Parameter"),
        (lambda: torch.empty(4, 4, device="meta"), "meta device"),
    ],
)
def test_tensors_that_cannot_be_copied_bit_for_bit_are_refused_by_name(make, words):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].register_buffer("scale", make())
    with pytest.raises(SnapshotError, match=rf"1.scale: .*({words})"):
        Snapshot.capture(model)


# -- the one writer --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_matrix_is_written_into_the_live_weights_and_cast_once(name):
    model = MODELS[name]()
    before = portrait(model)[0]
    for matrix in [matrix for matrix in iter_weight_matrices(model) if matrix.refusal is None and matrix.is_view]:
        values = torch.randn(matrix.d_out, matrix.d_in, dtype=torch.float64)
        write_matrix(matrix, values)
        assert torch.equal(matrix.load(), values.to(matrix.dtype))
    after = portrait(model)[0]
    assert [row[:6] for row in after] == [row[:6] for row in before]
    assert after != before


def matrix_with(**changes):
    weight = torch.zeros(3, 2)
    parts = {"dtype": weight.dtype, "load": lambda: weight, "is_view": True, "refusal": None} | changes
    return WeightMatrix("w", "ffn", 3, 2, parts["dtype"], (), "w", parts["load"], parts["is_view"], parts["refusal"])


@pytest.mark.parametrize(
    ("matrix", "values", "words"),
    [
        (matrix_with(), torch.zeros(2, 3), r"shape \[3, 2\]"),
        (matrix_with(refusal="not a linear map"), torch.zeros(3, 2), "not a linear map"),
        (matrix_with(is_view=False), torch.zeros(3, 2), "copy"),
        (matrix_with(), torch.zeros(3, 2, dtype=torch.int8), "int8"),
    ],
)
def test_a_matrix_that_cannot_be_written_is_refused(matrix, values, words):
    with pytest.raises(InputError, match=words):
        write_matrix(matrix, values)


def test_the_experts_of_a_stack_are_read_from_disk_once(tmp_path, monkeypatch):
    model = nn.Module()
    model.experts = nn.Parameter(torch.randn(6, 5, 4))
    opened: list[object] = []
    original = tensor_store.safe_open

    def counting(path, **options):
        opened.append(path)
        return original(path, **options)

    snapshot = Snapshot.capture(model, tmp_path)
    monkeypatch.setattr(tensor_store, "safe_open", counting)
    for matrix in iter_weight_matrices(model):
        assert torch.equal(snapshot.original_matrix(matrix), matrix.load())
    assert len(opened) == 1
    snapshot.discard()
