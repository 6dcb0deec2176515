"""The budget planner on the demo model: against one width for all, and against plans made without measuring outputs.

    .venv/bin/python benchmarks/planner.py --write

Trains the small demo model once (`weightproof run` keeps it in .cache/weightproof), plans for several budgets on
held-out windows, and measures every result on other held-out windows that no planner and no guard ever sees. Writes
benchmarks/planner.json and the tables of docs/planner.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightproof import GuardSession, planner
from weightproof.collective import Processes
from weightproof.edits import RTN, Mixed
from weightproof.guards.loss import LossLimits
from weightproof.losses import LossProbe
from weightproof.planner.frontier import frontier
from weightproof.planner.mixed_plan import MixedPlan, output_windows
from weightproof.planner.predictors import trial
from weightproof.registry import load_plugin
from weightproof.snapshot import MatrixBits, write_matrix
from weightproof.types import Outcome, WeightMatrix
from weightproof.weights import iter_weight_matrices
from weightproof_callbacks.commands import corpus
from weightproof_callbacks.commands.demo import load_recipe

HERE = Path(__file__).resolve().parent
RESULT, PAGE = HERE / "planner.json", HERE.parent / "docs" / "planner.md"
CACHE = HERE.parent / ".cache" / "weightproof"
BUDGETS = (1.005, 1.01, 1.02, 1.05)
WIDTHS = (2, 3, 4, 8)
GRID = {"granularity": "group", "group_size": 64}
BATCH = 16
TRUTH_WINDOWS = 192
OURS = "planner (measured KL)"
# At the sizes of our plans for these budgets, and of these single widths, all ways of planning are compared.
COMPARED_BUDGETS, COMPARED_WIDTHS = (1.02, 1.05), (3, 4)


# ---------------------------------------------------------------- model and text


@dataclass(frozen=True)
class Case:
    """The model, windows for planner and guards, and windows for the truth."""

    model: Any
    retain: torch.Tensor
    truth: torch.Tensor


def load_case(folder: Path | None, *, fast: bool) -> Case:
    """The demo model and held-out windows of its text: every second for planner and guards, others for the truth."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = folder or load_plugin("weightproof.loaders", "demo")(CACHE, fast=fast, say=print).folder
    recipe = load_recipe("demo", fast=fast)
    part = recipe["corpus"]
    texts = corpus.read_corpus(corpus.standard_library(), part["exclude"], part["max_bytes"], part["heldout_fraction"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = corpus.cut_windows(list(texts.heldout.values()), tokenizer, recipe["training"]["window"]).ids
    truth = corpus.spread(corpus.Windows(windows[0::2], windows[0::2, 0]), TRUTH_WINDOWS).ids
    return Case(LlamaForCausalLM.from_pretrained(folder).eval(), windows[1::2], truth)


@torch.no_grad()
def window_losses(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each window, nats per token, float64."""
    losses = []
    for ids in windows.split(BATCH):
        logits = model(input_ids=ids).logits[:, :-1].float()
        per_token = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        losses.append(per_token.double().mean(dim=1))
    return torch.cat(losses)


def paired(now: torch.Tensor, base: torch.Tensor) -> tuple[float, float]:
    """Mean change and half of its 95 % interval over windows, nats per token."""
    change = now - base
    return float(change.mean()), float(1.96 * change.std() / math.sqrt(len(change)))


# ---------------------------------------------------------------- plans without measured outputs


class Frobenius:
    """||W' - W||_F^2: what is known without running the model; not in nats, so only sizes can be asked for."""

    name = "squared Frobenius error"

    def predict(self, matrices: Sequence[WeightMatrix], bits: int) -> float:
        """See `weightproof.planner.Predictor`."""
        errors = [RTN(bits, **GRID).plan(one) - one.load() for one in matrices]
        return float(sum(torch.linalg.vector_norm(error.double()) ** 2 for error in errors))


class RelativeFrobenius:
    """||W' - W||_F^2 / ||W||_F^2."""

    name = "relative Frobenius error"

    def predict(self, matrices: Sequence[WeightMatrix], bits: int) -> float:
        """See `weightproof.planner.Predictor`."""
        whole = float(sum(torch.linalg.vector_norm(one.load().double()) ** 2 for one in matrices))
        return Frobenius().predict(matrices, bits) / whole


class PairedLoss:
    """Change of the loss on the very windows that KL is measured on, one matrix at a time."""

    name = "paired loss, the same windows"

    def __init__(self, session: GuardSession) -> None:
        self.session = session
        self.windows = torch.cat([batch["input_ids"] for batch in output_windows(session)[0].batches])
        self.base = window_losses(session.model, self.windows)

    def predict(self, matrices: Sequence[WeightMatrix], bits: int) -> float:
        """See `weightproof.planner.Predictor`."""
        edit = Mixed({one.name: bits for one in matrices}, **GRID)
        with trial(self.session.model, matrices, edit, self.session.processes):
            return paired(window_losses(self.session.model, self.windows), self.base)[0]


def by_predictor(found: MixedPlan, predictor: Any, matrices: Mapping[str, WeightMatrix]) -> list[list[float]]:
    """Harm by another predictor: a row for each choice, a column for each width."""
    return [
        [predictor.predict([matrices[name] for name in choice.matrices], option.bits) for option in choice.options]
        for choice in found.choices
    ]


def of_size(found: MixedPlan, harms: Sequence[Sequence[float]], size: int) -> MixedPlan:
    """The plan with the least harm among those that are not larger than `size` bytes."""
    items = [
        list(zip([option.size for option in choice.options], row, strict=True))
        for choice, row in zip(found.choices, harms, strict=True)
    ]
    chosen = frontier(items).at_most(size - found.size_of.others)
    assert chosen is not None
    return found.choose(chosen)


def by_layer(found: MixedPlan, size: int, *, backwards: bool) -> MixedPlan:
    """Everything wide, then width after width lowered in the order of the layers until it is small enough."""
    widest = len(WIDTHS) - 1
    chosen = [widest] * len(found.choices)
    order = range(len(chosen))
    for index in range(widest - 1, -1, -1):
        for item in reversed(order) if backwards else order:
            if found.choose(chosen).size <= size:
                return found.choose(chosen)
            chosen[item] = index
    return found.choose(chosen)


# ---------------------------------------------------------------- the run


class Bench:
    """One model, its predictions, and everything that is measured with it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model = case.model
        self.base = window_losses(case.model, case.truth)
        self.state = {name: value.clone() for name, value in case.model.state_dict().items()}
        self.matrices = {one.name: one for one in iter_weight_matrices(case.model)}
        self.retain = [row[None] for row in case.retain]
        self.probe: LossProbe | None = None

    def session(self, budget: float) -> Any:
        """A guard session in which the budget decides; closed at the end of its block."""
        policy = planner.budget_policy("balanced", budget, has_loss=True)
        return closing(GuardSession(self.model, policy=policy, retain=self.retain))

    def loss_verdict(self, budget: float, width: int) -> tuple[bool, dict[str, float | None]]:
        """Whether the loss guard accepts one width for all within a budget, and the interval it decided by."""
        if self.probe is None:
            self.probe = LossProbe(self.model, self.retain, None, LossLimits(), Processes.alone())
            self.probe.capture()
        self.probe.limits = LossLimits(tau=budget)
        chosen = [one for one in self.matrices.values() if RTN(width, **GRID).selects(one)]
        with trial(self.model, chosen, RTN(width, **GRID), Processes.alone()):
            (loss,) = self.probe.measure()
        numbers = zip(("ratio", "lower", "upper"), (loss.difference, loss.lower, loss.upper), strict=True)
        ends = {key: None if value is None else math.exp(value) for key, value in numbers}
        return self.probe.limits.outcome(loss) is Outcome.PASS, ends

    def put_back(self) -> None:
        """Undo what a session kept."""
        self.model.load_state_dict(self.state)

    def truth(self, bits: Mapping[str, int]) -> dict[str, float]:
        """Held-out change of the loss under a plan that is taken back again."""
        edit, chosen = Mixed(dict(bits), **GRID), [self.matrices[name] for name in bits]
        kept = MatrixBits(chosen)
        try:
            for matrix in chosen:
                values = edit.plan(matrix)
                assert values is not None
                write_matrix(matrix, values)
            mean, half = paired(window_losses(self.model, self.case.truth), self.base)
        finally:
            kept.put_back()
        return {"truth_nats": mean, "truth_half_interval": half}

    def row(self, name: str, plan: MixedPlan) -> dict[str, Any]:
        """Sizes and truth of a plan."""
        weights = sum(choice.num_weights for choice in plan.choices)
        quantized = sum(choice.option.size for choice in plan.choices)
        sizes = {"bytes": plan.size, "quantized_bytes": quantized, "bits_per_weight": 8 * quantized / weights}
        return {"plan": name, **sizes, **self.truth(plan.bits)}


def predictions(bench: Bench) -> tuple[MixedPlan, dict[str, list[list[float]]]]:
    """The plan for the smallest budget, which measures most widths, and the harms by other predictors."""
    with bench.session(min(BUDGETS)) as session:
        found = planner.plan(session, min(BUDGETS), WIDTHS, **GRID, progress=True)
        others = (Frobenius(), RelativeFrobenius(), PairedLoss(session))
        harms = {one.name: by_predictor(found, one, bench.matrices) for one in others}
    return found, harms


def at_budgets(bench: Bench, found: MixedPlan) -> Iterator[dict[str, Any]]:
    """Ours, and the smallest single width, that the guards accept within each budget."""
    reachable = found.frontier()
    for budget in BUDGETS:
        ours = replace(found, budget=budget)
        ours = ours.choose(reachable.within(ours.allowed) or reachable.least())
        with bench.session(budget) as session:
            carried = planner.carry_out(session, ours, on_round=lambda one: print(f"  {one.action} {one.ratio}"))
            bench.put_back()
        last = carried.rounds[-1]
        interval = {"ratio": last.ratio, "lower": last.lower, "upper": last.upper, "rounds": len(carried.rounds)}
        row = bench.row(OURS, carried.plan)
        yield {"budget": budget, "accepted": carried.accepted, "predicted": math.exp(ours.nats), **interval, **row}
        print(f"budget {budget}: {carried.accepted} {carried.plan.size}")
        is_kept = False
        for index, width in enumerate(WIDTHS):
            if is_kept and width != max(WIDTHS):  # the smallest that is accepted, and the widest
                continue
            accepted, measured = bench.loss_verdict(budget, width)
            is_kept = is_kept or accepted
            uniform = found.choose([index] * len(found.choices))
            yield {"budget": budget, "accepted": accepted, **measured, **bench.row(f"int{width} for all", uniform)}
            print(f"  int{width}: {accepted}", flush=True)


def at_sizes(
    bench: Bench, found: MixedPlan, harms: Mapping[str, Any], sizes: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Every way of planning at the same size; widths are the same four for all."""
    measured = [[option.nats for option in choice.options] for choice in found.choices]
    for size in sizes:
        plans = {OURS: of_size(found, measured, size)}
        plans |= {name: of_size(found, rows, size) for name, rows in harms.items()}
        plans["layer order, first layers narrow"] = by_layer(found, size, backwards=False)
        plans["layer order, last layers narrow"] = by_layer(found, size, backwards=True)
        uniform = [index for index in range(len(WIDTHS)) if found.choose([index] * len(found.choices)).size == size]
        for index in uniform:
            plans[f"int{WIDTHS[index]} for all"] = found.choose([index] * len(found.choices))
        for name, plan in plans.items():
            yield {"size": size, **bench.row(name, plan)}
        print(f"size {size} done")


def run(case: Case) -> dict[str, Any]:
    """Everything that the tables say."""
    bench = Bench(case)
    found, harms = predictions(bench)
    print(f"predicted with {found.passes} passes", flush=True)
    budgets = list(at_budgets(bench, found))
    single = [found.choose([WIDTHS.index(width)] * len(found.choices)).size for width in COMPARED_WIDTHS]
    ours = [row["bytes"] for row in budgets if row["plan"] == OURS and row["budget"] in COMPARED_BUDGETS]
    equal = list(at_sizes(bench, found, harms, sorted({*single, *ours})))
    sums = {f"int{width}": found.choose([i] * len(found.choices)).nats for i, width in enumerate(WIDTHS)}
    return {
        "torch": torch.__version__,
        "grid": GRID,
        "widths": WIDTHS,
        "model": {"parameters": sum(one.numel() for one in case.model.parameters()), **asdict(found.size_of)},
        "windows": {"retain": len(case.retain), "truth": len(case.truth), "tokens": case.truth.shape[1]},
        "passes": found.passes,
        "predicted_sums": sums,
        "budgets": budgets,
        "sizes": equal,
    }


# ---------------------------------------------------------------- tables


def kib(count: int) -> str:
    return f"{count / 1024:,.0f} KiB"


def budget_table(result: Mapping[str, Any]) -> str:
    lines = [
        "| budget | plan | quantized part | bits a weight | loss guard: ratio | accepted | ratio, unseen windows |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["budgets"]:
        ends = "-" if row["lower"] is None else f"{row['ratio']:.4f} [{row['lower']:.4f}, {row['upper']:.4f}]"
        name = f"**{row['plan']}**" if row["plan"] == OURS else row["plan"]
        rounds = f", {row['rounds']} rounds" if "rounds" in row else ""
        truth = f"{math.exp(row['truth_nats']):.4f} ± {row['truth_half_interval']:.4f}"
        lines.append(
            f"| {row['budget']:g} | {name} | {kib(row['quantized_bytes'])} | {row['bits_per_weight']:.2f} | {ends} | "
            f"{'yes' if row['accepted'] else 'no'}{rounds} | {truth} |"
        )
    return "\n".join(lines)


def size_table(result: Mapping[str, Any]) -> str:
    sizes = sorted({row["size"] for row in result["sizes"]})
    names = list(dict.fromkeys(row["plan"] for row in result["sizes"]))
    names.sort(key=lambda name: name.startswith("int"))
    cells = {(row["plan"], row["size"]): row for row in result["sizes"]}
    widths = {size: max(row["bits_per_weight"] for row in result["sizes"] if row["size"] == size) for size in sizes}
    lines = [
        f"| plan | {' | '.join(f'{widths[size]:.2f} bits' for size in sizes)} |",
        f"| --- |{' --- |' * len(sizes)}",
    ]
    for name in names:
        found = [cells.get((name, size)) for size in sizes]
        parts = ["" if one is None else f"{one['truth_nats']:.4f} ± {one['truth_half_interval']:.4f}" for one in found]
        lines.append(f"| {f'**{name}**' if name == OURS else name} | {' | '.join(parts)} |")
    return "\n".join(lines)


def write(result: Mapping[str, Any]) -> None:
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    for name, table in (("budgets", budget_table(result)), ("sizes", size_table(result))):
        begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
        head, _, rest = page.partition(begin)
        page = f"{head}{begin}{table}{end}{rest.partition(end)[2]}"
    PAGE.write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write planner.json and the tables of docs/planner.md")
    parser.add_argument("--fast", action="store_true", help="a tiny model: tests the path")
    parser.add_argument("--model", type=Path, help="folder of the demo model (weightproof demo: its base)")
    parser.add_argument("--table", action="store_true", help="only the tables, from the committed planner.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(RESULT.read_text()) if arguments.table else run(load_case(arguments.model, fast=arguments.fast))
    print(budget_table(result), size_table(result), sep="\n\n")
    if arguments.write:
        write(result)


if __name__ == "__main__":
    main()
