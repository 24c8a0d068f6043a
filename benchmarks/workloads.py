"""The registry of workloads: what is run, on which data, how many bytes and operations it must cost, and its targets.

Sizes: n tasks, S positions, r rank, p components, T tokens, d features in and out (wide in, out out where they differ).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .models import LLAMA_8B, LLAMA_70B, QWEN_7B, ROBERTA, Model

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
    contenders: tuple[str, ...] | None = None
    """those of its op that take part, where not all do"""


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
    """Nominal: QR of the centred matrix (or of its transpose), its core [K, K] made bidiagonal, the squared singular values by
    3K sweeps over half its rows on average, 7 operations a row, p vectors from 16 operations a row, orthogonalised; the p
    components through both orthogonal factors, coefficients. The CPU takes fewer where a well-conditioned matrix is twice
    as tall as wide."""
    k, longer = min(r, n - 1), max(r, n - 1)
    centring = 4 * r * n
    qr = 2 * longer * k * k - 2 * k**3 // 3
    core = 8 * k**3 // 3 + 3 * k * (k // 2) * 7 + p * 16 * k + 2 * p * p * k + 2 * p * k * k
    components = 4 * p * k * r if r >= n - 1 else 0
    coefficients = 2 * p * r * n
    return positions * (centring + qr + core + components + coefficients)


def compress(
    r: int,
    n: int,
    layout: str = "rank innermost",
    ratio: float | None = None,
    *,
    positions: int = 20_480,  # so that rows are a multiple of 4 KB apart, as in most models
    p: int = 4,
    threads: int = 2,
) -> Workload:
    sizes = {"n": n, "positions": positions, "r": r, "p": p}
    return Workload(
        op="compress",
        name=f"compress {r}x{n}, {layout}",
        shapes=sizes,
        threads=threads,
        bytes=_compress_bytes(**sizes),
        flops=_compress_flops(**sizes),
        make=lambda: _compress_inputs(**sizes, layout=layout),
        targets=() if ratio is None else (Target((SVD, SVD_1_THREAD), ratio),),
    )


COMPRESS = [
    *(
        compress(r, n, layout, ratio)
        for r, n, ratio in ((16, 8, 45), (16, 20, 25), (32, 8, 22), (64, 8, 15), (16, 64, 30))
        for layout in ("rank innermost", "positions innermost")
    ),
    *(
        compress(r, n, positions=positions, p=p)
        for r, n, positions, p in (
            (16, 2, 20_000, 1),
            (8, 8, 20_000, 4),
            (128, 8, 4096, 4),
            (64, 64, 1024, 4),
            (16, 1000, 1024, 4),
        )
    ),
]

# ---------------------------------------------------------------- the ops that compress and the forward are made of

PLAIN = "plain torch"
GATHER = "gather + bmm"
LOWRANK = "torch.svd_lowrank"


@dataclass(frozen=True)
class OpInputs:
    """Arguments of an op, and how far from fp64 it may be, relative to the norm of what it returns or changes."""

    arguments: tuple[Any, ...]
    allowed: float = 2e-6


def _op(
    op: str, what: str, sizes: dict[str, int], arguments: Callable[[], tuple[Any, ...]], bytes: int, flops: int, *peers: str
) -> Workload:
    return Workload(
        op=op,
        name=f"{op}, {what}",
        shapes=sizes,
        threads=2,
        bytes=4 * bytes,
        flops=flops,
        make=lambda: OpInputs(arguments()),
        contenders=(OURS, *peers),
    )


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _basis_and_coeff(n: int, positions: int, r: int, p: int) -> tuple[Tensor, Tensor]:
    return _randn(p + 1, positions, r) / r**0.5, _randn(n, p, positions)


def _ops() -> list[Workload]:
    """On layers of Llama-3-8B, at n = 8, r = 16, p = 3; small SVDs as of its positions, a large one as of RoBERTa."""
    n, r, p, d = 8, 16, 3, 4096
    batch = 20_000
    small = {"batch": batch, "m": r, "k": n}
    basis = {"n": n, "positions": 14336, "r": r, "p": p}
    wide = 14336
    return [
        _op(
            "gram",
            f"{batch} of 16x8, centred",
            small,
            lambda: (_randn(batch, r, n), True),
            batch * (r * n + n * n),
            batch * (3 * r * n + 2 * r * n * n),
            PLAIN,
        ),
        _op(
            "truncated_svd",
            f"{batch} of 16x8, rank 4",
            {**small, "rank": 4},
            lambda: (_randn(batch, r, n), 4),
            batch * (r * n + 4 * (r + n + 1)),
            _compress_flops(n + 1, batch, r, 4),
            SVD,
        ),
        _op(
            "truncated_svd",
            "1 of 768x3072, rank 32",
            {"batch": 1, "m": 768, "k": 3072, "rank": 32},
            lambda: (_with_spectrum(768, 3072)[None], 32),
            768 * 3072 + 32 * (768 + 3072 + 1),
            4 * 768 * 3072 * 40 * 8,  # block Krylov of width 40, 8 times
            SVD,
            LOWRANK,
        ),
        _op(
            "project",
            "14336 positions, 8 tasks",
            basis,
            lambda: (_randn(n, wide, r), _basis_and_coeff(n, wide, r, p)[0]),
            wide * (n * r + (p + 1) * r + n * p),
            wide * n * r * (1 + 2 * p),
            PLAIN,
        ),
        _op(
            "reconstruct",
            "14336 positions, 8 tasks",
            basis,
            lambda: (*_basis_and_coeff(n, wide, r, p), torch.arange(n)),
            wide * (n * r + (p + 1) * r + n * p),
            wide * n * r * 2 * p,
            PLAIN,
        ),
        _op(
            "error_grams",
            "14336 positions, 8 tasks",
            basis,
            lambda: (_randn(n, wide, r), *_basis_and_coeff(n, wide, r, p)),
            wide * (n * r + (p + 1) * r + n * p),
            wide * n * (r * (2 * p + 1) + 2 * r * (2 * r + 1)),  # the symmetric ones once
            PLAIN,
        ),
        _op(
            "lora_shrink",
            "T=64 of 64 tasks",
            {"tokens": 64, "n": 64, "r": r, "p": p, "d": d},
            lambda: (
                _randn(64, d),
                (_basis_and_coeff(64, d, r, p)[0]).mT.contiguous(),
                _basis_and_coeff(64, d, r, p)[1],
                _ids(64),
            ),
            (p + 1) * r * d + 64 * (p + 1) * d + 64 * r,
            64 * 2 * d * ((p + 1) * r + p),
            GATHER,
        ),
        _op(
            "lora_expand_",
            "T=64 of 64 tasks",
            {"tokens": 64, "n": 64, "r": r, "p": p, "d": d},
            lambda: (
                torch.zeros(64, d),
                _randn(64, r),
                _basis_and_coeff(64, d, r, p)[0].mT.contiguous().mT,
                _basis_and_coeff(64, d, r, p)[1],
                _ids(64),
                torch.ones(64),
            ),
            (p + 1) * r * d + 64 * (p + 2) * d + 64 * r,
            64 * 2 * d * ((p + 1) * r + p),
            GATHER,
        ),
    ]


def _ids(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _with_spectrum(m: int, k: int) -> Tensor:
    """Singular values that fall as i^-1, as those of a fine-tuning delta do."""
    u, v = (torch.linalg.qr(torch.randn(size, m, generator=torch.Generator().manual_seed(size))).Q for size in (m, k))
    return (u / torch.arange(1, m + 1)) @ v.mT


OPS = _ops()

# ---------------------------------------------------------------- forward


@dataclass(frozen=True)
class ForwardInputs:
    """Arguments of lora_forward_; `basis_b` lies in memory as [p+1, r, out], the layout that op is fastest on."""

    y: Tensor  # [T, out]
    x: Tensor  # [T, in]
    basis_a: Tensor  # [p+1, r, in]
    coeff_a: Tensor  # [n, p, in]
    basis_b: Tensor  # [p+1, out, r]
    coeff_b: Tensor  # [n, p, out]
    task_ids: Tensor  # [T]
    scaling: Tensor  # [n]

    def arguments(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())


def _forward_inputs(n: int, tokens: int, active: int, prefill: int, r: int, p: int, wide: int, out: int) -> ForwardInputs:
    """`active` tasks out of n, each with as many of the tokens but the first `prefill`, which one more has; in random order,
    but for those of the prefill."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    chosen = torch.randperm(n, generator=generator)
    rest = tokens - prefill
    tasks = chosen[:active].repeat_interleave(rest // active)[torch.randperm(rest, generator=generator)]
    return ForwardInputs(
        y=torch.zeros(tokens, out),
        x=randn(tokens, wide),
        basis_a=randn(p + 1, r, wide) / wide**0.5,
        coeff_a=randn(n, p, wide),
        basis_b=randn(p + 1, r, out).mT / r**0.5,
        coeff_b=randn(n, p, out),
        task_ids=torch.cat((chosen[active : active + 1].expand(prefill), tasks)),
        scaling=torch.rand(n, generator=generator) + 0.5,
    )


def _forward_bytes(n: int, tokens: int, active: int, prefill: int, r: int, p: int, wide: int, out: int) -> int:
    """Both bases, the coefficients of the active tasks, x read, y read and written."""
    tasks = active + (prefill > 0)
    return 4 * ((p + 1) * r * (wide + out) + tasks * p * (wide + out) + tokens * (wide + 2 * out))


def _forward_flops(n: int, tokens: int, active: int, prefill: int, r: int, p: int, wide: int, out: int) -> int:
    """The cheaper of two forms: p + 1 shared products per token, or one after restoring the active tasks' factors."""
    tasks, d = active + (prefill > 0), wide + out
    direct = tokens * 2 * d * ((p + 1) * r + p)
    restored = tasks * 2 * d * p * r + tokens * 2 * d * r
    return min(direct, restored)


def forward(
    model: Model,
    linear: str,
    tokens: int,
    n: int,
    active: int,
    targets: tuple[Target, ...] = (),
    *,
    prefill: int = 0,
    r: int = 16,
    p: int = 3,
    threads: int = 1,
) -> Workload:
    out, wide = model.linears[linear]
    sizes = {"n": n, "tokens": tokens, "active": active, "prefill": prefill, "r": r, "p": p, "wide": wide, "out": out}
    kind = f"T={tokens}, {active} of {n} tasks"
    if prefill:
        kind = f"T={prefill} of one task + {tokens - prefill} of {active}, n={n}"
    return Workload(
        op="lora_forward_",
        name=f"forward {kind}, r={r}, p={p}, {model.name} {linear.rpartition('.')[2]}",
        shapes=sizes,
        threads=threads,
        bytes=_forward_bytes(**sizes),
        flops=_forward_flops(**sizes),
        make=lambda: _forward_inputs(**sizes),
        targets=targets,
    )


PEFT = "PEFT mixed batch"
GROUPED = "grouped bmm"

O_PROJ = (LLAMA_8B, "self_attn.o_proj")  # 4096 → 4096
FORWARD = [
    # decode: a token or a few of each task
    forward(*O_PROJ, 1, 64, 1),
    forward(*O_PROJ, 8, 64, 8),
    forward(*O_PROJ, 64, 64, 64, (Target((PEFT,), 8), Target((GATHER,), 5))),
    forward(*O_PROJ, 64, 1000, 64),
    forward(*O_PROJ, 64, 64, 64, r=64, p=4),
    forward(QWEN_7B, "mlp.gate_proj", 16, 16, 16, r=8, p=2),
    forward(LLAMA_70B, "self_attn.q_proj", 64, 64, 64),
    forward(LLAMA_70B, "mlp.down_proj", 16, 16, 16, r=128, p=4),
    forward(ROBERTA, "intermediate", 64, 8, 8),
    # prefill: many tokens of few tasks
    forward(*O_PROJ, 256, 8, 8, (Target((PEFT,), 4), Target((GATHER, GROUPED), 1 / 1.3))),
    forward(*O_PROJ, 512, 64, 1),
    forward(ROBERTA, "attention.query", 1024, 8, 8),
    # both
    forward(*O_PROJ, 128 + 32, 64, 32, prefill=128),
]

# ---------------------------------------------------------------- merge

SCRIPT = "torch.linalg.svd script"
SCRIPT_1_THREAD = "torch.linalg.svd script, 1 thread"
VLORA = "vlora-dev"
LORASHARE = "lorashare"


PEFT_SVD = "PEFT add_weighted_adapter(svd)"


@dataclass(frozen=True)
class MergeInputs:
    """Adapters on disk: the shared real ones, or synthetic ones to be written.

    Attributes:
        model: what synthetic ones are shaped like; None for the real ones.
        blocks: of that model which they are on.
        cold: adapters are dropped from the page cache before a merge, whose time includes flushing its output to the disk.
    """

    n: int
    components: int
    rank: int
    dtype: torch.dtype
    threads: int
    model: Model | None = None
    blocks: int = 0
    cold: bool = False


def real_adapters() -> dict[str, Path]:
    """The shared rank-16 adapters by task name; empty where this checkout has none beside it."""
    return {path.parent.name: path for path in sorted(SHARED_ADAPTERS.glob("*/lora_r16"))}


def _merge_work(
    name: str, inputs: MergeInputs, positions: int, targets: tuple[Target, ...], peers: tuple[str, ...]
) -> Workload:
    n, r, p = inputs.n, inputs.rank, inputs.components
    return Workload(
        op="merge",
        name=name,
        shapes={"n": n, "positions": positions, "r": r, "p": p},
        threads=inputs.threads,
        bytes=inputs.dtype.itemsize * positions * (n * r + (p + 1) * r + n * p),
        flops=_compress_flops(n, positions, r, p) if n else 0,
        make=lambda: inputs,
        dtype=inputs.dtype,
        targets=targets,
        contenders=(OURS, *peers),
    )


def _merge_real(p: int = 3) -> Workload:
    positions = 6 * (4 * (384 + 384) + 2 * (384 + 1536))  # MiniLM's six blocks
    return _merge_work(
        f"merge of the real r=16 adapters, p={p}, disk to disk",
        MergeInputs(len(real_adapters()), p, 16, torch.float32, threads=2),
        positions,
        (Target((SCRIPT, SCRIPT_1_THREAD), 5), Target((VLORA,), 2), Target((LORASHARE,), 50)),
        (SCRIPT, SCRIPT_1_THREAD, VLORA, LORASHARE, PEFT_SVD),
    )


def merge_of(
    model: Model,
    n: int,
    blocks: int,
    peers: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    *,
    cold: bool = False,
) -> Workload:
    """Of synthetic adapters on the first blocks of a model."""
    some = f"{blocks} of {model.blocks} blocks" if blocks < model.blocks else "whole"
    return _merge_work(
        f"merge of {n} {model.name} adapters, {some}, {str(dtype).removeprefix('torch.')}, {'cold' if cold else 'cached'}",
        MergeInputs(n, 3, 16, dtype, 2, model, blocks, cold),
        model.positions // model.blocks * blocks,
        (),
        peers,
    )


# The peers take part where they take less than a minute. lorashare's d x d eigh and PEFT's SVD of dense updates take minutes
# a layer at these widths; PEFT needs the base model in memory besides.
MERGE = [
    _merge_real(),
    merge_of(LLAMA_8B, 8, 2, (SCRIPT, VLORA)),
    merge_of(LLAMA_8B, 64, 2, (SCRIPT, VLORA)),
    merge_of(LLAMA_8B, 8, 32, (SCRIPT,), cold=True),
    merge_of(LLAMA_8B, 64, 32, (), torch.bfloat16, cold=True),
]

# ---------------------------------------------------------------- the machine's ceilings

COPY_BYTES = 2 * 256 * 2**20  # read and written; beyond any cache
CACHE_BYTES = 2 * 256 * 2**10  # fits a core's own cache
GEMM_SIZE = 2048


def _ceiling(name: str, threads: int) -> Workload:
    return Workload(
        op="ceiling",
        name=f"{name}, {threads} thread{'s' if threads > 1 else ''}",
        shapes={},
        threads=threads,
        bytes={"copy": COPY_BYTES, "cache copy": CACHE_BYTES, "gemm": 3 * 4 * GEMM_SIZE**2}[name],
        flops=2 * GEMM_SIZE**3 if name == "gemm" else 0,
        make=lambda: name,
    )


CEILINGS = [_ceiling(name, threads) for threads in (1, 2) for name in ("copy", "cache copy", "gemm")]

ALL = {workload.name: workload for workload in (*CEILINGS, *COMPRESS, *OPS, *FORWARD, *MERGE)}
