"""truncated_svd: accuracy against fp64 on hard inputs, signs, bad matrices, memory layouts, empty shapes, errors."""

from __future__ import annotations

import hard_inputs
import ops
import pytest
import torch
from hard_inputs import times_power_of_two
from ops import FLOATS, LAYOUTS, LOW, assert_same_bits, assert_within, norm, one_thread, randn, roundoff  # noqa: F401
from torch import Tensor

import rmm_kernels

# (B, m, k, rank)
SHAPES = [
    (1, 1, 1, 1),
    (17, 1, 9, 1),
    (17, 9, 1, 1),
    (17, 8, 8, 8),
    (33, 16, 8, 3),
    (33, 8, 16, 8),
    (5, 33, 20, 20),
    (5, 20, 33, 4),
    (3, 100, 17, 17),
    (2, 17, 384, 16),
    (2, 300, 64, 8),
    (1, 130, 130, 130),
]
FEW_SHAPES = [(17, 8, 8, 8), (33, 16, 8, 3), (9, 8, 16, 8), (5, 33, 20, 20), (2, 17, 100, 16)]


def shape_id(shape: tuple[int, int, int, int]) -> str:
    return "b{}-m{}-k{}-r{}".format(*shape)


def spectral(x: Tensor) -> Tensor:
    """Largest singular value of each matrix of a batch; 0 of an empty one."""
    return torch.linalg.matrix_norm(x, 2) if x.shape[-2:].numel() else x.new_zeros(x.shape[0])


def largest(x: Tensor) -> Tensor:
    """Norm of the longest column of each matrix of a batch; 0 where there is none."""
    return torch.cat([x.norm(dim=-2), x.new_zeros(x.shape[0], 1)], -1).amax(-1)


def deviations(a: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> dict[str, Tensor]:
    """How far (u, s, vh) are from leading singular triplets of a, each [B], in fp64."""
    u, vh = u.cpu().double(), vh.cpu().double()
    one = torch.eye(s.shape[1], dtype=torch.float64)
    return {
        "‖A − U Uᵀ A‖": norm(a - u @ (u.mT @ a)),
        "‖A − U S V‖": norm(a - (u * s[:, None]) @ vh),
        "‖A v − σ u‖": largest(a @ vh.mT - u * s[:, None]),
        "‖Aᵀ u − σ v‖": largest(a.mT @ u - vh.mT * s[:, None]),
        "‖UᵀU − I‖": spectral(u.mT @ u - one),
        "‖VᵀV − I‖": spectral(vh @ vh.mT - one),
    }


def check(x: Tensor, rank: int, result: tuple[Tensor, Tensor, Tensor]) -> None:
    """fp32: the subspace, σ and orthonormality as close as compress must be, at any rank of x; fp64: 1e-8 of those bounds.

    fp16 and bf16: beyond that, twice the worst error that the exact factors have once they are rounded, and one rounding.
    """
    batch, m, k = x.shape
    u, s, vh = result
    assert (u.shape, u.dtype) == ((batch, m, rank), x.dtype)
    assert (s.shape, s.dtype) == ((batch, rank), ops.accumulator(x.dtype))
    assert (vh.shape, vh.dtype) == ((batch, rank, k), x.dtype)
    assert all(t.is_contiguous() for t in result)

    exact = x.cpu().double()
    exponent = torch.frexp(exact.abs().amax((1, 2))).exponent
    exact = times_power_of_two(exact, -exponent[:, None, None])
    exact_u, sigma, exact_vh = torch.linalg.svd(exact, full_matrices=False)
    got_s = times_power_of_two(s.cpu(), -exponent[:, None])
    size, top, optimum = norm(exact), sigma[:, 0], sigma[:, rank:].norm(dim=-1)
    subnormal = times_power_of_two(torch.full_like(size, ops.underflow(s.dtype) * rank**0.5), -exponent)
    tolerance = 1e-14 if x.dtype == torch.float64 else 1e-6
    bounds = {
        "‖A − U Uᵀ A‖": optimum + tolerance * size,
        "‖A − U S V‖": optimum + 2 * tolerance * size + subnormal,
        "‖A v − σ u‖": 5 * tolerance * top + subnormal,
        "‖Aᵀ u − σ v‖": 5 * tolerance * top + subnormal,
        "‖UᵀU − I‖": 5 * tolerance * torch.ones_like(size),
        "‖VᵀV − I‖": 5 * tolerance * torch.ones_like(size),
    }
    if x.dtype in LOW:
        rounded = (exact_u[..., :rank].to(x.dtype), sigma[:, :rank], exact_vh[:, :rank].to(x.dtype))
        plain = deviations(exact, *rounded)
        for what, bound in bounds.items():
            unit = torch.ones_like(size) if "I‖" in what else size
            beyond = (plain[what] - (optimum if what.startswith("‖A −") else 0.0)).clamp(min=0)
            relative = torch.where(unit > 0, beyond / unit.clamp(min=1e-300), 0)
            bounds[what] = bound + (2 * relative.amax() + roundoff(x.dtype)) * unit
    for what, deviation in deviations(exact, u, got_s, vh).items():
        assert_within(what, deviation, bounds[what])
    assert_within("σ", (got_s - sigma[:, :rank]).abs(), (tolerance * top + subnormal)[:, None])
    falling = bool((got_s >= 0).all() and (got_s.diff(dim=-1) <= 0).all())
    assert falling, "σ must fall and not be negative"

    stored = u.cpu().double()
    if stored.numel():
        first = (stored.abs() == stored.abs().amax(-2, keepdim=True)).int().argmax(-2, keepdim=True)
        wrong = int((stored.gather(-2, first) <= 0).sum())
        assert wrong == 0, f"{wrong} of {first.numel()} left singular vectors have the wrong sign"


@ops.each("truncated_svd", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_accuracy(run: ops.Overload, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    batch, m, k, rank = shape
    x = randn(batch, m, k, seed=sum(shape), dtype=dtype)
    check(x, rank, run(x.to(run.device), rank))


@ops.each("truncated_svd", dtypes=FLOATS)
@pytest.mark.parametrize("rank", [0, 1, 2, 7, 8])
def test_every_rank(run: ops.Overload, dtype: torch.dtype, rank: int) -> None:
    for m, k in [(16, 8), (8, 16), (8, 8)]:
        x = randn(18, m, k, seed=rank, dtype=dtype)
        check(x, rank, run(x.to(run.device), rank))


def check_hard_inputs(run: ops.Overload, dtype: torch.dtype, case: str) -> None:
    failures = ops.Failures()
    for batch, m, k, rank in FEW_SHAPES:
        x = hard_inputs.generate(case, batch, m, k, rank).to(dtype)
        with failures.case(shape_id((batch, m, k, rank))):
            check(x, rank, run(x.to(run.device), rank))
    failures.report()


@ops.each("truncated_svd", isas=True)
@pytest.mark.parametrize("case", hard_inputs.names(torch.float32))
def test_hard_inputs_fp32(run: ops.Overload, case: str) -> None:
    check_hard_inputs(run, torch.float32, case)


@ops.each("truncated_svd")
@pytest.mark.parametrize("case", ["randn", "zero_columns", "offset_1e5", "geometric_1e6", "clusters", "rank_p-1"])
def test_hard_inputs_of_large_matrices(run: ops.Overload, case: str) -> None:
    """A warp and a block each on CUDA, tall and wide, to the last singular value."""
    for batch, m, k, rank in [(1, 60, 52, 52), (2, 70, 66, 5), (1, 66, 81, 66), (1, 81, 66, 66)]:
        x = hard_inputs.generate(case, batch, m, k, rank).float()
        check(x, rank, run(x.to(run.device), rank))


@ops.each("truncated_svd", dtypes=(torch.float64,))
@pytest.mark.parametrize("case", hard_inputs.names(torch.float64))
def test_hard_inputs_fp64(run: ops.Overload, dtype: torch.dtype, case: str) -> None:
    check_hard_inputs(run, dtype, case)


@ops.each("truncated_svd", dtypes=(torch.float16,))
@pytest.mark.parametrize("case", hard_inputs.names(torch.float16))
def test_hard_inputs_fp16(run: ops.Overload, dtype: torch.dtype, case: str) -> None:
    check_hard_inputs(run, dtype, case)


@ops.each("truncated_svd", dtypes=(torch.bfloat16,))
@pytest.mark.parametrize("case", hard_inputs.names(torch.bfloat16))
def test_hard_inputs_bf16(run: ops.Overload, dtype: torch.dtype, case: str) -> None:
    check_hard_inputs(run, dtype, case)


@ops.each("truncated_svd", dtypes=FLOATS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_bad_matrix_stays_alone(run: ops.Overload, dtype: torch.dtype, value: float) -> None:
    for m, k in [(16, 8), (8, 20)]:
        good = randn(35, m, k, seed=1, dtype=dtype, device=run.device)
        x = good.clone()
        bad = [0, 17, 34]
        for matrix in bad:
            x[matrix, matrix % m, matrix % k] = value
        others = [b for b in range(35) if b not in bad]
        for got, expected in zip(run(x, 3), run(good, 3), strict=True):
            assert got[bad].isnan().all()
            assert_same_bits(got[others], expected[others])


@ops.each("truncated_svd", dtypes=FLOATS)
@pytest.mark.parametrize("shape", [(0, 16, 8, 3), (3, 0, 8, 0), (3, 16, 0, 0), (0, 0, 0, 0), (3, 16, 8, 0)], ids=shape_id)
def test_empty(run: ops.Overload, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    batch, m, k, rank = shape
    u, s, vh = run(torch.ones(batch, m, k, dtype=dtype, device=run.device), rank)
    assert (u.shape, u.dtype) == ((batch, m, rank), dtype)
    assert (s.shape, s.dtype) == ((batch, rank), ops.accumulator(dtype))
    assert (vh.shape, vh.dtype) == ((batch, rank, k), dtype)


@ops.each("truncated_svd", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(run: ops.Overload, dtype: torch.dtype, layout: str) -> None:
    for batch, m, k in [(19, 16, 8), (18, 7, 9)]:
        x = randn(batch, m, k, seed=2, dtype=dtype, device=run.device)
        view = LAYOUTS[layout](x)
        assert_same_bits(run(view, 5), run(x, 5))
        assert_same_bits(view, x)


@ops.each("truncated_svd", dtypes=FLOATS, isas=True)
def test_place_in_the_batch(run: ops.Overload, dtype: torch.dtype) -> None:
    x = randn(37, 16, 8, seed=3, dtype=dtype, device=run.device)
    x[::3, :, 5] = x[::3, :, 2]
    x[1::4] = 0
    u, s, vh = run(x, 8)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(4)).to(run.device)
    assert_same_bits(run(x[order], 8), (u[order], s[order], vh[order]))
    for part in (slice(0, 1), slice(36, 37), slice(7, 23), slice(20, 37)):
        assert_same_bits(run(x[part], 8), (u[part], s[part], vh[part]))


@ops.each("truncated_svd", dtypes=FLOATS)
def test_threads_and_runs(run: ops.Overload, dtype: torch.dtype) -> None:
    """The reference leans on LAPACK, whose bits depend on the number of threads."""
    for batch, m, k, rank in [(1031, 16, 8, 8), (50, 33, 64, 4)]:
        x = randn(batch, m, k, seed=5, dtype=dtype, device=run.device)
        expected = run(x, rank)
        assert_same_bits(run(x, rank), expected)
        for number in (2, 3) if run.backend != "reference" else ():
            with ops.threads(number):
                assert_same_bits(run(x, rank), expected)


@ops.each_triton_way("truncated_svd")
@pytest.mark.parametrize("case", hard_inputs.names(torch.float32))
def test_triton_hard_inputs(run: ops.Overload, case: str) -> None:
    """The interpreter, ten times slower, takes every shape of two inputs, and of the others one."""
    every = run.way == "ptxsim" or case in ("randn", "geometric_1e6")
    failures = ops.Failures()
    for batch, m, k, rank in [(3, 16, 8, 3), (3, 8, 16, 8), (2, 33, 20, 20)] if every else [(3, 16, 8, 3)]:
        x = hard_inputs.generate(case, batch, m, k, rank).float()
        with failures.case(shape_id((batch, m, k, rank))):
            check(x, rank, run(x, rank))
    failures.report()


@ops.each_triton_way("truncated_svd")
def test_triton_every_singular_value_of_many_columns(run: ops.Overload) -> None:
    """Where columns share an offset, the small singular vectors must keep direction and norm."""
    x = hard_inputs.generate("offset_1e5", 1, 60, 52, 52).float()
    check(x, 52, run(x, 52))


@ops.each_triton_way("truncated_svd", dtypes=LOW)
def test_triton_on_cpu(run: ops.Overload, dtype: torch.dtype) -> None:
    """Low precision, any memory, bad matrices, place in the batch, empty shapes."""
    good = randn(11, 16, 8, seed=3, dtype=dtype)
    good[::3, :, 5] = good[::3, :, 2]
    good[1::4] = 0
    expected = run(good, 3)
    check(good, 3, expected)
    for layout in ("transposed", "stepped"):
        check(good, 3, run(LAYOUTS[layout](good), 3))
    x = good.clone()
    bad = [0, 5, 10]
    for matrix in bad:
        x[matrix, matrix, matrix % 8] = torch.inf
    others = [b for b in range(11) if b not in bad]
    for got, want in zip(run(x, 3), expected, strict=True):
        assert got[bad].isnan().all()
        assert_same_bits(got[others], want[others])
    assert_same_bits(run(good[3:], 3), [part[3:] for part in expected])
    for batch, m, k, rank in [(0, 16, 8, 3), (3, 0, 8, 0), (3, 16, 8, 0)]:
        u, s, vh = run(torch.ones(batch, m, k, dtype=dtype), rank)
        assert (u.shape, s.shape, vh.shape) == ((batch, m, rank), (batch, rank), (batch, rank, k))


@pytest.mark.parametrize("dtype", FLOATS, ids=ops.name)
@pytest.mark.parametrize("shape", [(1, 16, 8), (16, 32, 100), (3, 33, 33), (4, 128, 129), (4, 129, 129)], ids=str)
def test_public_function(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Small matrices and several middling ones go to the best kernel, large ones to `large_svd`, others to the reference."""
    batch, short = shape[0], min(shape[1:])
    x = randn(*shape, seed=6, dtype=dtype)
    if short > 128 and dtype != torch.float64:
        expected = torch.ops.rmm_kernels.large_svd(x, 3, True)
    elif short <= 32 or (batch >= 4 and short <= 128):
        expected = ops.winner("truncated_svd")(x, 3)
    else:
        expected = ops.Overload("truncated_svd", "reference", "cpu")(x, 3)
    assert_same_bits(rmm_kernels.truncated_svd(x, 3), expected)


@ops.opcheck("truncated_svd", dtypes=FLOATS)
def test_opcheck(run: ops.Overload, dtype: torch.dtype, handle: object) -> None:
    x = randn(5, 16, 8, seed=7, dtype=dtype, device=run.device)
    torch.library.opcheck(handle, (x, 3))
    torch.library.opcheck(handle, (x.mT, 8))


@pytest.mark.parametrize("device", ops.devices())
def test_compile(device: str) -> None:
    compiled = torch.compile(rmm_kernels.truncated_svd, fullgraph=True)
    for batch in (5, 20, 21):
        x = randn(batch, 16, 8, seed=batch, device=device)
        assert_same_bits(compiled(x, 3), rmm_kernels.truncated_svd(x, 3))


@pytest.mark.parametrize(
    "x, rank, error, message",
    [
        (torch.ones(4, 5), 1, ValueError, r"x must be \[B, m, k\], got shape \[4, 5\]"),
        (torch.ones(4, 5, 6).long(), 1, TypeError, "x must be one of float32, float16, .*, got int64"),
        ([1.0], 1, TypeError, "x must be a torch.Tensor, got list"),
        (torch.ones(4, 5, 6), 6, ValueError, r"rank is 6; allowed are 0 to 5 \(up to min\(m, k\)\)"),
        (torch.ones(4, 6, 5), 6, ValueError, "rank is 6; allowed are 0 to 5"),
        (torch.ones(4, 5, 6), -1, ValueError, "rank is -1; allowed are 0 to 5"),
        (torch.ones(4, 5, 6), 2.0, TypeError, "rank must be an int, got float"),
    ],
)
def test_bad_arguments(x: object, rank: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rmm_kernels.truncated_svd(x, rank)
