"""compress: the accuracy contract on hard inputs, what must not change a bit, memory layouts, errors."""

from __future__ import annotations

import hard_inputs
import ops
import pytest
import torch
from hard_inputs import Exact, measure
from ops import FLOATS, LAYOUTS, LOW, assert_same_bits, assert_within, one_thread, randn, roundoff, underflow  # noqa: F401
from torch import Tensor

import rmm_kernels
from rmm_kernels import _library
from rmm_kernels.triton_ops import _limits

# (r, n, p): every K = min(r, n − 1) that a kernel may treat in its own way, r < n − 1 and r > n − 1, p below, at and above K.
SHAPES = [
    (1, 1, 1),  # K = 0
    (2, 1, 2),
    (1, 2, 1),  # K = 1
    (4, 2, 2),
    (2, 3, 1),  # K = 2
    (8, 3, 3),
    (8, 4, 3),  # K = 3
    (4, 8, 3),  # K = 4, r < n − 1
    (16, 8, 3),  # K = 7
    (16, 8, 7),
    (64, 8, 4),
    (128, 8, 3),
    (8, 20, 4),  # K = 8
    (16, 9, 4),
    (16, 16, 15),  # K = 15
    (16, 17, 16),  # K = 16
    (16, 20, 4),
    (16, 64, 4),
    (16, 130, 16),
    (20, 20, 5),  # K = 19
    (32, 20, 25),
    (32, 32, 8),  # K = 31
    (64, 34, 6),  # K = 33
]
LARGE_SHAPES = [(128, 64, 10), (64, 130, 8), (128, 130, 128)]  # K = 63, 64, 128
FEW_SHAPES = [
    (2, 1, 2),
    (4, 2, 2),
    (8, 4, 3),
    (4, 8, 3),
    (16, 8, 3),
    (16, 20, 4),
    (32, 20, 25),
    (16, 64, 4),
    (64, 34, 6),
    (40, 8, 6),
]
# CUDA's in the simulator: one, 2 or 4 lanes with all in registers, 8 lanes, a warp; 8 lanes with tasks in chunks.
SIMULATED_SHAPES = [
    (1, 1, 1),
    (1, 2, 1),
    (8, 4, 3),
    (4, 8, 3),
    (16, 8, 3),
    (16, 20, 4),
    (20, 8, 8),
    (64, 8, 4),
    (40, 5, 40),
    (20, 12, 3),
    (32, 20, 25),
    (9, 40, 4),
]
# A warp with whole columns in its lanes; with tasks in chunks, one and two columns a lane; K = 64; a block, tall and wide.
SIMULATED_LARGE_SHAPES = [(40, 34, 6), (18, 80, 3), (36, 150, 4), (64, 66, 3), (70, 67, 3), (66, 70, 4)]

# The bounds of the contract, relative to ‖Xc‖. fp64's eps is 1.9e-9 of fp32's; 1e-8 leaves room for the oracle's own rounding.
TIGHTER = {torch.float32: 1.0, torch.float64: 1e-8}


def positions(r: int, n: int) -> int:
    """A partial SIMD group, and more than one group where that is cheap."""
    return 17 if r * n < 1500 else 3


# What stands for larger shapes in the simulator, where a matrix takes long: eight lanes; eight with tasks in chunks.
REDUCED = {(4, 8, 3): (6, 12, 3), (16, 64, 4): (4, 20, 3)}


def reduced(run: ops.Overload, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The shape itself; in the simulator a small one, where that is not another shape's too."""
    r, n, _ = shape
    if not run.way or n - 1 <= min(r, 7):
        return shape
    return REDUCED[shape] if shape in REDUCED else pytest.skip("in the simulator another shape stands for it")


def contract_shapes(run: ops.Overload, shapes: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    return SIMULATED_SHAPES if run.way else shapes


def shape_id(shape: tuple[int, int, int]) -> str:
    return "r{}-n{}-p{}".format(*shape)


def deficiency(dtype: torch.dtype) -> float:
    return 1e-14 if dtype == torch.float64 else 1e-6


def deficient(truth: Exact, components: int, dtype: torch.dtype, margin: float) -> Tensor:
    """Which of the components [S, p] the contract takes for zero, if its threshold were `margin` times as high."""
    zero = torch.ones(truth.sigma.shape[0], components, dtype=torch.bool)
    sigma = truth.sigma[:, :components]
    zero[:, : sigma.shape[1]] = sigma <= margin * deficiency(dtype) * truth.sigma[:, :1]
    return zero


def dropped(truth: Exact, components: int, dtype: torch.dtype) -> Tensor:
    """Norm [S] of the singular values among the first p that the contract wants dropped (or, at the threshold, allows)."""
    sigma = truth.sigma[:, :components]
    return (sigma * deficient(truth, components, dtype, 1.1)[:, : sigma.shape[1]]).norm(dim=-1)


def stored_rounding(truth: Exact, dtype: torch.dtype, count: int) -> Tensor:
    """Norm [S] of the rounding of `count` values that are subnormal in `dtype`, in the units of `truth`."""
    one = torch.full_like(truth.size, underflow(dtype) * count**0.5)
    return hard_inputs.times_power_of_two(one, -truth.exponent)


def check_shapes(x: Tensor, components: int, result: tuple[Tensor, Tensor, Tensor]) -> None:
    n, count, r = x.shape
    basis, coeff, energy = result
    assert (basis.shape, basis.dtype) == ((components + 1, count, r), x.dtype)
    assert (coeff.shape, coeff.dtype) == ((n, components, count), x.dtype)
    assert (energy.shape, energy.dtype) == ((count, min(r, n - 1)), ops.accumulator(x.dtype))
    assert coeff.is_contiguous() and energy.is_contiguous()


def check_signs(basis: Tensor) -> None:
    """The largest |component| is positive, the lowest index on ties, in the basis as it is stored."""
    u = basis[1:].cpu().double()
    if u.numel():
        first = (u.abs() == u.abs().amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)
        wrong = int((u.gather(-1, first) <= 0).sum())
        assert wrong == 0, f"{wrong} of {first.numel()} components have the wrong sign"


def check_mean(truth: Exact, x: Tensor, basis: Tensor) -> None:
    mean = hard_inputs.times_power_of_two(basis[0].cpu(), -truth.exponent[:, None])
    largest = hard_inputs.times_power_of_two(x.abs().amax(0), -truth.exponent[:, None])  # [S, r]
    summing = 5 * roundoff(ops.accumulator(x.dtype)) * largest
    rounding = roundoff(x.dtype) * truth.mean.abs() if x.dtype in LOW else 0.0
    bound = summing + rounding + stored_rounding(truth, x.dtype, 1)[:, None]
    assert_within("mean", (mean - truth.mean).abs(), bound)


def check_energy(truth: Exact, energy: Tensor) -> None:
    """σ² to 2e-6 σ_1² (twice the bound on σ), Inf beyond the largest number, 0 below the smallest."""
    exact = hard_inputs.times_power_of_two(truth.sigma.square(), 2 * truth.exponent[:, None])
    limit = torch.finfo(energy.dtype).max
    got = energy.cpu().double()
    assert (got >= 0).all()
    assert (got.diff(dim=-1)[got[:, :-1].isfinite()] <= 0).all(), "energy must fall"
    assert got[exact > 1.0001 * limit].isposinf().all()
    fits = exact < 0.9999 * limit
    tolerance = 2e-6 * TIGHTER[energy.dtype]
    bound = tolerance * exact[:, :1].expand_as(exact).clamp(max=limit) + underflow(energy.dtype)
    assert_within("energy", (got - exact).abs()[fits], bound[fits])


def check_subspace(truth: Exact, basis: Tensor, tolerance: float) -> None:
    """The angle to the exact subspace, where σ_p − σ_{p+1} > 1e-3 σ_1 defines one: at most backward error over gap."""
    components = basis.shape[0] - 1
    if not 0 < components <= truth.sigma.shape[1]:
        return
    following = torch.cat([truth.sigma, torch.zeros_like(truth.sigma[:, :1])], 1)[:, components]
    gap = truth.sigma[:, components - 1] - following
    clear = gap > 1e-3 * truth.sigma[:, 0]
    u = basis[1:].cpu().double().permute(1, 2, 0)[clear]
    leading = truth.u[clear][..., :components]
    sine = torch.linalg.matrix_norm(u - leading @ (leading.mT @ u), 2)
    assert_within("sine of the angle", sine, tolerance * truth.size[clear] / gap[clear] + tolerance)


def check_contract(x: Tensor, truth: Exact, components: int, result: tuple[Tensor, Tensor, Tensor]) -> None:
    """Every bound that fp32 and fp64 are held to.

    σ_j at or below the deficiency threshold have to be dropped (C rows 0). So the least error there is includes them.
    """
    check_shapes(x, components, result)
    basis, coeff, energy = result
    tolerance = 1e-6 * TIGHTER[x.dtype]
    got = measure(truth, basis, coeff)
    size = truth.size
    lost = dropped(truth, components, x.dtype)
    optimum = torch.hypot(truth.optimum(components), lost)
    subnormal = stored_rounding(truth, x.dtype, coeff[..., 0].numel())

    assert_within("error", got.error, optimum + tolerance * size + subnormal)
    worth = truth.optimum(components) > 10 * tolerance * size
    assert_within("error / optimum", got.error[worth], (1.02 * optimum + subnormal)[worth])
    assert_within("‖UᵀU − I‖", got.orthogonality, 5 * tolerance)
    assert_within("‖C − UᵀXc‖", got.coefficients, torch.hypot(tolerance * size, lost) + subnormal)
    check_mean(truth, x, basis)
    check_energy(truth, energy)
    check_subspace(truth, basis, tolerance)
    check_signs(basis)
    zero = deficient(truth, components, x.dtype, 0.5)
    assert (coeff.cpu().permute(2, 1, 0)[zero] == 0).all(), "coefficients of completed components must be 0"


def check_low_precision(x: Tensor, truth: Exact, components: int, result: tuple[Tensor, Tensor, Tensor]) -> None:
    """At worst 2 × the worst error that the exact results have once they are rounded to the dtype, plus one rounding."""
    check_shapes(x, components, result)
    basis, coeff, energy = result
    u = truth.u[..., :components]
    c = hard_inputs.times_power_of_two(u.mT @ truth.centred, truth.exponent[:, None, None])
    rounded = torch.cat([torch.zeros_like(basis[:1].cpu()), u.permute(2, 0, 1).to(x.dtype)])
    plain = measure(truth, rounded, c.permute(2, 1, 0).to(x.dtype))
    got = measure(truth, basis, coeff)
    size, one = truth.size, roundoff(x.dtype)
    subnormal = stored_rounding(truth, x.dtype, coeff[..., 0].numel())

    def allowed(deviation: Tensor) -> Tensor:
        """`deviation` [S] of the rounded results as a bound on ours, both relative to ‖Xc‖."""
        relative = torch.where(size > 0, deviation.clamp(min=0) / size.clamp(min=1e-300), 0)
        return (2 * relative.amax() + one) * size + subnormal

    if len(size):
        assert_within("excess", got.excess, allowed(plain.excess))
        assert_within("‖UᵀU − I‖", got.orthogonality, 2 * plain.orthogonality.amax() + one)
        assert_within("‖C − UᵀXc‖", got.coefficients, allowed(plain.coefficients))
    check_mean(truth, x, basis)
    check_energy(truth, energy)
    check_signs(basis)
    zero = deficient(truth, components, x.dtype, 0.5)
    assert (coeff.cpu().permute(2, 1, 0)[zero] == 0).all(), "coefficients of completed components must be 0"


def check_shapes_of_case(run: ops.Overload, name: str, dtype: torch.dtype, shapes: list[tuple[int, int, int]]) -> None:
    check = check_low_precision if dtype in LOW else check_contract
    failures = ops.Failures()
    for r, n, p in shapes:
        count = min(positions(r, n), 35 if n - 1 <= min(r, 7) and r <= 16 else 3) if run.way else positions(r, n)
        x, truth = hard_inputs.case(name, dtype, count, r, n, p)
        with failures.case(shape_id((r, n, p))):
            check(x, truth, p, run(x.to(run.device), p))
    failures.report()


@ops.each("compress", isas=True)
@pytest.mark.parametrize("name", hard_inputs.names(torch.float32))
def test_contract_fp32(run: ops.Overload, name: str) -> None:
    check_shapes_of_case(run, name, torch.float32, contract_shapes(run, FEW_SHAPES if run.isa else SHAPES))


@ops.each("compress")
@pytest.mark.parametrize("name", ["randn", "zero_columns", "offset_1e5", "geometric_1e6", "clusters", "tie_at_p", "rank_p-1"])
def test_contract_on_large_matrices(run: ops.Overload, name: str) -> None:
    check_shapes_of_case(run, name, torch.float32, SIMULATED_LARGE_SHAPES if run.way else LARGE_SHAPES)


@ops.each("compress", dtypes=(torch.float64,), isas=True)
@pytest.mark.parametrize("name", hard_inputs.names(torch.float64))
def test_contract_fp64(run: ops.Overload, dtype: torch.dtype, name: str) -> None:
    check_shapes_of_case(run, name, dtype, contract_shapes(run, FEW_SHAPES))


@ops.each("compress", dtypes=(torch.float16,), isas=True)
@pytest.mark.parametrize("name", hard_inputs.names(torch.float16))
def test_low_precision_fp16(run: ops.Overload, dtype: torch.dtype, name: str) -> None:
    check_shapes_of_case(run, name, dtype, contract_shapes(run, FEW_SHAPES))


@ops.each("compress", dtypes=(torch.bfloat16,), isas=True)
@pytest.mark.parametrize("name", hard_inputs.names(torch.bfloat16))
def test_low_precision_bf16(run: ops.Overload, dtype: torch.dtype, name: str) -> None:
    check_shapes_of_case(run, name, dtype, contract_shapes(run, FEW_SHAPES))


@ops.each("compress", dtypes=FLOATS)
@pytest.mark.parametrize("components", range(17))
def test_every_component_count(run: ops.Overload, dtype: torch.dtype, components: int) -> None:
    x = randn(8, 18, 16, seed=components, dtype=dtype)
    check = check_low_precision if dtype in LOW else check_contract
    check(x, hard_inputs.exact(x), components, run(x.to(run.device), components))


@ops.each("compress", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("count", [1, 15, 16, 17, 33])
def test_partial_groups(run: ops.Overload, dtype: torch.dtype, count: int) -> None:
    x = randn(8, count, 16, seed=count, dtype=dtype)
    check = check_low_precision if dtype in LOW else check_contract
    check(x, hard_inputs.exact(x), 3, run(x.to(run.device), 3))


@ops.each("compress", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
def test_one_vector_for_all_tasks(run: ops.Overload, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Zero matrix after centring: U = I[:, :p], coefficients and energy 0, the mean exact."""
    r, n, p = reduced(run, shape)
    for vector in (torch.zeros(17, r, dtype=dtype), randn(17, r, seed=r, dtype=dtype), 100 * randn(17, r, seed=1, dtype=dtype)):
        basis, coeff, energy = run(vector.expand(n, 17, r).contiguous().to(run.device), p)
        assert_same_bits(basis[0].cpu(), vector)
        assert torch.equal(basis[1:].cpu(), torch.eye(r, dtype=dtype)[:p, None].expand(p, 17, r))
        assert not coeff.any() and not energy.any()


@ops.each("compress", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_bad_matrix_stays_alone(run: ops.Overload, dtype: torch.dtype, value: float, shape: tuple[int, int, int]) -> None:
    r, n, p = reduced(run, shape)
    good = randn(n, 35, r, seed=3, dtype=dtype, device=run.device)
    x = good.clone()
    bad = [0, 17, 34]
    for where, position in enumerate(bad):
        x[where % n, position, (5 * where) % r] = value
    expected, got = run(good, p), run(x, p)
    others = [s for s in range(35) if s not in bad]
    for result, reference, axis in zip(got, expected, (1, 2, 0), strict=True):
        assert result.movedim(axis, 0)[bad].isnan().all()
        assert_same_bits(result.movedim(axis, 0)[others], reference.movedim(axis, 0)[others])


@ops.each("compress", dtypes=FLOATS)
def test_only_bad_matrices(run: ops.Overload, dtype: torch.dtype) -> None:
    for result in run(torch.full((4, 19, 8), torch.nan, dtype=dtype, device=run.device), 5):
        assert result.isnan().all()


@ops.each("compress", dtypes=FLOATS)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
def test_empty_batch(run: ops.Overload, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    r, n, p = reduced(run, shape)
    x = torch.empty(n, 0, r, dtype=dtype, device=run.device)
    check_shapes(x, p, run(x, p))


@ops.each("compress", dtypes=FLOATS)
def test_empty_vectors(run: ops.Overload, dtype: torch.dtype) -> None:
    x = torch.empty(3, 5, 0, dtype=dtype, device=run.device)
    check_shapes(x, 0, run(x, 0))


@ops.each("compress", dtypes=(torch.float32, torch.float64))
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
def test_permuted_tasks(run: ops.Overload, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """The order of the tasks changes nothing but the order of the coefficients (and rounding)."""
    r, n, p = reduced(run, shape)
    x, truth = hard_inputs.case("randn", dtype, positions(r, n), r, n, p)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(4))
    basis, coeff, energy = run(x[order].to(run.device), p)
    check_contract(x, truth, p, (basis, coeff[order.argsort().to(run.device)], energy))


@ops.each("compress", dtypes=(torch.float32, torch.float64), isas=True)
@pytest.mark.parametrize("shape", [(16, 8, 3), (64, 8, 6), (16, 64, 4)], ids=shape_id)
def test_ties_at_every_condition(run: ops.Overload, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """σ_p and σ_{p+1} nearly equal, σ_1 1.2 to 60 times the least: a kernel may take another way for the well-conditioned."""
    r, n, p = reduced(run, shape)
    k = min(r, n - 1)
    conditions = torch.logspace(0.1, 1.8, 24, dtype=torch.float64)
    some = []
    for seed, condition in enumerate(conditions):
        sigma = condition ** (-torch.linspace(0, 1, k, dtype=torch.float64))
        sigma[p] = sigma[p - 1] * (1 - 10 ** (-2 - 0.25 * seed))
        some.append(hard_inputs.with_spectrum(sigma.sort(descending=True).values, 2, r, n, seed))
    x = torch.cat(some).to(dtype).permute(2, 0, 1).contiguous()
    check_contract(x, hard_inputs.exact(x), p, run(x.to(run.device), p))


def mixed_batch(count: int, r: int, n: int, p: int, dtype: torch.dtype) -> Tensor:
    """[n, count, r] with matrices of every kind side by side: they converge in different numbers of sweeps."""
    kinds = [kind for kind in hard_inputs.names(dtype) if not kind.startswith("scale")]
    chosen = [hard_inputs.generate(kinds[s % len(kinds)], 1, r, n, p, seed=s) for s in range(count)]
    return torch.cat(chosen).to(dtype).permute(2, 0, 1).contiguous()


@ops.each("compress", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
def test_place_in_the_batch(run: ops.Overload, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Bitwise the same result for a matrix wherever it stands and whatever its neighbours are."""
    r, n, p = reduced(run, shape)
    x = mixed_batch(37, r, n, p, dtype).to(run.device)
    basis, coeff, energy = run(x, p)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(5)).to(run.device)
    assert_same_bits(run(x[:, order], p), (basis[:, order], coeff[..., order], energy[order]))
    for part in (slice(0, 1), slice(36, 37), slice(7, 23), slice(1, 18), slice(20, 37)):
        assert_same_bits(run(x[:, part], p), (basis[:, part], coeff[..., part], energy[part]))


@ops.each("compress", dtypes=FLOATS)
def test_threads_and_runs(run: ops.Overload, dtype: torch.dtype) -> None:
    """Bitwise the same result from run to run and for any number of threads, on batches that threads share.

    The reference leans on LAPACK, whose bits depend on the number of threads.
    """
    for r, n, p, count in (
        [(16, 8, 3, 67), (16, 20, 4, 3)] if run.way else [(16, 8, 3, 2051), (16, 20, 4, 1031), (64, 34, 6, 130)]
    ):
        x = mixed_batch(97, r, n, p, dtype)[:, torch.arange(count) % 97].to(run.device)
        with ops.threads(1):
            expected = run(x, p)
            assert_same_bits(run(x, p), expected)
        for number in (2, 3) if run.backend != "reference" else ():
            with ops.threads(number):
                assert_same_bits(run(x, p), expected)


@ops.each("compress", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
def test_memory_layouts(run: ops.Overload, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Bitwise the same values from any memory; outputs take the layout of x."""
    r, n, p = reduced(run, shape)
    x = mixed_batch(69, r, n, p, dtype).to(run.device)
    expected = run(x, p)
    assert expected[0].is_contiguous()
    for layout in LAYOUTS.values():
        view = layout(x)
        before = view.clone()
        result = run(view, p)
        assert_same_bits(result, expected)
        assert_same_bits(view, before)
        check_shapes(view, p, result)
        innermost_positions = view.stride(1) < view.stride(2)
        assert result[0].mT.is_contiguous() if innermost_positions else result[0].is_contiguous()


@ops.each("compress")
def test_overlapping_input(run: ops.Overload) -> None:
    """Stride 0 over positions, or over tasks."""
    x = randn(8, 1, 16, seed=6, device=run.device).expand(8, 19, 16)
    assert_same_bits(run(x, 3), run(x.contiguous(), 3))
    x = randn(1, 19, 16, seed=7, device=run.device).expand(8, 19, 16)
    assert_same_bits(run(x, 3), run(x.contiguous(), 3))


# For Triton's kernels on CPU tensors: in registers of one, two and four lanes, in tiles, tall and wide, p at and beyond K.
TRITON_SHAPES = [(2, 1, 2), (4, 2, 2), (8, 4, 3), (16, 8, 3), (20, 8, 8), (64, 8, 4), (20, 12, 3), (4, 8, 3), (16, 20, 4)]


@ops.each_triton_way("compress")
@pytest.mark.parametrize("name", hard_inputs.names(torch.float32))
def test_triton_contract(run: ops.Overload, name: str) -> None:
    """The interpreter, ten times slower, takes every shape of two inputs, and of the others one for each kernel."""
    every = run.way == "ptxsim" or name in ("randn", "geometric_1e6")
    check_shapes_of_case(run, name, torch.float32, TRITON_SHAPES if every else [(8, 4, 3), (4, 8, 3), (20, 12, 3)])


@ops.each_triton_way("compress", dtypes=LOW)
@pytest.mark.parametrize("name", ["randn", "zero", "one_task", "dominant", "rank_p-1", "offset_1e3"])
def test_triton_low_precision(run: ops.Overload, dtype: torch.dtype, name: str) -> None:
    check_shapes_of_case(run, name, dtype, [(16, 8, 3)])


@ops.each_triton_way("compress")
def test_triton_larger_matrices(run: ops.Overload) -> None:
    """K = 7 to 33, more components than K, groups of fewer positions, eight lanes a matrix, few ranks of very many tasks."""
    shapes = [(64, 34, 6), (128, 8, 3), (4, 130, 3), (2, 600, 2)]
    if run.way == "interpreter":
        shapes += [(32, 20, 25), (16, 64, 4), (8, 20, 4), (1, 600, 1)]
    check_shapes_of_case(run, "randn", torch.float32, shapes)


@ops.each_triton_way("compress")
@pytest.mark.parametrize("shape", [(4, 8, 3), (16, 8, 3)], ids=shape_id)
def test_triton_batch(run: ops.Overload, shape: tuple[int, int, int]) -> None:
    """Bad matrices, place in the batch, memory layouts, one vector for all tasks, an empty batch.

    Sums over ranks are grouped as lanes lie, which depends on what is innermost: other memory may give other last bits.
    """
    r, n, p = shape
    good = mixed_batch(19, r, n, p, torch.float32)
    expected = run(good, p)
    bad = [0, 9, 18]
    x = good.clone()
    for position, value in zip(bad, (torch.nan, torch.inf, -torch.inf), strict=True):
        x[position % n, position, position % r] = value
    others = [s for s in range(19) if s not in bad]
    for got, want, axis in zip(run(x, p), expected, (1, 2, 0), strict=True):
        assert got.movedim(axis, 0)[bad].isnan().all()
        assert_same_bits(got.movedim(axis, 0)[others], want.movedim(axis, 0)[others])

    basis, coeff, energy = expected
    order = torch.randperm(19, generator=torch.Generator().manual_seed(5))
    assert_same_bits(run(good[:, order], p), (basis[:, order], coeff[..., order], energy[order]))
    for part in (slice(0, 1), slice(7, 19)):
        assert_same_bits(run(good[:, part], p), (basis[:, part], coeff[..., part], energy[part]))
    turned = LAYOUTS["transposed"](good)
    ours, theirs = run(turned[:, 7:], p), run(turned, p)
    assert_same_bits(ours, (theirs[0][:, 7:], theirs[1][..., 7:], theirs[2][7:]))

    x, truth = hard_inputs.case("randn", torch.float32, 9, r, n, p)
    for layout in ("transposed", "stepped", "offset"):
        view = LAYOUTS[layout](x)
        result = run(view, p)
        check_contract(view, truth, p, result)
        innermost_positions = view.stride(1) < view.stride(2)
        assert result[0].mT.is_contiguous() if innermost_positions else result[0].is_contiguous()

    vector = randn(9, r, seed=r)
    basis, coeff, energy = run(vector.expand(n, 9, r).contiguous(), p)
    assert_same_bits(basis[0], vector)
    assert torch.equal(basis[1:], torch.eye(r)[:p, None].expand(p, 9, r))
    assert not coeff.any() and not energy.any()
    check_shapes(good[:, :0], p, run(good[:, :0], p))


@pytest.mark.skipif(not _library.has_kernel("compress", "triton"), reason="Triton is not here")
def test_triton_refuses_what_is_too_large() -> None:
    for n, r in [(66, 65), (300, 64), (5000, 1)]:
        assert not _limits.compress_fits(n, r, 1)
    for n, r in [(200, 64), (4096, 1), (4096, 4)]:
        assert _limits.compress_fits(n, r, 1)
    with pytest.raises(RuntimeError, match=r"min\(r, n - 1\) of at most 64"):
        torch.ops.rmm_kernels.compress.triton(torch.ones(66, 3, 65), 3)


@pytest.mark.parametrize("dtype", FLOATS, ids=ops.name)
def test_public_function(dtype: torch.dtype) -> None:
    x = randn(8, 19, 16, seed=8, dtype=dtype)
    assert_same_bits(rmm_kernels.compress(x, 3), ops.winner("compress")(x, 3))
    assert_same_bits(rmm_kernels.compress(x, components=3), rmm_kernels.compress(x, 3))


@ops.opcheck("compress", dtypes=FLOATS)
def test_opcheck(run: ops.Overload, dtype: torch.dtype, handle: object) -> None:
    x = randn(4, 19, 8, seed=9, dtype=dtype, device=run.device)
    torch.library.opcheck(handle, (x, 3))
    torch.library.opcheck(handle, (LAYOUTS["transposed"](x), 5))


@pytest.mark.parametrize("device", ops.devices())
def test_compile(device: str) -> None:
    compiled = torch.compile(rmm_kernels.compress, fullgraph=True)
    for count in (19, 40, 41):
        x = randn(8, count, 16, seed=count, device=device)
        assert_same_bits(compiled(x, 3), rmm_kernels.compress(x, 3))
        assert_same_bits(compiled(LAYOUTS["transposed"](x), 3), rmm_kernels.compress(x, 3))


@pytest.mark.parametrize(
    "x, components, error, message",
    [
        (torch.ones(4, 5), 1, ValueError, r"x must be \[n, S, r\], got shape \[4, 5\]"),
        (torch.ones(4, 5, 6, dtype=torch.int32), 1, TypeError, "x must be one of float32, float16, .*, got int32"),
        ([[1.0]], 1, TypeError, "x must be a torch.Tensor, got list"),
        (torch.ones(0, 5, 6), 1, ValueError, "x holds no task; n must be at least 1"),
        (torch.ones(4, 5, 6), 7, ValueError, "components is 7; allowed are 0 to 6"),
        (torch.ones(4, 5, 6), -1, ValueError, "components is -1; allowed are 0 to 6"),
        (torch.ones(4, 5, 6), 1.0, TypeError, "components must be an int, got float"),
    ],
)
def test_bad_arguments(x: object, components: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rmm_kernels.compress(x, components)
