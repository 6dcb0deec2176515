"""Second moments of what each linear map is fed: H = 2 X' X / n, streamed over calibration windows.

The squared error of a layer's outputs when its weights move by E is tr(E H E') / 2 per token, so H says which
rounding errors matter (Frantar and Alistarh, arXiv:2208.11580). Forward hooks add up X' X batch by batch; the batches
are dealt to the processes and the sums added up, with the same bits on every one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.activations import hooked, real_positions
from weightproof.collective import Processes
from weightproof.errors import InputError
from weightproof.families import public_names, unwrap
from weightproof.forward.outputs import read_batches
from weightproof.forward.passes import whole
from weightproof.forward.windows import Windows
from weightproof.parallel.placements import class_of
from weightproof.types import WeightMatrix

_OPERATION = "second moments of layer inputs"


def input_hessians(
    model: nn.Module, matrices: Sequence[WeightMatrix], windows: Sequence[Windows], processes: Processes
) -> dict[str, Tensor]:
    """H (d_in, d_in) of every matrix by name, on the CPU, in float32 (float64 for float64 weights).

    Padding does not count. The model is left as it was (see `weightproof.activations.undisturbed`).

    Args:
        model: The model.
        matrices: Weights of linear maps.
        windows: What the model is run on.
        processes: Who takes part; all call this alike.

    Raises:
        InputError: Naming the matrices, where one is not the weight of a linear module (a stack of experts), none of
            the windows reaches its module, or what reaches it is not finite.
    """
    places = _places(model, matrices)
    watch = _Watch({matrix.name: matrix for matrix in matrices})
    root = unwrap(model)
    handles = [root.register_forward_pre_hook(watch.begin, with_kwargs=True)]
    handles += [place.register_forward_pre_hook(watch.sees(name), with_kwargs=True) for name, place in places.items()]
    with hooked(*handles):
        read_batches(model, windows, processes, watch.end, operation=_OPERATION, with_taps=False)
    found: dict[str, Tensor] = {}
    unreached: list[str] = []
    for matrix in matrices:
        total, count = processes.sum(_OPERATION, list(watch.total(matrix)))
        if not int(count):
            unreached.append(matrix.name)
        elif not bool(torch.isfinite(total).all()):
            raise InputError(
                f"the inputs of {matrix.name} are not finite on the calibration windows: nothing to weigh by"
            )
        else:
            found[matrix.name] = total * (2.0 / int(count))
    if unreached:
        raise InputError(
            f"no calibration window reaches {', '.join(unreached[:3])} ({len(unreached)} matrices), or the model uses "
            "it without calling its module: give more windows, or leave it out with exclude="
        )
    return found


class _Watch:
    """Adds up X' X of each matrix; what a process computed beside its own batches is dropped."""

    def __init__(self, matrices: Mapping[str, WeightMatrix]) -> None:
        self._matrices = matrices
        self._batch: Mapping[str, Any] = {}
        self._pending: dict[str, tuple[Tensor, int]] = {}
        self._totals: dict[str, tuple[Tensor, int]] = {}

    def begin(self, _module: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
        """A batch enters the model."""
        self._batch, self._pending = kwargs, {}

    def sees(self, name: str) -> Any:
        """The hook of one module."""

        def add(_module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            values = args[0] if args else next(iter(kwargs.values()))
            rows = self._real_rows(name, whole(values.detach()))
            _accumulate(self._pending, name, rows.T @ rows, len(rows))

        return add

    def end(self, _place: object, _parts: object, is_own: bool) -> None:
        """A batch left the model."""
        for name, (moment, count) in self._pending.items() if is_own else ():
            _accumulate(self._totals, name, moment.cpu(), count)
        self._pending = {}

    def total(self, matrix: WeightMatrix) -> tuple[Tensor, Tensor]:
        """(X' X, number of rows) on the CPU; given once, to let go of it."""
        nothing = torch.zeros(matrix.d_in, matrix.d_in, dtype=_dtype_of(matrix))
        moment, count = self._totals.pop(matrix.name, (nothing, 0))
        return moment, torch.tensor([count])

    def _real_rows(self, name: str, values: Tensor) -> Tensor:
        """(tokens, d_in) without padding."""
        sides = [part for part in name.split(".") if part in ("encoder", "decoder")]
        decoder = "decoder_input_ids" in self._batch and sides[:1] != ["encoder"]
        real = real_positions(self._batch, values.shape[:-1], decoder=decoder)
        rows = values.reshape(-1, values.shape[-1]) if real is None else values[real.to(values.device)]
        return rows.to(_dtype_of(self._matrices[name]))


def _accumulate(sums: dict[str, tuple[Tensor, int]], name: str, moment: Tensor, count: int) -> None:
    if name in sums:
        known, seen = sums[name]
        moment, count = known + moment, seen + count
    sums[name] = (moment, count)


def _dtype_of(matrix: WeightMatrix) -> torch.dtype:
    return torch.float64 if matrix.dtype == torch.float64 else torch.float32


def _places(model: nn.Module, matrices: Sequence[WeightMatrix]) -> dict[str, nn.Module]:
    """The linear module that each matrix is the weight of."""
    modules = dict(_linear_modules(model))
    found: dict[str, nn.Module] = {}
    for matrix in matrices:
        place = next((modules[name] for name in (matrix.name, *matrix.tied_names) if name in modules), None)
        if place is not None:
            found[matrix.name] = place
    missing = [matrix.name for matrix in matrices if matrix.name not in found]
    if missing:
        raise InputError(
            f"{', '.join(missing[:3])} ({len(missing)} of {len(matrices)} matrices): not the weight of a linear module "
            "of its own, whose inputs could be seen (a stack of experts, an embedding, a convolution). Leave it out by "
            "exclude=, for example exclude=('expert',), and round it with RTN"
        )
    return found


def _linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(public name of the weight, module) of every linear map: nn.Linear and its kin, and transformers' Conv1D."""
    root = unwrap(model)
    modules = list(root.named_modules(remove_duplicate=False))
    tensors = [name for name, _ in root.named_parameters(remove_duplicate=False)]
    tensors += [name for name, _ in root.named_buffers(remove_duplicate=False)]
    public = public_names(tensors)
    for path, module in modules:
        raw = f"{path}.weight" if path else "weight"
        is_conv1d = class_of(module).__name__ == "Conv1D" and hasattr(module, "nf")
        if raw in public and (isinstance(module, nn.Linear) or is_conv1d):
            yield public[raw], module
