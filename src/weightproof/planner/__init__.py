"""Mixed precision within a budget: bits for each matrix, predicted first, then measured under guard.

    from weightproof import GuardSession, planner

    policy = planner.budget_policy("balanced", 1.01, has_loss=True)
    session = GuardSession(model, policy=policy, retain=windows)
    plan = planner.plan(session, budget=1.01, bits=(2, 3, 4, 8), granularity="group", group_size=64)
    planner.carry_out(session, plan).accepted

| module | idea |
| --- | --- |
| `predictors` | the harm of quantizing one matrix alone: measured KL, in nats per token; replaceable |
| `weight_errors` | predictions without a forward pass: by curvature, and by Frobenius norm as a baseline |
| `sizes` | bytes: codes, scales, and all that is not quantized |
| `frontier` | the smallest choice within a budget, exactly |
| `mixed_plan` | a width for each matrix |
| `rounds` | apply it, measure, raise what harms most, until the guards accept |
"""

from __future__ import annotations

from weightproof.planner.mixed_plan import WIDTHS, Choice, MixedPlan, Option, check_request, plan
from weightproof.planner.predictors import MeasuredDivergence, Predictor, Scene
from weightproof.planner.rounds import Carried, Round, budget_policy, carry_out, within_budget
from weightproof.planner.sizes import Grid, ModelSize
from weightproof.planner.weight_errors import Curvature, Frobenius

__all__ = [
    "WIDTHS",
    "Carried",
    "Choice",
    "Curvature",
    "Frobenius",
    "Grid",
    "MeasuredDivergence",
    "MixedPlan",
    "ModelSize",
    "Option",
    "Predictor",
    "Round",
    "Scene",
    "budget_policy",
    "carry_out",
    "check_request",
    "plan",
    "within_budget",
]
