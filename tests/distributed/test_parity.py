"""The same model and the same changes, guarded in 1, 2 and 4 processes, whole and sharded: one verdict.

Every step of `parity_steps` is compared with that of one process: what was decided and done, every verdict, every
measurement, every reading, the record, the decision digest, the digest of the model and the bits of its weights.
`pytest -s` prints what became of each step and the largest deviations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from once import once_a_run
from parity import Scene, Seen
from parity_comparison import Comparison, compared, lines
from parity_models import partly_readable, stored, unloaded, whole
from parity_steps import from_given_baseline, from_own_baseline, interrupted, live, resumed
from torch import nn
from torch.distributed.tensor import DTensor
from worlds import run_world

from weightproof import BaselineError, GuardSession, edits, kinds
from weightproof.parallel.placements import local_of
from weightproof.types import Measurement, Outcome

# Whatever is read from a whole matrix, on a replica or by its owner, has the bits that one process reads. What is
# summed over shards agrees to float32 rounding. A norm that was bracketed may start from another side than in one
# process and end in another bracket: both hold the norm.
TOLERANCE = 1e-6
SHARE_OF_THE_CERTIFIED_ERRORS = 1.0

# Far more than it takes, on a busy machine too.
PATIENT = 300.0

GROUPS = {"a": ("gpt2", "bert", "sequential"), "b": ("llama", "t5"), "c": ("mixtral", "uneven")}
RUNS = [
    ("a", "replicas", 2, ("sequential",)),
    ("a", "DDP", 2, ("bert", "sequential")),
    ("a", "FSDP2", 2, GROUPS["a"]),
    ("a", "FSDP2 columns", 2, ("gpt2", "sequential")),
    ("b", "DDP", 2, ("llama",)),
    ("b", "FSDP2", 2, GROUPS["b"]),
    ("c", "DDP", 2, GROUPS["c"]),
    ("c", "FSDP2", 2, GROUPS["c"]),
    ("c", "FSDP2", 4, ("uneven",)),
]
# What four processes add to two is seen with the uneven model, and what DDP adds with five others: these repeat it.
SLOW = [
    ("a", "FSDP2", 4, ("gpt2",)),
    ("a", "DDP", 2, ("gpt2",)),
    ("b", "DDP", 2, ("t5",)),
    ("c", "DDP", 4, ("uneven",)),
]
CASES = [pytest.param(*run, id="-".join(map(str, run[:3]))) for run in RUNS]
CASES += [
    pytest.param(group, kind, size, names, id="-".join([*names, kind, str(size)]), marks=pytest.mark.slow)
    for group, kind, size, names in SLOW
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, list[Seen]]]:
    """What one process sees of the models of a group."""

    def run(group: str) -> dict[str, list[Seen]]:
        (found,) = run_world(live, 1, "replicas", GROUPS[group], timeout=PATIENT)
        for name, seen in found.items():
            print(f"\n{name}, one process\n{lines(seen)}")
        return found

    return functools.cache(lambda group: once_a_run(tmp_path_factory, f"parity-{group}", lambda: run(group)))


def require_parity(label: str, expected: Sequence[Seen], ranks: Sequence[Sequence[Seen]], *, is_resumed=False) -> None:
    comparison = Comparison(TOLERANCE, SHARE_OF_THE_CERTIFIED_ERRORS, is_resumed)
    compared(expected, ranks, comparison)
    largest = ", ".join(f"{what} {size:.1e}" for what, size in comparison.largest.items() if size)
    print(
        f"{label}: {comparison.exact} measurements exact, {comparison.screened} screened; largest {largest or 'none'}"
    )
    assert not comparison.found, f"{len(comparison.found)} differences\n" + "\n".join(comparison.found[:20])


@pytest.mark.parametrize(("group", "kind", "size", "names"), CASES)
def test_a_step_is_judged_as_by_one_process(alone, group: str, kind: str, size: int, names: Sequence[str]):
    ranks = run_world(live, size, kind, names, timeout=PATIENT)
    for name in names:
        require_parity(f"{name}, {kind} x {size}", alone(group)[name], [found[name] for found in ranks])


def test_the_list_has_every_kind_of_outcome(alone):
    """Parity of steps that all pass would show little."""
    seen = [one for name in GROUPS["b"] + GROUPS["c"] for one in alone("b" if name in GROUPS["b"] else "c")[name]]
    found = {(verdict.guard, str(verdict.outcome)) for one in seen for verdict in one.decision.verdicts}
    guards = {"invariants", "spectral", "rmt", "circuits", "divergence", "variance"}
    assert {guard for guard, _ in found} == guards | {"loss"}
    assert {("invariants", "FAIL"), ("spectral", "FAIL"), ("divergence", "FAIL"), ("variance", "FAIL")} <= found
    assert {("invariants", "WARN"), ("spectral", "WARN"), ("rmt", "WARN"), ("circuits", "WARN")} <= found
    assert {(guard, "PASS") for guard in guards} <= found
    assert {one.applied for one in seen} == {"kept", "restored"}
    assert any(one.record.corrections for one in seen)


# ---------------------------------------------------------------- one run after another


def go_on(
    rank: int, size: int, kind: str, reads: Path | None, writes: Path | None
) -> tuple[list[Seen] | None, list[Seen] | None]:
    """What a run says that goes on from the files of another, and one that writes them."""
    found: list[list[Seen] | None] = [None, None]
    for index, folder in enumerate((reads, writes)):
        if folder is not None:
            scene = Scene(rank, size, "mixtral", kind)
            for part in (from_given_baseline, resumed) if folder == reads else (from_own_baseline, interrupted):
                part(scene, folder)
            found[index] = scene.seen
    return found[0], found[1]


def test_files_of_a_run_serve_one_with_any_number_of_processes(tmp_path: Path):
    first, second = tmp_path / "of one", tmp_path / "of two"
    for folder in (first, second):
        folder.mkdir()

    def run(kind: str, size: int, reads: Path | None, writes: Path | None = None) -> None:
        ranks = run_world(go_on, size, kind, reads, writes, timeout=PATIENT)
        for index in (0, 1):
            if ranks[0][index] is not None:
                seen = [found[index] for found in ranks]
                what = ("goes on", "begins")[index]
                require_parity(f"{kind} x {size} {what}", expected, seen, is_resumed=index == 0)

    ((_, expected),) = run_world(go_on, 1, "replicas", None, first, timeout=PATIENT)
    run("FSDP2", 2, first, second)
    run("replicas", 1, second)
    run("DDP", 2, second)
    run("FSDP2", 4, second)


# ---------------------------------------------------------------- what cannot be read


def partly(rank: int, size: int) -> list[dict[str, object]]:
    """Steps on a model of which one block is cut over a mesh of two dimensions and the rest over all processes."""
    model = partly_readable()
    session = GuardSession(model, timeout=PATIENT)
    assert session.processes.size == size == 4
    found = []

    def bits() -> list[bytes]:
        return [local_of(one).contiguous().view(torch.uint8).numpy().tobytes() for one in model.parameters()]

    def note(step, before=None) -> None:
        measurements = [m for verdict in step.verdicts for m in verdict.measurements]
        found.append(
            {
                "said": (step.decision.action, step.applied, step.decision.digest, step.decision.evidence_digest),
                "reason": step.decision.reason,
                "measurements": measurements,
                "changed": step.record.changed_names,
                "is as before": bits() == before,
            }
        )

    def each(change) -> None:
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            change(local_of(parameter))

    with session.edit("small") as step:
        each(lambda part: part.mul_(1.0001))
    note(step)
    note(session.apply(edits.RTN(8)))
    for name, change, kind in (
        ("large", lambda part: part.mul_(1000.0), None),
        ("NaN", lambda part: part.fill_(torch.nan), None),
        ("cast", lambda part: part.copy_(part.bfloat16()), kinds.Cast("bfloat16")),
        ("norms too", lambda part: part.mul_(1.0001), kinds.Quantize(8)),
    ):
        before = bits()
        with session.edit(name, kind=kind) as step:
            each(change)
        note(step, before)
    return found


def test_what_cannot_be_joined_is_never_a_number_and_is_rolled_back_all_the_same():
    ranks = run_world(partly, 4, timeout=PATIENT)
    names = {name for name, _ in whole("llama").named_parameters()}
    unread = {name for name in names if name.startswith("model.layers.0.") and "norm" not in name}
    assert len(unread) == 7
    assert all([one["said"] for one in ranks[0]] == [one["said"] for one in found] for found in ranks)
    small, int8, large, nan, cast, norms = ranks[0]
    for step in ranks[0]:
        _require_no_number(step["measurements"], unread)
    assert [one["said"][:2] for one in (small, int8)] == [("KEEP", "kept")] * 2
    assert not set(int8["changed"]) & unread
    assert all(name.startswith("model.layers.1.") for name in int8["changed"])
    for rank in range(4):
        for step in ranks[rank][2:4]:
            assert step["said"][:2] == ("ROLLBACK", "restored")
            assert step["is as before"], f"rank {rank}"
    elements = sum(p.numel() for n, p in whole("llama").named_parameters())
    total = [m.value for m in nan["measurements"] if (m.target, m.statistic) == ("model", "num_nonfinite")]
    assert total == [elements], "each element counts once, however many processes hold it"
    unheld = [m for m in cast["measurements"] if m.statistic == "contract_values"]
    assert {m.target for m in unheld} >= unread
    assert {(m.outcome, m.value) for m in unheld} == {(Outcome.WARN, None)}
    assert norms["said"][:2] == ("ROLLBACK", "restored")
    assert "norm.weight: contract_altered_outside_matrices" in norms["reason"]
    assert large["changed"]


def _require_no_number(measurements: Sequence[Measurement], unread: set[str]) -> None:
    """Of a matrix that cannot be read, the guards that need its values say why, and nothing else."""
    for guard in ("spectral", "rmt"):
        said = [m for m in measurements if m.guard == guard and m.target in unread]
        assert {m.target for m in said} == unread
        for one in said:
            assert (one.outcome, one.value, one.limit) == (Outcome.NOT_MEASURED, None, None)
            assert "interleaved" in str(one.reason) or "a mesh of 2 dimensions" in str(one.reason)


def without_values(rank: int, size: int, where: str) -> str:
    """The error of a session around a model of which some values are not in memory."""
    model = whole("llama") if where != "under FSDP2" else unloaded("llama")
    away = model.get_submodule("model.layers.1.mlp.down_proj")
    if where == "on the meta device":
        away.weight = nn.Parameter(away.weight.detach().to("meta"))
    elif where == "offloaded on rank 1" and rank == 1:
        cpu_offload(away, execution_device=torch.device("cpu"))
    elif where == "under FSDP2":
        model = stored(model, "FSDP2")
    with pytest.raises(BaselineError) as caught:
        GuardSession(model, timeout=PATIENT)
    return str(caught.value)


@pytest.mark.parametrize("where", ["on the meta device", "offloaded on rank 1", "under FSDP2"])
def test_weights_that_are_not_in_memory_are_refused_by_name_on_every_process(where: str):
    name = "model.embed_tokens.weight" if where == "under FSDP2" else "model.layers.1.mlp.down_proj.weight"
    for rank, message in enumerate(run_world(without_values, 2, where)):
        assert f"{name} holds no dense values" in message
        assert "load the weights into memory" in message
        assert message.startswith("rank 1: ") == (where == "offloaded on rank 1" and rank == 0)
