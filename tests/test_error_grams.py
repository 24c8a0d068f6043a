"""error_grams: accuracy against fp64, memory layouts, mixed dtypes, empty shapes, errors."""

from __future__ import annotations

import ops
import pytest
import torch
from ops import FLOATS, LAYOUTS, LOW, assert_same_bits, assert_within, one_thread, randn  # noqa: F401
from torch import Tensor

import rmm_kernels

# (n, S, r, p)
SHAPES = [
    (1, 1, 1, 0),
    (8, 17, 16, 0),
    (8, 33, 16, 3),
    (3, 7, 5, 5),
    (5, 384, 3, 2),
    (20, 100, 17, 5),
    (2, 300, 66, 4),
    (40, 1100, 9, 2),  # several spans, several groups of tasks
    (2, 5000, 2, 1),
]


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, stored: torch.dtype, seed: int) -> list[Tensor]:
    n, positions, r, p = shape
    basis = randn(p + 1, positions, r, seed=seed, dtype=stored)
    return [randn(n, positions, r, seed=seed + 1, dtype=dtype), basis, randn(n, p, positions, seed=seed + 2, dtype=stored)]


def check(run: ops.Overload, x: Tensor, basis: Tensor, coeff: Tensor, got: Tensor) -> None:
    """The Gram matrices, in fp64, of x and of what the backend's own `reconstruct` makes of it."""
    n, positions, r = x.shape
    assert (got.shape, got.dtype) == ((3, n, r, r), torch.float64)
    restored = run.sibling("reconstruct")(basis, coeff, torch.arange(n, device=x.device)).double()
    error = x.double() - restored
    single = torch.float64 if x.dtype == basis.dtype == torch.float64 else torch.float32
    for found, (a, b) in zip(got, ((error, error), (error, restored), (restored, restored)), strict=True):
        rounding = ops.roundoff(single) * (3 + 2 * positions**0.5)  # of the difference, of products and of their sum
        assert_within("gram", (found - a.mT @ b).abs(), rounding * (a.abs().mT @ b.abs()))
    assert torch.equal(got[0], got[0].mT) and torch.equal(got[2], got[2].mT)


@ops.each("error_grams", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(run: ops.Overload, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    given = [tensor.to(run.device) for tensor in inputs(shape, dtype, dtype, seed=sum(shape))]
    check(run, *given, run(*given))


@ops.each("error_grams", isas=True)
@pytest.mark.parametrize("stored", [*LOW, torch.float32], ids=ops.name)
@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=ops.name)
def test_another_dtype_is_stored(run: ops.Overload, dtype: torch.dtype, stored: torch.dtype) -> None:
    """x̂ is rounded as it would be stored, and so is part of the error."""
    given = [tensor.to(run.device) for tensor in inputs((8, 33, 16, 3), dtype, stored, seed=1)]
    check(run, *given, run(*given))


@ops.each("error_grams", dtypes=FLOATS)
def test_what_is_restored_exactly_has_no_error(run: ops.Overload, dtype: torch.dtype) -> None:
    basis = randn(1, 45, 6, seed=2, dtype=dtype, device=run.device)
    got = run(basis.expand(3, 45, 6), basis, basis.new_empty(3, 0, 45))
    assert not got[:2].any() and (got[2].diagonal(dim1=1, dim2=2) > 0).all()


@ops.each("error_grams", dtypes=FLOATS)
@pytest.mark.parametrize("shape", [(0, 33, 16, 3), (8, 0, 16, 3), (8, 33, 0, 3), (8, 0, 0, 0)], ids=str)
def test_empty(run: ops.Overload, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    n, positions, r, p = shape
    shapes = (n, positions, r), (p + 1, positions, r), (n, p, positions)
    got = run(*(torch.ones(size, dtype=dtype, device=run.device) for size in shapes))
    assert (got.shape, got.dtype) == ((3, n, r, r), torch.float64) and not got.any()


@ops.each("error_grams", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["x", "basis", "coeff"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(run: ops.Overload, dtype: torch.dtype, layout: str, which: int) -> None:
    for shape in [(8, 33, 16, 3), (3, 18, 7, 5)]:
        given = [tensor.to(run.device) for tensor in inputs(shape, dtype, dtype, seed=3)]
        before = given[which].clone()
        given[which] = LAYOUTS[layout](given[which])
        check(run, *given, run(*given))
        assert_same_bits(given[which], before)


@ops.each("error_grams", dtypes=FLOATS)
def test_nan_stays_in_its_task(run: ops.Overload, dtype: torch.dtype) -> None:
    x, basis, coeff = (tensor.to(run.device) for tensor in inputs((8, 33, 16, 3), dtype, dtype, seed=4))
    expected = run(x, basis, coeff)
    x[5, 18, 2] = torch.nan
    got = run(x, basis, coeff)
    assert got[0, 5, 2].isnan().all()
    got[:, 5] = expected[:, 5]
    assert_same_bits(got, expected)


@ops.each("error_grams", dtypes=FLOATS)
def test_threads_and_runs(run: ops.Overload, dtype: torch.dtype) -> None:
    for shape in [(40, 2500, 8, 2), (3, 300, 64, 8)]:
        given = [tensor.to(run.device) for tensor in inputs(shape, dtype, dtype, seed=5)]
        expected = run(*given)
        assert_same_bits(run(*given), expected)
        for number in (2, 3) if run.backend != "reference" else ():
            with ops.threads(number):
                assert_same_bits(run(*given), expected)


@pytest.mark.parametrize("run", [run for run in ops.overloads("error_grams") if run.backend != "reference"], ids=str)
def test_a_task_does_not_see_the_others(run: ops.Overload) -> None:
    """BLAS, in the reference, may round a batch otherwise than one of it."""
    x, basis, coeff = inputs((9, 1100, 16, 3), torch.float32, torch.float32, seed=6)
    whole = run(x, basis, coeff)
    assert_same_bits(run(x[4:5], basis, coeff[4:5])[:, 0], whole[:, 4])


@pytest.mark.parametrize("stored", FLOATS, ids=ops.name)
@pytest.mark.parametrize("dtype", FLOATS, ids=ops.name)
def test_public_function(dtype: torch.dtype, stored: torch.dtype) -> None:
    """Where one of the two dtypes is fp64, the reference is what runs."""
    given = inputs((8, 33, 16, 3), dtype, stored, seed=7)
    left = (dtype == torch.float64) != (stored == torch.float64)
    run = ops.Overload("error_grams", "reference", "cpu") if left else ops.winner("error_grams")
    assert_same_bits(rmm_kernels.error_grams(*given), run(*given))


@ops.opcheck("error_grams", dtypes=FLOATS)
def test_opcheck(run: ops.Overload, dtype: torch.dtype, handle: object) -> None:
    x, basis, coeff = (tensor.to(run.device) for tensor in inputs((8, 19, 16, 3), dtype, dtype, seed=8))
    torch.library.opcheck(handle, (x, basis, coeff))
    torch.library.opcheck(handle, (LAYOUTS["transposed"](x), LAYOUTS["reversed"](basis), coeff))


@pytest.mark.parametrize("device", ops.devices())
def test_compile(device: str) -> None:
    compiled = torch.compile(rmm_kernels.error_grams, fullgraph=True)
    for count in (19, 40, 41):
        given = [tensor.to(device) for tensor in inputs((8, count, 16, 3), torch.float32, torch.float32, seed=count)]
        assert_same_bits(compiled(*given), rmm_kernels.error_grams(*given))


ONES = {"x": torch.ones(4, 5, 6), "basis": torch.ones(3, 5, 6), "coeff": torch.ones(4, 2, 5)}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(4, 5)}, ValueError, r"x must be \[n, S, r\], got shape \[4, 5\]"),
        ({"basis": torch.ones(5, 6)}, ValueError, r"basis must be \[p\+1, S, r\], got shape \[5, 6\]"),
        ({"coeff": torch.ones(4, 5)}, ValueError, r"coeff must be \[n, p, S\], got shape \[4, 5\]"),
        ({"x": torch.ones(4, 5, 6, dtype=torch.int64)}, TypeError, "x must be one of float32, .*, got int64"),
        ({"coeff": torch.ones(4, 2, 5).half()}, TypeError, "coeff is float16, basis float32; they must be of the same dtype"),
        ({"basis": torch.ones(3, 4, 6)}, ValueError, r"basis has shape \[3, 4, 6\]; axis 1 must be 5, as x says"),
        ({"basis": torch.ones(3, 5, 7)}, ValueError, r"basis has shape \[3, 5, 7\]; axis 2 must be 6, as x says"),
        ({"basis": torch.ones(4, 5, 6)}, ValueError, "basis holds 4 components with the mean, coeff 2 .* must hold one more"),
        ({"coeff": torch.ones(3, 2, 5)}, ValueError, r"coeff has shape \[3, 2, 5\]; axis 0 must be 4, as x says"),
        ({"coeff": torch.ones(4, 2, 6)}, ValueError, r"coeff has shape \[4, 2, 6\]; axis 2 must be 5, as x says"),
        ({"basis": torch.ones(3, 5, 6, device="meta")}, ValueError, "basis is on meta, x on cpu; .* same device"),
        ({"x": 1.0}, TypeError, "x must be a torch.Tensor, got float"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rmm_kernels.error_grams(**{**ONES, **change})
