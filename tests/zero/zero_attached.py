"""What one process does in the tests of `weightproof.attach` on an engine that accelerate prepared."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from trained_models import load
from zero_engines import Setup, batch, join, live_part, named

from weightproof import attach, edits
from weightproof.errors import EditRejectedError
from weightproof_callbacks.sharded import find_masters

RATE = 1e-4


class Loop:
    """Engine and optimizer as accelerate prepares them, and one training step."""

    def __init__(self, size: int, setup: Setup) -> None:
        join(size)
        plugin = DeepSpeedPlugin(hf_ds_config={**setup.config, "gradient_accumulation_steps": 2})
        PartialState(cpu=True)
        self.accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=2)
        assert self.accelerator.distributed_type == DistributedType.DEEPSPEED
        assert self.accelerator.num_processes == size
        model = load("llama").model.to(setup.dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        self.engine, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.passes = 0

    def run(self, steps: int, *, rate: float = RATE) -> None:
        """Some steps of two micro-batches each."""
        self.engine.train()
        for _ in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            for _ in range(2):
                with self.accelerator.accumulate(self.engine):
                    self.passes += 1
                    tokens = batch(self.passes)
                    self.accelerator.backward(self.engine(input_ids=tokens, labels=tokens).loss)
                    self.optimizer.step()
                    self.optimizer.zero_grad()

    def parts(self) -> dict[str, torch.Tensor]:
        """This process's part of every weight, and of every master."""
        masters = find_masters(self.accelerator, self.engine, self.optimizer)
        assert masters is not None
        weights = {name: live_part(parameter).clone() for name, parameter in named(self.engine).items()}
        return {**weights, **{f"master of {name}": master.clone() for name, master in masters.tensors().items()}}


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in left if not torch.equal(left[name], right[name])]


def attached(rank: int, size: int, setup: Setup, folder: str) -> dict[str, Any]:
    """A bad step, edits, a save of rejected weights, and a resume."""
    loop = Loop(size, setup)
    facts: dict[str, Any] = {}
    # A rollback of all would take back the learning rates that the loop sets for its bad and its idle steps, too.
    with attach(loop.accelerator, loop.engine, loop.optimizer, every=2, rollback="weights") as guard:
        loop.run(2)
        guard.check()
        good = loop.parts()
        loop.run(2, rate=float("inf"))
        loop.run(1, rate=0.0)  # the next forward pass is where the guard learns of the two steps before it
        facts["after the rollback"] = differing(good, loop.parts())
        facts["edits"] = [guard.apply(edits.RTN(8)).applied, guard.apply(edits.RTN(2)).applied]
        loop.accelerator.save_state(f"{folder}/good")
        good = loop.parts()
        loop.run(1, rate=float("inf"))  # step 6, at which a check is due that no forward pass has brought about yet
        try:
            loop.accelerator.save_state(f"{folder}/rejected")
        except EditRejectedError as error:
            facts["rejected"] = str(error)
        facts["after the rejected save"] = differing(good, loop.parts())
        loop.run(1)
        facts["moved"] = bool(differing(good, loop.parts()))
        facts["step"] = guard.step
    facts["windows"] = [(step.step, step.kind.name, step.applied) for step in guard.history]
    return facts


def resumed(rank: int, size: int, setup: Setup, folder: str) -> dict[str, Any]:
    """A new run from the checkpoint: proven, and trained on."""
    loop = Loop(size, setup)
    with attach(loop.accelerator, loop.engine, loop.optimizer, every=2) as guard:
        loop.accelerator.load_state(f"{folder}/good")
        facts: dict[str, Any] = {"step": guard.step, "model": guard.session.model_digest}
        loop.run(2)
    facts["windows"] = [(step.step, step.applied) for step in guard.history]
    return facts
