from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trained_models
import transformers
import weight_edits
from torch import nn

from weightproof import GuardSession, edits
from weightproof.collective import Processes
from weightproof.errors import InputError
from weightproof.forward.windows import max_length
from weightproof.guards.loss import LossLimits
from weightproof.loss_data.items import IGNORED, Form, loss_items
from weightproof.loss_data.scores import negative_log_likelihood
from weightproof.loss_data.windows import MAX_GROUPS, LossWindows
from weightproof.losses import LossData, LossProbe
from weightproof.types import LossReading, Outcome

SMALL = LossLimits(min_windows=20, min_tokens=256, max_windows=256, length=32)
TINY = replace(SMALL, min_windows=2, min_tokens=2)


@functools.cache
def loaded(name: str) -> trained_models.Trained:
    return trained_models.load(name)


def trained(name: str) -> trained_models.Trained:
    """A fresh copy: tests change weights."""
    found = loaded(name)
    return found._replace(model=copy.deepcopy(found.model))


def probe_of(model: nn.Module, retain: Any = None, target: Any = None, limits: LossLimits = SMALL, **options: Any):
    probe = LossProbe(model, retain, target, limits, Processes.alone(), **options)
    probe.capture()
    return probe


def windows_of(model: nn.Module, data: Any, limits: LossLimits = TINY, **options: Any) -> LossWindows:
    return LossProbe(model, data, None, limits, Processes.alone(), **options).windows[0]


def outcome(reading: LossReading, limits: LossLimits = SMALL) -> Outcome:
    return limits.outcome(reading)


def contents(windows: LossWindows) -> list[tuple[list[int], list[int] | None]]:
    items = [item for chunk in windows.chunks() for item in chunk.items]
    return [(i.inputs["input_ids"].tolist(), None if i.labels is None else i.labels.tolist()) for i in items]


def random_ids(count: int, length: int, seed: int = 0, vocab: int = 32) -> torch.Tensor:
    return torch.randint(vocab, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def round_to_bits(model: nn.Module, bits: int) -> None:
    steps = max(1, 2 ** (bits - 1) - 1)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "position" not in name and "wpe" not in name:
            scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / steps
            weight.copy_((weight / scale).round() * scale)


@torch.no_grad()
def scale_final_norm(model: nn.Module, factor: float) -> None:
    norms = [module for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    assert norms
    norms[-1].weight.mul_(factor)


# ---- trained models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", trained_models.NAMES)
def test_of_trained_models_int8_is_accepted_and_what_breaks_them_is_rejected(name):
    model, heldout, loss = trained(name)
    probe = probe_of(model, heldout)
    (same,) = probe.measure()
    assert (same.difference, same.lower, same.upper, outcome(same)) == (0.0, 0.0, 0.0, "PASS")

    def after(change: Any, *arguments: Any) -> LossReading:
        kept = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            change(model, *arguments)
        try:
            return probe.measure()[0]
        finally:
            model.load_state_dict(kept)

    int8, int2 = after(weight_edits.int8_per_channel), after(round_to_bits, 2)
    assert outcome(int8) is Outcome.PASS
    assert outcome(int2) is Outcome.FAIL
    assert outcome(after(scale_final_norm, 3.0)) is Outcome.FAIL
    assert outcome(after(weight_edits.one_nan)) is Outcome.FAIL
    assert int2.num_used < int2.num_groups / 4  # a clear case is decided by a part of the windows
    for reading in (same, int8, int2):
        assert reading.method == "confidence-sequence"
        assert reading.difference == pytest.approx(reading.after - reading.before)
        assert reading.sums["weight"] == reading.tokens_used < reading.num_tokens
    assert probe.measure() == (same,)
    assert same.before == pytest.approx(loss(model), rel=0.1)


def test_losses_of_one_model_serve_the_probes_of_its_copies():
    model, heldout, _ = trained("llama")
    first, second = probe_of(model, heldout), LossProbe(copy.deepcopy(model), heldout, None, SMALL, Processes.alone())
    second.adopt(first)
    assert second.measure() == first.measure()
    other = LossProbe(model, heldout[:-1], None, SMALL, Processes.alone())
    for known, ours in ((first, other), (other, second)):
        with pytest.raises(InputError, match="other windows, or were never read"):
            ours.adopt(known)


@pytest.mark.parametrize("name", trained_models.NAMES)
def test_mean_over_all_windows_is_the_loss_of_the_model(name):
    model, heldout, _ = trained(name)
    limits = replace(SMALL, max_windows=512, alpha=0.001)
    everything = replace(limits, min_windows=windows_of(model, heldout, limits).num_windows)
    probe = probe_of(model, heldout, limits=everything)
    with torch.no_grad():
        weight_edits.relative_noise(model, 0.002)
    (reading,) = probe.measure()
    assert (reading.num_used, reading.method) == (reading.num_windows, "bca")
    losses = []
    with torch.no_grad():
        for window in heldout:
            logits, labels = model(**window).logits.double(), window["labels"]
            if name in {"gpt2", "llama"}:
                logits, labels = logits[:, :-1], labels[:, 1:]
            flat = labels.reshape(-1)
            losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), flat, reduction="none")[flat != IGNORED])
    assert reading.after == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert reading.num_tokens == len(torch.cat(losses))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_merge_with_the_wrong_sign_is_rejected_by_the_target_set():
    import peft

    model = trained("llama").model
    generator = torch.Generator().manual_seed(5)
    successor = torch.randperm(32, generator=generator)  # the new task: every symbol has one successor

    def texts(count: int, seed: int) -> torch.Tensor:
        columns = [torch.randint(32, (count,), generator=torch.Generator().manual_seed(seed))]
        for _ in range(31):
            columns.append(successor[columns[-1]])
        noise = random_ids(count, 32, seed + 1)
        return torch.where(torch.rand(count, 32, generator=generator) < 0.1, noise, torch.stack(columns, dim=1))

    torch.manual_seed(0)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for step in range(25):
        ids = texts(16, 100 + step)
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    probe = probe_of(model, None, texts(64, 9000))

    def merged(sign: float) -> LossReading:
        with torch.no_grad():
            for name, delta in deltas.items():
                model.get_submodule(name).weight.add_(sign * delta)
            (reading,) = probe.measure()
            for name, delta in deltas.items():
                model.get_submodule(name).weight.sub_(sign * delta)
        return reading

    right, wrong = merged(1.0), merged(-1.0)
    assert right.role == wrong.role == "target"
    assert outcome(right) is Outcome.PASS, right
    assert outcome(wrong) is Outcome.FAIL, wrong
    (unmerged,) = probe.measure()
    assert outcome(unmerged) is not Outcome.PASS  # nothing gained


# ---- windows --------------------------------------------------------------------------------------------------------


def collated(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


def test_every_container_gives_the_same_windows(tmp_path: Path):
    import datasets

    model = trained("gpt2").model
    ids = random_ids(40, 32)
    rows = [{"input_ids": row.tolist()} for row in ids]
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("\n".join(map(json.dumps, rows)))
    given = {
        "dicts": rows,
        "batch": {"input_ids": ids},
        "tensor": ids,
        "array": ids.numpy(),
        "lists": ids.tolist(),
        "dataset": datasets.Dataset.from_list(rows),
        "loader": torch.utils.data.DataLoader(rows, batch_size=7, collate_fn=collated),
        "generator": (row for row in rows),
        "file": jsonl,
        "path as text": str(jsonl),
        "stream": ids.flatten(),
        "list of ids": ids.flatten().tolist(),
        "other order": list(reversed(rows)),
        "with labels": [{**row, "labels": row["input_ids"]} for row in rows],
        "with mask": [{**row, "attention_mask": [1] * 32} for row in rows],
        "twice": rows + rows,
        "padded left": [
            {"input_ids": [0] * 3 + r["input_ids"], "attention_mask": [0] * 3 + [1] * 32} for r in rows
        ],
        "padded right": [
            {"input_ids": r["input_ids"] + [0], "attention_mask": [1] * 32 + [0], "labels": [*r["input_ids"], -100]}
            for r in rows
        ],
    }  # fmt: skip
    found = {name: windows_of(model, data) for name, data in given.items()}
    digests = {name: windows.digest for name, windows in found.items()}
    assert len(set(digests.values())) == 1, digests
    assert {windows.num_windows for windows in found.values()} == {40}
    assert found["twice"].num_duplicates == 40
    assert found["file"].num_tokens == 40 * 31


def test_the_digest_covers_inputs_labels_and_tokenizer():
    model = trained("gpt2").model
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in random_ids(10, 32)]
    other = [{**rows[0], "labels": [-100, *rows[0]["labels"][1:-1], -100]}, *rows[1:]]
    digests = [
        windows_of(model, rows).digest,
        windows_of(model, rows[1:]).digest,
        windows_of(model, other).digest,
        windows_of(model, rows, tokenizer_digest="a").digest,
        windows_of(model, rows, tokenizer_digest="b").digest,
    ]
    assert len(set(digests)) == 5


def test_windows_cut_a_text_without_overlap_and_their_order_is_fixed_by_content():
    model = trained("gpt2").model
    text = random_ids(1, 32 * 50 + 7).flatten()
    windows = windows_of(model, text)
    found = contents(windows)
    pieces = [text[start : start + 32].tolist() for start in range(0, len(text), 32)]
    assert sorted(ids for ids, _ in found) == sorted(pieces)
    assert [ids for ids, _ in found] != pieces
    assert found == contents(windows_of(model, text))
    assert not windows.has_documents
    assert windows.num_groups == windows.num_windows == 51


def test_windows_are_as_long_as_the_position_table_allows():
    model = trained("gpt2").model  # 128 positions
    windows = windows_of(model, random_ids(1, 512).flatten(), replace(TINY, length=512))
    assert [len(ids) for ids, _ in contents(windows)] == [128, 128, 128, 128]


def test_a_table_that_begins_behind_its_padding_index_has_fewer_positions():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    shared = {"vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 1, **sizes}
    kinds = {"roberta": (30, transformers.RobertaForMaskedLM), "bert": (32, transformers.BertForMaskedLM)}
    for name, (positions, kind) in kinds.items():
        model = kind(transformers.AutoConfig.for_model(name, **shared)).eval()
        assert max_length(model) == positions
        model(input_ids=torch.full((1, positions), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, positions + 1), 5))


def test_documents_are_groups_and_stay_together():
    model = trained("gpt2").model
    rows = [{"input_ids": row.tolist()} for row in random_ids(30, 80)]
    windows = windows_of(model, rows)
    assert (windows.num_windows, windows.num_groups, windows.has_documents) == (90, 30, True)
    groups = [group for chunk in windows.chunks() for group in chunk.groups]
    assert groups == sorted(groups)
    assert [len(list(same)) for _, same in itertools.groupby(groups)] == [3] * 30
    named = windows_of(model, [{**row, "document": i // 3} for i, row in enumerate(rows)])
    assert (named.num_windows, named.num_groups) == (90, 10)


def test_few_documents_of_many_windows_do_not_accept_early():
    model, heldout, _ = trained("gpt2")
    batches = [batch if isinstance(batch, torch.Tensor) else batch["input_ids"] for batch in heldout]
    ids = torch.cat([batch.reshape(-1, batch.shape[-1]) for batch in batches])[:240]
    rows = [{"input_ids": row.tolist(), "document": number // 4} for number, row in enumerate(ids)]
    (reading,) = probe_of(model, rows, limits=LossLimits(min_windows=20, min_tokens=0)).measure()
    assert (reading.num_windows, reading.num_groups) == (240, 60)
    assert outcome(reading) is Outcome.PASS
    assert reading.num_used >= 50  # of documents: harm that sits in few of them is not seen in fewer


def test_more_documents_than_groups_are_joined():
    model = trained("gpt2").model
    count = MAX_GROUPS + 100
    windows = windows_of(model, random_ids(count, 8), replace(TINY, max_windows=10_000))
    assert windows.num_windows == count
    assert windows.num_groups == -(-count // 2) <= MAX_GROUPS
    groups = [group for chunk in windows.chunks() for group in chunk.groups]
    assert np.bincount(groups).max() == 2
    assert max(groups) == windows.num_groups - 1


def test_no_more_windows_are_read_than_the_policy_says():
    model = trained("gpt2").model
    endless = ({"input_ids": row.tolist()} for seed in itertools.count() for row in random_ids(10, 32, seed))
    assert windows_of(model, endless, replace(TINY, max_windows=37)).num_windows == 37


def test_a_one_shot_iterable_can_be_shared_with_the_calibration_windows():
    model = trained("gpt2").model
    rows = random_ids(30, 32)
    probe = LossProbe(model, iter(rows), None, TINY, Processes.alone())
    assert [item["input_ids"].tolist() for item in probe.first(8)] == rows[:8].tolist()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_does_not_grow_with_the_number_of_windows():
    form = Form("causal", 4096, "retain")
    model = trained("llama").model

    def texts(count: int):
        for seed in range(count):
            yield {"input_ids": random_ids(1, 4096, seed)[0]}

    def spooled(count: int) -> LossWindows:
        items = loss_items(texts(count), model, form)
        return LossWindows(items, form, max_windows=10**9, tokenizer_digest=None)

    spooled(30).close()
    before = resident_bytes()
    windows = spooled(2500)
    assert windows.num_windows == 2500
    stored = 2500 * 4096 * 8 * 2
    grown = resident_bytes() - before
    assert sum(len(chunk.items) for chunk in windows.chunks()) == 2500
    assert max(grown, resident_bytes() - before) < stored / 8, (grown, stored)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("gpt2", [], "the retain data has no window"),
        ("gpt2", [{"input_ids": []}], "the retain data has no window"),
        ("gpt2", [{"input_ids": [3]}], "the retain data has no window"),
        ("gpt2", [{"input_ids": [1, 2], "labels": [-100, -100]}], "the retain data has no window"),
        (
            "gpt2",
            [{"input_ids": [1, 40]}],
            r"example 0 of the retain data holds the token id 40, and the model has 40 \(",
        ),
        ("gpt2", [{"input_ids": [1, 2]}, {"input_ids": [1, -1]}], "example 1 .* token id -1"),
        ("gpt2", [{"input_ids": [1, 2, 3], "labels": [1, 2]}], "2 labels beside 3 token ids"),
        ("gpt2", [{"input_ids": [1, 2], "labels": [1, 77]}], "holds the label 77"),
        ("gpt2", [{"input_ids": [0.5, 1.5]}], "floating point numbers"),
        ("gpt2", ["words"], "holds text"),
        ("gpt2", 7, "is int"),
        ("t5", [{"input_ids": [1, 2, 3]}], "no labels for the decoder"),
    ],
)
def test_data_that_cannot_be_used_is_refused_in_one_sentence(name, data, message):
    with pytest.raises(InputError, match=message) as found:
        windows_of(trained(name).model, data)
    assert "\n" not in str(found.value)


def test_files_that_cannot_be_used_are_refused(tmp_path: Path):
    model = trained("gpt2").model
    for content, message in ((b"", "is empty"), (b"\0\1", "is binary"), (b"text", "there is no tokenizer")):
        path = tmp_path / "retain.txt"
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            windows_of(model, path)
    windows = windows_of(model, path, encode=lambda text: [ord(c) % 32 for c in text])
    assert contents(windows) == [([ord(c) % 32 for c in "text"],) * 2]
    assert windows_of(model, LossData(path, encode=lambda text: [1, 2, 3])).num_tokens == 2


# ---- reasons --------------------------------------------------------------------------------------------------------


def reason_of(probe: LossProbe) -> str:
    (reading,) = probe.measure()
    assert (reading.before, reading.after, reading.difference, reading.lower, reading.upper) == (None,) * 5
    assert outcome(reading) is Outcome.NOT_MEASURED
    return str(reading.reason)


def test_too_little_data_is_not_measured_and_runs_nothing():
    model, heldout, _ = trained("gpt2")
    model.register_forward_pre_hook(lambda *_: pytest.fail("no pass is needed"))
    assert reason_of(probe_of(model, heldout, limits=LossLimits(min_windows=500))) == (
        "too little data: 256 windows of at least 500"
    )
    assert reason_of(probe_of(model, heldout, limits=LossLimits(min_tokens=100_000))) == (
        "too little data: 7936 scored tokens of at least 100000"
    )


def test_a_baseline_that_is_not_finite_is_not_measured():
    model, heldout, _ = trained("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[3] = torch.nan
    assert "NaN or infinite on" in reason_of(probe_of(model, heldout))


def test_a_model_that_did_not_run_before_is_not_measured_and_one_that_stops_running_is_rejected():
    model, heldout, _ = trained("gpt2")

    def fail(*_: Any) -> None:
        raise RuntimeError("a kernel that is not there")

    with contextlib.closing(probe_of(model, heldout)) as probe:
        handle = model.register_forward_pre_hook(fail)
        (reading,) = probe.measure()
        assert (reading.after, reading.difference) == (math.inf, math.inf)
        assert math.isfinite(reading.before)
        assert "no longer runs" in reading.method
        assert "a kernel that is not there" in reading.method
        assert outcome(reading) is Outcome.FAIL
        assert "cannot be read before the change" in reason_of(probe_of(model, heldout))
        handle.remove()
        assert outcome(probe.measure()[0]) is Outcome.PASS


def test_a_loss_that_is_not_finite_any_more_is_rejected_wherever_it_is():
    model, heldout, _ = trained("gpt2")
    probe = probe_of(model, heldout)
    with torch.no_grad():
        model.transformer.wpe.weight[30] = torch.inf
    (reading,) = probe.measure()
    assert not math.isfinite(reading.after)
    assert outcome(reading) is Outcome.FAIL


def test_losses_are_read_again_once_the_reference_moved():
    model, heldout, _ = trained("gpt2")
    probe = LossProbe(model, heldout, None, SMALL, Processes.alone())
    assert probe.is_stale
    assert reason_of(probe) == "the losses before the change were not read"
    probe.capture()
    assert not probe.is_stale
    round_to_bits(model, 3)
    assert outcome(probe.measure()[0]) is Outcome.FAIL
    probe.moved()
    assert probe.is_stale
    assert reason_of(probe) == "the losses before the change were not read"
    probe.capture()
    assert probe.measure()[0].difference == 0.0


def test_a_model_of_unknown_loss_says_so():
    model = nn.Linear(4, 2)
    (reading,) = probe_of(model, [{"input": torch.ones(3, 4)}]).measure()
    assert "Linear has no config" in str(reading.reason)
    assert probe_of(model, None).measure() == ()


# ---- passes leave no trace ------------------------------------------------------------------------------------------


def test_passes_leave_no_trace():
    model, heldout, _ = trained("gpt2")
    model.train()
    model.transformer.h[0].eval()
    flags = [module.training for module in model.modules()]
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(4), random.random(), np.random.rand()  # noqa: NPY002

    def shuffled():
        yield from torch.utils.data.DataLoader(torch.cat([w["input_ids"] for w in heldout]), shuffle=True)

    torch.manual_seed(3)
    random.seed(3)
    probe = probe_of(model, shuffled())
    probe.measure()
    assert torch.equal(torch.rand(4), expected[0])
    assert random.random() == expected[1]
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- masked, classes, own metrics -----------------------------------------------------------------------------------


def test_tokens_are_hidden_by_their_content_where_labels_are_not_given():
    model = trained("bert").model
    ids = random_ids(60, 16)
    ids[:, 0] = trained_models.START_TOKEN  # has a role: never hidden
    data = LossData(ids, mask_token_id=trained_models.MASK_TOKEN)
    probe = probe_of(model, data, limits=TINY)
    (windows,) = probe.windows
    assert windows.digest == windows_of(model, data).digest
    assert windows.digest == windows_of(model, LossData(ids.flip(0), mask_token_id=trained_models.MASK_TOKEN)).digest
    hidden = 0
    for inputs, labels in contents(windows):
        where = [i for i, label in enumerate(labels) if label != IGNORED]
        assert [i for i, token in enumerate(inputs) if token == trained_models.MASK_TOKEN] == where
        assert 0 not in where
        hidden += len(where)
    assert hidden == windows.num_tokens == 60 * round(0.15 * 15)
    (reading,) = probe.measure()
    assert (reading.metric, reading.difference) == ("nll", 0.0)
    unknown_mask = windows_of(model, ids)
    assert all(max(inputs) < trained_models.VOCAB_SIZE for inputs, _ in contents(unknown_mask))
    assert unknown_mask.num_tokens == hidden


@functools.cache
def classifier() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small trained classifier (is the first symbol below 16?), inputs and labels, a tenth of them wrong."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=39,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(60):
            ids = random_ids(32, 8, seed=step)
            model(input_ids=ids, labels=(ids[:, 0] < 16).long()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    ids = random_ids(240, 8, seed=1000)
    labels = (ids[:, 0] < 16).long()
    labels[::10] = 1 - labels[::10]
    return model.eval(), ids, labels


def test_a_classifier_is_judged_by_accuracy_and_by_its_likelihood():
    model, ids, labels = classifier()
    model = copy.deepcopy(model)
    rows = [{"input_ids": row, "label": int(label)} for row, label in zip(ids.tolist(), labels, strict=True)]
    limits = replace(SMALL, metric_drop={"default": 0.05})
    probe = probe_of(model, rows, limits=limits)
    accuracy, nll = probe.measure()
    assert (accuracy.metric, nll.metric) == ("accuracy", "nll")
    assert (accuracy.num_windows, accuracy.num_tokens) == (240, 240)
    assert 0.8 < accuracy.before < 0.95
    assert (accuracy.difference, accuracy.method) == (0.0, "newcombe")
    assert -0.05 < accuracy.lower < 0.0 < accuracy.upper < 0.05  # no example changed, and that proves little
    assert accuracy.sums["both"] + accuracy.sums["neither"] == 240
    assert [limits.outcome(reading) for reading in (accuracy, nll)] == ["PASS", "PASS"]
    assert replace(limits, metric_drop={"default": 0.0}).outcome(accuracy) is Outcome.WARN
    with torch.no_grad():
        model.classifier.weight.neg_()
    accuracy, nll = probe.measure()
    assert limits.outcome(nll) is Outcome.FAIL
    assert accuracy.after < accuracy.before
    with torch.no_grad():
        model.classifier.weight.neg_()
    probe = probe_of(model, rows, limits=replace(limits, metric_drop={"default": 1.0}, tau=1e300))  # reads everything
    with torch.no_grad():
        model.classifier.bias += torch.tensor([30.0, 0.0])
    accuracy, nll = probe.measure()
    assert accuracy.after == pytest.approx(float((labels == 0).double().mean()))
    assert accuracy.upper < -0.2
    assert limits.outcome(accuracy) is Outcome.FAIL


def test_the_users_own_metric_decides():
    model, heldout, _ = trained("gpt2")
    seen: list[tuple[int, ...]] = []

    def hits(logits: torch.Tensor, example: Any) -> float:
        seen.append(tuple(logits.shape))
        return float((logits[:-1].argmax(dim=-1) == example["labels"][1:]).double().mean())

    limits = replace(SMALL, metric_drop={"default": 0.01, "hits": 0.02})
    probe = probe_of(model, LossData(heldout, metric=hits, metric_name="hits"), limits=limits)
    (same,) = probe.measure()
    assert set(seen) == {(32, trained_models.VOCAB_SIZE)}
    assert (same.metric, same.difference, same.num_tokens) == ("hits", 0.0, 256)
    assert limits.outcome(same) is Outcome.PASS
    round_to_bits(model, 2)
    (worse,) = probe.measure()
    assert worse.difference < 0
    assert limits.outcome(worse) is Outcome.FAIL
    (error,) = probe_of(
        model, LossData(heldout, metric=lambda *_: 1.0, metric_name="error", higher_is_better=False), limits=limits
    ).measure()
    assert error.sums["higher_is_better"] == 0.0


def test_a_plain_module_is_judged_by_a_metric_alone():
    model = nn.Linear(4, 3)
    data = [{"input": torch.randn(10, 4), "labels": torch.randint(3, (10,))} for _ in range(10)]

    def right(logits: torch.Tensor, example: Any) -> float:
        assert logits.shape == (3,)
        return float(logits.argmax() == example["labels"])

    probe = probe_of(model, LossData(data, metric=right), limits=SMALL)
    (reading,) = probe.measure()
    assert (reading.num_windows, reading.method) == (100, "newcombe")
    with torch.no_grad():
        expected = sum(float((model(d["input"]).argmax(-1) == d["labels"]).double().sum()) for d in data) / 100
    assert reading.before == pytest.approx(expected)


def test_a_metric_that_fails_says_which():
    model, heldout, _ = trained("gpt2")

    def wrong(logits: torch.Tensor, example: Any) -> float:
        raise ValueError("no answer")

    assert "metric 'metric' failed on a window (ValueError: no answer)" in reason_of(
        probe_of(model, LossData(heldout, metric=wrong))
    )


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_likelihoods_are_computed_in_float32(dtype):
    logits = (10 * torch.randn(50, 4000, generator=torch.Generator().manual_seed(0))).to(dtype)
    labels = torch.arange(50)
    expected = -torch.log_softmax(logits.double(), dim=-1)[torch.arange(50), labels]
    assert torch.allclose(negative_log_likelihood(logits, labels), expected, atol=1e-5)


def test_one_masked_token_of_ten_equal_choices():
    # Fact 31: perplexity 10.
    found = negative_log_likelihood(torch.zeros(1, 10), torch.tensor([4]))
    assert math.exp(float(found)) == pytest.approx(10.0, rel=1e-6)


# ---- in a session ---------------------------------------------------------------------------------------------------


def test_a_session_keeps_int8_by_its_loss_and_rolls_back_what_breaks_the_model():
    model, heldout, _ = trained("llama")
    session = GuardSession(model, retain=iter(heldout))  # read once
    kept = session.apply(edits.RTN(bits=8))
    assert (kept.decision.situation, kept.decision.assurance) == ("loss_accepts", "loss")
    lost = session.apply(edits.RTN(bits=2))
    assert (lost.decision.situation, lost.applied) == ("loss_rejects", "restored")
    with session.edit("norm times three") as step:
        scale_final_norm(model, 3.0)
    assert step.decision.situation == "loss_rejects"
    session.close()


def test_a_session_of_a_plain_module_still_takes_a_generator():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with contextlib.closing(GuardSession(model, retain=({"input": torch.randn(2, 4)} for _ in range(9)))) as session:
        assert [(windows.name, windows.num_tokens) for windows in session.windows] == [("calibration", 16)]
