"""The example of direct feedback alignment: the report flags it, and not its twin."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "direct_feedback_alignment.py"


@pytest.mark.slow
def test_feedback_alignment_is_flagged_and_backpropagation_passes():
    spec = importlib.util.spec_from_file_location("direct_feedback_alignment", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    reports = example.main()
    healthy, aligned = reports["backpropagation"], reports["direct feedback alignment"]
    assert healthy.complete
    assert not healthy.flags
    assert {"residual_growth", "depth_utility"} <= set(aligned.flags)
    growth = [report.diagnostics["residual_growth"].value for report in (healthy, aligned)]
    assert growth[1] > 10 * growth[0]
    gradients = [report.bp_grad_norms[-1] for report in (healthy, aligned)]
    assert gradients[1] < 0.1 * gradients[0]
    # Accuracy alone says little: both are within some points of each other.
    assert abs(healthy.headline_acc - aligned.headline_acc) < 0.1
    assert healthy.frozen_baseline_acc == aligned.frozen_baseline_acc
