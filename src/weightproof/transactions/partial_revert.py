"""Which part of a rejected edit to take back first: the tensors that most of the damage comes from.

Tensors move in groups: query, key and value of an attention, gate and up-projection of an MLP, the factors of one
adapter, a weight with its bias; tied names are one tensor anyway. Groups are ranked by exact breaches first (a broken
contract, NaN), then by the output error of the block they lie in, shared out among its groups by how far each moved.

It proposes, it decides nothing: what is left of the edit is measured and judged again like any other change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from weightproof.collective import Processes
from weightproof.families import blocks
from weightproof.forward.localisation import EMBEDDING, HEAD
from weightproof.kinds import LoraMerge
from weightproof.parallel.placements import local_of
from weightproof.snapshot import Snapshot
from weightproof.transactions.edit_records import Subject
from weightproof.types import BlockError, EditRecord, Outcome, Verdict
from weightproof.weights import iter_tensors

# Groups taken back in a round: 1, 2, 4, ...; an edit that needs more than these rounds goes back whole.
MOST_ROUNDS = 6

_LEAF = re.compile(r"\.(?:weight|bias|original\d*)$")
_ADAPTER = re.compile(r"\.(?:lora_\w+|base_layer|modules_to_save)(?:\.\w+)?$")
_TOGETHER = (
    ("qkv", re.compile(r"(?:[qkv]_proj|query|key|value|[qkv]|[qkv]_lin|to_[qkv]|[qkv]_norm)")),
    ("gate_up", re.compile(r"(?:gate_proj|up_proj|wi_[01]|w[13])")),
)


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of a change that go back together.

    Attributes:
        name: The module, or the modules in words (`model.layers.0.self_attn.qkv`).
        tensors: Public names of its changed tensors.
        score: Its share of the damage; the largest goes back first.
        is_breach: One of its tensors breaks an exact rule.
    """

    name: str
    tensors: tuple[str, ...]
    score: float
    is_breach: bool


def group_name(tensor_name: str) -> str:
    """The group that a tensor moves with.

    Example:
        >>> group_name("h.0.self_attn.q_proj.weight"), group_name("h.0.self_attn.v_proj.lora_A.default.weight")
        ('h.0.self_attn.qkv', 'h.0.self_attn.qkv')
        >>> group_name("h.0.mlp.down_proj.bias"), group_name("h.0.mlp.experts.gate_up_proj")
        ('h.0.mlp.down_proj', 'h.0.mlp.experts.gate_up_proj')
    """
    module = _ADAPTER.sub("", _LEAF.sub("", tensor_name))
    holder, _, part = module.rpartition(".")
    together = next((name for name, parts in _TOGETHER if parts.fullmatch(part)), None)
    return module if together is None or not holder else f"{holder}.{together}"


def stored_name(matrix_name: str) -> str:
    """The tensor that a matrix lies in: a slice of a stack has its index in brackets behind the name."""
    return matrix_name.partition("[")[0]


def relative_changes(
    model: nn.Module, snapshot: Snapshot, names: Collection[str], processes: Processes
) -> dict[str, float]:
    """||W' - W||_F / ||W||_F of tensors of any shape, the same on every process; inf from zero or to NaN.

    Raises:
        InputError: If the snapshot holds no such tensor.
    """
    ours: dict[str, tuple[float, float]] = {}
    with processes.together("how far each tensor moved"):
        for named in iter_tensors(model):
            if named.name in names:
                ours[named.name] = _squares(local_of(named.tensor), snapshot.original(named.name))
    every = processes.gather("how far each tensor moved", ours)
    moved: dict[str, float] = {}
    for name in sorted(names):
        parts = [theirs[name] for theirs in every if name in theirs]
        change, size = sum(part[0] for part in parts), sum(part[1] for part in parts)
        moved[name] = math.sqrt(change / size) if size > 0.0 and math.isfinite(change) else math.inf
    return moved


@dataclass(frozen=True, slots=True)
class Reverts:
    """What a round takes back: tensors, by the modules that they lie in where objects were replaced, else by value."""

    tensors: frozenset[str]
    modules: frozenset[str] = frozenset()

    def carry_out(self, snapshot: Snapshot) -> None:
        """Take them back, bit for bit; see `Snapshot`."""
        if self.modules:
            snapshot.restore_modules(self.modules)
        else:
            snapshot.restore_tensors(self.tensors)


def by_module(snapshot: Snapshot, names: Collection[str]) -> dict[str, frozenset[str]]:
    """Changed tensors, of before and after, by the module at capture that they belong to."""
    found: dict[str, set[str]] = {}
    for name in names:
        found.setdefault(snapshot.owner_of(name), set()).add(name)
    return {module: frozenset(members) for module, members in found.items()}


def module_changes(model: nn.Module, snapshot: Snapshot, record: EditRecord, processes: Processes) -> dict[str, float]:
    """How far each changed module moved, under the name of its weight, the same on every process.

    By its matrices, as they were read through whatever stores them, and by its other tensors that are still there.
    """
    present = {named.name for named in iter_tensors(model)}
    matrices = {stored_name(name) for name in record.relative_delta}
    plain = frozenset(record.changed_names) & present & snapshot.names - matrices
    moved = relative_changes(model, snapshot, plain, processes)
    for name, delta in record.relative_delta.items():
        moved[stored_name(name)] = math.hypot(moved.get(stored_name(name), 0.0), math.inf if delta is None else delta)
    found = dict.fromkeys(by_module(snapshot, record.changed_names), 0.0)
    for name, change in moved.items():
        module = snapshot.owner_of(name)
        found[module] = math.hypot(found.get(module, 0.0), change)
    return {weight_of(module): change for module, change in found.items() if change > 0.0}


def weight_of(module: str) -> str:
    """The name under which a module is ranked."""
    return f"{module}.weight" if module else "weight"


def _squares(now: torch.Tensor, then: torch.Tensor) -> tuple[float, float]:
    """||now - then||^2 and ||then||^2 of what is here; of integers and flags whether they differ at all."""
    if now.shape != then.shape or not now.is_floating_point():
        return float(now.shape != then.shape or not torch.equal(now, then.to(now.device))), 1.0
    before = then.to(now.device, torch.float64)
    change = torch.linalg.vector_norm(now.detach().to(torch.float64) - before)
    return float(change) ** 2, float(torch.linalg.vector_norm(before)) ** 2


def breaches(verdicts: Sequence[Verdict]) -> frozenset[str]:
    """Names of tensors and matrices that an exact guard fails; a slice of a stack stands for the stack."""
    failed = [item for verdict in verdicts if verdict.guard == "invariants" for item in verdict.measurements]
    return frozenset(stored_name(item.target) for item in failed if item.outcome is Outcome.FAIL)


def ranked(
    model: nn.Module, changes: Mapping[str, float], errors: Sequence[BlockError], broken: Collection[str]
) -> list[Group]:
    """Groups of changed tensors, the most to blame first.

    Args:
        model: The changed model; only its names are looked at.
        changes: Relative change of every changed tensor.
        errors: Teacher-forced output error of every block; may be empty.
        broken: Tensors that break an exact rule.
    """
    by_place = {error.block: error.relative_error for error in errors}
    places = {name: _place(name, tuple(block.name for block in blocks(model)), by_place) for name in changes}
    totals: dict[str, float] = {}
    for name, change in changes.items():
        totals[places[name]] = math.hypot(totals.get(places[name], 0.0), change)
    found: list[Group] = []
    for group, members in sorted(_grouped(changes).items()):
        score = math.hypot(*(_share(changes[name], totals[places[name]], by_place, places[name]) for name in members))
        found.append(Group(group, members, score, any(name in broken for name in members)))
    return sorted(found, key=lambda group: (not group.is_breach, -group.score, group.name))


def _grouped(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(group_name(name), []).append(name)
    return {group: tuple(members) for group, members in groups.items()}


def _share(change: float, total: float, by_place: Mapping[str, float], place: str) -> float:
    """A tensor's share of its block's error; without any block errors, how far it moved."""
    if not by_place:
        return change
    if math.isinf(change):
        return math.inf
    return by_place.get(place, 0.0) * (change / total if total else 0.0)


def _place(name: str, trunk: Sequence[str], by_place: Mapping[str, float]) -> str:
    """Where the error of a tensor shows: its block, or what comes before or after the blocks."""
    inside = next((block for block in trunk if name.startswith(f"{block}.")), None)
    if inside is not None:
        return inside
    # A tied table is read at both ends.
    ends = [place for place in (EMBEDDING, HEAD) if place in by_place]
    if not ends:
        return name
    return EMBEDDING if "embed" in name or ".wte" in name or ".wpe" in name else HEAD


def without(subject: Subject, reverted: Collection[str]) -> Subject:
    """What is left to judge of a change once some of its tensors hold their earlier values again."""

    def stays(name: str) -> bool:
        return stored_name(name) not in reverted

    kind = subject.kind
    return replace(
        subject,
        kind=kind.without(reverted) if isinstance(kind, LoraMerge) else kind,
        planned={name: digest for name, digest in subject.planned.items() if stays(name)},
        corrected=tuple(text for text in subject.corrected if all(stays(word) for word in text.split())),
        contract=None if subject.contract is None else tuple(one for one in subject.contract if stays(one.target)),
        reverted=tuple(sorted(reverted)),
    )


def rounds(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """The groups to take back in each round: 1, then 2 more, then 4 more; never the last of them all."""
    taken = 0
    for turn in range(MOST_ROUNDS):
        chosen = list(groups[taken : taken + 2**turn])
        taken += len(chosen)
        if taken >= len(groups):
            return
        yield chosen
