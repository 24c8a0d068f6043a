"""Inputs of the mixed-task LoRA ops, and their formulas in the precision of what they are given."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import ops
import pytest
import torch
from ops import FLOATS, accumulator, bits, randn, roundoff, underflow
from torch import Tensor

# A NaN whose payload any arithmetic would lose, as the bits of each dtype.
PAYLOAD = {torch.float64: 0x7FF8_0000_DEAD_BEEF, torch.float32: 0x7FC1_2345, torch.float16: 0x7E5A, torch.bfloat16: 0x7FD5}
INTEGER = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class Shape:
    tokens: int
    width_in: int
    width_out: int
    r: int
    n: int
    p: int
    q: int | None = None  # components of B, as many as of A unless given

    def __str__(self) -> str:
        return "-".join(f"{f.name.removeprefix('width_')}{getattr(self, f.name)}" for f in fields(self) if f.name != "q")


# Every listed T, r, width, n and p at least once, with few and with many tokens per task.
SHAPES = [
    Shape(0, 33, 384, 16, 8, 3),
    Shape(1, 1, 1, 1, 1, 0),
    Shape(1, 384, 1000, 16, 8, 3),
    Shape(1, 1000, 384, 64, 64, 4),
    Shape(2, 7, 33, 3, 1, 0),
    Shape(2, 1, 384, 8, 2, 1),
    Shape(5, 33, 7, 8, 3, 2),
    Shape(5, 384, 1, 17, 8, 7),
    Shape(5, 384, 384, 100, 4, 3, 2),
    Shape(64, 384, 33, 16, 64, 3),
    Shape(64, 1000, 7, 3, 8, 1),
    Shape(64, 7, 1000, 1, 20, 5, 1),
    Shape(64, 33, 384, 17, 2, 0),
    Shape(64, 384, 384, 64, 130, 8),
    Shape(257, 33, 33, 100, 3, 3),
    Shape(257, 384, 7, 16, 8, 3),
    Shape(257, 7, 384, 16, 1, 1),
    Shape(257, 100, 100, 8, 5, 0, 3),
    Shape(257, 1, 1, 3, 257, 2),
]
FEW_SHAPES = [
    Shape(1, 33, 40, 16, 8, 3),
    Shape(5, 40, 33, 3, 3, 0),
    Shape(64, 33, 40, 17, 64, 3),
    Shape(257, 40, 33, 16, 2, 3),
]


# What the simulator runs of them, since it takes seconds to compile a kernel: each form, each dtype, whole and ragged tiles.
SIMULATED = {
    (SHAPES[3], torch.float16),
    (SHAPES[8], torch.float32),
    (SHAPES[13], torch.bfloat16),
    (SHAPES[13], torch.float32),
    (SHAPES[14], torch.bfloat16),
    (SHAPES[16], torch.bfloat16),
    (SHAPES[16], torch.float32),
    (SHAPES[17], torch.float32),
    (SHAPES[18], torch.float16),
    (FEW_SHAPES[0], torch.bfloat16),
    (FEW_SHAPES[1], torch.float32),
    (FEW_SHAPES[2], torch.float16),
    (FEW_SHAPES[3], torch.bfloat16),
}


def each(
    op: str,
    shapes: list[Shape],
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    isas: bool = False,
    ids: bool = False,
    on_cpu: list[Shape] | None = None,
) -> pytest.MarkDecorator:
    """Parametrise a test over `run`, `dtype` and `shape`, with `ids` over `id_dtype`: Triton's kernels on CPU tensors, too.

    Of the shapes (of `on_cpu`, where given) the simulator runs SIMULATED, and on CPU tensors Triton's kernels have ids of both
    dtypes by turns.
    """
    both = (torch.int32, torch.int64)
    cases = []
    for run in ops.overloads(op) + (ops.lesser_isas(op) if isas else []) + ops.triton_ways(op):
        for dtype in (d for d in dtypes if d in run.dtypes):
            for i, shape in enumerate(on_cpu or shapes if run.way else shapes):
                if run.way == "ptxsim" and (shape, dtype) not in SIMULATED:
                    continue
                label = f"{run}-{ops.name(dtype)}-{shape}"
                if not ids:
                    cases.append(pytest.param(run, dtype, shape, id=label))
                    continue
                for id_dtype in both if run.way is None else (both[i % 2],):
                    cases.append(pytest.param(run, dtype, shape, id_dtype, id=f"{label}-{ops.name(id_dtype)}"))
    return pytest.mark.parametrize("run, dtype, shape" + (", id_dtype" if ids else ""), cases)


def on_cpu(op: str) -> pytest.MarkDecorator:
    """Parametrise a test over `run` and `dtype`: Triton's kernels on CPU tensors, in the simulator in one dtype."""
    cases = [
        pytest.param(run, dtype, id=f"{run}-{ops.name(dtype)}")
        for run in ops.triton_ways(op)
        for dtype in ((torch.bfloat16,) if run.way == "ptxsim" else (torch.float32, torch.float16))
    ]
    return pytest.mark.parametrize("run, dtype", cases)


def skewed_ids(tokens: int, n: int, seed: int) -> Tensor:
    """[T] int64: most tokens of one task, the rest spread out, a sixth −1; in no order."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(tokens, generator=generator).pow(4) * n
    ids = (spread.long() + seed) % n
    return torch.where(torch.rand(tokens, generator=generator) < 1 / 6, -1, ids)


@dataclass(frozen=True)
class Problem:
    """Arguments of lora_forward_, in its order."""

    y: Tensor
    x: Tensor
    basis_a: Tensor
    coeff_a: Tensor
    basis_b: Tensor
    coeff_b: Tensor
    task_ids: Tensor
    scaling: Tensor

    @property
    def forward(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    @property
    def shrink(self) -> tuple[Tensor, ...]:
        return (self.x, self.basis_a, self.coeff_a, self.task_ids)

    def expand(self, u: Tensor) -> tuple[Tensor, ...]:
        return (self.y, u, self.basis_b, self.coeff_b, self.task_ids, self.scaling)

    @property
    def active(self) -> Tensor:
        return self.task_ids >= 0

    def to(self, device: str) -> Problem:
        """A copy on `device`: the ops write to y."""
        return Problem(*(t.detach().clone().to(device) for t in self.forward))

    def change(self, **tensors: Tensor) -> Problem:
        return replace(self, **tensors)

    def in_dtype(self, dtype: torch.dtype) -> Problem:
        return Problem(*(t.cpu().to(dtype) if t.dtype.is_floating_point else t.cpu().long() for t in self.forward))


def problem(shape: Shape, dtype: torch.dtype, seed: int, id_dtype: torch.dtype = torch.int64) -> Problem:
    """Values near 1 throughout, so that nothing overflows in fp16 and no term drowns the others."""
    t, width_in, width_out, r, n, p = (shape.tokens, shape.width_in, shape.width_out, shape.r, shape.n, shape.p)
    q = p if shape.q is None else shape.q

    def make(index: int, *size: int, over: float = 1.0) -> Tensor:
        return (randn(*size, seed=100 * seed + index, dtype=torch.float64) / over).to(dtype)

    return Problem(
        y=make(0, t, width_out),
        x=make(1, t, width_in),
        basis_a=make(2, p + 1, r, width_in, over=((p + 1) * width_in) ** 0.5),
        coeff_a=make(3, n, p, width_in),
        basis_b=make(4, q + 1, width_out, r, over=((q + 1) * r) ** 0.5),
        coeff_b=make(5, n, q, width_out),
        task_ids=skewed_ids(t, n, seed).to(id_dtype),
        scaling=0.5 + randn(n, seed=100 * seed + 6, dtype=accumulator(dtype)).abs(),
    )


def shrink(x: Tensor, basis_a: Tensor, coeff_a: Tensor, task_ids: Tensor) -> Tensor:
    """u [T, r]; rows of −1 are 0."""
    active = (task_ids >= 0)[:, None]
    x = torch.where(active, x, 0)
    u = x @ basis_a[0].mT
    for k in range(coeff_a.shape[1]):
        u = u + (coeff_a[task_ids, k] * x) @ basis_a[k + 1].mT
    return u


def expand(u: Tensor, basis_b: Tensor, coeff_b: Tensor, task_ids: Tensor, scaling: Tensor) -> Tensor:
    """What is added to y [T, out]; u's rows of −1 must be 0."""
    delta = u @ basis_b[0].mT
    for k in range(coeff_b.shape[1]):
        delta = delta + coeff_b[task_ids, k] * (u @ basis_b[k + 1].mT)
    return scaling[task_ids, None] * delta


def forward(p: Problem) -> Tensor:
    u = shrink(p.x, p.basis_a, p.coeff_a, p.task_ids)
    return p.y + expand(u, p.basis_b, p.coeff_b, p.task_ids, p.scaling)


def masked_forward(p: Problem) -> Tensor:
    """As `forward`, rows of −1 being y's own."""
    return torch.where((p.task_ids >= 0)[:, None], forward(p), p.y)


def assert_rule(what: str, got: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """Error against fp64 at most twice that of plain torch at `dtype`, plus one rounding; as a whole, and at its worst.

    In fp32, where only the order of the sums differs and BLAS's is a good one, four times.
    """
    got, plain = got.cpu().double(), plain.cpu().double()
    assert got.shape == exact.shape and got.isfinite().all(), what
    if dtype == torch.float64:
        return  # `exact` is no more so than `plain` is
    for measure in (lambda e: float(e.norm()), lambda e: float(e.abs().max()) if e.numel() else 0.0):
        factor = 4 if dtype == torch.float32 else 2
        error, allowed = measure(got - exact), factor * measure(plain - exact) + roundoff(dtype) * measure(exact)
        assert error <= allowed, f"{what}: {error:.4g}, allowed {allowed:.4g}"


def assert_accumulated(what: str, got: Tensor, exact: Tensor, magnitude: Tensor, terms: int, tf32x3: bool = False) -> None:
    """Each value to a few roundings of the accumulator dtype, relative to the sum of |terms| that it came from; to four more
    where products of fp32 are three of TF32."""
    unit = roundoff(accumulator(got.dtype))
    error = (got.cpu().double() - exact).abs()
    bound = ((8 if tf32x3 else 4) + terms**0.5) * unit * magnitude + underflow(got.dtype)
    bad = ~(error <= bound)
    assert not bad.any(), (
        f"{what}: {int(bad.sum())} of {bad.numel()} beyond the bound, worst {float((error / bound).max()):.3g}×"
    )


def poisoned(x: Tensor) -> Tensor:
    """A tensor like x, of NaN with a payload."""
    return torch.full(x.shape, PAYLOAD[x.dtype], dtype=torch.int64).to(INTEGER[x.dtype]).view(x.dtype).to(x.device)


def magnitudes(p: Problem) -> Problem:
    return Problem(*(t.abs() if t.dtype.is_floating_point else t for t in p.forward))


def assert_bits_kept(before: Tensor, after: Tensor, what: str) -> None:
    changed = int((bits(before) != bits(after)).sum())
    assert changed == 0, f"{what}: {changed} of {before.numel()} values changed"
