"""Choose a width for each matrix: the smallest model whose predicted harm stays within a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tqdm.auto import tqdm

from weightproof.edits.mixed import Mixed
from weightproof.edits.rtn import RTN
from weightproof.errors import InputError
from weightproof.forward.windows import Windows
from weightproof.judgement.plans import selected
from weightproof.kinds import check_grid
from weightproof.parallel.placements import settle
from weightproof.planner.frontier import Frontier, frontier
from weightproof.planner.predictors import MeasuredDivergence, Predictor, Scene, Unprepared
from weightproof.planner.sizes import Grid, ModelSize
from weightproof.session import GuardSession
from weightproof.transactions.partial_revert import group_name
from weightproof.types import WeightMatrix

RANDOM = "random"
WIDTHS = (2, 3, 4, 8)
# A matrix that takes less than this share of an even part of the budget is free: wider is not measured.
_FREE = 0.01


@dataclass(frozen=True)
class Option:
    """One width of a group of matrices.

    Attributes:
        bits: The width.
        nats: Predicted harm in nats per token.
        size: Bytes of the group at this width.
        measured: False where a smaller width was free already: `nats` is then that of the smaller one, an upper bound.
    """

    bits: int
    nats: float
    size: int
    measured: bool = True


@dataclass(frozen=True)
class Choice:
    """Matrices that get one width together, mostly a single one.

    Attributes:
        name: Of the matrix, or of the group.
        matrices: Their names.
        options: Smallest width first.
        chosen: Which of the options.
        num_weights: Weights of all of them.
    """

    name: str
    matrices: tuple[str, ...]
    options: tuple[Option, ...]
    chosen: int
    num_weights: int

    @property
    def option(self) -> Option:
        """The chosen one."""
        return self.options[self.chosen]


@dataclass(frozen=True)
class MixedPlan:
    """A width for each matrix, with what was predicted of every width.

    Attributes:
        budget: Perplexity ratio that the model may reach.
        grid: How matrices are quantized.
        choices: In the model's order.
        size_of: Bytes of the model as it is.
        predictor: What was predicted, in words.
        passes: Passes over the windows that predictions took.
        is_exact: Whether no smaller choice is within the budget by these predictions.
    """

    budget: float
    grid: Grid
    choices: tuple[Choice, ...]
    size_of: ModelSize
    predictor: str
    passes: int
    is_exact: bool = True

    @property
    def bits(self) -> dict[str, int]:
        """Matrix name -> chosen width."""
        return {name: choice.option.bits for choice in self.choices for name in choice.matrices}

    @property
    def edit(self) -> Mixed:
        """The edit that carries it out."""
        return self.grid.edit(self.bits)

    @property
    def nats(self) -> float:
        """Predicted harm of the whole, in nats per token."""
        return sum(choice.option.nats for choice in self.choices)

    @property
    def allowed(self) -> float:
        """The budget in nats per token."""
        return math.log(self.budget)

    @property
    def size(self) -> int:
        """Bytes of the whole model, tensors that are not quantized included."""
        return self.size_of.others + sum(choice.option.size for choice in self.choices)

    def uniform_size(self, bits: int) -> int | None:
        """Bytes of the whole model with one width for all; None where that width is no option of some matrix."""
        sizes = [one.size for choice in self.choices for one in choice.options if one.bits == bits]
        return self.size_of.others + sum(sizes) if len(sizes) == len(self.choices) else None

    def frontier(self) -> Frontier:
        """All choices that no other beats in predicted harm and size."""
        return frontier([[(one.size, one.nats) for one in choice.options] for choice in self.choices])

    def choose(self, chosen: Sequence[int]) -> MixedPlan:
        """The same plan with another option for each choice."""
        pairs = zip(self.choices, chosen, strict=True)
        return replace(self, choices=tuple(replace(choice, chosen=index) for choice, index in pairs))

    def raised(self, allowed: float) -> MixedPlan | None:
        """Wider where that helps most, until the prediction is at most `allowed`; at least one choice is raised.

        A choice is only ever raised. What saves most predicted nats per added byte comes first; where no prediction
        says that anything helps, all that is left is raised.

        Returns:
            None where every choice has its largest width already.
        """
        chosen, moved = [choice.chosen for choice in self.choices], False
        while not moved or self._sum(chosen) > allowed:
            best = max(self._raises(chosen), default=None, key=lambda one: (one[0], -one[1], -one[2]))
            if best is None:
                break
            _, item, option = best
            chosen[item], moved = option, True
        if moved:
            return self.choose(chosen)
        widest = [len(choice.options) - 1 for choice in self.choices]
        return None if widest == chosen else self.choose(widest)

    def _sum(self, chosen: Sequence[int]) -> float:
        return sum(choice.options[index].nats for choice, index in zip(self.choices, chosen, strict=True))

    def _raises(self, chosen: Sequence[int]) -> Iterator[tuple[float, int, int]]:
        """Predicted nats saved per added byte, the choice, and its option; of what saves anything."""
        for item, (choice, index) in enumerate(zip(self.choices, chosen, strict=True)):
            now = choice.options[index]
            for other in range(index + 1, len(choice.options)):
                wider = choice.options[other]
                if wider.nats < now.nats:
                    yield (now.nats - wider.nats) / max(1, wider.size - now.size), item, other

    def to_json(self) -> dict[str, Any]:
        """The whole plan as plain values; a prediction that is not finite is None."""
        return {
            "budget": self.budget,
            **self.grid.params(),
            "predictor": self.predictor,
            "passes": self.passes,
            "is_exact": self.is_exact,
            "predicted_nats": _finite(self.nats),
            "size": {**asdict(self.size_of), "planned": self.size},
            "choices": [
                {
                    "name": one.name,
                    "matrices": list(one.matrices),
                    "bits": one.option.bits,
                    "options": [{**asdict(option), "nats": _finite(option.nats)} for option in one.options],
                }
                for one in self.choices
            ],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------- the plan


def plan(  # noqa: PLR0913 - one option a line
    session: GuardSession,
    budget: float = 1.01,
    bits: Sequence[int] = WIDTHS,
    *,
    granularity: str = "channel",
    group_size: int | None = None,
    symmetric: bool = True,
    together: bool = False,
    include: tuple[str, ...] = ("*",),
    exclude: tuple[str, ...] = (),
    predictor: Predictor | Unprepared | None = None,
    progress: bool = False,
) -> MixedPlan:
    """Predict the harm of every width of every matrix, and choose the smallest model within the budget.

    The model is as it was afterwards, bit for bit, and nothing is applied: see `carry_out`. The default predictor makes
    one pass over the session's calibration windows (random tokens where it has none) for each matrix and width, fewer
    where a small width is free already.

    Args:
        session: Its model as it is now is what is planned for.
        budget: Perplexity ratio that the model may reach, such as 1.01.
        bits: Widths to choose from, 2 to 8 each.
        granularity: As in `weightproof.edits.RTN`; one grid for the whole model.
        group_size: The same.
        symmetric: The same.
        together: Give matrices that run as one (query, key and value; gate and up; a stack of experts) one width.
        include: Which matrices, as in `weightproof.edits.RTN`.
        exclude: Which of them not.
        predictor: What predicts; measured KL if None. `Curvature(factors)` needs no pass over windows.
        progress: Show a bar where somebody watches a terminal.

    Returns:
        The plan. Where even the largest widths are predicted to exceed the budget, the plan with the least prediction:
        `nats` is above `allowed` then, and measuring decides.

    Raises:
        InputError: Budget, widths or grid make no sense, or the model has no matrix to quantize, no window to be run
            on or no logits.
    """
    widths, grid = check_request(budget, bits, Grid(granularity, group_size, symmetric))
    model, processes = session.model, session.processes
    settle(model)
    with processes.together("selecting the matrices of a plan"):
        matrices = selected(model, RTN(widths[0], granularity, group_size, symmetric, include=include, exclude=exclude))
    scene = Scene(model, tuple(matrices), widths, grid, processes, lambda: output_windows(session))
    predictor = _ready(predictor, scene)
    groups = _groups(matrices, together=together)
    free = _FREE * math.log(budget) / len(groups)
    hidden = None if progress and processes.is_main else True
    choices: list[Choice] = []
    with tqdm(total=len(groups) * len(widths), desc="predicting", unit="width", disable=hidden, leave=False) as bar:
        for name, members in groups.items():
            options = tuple(_options(members, widths, grid, predictor, free, bar))
            weights = sum(one.d_out * one.d_in for one in members)
            choices.append(Choice(name, tuple(one.name for one in members), options, 0, weights))
    predicted = sum(one.measured for choice in choices for one in choice.options)
    found = MixedPlan(
        budget=budget,
        grid=grid,
        choices=tuple(choices),
        size_of=ModelSize.of(model, matrices),
        predictor=predictor.name,
        passes=getattr(predictor, "passes", predicted),
    )
    reachable = found.frontier()
    return replace(found.choose(reachable.within(found.allowed) or reachable.least()), is_exact=reachable.is_exact)


def check_request(budget: float, bits: Sequence[int], grid: Grid) -> tuple[tuple[int, ...], Grid]:
    """Widths in order, each once, and the grid.

    Raises:
        InputError: Naming what makes no sense.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 1.0 < budget < math.inf:
        raise InputError(
            f"budget is the perplexity ratio that the model may reach, a number above 1 such as 1.01, not {budget!r}"
        )
    widths = tuple(bits) if isinstance(bits, Sequence) and not isinstance(bits, str) else ()
    if not widths:
        raise InputError(f"bits must be widths to choose from, such as 2,3,4,8, not {bits!r}")
    for width in widths:
        check_grid(width, grid.granularity, grid.group_size, max_bits=8)
    return tuple(sorted(set(widths))), grid


def output_windows(session: GuardSession) -> tuple[Windows, ...]:
    """The windows that predictions are made on: those of the user's data where there are any, else random tokens.

    Raises:
        InputError: The model cannot be run.
    """
    windows = tuple(one for one in session.windows if isinstance(one, Windows))
    if not windows:
        raise InputError(
            "there are no windows to predict on: the model's inputs cannot be guessed from its config; give retain data"
        )
    return tuple(one for one in windows if one.name != RANDOM) or windows


def _ready(predictor: Predictor | Unprepared | None, scene: Scene) -> Predictor:
    if predictor is None:
        return MeasuredDivergence(scene.model, scene.windows(), scene.grid, scene.processes)
    prepare = getattr(predictor, "prepare", None)
    return predictor if prepare is None else prepare(scene)  # pyright: ignore[reportReturnType]


def _groups(matrices: Sequence[WeightMatrix], *, together: bool) -> dict[str, list[WeightMatrix]]:
    groups: dict[str, list[WeightMatrix]] = {}
    for matrix in matrices:
        groups.setdefault(group_name(matrix.tensor_name) if together else matrix.name, []).append(matrix)
    return groups


def _options(  # noqa: PLR0913, PLR0917 - what one row of the table is made of
    members: Sequence[WeightMatrix], widths: Sequence[int], grid: Grid, predictor: Predictor, free: float, bar: Any
) -> Iterator[Option]:
    """Smallest width first; what follows a free one is not measured."""
    nats = math.inf
    for width in widths:
        size, measured = sum(grid.num_bytes(one, width) for one in members), nats > free
        if measured:
            nats = predictor.predict(members, width)
            nats = math.inf if math.isnan(nats) else max(0.0, nats)
        yield Option(width, nats, size, measured)
        bar.update()
