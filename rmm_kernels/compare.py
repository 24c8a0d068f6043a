"""What the same bytes would buy otherwise: adapters cut to a lower rank, or quantised, each for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import delta
from .adapters import Adapter, FactorStack
from .storage import Alternative

_SCALE_BYTES = 4  # one fp32 scale for each row of a quantised factor


@dataclass(frozen=True)
class _Method:
    name: str
    size: Callable[[Adapter, str], int]
    """bytes of one module of one adapter"""
    approximate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """lora_a [n, r, in] and lora_b [n, out, r] as the method would give them back"""


def alternatives(adapters: Sequence[Adapter], merged_bytes: int, modules: Iterable[str]) -> tuple[Alternative, ...]:
    """Bytes and errors of every adapter truncated to the highest rank that fits in `merged_bytes`, in int8, and in int4."""
    methods = [_truncated(adapters, merged_bytes), _quantised(8), _quantised(4)]
    squares: dict[str, list[tuple[float, float]]] = {method.name: [] for method in methods}
    with FactorStack() as stack_a, FactorStack() as stack_b:
        for module in modules:
            present = [adapter for adapter in adapters if module in adapter]
            rank = max(adapter.rank(module) for adapter in present)
            scaling = [adapter.scaling(module) for adapter in present]
            a = stack_a.fill(present, module, "A", rank, torch.float32)
            b = stack_b.fill(present, module, "B", rank, torch.float32)
            for method in methods:
                new_a, new_b = method.approximate(a, b)
                squares[method.name] += delta.squares(delta.grams(a.mT, new_a.mT), delta.grams(b, new_b), scaling)
    return tuple(
        Alternative(
            method.name,
            sum(method.size(adapter, module) for adapter in adapters for module in adapter.modules),
            delta.relative(squares[method.name]),
        )
        for method in methods
    )


def _truncated(adapters: Sequence[Adapter], merged_bytes: int) -> _Method:
    """Every adapter's ΔW at the highest rank whose factors fit."""

    def size(adapter: Adapter, module: str, rank: int) -> int:
        return adapter.factor_bytes(module) * min(rank, adapter.rank(module)) // adapter.rank(module)

    def total(rank: int) -> int:
        return sum(size(adapter, module, rank) for adapter in adapters for module in adapter.modules)

    rank = max(adapter.rank(module) for adapter in adapters for module in adapter.modules)
    while rank and total(rank) > merged_bytes:
        rank -= 1
    return _Method(
        f"truncated to rank {rank}", lambda adapter, module: size(adapter, module, rank), lambda a, b: truncate(a, b, rank)
    )


def truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors √S Vᵀ and U√S of the best rank-`rank` approximation of b @ a, in the shapes of a and b, zero beyond that rank.

    Through thin QRs of the factors and the SVD of an r × r core.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = s[:, None, :rank].sqrt()
    kept = root.shape[2]
    new_a, new_b = torch.zeros_like(a), torch.zeros_like(b)
    new_a[:, :kept] = (q_a @ (vh[:, :rank].mT * root)).mT
    new_b[:, :, :kept] = q_b @ (u[:, :, :rank] * root)
    return new_a, new_b


def _quantised(bits: int) -> _Method:
    def size(adapter: Adapter, module: str) -> int:
        (out, wide), rank = adapter.shape(module), adapter.rank(module)
        return (rank * (out + wide) * bits + 7) // 8 + _SCALE_BYTES * (rank + out)

    return _Method(f"int{bits}", size, lambda a, b: (quantise(a, bits), quantise(b, bits)))


def quantise(x: Tensor, bits: int) -> Tensor:
    """x [..., rows, columns] rounded to `bits`-bit integers, symmetric about 0, times one scale for each row."""
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True) / most
    return torch.where(scale > 0, (x / scale).round() * scale, 0.0)
