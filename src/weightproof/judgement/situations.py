"""The table of situations: which one a set of verdicts is. The policy says what to do in each.

Situations are tried in the order of `SITUATIONS`; the first that fits decides. Only an accepting loss
overrules the outputs, and only measured outputs overrule the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightproof.types import Outcome, Verdict

SITUATIONS: Mapping[str, str] = {
    "t0_fail": "an exact invariant is broken",
    "required_not_measured": "a required guard gave no verdict",
    "train_fail": "the window of training broke a limit",
    "train_warned": "the window of training is kept with a warning",
    "train_ok": "the window of training is healthy",
    "loss_rejects": "the loss rejects the change",
    "loss_accepts": "the loss accepts the change and nothing warns",
    "loss_accepts_warned": "the loss accepts the change though another guard warns",
    "outputs_reject": "the outputs reject the change",
    "gross_without_outputs": "a weight matrix changed grossly and the outputs do not overrule it",
    "loss_undecided": "the loss cannot decide",
    "no_loss_outputs_pass_quiet": "no loss data; the outputs pass and nothing warns",
    "no_loss_outputs_pass_warned": "no loss data; the outputs pass though a guard warns",
    "no_forward_weights_warned": "no forward pass was possible and the weights are suspicious or partly unread",
    "nothing_measured": "neither outputs nor weight statistics could be measured",
    "no_forward_weights_pass": "no forward pass was possible; the weights are unsuspicious",
}

RAISED = (Outcome.WARN, Outcome.FAIL)
# Tier of guards that only advise: no situation looks at them.
ADVICE = "advice"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Verdicts sorted by tier: T0 exact, T1 weights, T2 outputs, T3 loss; `ADVICE` decides nothing."""

    by_guard: Mapping[str, Verdict]
    tiers: Mapping[str, str]

    def of_tier(self, *tiers: str) -> list[Verdict]:
        """Verdicts of some tiers."""
        return [verdict for guard, verdict in self.by_guard.items() if self.tiers[guard] in tiers]

    def outcome(self, guard: str) -> Outcome:
        """Outcome of one guard; NOT_MEASURED where it gave no verdict."""
        verdict = self.by_guard.get(guard)
        return Outcome.NOT_MEASURED if verdict is None else verdict.outcome

    def raised(self, *tiers: str) -> list[Verdict]:
        """Verdicts of some tiers that warn or fail, failures first."""
        found = [verdict for verdict in self.of_tier(*tiers) if verdict.outcome in RAISED]
        return sorted(found, key=lambda verdict: verdict.outcome is not Outcome.FAIL)

    def failed(self, *tiers: str) -> list[Verdict]:
        """Verdicts of some tiers that fail."""
        return [verdict for verdict in self.of_tier(*tiers) if verdict.outcome is Outcome.FAIL]

    @property
    def has_loss(self) -> bool:
        """Whether the loss was measured."""
        return self.outcome("loss") is not Outcome.NOT_MEASURED

    @property
    def has_outputs(self) -> bool:
        """Whether the outputs were compared with the baseline's."""
        return self.outcome("divergence") is not Outcome.NOT_MEASURED

    @property
    def has_weights(self) -> bool:
        """Whether any exact or statistical reading of the weights was judged."""
        return any(verdict.outcome is not Outcome.NOT_MEASURED for verdict in self.of_tier("T0", "T1"))


def gather(verdicts: Sequence[Verdict], tiers: Mapping[str, str]) -> Evidence:
    """Evidence of a change, from one verdict per guard."""
    return Evidence({verdict.guard: verdict for verdict in verdicts}, tiers)


def situation_of(evidence: Evidence, required: Sequence[str], *, training: bool) -> tuple[str, str]:
    """The situation (a key of `SITUATIONS`) and the clause that says why it is that one."""
    if broken := evidence.failed("T0"):
        return "t0_fail", _why(broken)
    if missing := [guard for guard in required if evidence.outcome(guard) is Outcome.NOT_MEASURED]:
        return "required_not_measured", "; ".join(_missing(evidence, guard) for guard in missing)
    if training:
        return _training(evidence)
    return _by_loss(evidence) or _by_outputs(evidence) or _by_weights(evidence)


def _why(verdicts: Sequence[Verdict]) -> str:
    text = f"{verdicts[0].guard}: {verdicts[0].reason}"
    others = ", ".join(verdict.guard for verdict in verdicts[1:])
    return f"{text} (also {others})" if others else text


def _missing(evidence: Evidence, guard: str) -> str:
    verdict = evidence.by_guard.get(guard)
    if guard == "loss" and verdict is None:
        return "a loss verdict is required and missing (there is no loss data)"
    return f"{guard} is required and was not measured ({'it was not run' if verdict is None else verdict.reason})"


def _training(evidence: Evidence) -> tuple[str, str]:
    if failed := evidence.failed("T1", "T2", "T3"):
        return "train_fail", _why(failed)
    if warned := evidence.raised("T0", "T1", "T2", "T3"):
        return "train_warned", _why(warned)
    return "train_ok", _calm(evidence)


def _by_loss(evidence: Evidence) -> tuple[str, str] | None:
    loss = evidence.outcome("loss")
    if loss is Outcome.FAIL:
        return "loss_rejects", _why([evidence.by_guard["loss"]])
    if loss is not Outcome.PASS:
        return None
    if warned := evidence.raised("T0", "T1", "T2"):
        return "loss_accepts_warned", _why(warned)
    return "loss_accepts", _calm(evidence)


def _by_outputs(evidence: Evidence) -> tuple[str, str] | None:
    divergence = evidence.outcome("divergence")
    # Only outputs that pass overrule the failure of another guard.
    if divergence is not Outcome.PASS and (failed := evidence.failed("T2")):
        return "outputs_reject", _why(sorted(failed, key=lambda verdict: verdict.guard != "divergence"))
    if divergence is not Outcome.PASS and (gross := evidence.failed("T1")):
        return "gross_without_outputs", _why(gross)
    if evidence.outcome("loss") is Outcome.WARN:
        return "loss_undecided", _why([evidence.by_guard["loss"]])
    if divergence is Outcome.NOT_MEASURED:
        return None
    if warned := evidence.raised("T0", "T1", "T2"):
        return "no_loss_outputs_pass_warned", _why(warned)
    return "no_loss_outputs_pass_quiet", _calm(evidence)


def _by_weights(evidence: Evidence) -> tuple[str, str]:
    # A guard that finds nothing of its kind in the model (no attention, say) leaves nothing open.
    weights = [one for one in evidence.of_tier("T1") if one.num_eligible or one.outcome is not Outcome.NOT_MEASURED]
    if warned := evidence.raised("T0", "T1", "T2"):
        return "no_forward_weights_warned", _why(warned)
    if not any(verdict.outcome is Outcome.PASS for verdict in weights):
        return "nothing_measured", _calm(evidence)
    if any(verdict.outcome is Outcome.NOT_MEASURED for verdict in weights):
        return "no_forward_weights_warned", _calm(evidence)
    return "no_forward_weights_pass", _calm(evidence)


def _calm(evidence: Evidence) -> str:
    """Which guards passed, which advise against it, and which could not be measured: the latter is never silent."""
    passed = [guard for guard, verdict in evidence.by_guard.items() if verdict.outcome is Outcome.PASS]
    unread = [verdict for verdict in evidence.by_guard.values() if verdict.outcome is Outcome.NOT_MEASURED]
    text = f"{', '.join(passed) or 'nothing'} passed"
    if advice := evidence.raised(ADVICE):
        text += "; advice, which decides nothing: " + "; ".join(f"{v.guard} ({v.reason})" for v in advice)
    return f"{text}; not measured: " + "; ".join(f"{v.guard} ({v.reason})" for v in unread) if unread else text
