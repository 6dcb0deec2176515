"""One list of changes, harmless and harmful, for every model of the parity tests, and runs that go on from files.

`live(rank, size, kind, names)` is what one process sees of the list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from parity import Change, Scene, Seen
from torch import nn

from weightproof import GuardSession, edits, kinds, load_policy
from weightproof.weights import iter_weight_matrices


def rtn(session: GuardSession, bits: int) -> edits.RTN:
    """Our own edits leave the matrices of a plain module, and convolutions, alone unless they are named."""
    both = edits.RTN(bits, include=("*", "other"))
    absent = both.unmatched(iter_weight_matrices(session.model))
    return replace(both, include=tuple(one for one in both.include if one not in absent))


# ---------------------------------------------------------------- changes of one tensor


def noisy(size: float) -> Change:
    def change(values: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(17))
        return (values + size * values.float().std() * noise).to(values.dtype)

    return change


def scaled(factor: float) -> Change:
    return lambda values: values * factor


def rank_one(strength: float) -> Change:
    """A direction with a multiple of the Frobenius norm, in every matrix."""

    def change(values: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(23)
        left, right = (nn.functional.normalize(torch.randn(n, generator=generator), dim=0) for n in values.shape[-2:])
        return (values + strength * values.float().norm() * torch.outer(left, right)).to(values.dtype)

    return change


def pruned(share: float) -> Change:
    def change(values: torch.Tensor) -> torch.Tensor:
        return torch.where(values.abs() <= torch.quantile(values.abs().float().flatten(), share), 0, values)

    return change


def with_nan(values: torch.Tensor) -> torch.Tensor:
    values.view(-1)[values.numel() // 2] = math.nan
    return values


# ---------------------------------------------------------------- the list


def core(scene: Scene) -> None:
    """Sound and harmful edits of the kinds that matter most; one session."""
    matrix, other, norm = scene.spec.matrix, scene.spec.other, scene.spec.norm
    session = scene.begin()
    scene.note(session.apply(rtn(session, 8)))
    scene.note(session.apply(rtn(session, 2)))
    scene.edit("noise everywhere", lambda: scene.alter_all(1e-3))
    scene.edit("noise in a matrix", lambda: scene.alter(matrix, noisy(0.05)))
    scene.edit("a large direction", lambda: scene.alter(matrix, rank_one(3.0)))
    scene.edit("prune", lambda: scene.alter(matrix, pruned(0.05)), kind=kinds.Prune(0.05), targets=[matrix])
    scene.edit("NaN", lambda: scene.alter(matrix, with_nan))
    scene.edit("zero", lambda: scene.alter(matrix, torch.zeros_like))
    scene.edit("norm gain", lambda: scene.alter(norm, scaled(3.0)))
    scene.edit("sign flip", lambda: scene.alter(other, torch.neg))
    scene.edit(
        "outside its targets", lambda: [scene.alter(n, scaled(1.001)) for n in (matrix, other)], targets=[matrix]
    )
    scene.edit("no-op", lambda: None)
    scene.alter(matrix, scaled(1.01))
    scene.edit("after a stray", lambda: scene.alter(other, scaled(1.001)))


def more(scene: Scene) -> None:
    """The other kinds, broken promises, edits of what was screened before; one session."""
    matrix, other, norm = scene.spec.matrix, scene.spec.other, scene.spec.norm
    scene.begin()
    scene.edit("noise", lambda: scene.alter_all(1e-3))
    scene.edit("noise again", lambda: scene.alter_all(1e-3, seed=4))
    scene.edit("a direction", lambda: scene.alter(other, rank_one(0.2)))
    scene.edit("a preserving noise", lambda: scene.alter(other, noisy(1e-3)), kind="preserving")
    scene.edit("prune too little", lambda: scene.alter(other, pruned(0.05)), kind=kinds.Prune(0.5), targets=[other])
    scene.edit("no quantization", lambda: scene.alter(matrix, noisy(0.05)), kind=kinds.Quantize(4))
    scene.edit("a quantized norm", lambda: scene.alter(norm, scaled(1.01)), kind=kinds.Quantize(8))
    scene.edit("cast", lambda: scene.alter(other, lambda v: v.bfloat16().to(v.dtype)), kind=kinds.Cast("bfloat16"))
    scene.edit("NaN of a norm", lambda: scene.alter(norm, with_nan))
    scene.edit("declared no-op", lambda: None, targets=[matrix], on_violation="raise")
    scene.edit("broken and raised", lambda: scene.alter_all(100.0), on_violation="raise")


def monitoring(scene: Scene) -> None:
    """Broken weights that a session was told to keep, and how they are repaired."""
    matrix, other = scene.spec.matrix, scene.spec.other
    scene.begin()
    sound = scene.state()[matrix]
    scene.alter(matrix, with_nan)
    scene.edit("after a stray NaN", lambda: None)
    scene.alter(matrix, lambda _: sound)
    scene.edit("monitored", lambda: scene.alter(other, scaled(1024.0)), on_violation="monitor")
    scene.edit("monitored NaN", lambda: scene.alter(matrix, with_nan), on_violation="monitor")
    scene.edit("while it is broken", lambda: scene.alter(other, scaled(0.5)), on_violation="monitor")
    scene.edit("repaired", lambda: scene.alter(matrix, lambda _: sound), on_violation="monitor")
    scene.edit("undone", lambda: scene.alter(other, scaled(2.0 / 1024.0)))


def training(scene: Scene) -> None:
    """Windows, kept and not, and edits between them."""
    matrix, other = scene.spec.matrix, scene.spec.other
    session = scene.begin()
    session.watch()
    for step in (1, 2):
        scene.window("healthy", step, lambda step=step: scene.alter_all(2e-3, seed=step), [2.0, 2.0625] * 8)
    assert not session.has_changed()
    scene.window("in warm-up", 3, lambda: scene.alter(other, noisy(0.3)), [2.0, 2.0625], in_warmup=True)
    scene.window("gross growth", 4, lambda: scene.alter(matrix, scaled(1024.0)), [2.0, 2.0625])
    scene.window("NaN loss", 5, lambda: scene.alter_all(1e-3, seed=5), [2.0, math.nan])
    scene.window("loss spike", 6, lambda: scene.alter_all(1e-3, seed=6), [40.0, 41.0, 42.0])
    scene.window("NaN weights", 7, lambda: scene.alter(other, with_nan), [2.0])
    scene.window("monitored", 8, lambda: scene.alter(matrix, torch.zeros_like), [2.0], on_violation="monitor")
    scene.window("nothing", 9, lambda: None, [2.0])
    scene.note(session.apply(rtn(session, 8)))
    scene.edit("a trained edit", lambda: scene.alter_all(2e-3, seed=8), kind="train")
    scene.edit("noise after training", lambda: scene.alter(other, noisy(0.02)))
    session.close()


def corrections(scene: Scene) -> None:
    """Weights brought back to their limit instead of being refused."""
    matrix, other = scene.spec.matrix, scene.spec.other
    for mode in ("scale", "clip"):
        scene.begin(policy=load_policy("balanced").override(limits={"spectral": {"correct": mode}}))
        scene.edit(f"{mode}: grown", lambda: scene.alter(other, scaled(1.3)))
        scene.edit(f"{mode}: a direction", lambda: scene.alter(matrix, rank_one(0.7)))


PARTS = {
    "gpt2": (core,),
    "llama": (core, more, monitoring, corrections),
    "bert": (core, training),
    "t5": (core,),
    "mixtral": (core,),
    "sequential": (core, monitoring, corrections),
    "uneven": (core, training),
}


def live(rank: int, size: int, kind: str, names: Sequence[str]) -> dict[str, list[Seen]]:
    """Every part of the list for each model, as one process sees it."""
    found: dict[str, list[Seen]] = {}
    for name in names:
        scene = Scene(rank, size, name, kind)
        for part in PARTS[name]:
            scene.fresh()
            part(scene)
        found[name] = scene.seen
    return found


# ---------------------------------------------------------------- one run after another


def from_own_baseline(scene: Scene, folder: Path) -> None:
    """A session that captures its baseline; rank 0 keeps it for other runs."""
    scene.fresh()
    baseline = scene.begin().baseline
    if scene.rank == 0:
        baseline.save(folder / "first.safetensors")
    _first_steps(scene)


def from_given_baseline(scene: Scene, folder: Path) -> None:
    """A session that is given the baseline of another run."""
    scene.fresh()
    scene.begin(baseline=folder / "first.safetensors")
    _first_steps(scene)


def _first_steps(scene: Scene) -> None:
    scene.edit("noise", lambda: scene.alter_all(1e-3))
    scene.note(scene.session.apply(rtn(scene.session, 8)))


def interrupted(scene: Scene, folder: Path) -> None:
    """A run that keeps its state and its weights for others, and goes on."""
    scene.fresh()
    session = scene.begin()
    session.apply(rtn(session, 8))
    session.watch()
    scene.alter(scene.spec.other, noisy(0.01))
    session.check_window(step=5, raw_losses=[2.0, 2.0625])
    session.save_state(folder)
    state = scene.state()
    if scene.rank == 0:
        torch.save(state, folder / "weights.pt")
    _last_steps(scene)


def resumed(scene: Scene, folder: Path) -> None:
    """A run that goes on where another stopped."""
    scene.fresh(torch.load(folder / "weights.pt"))
    session = scene.begin()
    session.load_state(folder)
    assert len(session.resumed_steps) == 2
    session.watch()
    _last_steps(scene)


def _last_steps(scene: Scene) -> None:
    # An edit after training captures the outputs anew: on both sides of the interruption, from the same weights.
    scene.edit("noise in a matrix", lambda: scene.alter(scene.spec.matrix, noisy(0.02)), step=10)
    scene.window("a window", 11, lambda: scene.alter(scene.spec.other, noisy(0.01)), [2.0, 2.0625])
    scene.note(scene.session.apply(rtn(scene.session, 8), step=12))
    scene.note(scene.session.apply(rtn(scene.session, 2), step=13))
