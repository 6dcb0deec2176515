"""Plan for a model folder and write what came of it: recipe, certificate, summary and, if asked for, the model.

The folder of the results is made beside its place and renamed when all of it is there.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from weightproof import report
from weightproof.certificate import Certificate
from weightproof.certifying.certification import Request, certify_folders, exit_code
from weightproof.certifying.model_pair import Data
from weightproof.curvature.factors import Factors
from weightproof.folders.checkpoints import open_checkpoint
from weightproof.folders.files import write_atomically
from weightproof.folders.loading import LOADERS, LoadedModel, load_model, resolve_folder
from weightproof.folders.text_data import read_examples
from weightproof.judgement.evidence import certificate_of
from weightproof.losses import LossData
from weightproof.planner.mixed_plan import MixedPlan, check_request, plan
from weightproof.planner.rounds import Carried, Round, budget_policy, carry_out
from weightproof.planner.sizes import Grid
from weightproof.planner.weight_errors import Curvature, Frobenius, predictor_named
from weightproof.policy import Policy, load_policy
from weightproof.procedure.output import RECIPE, SUMMARY, check_place, output_folder
from weightproof.registry import load_plugin
from weightproof.session import GuardSession
from weightproof.transactions.publisher import CERTIFICATE, REPORT

MODEL = "model"


@dataclass(frozen=True)
class PlanRequest:
    """What is to be planned; the fields of `plan`, and where model and data are.

    Attributes:
        model: Folder or Hub id.
        budget: As in `plan`.
        bits: The same.
        grid: How matrices are quantized.
        together: As in `plan`.
        include: The same.
        exclude: The same.
        retain: Text or JSONL on which the perplexity is measured; None: KL on random tokens stands in for it.
        policy: Tier or policy file.
        device: Where the model is put.
        save_model: Whether the quantized model is written.
        key: Signs the certificates.
        predictor: One of `weight_errors.PREDICTORS`.
        factors: File of factors, for the predictor "curvature".
    """

    model: str
    budget: float
    bits: tuple[int, ...]
    grid: Grid
    together: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    retain: Path | None = None
    policy: str = "balanced"
    device: str = "cpu"
    save_model: bool = False
    key: Any = None
    predictor: str = "measured"
    factors: Path | None = None

    def unprepared_predictor(self) -> Curvature | Frobenius | None:
        """What predicts, with its factors read.

        Raises:
            InputError: The name is unknown, or factors are missing, unused or damaged.
        """
        factors = None if self.factors is None else Factors.load(self.factors)
        return predictor_named(self.predictor, factors)

    def resolved_policy(self) -> Policy:
        """The policy under which the budget decides."""
        return budget_policy(self.policy, self.budget, has_loss=self.retain is not None)


@dataclass(frozen=True)
class Listener:
    """Who is told what happens: in words, the plan before it is applied, and every round."""

    say: Callable[[str], None] = lambda _: None
    on_plan: Callable[[MixedPlan], None] = lambda _: None
    on_round: Callable[[Round], None] = lambda _: None
    progress: bool = False


@dataclass(frozen=True)
class PlannedModel:
    """What came of it.

    Attributes:
        carried: Plan and rounds.
        certificate: Of the session, with every round.
        out: Folder of the results; None where nothing was to be written.
    """

    carried: Carried
    certificate: Certificate
    out: Path | None

    @property
    def code(self) -> int:
        """0 accepted, 1 rejected, 2 undecided."""
        decision = self.carried.step.decision
        assert decision is not None
        return exit_code(decision)


def plan_model(request: PlanRequest, out: Path | None = None, listener: Listener | None = None) -> PlannedModel:
    """Plan, carry out and write.

    Args:
        request: What is to be planned.
        out: Folder of the results; an earlier one is replaced when all is there. None: nothing is written.
        listener: Told what happens.

    Raises:
        InputError: Before anything long where that can be known: budget, widths, grid, policy, folders, data.
    """
    listener = listener or Listener()
    check_request(request.budget, request.bits, request.grid)
    policy = request.resolved_policy()
    predictor = request.unprepared_predictor()
    if out is not None:
        check_place(out)
    folder = resolve_folder(request.model)
    if request.retain is not None:
        encode, _ = load_plugin(LOADERS, "tokenizer")(folder)
        next(iter(read_examples(request.retain, encode)), None)
    listener.say(f"loading {folder}")
    loaded = load_model(folder, device=request.device)
    with _scratch(out) as scratch:
        result = PlannedModel(*_guarded(request, loaded, policy, predictor, scratch, listener), scratch)
        if scratch is not None:
            _write(request, loaded.model, folder, result, listener)
    return replace(result, out=out)


@contextlib.contextmanager
def _scratch(out: Path | None) -> Iterator[Path | None]:
    if out is None:
        yield None
        return
    with output_folder(out) as scratch:
        yield scratch


def _guarded(  # noqa: PLR0913, PLR0917 - all that a session is made of
    request: PlanRequest,
    loaded: LoadedModel,
    policy: Policy,
    predictor: Curvature | Frobenius | None,
    scratch: Path | None,
    listener: Listener,
) -> tuple[Carried, Certificate]:
    """The session: plan, rounds, and the statement over them."""
    listener.say("reading the model as it is")
    retain = None if request.retain is None else LossData(request.retain, loaded.encode)
    session = GuardSession(
        loaded.model,
        policy=policy,
        retain=retain,
        trackers=() if scratch is None else ("jsonl",),
        output_dir=scratch,
        tokenizer_digest=loaded.tokenizer_digest,
    )
    try:
        found = plan(
            session,
            request.budget,
            request.bits,
            **request.grid.params(),
            together=request.together,
            include=request.include,
            exclude=request.exclude,
            predictor=predictor,
            progress=listener.progress,
        )
        listener.on_plan(found)
        carried = carry_out(session, found, on_round=listener.on_round)
        return carried, certificate_of(session)
    finally:
        session.close()


# ---------------------------------------------------------------- files


def recipe_content(request: PlanRequest, carried: Carried, folder: Path) -> dict[str, Any]:
    """The plan as a recipe, which `weightproof run` carries out and judges again under the same budget."""
    has_file = Path(request.policy).suffix in {".yaml", ".yml"}
    edit = {key: value for key, value in carried.plan.edit.params().items() if value is not None}
    limits: dict[str, Any] = {"divergence": {"kl": math.log(request.budget)}}
    if request.retain is not None:
        limits = {"loss": {"tau": request.budget}}
    content: dict[str, Any] = {
        "description": f"Mixed precision within a perplexity ratio of {request.budget:g}.",
        "model": str(folder.resolve()) if Path(request.model).expanduser().is_dir() else request.model,
        "data": {} if request.retain is None else {"retain": str(request.retain.resolve())},
        "policy": str(Path(request.policy).resolve()) if has_file else request.policy,
        "guards": limits,
        "required": list(request.resolved_policy().required),
        "edits": [{"edit": "mixed", "name": "mixed", **edit, "expect": "KEEP" if carried.accepted else "ROLLBACK"}],
    }
    return {key: value for key, value in content.items() if value != {}}


def _write(request: PlanRequest, model: nn.Module, folder: Path, result: PlannedModel, listener: Listener) -> None:
    """Everything into `result.out`; `folder` is that of the base."""
    carried, out = result.carried, result.out
    assert out is not None
    _save_evidence(result.certificate, out, request.key)
    if request.save_model and carried.accepted:
        listener.say("writing the model, and certifying its files")
        load_plugin(LOADERS, "save")(model, out / MODEL, folder)
        _save_evidence(_certified(request, carried, folder, out / MODEL, listener), out / MODEL, request.key)
    content = recipe_content(request, carried, folder)
    write_atomically(out / RECIPE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())
    summary = json.dumps(carried.to_json(), indent=1, allow_nan=False)
    write_atomically(out / SUMMARY, f"{summary}\n".encode())


def _save_evidence(certificate: Certificate, folder: Path, key: Any) -> None:
    path = certificate.save(folder / CERTIFICATE, key)
    report.save(Certificate.load(path), folder / REPORT)


def _certified(request: PlanRequest, carried: Carried, base: Path, subject: Path, listener: Listener) -> Certificate:
    """What the files say, judged from the two folders."""
    kind = carried.plan.edit.kind
    stored = {matrix.name for matrix in open_checkpoint(subject).matrices}
    asked = Request(
        base=base,
        subject=subject,
        policy=load_policy(request.resolved_policy()),
        kind=kind if stored >= set(kind.widths) else None,
        data=Data(request.retain, None, request.device, listener.say),
    )
    return certify_folders(asked, progress=listener.progress).certificate
