"""K-FAC editing: drop the directions of weight matrices that carry little curvature (`weightproof.curvature`).

What is recited from memory lies in them, by and large (arXiv:2510.24256); so do some facts and some arithmetic, which
suffer with it: measure them too. The edit promises nothing about the outputs, so its kind is "unknown" and they decide.

    >>> factors = fit_factors(model, batches, include="*.mlp.*")                  # doctest: +SKIP
    >>> session.apply(KFAC(factors, energy=0.6)).decision.action                   # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightproof.curvature.bases import bases_of
from weightproof.curvature.factors import Factors, load_factors
from weightproof.curvature.fitting import fit_factors
from weightproof.curvature.mask import check_energy
from weightproof.curvature.prediction import quadratic_form
from weightproof.curvature.projection import FORMULAS, FactorBases, edit_matrix, project
from weightproof.curvature.targets import too_large
from weightproof.edits.selection import Selection
from weightproof.errors import InputError
from weightproof.kinds import Plain
from weightproof.snapshot import MatrixBits, write_matrix
from weightproof.types import WeightMatrix
from weightproof.weights import iter_weight_matrices

__all__ = ["KFAC", "KFACReading", "edit_matrix"]

# The maps into the hidden layer of an MLP, of Llama, Mixtral and GPT-2 style models (arXiv:2510.24256, 4.2).
DEFAULT_TARGETS = ("*.mlp.gate_proj*", "*.mlp.up_proj*", "*.mlp.c_fc*")


@dataclass(frozen=True)
class KFACReading:
    """What the edit does to one matrix.

    Attributes:
        name: Of the matrix.
        kept_pairs: Share of the pairs of directions that are kept, 0 to 1.
        kept_mass: Share of their saliency that is kept, 0 to 1.
        relative_change: ||W' - W||_F / ||W||_F.
        predicted_loss_change: 1/2 tr(G E A E'), nats per token.
        tokens: On which the factors were fitted.
    """

    name: str
    kept_pairs: float
    kept_mass: float
    relative_change: float
    predicted_loss_change: float | None
    tokens: int


@dataclass(frozen=True, eq=False)
class KFAC(Selection):
    """Keep the pairs of directions that carry `energy` of each matrix's curvature.

    Attributes:
        factors: Fitted at the weights that are edited (`weightproof.fit_factors`), or the path of their file.
        energy: Share of the saliency that is kept, 0 to 1; 1 changes nothing.
        formula: "original" (lambda_i mu_j), "modified" (times C_ij^2) or "ekfac" (corrected eigenvalues).
        energies: Other energies for some matrices, by glob on their names; the first that matches. One that matches
            none of those that are edited is an error.
        sequential: Fit the factors of each matrix anew after the ones before it were edited: an edited layer shifts
            the inputs of the next. Needs `batches`, and one pass over them for each matrix.
        batches: Data for `sequential`, as for `weightproof.fit_factors`.
        include: Globs on matrix names; by default the maps into the hidden layer of MLPs.
        exclude: Globs that win over `include`.
        planned: What `prepare` found for `sequential`.

    Raises:
        InputError: If an energy is out of range, the formula is unknown, or data is missing.
    """

    factors: Factors = field(repr=False)
    energy: float = 0.6
    formula: str = "original"
    energies: Mapping[str, float] = field(default_factory=dict[str, float])
    sequential: bool = False
    batches: Any = field(default=None, repr=False, kw_only=True)
    include: tuple[str, ...] = field(default=DEFAULT_TARGETS, kw_only=True)
    planned: Mapping[str, Tensor] | None = field(default=None, repr=False, kw_only=True)

    FAMILIES = None

    def __post_init__(self) -> None:
        """Validate the parameters."""
        super().__post_init__()
        if isinstance(self.factors, str | Path):
            object.__setattr__(self, "factors", load_factors(self.factors))
        if not isinstance(self.factors, Factors):
            raise InputError("KFAC needs factors: fit them (weightproof.fit_factors) or give the path of a file")
        for energy in (self.energy, *self.energies.values()):
            check_energy(energy)
        if self.formula not in FORMULAS:
            raise InputError(f"formula must be one of {', '.join(FORMULAS)}, not {self.formula!r}")
        if self.sequential and (self.batches is None or iter(self.batches) is iter(self.batches)):
            raise InputError(
                "sequential=True reads the data once for each matrix: give batches= that can be read again"
            )
        if self.sequential and self.formula == "ekfac":
            raise InputError("formula 'ekfac' cannot be sequential: its eigenvalues belong to one set of factors")

    @property
    def name(self) -> str:
        """`kfac-<formula>-energy<share>`, with `-sequential`."""
        return f"kfac-{self.formula}-energy{self.energy:g}{'-sequential' if self.sequential else ''}"

    @property
    def kind(self) -> Plain:
        """No promise: outputs decide."""
        return Plain("unknown")

    def params(self) -> dict[str, Any]:
        """All parameters but the data, with the hash of the factors and what they were fitted on."""
        return {
            "energy": self.energy,
            "formula": self.formula,
            "energies": dict(self.energies),
            "sequential": self.sequential,
            "factors": self.factors.digest,
            "fitted_on": dict(vars(self.factors.source)),
            **self.selection_params(),
        }

    def selects(self, matrix: WeightMatrix) -> bool:
        """Whether `matrix` has factors, is included and not excluded."""
        return matrix.name in self.factors and super().selects(matrix)

    def unmatched(self, matrices: Iterable[WeightMatrix]) -> tuple[str, ...]:
        """Patterns of `include` that choose nothing; of the default ones some always do.

        Raises:
            InputError: If the factors are of another model, what a pattern chooses has none, or one of `energies` names
            no matrix that is edited; says why.
        """
        matrices = list(matrices)
        self.factors.require_matrices(matrices)
        if self.include == DEFAULT_TARGETS:
            self._require_default(matrices)
            self._require_energies(matrices)
            return ()
        for glob in self.include:
            chosen = [one for one in matrices if one.refusal is None and self._chooses(glob, one)]
            if chosen and not any(one.name in self.factors for one in chosen):
                raise InputError(f"{glob!r} chooses nothing with factors: {self._why_none(chosen[0])}")
        unmatched = super().unmatched(matrices)
        if not unmatched:
            self._require_energies(matrices)
        return unmatched

    def _require_energies(self, matrices: Iterable[WeightMatrix]) -> None:
        """An energy for a matrix that is not edited is a slip, and would silently leave another matrix with its own."""
        names = [one.name for one in matrices if self.selects(one)]
        for glob in self.energies:
            if not any(_is_named(name, glob) for name in names):
                raise InputError(f"energies: {glob!r} matches none of the {len(names)} matrices that are edited")

    def _require_default(self, matrices: Iterable[WeightMatrix]) -> None:
        if not any(self.selects(one) for one in matrices):
            raise InputError(
                "these factors are of none of the matrices that are edited by default, the maps into the hidden layer "
                f"of MLPs: choose others by include (factors: {', '.join(list(self.factors)[:3])}, ...)"
            )

    def _why_none(self, matrix: WeightMatrix) -> str:
        """Why a matrix has no factors."""
        shape = f"{matrix.name} ({matrix.d_out} x {matrix.d_in})"
        reason = self.factors.refused.get(matrix.name) or too_large(matrix.d_out, matrix.d_in)
        return f"{shape}: {reason or f'it was not among the {len(self.factors)} matrices that were fitted'}"

    def _chooses(self, pattern: str, matrix: WeightMatrix) -> bool:
        """As elsewhere, and by names without `.weight`, as `fit_factors` takes them."""
        return super()._chooses(pattern, matrix) or _is_named(matrix.name, pattern)

    def energy_of(self, name: str) -> float:
        """The share that one matrix keeps."""
        chosen = (energy for glob, energy in self.energies.items() if _is_named(name, glob))
        return next(chosen, self.energy)

    def prepare(self, session: Any) -> KFAC:
        """The edit, proven to be for this model; with `sequential`, planned matrix by matrix. Weights stay as they are.

        Raises:
            InputError: If the factors are of another model or of other weights, or of fewer tokens than dimensions.
        """
        self.factors.require_weights(session.model)
        self.factors.require_enough_tokens()
        if not self.sequential:
            return self
        return replace(self, planned=self._one_after_another(session.model))

    def plan(self, matrix: WeightMatrix, context: object = None) -> Tensor | None:
        """The edited matrix (d_out, d_in) in its storage dtype; None when it stays as it is. Pure."""
        if not self.selects(matrix) or self.energy_of(matrix.name) == 1.0:
            return None
        if self.planned is not None:
            return self.planned[matrix.name]
        return self._edited(matrix, self.factors)[0]

    def read(self, matrix: WeightMatrix) -> KFACReading:
        """What the edit would do to one matrix; nothing is written."""
        weight, factor = matrix.load().detach(), self.factors[matrix.name]
        edited, pairs, mass = self._edited(matrix, self.factors)
        change = (edited - weight).to(torch.float64)
        norm = float(weight.to(torch.float64).norm())
        predicted = quadratic_form(change, factor.activation_covariance, factor.gradient_covariance)
        relative = float(change.norm()) / norm if norm else 0.0
        return KFACReading(matrix.name, pairs / weight.numel(), mass, relative, predicted, factor.tokens)

    def bases(self, name: str) -> FactorBases:
        """The decomposed factors of one matrix."""
        return bases_of(self.factors[name])

    def _edited(self, matrix: WeightMatrix, factors: Factors) -> tuple[Tensor, int, float]:
        """The edited matrix, how many pairs it keeps and how much of the saliency."""
        factor, weight, energy = factors[matrix.name], matrix.load().detach(), self.energy_of(matrix.name)
        if energy == 1.0:
            return weight.clone(), weight.numel(), 1.0
        bases = bases_of(factor)
        try:
            edited, mask = project(weight, bases, energy, self.formula)
        except InputError as error:
            raise InputError(f"{matrix.name}: {error}") from error
        return edited, mask.kept_pairs, mask.kept_mass

    def _one_after_another(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """Each matrix edited by factors that saw the edits before it; the model gets its own weights back."""
        source, found = self.factors.source, {}
        chosen = [matrix for matrix in iter_weight_matrices(model) if self.selects(matrix)]
        kept = MatrixBits(chosen)
        try:
            for matrix in chosen:
                factors = fit_factors(
                    model, self.batches, (matrix.name,), source.labels, source.seed,
                    loss_tokens_only=source.loss_tokens_only, progress=False,
                )  # fmt: skip
                found[matrix.name] = self._edited(matrix, factors)[0]
                write_matrix(matrix, found[matrix.name])
        finally:
            kept.put_back()
        return found


def _is_named(name: str, glob: str) -> bool:
    """Whether a glob names a matrix, with `.weight` at its end or without, as `fit_factors` takes them."""
    return fnmatchcase(name, glob) or fnmatchcase(name.removesuffix(".weight"), glob)


def chosen_by(edit: KFAC, model: torch.nn.Module) -> list[WeightMatrix]:
    """The matrices that an edit changes, with its factors proven to be of this model.

    Raises:
        InputError: If they are not, or are of too few tokens, or a pattern chooses nothing.
    """
    edit.factors.require_weights(model)
    edit.factors.require_enough_tokens()
    matrices = list(iter_weight_matrices(model))
    if unmatched := edit.unmatched(matrices):
        raise InputError(
            f"{unmatched[0]!r} chooses no weight matrix of this model: see `weightproof inspect` for names"
        )
    return [matrix for matrix in matrices if edit.selects(matrix)]


def readings_of(edit: KFAC, model: torch.nn.Module) -> list[KFACReading]:
    """What an edit would do to each matrix that it selects; the model stays as it is.

    Raises:
        InputError: As `chosen_by`.
    """
    return [edit.read(matrix) for matrix in chosen_by(edit, model)]
