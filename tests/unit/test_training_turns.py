"""What windows of training read in turn, and that what is judged is read in every one of them."""

from __future__ import annotations

import math

import torch
import trained_models
from tests.support.chains import tiny_llama

from weightproof.collective import Processes
from weightproof.divergence import capture_outputs, measure_divergence
from weightproof.forward.windows import random_windows
from weightproof.session import GuardSession
from weightproof.transactions.training_turns import TrainingTurns


def test_every_norm_and_spectrum_has_its_turn():
    matrices, turns = GuardSession(tiny_llama()).current.readings.matrices, TrainingTurns()
    share = math.ceil(len(matrices) / 8)
    for choose in (turns.norm_names, lambda every: turns.bulk_names(every, is_window=True)):
        chosen = [list(choose(matrices)) for _ in range(8)]
        assert {len(one) for one in chosen} == {share}
        assert set().union(*chosen) == set(matrices)
    assert set(turns.bulk_names(matrices, is_window=False)) == set(matrices), "an edit has no other turn"


def test_the_outputs_of_all_windows_have_their_turn():
    model = tiny_llama()
    windows = (random_windows(model),)
    cache = capture_outputs(model, windows, processes=Processes.alone())
    whole, count = measure_divergence(model, cache), len(windows[0].batches)
    turns = [measure_divergence(model, cache, turn=turn).divergence for turn in range(2 * count)]
    assert all(len(readings) == 1 for readings in turns)
    assert sum(readings[0].num_tokens for readings in turns[:count]) == whole.divergence[0].num_tokens
    assert turns[:count] == turns[count:]
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    assert not any(measure_divergence(model, cache, turn=turn).divergence[0].finite for turn in range(count))


def test_in_no_window_a_gross_growth_is_missed():
    """As many checks as there are turns, so that each matrix was once not among those that are read closely."""
    model = trained_models.load("llama").model
    session = GuardSession(model)
    session.watch()
    parameters = dict(model.named_parameters())
    found = [name for name in session.current.readings.matrices if name not in session.current.readings.untrained]
    assert len(found) >= 8
    for step, name in enumerate(sorted(found)):
        for parameter in parameters.values():
            with torch.no_grad():
                parameter.mul_(1.001)
        assert session.check_window(step=2 * step, raw_losses=[2.0]).applied == "kept"
        with torch.no_grad():
            parameters[name].mul_(30.0)
        judged = session.check_window(step=2 * step + 1, raw_losses=[2.0])
        assert judged.applied == "restored", name
        assert name in judged.decision.reason
