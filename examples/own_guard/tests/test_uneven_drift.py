"""The rules of weightproof hold, and the guard sees what it is for."""

import torch
from weightproof_uneven_drift import UnevenDrift, UnevenDriftLimits

from weightproof import GuardSession, Outcome
from weightproof.testing import SmallModel, check_guard


def test_it_keeps_the_rules():
    """Of every guard."""
    check_guard(UnevenDrift)


def changed(write):
    """The verdict on a change of a small model."""
    session = GuardSession(SmallModel())
    with session.edit("a change", on_violation="monitor") as step, torch.no_grad():
        write(session.model)
    session.close()
    return UnevenDrift().judge(step.judged.before, step.judged.after, UnevenDriftLimits())


def test_one_matrix_that_grew_alone_is_warned_of():
    """And named."""
    verdict = changed(lambda model: model.blocks[0].up_proj.weight.mul_(1.2))
    assert verdict.outcome is Outcome.WARN
    assert "blocks.0.up_proj.weight" in verdict.reason


def test_all_matrices_that_shrank_alike_are_not():
    """As under weight decay."""

    def decay(model):
        for parameter in model.parameters():
            parameter.mul_(0.8)

    assert changed(decay).outcome is Outcome.PASS
