"""GPTQ, AWQ and compressed-tensors containers made by hand from their formats, each with a slow forward pass.

Codes are packed and unpacked bit by bit here, so that the fast readers have something to be held against.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def pack_line(codes: list[int], bits: int) -> list[int]:
    """Codes one after the other, the lowest bits first, in as many words of 32 bits as it takes."""
    whole = sum(code << (index * bits) for index, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [_signed((whole >> (32 * index)) & 0xFFFFFFFF) for index in range(count)]


def unpack_line(words: list[int], bits: int, length: int) -> list[int]:
    whole = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
    return [(whole >> (index * bits)) & (2**bits - 1) for index in range(length)]


def packed_rows(codes: np.ndarray, bits: int) -> Tensor:
    return torch.tensor([pack_line(row, bits) for row in codes.tolist()], dtype=torch.int32)


def unpacked_rows(words: Tensor, bits: int, length: int) -> np.ndarray:
    return np.array([unpack_line(row, bits, length) for row in words.tolist()])


def asymmetric(weight: Tensor, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Codes (d_in, d_out), zero points and scales (groups, d_out) of a weight (d_out, d_in), round to nearest."""
    groups = weight.detach().T.reshape(-1, group_size, weight.shape[0])
    low, high = groups.amin(1).clamp(max=0.0), groups.amax(1).clamp(min=0.0)
    scales = (high - low).clamp(min=1e-6) / (2**bits - 1)
    zeros = (-low / scales).round()
    codes = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 2**bits - 1).flatten(0, 1)
    return codes.long().numpy(), zeros.long().numpy(), scales


class GptqContainer(nn.Module):
    """QuantLinear: codes packed along the inputs, zero points (less one, in format 1) along the outputs."""

    def __init__(self, layer: nn.Linear, bits: int = 4, group_size: int = 16, qzeros_format: int = 1) -> None:
        super().__init__()
        self.bits, self.group_size = bits, group_size
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._qzeros_format = qzeros_format
        self.REQUIRES_FORMAT_V2 = False
        codes, zeros, scales = asymmetric(layer.weight, bits, group_size)
        stored = (zeros - (qzeros_format == 1)) % 2**bits
        self.register_buffer("qweight", packed_rows(codes.T, bits).T.contiguous())
        self.register_buffer("qzeros", packed_rows(stored, bits))
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", torch.arange(self.in_features, dtype=torch.int32) // group_size)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def qzero_format(self) -> int:
        return self._qzeros_format

    def weight_in_use(self) -> Tensor:
        codes = unpacked_rows(self.qweight.T, self.bits, self.in_features).T
        zeros = (unpacked_rows(self.qzeros, self.bits, self.out_features) + (self._qzeros_format == 1)) % 2**self.bits
        groups = self.g_idx.numpy()
        return (torch.from_numpy(codes - zeros[groups]) * self.scales[self.g_idx.long()]).T.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight_in_use(), self.bias)


class AwqContainer(nn.Module):
    """WQLinear_GEMM: codes and zero points packed along the outputs, interleaved within a word."""

    def __init__(self, layer: nn.Linear, group_size: int = 16) -> None:
        super().__init__()
        self.w_bit, self.group_size = 4, group_size
        self.in_features, self.out_features = layer.in_features, layer.out_features
        codes, zeros, scales = asymmetric(layer.weight, 4, group_size)
        order = np.concatenate([word * 8 + np.array(AWQ_ORDER) for word in range(self.out_features // 8)])
        self.register_buffer("qweight", packed_rows(codes[:, order], 4))
        self.register_buffer("qzeros", packed_rows(zeros[:, order], 4))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self._order = order.tolist()

    def weight_in_use(self) -> Tensor:
        back = np.argsort(self._order)
        codes, zeros = (unpacked_rows(words, 4, self.out_features)[:, back] for words in (self.qweight, self.qzeros))
        groups = np.arange(self.in_features) // self.group_size
        return (torch.from_numpy(codes - zeros[groups]) * self.scales[torch.from_numpy(groups)]).T.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight_in_use(), self.bias)


class CompressedContainer(nn.Module):
    """A pack-quantized module of compressed-tensors: symmetric codes packed along a row, from half the range on."""

    def __init__(self, layer: nn.Linear, bits: int = 4, group_size: int = 16) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weights = SimpleNamespace(
            num_bits=bits, group_size=group_size, symmetric=True, dynamic=False, type="int", strategy="group"
        )
        self.quantization_scheme = SimpleNamespace(weights=weights)
        groups = layer.weight.detach().reshape(self.out_features, -1, group_size)
        scales = groups.abs().amax(-1).clamp(min=1e-6) / (2 ** (bits - 1) - 0.5)
        codes = (groups / scales[..., None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).flatten(1)
        self.weight_packed = nn.Parameter(
            packed_rows((codes + 2 ** (bits - 1)).long().numpy(), bits), requires_grad=False
        )
        self.weight_scale = nn.Parameter(scales, requires_grad=False)
        self.weight_shape = nn.Parameter(torch.tensor(layer.weight.shape), requires_grad=False)
        self.bias = layer.bias

    def weight_in_use(self) -> Tensor:
        bits, size = self.quantization_scheme.weights.num_bits, self.quantization_scheme.weights.group_size
        codes = unpacked_rows(self.weight_packed, bits, self.in_features) - 2 ** (bits - 1)
        return torch.from_numpy(codes) * self.weight_scale.repeat_interleave(size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight_in_use(), self.bias)
