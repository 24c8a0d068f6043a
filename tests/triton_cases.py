"""What tests/test_triton_aot.py compiles, runs in the simulator and gates: every Triton op at its shipped configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from ops import randn
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of a Triton op, on CPU tensors.

    Attributes:
        name: unique: op, sizes, dtype, layout.
        call: makes the arguments, calls the launcher, and returns the tensors it read and wrote.
        bytes: the traffic that the op's model says.
        dot: a tensor-core product is meant: mma on every arch that has it.
        wgmma: on sm_90 that is wgmma.
        wide_loads: global loads of 128 bits are meant.
        asynchronous: loads are pipelined through shared memory.
        targets: what it is compiled for; None is everything.
    """

    name: str
    call: Callable[[], Any]
    bytes: int
    dot: bool = False
    wgmma: bool = False
    wide_loads: bool = True
    asynchronous: bool = False
    targets: tuple[str, ...] | None = None


def size(*tensors: Tensor) -> int:
    """Bytes of tensors read or written once."""
    return sum(value.numel() * value.element_size() for value in tensors)


def _x(n: int, positions: int, r: int, dtype: torch.dtype, innermost: str, seed: int = 0) -> Tensor:
    """[n, positions, r] with `innermost`, "rank" or "position", contiguous in memory."""
    if innermost == "rank":
        return randn(n, positions, r, seed=seed, dtype=dtype)
    return randn(n, r, positions, seed=seed, dtype=dtype).mT


def _compress(n: int, r: int, p: int, dtype: torch.dtype, innermost: str, positions: int) -> Case:
    values = positions * (n * r + (p + 1) * r + n * p)
    return Case(
        name=f"compress {r}x{n} p={p} {str(dtype)[6:]} {innermost} innermost",
        call=lambda: torch.ops.rmm_kernels.compress.triton(_x(n, positions, r, dtype, innermost), p),
        wide_loads=innermost == "rank",
        bytes=values * dtype.itemsize + positions * 4 * min(r, n - 1),
    )


def _truncated_svd(m: int, k: int, rank: int, batch: int) -> Case:
    return Case(
        name=f"truncated_svd {m}x{k} rank={rank}",
        call=lambda: torch.ops.rmm_kernels.truncated_svd.triton(randn(batch, m, k, seed=1), rank),
        bytes=4 * batch * (m * k + rank * (m + k + 1)),
    )


def _gram(m: int, k: int, batch: int, dtype: torch.dtype, center: bool) -> Case:
    return Case(
        name=f"gram {m}x{k} {str(dtype)[6:]}{' centred' if center else ''}",
        call=lambda: torch.ops.rmm_kernels.gram.triton(randn(batch, m, k, seed=2, dtype=dtype), center),
        dot=dtype != torch.float32 and not center and k > 16,
        wide_loads=dtype == torch.float32 or k > 16,
        bytes=batch * (m * k * dtype.itemsize + 4 * k * k),
    )


def _project(n: int, r: int, p: int, positions: int, dtype: torch.dtype, innermost: str) -> Case:
    values = positions * (n * r + (p + 1) * r + n * p)
    return Case(
        name=f"project {r}x{n} p={p} {str(dtype)[6:]} {innermost} innermost",
        call=lambda: torch.ops.rmm_kernels.project.triton(
            _x(n, positions, r, dtype, innermost), _x(p + 1, positions, r, dtype, innermost, 1)
        ),
        wide_loads=innermost == "rank",
        bytes=values * dtype.itemsize,
    )


def _reconstruct(n: int, r: int, p: int, asked: int, positions: int, dtype: torch.dtype, innermost: str) -> Case:
    values = positions * ((p + 1) * r + asked * p + asked * r)
    return Case(
        name=f"reconstruct {r}x{n} p={p} {str(dtype)[6:]} {innermost} innermost",
        call=lambda: torch.ops.rmm_kernels.reconstruct.triton(
            _x(p + 1, positions, r, dtype, innermost), randn(n, p, positions, seed=1, dtype=dtype), torch.arange(asked)
        ),
        wide_loads=innermost == "rank",
        bytes=values * dtype.itemsize + 8 * asked,
    )


_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16

CASES: list[Case] = [
    _compress(8, 16, 4, _F32, "rank", 128),
    _compress(8, 16, 4, _BF16, "position", 128),
    _compress(8, 16, 4, _F32, "position", 128),
    _compress(8, 16, 4, _BF16, "rank", 128),
    _compress(8, 16, 7, _F32, "rank", 64),
    _compress(8, 32, 4, _F32, "position", 64),
    *(_compress(8, 64, 4, dtype, "position", 32) for dtype in (_F32, _BF16)),
    _compress(8, 64, 4, _F32, "rank", 64),
    _compress(20, 16, 4, _F32, "rank", 64),
    _compress(20, 16, 4, _F32, "position", 64),
    _compress(20, 16, 4, _BF16, "position", 64),
    *(_compress(64, 16, 4, _F32, innermost, 32) for innermost in ("rank", "position")),
    _compress(130, 4, 3, _F32, "rank", 32),
    _compress(130, 4, 3, _BF16, "position", 32),
    _compress(130, 8, 3, _F32, "rank", 32),
    _compress(300, 4, 3, _F32, "position", 16),
    _compress(34, 64, 6, _F32, "rank", 8),
    _truncated_svd(16, 8, 4, 64),
    _truncated_svd(32, 64, 32, 4),
    *(_gram(16, 8, 64, dtype, center) for dtype in (_F32, _F16) for center in (False, True)),
    _gram(64, 64, 4, _BF16, False),
    *(_project(8, 16, 4, 256, dtype, innermost) for dtype in (_F32, _BF16) for innermost in ("rank", "position")),
    *(_reconstruct(64, 16, 4, 8, 256, dtype, innermost) for dtype in (_F32, _BF16) for innermost in ("rank", "position")),
]
