"""Steering: a delta added to a model for as long as a block lasts, at any strength, and taken back bit for bit.

    >>> with steer(model, delta, alpha=0.5) as steering:            # doctest: +SKIP
    ...     low = evaluate(model)
    ...     steering.set(1.0)                                       # from the same snapshot, not on top
    ...     high = evaluate(model)

Names are strict, everything is checked before the first write, W + alpha D is made in float32 and rounded once, and
alpha = 0 is the model as it was, to the last bit. To change a model for good, under guard and with a certificate, use
`edits.steer`. How far one can go is foretold by `safe_alpha` and found out by `search_alpha`.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from weightproof.alpha.bounds import AlphaTable, SafeAlpha, safe_alpha
from weightproof.alpha.fitting import Target, fitted, moved, require_alpha, require_base, require_range
from weightproof.alpha.hooks import OutputHook, hooked_modules
from weightproof.alpha.search import AlphaSearch, Trial, search_alpha
from weightproof.deltas import Delta
from weightproof.errors import InputError, RestoreError
from weightproof.snapshot import MatrixBits, write_matrix
from weightproof.snapshots.tensor_store import same_bits, tensor_digest
from weightproof.types import WeightMatrix
from weightproof.weights import iter_weight_matrices, unwrap

__all__ = ["AlphaSearch", "AlphaTable", "SafeAlpha", "Steering", "Trial", "safe_alpha", "search_alpha", "steer"]

# Model -> the steerings that are in force, the outermost first.
_ACTIVE: weakref.WeakKeyDictionary[nn.Module, list[Steering]] = weakref.WeakKeyDictionary()


def steer(
    model: nn.Module,
    delta: Delta | Path | str,
    alpha: float = 1.0,
    *,
    same_base: bool = True,
    backup_device: torch.device | str | None = None,
) -> Steering:
    """Add alpha times a delta to a model for as long as the block lasts.

    Args:
        model: Any module; wrappers (DDP, compile, PEFT) are looked through.
        delta: A `Delta`, or the path of one (or of an adapter).
        alpha: How much of it; negative: away from it; 0 leaves every bit as it is.
        same_base: False: add it to other weights than it was made for, too.
        backup_device: Where the original weights are kept meanwhile, such as "cpu"; None: beside them.

    Returns:
        A context manager; `as` gives the `Steering`, whose `set(alpha)` changes the strength.

    Raises:
        InputError: On entering, before anything is written: an unknown name, another shape, NaN or inf, weights that
            the delta was not made for, or a model that is sharded over processes.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> with steer(model, Delta({"0.weight": torch.eye(2)}), alpha=2.0) as steering:
        ...     steering.written
        ('0.weight',)
    """
    return Steering(model, delta, alpha, same_base=same_base, backup_device=backup_device)


class Steering:
    """A delta in force, or about to be; made by `steer`.

    Attributes:
        delta: What is added.
        alpha: The present strength.
        written: Matrices whose weights hold W + alpha D.
        hooked: Matrices that a quantizer packed: nothing is written there; alpha x D' is added to the outputs of their
            modules by a hook instead, as an adapter would.
    """

    def __init__(
        self,
        model: nn.Module,
        delta: Delta | Path | str,
        alpha: float,
        *,
        same_base: bool = True,
        backup_device: torch.device | str | None = None,
    ) -> None:
        self.model = unwrap(model)
        self.delta = delta if isinstance(delta, Delta) else Delta.load(delta)
        self.alpha = require_alpha(alpha)
        self.written: tuple[str, ...] = ()
        self.hooked: tuple[str, ...] = ()
        self._same_base = same_base
        self._backup_device = backup_device
        self._targets: tuple[Target, ...] = ()
        self._hooks: tuple[OutputHook, ...] = ()
        self._kept: MatrixBits | None = None
        self._digests: dict[str, str] = {}

    @property
    def is_active(self) -> bool:
        """Whether the block is being run."""
        return self._kept is not None

    def set(self, alpha: float) -> None:
        """Another strength, from the original weights: what was set before leaves no trace.

        Raises:
            InputError: It is not in force, another steering was begun in it, or alpha takes weights out of range;
                nothing was written.
        """
        self._require_innermost("set")
        self._put(require_alpha(alpha))

    def __enter__(self) -> Steering:
        """Check everything, keep the originals, add the delta."""
        if self.is_active:
            raise InputError("this steering is in force already: make another one with weightproof.steer(...)")
        matrices = list(iter_weight_matrices(self.model))
        targets = fitted(self.delta, matrices)
        for target in targets:
            _require_here(target.matrix)
        packed = tuple(target for target in targets if target.matrix.storage is not None)
        self._targets = tuple(target for target in targets if target.matrix.storage is None)
        others = _ACTIVE.setdefault(self.model, [])
        if self._same_base:
            require_base(self.delta, self._targets, lambda matrix: _before(others, matrix))
        modules = hooked_modules(self.model, packed)
        kept = MatrixBits([target.matrix for target in self._targets], self._backup_device)
        self._digests = {name: tensor_digest(values) for name, values in kept.kept().items()}
        self._kept = kept
        self.written = tuple(target.matrix.name for target in self._targets)
        self.hooked = tuple(target.matrix.name for target in packed)
        others.append(self)
        try:
            for module, part in modules:
                self._hooks += (OutputHook(module, part),)
            self._put(self.alpha)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the originals back, bit for bit, and prove it, whatever happened in the block.

        Raises:
            InputError: A steering that was begun in this one is still in force; end that first.
            RestoreError: A weight does not hold its original values, or was replaced in the block.
        """
        self._require_innermost("end")
        self._end()

    def _put(self, alpha: float) -> None:
        """Make the weights those of a strength; after an error those of the model as it was."""
        assert self._kept is not None
        originals = self._kept.kept()
        require_range(self._targets, originals, alpha)
        try:
            if alpha == 0.0:
                self._kept.put_back()
            for matrix, part in self._targets if alpha else ():
                write_matrix(matrix, moved(originals[matrix.name].to(matrix.load().device), part, alpha))
        except BaseException:
            self._kept.put_back()
            self._note(0.0)
            raise
        self._note(alpha)

    def _note(self, alpha: float) -> None:
        self.alpha = alpha
        for hook in self._hooks:
            hook.alpha = alpha

    def _end(self) -> None:
        kept, self._kept = self._kept, None
        assert kept is not None
        try:
            for hook in self._hooks:
                hook.remove()
            try:
                kept.put_back()
            except KeyboardInterrupt:
                kept.put_back()  # one interrupt does not leave the model half restored
                raise
            self._prove(kept)
        finally:
            self._hooks = ()
            _ACTIVE[self.model].remove(self)

    def _prove(self, kept: MatrixBits) -> None:
        """Every matrix of the model as it is walked now holds what it held, by bits and by digest."""
        now = {matrix.name: matrix for matrix in iter_weight_matrices(self.model)}
        for name, values in kept.kept().items():
            if name not in now or not same_bits(now[name].load(), values):
                raise RestoreError(
                    f"{name} was replaced inside the block (by a cast, a move or another module), so that restoring "
                    "its old storage did not restore the model: do not use it"
                )
            if tensor_digest(values) != self._digests[name]:
                raise RestoreError(f"the kept copy of {name} was altered: do not use the model")

    def _require_innermost(self, what: str) -> None:
        if not self.is_active:
            raise InputError(f"cannot {what} a steering that is not in force: use it as `with weightproof.steer(...)`")
        if _ACTIVE[self.model][-1] is not self:
            raise InputError(f"cannot {what} a steering while another one that was begun in it is in force")

    def __repr__(self) -> str:
        """Strength, and where it is written or added to outputs."""
        state = "in force" if self.is_active else "not in force"
        hooked = f", {len(self.hooked)} by hooks on packed weights" if self.hooked else ""
        return f"Steering(alpha={self.alpha:g}, {len(self.written)} matrices written{hooked}, {state})"


def _require_here(matrix: WeightMatrix) -> None:
    if matrix.shard is not None:
        raise InputError(
            f"{matrix.name} is sharded over processes (FSDP, ZeRO): nothing was written. Use session.apply(edits.steer("
            "delta, alpha)), which writes each process's part and can take it back, or steer the model before sharding"
        )
    if matrix.storage is None and not matrix.is_view:
        raise InputError(
            f"{matrix.name} is strided in an unusual way, so that it cannot be written in place: nothing was written"
        )


def _before(others: list[Steering], matrix: WeightMatrix) -> Tensor:
    """What a matrix held before any steering that is in force: the outermost one that writes it knows."""
    for one in others:
        if one._kept is not None and matrix.name in one.written:
            return one._kept.kept()[matrix.name]
    return matrix.load()
