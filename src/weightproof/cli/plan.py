"""`weightproof plan`: bits for each matrix, so that the model is smallest within a perplexity budget."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightproof.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from weightproof.planner import Carried, MixedPlan, Round
    from weightproof.planner.model_run import PlannedModel

_OUTCOMES = (
    "[bold green]accepted[/]: the model at these widths is within the budget",
    "[bold red]rejected[/]: no width that was given keeps the budget",
    "[bold yellow]undecided[/]: too little was measured to accept any width that was given",
)


def plan(  # noqa: PLR0913, PLR0917 - one option a line
    model: Annotated[str, typer.Argument(help="Model folder (or Hub id).")],
    budget: Annotated[float, typer.Option(help="Perplexity ratio that the model may reach.")] = 1.01,
    bits: Annotated[str, typer.Option(help="Widths to choose from, 2 to 8 each.")] = "2,3,4,8",
    granularity: Annotated[str, typer.Option(help="What shares one scale: channel, group or tensor.")] = "channel",
    group_size: Annotated[int | None, typer.Option(help="Inputs per scale for groups.")] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Grids with a zero point.")] = False,
    together: Annotated[
        bool, typer.Option("--together", help="One width for query, key and value; for gate and up; for a stack.")
    ] = False,
    include: Annotated[list[str] | None, typer.Option(help="Glob of matrices or families; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob of those to leave out; may be repeated.")] = None,
    predictor: Annotated[
        str,
        typer.Option(help="What foretells the harm of a width: measured (KL), curvature (of --factors), frobenius."),
    ] = "measured",
    factors: Annotated[Path | None, typer.Option(help="Factors of this model (weightproof factors fit).")] = None,
    retain: Annotated[Path | None, typer.Option(help="Text or JSONL on which the perplexity is measured.")] = None,
    policy: Annotated[str, typer.Option(help="conservative, balanced, aggressive, or a policy file.")] = "balanced",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for recipe, certificate and summary.")] = None,
    save_model: Annotated[bool, typer.Option("--save-model", help="Write the quantized model there too.")] = False,
    sign: Annotated[Path | None, typer.Option(help="Private key (weightproof keygen) to sign with.")] = None,
    device: Annotated[str, typer.Option(help="Where the model is run, as torch names it.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Choose bits per matrix within a budget, and measure the result. Exit code 0 accepted, 1 rejected, 2 undecided."""
    widths = parse_widths(bits)
    if save_model and out is None:
        raise InputError("--save-model writes into the folder of the results: name one with --out")
    from weightproof.planner.mixed_plan import check_request
    from weightproof.planner.model_run import Listener, PlanRequest, plan_model
    from weightproof.planner.sizes import Grid

    if group_size is not None and granularity == "channel":
        granularity = "group"  # a size of groups says it
    widths, grid = check_request(budget, widths, Grid(granularity, group_size, not asymmetric))
    key = None
    if sign is not None:
        from weightproof.signing import load_private_key

        key = load_private_key(sign)
    request = PlanRequest(
        model=model,
        budget=budget,
        bits=widths,
        grid=grid,
        together=together,
        include=tuple(include) if include else ("*",),
        exclude=tuple(exclude or ()),
        retain=retain,
        policy=policy,
        device=device,
        save_model=save_model,
        key=key,
        predictor=predictor,
        factors=factors,
    )
    console = _console(quiet=as_json)
    listener = Listener(
        say=_say,
        on_plan=lambda found: _show_plan(console, found),
        on_round=lambda one: _show_round(console, one),
        progress=sys.stderr.isatty(),
    )
    result = plan_model(request, out, listener)
    if as_json:
        content = {"exit_code": result.code, **result.carried.to_json(), "digest": result.certificate.digest}
        sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
    else:
        _show_result(console, result)
    if result.code:
        raise typer.Exit(result.code)


def parse_widths(text: str) -> tuple[int, ...]:
    """Widths from words.

    Example:
        >>> parse_widths("2,3, 4")
        (2, 3, 4)

    Raises:
        InputError: If one of them is no whole number, or there is none.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise InputError(f"--bits {text!r} must be whole numbers from 2 to 8, such as 2,3,4,8")
    return tuple(int(part) for part in parts)


def _say(words: str) -> None:
    """What is being done, where somebody watches a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{words} ...\n")


# ---------------------------------------------------------------- what is shown


def _console(*, quiet: bool) -> Console | None:
    from weightproof.cli.decision_view import open_console

    return None if quiet else open_console()


def _show_plan(console: Console | None, found: MixedPlan) -> None:
    """The table, before anything is changed."""
    if console is None:
        return
    console.print(_table(found), "")
    over = "" if found.nats <= found.allowed else ", MORE than the budget allows: measuring decides"
    console.print(
        f"predicted {_nats(found.nats)} nats per token (ratio {_ratio(found.nats)}), "
        f"{_nats(found.allowed)} allowed{over}; {found.predictor}, {found.passes} passes",
        soft_wrap=True,
    )


def _table(found: MixedPlan) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("matrix" if all(len(one.matrices) == 1 for one in found.choices) else "group", overflow="fold")
    for head in ("bits", "predicted nats", "size", "of 16 bits"):
        table.add_column(head, justify="right", no_wrap=True)
    for choice in found.choices:
        option = choice.option
        half = choice.num_weights * 2
        table.add_row(
            escape(choice.name), str(option.bits), _nats(option.nats), _bytes(option.size), f"{option.size / half:.1%}"
        )
    return table


def _show_round(console: Console | None, one: Round) -> None:
    """One guarded attempt, in a line."""
    if console is None:
        return
    from rich.markup import escape

    style = {"KEEP": "bold green"}.get(one.action, "bold red")
    measured = f"ratio {_interval(one)}" if one.ratio is not None else f"KL {_nats(one.kl)} nats per token"
    console.print(
        f"[{style}]{one.action}[/] at {_bytes(one.size)}, predicted {_nats(one.nats)}: measured {measured} "
        f"({escape(one.situation.replace('_', ' '))})",
        soft_wrap=True,
    )


def _show_result(console: Console | None, result: PlannedModel) -> None:
    assert console is not None
    carried = result.carried
    console.print("", _OUTCOMES[result.code], sep="\n")
    for line in _totals(carried):
        console.print(line, soft_wrap=True, markup=False)
    if not carried.accepted:
        from rich.markup import escape

        console.print(f"because {escape(carried.rounds[-1].reason)}", soft_wrap=True)
    if result.out is not None:
        console.print(f"written to {result.out}", soft_wrap=True, markup=False)


def _totals(carried: Carried) -> list[str]:
    """Sizes, and what was predicted and measured."""
    found, last = carried.plan, carried.rounds[-1]
    whole = found.size_of
    sizes = [f"{_bytes(found.size)} in all, {found.size / whole.stored:.1%} of the model as it is"]
    if whole.half != whole.stored:
        sizes.append(f"{found.size / whole.half:.1%} of it in 16 bits")
    for width in sorted({option.bits for choice in found.choices for option in choice.options}):
        uniform = found.uniform_size(width)
        if uniform is not None:
            sizes.append(f"{found.size / uniform:.1%} of uniform int{width}")
    weights = sum(choice.num_weights for choice in found.choices)
    average = 8 * sum(choice.option.size for choice in found.choices) / weights
    lines = [
        ", ".join(sizes),
        f"{average:.2f} bits a quantized weight, scales included; {_bytes(found.size_of.others)} stay as they are",
    ]
    if last.ratio is not None:
        lines.append(
            f"perplexity ratio: budget {found.budget:g}, predicted {_ratio(found.nats)}, measured {_interval(last)}"
        )
    else:
        lines.append(
            f"no retain data: KL on random tokens stands in for the perplexity; {_nats(last.kl)} measured, "
            f"{_nats(found.nats)} predicted, {_nats(found.allowed)} nats per token allowed"
        )
    if not carried.accepted:
        reached = _interval(last) if last.ratio is not None else f"KL {_nats(last.kl)}"
        widths = "-".join(str(width) for width in sorted(set(found.bits.values())))
        lines.append(f"the largest choice tried ({widths} bits) reached {reached}; the model is as it was")
    return lines


def _interval(one: Round) -> str:
    if one.ratio is None or one.lower is None or one.upper is None:
        return _optional(one.ratio)
    return f"{one.ratio:.4f} [{one.lower:.4f}, {one.upper:.4f}]"


def _optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}" if value < 1e-4 else f"{value:.5f}"


def _ratio(nats: float) -> str:
    import math

    return f"{math.exp(min(nats, 700.0)):.4f}"


def _bytes(count: int) -> str:
    from weightproof.cli.run import size_in_words

    return size_in_words(count) if count >= 2**20 else f"{count / 2**10:.1f} KiB"


__all__: list[Any] = ["parse_widths", "plan"]
