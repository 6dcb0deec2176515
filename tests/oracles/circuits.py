"""Circuits the slow, obvious way: the products themselves, d x d, and their singular values by SVD in float64."""

from __future__ import annotations

import torch


def qk_values(q: torch.Tensor, k: torch.Tensor, num_heads: int, num_kv_heads: int, gain=None) -> torch.Tensor:
    """All singular values of W_q,h' W_k,h over heads, (num_heads * head_dim,), descending."""
    size = q.shape[0] // num_heads
    found = []
    for head in range(num_heads):
        shared = head // (num_heads // num_kv_heads)
        left = q[head * size : (head + 1) * size].double()
        right = k[shared * size : (shared + 1) * size].double()
        if gain is not None:
            left, right = left * gain.double(), right * gain.double()
        found.append(torch.linalg.svdvals(left.t() @ right)[:size])
    return torch.cat(found).sort(descending=True).values


def ov_values(o: torch.Tensor, v: torch.Tensor, num_heads: int, num_kv_heads: int, gain=None) -> torch.Tensor:
    """All singular values of W_o,h W_v,h over heads, descending."""
    size = o.shape[1] // num_heads
    found = []
    for head in range(num_heads):
        shared = head // (num_heads // num_kv_heads)
        reads = v[shared * size : (shared + 1) * size].double()
        if gain is not None:
            reads = reads * gain.double()
        found.append(torch.linalg.svdvals(o[:, head * size : (head + 1) * size].double() @ reads)[:size])
    return torch.cat(found).sort(descending=True).values
