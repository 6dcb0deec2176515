"""Loss spikes over a window of training steps, from raw losses. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

# A healthy loss wanders by a few robust standard deviations; both tests must agree, so that a
# nearly constant loss (tiny spread) does not make noise look like a spike.
SPREADS = 6.0
RATIO = 1.2
LAST = 3
# Long enough for a spread, short enough that a loss still falling does not hide a jump back up.
MEMORY = 24


def is_loss_spike(history: Sequence[float], window: Sequence[float]) -> bool | None:
    """Whether the end of `window` lies far above what `history` was used to.

    The mean of the last three raw losses of the window is compared with the median of the last 24
    accepted ones: a spike exceeds it by six robust standard deviations (1.4826 MAD) and by 20 %.

    Args:
        history: Raw losses of accepted windows, oldest first.
        window: Raw losses since the last accepted window.

    Returns:
        None when either side is too short (fewer than 8 accepted losses, no new one) to tell.
        A loss that is not finite is a spike.
    """
    if any(not math.isfinite(loss) for loss in window):
        return True
    known = list(history)[-MEMORY:]
    if len(known) < 8 or not window:
        return None
    centre = median(known)
    spread = 1.4826 * median(abs(loss - centre) for loss in known)
    recent = fmean(list(window)[-LAST:])
    return recent > centre + SPREADS * spread and recent > RATIO * centre
