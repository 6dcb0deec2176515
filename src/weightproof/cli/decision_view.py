"""How a decision is shown in a terminal: what was decided, why, each guard's verdict, what was not tested."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 118
ORDER = ("FAIL", "WARN", "NOT_MEASURED", "PASS")
STYLES = {
    "KEEP": "bold green",
    "ROLLBACK": "bold red",
    "HALT": "bold red",
    "PASS": "green",
    "WARN": "yellow",
    "FAIL": "red",
    "NOT_MEASURED": "dim",
}
NEXT: Mapping[str, str] = {
    "t0_fail": "repair what the reason names: an exact invariant is never outvoted by other evidence",
    "required_not_measured": "give what the required guard needs (more --retain text, a model that can be run), or "
    "choose a policy that does not require it",
    "loss_rejects": "do not use the subject; change less (more bits, fewer matrices, a smaller step) and certify again",
    "loss_accepts": "nothing: the change is accepted on its loss",
    "loss_accepts_warned": "the loss accepts the subject; look at what warned before relying on it elsewhere",
    "outputs_reject": "do not use the subject: its outputs moved beyond the limit; with --retain text the loss decides",
    "gross_without_outputs": "do not use the subject, or run it: only outputs overrule a gross change of a matrix",
    "loss_undecided": "give more --retain text: the interval still holds the limit",
    "no_loss_outputs_pass_quiet": "add --retain text for a decision on the loss: outputs alone were compared",
    "no_loss_outputs_pass_warned": "add --retain text for a decision on the loss, and look at what warned",
    "no_forward_weights_pass": "let the models be run (without --weights-only): weights alone accept nothing",
    "no_forward_weights_warned": "let the models be run (without --weights-only): weights alone accept nothing",
    "nothing_measured": "nothing was measured: check that the folders hold weight matrices",
    "train_ok": "training may go on",
    "train_warned": "training may go on; look at what warned",
    "train_fail": "lower the learning rate or skip the batch that broke the window",
    "processes_disagree": "check that every process holds the same weights, then load the last good checkpoint",
    "rollbacks_exhausted": "find out what keeps breaking the run; the last good state is in place",
    "inputs_disagree": "check how the loader is sharded and resumed on every process; the last good state is in place",
    "restore_not_proven": "do not use the model in memory: load the last good checkpoint",
}
"""What to do next, by situation."""


def open_console() -> Console:
    """Standard output; of a fixed width where nobody watches a terminal."""
    from rich.console import Console

    # Names of matrices hold colons: `mlp:up:` is no emoji.
    console = Console(highlight=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, emoji=False, width=WIDTH)


def next_for(step: Mapping[str, Any]) -> str | None:
    """What to do next; None where nothing is known to help.

    A window of training that broke an exact invariant has been taken back: nothing of it is left to repair.
    """
    broken_window = step["situation"] == "t0_fail" and step["kind"] == "train"
    return NEXT.get("train_fail" if broken_window else step["situation"])


def show_decision(console: Console, step: Mapping[str, Any], not_tested: Sequence[str]) -> None:
    """Print one judged step as a certificate carries it, decision first."""
    from rich.markup import escape

    style = STYLES.get(step["action"], "bold")
    warned = ", with a warning" if step["warned"] else ""
    console.print(f"[{style}]{step['action']}[/]{warned}: {escape(step['name'])} (assurance: {step['assurance']})")
    console.print(f"because {escape(str(step['reason']))}")
    if reached := _reached(step):
        console.print(escape(reached))
    console.print(f"next: {next_for(step) or 'read the reason above'}", "")
    console.print(_verdict_table(step["verdicts"]), "")
    console.print("not tested:")
    for sentence in not_tested:
        console.print(f"  - {escape(str(sentence))}")


def _reached(step: Mapping[str, Any]) -> str | None:
    """How much of the matrices an edit changed, where it left some of them as they were."""
    reach = (step.get("record") or {}).get("reach") or {}
    left = reach.get("untouched_fraction") or {}
    if not left:
        return None
    untouched = ", ".join(f"{family} {share:.0%}" for family, share in left.items())
    return f"changed {reach['touched_fraction']:.1%} of the matrix parameters; untouched: {untouched}"


def worst_table(step: Mapping[str, Any], count: int) -> Table | None:
    """The `count` measurements that lie farthest beyond, or closest to, their limits; None where none was judged."""
    found = [item for verdict in step["verdicts"] for item in verdict["measurements"] if item["limit"] is not None]
    if not found:
        return None
    table = _table(f"the worst {min(count, len(found))} of {len(found)} judged measurements")
    for title in ("guard", "outcome", "target", "statistic"):
        table.add_column(title, overflow="fold")
    for title in ("value", "limit"):
        table.add_column(title, justify="right", no_wrap=True)
    for item in sorted(found, key=_severity)[:count]:
        table.add_row(
            item["guard"],
            _styled(item["outcome"]),
            _plain(item["target"]),
            item["statistic"],
            *map(number, _values(item)),
        )
    return table


def number(value: Any) -> str:
    """A number of a certificate for people; a dash where nothing was measured."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _verdict_table(verdicts: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("each guard's verdict")
    for title in ("guard", "outcome", "measured"):
        table.add_column(title, no_wrap=True)
    table.add_column("why", overflow="fold")
    for verdict in sorted(verdicts, key=lambda one: ORDER.index(one["outcome"])):
        covered = f"{verdict['num_measured']} of {verdict['num_eligible']}"
        table.add_row(verdict["guard"], _styled(verdict["outcome"]), covered, _plain(verdict["reason"]))
    return table


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, show_edge=False)


def _styled(outcome: str) -> str:
    return f"[{STYLES.get(outcome, 'none')}]{outcome}[/]"


def _plain(text: object) -> str:
    from rich.markup import escape

    return escape(str(text))


def _values(item: Mapping[str, Any]) -> tuple[Any, Any]:
    return item["value"], item["limit"]


def _severity(item: Mapping[str, Any]) -> tuple[int, float]:
    """Sort key: outcome first, then how far a value lies towards its limit."""
    value, limit = _values(item)
    if not isinstance(value, int | float) or not isinstance(limit, int | float):
        return ORDER.index(item["outcome"]), -math.inf if value is not None else 0.0
    share = abs(value) / abs(limit) if limit else math.inf if value else 0.0
    return ORDER.index(item["outcome"]), -share
