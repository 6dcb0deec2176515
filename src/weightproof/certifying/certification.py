"""Certify a change from two model folders: weights, then outputs, then losses, one model in memory at a time.

The verdicts are those of a session: the same readings, guards and policy. Nothing is changed and nothing is taken
back: the certificate says whether the subject may take the place of the base.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from weightproof.certificate import Certificate
from weightproof.certifying.comparison import Comparison, FolderOriginals, compare_folders
from weightproof.certifying.model_pair import Data, PairReadings, compare_models, tokenizers_differ
from weightproof.collective import Processes
from weightproof.contracts.preserving import NAME as PRESERVING
from weightproof.contracts.preserving import preserving_readings
from weightproof.curvature.factors import Factors
from weightproof.errors import InputError
from weightproof.folders.checkpoints import open_checkpoint
from weightproof.folders.file_digests import WEIGHT_FILES
from weightproof.folders.loading import LOADERS
from weightproof.folders.text_data import read_examples
from weightproof.judgement.case_file import Base, CaseFile, statement_of
from weightproof.judgement.curvature_probe import CurvatureProbe, factors_of
from weightproof.judgement.evidence import environment, not_tested, now, step_json, windows_json
from weightproof.judgement.judging import GUARDS, Judged, decide_on, judge_all
from weightproof.judgement.subspace_probe import SubspaceProbe
from weightproof.kinds import parse_kind
from weightproof.numerics.spectrum_sketch import sketches_of
from weightproof.policy import Policy
from weightproof.registry import load_plugin
from weightproof.transactions.steps import Step
from weightproof.types import Action, Decision, Outcome, Readings

KEPT, REJECTED, UNDECIDED = 0, 1, 2
TRAINING = "train"
_SHOWN_FILES = 8
# Situations in which a change is not taken because too little is known of it, not because harm was found.
_UNDECIDED = frozenset(
    {
        "required_not_measured",
        "loss_undecided",
        "no_loss_outputs_pass_quiet",
        "no_forward_weights_pass",
        "no_forward_weights_warned",
        "nothing_measured",
    }
)
# Keys of config.json that say how a file was written, not what the model computes.
_BOOKKEEPING = frozenset({"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache"})


@dataclass(frozen=True)
class Request:
    """What is to be certified.

    Attributes:
        base: Folder of the model before the change.
        subject: Folder of the model after it.
        policy: What is demanded.
        kind: What the change claims to be, as in `GuardSession.edit`.
        targets: Globs of the tensors that may change; None allows all.
        weights_only: Whether no model is loaded and run.
        data: What the models are run on.
        parent: Certificate of the base, where it has one.
        factors: Kronecker factors of the base, or their file: what the change should cost by them is reported.
    """

    base: Path
    subject: Path
    policy: Policy
    kind: object = None
    targets: tuple[str, ...] | None = None
    weights_only: bool = False
    data: Data = field(default_factory=Data)
    parent: Certificate | None = None
    factors: Factors | Path | None = None


@dataclass(frozen=True)
class Certified:
    """A certificate, the decision in it, and the exit code of a program that made it."""

    certificate: Certificate
    decision: Decision
    case: CaseFile

    @property
    def code(self) -> int:
        """0 kept, 1 rejected, 2 undecided."""
        return exit_code(self.decision)


def exit_code(decision: Decision) -> int:
    """0 kept; 1 rejected; 2 undecided: not kept because too little was measured."""
    if decision.action is Action.KEEP:
        return KEPT
    return UNDECIDED if is_undecided(decision.situation) and decision.action is Action.ROLLBACK else REJECTED


def is_undecided(situation: str) -> bool:
    """Whether a change that is not kept in this situation was turned down for want of evidence."""
    return situation in _UNDECIDED


def certify_folders(request: Request, *, progress: bool = False) -> Certified:
    """Read, judge and state a change from one model folder to another; nothing is written.

    Args:
        request: What is to be certified.
        progress: Show bars where somebody watches a terminal.

    Raises:
        InputError: If folders, data or options cannot be used.
        BaselineError: If the base itself is broken.
    """
    started = time.perf_counter()
    check_request(request)
    probe = _curvature_probe(request)
    request.data.say("reading the weights of base and subject")
    comparison = compare_folders(
        request.base,
        request.subject,
        request.policy,
        kind=request.kind,
        targets=request.targets,
        progress=progress,
    )
    _require_parent(request, comparison)
    read = time.perf_counter()
    pair = _run(request, comparison)
    judged = _with_directions(_with_forecast(_judged(comparison, pair), probe, request), request)
    kind = parse_kind(request.kind)
    request.data.say("judging")
    decision = decide_on(request.policy, judge_all(request.policy, judged), kind=kind.name, step=1, world_size=1)
    step = Step(request.subject.resolve().name, 1, kind)
    step.settle(decision, judged)
    if step.record is not None:
        matrices = open_checkpoint(request.subject).matrices
        step.spectra = sketches_of(matrices, step.record.relative_delta, comparison.fits)
    step.seconds = time.perf_counter() - started
    cost = {"weights_seconds": read - started, "seconds": step.seconds}
    case = _case(request, comparison, pair, step, cost)
    return Certified(statement_of(case), decision, case)


# ---------------------------------------------------------------- before anything long


def check_request(request: Request) -> None:
    """Refuse what cannot lead to a certificate, before hours of reading rather than after.

    Raises:
        InputError: Naming the folder, file or option.
    """
    if request.base.resolve() == request.subject.resolve():
        raise InputError(f"{request.base} is given as base and as subject: there is no change to certify")
    if parse_kind(request.kind).name == TRAINING:
        raise InputError(
            "kind 'train' is for windows of a guarded training run, which are judged by their raw losses as well: two "
            "folders hold none, and too little would be asked of them; leave the kind out for a fine-tuned model"
        )
    for folder in (request.base, request.subject):
        open_checkpoint(folder)
    data = {"retain": request.data.retain, "target": request.data.target}
    given = {name: path for name, path in data.items() if path is not None}
    if request.weights_only and given:
        raise InputError(
            f"--weights-only runs no model, so that --{next(iter(given))} would not be read: give one of them"
        )
    if not given:
        return
    load_tokenizer = load_plugin(LOADERS, "tokenizer")
    (encode, ours), (_, theirs) = (load_tokenizer(folder) for folder in (request.base, request.subject))
    if ours != theirs:
        raise tokenizers_differ(request.base, request.subject)
    for name, path in given.items():
        next(iter(read_examples(path, encode, name=name)), None)


def _require_parent(request: Request, comparison: Comparison) -> None:
    """The parent certificate is about the base, or the chain says nothing."""
    if request.parent is None:
        return
    stated = request.parent.tensors
    differing = [name for name, digest in comparison.base_tensors.items() if stated.get(name) != digest]
    if differing:
        raise InputError(
            f"the parent certificate is not about {request.base}: {len(differing)} tensors differ, the first is "
            f"{differing[0]}; give the certificate that was made for this very model"
        )


# ---------------------------------------------------------------- readings of two models


def _run(request: Request, comparison: Comparison) -> PairReadings | str:
    """What the models say when they are run, or why they were not."""
    if request.weights_only:
        return "--weights-only was given: no model was run"
    exact = judge_all(request.policy, comparison.judged)["invariants"]
    if exact.outcome is Outcome.FAIL:
        return f"the subject was not run, because an exact invariant is broken already ({exact.reason})"
    tensors = comparison.before.tensors, comparison.after.tensors
    return compare_models((request.base, request.subject), tensors, request.policy, request.data)


def _judged(comparison: Comparison, pair: PairReadings | str) -> Judged:
    """The readings of the folders with those of the models in memory."""
    before, after = comparison.before, comparison.after
    if isinstance(pair, str):
        reasons = dict.fromkeys(("divergence", "outputs", "second_moments", "losses"), pair)
        after = replace(after, unmeasured={**after.unmeasured, **reasons})
        return Judged(before, before, _with_contract(before, after))
    before = replace(
        before, structure=pair.structures[0], second_moments=pair.moments_before, unmeasured=_known(before.unmeasured)
    )
    after = replace(
        after,
        structure=pair.structures[1],
        second_moments=pair.moments_after,
        divergence=pair.divergence,
        losses=pair.losses,
        unmeasured={**_known(after.unmeasured), **pair.unmeasured},
    )
    return Judged(before, before, _with_contract(before, after))


def _with_contract(before: Readings, after: Readings) -> Readings:
    """The contract of a change that claims to preserve the function: it is one of circuits and outputs."""
    if after.edit is None or after.edit.kind != PRESERVING:
        return after
    why = after.unmeasured.get("divergence", "no outputs were compared")
    contract = preserving_readings(before, after, after.divergence, why)
    return replace(after, edit=replace(after.edit, contract=(*after.edit.contract, *contract)))


def _curvature_probe(request: Request) -> CurvatureProbe | None:
    """The factors that were given, proven to be those of the base before anything long."""
    if request.factors is None or parse_kind(request.kind).name == TRAINING:
        return None
    request.data.say("proving the factors against the weights of the base")
    matrices = open_checkpoint(request.base).matrices
    return CurvatureProbe.of(factors_of(request.factors), matrices, Processes.alone(), is_live=False)


def _with_forecast(judged: Judged, probe: CurvatureProbe | None, request: Request) -> Judged:
    """The readings with what the change should cost by curvature."""
    if probe is None:
        return judged
    matrices = open_checkpoint(request.subject).matrices
    forecast = probe.read(matrices, judged.before.tensors, judged.after.tensors)
    return replace(judged, after=replace(judged.after, curvature=forecast))


def _with_directions(judged: Judged, request: Request) -> Judged:
    """The readings with the directions that a merge brought (see `weightproof.guards.subspace`)."""
    limits = request.policy.limits_for(load_plugin(GUARDS, "subspace"))
    probe = SubspaceProbe.of(limits, Processes.alone())
    edit = judged.after.edit
    if edit is None or not probe.concerns(edit.kind):
        return judged
    base, subject = open_checkpoint(request.base), open_checkpoint(request.subject)
    states = judged.before, judged.reference, judged.after
    found = probe.read(subject.matrices, edit.changed_names, FolderOriginals(base), *states)
    return replace(judged, after=replace(judged.after, subspace=found))


def _known(unmeasured: Mapping[str, str]) -> dict[str, str]:
    """What is still unknown when a model was loaded: classes and ties are not."""
    return {name: reason for name, reason in unmeasured.items() if name not in ("module_classes", "ties")}


# ---------------------------------------------------------------- the case


def _case(
    request: Request, comparison: Comparison, pair: PairReadings | str, step: Step, cost: Mapping[str, float]
) -> CaseFile:
    assert step.judged is not None
    ran = None if isinstance(pair, str) else pair
    after = step.judged.after
    return CaseFile(
        subject_name=request.subject.resolve().name,
        tensors=comparison.tensors,
        files=comparison.files,
        baseline=Base(
            readings=step.judged.before,
            created_at=now(),
            environment=environment(request.data.device),
            name=request.base.resolve().name,
            files=comparison.base_files,
        ),
        current=after,
        policy=request.policy,
        windows=windows_json(ran.windows) if ran else (),
        steps=[step_json(step)],
        environment=environment(request.data.device),
        created_at=now(),
        ties=ran.ties if ran else {},
        cost=cost,
        not_tested=[
            *not_tested(after, step.decision),
            *_unknown(after),
            *(ran.notes if ran else ()),
            *_configs(request),
            *_other_files(comparison),
        ],
        parent=None if request.parent is None else request.parent.digest,
    )


def _unknown(after: Readings) -> list[str]:
    names = ("module_classes", "ties", "computed_buffers")
    return [f"{name.replace('_', ' ')}: {after.unmeasured[name]}" for name in names if name in after.unmeasured]


def _other_files(comparison: Comparison) -> list[str]:
    """Files that differ beside weights and config.json, such as tokenizers: little that is measured depends on them."""
    old, new = comparison.base_files, comparison.files
    differing = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    others = [name for name in differing if name != "config.json" and not name.endswith(WEIGHT_FILES)]
    if not others:
        return []
    more = f" and {len(others) - _SHOWN_FILES} more files" if len(others) > _SHOWN_FILES else ""
    return [f"what the change of {', '.join(others[:_SHOWN_FILES])}{more} does: no weights, and not those of the base"]


def _configs(request: Request) -> list[str]:
    """Settings that differ between the two config.json: the same weights may then be another function."""
    old, new = (open_checkpoint(folder).config for folder in (request.base, request.subject))
    differing = sorted(key for key in {*old, *new} - _BOOKKEEPING if old.get(key) != new.get(key))
    if not differing:
        return []
    return [
        f"whether the change of {', '.join(differing)} in config.json is meant; outputs, where compared, include it"
    ]
