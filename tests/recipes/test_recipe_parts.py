"""The parts of a recipe's run: the demo model's cache, sizes, the results' folder, changes by other libraries."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from tests.support.chains import tiny_llama

from weightproof.edits import RTN
from weightproof.errors import InputError
from weightproof.kinds import Cast
from weightproof.policy import load_policy
from weightproof.procedure.output import RECIPE, SUMMARY, output_folder
from weightproof.procedure.result import Sizes
from weightproof.procedure.training_job import TrainingJob
from weightproof.weights import iter_weight_matrices
from weightproof_callbacks import demo_model as demo
from weightproof_callbacks.external_edits import CastTo, Quanto, TorchPrune
from weightproof_callbacks.recipe_training import FullTraining, LoraTraining

# ---------------------------------------------------------------- the demo model


@pytest.fixture
def trainings(monkeypatch):
    """Write empty files in place of training; count how often."""
    count = []

    def train(recipe, folder):
        count.append(recipe["model"]["hidden_size"])
        (folder / demo.FOLDER).mkdir()
        for name in (demo.RETAIN, demo.TRAIN):
            (folder / name).write_text("text")

    monkeypatch.setattr(demo, "_train", train)
    return count


def test_the_demo_model_is_trained_once_and_the_fast_one_is_another(trainings, tmp_path):
    said = []
    first = demo.demo_model(tmp_path, say=said.append)
    assert demo.demo_model(tmp_path, say=said.append) == first
    assert first.retain.read_text() == "text"
    assert demo.demo_model(tmp_path, fast=True).folder != first.folder
    assert trainings == [256, 64]
    assert said == ["training the small demo model, once"]


def test_a_training_that_fails_leaves_no_demo_model(trainings, tmp_path, monkeypatch):
    def fail(recipe, folder):
        (folder / demo.FOLDER).mkdir()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"cannot be kept in .*: the disk is full"):
        patch.setattr(demo, "_train", fail)
        demo.demo_model(tmp_path)
    assert not list(tmp_path.iterdir())
    assert demo.demo_model(tmp_path).folder.is_dir()


# ---------------------------------------------------------------- the folder of the results


def test_results_appear_when_the_block_ends_well(tmp_path):
    out = tmp_path / "deep" / "out"
    with output_folder(out) as scratch:
        for name in (RECIPE, SUMMARY):
            (scratch / name).write_text("1")
        assert not out.exists()
    assert (out / SUMMARY).read_text() == "1"
    with pytest.raises(ZeroDivisionError), output_folder(out) as scratch:
        (scratch / SUMMARY).write_text("2")
        raise ZeroDivisionError
    assert (out / SUMMARY).read_text() == "1"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_a_killed_run_left_is_cleared_and_a_running_one_is_not(tmp_path):
    left = tmp_path / ".out.part"
    left.mkdir()
    (left / "half").write_text("half")
    with output_folder(tmp_path / "out") as scratch:
        assert not list(scratch.iterdir())
        with pytest.raises(InputError, match="another run writes to out"), output_folder(tmp_path / "out"):
            pass
        (scratch / SUMMARY).write_text("whole")
    assert (tmp_path / "out" / SUMMARY).read_text() == "whole"


def test_a_link_or_a_file_is_no_place_for_results(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("")
    for name, message in (("link", "is a link"), ("file", "is a file")):
        with pytest.raises(InputError, match=message), output_folder(tmp_path / name):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="this user may not write there"), output_folder(tmp_path / "out"):
        pass


# ---------------------------------------------------------------- sizes


def inside(model):
    return [matrix for matrix in iter_weight_matrices(model) if matrix.family in ("attn", "ffn")]


def test_sizes_are_codes_and_a_scale_a_group():
    model = tiny_llama()
    sizes = Sizes(model)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert sizes.bytes == whole
    chosen = inside(model)
    plain = whole - sum(one.d_out * one.d_in * 4 for one in chosen)
    sizes.quantized(chosen, RTN(4).kind)
    assert sizes.bytes == plain + sum(one.d_out * one.d_in // 2 + one.d_out * 2 for one in chosen)
    sizes.quantized(chosen, RTN(8, "group", 48).kind)
    assert sizes.bytes == plain + sum(one.d_out * one.d_in + one.d_out * -(-one.d_in // 48) * 2 for one in chosen)
    sizes.as_stored()
    assert sizes.bytes == whole
    sizes.quantized(chosen, RTN(8).kind, [one.tensor_name for one in chosen])
    sizes.quantized(chosen, Cast("bfloat16"))
    assert sizes.bytes == whole


# ---------------------------------------------------------------- other libraries


def test_a_cast_changes_the_dtype_and_promises_it():
    model = tiny_llama()
    change = CastTo("bfloat16")
    change(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert change.kind == Cast("bfloat16")


def test_torch_prune_leaves_plain_parameters_with_zeros():
    model = tiny_llama()
    TorchPrune(0.25, modules=("*q_proj", "*down_proj"))(model)
    for matrix in inside(model):
        wanted = 0.25 if "q_proj" in matrix.name or "down_proj" in matrix.name else 0.0
        assert (matrix.load() == 0).float().mean().item() == wanted
    assert not [name for name, _ in model.named_buffers() if name.endswith("mask")]
    with pytest.raises(InputError, match="no linear layer of this model fits '\\*nothing'"):
        TorchPrune(0.5, modules=("*nothing",))(model)
    for changes, message in (({"sparsity": 1.5}, "share"), ({"sparsity": 0.5, "method": "l3"}, "l1_unstructured")):
        with pytest.raises(InputError, match=message):
            TorchPrune(**changes)


@pytest.mark.skipif(find_spec("optimum") is not None, reason="it is installed here")
def test_a_quantizer_that_is_not_installed_names_its_extra():
    with pytest.raises(
        InputError, match=r"optimum\.quanto is not installed: pip install 'weightproof\[quantization\]'"
    ):
        Quanto(8)


# ---------------------------------------------------------------- trainers


def job_on(model, folder, text):
    (folder / "train.txt").write_text(text)
    return TrainingJob(
        name="tuned",
        model=model,
        encode=lambda line: [ord(letter) % 64 for letter in line],
        text=folder / "train.txt",
        policy=load_policy("balanced"),
        guard={"every": 2},
        retain=None,
        folder=folder,
    )


def test_too_little_text_is_said_before_training(tmp_path):
    with pytest.raises(InputError, match="gives 3 windows of 32 tokens, fewer than one batch of 8"):
        FullTraining(steps=2, window=32).train(job_on(tiny_llama(), tmp_path, "x" * 100))


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 2, "window": 1}, {"steps": 2, "learning_rate": 0.0}])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(InputError, match=r"must be|above 0"):
        FullTraining(**bad)


def test_an_adapter_leaves_weights_modules_and_flags_as_they_were(tmp_path):
    model = tiny_llama().eval()
    model.lm_head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    job = job_on(model, tmp_path, "to be or not to be " * 60)
    with pytest.raises(InputError, match=r"target_modules: .*q_prog"):
        LoraTraining(steps=2, batch_size=2, window=16, target_modules=("q_prog",)).train(job)
    trained = LoraTraining(steps=2, batch_size=2, window=16, target_modules=("q_proj",), r=2).train(job)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(modules[name] is module for name, module in model.named_modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not model.training
    assert trained.steps == 2
    assert (trained.adapter / "adapter_model.safetensors").is_file()
