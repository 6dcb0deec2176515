"""The same factors as kronfluence 1.0.1 fits, and the import of folders that it really wrote."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from weightproof import InputError, edits, fit_factors
from weightproof.curvature import Factors
from weightproof.curvature.importers import import_kronfluence
from weightproof.curvature.objectives import sample
from weightproof.numerics.matrices import seeded_generator
from weightproof.weights import iter_weight_matrices

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # old interfaces of torch are its own matter
    pytest.importorskip("kronfluence")
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

VOCABULARY, LENGTH, BATCHES, SIZE = 61, 12, 4, 3
NAMES = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "self_attn.o_proj")]
NAMES += [f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up", "down")]
LIMIT = 1e-6


class Language(Task):
    """The summed causal loss; labels drawn as ours are, from the seed and the number of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = 0

    def compute_train_loss(self, batch, model, sample_labels=False, **given):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        rows = logits[mask[:, 1:].bool()]
        labels = ids[:, 1:][mask[:, 1:].bool()]
        if given.get("sample", sample_labels):
            labels = sample(rows.detach(), seeded_generator("curvature labels", 0, self.batch))
        self.batch += 1
        return cross_entropy(rows, labels, reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return NAMES

    def get_attention_mask(self, batch):
        """Tokens that predict something: kronfluence would count the last one of each text too."""
        mask = batch["attention_mask"].clone()
        mask[torch.arange(len(mask)), mask.sum(dim=1) - 1] = 0
        return mask


def tiny(*, bias: bool, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=LENGTH, attention_bias=bias, mlp_bias=bias,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.to(dtype)


def texts() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (BATCHES * SIZE, LENGTH), generator=generator)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (BATCHES * SIZE,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return [{"input_ids": row, "attention_mask": real} for row, real in zip(ids, mask, strict=True)]


def theirs(folder: Path, model: nn.Module, *, empirical: bool, dtype: torch.dtype, partitions: int = 1) -> Path:
    task = Language()
    prepared = prepare_model(copy.deepcopy(model), task)
    analyzer = Analyzer("tiny", prepared, task, cpu=True, disable_tqdm=True, output_dir=str(folder))
    arguments = FactorArguments(
        strategy="ekfac", use_empirical_fisher=empirical, activation_covariance_dtype=dtype,
        gradient_covariance_dtype=dtype, covariance_data_partitions=partitions,
    )  # fmt: skip
    analyzer.fit_covariance_matrices("mine", texts(), per_device_batch_size=SIZE, factor_args=arguments)
    return folder / "tiny" / "factors_mine"


def ours(model: nn.Module, *, empirical: bool) -> Factors:
    rows = texts()
    batches = [
        {name: torch.stack([row[name] for row in rows[start : start + SIZE]]) for name in rows[0]}
        for start in range(0, len(rows), SIZE)
    ]
    labels = "empirical" if empirical else "sampled"
    include = [f"{name}.weight" for name in NAMES]
    return fit_factors(model, batches, include, labels, seed=0, require_full_rank=False, progress=False)


def worst(mine: Factors, other: Factors) -> float:
    """The largest ||ours - theirs||_F / ||ours||_F over both factors of every matrix."""
    assert set(mine) == set(other) == {f"{name}.weight" for name in NAMES}
    found = 0.0
    for name, one in mine.by_name.items():
        assert one.tokens == other[name].tokens
        for what in ("activation_sum", "gradient_sum"):
            expected, given = (getattr(factor, what).double() for factor in (one, other[name]))
            found = max(found, float((given - expected).norm() / expected.norm()))
    return found


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "biases"])
@pytest.mark.parametrize("empirical", [True, False], ids=["labels of the data", "sampled labels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_factors_are_those_of_kronfluence(tmp_path, record_property, bias, empirical, dtype):
    model = tiny(bias=bias, dtype=dtype)
    folder = theirs(tmp_path, model, empirical=empirical, dtype=dtype)
    imported = import_kronfluence(folder, model)
    assert imported.source.labels == ("empirical" if empirical else "sampled")
    difference = worst(ours(model, empirical=empirical), imported)
    record_property("largest relative difference", f"{difference:.1e}")
    assert difference <= (LIMIT if dtype == torch.float32 else 1e-12)


def test_parts_of_the_data_that_it_joined_are_the_whole(tmp_path):
    model = tiny(bias=True, dtype=torch.float64)
    folder = theirs(tmp_path, model, empirical=True, dtype=torch.float64, partitions=2)
    assert len(list(folder.glob("activation_covariance_data_partition*"))) == 2
    assert worst(ours(model, empirical=True), import_kronfluence(folder, model)) <= 1e-12
    for file in folder.glob("*_covariance.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match="aggregate_covariance_matrices first"):
        import_kronfluence(folder, model)


def test_an_edit_by_imported_factors_is_the_edit_by_ours(tmp_path):
    model = tiny(bias=True, dtype=torch.float64)
    imported = import_kronfluence(theirs(tmp_path, model, empirical=True, dtype=torch.float64), model)
    imported.require_weights(model)
    mine = ours(model, empirical=True)
    gate = next(one for one in iter_weight_matrices(model) if one.name == "model.layers.1.mlp.gate_proj.weight")
    plans = [edits.KFAC(factors, energy=0.8).plan(gate) for factors in (mine, imported)]
    assert float((plans[0] - gate.load()).norm()) > 0
    assert torch.allclose(*plans, atol=1e-9)


def test_a_folder_of_another_model_is_refused(tmp_path):
    model = tiny(bias=False, dtype=torch.float32)
    folder = theirs(tmp_path, model, empirical=True, dtype=torch.float32)
    other = tiny(bias=False, dtype=torch.float32)
    other.model.layers[1].mlp.up_proj = nn.Linear(24, 41, bias=False)
    with pytest.raises(InputError, match=r"gradients of model\.layers\.1\.mlp\.up_proj\.weight .* weights need \[41"):
        import_kronfluence(folder, other)
