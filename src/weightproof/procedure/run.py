"""Carry a recipe out: load the model, guard every step, write models and evidence.

Steps are judged in one session, against the model that the recipe began with, so that small harms add up. A training
that is kept ends the session: the next one begins with the trained model. Every model that is kept is written, read
back from its files, and certified against the one before it; these certificates form a chain.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from weightproof import report
from weightproof.errors import InputError
from weightproof.folders.files import write_atomically
from weightproof.folders.loading import load_model
from weightproof.judgement.evidence import certificate_of
from weightproof.losses import LossData
from weightproof.probes import digest_of, read_tensors
from weightproof.procedure.chain import MODELS, Chain
from weightproof.procedure.model import ROLES, Source, find_source, require_steps_fit
from weightproof.procedure.output import RECIPE, SUMMARY, check_place, output_folder
from weightproof.procedure.plugins import require_plugin
from weightproof.procedure.result import NOT_RUN, RecipeResult, Sizes, StepResult, row_of
from weightproof.procedure.training_job import Trained, TrainingJob
from weightproof.recipe import DEMO, GROUPS, Recipe, RecipeStep
from weightproof.session import GuardSession
from weightproof.transactions.publisher import CERTIFICATE, REPORT
from weightproof.transactions.steps import Step
from weightproof.weights import iter_weight_matrices

__all__ = ["CACHE", "MODELS", "run"]

CACHE = Path(".cache/weightproof")
TRAINING = "training"


def run(  # noqa: PLR0913 - a recipe, and where and how
    recipe: Recipe,
    out: Path | str | None = None,
    *,
    model: str | None = None,
    cache: Path = CACHE,
    say: Callable[[str], None] = lambda _: None,
    progress: bool = False,
) -> RecipeResult:
    """Run a recipe from its model to its results.

    Args:
        recipe: As `load_recipe` gives it.
        out: Folder of the results; the recipe's own if None. An earlier run's is replaced when all is there.
        model: Folder or Hub id in place of the recipe's.
        cache: Where the demo model is kept.
        say: Told what is being done.
        progress: Show bars.

    Raises:
        InputError: A file is missing, or a step does not fit the model. Nothing is written then.
    """
    place = Path(recipe.out if out is None else out)
    check_place(place)
    source = find_source(recipe, model, cache, say)
    with output_folder(place) as scratch:
        runner = _Run(recipe, source, scratch, say, progress)
        try:
            runner.all()
        finally:
            runner.close()
        result = runner.result(place)
        write_atomically(scratch / RECIPE, _as_run(recipe, source, model).encode())
        write_atomically(scratch / SUMMARY, (json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n").encode())
    return result


def _as_run(recipe: Recipe, source: Source, model: str | None) -> str:
    """The recipe with its files by their whole paths, so that it can be run again from its new place."""
    wanted = recipe.model if model is None else model
    is_local = wanted != DEMO and (recipe.path(wanted).is_dir() or Path(wanted).expanduser().is_dir())
    content = {**recipe.content, "model": str(source.folder.absolute()) if is_local else wanted}
    written = {role: getattr(recipe.data, role) for role in ROLES}
    content["data"] = {
        role: DEMO if value == DEMO else str(source.texts[role].absolute())
        for role, value in written.items()
        if value is not None
    }
    if recipe.factors is not None:
        content["factors"] = str(recipe.path(recipe.factors).absolute())
    policy = str(content.get("policy", ""))
    if policy.endswith((".yaml", ".yml")):
        content["policy"] = str((recipe.folder / policy).absolute())
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


class _Run:
    """One run of one recipe."""

    def __init__(
        self, recipe: Recipe, source: Source, scratch: Path, say: Callable[[str], None], progress: bool
    ) -> None:
        self.recipe, self.source, self.scratch = recipe, source, scratch
        self.say, self.progress = say, progress
        say(f"loading {source.folder}")
        loaded = load_model(source.folder, device=recipe.device)
        self.model, self.encode, self.tokenizer = loaded.model, loaded.encode, loaded.tokenizer_digest
        require_steps_fit(recipe.steps, self.model)
        self.sizes = Sizes(self.model)
        self.base_size = self.sizes.bytes
        self.rows: list[StepResult] = []
        self.folders: dict[str, Path] = {}
        self.unwritten: list[object] = []
        self.chain = Chain(recipe, source, scratch, say, progress=progress)
        self.session: GuardSession | None = None
        self.moved = False  # whether training was kept since the session began
        self._parent: str | None = None
        self._sessions = 0

    # -- the whole ---------------------------------------------------------------------------------

    def all(self) -> None:
        """Every step in order; after one that did not end as expected the rest is not run."""
        for index, step in enumerate(self.recipe.steps):
            if self.rows and not self.rows[-1].as_expected:
                self.rows.append(StepResult(step.name, step.verb, step.expect, NOT_RUN))
                continue
            self.say(f"{step.name}: {_words(step)}")
            started = time.perf_counter()
            row = self._step(step)
            self.rows.append(replace(row, size=self.sizes.bytes, seconds=round(time.perf_counter() - started, 2)))
            if self.moved and self.rows[-1].as_expected and index + 1 < len(self.recipe.steps):
                self._end_session(is_last=False)
        self._end_session(is_last=True)

    def result(self, out: Path) -> RecipeResult:
        """What it led to, with the paths that it has once it is in place."""
        last = next((row.model for row in reversed(self.rows) if row.model is not None), None)
        return RecipeResult(
            recipe=self.recipe.name,
            out=out,
            steps=tuple(self.rows),
            base=self.source.folder,
            base_size=self.base_size,
            model=None if last is None else out / last,
            texts=self.source.texts,
            notes=(*self.source.notes, *self.chain.notes),
        )

    def close(self) -> None:
        """Free what a session holds."""
        if self.session is not None:
            self.session.close()
            self.session = None

    # -- sessions ----------------------------------------------------------------------------------

    def _open(self) -> GuardSession:
        if self.session is None:
            self.say("reading the model as it is")
            self.session = GuardSession(
                self.model,
                policy=self.recipe.policy,
                trackers=self.recipe.trackers,
                output_dir=self.scratch,
                tokenizer_digest=self.tokenizer,
                retain=self._data("retain"),
                target=self._data("target"),
                factors=self._factors(),
            )
            self._sessions += 1
            self.moved = False
            self._parent = self.chain.parent_of(self.session)
        return self.session

    def _data(self, role: str) -> LossData | None:
        text = self.source.texts.get(role)
        return None if text is None else LossData(text, self.encode)

    def _factors(self) -> Path | None:
        """Those of the model that the recipe begins with; a trained one has others."""
        written = self.recipe.factors
        return None if written is None or self._sessions else self.recipe.path(written)

    def _end_session(self, *, is_last: bool) -> None:
        session, self.session = self.session, None
        if session is None:
            return
        certificate = certificate_of(session, self._parent)
        session.close()
        suffix = "" if is_last else f"-{self._sessions}"
        for name in (CERTIFICATE, REPORT):
            (self.scratch / name).unlink(missing_ok=True)
        path = self.scratch / CERTIFICATE.replace(".", f"{suffix}.")
        certificate.save(path)
        report.save(certificate, self.scratch / REPORT.replace(".", f"{suffix}."))

    # -- steps -------------------------------------------------------------------------------------

    def _step(self, step: RecipeStep) -> StepResult:
        session = self._open()
        if step.verb == "train":
            return self._train(session, step)
        if step.verb == "external":
            return self._external(session, step)
        if step.verb == "plan":
            return self._planned(session, step)
        edit = step.make(self.folders)
        return self._written_down(step, session.apply(edit, on_violation=step.on_violation), edit)

    def _planned(self, session: GuardSession, step: RecipeStep) -> StepResult:
        """What a planner chose within its budget, and had the guards accept."""
        carried = require_plugin(GROUPS["plan"], step.plugin, step.place)(session, **step.params)
        row = self._written_down(step, carried.step, carried.plan.edit)
        return replace(row, notes=(*row.notes, f"chosen in {len(carried.rounds)} rounds"))

    def _written_down(self, step: RecipeStep, judged: Step, edit: Any) -> StepResult:
        """The row of one of our own edits, and what it makes of the model's size."""
        if judged.applied == "kept":
            reverted = judged.record.reverted if judged.record is not None else ()
            chosen = [one for one in iter_weight_matrices(self.model) if one.refusal is None and edit.selects(one)]
            self.sizes.quantized(chosen, edit.kind, reverted)
        return self._settled(step, judged, edit.kind)

    def _external(self, session: GuardSession, step: RecipeStep) -> StepResult:
        factory = require_plugin(GROUPS["external"], step.plugin, step.place)
        change = step.make() if isinstance(factory, type) else functools.partial(factory, **step.params)
        kind = step.kind if step.kind is not None else getattr(change, "kind", None)
        with session.edit(step.name, kind, step.targets, step.on_violation) as judged, torch.no_grad():
            change(self.model)
        if judged.applied == "kept":
            self.sizes = Sizes(self.model)
        return self._settled(step, judged, judged.kind)

    def _train(self, session: GuardSession, step: RecipeStep) -> StepResult:
        trainer = step.make(self.folders)
        folder = self.scratch / TRAINING / step.name
        folder.mkdir(parents=True)
        cadence = self.recipe.cadence
        job = TrainingJob(
            name=step.name,
            model=self.model,
            encode=self.encode,
            text=self.source.texts["train"],
            policy=self.recipe.policy,
            guard={name: getattr(cadence, name) for name in cadence.__dataclass_fields__},
            retain=self._data("retain"),
            folder=folder,
            progress=self.progress,
        )
        if not trainer.changes_weights:
            return self._adapter(session, step, trainer.train(job))
        with session.edit(step.name) as judged:
            trained = trainer.train(job)
        row = self._settled(step, judged, None)
        if judged.applied == "kept":
            self.moved = True
            self.sizes.as_stored()
        return _with_training(row, trained)

    def _adapter(self, session: GuardSession, step: RecipeStep, trained: Trained) -> StepResult:
        """What was trained lies beside the weights, which must be what they were."""
        if digest_of(read_tensors(self.model, {}, ())) != session.model_digest:
            raise InputError(f"{step.place}: the trainer {step.plugin!r} was to leave the weights alone and did not")
        if trained.adapter is not None:
            self.folders[step.name] = trained.adapter
        row = StepResult(step.name, step.verb, step.expect, "KEEP", reason=f"{trained.steps} steps of training")
        return _with_training(row, trained)

    # -- what is kept ------------------------------------------------------------------------------

    def _settled(self, step: RecipeStep, judged: Step, kind: object) -> StepResult:
        row = row_of(judged, name=step.name, verb=step.verb, expect=step.expect)
        if judged.applied != "kept":
            return row
        self.unwritten.append(None if row.reverted else kind)
        if not step.save:
            return row
        packed = next((one.storage for one in iter_weight_matrices(self.model) if one.storage is not None), None)
        if packed is not None:
            note = f"the model was not written: its weights are packed by {packed}, whose own tools store them"
            return replace(row, notes=(*row.notes, note))
        return self._written(step, row)

    def _written(self, step: RecipeStep, row: StepResult) -> StepResult:
        """Write the model, and certify its folder against the one before."""
        kind = self.unwritten[0] if len(self.unwritten) == 1 else None
        self.unwritten.clear()
        link = self.chain.add(self.model, step.name, kind, lambda: certificate_of(self._open(), self._parent))
        self.folders[step.name] = link.folder
        return replace(
            row,
            model=f"{MODELS}/{step.name}",
            certificate=link.certificate.digest,
            certified=link.action,
            notes=(*row.notes, *link.notes),
        )


def _with_training(row: StepResult, trained: Trained) -> StepResult:
    """The row of a training with what the guard saw inside it."""
    rejected = sum(one.decision is not None and one.decision.action != "KEEP" for one in trained.history)
    notes = [*row.notes, *trained.notes]
    if rejected:
        notes.append(f"{rejected} of {len(trained.history)} judged steps inside the training were taken back")
    action, reason = row.action, row.reason
    if trained.halted is not None:
        action, reason = "HALT", trained.halted
    return replace(row, action=action, reason=reason, windows=len(trained.history), notes=tuple(notes))


def _words(step: RecipeStep) -> str:
    given = ", ".join(f"{name}={value}" for name, value in step.params.items() if name != "schedule")
    return f"{step.verb} {step.plugin}" + (f" ({given})" if given else "")
