"""Carry a plan out: apply it under guard, measure, and raise what harms most until the budget is kept.

Every round is one guarded edit of the session: what is not accepted is restored bit for bit before the next, and all
of them stand in the certificate. The interval of the paired loss decides, never the prediction; without retain data
the KL on random tokens stands in for it. Each round is one more look at the same windows: the stated error of the
interval is that of one look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from weightproof.errors import InputError
from weightproof.guards.divergence import Divergence
from weightproof.guards.loss import Loss
from weightproof.loss_data.windows import LossWindows
from weightproof.planner.mixed_plan import WIDTHS, MixedPlan, plan
from weightproof.policy import Policy, load_policy
from weightproof.session import GuardSession
from weightproof.transactions.steps import Step
from weightproof.types import Action, Outcome

MOST_ROUNDS = 24
# What a wider choice may cure; anything else (a broken contract, too little data) it does not.
_CURABLE = frozenset(
    {
        "loss_rejects",
        "loss_undecided",
        "loss_accepts_warned",
        "outputs_reject",
        "gross_without_outputs",
        "no_loss_outputs_pass_warned",
    }
)


@dataclass(frozen=True)
class Round:
    """One guarded attempt.

    Attributes:
        bits: Matrix name -> width.
        size: Bytes of the whole model.
        nats: What was predicted, in nats per token.
        action: The policy's decision, and in which situation.
        situation: Its name.
        reason: In a sentence.
        ratio: Measured perplexity after / before on the retain data; None without.
        lower: Lower end of its interval.
        upper: Upper end.
        kl: Largest measured KL over the windows that outputs are compared on, in nats per token.
    """

    bits: Mapping[str, int]
    size: int
    nats: float
    action: str
    situation: str
    reason: str
    ratio: float | None = None
    lower: float | None = None
    upper: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Carried:
    """What became of a plan.

    Attributes:
        plan: The accepted plan, which the model now holds; else the last that was tried.
        step: The guarded step of the last round.
        rounds: All of them, in order.
        decided_by: "loss" where the interval of the perplexity ratio decided, else "KL on random tokens".
    """

    plan: MixedPlan
    step: Step
    rounds: tuple[Round, ...]
    decided_by: str

    @property
    def accepted(self) -> bool:
        """Whether the model holds the plan and the guards accept it."""
        return self.step.decision is not None and self.step.decision.action is Action.KEEP

    def to_json(self) -> dict[str, Any]:
        """Plan and rounds as plain values."""
        return {**self.plan.to_json(), "decided_by": self.decided_by, "rounds": [asdict(one) for one in self.rounds]}


def budget_policy(policy: str | Policy, budget: float, *, has_loss: bool) -> Policy:
    """A policy under which the budget decides.

    With retain data `tau` of the loss guard is the budget; without, log(budget) is the limit of the KL on random
    tokens, in place of the perplexity that nobody can measure. Either guard is required, and a loss that is undecided
    keeps nothing, in any tier.

    Args:
        policy: A tier, a policy file or a policy.
        budget: Perplexity ratio.
        has_loss: Whether the session is given retain data.
    """
    found, deciding = load_policy(policy), "loss" if has_loss else "divergence"
    limits = {"loss": {"tau": budget}} if has_loss else {"divergence": {"kl": math.log(budget)}}
    required = tuple(dict.fromkeys((*found.required, deciding)))
    return found.override(limits, {"loss_undecided": "ROLLBACK"}, required=required)


def carry_out(
    session: GuardSession, found: MixedPlan, *, on_round: Callable[[Round], None] = lambda _: None
) -> Carried:
    """Apply a plan; while the guards do not accept it, raise the widths that harm most and try again.

    Args:
        session: The one that the plan was made for, under `budget_policy`.
        found: From `plan`.
        on_round: Told of each round when it is decided.

    Returns:
        The accepted plan in place; or, where even the largest widths are not accepted, the last attempt, with the
        model as it was before.

    Raises:
        InputError: The session's policy would accept more than the budget, only reports (mode monitor), or the retain
            data is too little to decide on a ratio.
        RestoreError: If a rejected attempt could not be taken back.
    """
    _require_policy(session, found)
    rounds: list[Round] = []
    while True:
        step = session.apply(found.edit)
        rounds.append(_round(step, found))
        on_round(rounds[-1])
        decision = step.decision
        assert decision is not None
        stopped = decision.action is not Action.ROLLBACK or decision.situation not in _CURABLE
        wider = None if stopped or len(rounds) == MOST_ROUNDS else found.raised(_next_target(rounds[-1], found))
        if wider is None:
            return Carried(found, step, tuple(rounds), _decided_by(step))
        found = wider


def within_budget(  # noqa: PLR0913 - what a recipe can say
    session: GuardSession,
    *,
    budget: float = 1.01,
    bits: tuple[int, ...] = WIDTHS,
    granularity: str = "channel",
    group_size: int | None = None,
    symmetric: bool = True,
    together: bool = False,
    include: tuple[str, ...] = ("*",),
    exclude: tuple[str, ...] = (),
) -> Carried:
    """`plan` and `carry_out` in one: the plug-in behind a recipe's step `plan: {...}`."""
    found = plan(
        session,
        budget,
        bits,
        granularity=granularity,
        group_size=group_size,
        symmetric=symmetric,
        together=together,
        include=include,
        exclude=exclude,
    )
    return carry_out(session, found)


def _decided_by(step: Step) -> str:
    measured = {verdict.guard for verdict in step.verdicts if verdict.outcome is not Outcome.NOT_MEASURED}
    if "loss" in measured:
        return "loss"
    return "KL on random tokens" if "divergence" in measured else "no output was measured"


def _require_policy(session: GuardSession, found: MixedPlan) -> None:
    """Refuse a session that would accept what the budget forbids."""
    advice = (
        f"make the session with policy=planner.budget_policy(..., {found.budget:g}, has_loss=...), or say so under "
        "guards: in a recipe"
    )
    if session.policy.mode != "gate":
        raise InputError(f"the session's policy only reports (mode {session.policy.mode}): a plan must be taken back")
    limits = session.policy.limits_for(Loss)
    retain = next((one for one in session.windows if isinstance(one, LossWindows) and one.name == "retain"), None)
    if retain is None:
        kl = session.policy.limits_for(Divergence).kl
        if kl > found.allowed * (1 + 1e-9):
            raise InputError(
                f"without retain data the KL on random tokens stands in for the budget, and the session accepts "
                f"{kl:.4g} nats per token where the budget allows {found.allowed:.4g}: {advice}"
            )
        return
    if session.policy.actions["loss_undecided"] != "ROLLBACK":
        raise InputError(f"the session's policy keeps what its loss guard cannot decide: {advice}")
    if limits.tau > found.budget:
        raise InputError(
            f"the session accepts a perplexity ratio of {limits.tau:g}, more than the budget {found.budget:g}: {advice}"
        )
    short = limits.too_little(retain.num_windows, retain.num_tokens)
    if short is not None:
        raise InputError(
            f"the retain data cannot decide on a perplexity ratio ({short}): give more of it, or none, and the KL on "
            "random tokens stands in for it"
        )


def _round(step: Step, found: MixedPlan) -> Round:
    decision = step.decision
    assert decision is not None
    loss = next((one for one in step.losses if one.role == "retain" and one.metric == "nll"), None)
    ends = (None, None, None) if loss is None else (loss.difference, loss.lower, loss.upper)
    ratio, lower, upper = (None if value is None else math.exp(min(value, 700.0)) for value in ends)
    return Round(
        bits=found.bits,
        size=found.size,
        nats=found.nats,
        action=str(decision.action),
        situation=decision.situation,
        reason=decision.reason,
        ratio=ratio,
        lower=lower,
        upper=upper,
        kl=max((one.kl for one in step.divergence if one.kl is not None), default=None),
    )


def _next_target(last: Round, found: MixedPlan) -> float:
    """What the next plan may predict: the last prediction, less in proportion to what was measured.

    The upper end of the interval is to come down to the budget. Of an undecided loss the interval is taken to stay as
    wide. Of a rejected one, whose test stopped early where chance had made it look worse, half of the way from the
    point to the lower end counts, and as much is kept for the interval. From half to nine tenths of the last, so that
    a round neither crawls nor leaps.
    """
    share = found.allowed / last.kl if last.kl else 0.5
    if last.ratio is not None and last.lower is not None and last.upper is not None:
        harm, low, high = math.log(last.ratio), math.log(last.lower), math.log(last.upper)
        margin = (harm - low) / 2 if low > found.allowed else high - harm
        expected = harm - margin if low > found.allowed else harm
        share = (found.allowed - margin) / max(expected, 1e-12)
    return min(max(share, 0.5), 0.9) * min(found.nats, 4.0 * found.allowed)
