"""Folders of kronfluence and bergson, as those programs lay them out. Real ones of kronfluence: tests/kronfluence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from trained_models import VOCAB_SIZE, untrained

from weightproof import InputError
from weightproof.cli import main
from weightproof.curvature import Factors, fit_factors
from weightproof.curvature.importers import import_bergson, import_factors, import_kronfluence
from weightproof.weights import iter_weight_matrices

INCLUDE = {"llama": "*layers.1.mlp.*", "gpt2": "*.h.1.mlp.c_fc*", "bert": "*layer.1.intermediate*"}
KRONFLUENCE = (
    "activation_covariance", "gradient_covariance",
    "num_activation_covariance_processed", "num_gradient_covariance_processed",
)  # fmt: skip


def fitted(model: nn.Module) -> Factors:
    ids = torch.randint(3, VOCAB_SIZE, (4, 16), generator=torch.Generator().manual_seed(0))
    batches, include = [{"input_ids": ids, "labels": ids}], INCLUDE[model.config.model_type]
    return fit_factors(model, batches, include, "empirical", require_full_rank=False, progress=False)


def with_ones(factor, tokens: int) -> torch.Tensor:
    """The sum over inputs with a one behind each."""
    size = len(factor.activation_sum)
    found = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    found[:size, :size] = factor.activation_sum
    found[size, :size] = found[:size, size] = torch.arange(size)
    found[size, size] = tokens
    return found


def kronfluence(folder: Path, model: nn.Module, factors: Factors, *, empirical: bool = True) -> Path:
    """Sums and counts by module in four files; a homogeneous coordinate where the layer has a bias."""
    parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in KRONFLUENCE}
    for name, factor in factors.by_name.items():
        module = name.removesuffix(".weight")
        has_bias = getattr(model.get_submodule(module), "bias", None) is not None
        activation = with_ones(factor, factor.tokens) if has_bias else factor.activation_sum.clone()
        count = torch.tensor([factor.tokens])
        for part, value in zip(KRONFLUENCE, (activation, factor.gradient_sum.clone(), count, count), strict=True):
            parts[part][module] = value.clone()
    folder.mkdir(parents=True, exist_ok=True)
    for part, tensors in parts.items():
        save_file(tensors, folder / f"{part}.safetensors")
    (folder / "factor_arguments.json").write_text(json.dumps({"strategy": "ekfac", "use_empirical_fisher": empirical}))
    return folder


def bergson(folder: Path, model: nn.Module, factors: Factors, shards: int = 1, reduction: str = "sum") -> Path:
    """Rows of the sums, one file a process; modules named from the body of the model."""
    for kind in ("activation", "gradient"):
        place = folder / f"{kind}_sharded"
        place.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
        for name, factor in factors.by_name.items():
            short = name.removesuffix(".weight").removeprefix(f"{model.base_model_prefix}.")
            whole = getattr(factor, f"{kind}_sum")
            base, rest = divmod(len(whole), shards)
            parts = whole.split([base + rest] + [base] * (shards - 1))
            for shard, part in zip(rows, parts, strict=True):
                shard[short] = part.clone()
        for rank, shard in enumerate(rows):
            save_file(shard, place / f"shard_{rank}.safetensors")
    tokens = next(iter(factors.by_name.values())).tokens
    torch.save(torch.tensor(tokens), folder / "total_processed.pt")
    (folder / "hessian_config.yaml").write_text("method: kfac\nuse_dataset_labels: true\n")
    (folder / "config.yaml").write_text(f"steps:\n- hessian:\n    index_cfg:\n      loss_reduction: {reduction}\n")
    return folder


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_folder_of_kronfluence_gives_the_factors_without_homogeneous_coordinates(tmp_path, name):
    model = untrained(name)
    expected = fitted(model)
    found = import_kronfluence(kronfluence(tmp_path / "factors_mine", model, expected), model)
    assert list(found) == sorted(expected)
    for matrix, factor in expected.by_name.items():
        assert torch.equal(found[matrix].activation_sum, factor.activation_sum)
        assert torch.equal(found[matrix].gradient_sum, factor.gradient_sum)
        assert found[matrix].tokens == factor.tokens
        assert found[matrix].weight_digest == factor.weight_digest
    assert (found.source.labels, found.source.origin) == ("empirical", "kronfluence")
    found.require_weights(model)
    again = Factors.load(found.save(tmp_path / "mine.safetensors"))
    assert again.digest == found.digest
    assert again.source == found.source


@pytest.mark.parametrize(("name", "shards"), [("llama", 1), ("llama", 3), ("gpt2", 2)])
def test_shards_of_bergson_are_joined_by_rows(tmp_path, name, shards):
    model = untrained(name)
    expected = fitted(model)
    found = import_bergson(bergson(tmp_path, model, expected, shards), model)
    assert list(found) == sorted(expected)
    for matrix, factor in expected.by_name.items():
        assert torch.equal(found[matrix].activation_sum, factor.activation_sum)
        assert torch.equal(found[matrix].gradient_sum, factor.gradient_sum)
        assert found[matrix].tokens == factor.tokens
    assert (found.source.labels, found.source.loss) == ("empirical", "causal, reduced by sum")
    if name == "llama":
        gate, up = (found[f"model.layers.1.mlp.{one}_proj.weight"].activation_sum for one in ("gate", "up"))
        assert gate is up


def test_what_the_loss_was_is_told(tmp_path, caplog):
    model = untrained("llama")
    factors = fitted(model)
    import_bergson(bergson(tmp_path / "mean", model, factors, reduction="mean"), model)
    assert "not in nats per token" in caplog.text
    folder = kronfluence(tmp_path / "k", model, factors, empirical=False)
    assert import_kronfluence(folder, model).source.labels == "sampled"
    (folder / "factor_arguments.json").unlink()
    assert import_kronfluence(folder, model).source.labels == "unknown"


def test_counts_that_differ_are_brought_to_one(tmp_path):
    """Under checkpointing kronfluence counts inputs twice: means stay what they are."""
    model = untrained("llama")
    expected = fitted(model)
    folder = kronfluence(tmp_path, model, expected)
    for part, factor in (("activation_covariance", 2), ("num_activation_covariance_processed", 2)):
        file = folder / f"{part}.safetensors"
        save_file({name: factor * tensor for name, tensor in load_file(file).items()}, file)
    for name, one in import_kronfluence(folder, model).by_name.items():
        assert torch.allclose(one.activation_covariance, expected[name].activation_covariance, rtol=1e-14)
        assert torch.allclose(one.gradient_covariance, expected[name].gradient_covariance, rtol=1e-14)


def test_imported_by_command_and_shown(tmp_path, capsys):
    model = untrained("llama")
    model.save_pretrained(tmp_path / "model")
    folder = kronfluence(tmp_path / "factors_mine", model, fitted(model))
    out = tmp_path / "factors.safetensors"
    command = ("factors", "import", folder, "--from", "kronfluence", "--model", tmp_path / "model", "-o", out)
    assert run(*command) == 0
    assert "kronfluence" in capsys.readouterr().out
    assert run("factors", "show", out, "--model", tmp_path / "model") == 0
    assert "they belong to these weights" in capsys.readouterr().out
    assert run(*command[:4], "goodfire", *command[5:]) == 3
    assert "known are kronfluence, bergson" in capsys.readouterr().err


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(one) for one in arguments])
    return int(left.value.code or 0)


def change(file: Path, how) -> None:
    tensors = load_file(file)
    how(tensors)
    save_file(tensors, file)


def first(tensors: dict[str, torch.Tensor]) -> str:
    return next(iter(sorted(tensors)))


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "gradient_covariance.safetensors").unlink(), "has no file gradient_covariance.safetensors"),
        (lambda f: (f / "num_gradient_covariance_processed.safetensors").unlink(), "has no file num_gradient_cov"),
        (lambda f: (f / "gradient_covariance.safetensors").write_bytes(b"torn"), "torn or no safetensors file"),
        (lambda f: (f / "factor_arguments.json").write_text("{"), "is no JSON"),
        (
            lambda f: (f / "activation_covariance.safetensors").rename(
                f / "activation_covariance_data_partition0_module_partition0.safetensors"
            ),
            "aggregate_covariance_matrices first",
        ),
        (
            lambda f: change(f / "activation_covariance.safetensors", lambda t: t.update({UP: torch.eye(7)})),
            r"sum over inputs of model.layers.1.mlp.up_proj.weight .* has shape \[7, 7\], the weights need \[64, 64\]",
        ),
        (
            lambda f: change(f / "activation_covariance.safetensors", lambda t: t[UP].fill_(float("nan"))),
            "holds NaN or inf",
        ),
        (lambda f: change(f / "gradient_covariance.safetensors", lambda t: t[UP].triu_()), "not symmetric"),
        (lambda f: change(f / "gradient_covariance.safetensors", lambda t: t.pop(UP)), f"has nothing of {UP}"),
        (
            lambda f: change(f / "num_activation_covariance_processed.safetensors", lambda t: t.pop(UP)),
            f"num_activation_covariance_processed.safetensors has nothing of {UP}",
        ),
        (
            lambda f: change(f / "num_gradient_covariance_processed.safetensors", lambda t: t[UP].zero_()),
            "fitted on 0 gradients",
        ),
        (
            lambda f: change(
                f / "num_activation_covariance_processed.safetensors", lambda t: t.update({UP: torch.ones(2)})
            ),
            "holds 2 numbers",
        ),
        (
            lambda f: [change(file, lambda t: t.update(other=t.pop(UP))) for file in f.glob("*.safetensors")],
            "has factors of other, and this model has no such matrix",
        ),
    ],
)  # fmt: skip
def test_a_damaged_folder_of_kronfluence_is_one_sentence(tmp_path, damage, message):
    model = untrained("llama")
    folder = kronfluence(tmp_path / "factors_mine", model, fitted(model))
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        import_kronfluence(folder, model)
    assert "\n" not in str(caught.value)


def test_other_places_are_told_apart(tmp_path):
    model = untrained("llama")
    factors = fitted(model)
    kronfluence(tmp_path / "analysis" / "factors_mine", model, factors)
    with pytest.raises(InputError, match="the folder factors_mine in it has one"):
        import_kronfluence(tmp_path / "analysis", model)
    bergson(tmp_path / "run" / "kfac", model, factors)
    with pytest.raises(InputError, match="the folder kfac in it has one"):
        import_bergson(tmp_path / "run", model)
    with pytest.raises(InputError, match="there is no folder"):
        import_kronfluence(tmp_path / "none", model)
    pickled = tmp_path / "kfac_factors_blk_23.pt"
    torch.save({"blk23.gate": {"A": torch.eye(2), "G": torch.eye(2), "n_tokens": 3}}, pickled)
    for kind in ("kronfluence", "bergson"):
        with pytest.raises(InputError, match=r"kfac_factors_blk_23\.pt is a pickle, which could run code"):
            import_factors(pickled, kind, model)
    with pytest.raises(InputError, match="no such matrix"):
        import_kronfluence(tmp_path / "analysis" / "factors_mine", untrained("gpt2"))
    small = next(one for one in iter_weight_matrices(model) if one.name == f"{UP}.weight")
    assert (small.d_out, small.d_in) == (192, 64)


class Trap:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "total_processed.pt").unlink(), "not known how many tokens were summed"),
        (lambda f: (f / "total_processed.pt").write_bytes(b"torn"), "is torn"),
        (
            lambda f: torch.save([torch.ones(1), torch.ones(1)], f / "total_processed.pt"),
            "one whole number",
        ),
        (lambda f: torch.save(Trap(), f / "total_processed.pt"), "one whole number"),
        (lambda f: (f / "gradient_sharded" / "shard_0.safetensors").unlink(), "shard_0.safetensors is not among them"),
        (
            lambda f: change(f / "gradient_sharded" / "shard_1.safetensors", lambda t: t.pop(first(t))),
            "of different modules",
        ),
        (lambda f: (f / "hessian_config.yaml").write_text("method: tkfac\n"), "holds tkfac factors of bergson"),
        (lambda f: (f / "hessian_config.yaml").write_text("a: !!python/object:x.y {}"), "hessian_config.yaml"),
    ],
)
def test_a_damaged_folder_of_bergson_is_one_sentence(tmp_path, capsys, damage, message):
    model = untrained("llama")
    folder = bergson(tmp_path, model, fitted(model), shards=2)
    damage(folder)
    with pytest.raises(InputError, match=message):
        import_bergson(folder, model)
    assert "this ran" not in capsys.readouterr().out
