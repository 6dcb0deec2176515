"""What faults do to tensors: flipped bits, noise, factors. The only writes of this package, all of them on purpose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weightproof.errors import InputError
from weightproof.parallel.placements import local_of

__all__ = ["flip_bit", "overwrite", "pick_element"]

# Bits are flipped in an integer of the same width.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def overwrite(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Write `change(values)` into the part of a tensor that lies here; autograd sees nothing of it.

    Args:
        tensor: A weight, a gradient or a moment; of a sharded one the local part is changed.
        change: Values to values of the same shape, on fresh memory.
    """
    with torch.no_grad():
        local = local_of(tensor).detach()
        local.copy_(change(local.clone()))


def pick_element(tensor: Tensor, seed: int) -> int:
    """Flat index of one element, drawn among the largest tenth of those below 2.

    There a flipped bit is not lost in a zero, and the top bit of the exponent is still to be set: of a larger number
    it is set already, and flipping it makes the number vanish, which harms far less.

    Raises:
        InputError: If the tensor is empty.
    """
    values = local_of(tensor).detach().flatten()
    if values.numel() == 0:
        raise InputError("no bit can be flipped in an empty tensor: choose another one")
    sizes = values.abs().float()
    below = torch.where(sizes < 2.0, sizes, -1.0)
    largest = below.topk(max(1, values.numel() // 10)).indices
    chosen = torch.randint(len(largest), (1,), generator=torch.Generator().manual_seed(seed))
    return int(largest[chosen])


def flip_bit(tensor: Tensor, element: int, bit: int) -> tuple[float, float]:
    """Flip one bit of one element.

    Args:
        tensor: Of any plain dtype.
        element: Flat index, in the part that lies here.
        bit: Counted from the most significant one: 0 is the sign of a floating-point number, 1 the top
            bit of its exponent.

    Returns:
        The value before and after.

    Raises:
        InputError: There is no such element or bit.
    """
    local = local_of(tensor)
    width = 8 * local.element_size()
    if not 0 <= bit < width:
        raise InputError(f"a {local.dtype} has bits 0 to {width - 1}, counted from the most significant: no bit {bit}")
    if not -local.numel() <= element < local.numel():
        raise InputError(f"the tensor has {local.numel()} elements here: no element {element}")
    before = float(local.detach().flatten()[element])

    def flipped(values: Tensor) -> Tensor:
        flat = values.flatten().view(_INTEGERS[local.element_size()])
        mask = -(1 << (width - 1)) if bit == 0 and width > 8 else 1 << (width - 1 - bit)
        flat[element] = flat[element] ^ mask
        return flat.view(values.dtype).reshape(values.shape)

    overwrite(tensor, flipped)
    return before, float(local_of(tensor).detach().flatten()[element])
