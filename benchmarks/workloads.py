"""The registry of workloads: what is run, on which data, how many bytes and operations it must cost, and its targets.

Sizes: n tasks, S positions, r rank, p components, T tokens, d features in and out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OURS = "rmm_kernels"
SHARED_ADAPTERS = Path(__file__).resolve().parents[2] / "shared" / "adapters" / "tasks"


@dataclass(frozen=True)
class Target:
    """The fastest of `peers` must take at least `ratio` times as long as we do."""

    peers: tuple[str, ...]
    ratio: float


@dataclass(frozen=True)
class Workload:
    """One thing to time.

    Attributes:
        op: what is timed; workloads of one op share their peers.
        name: unique; the pytest-benchmark group, so that we and our peers stand together.
        shapes: the sizes above, by name.
        threads: torch's thread count while it runs.
        bytes: the least traffic to memory: every input read once, every output written once.
        flops: the arithmetic it needs, as the function beside the workload counts it.
        make: the inputs, the same on every call.
        targets: what we owe.
    """

    op: str
    name: str
    shapes: dict[str, int]
    threads: int
    bytes: int
    flops: int
    make: Callable[[], Any]
    dtype: torch.dtype = torch.float32
    targets: tuple[Target, ...] = ()


# ---------------------------------------------------------------- compress

SVD = "torch.linalg.svd"
SVD_1_THREAD = "torch.linalg.svd, 1 thread"
EIGH = "Gram + torch.linalg.eigh"


@dataclass(frozen=True)
class CompressInputs:
    x: Tensor  # [n, S, r]
    components: int


def _compress_inputs(n: int, positions: int, r: int, p: int, layout: str) -> CompressInputs:
    generator = torch.Generator().manual_seed(0)
    if layout == "rank innermost":  # as a stack of lora_B
        x = torch.randn(n, positions, r, generator=generator)
    else:  # as a stack of lora_A, turned by its view
        x = torch.randn(n, r, positions, generator=generator).mT
    return CompressInputs(x, p)


def _compress_bytes(n: int, positions: int, r: int, p: int) -> int:
    return 4 * positions * (r * n + (p + 1) * r + p * n + min(r, n - 1))


def _compress_flops(n: int, positions: int, r: int, p: int) -> int:
    """Nominal: QR of the centred matrix (or of its transpose), one-sided Jacobi on the core [K, K] at 8K per pair of columns
    and sweep, the p components through Q, coefficients. Five sweeps up to K = 8 and six beyond, as random matrices need."""
    k, longer = min(r, n - 1), max(r, n - 1)
    centring = 4 * r * n
    qr = 2 * longer * k * k - 2 * k**3 // 3
    jacobi = (5 if k <= 8 else 6) * (k * (k - 1) // 2) * 8 * k
    components = 4 * p * k * r if r >= n - 1 else 0
    coefficients = 2 * p * r * n
    return positions * (centring + qr + jacobi + components + coefficients)


def _compress(r: int, n: int, layout: str, ratio: float, positions: int = 20_000, p: int = 4) -> Workload:
    sizes = {"n": n, "positions": positions, "r": r, "p": p}
    return Workload(
        op="compress",
        name=f"compress {r}x{n}, {layout}",
        shapes=sizes,
        threads=2,
        bytes=_compress_bytes(**sizes),
        flops=_compress_flops(**sizes),
        make=lambda: _compress_inputs(**sizes, layout=layout),
        targets=(Target((SVD, SVD_1_THREAD), ratio),),
    )


COMPRESS = [
    _compress(r, n, layout, ratio)
    for r, n, ratio in ((16, 8, 45), (16, 20, 25), (32, 8, 22), (64, 8, 15), (16, 64, 30))
    for layout in ("rank innermost", "positions innermost")
]

# ---------------------------------------------------------------- forward


@dataclass(frozen=True)
class ForwardInputs:
    """Arguments of lora_forward_; `basis_b` lies in memory as [p+1, r, out], the layout that op is fastest on."""

    y: Tensor  # [T, d]
    x: Tensor  # [T, d]
    basis_a: Tensor  # [p+1, r, d]
    coeff_a: Tensor  # [n, p, d]
    basis_b: Tensor  # [p+1, d, r]
    coeff_b: Tensor  # [n, p, d]
    task_ids: Tensor  # [T]
    scaling: Tensor  # [n]

    def arguments(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())


def _forward_inputs(n: int, tokens: int, active: int, r: int, p: int, d: int) -> ForwardInputs:
    """`active` tasks out of n, each with as many tokens, in random order."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tasks = torch.randperm(n, generator=generator)[:active].repeat_interleave(tokens // active)
    return ForwardInputs(
        y=torch.zeros(tokens, d),
        x=randn(tokens, d),
        basis_a=randn(p + 1, r, d) / d**0.5,
        coeff_a=randn(n, p, d),
        basis_b=randn(p + 1, r, d).mT / r**0.5,
        coeff_b=randn(n, p, d),
        task_ids=tasks[torch.randperm(tokens, generator=generator)],
        scaling=torch.rand(n, generator=generator) + 0.5,
    )


def _forward_bytes(n: int, tokens: int, active: int, r: int, p: int, d: int) -> int:
    """Both bases, the coefficients of the active tasks, x read, y read and written."""
    return 4 * (2 * (p + 1) * r * d + 2 * active * p * d + 3 * tokens * d)


def _forward_flops(n: int, tokens: int, active: int, r: int, p: int, d: int) -> int:
    """The cheaper of two forms: p + 1 shared products per token, or one after restoring the active tasks' factors."""
    direct = tokens * 2 * d * (2 * (p + 1) * r + 2 * p)
    restored = active * 2 * d * 2 * p * r + tokens * 2 * d * 2 * r
    return min(direct, restored)


def _forward(tokens: int, n: int, active: int, targets: tuple[Target, ...] = ()) -> Workload:
    sizes = {"n": n, "tokens": tokens, "active": active, "r": 16, "p": 3, "d": 4096}
    return Workload(
        op="lora_forward_",
        name=f"forward T={tokens}, {active} of {n} tasks",
        shapes=sizes,
        threads=1,
        bytes=_forward_bytes(**sizes),
        flops=_forward_flops(**sizes),
        make=lambda: _forward_inputs(**sizes),
        targets=targets,
    )


PEFT = "PEFT mixed batch"
GATHER = "gather + bmm"
GROUPED = "grouped bmm"

FORWARD = [
    _forward(1, 64, 1),
    _forward(8, 64, 8),
    _forward(64, 64, 64, (Target((PEFT,), 8), Target((GATHER,), 5))),
    _forward(256, 8, 8, (Target((PEFT,), 4), Target((GATHER, GROUPED), 1 / 1.3))),
]

# ---------------------------------------------------------------- merge

SCRIPT = "torch.linalg.svd script"
SCRIPT_1_THREAD = "torch.linalg.svd script, 1 thread"
VLORA = "vlora-dev"
LORASHARE = "lorashare"


@dataclass(frozen=True)
class MergeInputs:
    adapters: dict[str, Path]  # task name → PEFT directory
    components: int


def real_adapters() -> dict[str, Path]:
    """The shared rank-16 adapters by task name; empty where this checkout has none beside it."""
    return {path.parent.name: path for path in sorted(SHARED_ADAPTERS.glob("*/lora_r16"))}


def _merge(p: int = 3) -> Workload:
    adapters = real_adapters()
    n, r, positions = len(adapters), 16, 6 * (4 * (384 + 384) + 2 * (384 + 1536))
    return Workload(
        op="merge",
        name=f"merge of the real r={r} adapters, p={p}, disk to disk",
        shapes={"n": n, "positions": positions, "r": r, "p": p},
        threads=2,
        bytes=4 * positions * (n * r + (p + 1) * r + n * p),
        flops=_compress_flops(n, positions, r, p) if n else 0,
        make=lambda: MergeInputs(adapters, p),
        targets=(Target((SCRIPT, SCRIPT_1_THREAD), 5), Target((VLORA,), 2), Target((LORASHARE,), 50)),
    )


MERGE = [_merge()]

# ---------------------------------------------------------------- the machine's ceilings

COPY_BYTES = 2 * 256 * 2**20  # read and written; beyond any cache
GEMM_SIZE = 2048


def _ceiling(name: str, threads: int) -> Workload:
    return Workload(
        op="ceiling",
        name=f"{name}, {threads} thread{'s' if threads > 1 else ''}",
        shapes={},
        threads=threads,
        bytes=COPY_BYTES if name == "copy" else 3 * 4 * GEMM_SIZE**2,
        flops=0 if name == "copy" else 2 * GEMM_SIZE**3,
        make=lambda: name,
    )


CEILINGS = [_ceiling(name, threads) for threads in (1, 2) for name in ("copy", "gemm")]

ALL = {workload.name: workload for workload in (*CEILINGS, *COMPRESS, *FORWARD, *MERGE)}
