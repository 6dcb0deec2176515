"""How samples become a subspace: principal directions, cluster centres, the plane of a rotation. Pure functions.

States are decomposed about their mean; differences about zero, because a difference that is the same for every prompt
is the effect itself. Directions that are only rounding are dropped, so a basis may have fewer columns than asked for:
n centred samples give n - 1 at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightproof.subspace import RELATIVE_TOLERANCE, orthonormal

CLUSTERS, ROUNDS = 8, 8
JOINT_RANK = 32


def principal(samples: Tensor, rank: int, *, about_zero: bool = False, noise: float = 0.0) -> Tensor:
    """The leading principal directions of samples (n, d): (d, <= rank), orthonormal.

    Args:
        samples: One in each row.
        rank: Keep at most as many.
        about_zero: Do not take out the mean first: for differences.
        noise: Directions whose singular value is not above this are rounding.
    """
    work = samples.to(torch.float64)
    columns = (work if about_zero else work - work.mean(0, keepdim=True)).T
    # What is left of equal states when their mean is taken out is rounding, too.
    noise = max(noise, RELATIVE_TOLERANCE * 1e-3 * float(torch.linalg.vector_norm(work)))
    basis = orthonormal(columns, rank)
    return basis[:, torch.linalg.vector_norm(basis.T @ columns, dim=1) > noise]


def centres(samples: Tensor, count: int = CLUSTERS, rounds: int = ROUNDS) -> Tensor:
    """Centres of clusters (k, d) by Lloyd's iteration, without a random number.

    It begins at the `count` samples that are farthest from the mean; of equally near centres the first has the sample,
    and a centre that nobody is near to stays where it is.
    """
    work = samples.to(torch.float64)
    work = work - work.mean(0, keepdim=True)
    lengths = torch.linalg.vector_norm(work, dim=1)
    order = torch.sort(lengths, descending=True, stable=True).indices
    found = work[order[:count]].clone()
    for _ in range(rounds):
        nearest = torch.cdist(work, found, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        for index in nearest.unique().tolist():
            found[index] = work[nearest == index].mean(0)
    return found


def rotation(before: Tensor, after: Tensor, rank: int, joint_rank: int = JOINT_RANK) -> Tensor:
    """The planes in which one set of samples is turned into another: (d, <= rank), orthonormal.

    Both, each about its own mean, are written in their joint principal directions. R = U V' from the SVD of
    X' Y is the rotation that turns X into Y best (orthogonal Procrustes, Schönemann 1966), the planes are the leading
    singular vectors of its skew part (R - R') / 2. Where the samples say nothing of a direction R leaves it out: any
    other choice there would be arbitrary. Planes come whole, so an odd `rank` gives one column less.

    Args:
        before: X, (n, d).
        after: Y, (n, d), row by row of the same prompts.
        rank: Keep at most as many columns.
        joint_rank: Principal directions of both together in which the rotation is sought.
    """
    x, y = (one.to(torch.float64) for one in (before, after))
    joint = principal(torch.cat([x, y]), joint_rank)
    inner = [(one - one.mean(0, keepdim=True)) @ joint for one in (x, y)]
    if min(inner[0].shape) == 0:
        return joint[:, :0]
    u, values, vh = torch.linalg.svd(inner[0].T @ inner[1])
    known = values > RELATIVE_TOLERANCE * values[0]
    turned = u[:, known] @ vh[known]
    skew = (turned - turned.T) / 2.0
    # Values of a skew matrix come in pairs: rounding is dropped against 1, the length of a rotated vector.
    return joint @ orthonormal(skew, rank - rank % 2, scale=1.0)


def bisector(first: Tensor, second: Tensor, rank: int) -> Tensor:
    """Half-way between two subspaces: the sums of their principal vectors, those at the smallest angles first."""
    u, _, vh = torch.linalg.svd(first.T @ second, full_matrices=False)
    return orthonormal(first @ u + second @ vh.T, rank)
