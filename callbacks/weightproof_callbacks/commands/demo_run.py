"""The demo's steps in order; what it prints lies in `demo_report`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import wandb
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from weightproof import GuardCallback, GuardSession
from weightproof.edits import RTN
from weightproof.marchenko_pastur import fit_bulk
from weightproof.probes import digest_of, read_tensors
from weightproof.reporting.plots import Candidate, decision_png
from weightproof.snapshot import write_matrix
from weightproof.transactions.steps import Cost, Step
from weightproof.types import BulkFit
from weightproof.weights import iter_checkpoint_matrices, iter_weight_matrices
from weightproof_callbacks.commands import corpus, demo_report, small_model

BASE = "base"
RETAIN = "retain.txt"


@dataclass
class Version:
    """One version of the model: the base, or the base after an edit.

    `step` is None for the base; `folder` holds its weights, where `bits_per_byte` is not None.
    """

    label: str
    folder: Path
    bits_per_byte: float | None = None
    expect: str = ""
    step: Step | None = None


@dataclass
class DemoResult:
    """Everything the report is made of."""

    output: Path
    versions: list[Version] = field(default_factory=list)
    windows: tuple[Step, ...] = ()
    digests: tuple[str, str] = ("", "")
    timings: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Text:
    """Tokenizer and windows: to train on, for the guard to look at, and for the ground truth; the text held out."""

    tokenizer: PreTrainedTokenizerFast
    train: corpus.Windows
    retain: corpus.Windows
    truth: corpus.Windows
    heldout: str


def run(recipe: Mapping[str, Any], output: Path, *, seed: int) -> list[str]:
    """Run the whole procedure; returns what was not as expected, empty when all was.

    Args:
        recipe: As `load_recipe("demo")` gives it.
        output: An empty folder.
        seed: Seed of initialisation and data order.
    """
    console = Console(highlight=False, emoji=False, width=None if Console().is_terminal else demo_report.WIDTH)
    result = DemoResult(output)
    started = time.perf_counter()
    live = wandb.init(
        project="weightproof-demo",
        name="demo",
        dir=output,
        mode="offline",
        settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
    )
    try:
        text = prepare_text(recipe, console)
        (output / RETAIN).write_text(text.heldout, encoding="utf-8")
        torch.set_num_threads(small_model.fastest_thread_count())
        model, training_cost = train_under_guard(recipe, text, result, seed)
        _check_training(recipe, result)
        session = GuardSession(
            model,
            policy=recipe["guard"]["policy"],
            retain=[row.unsqueeze(0) for row in text.retain.ids],
            trackers=["jsonl", "wandb"],
            output_dir=output,
        )
        apply_edits(recipe, session, text, result)
        draw(result)
        demo_report.show(console, result, costs=(training_cost, session.cost))
        session.close()
    finally:
        live.finish()
    result.timings["all"] = time.perf_counter() - started
    demo_report.show_paths(console, result, live_dir=Path(live.dir).parent)
    return result.failures


def prepare_text(recipe: Mapping[str, Any], console: Console) -> Text:
    """Read the corpus, train the tokenizer, cut the windows; the held-out windows are split in two."""
    with console.status("reading the standard library, training a byte-level BPE"):
        part, window = recipe["corpus"], recipe["training"]["window"]
        texts = corpus.read_corpus(
            corpus.standard_library(), part["exclude"], part["max_bytes"], part["heldout_fraction"]
        )
        tokenizer = corpus.train_tokenizer(list(texts.train.values()), recipe["tokenizer"]["vocab_size"], window)
        train = corpus.cut_windows(list(texts.train.values()), tokenizer, window)
        heldout = corpus.cut_windows(list(texts.heldout.values()), tokenizer, window)
    odd, even = (corpus.Windows(heldout.ids[i::2], heldout.num_bytes[i::2]) for i in (1, 0))
    console.print(
        f"text: {len(texts.train)} standard library files to train on ({train.ids.numel() / 1e6:.1f} M tokens), "
        f"{len(texts.heldout)} others held out; byte-level BPE of {len(tokenizer)} tokens"
    )
    retain, truth = recipe["heldout"]["retain_windows"], recipe["heldout"]["windows"]
    beginning = corpus.beginning(list(texts.heldout.values()), recipe["heldout"]["text_bytes"])
    return Text(tokenizer, train, corpus.spread(odd, retain), corpus.spread(even, truth), beginning)


def train_under_guard(
    recipe: Mapping[str, Any], text: Text, result: DemoResult, seed: int
) -> tuple[LlamaForCausalLM, Cost]:
    """Train from random initialisation with GuardCallback and save the base model; what guarding cost."""
    model = small_model.build_model(
        recipe["model"], vocab_size=len(text.tokenizer), window=recipe["training"]["window"], seed=seed
    )
    guard = GuardCallback(policy=recipe["guard"]["policy"], every=recipe["guard"]["every"])
    trainer = small_model.make_trainer(
        model,
        text.train,
        recipe["training"],
        callbacks=[guard],
        output_dir=result.output / "training",
        seed=seed,
        report_to=["wandb"],
    )
    started = time.perf_counter()
    trainer.train()
    result.timings["training"] = time.perf_counter() - started
    result.windows = guard.history
    result.versions.append(Version(BASE, result.output / BASE))
    _keep_evidence(result.versions[0], model, text)
    return model, guard.session.cost if guard.session is not None else Cost()


def apply_edits(recipe: Mapping[str, Any], session: GuardSession, text: Text, result: DemoResult) -> None:
    """Apply each edit of the recipe, save what it made of the model, and measure that version."""
    for number, entry in enumerate(recipe["edits"], start=1):
        before = digest_of(read_tensors(session.model, {}, ()))
        version = Version(
            f"INT{entry['bits']} per {entry['granularity']}", result.output / entry["folder"], None, entry["expect"]
        )
        edit = RTN(entry["bits"], granularity=entry["granularity"])
        at = recipe["training"]["steps"] + number
        if entry["expect"] == "KEEP":
            version.step = session.apply(edit, step=at)
            if version.step.applied == "kept":
                _keep_evidence(version, session.model, text)
        else:  # the rejected weights are gone after the block: save and measure them inside
            with session.edit(entry["name"], edit.kind, step=at) as version.step:
                for matrix in iter_weight_matrices(session.model):
                    planned = edit.plan(matrix) if matrix.refusal is None and edit.selects(matrix) else None
                    if planned is not None:
                        write_matrix(matrix, planned)
                _keep_evidence(version, session.model, text)
        after = digest_of(read_tensors(session.model, {}, ()))
        result.versions.append(version)
        result.failures += _unexpected(version, before, after)
        if version.step.applied == "restored":
            result.digests = (before, after)


def draw(result: DemoResult) -> None:
    """Draw the matrix that the last edit damaged most, in every version, beside the decisions."""
    edited = [version for version in result.versions if version.step is not None]
    matrix = demo_report.worst_matrix(edited[-1].step)
    readings = {version.label: demo_report.divergence_of(version.step) for version in result.versions}
    limits = [reading.limit for reading in readings.values() if reading is not None and reading.limit is not None]
    candidates = [
        Candidate(
            label=version.label,
            fit=None if version.bits_per_byte is None else _fit_from(version.folder, matrix),
            divergence=None if (reading := readings[version.label]) is None else reading.value,
            bits_per_byte=version.bits_per_byte,
            action=demo_report.action_of(version.step),
        )
        for version in result.versions
    ]
    (result.output / "spectra.png").write_bytes(decision_png(matrix, candidates, max(limits)))


def _check_training(recipe: Mapping[str, Any], result: DemoResult) -> None:
    limit, reached = recipe["heldout"]["max_bits_per_byte"], result.versions[0].bits_per_byte
    if reached is None or not reached <= limit:
        result.failures.append(f"the trained model needs {reached} bits per byte, more than {limit:g}")
    for step in result.windows:
        if demo_report.action_of(step) != "KEEP":
            result.failures.append(f"training step {step.step} was judged {demo_report.action_of(step)}")


def _unexpected(version: Version, before: str, after: str) -> Sequence[str]:
    """What differs from what the recipe expects of a version."""
    found = []
    action = demo_report.action_of(version.step)
    if action != version.expect:
        found.append(f"{version.label} was judged {action}, expected {version.expect}")
    if (before == after) is (action == "KEEP"):
        found.append(f"after {version.label} ({action}) the digest is {'un' if before == after else ''}changed")
    return found


def _keep_evidence(version: Version, model: torch.nn.Module, text: Text) -> None:
    """Save the model as it is now and measure it: the ground truth of this version."""
    transformers_logging.disable_progress_bar()
    model.save_pretrained(version.folder)  # pyright: ignore[reportCallIssue] - a session holds any Module
    text.tokenizer.save_pretrained(version.folder)
    version.bits_per_byte = small_model.bits_per_byte(model, text.truth)


def _fit_from(folder: Path, name: str) -> BulkFit | None:
    for matrix in iter_checkpoint_matrices(folder):
        if matrix.name == name:
            return fit_bulk(matrix.load(), name=name)
    return None
