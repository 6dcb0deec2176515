"""The fault table: what one process of a guarded run does, and how that must end on all of them.

Each row: what happens on one process, the code that does it | the class of what that process raises, and of what the
others raise | what the others read (or why the verdict is what it is). See `faults.Fault` for the fields.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architectures import build
from fault_scenes import NAME, WEIGHT, Fault, Scene, raising
from torch import nn

from weightproof import GuardSession, edits, kinds, snapshot
from weightproof.readings import changed_matrices
from weightproof.snapshots import tensor_store

# The limit of the tests in which a rank sleeps or dies.
SHORT = 2.0

BAD_LUCK = ValueError("bad luck")
# Early in the forward pass: where weights are sharded, most of its all-gathers are yet to come.
EARLY = "model.layers.0.mlp.down_proj"

DATA = [{"input_ids": [5, 6, 7, 8, 9, 10]}, {"input_ids": [11, 12, 13, 14]}]


# ---------------------------------------------------------------- what goes wrong


def before_writing(scene: Scene) -> None:
    with scene.guard.edit(NAME):
        if scene.hit:
            raise BAD_LUCK
        scene.change(1.5)


def everywhere(scene: Scene) -> None:
    with scene.guard.edit(NAME):
        scene.change(1.5)
        raise BAD_LUCK


def nested(scene: Scene) -> None:
    def inner() -> None:
        with scene.guard.edit("inner"):
            raise AssertionError("entered")

    scene.edit(inner)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    time.sleep(SHORT + 0.7)


def after(fault: Callable[[], None], call: Callable[..., Any]) -> Callable[..., Any]:
    """The function `call`; the fault happens before its first call."""
    calls = itertools.count()

    def late(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 0:
            fault()
        return call(*args, **kwargs)

    return late


def replaces_a_module(scene: Scene) -> None:
    mlp: Any = scene.model.get_submodule("model.layers.1.mlp")
    torch.manual_seed(3)
    mlp.down_proj = nn.Linear(mlp.down_proj.in_features, mlp.down_proj.out_features, bias=False)


def while_measured(scene: Scene, forward: Callable[..., Any]) -> None:
    """The weights are sound; the arithmetic of one process is not, while the change is measured."""
    assess = scene.guard.guarded.assessor.assess

    def assessed(*args: Any) -> Any:
        hook = scene.model.get_submodule(EARLY).register_forward_hook(forward)
        try:
            return assess(*args)
        finally:
            hook.remove()

    with scene.patched(scene.guard.guarded.assessor, "assess", assessed):
        scene.edit()


def judging(scene: Scene, fault: Callable[[], None]) -> None:
    guard = scene.guard.guarded.assessor.guards["spectral"]
    with scene.patched(type(guard), "judge", after(fault, type(guard).judge)):
        scene.edit()


def reading(scene: Scene, fault: Callable[[], None]) -> None:
    """Changed matrices are read by their owners, or where their shards lie."""
    owner = scene.patched(changed_matrices, "read_tracked", after(fault, changed_matrices.read_tracked))
    with owner, scene.patched(changed_matrices, "screen", after(fault, changed_matrices.screen)):
        scene.edit()


def restoring(scene: Scene, fault: Callable[[], None]) -> None:
    """Some tensors are back when the fault comes, the others not yet."""
    calls, write = itertools.count(), snapshot._write

    def interrupting(*args: Any) -> None:
        if next(calls) == 5:
            fault()
        write(*args)

    with scene.patched(snapshot, "_write", interrupting):
        scene.edit(factor=1000.0)


def leaves_a_hook(scene: Scene) -> None:
    """What no restore of weights takes back; the forward pass that proves the restore sees it."""
    hooks: list[Any] = []
    norm = scene.model.get_submodule("model.norm")
    try:
        scene.edit(lambda: hooks.append(norm.register_forward_hook(lambda *a: 2 * a[-1])), factor=1000.0)
    finally:
        for hook in hooks:
            hook.remove()


def alters_the_kept_copy(scene: Scene) -> None:
    """What the tensor was cannot be told any more."""
    points: list[Any] = []
    safe_point = scene.guard.guarded.safe_point

    def noted() -> Any:
        points.append(safe_point())
        return points[-1]

    with scene.patched(scene.guard.guarded, "safe_point", noted):
        scene.edit(lambda: points[-1].snapshot.original(WEIGHT).add_(1.0), factor=1000.0)


def quantizes(scene: Scene, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Our own edit plans something else on one process."""

    class Quantized(edits.RTN):
        def plan(self, matrix: Any, context: object = None) -> torch.Tensor | None:
            values = edits.RTN.plan(self, matrix, context)
            return change(values) if scene.hit and values is not None else values

    scene.guard.apply(Quantized(8))


def at_the_snapshot(scene: Scene, fault: Callable[[], None]) -> None:
    before = scene.entered
    with scene.patched(tensor_store, "_clone", after(fault, tensor_store._clone)):
        try:
            scene.edit()
        finally:
            assert scene.entered == before, "the block was entered"


def at_the_first_pass(scene: Scene, fault: Callable[[], None]) -> None:
    before = scene.entered
    early = scene.model.get_submodule(EARLY)
    hook = early.register_forward_hook(after(fault if scene.hit else lambda: None, lambda *a: a[-1]))
    try:
        scene.edit()
    finally:
        hook.remove()
        assert scene.entered == before, "the block was entered"


def skips_one(scene: Scene) -> None:
    if not scene.hit:
        scene.edit(name="first")
    scene.edit(name="second")


def misses_one(scene: Scene) -> None:
    """It computes on by itself and comes to the next edit late."""
    if scene.hit:
        sleep()
    scene.edit(name=scene.here("second", "first"))


def stays_away(scene: Scene) -> None:
    if not scene.hit:
        GuardSession(build("llama"), timeout=SHORT)


def instead(scene: Scene, call: Callable[[], Any]) -> None:
    call() if scene.hit else scene.edit()


def apply_alike(scene: Scene, **here: Any) -> None:
    scene.guard.apply(edits.RTN(8, **(here if scene.hit else {})))


def window(scene: Scene, losses: Any, fault: Callable[[], Any] | None = None, **here: Any) -> None:
    scene.guard.watch()
    scene.change(1.001)
    if scene.hit and fault is not None:
        fault()
    scene.guard.check_window(step=7, raw_losses=scene.here(losses, [1.0, 2.0]), **(here if scene.hit else {}))


class Noted(logging.Handler):
    """Keeps the errors that are logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def says_what_is_missing(scene: Scene, edit: Callable[[], None]) -> None:
    """The faulty process notes in its log which evidence could not be written; nobody else does."""
    noted, logger = Noted(), logging.getLogger("weightproof")
    logger.addHandler(noted)
    try:
        edit()
    finally:
        logger.removeHandler(noted)
    assert len(noted.messages) == int(scene.hit)
    assert all("the evidence of step" in message for message in noted.messages)


def without_folder(scene: Scene) -> None:
    """A file is in the place of the output folder."""
    away = scene.folder.with_name("away")
    if scene.hit:
        scene.folder.rename(away)
        scene.folder.touch()
    try:
        says_what_is_missing(scene, scene.edit)
    finally:
        if scene.hit:
            scene.folder.unlink()
            away.rename(scene.folder)


class Unreliable:
    """A tracker that cannot log while `error` is set."""

    name = "unreliable"
    error: Exception | None = None

    def log_event(self, event: object) -> None:
        if self.error is not None:
            raise self.error

    def log_picture(self, key: str, png: bytes, step: int) -> None:
        """Not kept."""

    def log_certificate(self, path: Path, *, action: str, step: int) -> None:
        """Not kept."""

    def close(self) -> None:
        """Nothing to flush."""


TRACKER = Unreliable()


def tracking(scene: Scene, error: Exception) -> None:
    with scene.patched(TRACKER, "error", error):
        scene.edit()


class Masters:
    """Master weights, of nothing."""

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def refresh(self, names: Any) -> None:
        """Nothing to write."""

    def stale(self) -> tuple[str, ...]:
        return ()


def starts(scene: Scene, fault: Callable[[nn.Module], Any] | None = None, model: str = "llama", **here: Any) -> None:
    """A session of its own, around a model of its own."""
    overrides, shared = here.pop("overrides", {}), {"retain": DATA, **here.pop("shared", {})}
    built = build(model, **overrides) if scene.hit else build("llama")
    if scene.hit and fault is not None:
        fault(built)
    GuardSession(built, timeout=scene.limit, **{**shared, **(here if scene.hit else {})})


def rescale(model: nn.Module, factor: float) -> None:
    model.get_parameter(WEIGHT).detach()[0, 0].mul_(factor)


def hooked(model: nn.Module, forward: Callable[..., Any]) -> None:
    model.get_submodule("model.norm").register_forward_hook(forward)


# ---------------------------------------------------------------- the tables
# what one process does, how | what it raises, what the others raise | what they read, or the verdict
# fmt: off

IN_THE_EDIT = (
    Fault("raises before it writes", before_writing,
          "ValueError", "CollectiveError", "rank {rank} failed in edit 'change': ValueError: bad luck"),
    Fault("raises after it wrote", lambda s: s.edit(raising(BAD_LUCK)),
          "ValueError", "CollectiveError", "rank {rank} failed in edit 'change': ValueError: bad luck"),
    Fault("raises, as all do", everywhere,
          "ValueError", "ValueError", "bad luck"),
    Fault("is interrupted (Ctrl-C)", lambda s: s.edit(interrupt),
          "KeyboardInterrupt", "CollectiveError", "rank {rank} failed in edit 'change': KeyboardInterrupt"),
    Fault("leaves (SystemExit)", lambda s: s.edit(raising(SystemExit(3))),
          "SystemExit", "CollectiveError", "rank {rank} failed in edit 'change': SystemExit"),
    Fault("begins an edit inside the edit", nested,
          "InputError", "InputError", "rank {rank}: edit 'inner' begins inside edit 'change'"),
    Fault("fails to plan our own edit", lambda s: quantizes(s, raising(BAD_LUCK)),
          "ValueError", "CollectiveError", "rank {rank} failed in rtn-int8-channel: ValueError: bad luck"),
    Fault("plans other values", lambda s: quantizes(s, lambda values: values * 1.0001),
          verdict="ROLLBACK", says="differing_replicas ... the copy of rank 1 is not that of rank 0"),
    Fault("writes other values", lambda s: s.edit(lambda: s.weight().mul_(1.0001)),
          verdict="ROLLBACK", says=f"{WEIGHT}: differing_replicas ... the copy of rank 1 is not that of rank 0"),
    Fault("writes NaN", lambda s: s.edit(lambda: s.weight()[:1].fill_(float("nan"))),
          verdict="ROLLBACK", says=f"{WEIGHT}: num_nonfinite = 48"),
    Fault("replaces a module", lambda s: s.edit(lambda: replaces_a_module(s)),
          verdict="ROLLBACK", says=f"{WEIGHT}: differing_replicas"),
    Fault("casts its copy to bfloat16", lambda s: s.edit(lambda: s.model.to(torch.bfloat16)),
          verdict="ROLLBACK", says="the copy of rank 1 is not that of rank 0"),
)

AROUND_THE_EDIT = (
    Fault("has no memory for the pass before it", lambda s: at_the_first_pass(s, raising(MemoryError("cache"))),
          "MemoryError", "CollectiveError", "rank {rank} failed in taking a snapshot: MemoryError: cache"),
    Fault("has no room for a snapshot", lambda s: at_the_snapshot(s, raising(RuntimeError("not enough memory"))),
          "SnapshotError", "SnapshotError", "rank {rank}: no memory for a snapshot"),
    Fault("is interrupted while it takes a snapshot", lambda s: at_the_snapshot(s, interrupt),
          "KeyboardInterrupt", "CollectiveError", "rank {rank} failed in taking a snapshot: KeyboardInterrupt"),
    Fault("computes NaN from sound weights", lambda s: while_measured(s, lambda *a: a[-1] * float("nan")),
          verdict="ROLLBACK", says="finite_outputs = 0"),
    Fault("cannot run the changed model", lambda s: while_measured(s, raising(ValueError("no kernel"))),
          verdict="ROLLBACK", says="no longer runs"),
    Fault("has no memory for the pass after it", lambda s: while_measured(s, raising(MemoryError("cache"))),
          "MemoryError", "CollectiveError", "rank {rank} failed in outputs after the change: MemoryError: cache"),
    Fault("is interrupted in a forward pass", lambda s: while_measured(s, after(interrupt, lambda *a: a[-1])),
          "KeyboardInterrupt", "CollectiveError", "rank {rank} failed in outputs after the change: KeyboardInterrupt"),
    Fault("fails to read a matrix", lambda s: reading(s, raising(MemoryError("workspace"))),
          "MemoryError", "CollectiveError", "rank {rank} failed in ... MemoryError: workspace"),
    Fault("fails in a guard", lambda s: judging(s, raising(ZeroDivisionError("limit"))),
          "ZeroDivisionError", "CollectiveError", "rank {rank} failed in judging 'change': ZeroDivisionError"),
    Fault("is interrupted in a guard", lambda s: judging(s, interrupt),
          "KeyboardInterrupt", "CollectiveError", "rank {rank} failed in judging 'change': KeyboardInterrupt"),
    Fault("is interrupted while it restores", lambda s: restoring(s, interrupt),
          "KeyboardInterrupt", "CollectiveError", "rank {rank} failed in restoring the snapshot: KeyboardInterrupt"),
    Fault("leaves a hook in the model", leaves_a_hook,
          "RestoreError", "RestoreError", "rank {rank}: every tensor was restored", verdict="HALT"),
    Fault("cannot prove the restore", alters_the_kept_copy,
          "RestoreError", "RestoreError", f"rank {{rank}}: the kept copy of {WEIGHT} was altered", verdict="HALT",
          weights="lost here"),
    Fault("cannot write the certificate", without_folder,
          verdict="KEEP", weights="kept", victims=(0,)),
    Fault("has a tracker without room", lambda s: says_what_is_missing(s, lambda: tracking(s, OSError("disk full"))),
          verdict="KEEP", weights="kept", victims=(0,)),
    Fault("has a tracker that breaks", lambda s: tracking(s, RuntimeError("no route")),
          "RuntimeError", "CollectiveError", "rank {rank} failed in writing the evidence: RuntimeError: no route",
          verdict="KEEP", weights="kept", victims=(0,)),
)

DECLARED_DIFFERENTLY = (
    Fault("another name", lambda s: s.edit(name=s.here("one", "other")),
          "CollectiveError", "CollectiveError", "different operations ... beginning 'one' ... beginning 'other'"),
    Fault("another kind", lambda s: s.edit(kind=kinds.Quantize(s.here(4, 8))),
          "InputError", "InputError", "kind of 'change': not the same on every process (rank 0 has ... rank 1 has"),
    Fault("other targets", lambda s: s.edit(targets=s.here(["*.bias"], None)),
          "InputError", "InputError", "targets of 'change': not the same on every process ... *.bias"),
    Fault("targets that are none", lambda s: s.edit(targets=s.here([3], None)),
          "InputError", "InputError", "rank {rank}: targets must be a glob"),
    Fault("another reaction", lambda s: s.edit(on_violation=s.here("monitor", "rollback")),
          "InputError", "InputError", "on_violation of 'change': not the same on every process ... monitor"),
    Fault("a reaction that is none", lambda s: s.edit(on_violation=s.here("ignore", "rollback")),
          "InputError", "InputError", "rank {rank}: on_violation must be one of"),
    Fault("another step number", lambda s: s.edit(step=s.here(8, 7)),
          "InputError", "InputError", "step number of 'change': not the same on every process"),
    Fault("an edit of other matrices", lambda s: apply_alike(s, exclude=("ffn",)),
          "InputError", "InputError", "targets of 'rtn-int8-channel': not the same on every process"),
    Fault("an edit of no matrix", lambda s: apply_alike(s, include=("nothing",)),
          "InputError", "InputError", "rank {rank}: edit 'rtn-int8-channel' selects no weight matrix"),
    Fault("skips an edit", skips_one,
          "CollectiveError", "CollectiveError", "rank {rank} at 'beginning 'second'' ... make the same calls"),
    Fault("begins to watch instead", lambda s: instead(s, s.guard.watch),
          "CollectiveError", "CollectiveError", "rank {rank} at 'taking a snapshot' ... make the same calls"),
    Fault("saves its state instead", lambda s: instead(s, lambda: s.guard.save_state(s.folder)),
          "CollectiveError", "CollectiveError", "rank {rank} at 'saving the guard's state' ... make the same calls"),
    Fault("judges a window instead", lambda s: instead(s, lambda: s.guard.check_window(step=1)),
          "CollectiveError", "CollectiveError", "rank {rank} at 'beginning 'train'' ... make the same calls"),
)

IN_A_WINDOW = (
    Fault("a raw loss that is NaN", lambda s: window(s, [1.0, float("nan")]),
          verdict="ROLLBACK", says="raw losses: num_nonfinite"),
    Fault("raw losses of fewer steps", lambda s: window(s, [1.0]),
          "InputError", "InputError", "every process must give the losses of the same steps ... rank 1: ",
          weights="kept"),
    Fault("no raw losses", lambda s: window(s, None),
          "InputError", "InputError", "every process must give the losses of the same steps", weights="kept"),
    Fault("raw losses that are no numbers", lambda s: window(s, ["low"]),
          "InputError", "InputError", "rank {rank}: raw_losses must be one number a step", weights="kept"),
    Fault("another warm-up", lambda s: window(s, [1.0, 2.0], in_warmup=True),
          "InputError", "InputError", "in_warmup of 'train': not the same on every process", weights="kept"),
    Fault("other weights", lambda s: window(s, [1.0, 2.0], lambda: s.weight()[0].mul_(1.1)),
          verdict="ROLLBACK", says=f"{WEIGHT}: differing_replicas ... the copy of rank 1 is not that of rank 0"),
)

AT_THE_START = (
    Fault("other weights", lambda s: starts(s, lambda model: rescale(model, 1.0001)),
          "BaselineError", "BaselineError", f"do not hold the same model: 1 tensors differ ... {WEIGHT} on rank 1"),
    Fault("NaN in a weight", lambda s: starts(s, lambda model: rescale(model, float("nan"))),
          "BaselineError", "BaselineError", f"{WEIGHT}"),
    Fault("NaN in its outputs", lambda s: starts(s, lambda model: hooked(model, lambda *a: a[-1] * float("nan"))),
          "BaselineError", "BaselineError", "rank {rank}: the model's outputs on the random windows are NaN or inf"),
    Fault("a model that does not run", lambda s: starts(s, lambda model: hooked(model, raising(BAD_LUCK))),
          "InputError", "InputError", "rank {rank}: ... does not run on the retain= data ... bad luck"),
    Fault("no memory for a forward pass", lambda s: starts(s, lambda model: hooked(model, raising(MemoryError()))),
          "MemoryError", "CollectiveError", "rank {rank} failed in ... MemoryError"),
    Fault("a model of another class", lambda s: starts(s, model="qwen3"),
          "InputError", "InputError", "model class: not the same on every process ... Qwen3ForCausalLM"),
    Fault("a model with a layer more", lambda s: starts(s, overrides={"num_hidden_layers": 3}),
          "InputError", "InputError", "number of tensors: not the same on every process"),
    Fault("another policy", lambda s: starts(s, policy="aggressive"),
          "InputError", "InputError", "policy: not the same on every process ... aggressive"),
    Fault("a policy that does not exist", lambda s: starts(s, policy="bold"),
          "PolicyError", "PolicyError", "rank {rank}: ... bold"),
    Fault("other data to retain", lambda s: starts(s, retain=DATA[:1]),
          "InputError", "InputError", "windows: not the same on every process ... before it is sharded over processes"),
    Fault("no data to retain", lambda s: starts(s, retain=None),
          "InputError", "InputError", "windows: not the same on every process"),
    Fault("data that cannot be used", lambda s: starts(s, retain=[{"input_ids": "words"}]),
          "InputError", "InputError", "rank {rank}: "),
    Fault("master weights", lambda s: starts(s, masters=Masters()),
          "InputError", "InputError", "master weights: not the same on every process"),
    Fault("a baseline that cannot be read", lambda s: starts(s, shared={"baseline": s.folder / "missing"}),
          "BaselineError", "BaselineError", "rank 0: ... missing", victims=(0,)),
    Fault("an event log that cannot be opened", lambda s: starts(s, shared={"output_dir": Path(__file__) / "below"}),
          "InputError", "InputError", "rank 0: cannot open the event log", victims=(0,)),
)

LATE = "rank {rank} did not come to"
GONE = "CollectiveError"

SLEEPS = (
    Fault("sleeps in the edit", lambda s: s.edit(sleep),
          GONE, GONE, f"{LATE} 'edit 'change'' within 2 s (rank {{rank}} was last seen at", stops=True),
    Fault("sleeps in a guard", lambda s: judging(s, sleep),
          GONE, GONE, f"{LATE} 'decisions' within 2 s", stops=True, victims=(1,)),
    Fault("sleeps in a forward pass", lambda s: while_measured(s, after(sleep, lambda *a: a[-1])),
          GONE, GONE, f"{LATE} 'outputs after the change' within 2 s", stops=True, victims=(0,)),
    Fault("sleeps while it restores", lambda s: restoring(s, sleep),
          GONE, GONE, f"{LATE} 'restoring the snapshot' within 2 s", stops=True, victims=(1,)),
    Fault("sleeps while it takes a snapshot", lambda s: at_the_snapshot(s, sleep),
          GONE, GONE, f"{LATE} 'taking a snapshot' within 2 s", stops=True, victims=(0,)),
    Fault("sleeps and misses an edit", misses_one,
          GONE, GONE, f"{LATE} 'beginning 'first'' within 2 s", stops=True, victims=(1,)),
    Fault("has no guard at all", stays_away,
          "", GONE, f"{LATE} 'attaching the guard on every rank' within 2 s (rank {{rank}} never came)"),
)

DIES = (
    Fault("dies in the edit", lambda s: s.edit(die),
          "", GONE, "rank 0, which hosts it, has probably ended", stops=True, victims=(0,)),
    Fault("dies in the edit", lambda s: s.edit(die),
          "", GONE, f"{LATE} 'edit 'change'' within 2 s", stops=True, victims=(1,)),
    Fault("dies in a guard", lambda s: judging(s, die),
          "", GONE, f"{LATE} 'decisions' within 2 s", stops=True, victims=(1,)),
    Fault("dies in a forward pass", lambda s: while_measured(s, after(die, lambda *a: a[-1])),
          "", GONE, f"{LATE} 'outputs after the change'", stops=True, victims=(1,)),
    Fault("dies while it restores", lambda s: restoring(s, die),
          "", GONE, "rank 0, which hosts it, has probably ended", stops=True, victims=(0,)),
)

_OF_COPIES = ("plans other values", "writes other values", "replaces a module", "casts its copy to bfloat16")

OF_A_SHARDED_MODEL = (
    *(fault for fault in IN_THE_EDIT + AROUND_THE_EDIT if fault.what not in _OF_COPIES),
    Fault("replaces a module", lambda s: s.edit(lambda: replaces_a_module(s)),
          "InputError", "InputError", f"{WEIGHT} is sharded on one of the ranks 0 and 1 and whole on the other"),
    Fault("casts its part to bfloat16", lambda s: s.edit(lambda: s.model.to(torch.bfloat16)),
          "CollectiveError", "CollectiveError", "rank 0 at 'digests of sharded tensors ... rank 1 at 'digests of"),
)
# fmt: on
