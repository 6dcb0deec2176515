"""Forward passes that leave no trace, and the windows they run on."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, VOCAB, build
from torch import nn

from weightproof.activations import (
    calibration_windows,
    forward_outputs,
    hooked,
    random_windows,
    tap_moments,
    undisturbed,
)
from weightproof.errors import InputError
from weightproof.families import taps
from weightproof.forward.windows import digest_items


class _Plain(nn.Module):
    """A module without config: two named inputs, a dropout and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        out = self.linear(self.dropout(self.norm(x)))
        return out if scale is None else out * scale


def _draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002


def _seed_all() -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)


# -- undisturbed --------------------------------------------------------------------------------


def test_flags_are_eval_inside_and_put_back_module_by_module():
    model = build("gpt2", resid_pdrop=0.3).train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    with undisturbed(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_flags_and_random_state_are_put_back_after_an_exception():
    model = _Plain().train()
    _seed_all()
    expected = _draws()
    _seed_all()
    with pytest.raises(KeyError), undisturbed(model):
        _draws()
        raise KeyError
    assert model.training
    assert model.dropout.training
    assert _draws() == expected


def test_random_state_of_torch_numpy_and_python_is_left_as_found():
    model = build("llama", attention_dropout=0.2).train()
    _seed_all()
    expected = _draws()
    _seed_all()
    windows = random_windows(model)
    with undisturbed(model):
        forward_outputs(model, windows.first())
        _draws()
    assert _draws() == expected


def test_dropout_is_off_and_running_statistics_stay():
    model = _Plain().train()
    mean = model.norm.running_mean.clone()
    batch = {"x": torch.randn(8, 4)}
    with undisturbed(model):
        first = forward_outputs(model, batch).scores
        second = forward_outputs(model, batch).scores
    assert torch.equal(first, second)
    assert torch.equal(model.norm.running_mean, mean)


def test_pending_gradients_hooks_and_train_overrides_are_untouched():
    model = _Plain().train()
    model(torch.randn(8, 4)).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    values = [p.grad.clone() for p in model.parameters()]
    seen = []
    handle = model.linear.register_forward_hook(lambda *_: seen.append(1))
    model.train = lambda mode=True: pytest.fail("adapters may merge weights in train()")  # type: ignore[method-assign]
    with undisturbed(model):
        output = forward_outputs(model, {"x": torch.randn(8, 4)}).scores
    assert not output.requires_grad
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(p.grad, v) for p, v in zip(model.parameters(), values, strict=True))
    assert list(model.linear._forward_hooks) == [handle.id]


def test_autocast_is_off_inside_and_on_again_after():
    model = _Plain()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with undisturbed(model):
            assert forward_outputs(model, {"x": torch.randn(2, 4)}).scores.dtype == torch.float32
        assert model(torch.randn(2, 4)).dtype == torch.bfloat16


def test_mixed_precision_that_accelerate_wrapped_around_forward_is_off_inside():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = _Plain().eval()
    batch = torch.randn(2, 4)
    exact = model(batch).detach()
    prepared = accelerator.prepare_model(model)
    wrapped = prepared.__dict__["forward"]
    rounded = prepared(batch).detach()
    with undisturbed(prepared):
        inside = forward_outputs(prepared, {"x": batch}).scores
    assert torch.equal(inside, exact)
    assert not torch.equal(rounded, exact)
    assert prepared.__dict__["forward"] is wrapped


def test_hooks_are_removed_after_an_exception():
    model = _Plain()
    with pytest.raises(ValueError, match="x"), hooked(model.register_forward_hook(lambda *_: None)):
        raise ValueError("x")
    assert not model._forward_hooks


# -- random windows -----------------------------------------------------------------------------

_KEYS = {
    "t5": {"input_ids", "decoder_input_ids"},
    "vit": {"pixel_values"},
    "whisper": {"input_features", "decoder_input_ids"},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_random_windows_fit_the_model_and_follow_from_the_seed(name):
    model = build(name)
    torch.manual_seed(1)
    windows = random_windows(model)
    torch.manual_seed(2)
    again = random_windows(model)
    assert set(windows.batches[0]) == _KEYS.get(name, {"input_ids"})
    assert windows.digest == again.digest != random_windows(model, seed=1).digest
    with undisturbed(model):
        assert torch.isfinite(forward_outputs(model, windows.batches[0]).scores).all()


def test_random_tokens_have_no_role_and_fit_the_position_table():
    model = build("llama", pad_token_id=5, eos_token_id=[2, 7])
    ids = torch.cat([batch["input_ids"] for batch in random_windows(model, length=500).batches])
    assert ids.shape == (8, 64)
    assert not set(ids.flatten().tolist()) & {1, 2, 5, 7}
    assert 0 <= ids.min() <= ids.max() < VOCAB


def test_vocabulary_follows_the_embedding_when_it_is_smaller():
    model = build("gpt2")
    model.transformer.wte = nn.Embedding(10, model.config.n_embd)
    assert max(int(b["input_ids"].max()) for b in random_windows(model).batches) < 10


def test_decoder_inputs_begin_with_the_start_token():
    for name in ("t5", "whisper"):
        model = build(name)
        ids = random_windows(model).batches[0]["decoder_input_ids"]
        assert ids[:, 0].tolist() == [model.config.decoder_start_token_id] * len(ids)


def test_audio_windows_are_few_and_of_the_demanded_shape():
    model = build("whisper", max_source_positions=200, num_mel_bins=8)
    windows = random_windows(model, count=4, length=100)
    assert sum(len(b["input_features"]) for b in windows.batches) == 2
    assert windows.batches[0]["input_features"].shape[1:] == (8, 400)


def test_batches_bound_the_memory_of_logits():
    model = build("mamba")
    model.config.vocab_size = 2**20
    model.get_input_embeddings = lambda: None  # type: ignore[method-assign]
    assert [len(b["input_ids"]) for b in random_windows(model, count=3, length=16).batches] == [1, 1, 1]


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))])
def test_a_module_without_config_has_no_random_windows(model):
    assert random_windows(model) is None


# -- calibration windows ------------------------------------------------------------------------

_IDS = [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14]]


def _dataset():
    import datasets

    return datasets.Dataset.from_dict({"input_ids": _IDS, "text": ["a", "b", "c"]})


class _MapStyle(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(_IDS)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": _IDS[index % len(_IDS)]}


_CONTAINERS = {
    "map-style Dataset": _MapStyle,
    "list of dicts of lists": lambda: [{"input_ids": ids} for ids in _IDS],
    "list of dicts of tensors": lambda: [{"input_ids": torch.tensor(ids)} for ids in _IDS],
    "list of dicts of arrays": lambda: [{"input_ids": np.array(ids)} for ids in _IDS],
    "dicts with labels and other columns": lambda: [{"input_ids": i, "labels": i, "text": "x", "idx": 1} for i in _IDS],
    "generator": lambda: ({"input_ids": ids} for ids in _IDS),
    "list of lists": lambda: _IDS,
    "list of tensors": lambda: [torch.tensor(ids) for ids in _IDS],
    "one tensor": lambda: torch.tensor(_IDS),
    "one array": lambda: np.array(_IDS),
    "one batch": lambda: {"input_ids": torch.tensor(_IDS)},
    "batches": lambda: [{"input_ids": torch.tensor(_IDS[:2])}, {"input_ids": torch.tensor(_IDS[2:])}],
    "tuples of inputs and targets": lambda: [(torch.tensor(ids), torch.tensor(0)) for ids in _IDS],
    "flat ids": lambda: [i for ids in _IDS for i in ids],
    "datasets.Dataset": _dataset,
    "DataLoader": lambda: torch.utils.data.DataLoader([{"input_ids": torch.tensor(i)} for i in _IDS], batch_size=2),
}


@pytest.mark.parametrize("container", _CONTAINERS)
def test_every_container_gives_the_same_windows(container):
    windows = calibration_windows(_CONTAINERS[container](), build("llama"), length=4)
    assert [row for batch in windows.batches for row in batch["input_ids"].tolist()] == _IDS
    assert windows.digest == digest_items([{"input_ids": torch.tensor(ids)} for ids in _IDS])
    assert windows.num_tokens == 12
    assert windows.name == "calibration"


def test_reads_no_more_than_needed_and_leaves_the_random_state():
    model = build("llama")
    stream = iter([{"input_ids": ids} for ids in _IDS])
    calibration_windows(stream, model, count=2, length=4)
    assert next(stream)["input_ids"] == _IDS[2]
    loader = torch.utils.data.DataLoader([{"input_ids": torch.tensor(i)} for i in _IDS], shuffle=True)
    _seed_all()
    expected = _draws()
    _seed_all()
    calibration_windows(loader, model)
    assert _draws() == expected


def test_windows_are_cut_to_length_and_left_padding_is_dropped():
    model = build("llama")
    data = [{"input_ids": [0, 0, 5, 6, 7, 8], "attention_mask": [0, 0, 1, 1, 1, 1]}]
    batch = calibration_windows(data, model, length=3).batches[0]
    assert batch["input_ids"].tolist() == [[5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1]]


def test_padding_is_not_counted():
    model = build("llama")
    data = [{"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0]}]
    windows = calibration_windows(data, model)
    assert windows.num_tokens == 3
    with undisturbed(model):
        assert forward_outputs(model, windows.batches[0]).real.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "has no window"),
        (iter(()), "has no window"),
        ([{"input_ids": []}], "has no window"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "has no window"),
        ("some text", "tokenize"),
        (["some text"], "tokenize"),
        ([{"text": "some text"}], "tokenize"),
        ([{"text": ["some", "texts"]}], "tokenize"),
        ([{"labels": [1, 2]}], "no usable 'input_ids'"),
        ([{"input_ids": [[1, 2], [3]]}], "no usable 'input_ids'"),
        ([{"input_ids": "text"}], "tokenize"),
        (7, "give an iterable"),
    ],
)
def test_unusable_data_is_one_clear_sentence(data, message):
    with pytest.raises(InputError, match=message):
        calibration_windows(data, build("llama"))


def test_decoder_inputs_come_from_labels_shifted_right():
    model = build("t5")
    data = [{"input_ids": [4, 5, 6], "attention_mask": [1, 1, 1], "labels": [7, 8, -100]}]
    batch = calibration_windows(data, model).batches[0]
    assert batch["decoder_input_ids"].tolist() == [[0, 7, 8]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 0]]
    assert "labels" not in batch
    with pytest.raises(InputError, match="has no window"):
        calibration_windows([{"input_ids": [4, 5], "labels": [-100, -100]}], model)
    without = calibration_windows([{"input_ids": [4, 5, 6]}], model).batches[0]
    assert without["decoder_input_ids"].tolist() == [[0, 4, 5]]


@pytest.mark.parametrize(
    ("name", "example"),
    [
        ("vit", {"pixel_values": torch.randn(3, 16, 16), "labels": 1}),
        ("whisper", {"input_features": torch.randn(16, 64), "labels": [5, 6]}),
        ("bert", {"input_ids": [4, 5, 6], "token_type_ids": [0, 1, 1], "attention_mask": [1, 1, 1]}),
        ("mamba", {"input_ids": [4, 5, 6]}),
    ],
)
def test_calibration_of_other_kinds_of_models_runs(name, example):
    model = build(name)
    windows = calibration_windows([example, example, example], model)
    assert sum(next(iter(batch.values())).shape[0] for batch in windows.batches) == 3
    with undisturbed(model):
        assert torch.isfinite(forward_outputs(model, windows.batches[0]).scores).all()


def test_a_plain_module_takes_dicts_whose_keys_match_forward():
    model = _Plain()
    windows = calibration_windows([{"x": torch.randn(5, 4), "scale": torch.tensor(2.0), "y": torch.ones(5)}], model)
    assert set(windows.batches[0]) == {"x", "scale"}
    with undisturbed(model):
        assert forward_outputs(model, windows.batches[0]).scores.shape == (5, 6)
    with pytest.raises(InputError, match="no usable 'x'"):
        calibration_windows([{"inputs": torch.randn(5, 4)}], model)


# -- outputs and moments ------------------------------------------------------------------------


def test_a_forward_that_fails_says_so():
    model = build("llama")
    with undisturbed(model), pytest.raises(InputError, match="forward failed on inputs input_ids"):
        forward_outputs(model, {"input_ids": torch.full((1, 4), VOCAB + 5)})


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.distributed.DistBackendError])
def test_what_says_nothing_about_the_model_passes_through(error):
    model = build("llama")

    def hook(*_: object) -> None:
        raise error("on purpose")

    model.model.layers[1].register_forward_pre_hook(hook)
    with undisturbed(model), pytest.raises(error, match="on purpose"):
        forward_outputs(model, {"input_ids": torch.full((1, 4), 5)})


def test_outputs_that_cannot_be_compared_are_refused():
    class Strings(nn.Module):
        def forward(self, x: torch.Tensor) -> str:
            return "done"

    with pytest.raises(InputError, match="neither logits nor a last hidden state"):
        forward_outputs(Strings(), {"x": torch.zeros(1)})


def test_inputs_take_the_dtype_of_the_model():
    model = build("vit").to(torch.bfloat16)
    windows = random_windows(model)
    with undisturbed(model):
        assert forward_outputs(model, windows.batches[0]).scores.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_tap_moments_are_mean_squares_over_real_tokens(name):
    model = build(name)
    data = [{"input_ids": [4, 5, 6, 0], "attention_mask": [1, 1, 1, 0], "labels": [4, 5, -100, -100]}]
    windows = calibration_windows(data, model)
    tap = taps(model)[-1]
    outputs = []
    handle = tap.module.register_forward_hook(lambda _m, _a, out: outputs.append(out.double()))
    with undisturbed(model), tap_moments(model) as moments:
        moments.batch = windows.batches[0]
        forward_outputs(model, windows.batches[0])
    handle.remove()
    real = 2 if name == "t5" else 3
    assert moments.moments()[tap.name] == pytest.approx(float(outputs[0][:, :real].square().mean()), rel=1e-6)
    assert not any(tap.module._forward_hooks for tap in taps(model))


def test_a_tap_that_is_not_finite_reads_nan():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.inf
    windows = random_windows(model)
    with undisturbed(model), tap_moments(model) as moments:
        moments.batch = windows.batches[0]
        forward_outputs(model, windows.batches[0])
    assert np.isnan(moments.moments()["model.layers.0.mlp.down_proj"])
