"""After any sequence of edits, training, checkpoints, rollbacks, resumes and crashes: weights = last committed.

The machine keeps its own copies of what was committed, bit for bit, and compares after every rule. It also keeps a
live optimizer, so that a restore that swapped parameter objects would show as training without effect. Training that
is rejected again soon after a rollback goes back one commit further: then that one is the last.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from architectures import build
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import load_file, save_file

from weightproof import BaselineError, GuardSession
from weightproof.snapshots.tensor_store import same_bits
from weightproof.testing import faults, inject
from weightproof.testing.tampering import flip_bit
from weightproof.types import Action

DAMAGE = {
    "NaN": lambda values: values * torch.nan,
    "one NaN": lambda values: torch.where(values == values.max(), torch.nan, values),
    "inf": lambda values: values / 0.0,
}
MATRICES = ("model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight")
COOLDOWN = 2  # kept windows after a rollback, within which another one goes further back
ERRORS = (RuntimeError, KeyboardInterrupt, MemoryError)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class Transactions(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="transactions-"))
        self.saved: dict[str, torch.Tensor] | None = None
        self.step = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize()
    def begin(self) -> None:
        torch.manual_seed(0)
        model = build("llama", num_hidden_layers=1)
        with torch.no_grad():  # a small random head says almost the same whatever it reads
            model.lm_head.weight.mul_(4.0)
        self.start(model)

    def start(self, model: torch.nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.session = GuardSession(model)
        self.session.watch()
        self.kept_since_rollback = COOLDOWN
        self.commit(alone=True)

    def commit(self, *, alone: bool) -> None:
        """The present weights are committed; nothing before an edit or a resume is gone back to."""
        self.commits = [*([] if alone else self.commits[-1:]), weights_of(self.model)]

    @property
    def committed(self) -> dict[str, torch.Tensor]:
        return self.commits[-1]

    def steps(self, count: int) -> None:
        generator = torch.Generator().manual_seed(self.step)
        for _ in range(count):
            ids = torch.randint(64, (2, 8), generator=generator)
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1

    def write(self, name: str, change) -> None:
        with torch.no_grad():
            tensor = self.model.get_parameter(name)
            tensor.copy_(change(tensor))

    # -- changes that are committed ------------------------------------------------------------

    @rule(name=st.sampled_from(MATRICES), size=st.floats(1e-6, 1e-4))
    def harmless_edit(self, name: str, size: float) -> None:
        with self.session.edit("harmless") as step:
            self.write(name, lambda values: values * (1 + size))
        assert step.applied == "kept", step.decision.reason
        self.commit(alone=True)

    @rule(count=st.integers(1, 3))
    def train(self, count: int) -> None:
        held = weights_of(self.model)
        self.steps(count)
        assert any(not same_bits(tensor, held[name]) for name, tensor in self.model.state_dict().items())
        step = self.session.check_window(step=self.step)
        assert step.applied == "kept", step.decision.reason
        self.kept_since_rollback += 1
        self.commit(alone=False)

    @rule(name=st.sampled_from(MATRICES), factor=st.sampled_from((-1.0, 0.0, 0.5, 3.0, 1000.0)))
    def doubtful_edit(self, name: str, factor: float) -> None:
        with self.session.edit("doubtful") as step:
            self.write(name, lambda values: values * factor)
        if step.applied == "kept":
            self.commit(alone=True)
        assert step.applied == ("kept" if step.decision.action is Action.KEEP else "restored")

    # -- changes that are taken back -----------------------------------------------------------

    @rule(name=st.sampled_from(MATRICES), damage=st.sampled_from(sorted(DAMAGE)))
    def harmful_edit(self, name: str, damage: str) -> None:
        with self.session.edit(damage) as step:
            self.write(name, DAMAGE[damage])
        assert step.decision.action is Action.ROLLBACK
        assert step.applied == "restored"

    @rule(count=st.integers(1, 2), name=st.sampled_from(MATRICES))
    def faulty_training(self, count: int, name: str) -> None:
        with inject([faults.RankNaN(at=1, tensor=name)], self.model, self.optimizer):
            self.steps(count)
        step = self.session.check_window(step=self.step)
        assert step.decision.action is Action.ROLLBACK
        self.optimizer.state.clear()
        if self.kept_since_rollback < COOLDOWN and len(self.commits) > 1:
            self.commits.pop()
        self.kept_since_rollback = 0

    @rule(name=st.sampled_from(MATRICES), error=st.sampled_from(ERRORS), damage=st.sampled_from(sorted(DAMAGE)))
    def crash_in_an_edit(self, name: str, error: type[BaseException], damage: str) -> None:
        with pytest.raises(error), self.session.edit("interrupted"):
            self.write(name, DAMAGE[damage])
            raise error

    @rule(name=st.sampled_from(MATRICES))
    def replaced_parameter(self, name: str) -> None:
        owner, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(owner)
        with self.session.edit("replaced") as step:
            setattr(module, attribute, torch.nn.Parameter(torch.full_like(getattr(module, attribute), torch.inf)))
        assert step.applied == "restored"

    # -- checkpoints, crashes, resumes ---------------------------------------------------------

    @rule()
    def checkpoint(self) -> None:
        self.session.save_state(self.folder)
        save_file(weights_of(self.model), self.folder / "model.safetensors")
        self.saved = dict(self.committed)

    def load(self) -> torch.nn.Module:
        model = build("llama", num_hidden_layers=1)
        model.load_state_dict(load_file(self.folder / "model.safetensors"))
        return model

    @precondition(lambda self: self.saved is not None)
    @rule(lost=st.integers(0, 2))
    def crash_and_resume(self, lost: int) -> None:
        self.steps(lost)  # never judged, never saved: gone with the process
        self.start(self.load())
        self.session.load_state(self.folder)
        self.commits = [dict(self.saved)]

    @precondition(lambda self: self.saved is not None)
    @rule(name=st.sampled_from(MATRICES), bit=st.integers(0, 31))
    def resume_of_other_weights(self, name: str, bit: int) -> None:
        other = self.load()
        tensor = other.get_parameter(name).detach()
        flip_bit(tensor, 5, bit)
        if not torch.isfinite(tensor).all():
            return  # refused earlier, as a model that is broken to begin with
        session = GuardSession(other)
        with pytest.raises(BaselineError):
            session.load_state(self.folder)

    # -- what always holds ---------------------------------------------------------------------

    @invariant()
    def weights_are_the_last_committed(self) -> None:
        if not hasattr(self, "commits"):
            return
        now = self.model.state_dict()
        assert now.keys() == self.committed.keys()
        for name, tensor in now.items():
            assert same_bits(tensor, self.committed[name]), name

    @invariant()
    def the_session_says_so(self) -> None:
        if hasattr(self, "commits"):
            assert not self.session.has_changed()

    @invariant()
    def the_optimizer_holds_the_live_parameters(self) -> None:
        if hasattr(self, "commits"):
            held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
            assert held == {id(parameter) for parameter in self.model.parameters()}


TestTransactions = Transactions.TestCase
TestTransactions.settings = settings(
    max_examples=10,
    stateful_step_count=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate,),  # a sequence of ten needs no shrinking, which would take minutes
)
