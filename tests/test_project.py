"""project: accuracy against fp64, agreement with compress, memory layouts, empty shapes, errors."""

from __future__ import annotations

import ops
import pytest
import torch
from ops import FLOATS, LAYOUTS, assert_close, assert_same_bits, one_thread, randn  # noqa: F401
from torch import Tensor

import rmm_kernels

# (n, S, r, p)
SHAPES = [
    (1, 1, 1, 1),
    (1, 33, 16, 3),
    (8, 17, 16, 0),
    (8, 33, 16, 3),
    (3, 7, 8, 8),
    (20, 100, 17, 5),
    (2, 1000, 64, 4),
    (5, 384, 3, 2),
    (64, 33, 100, 20),
]


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """x and a basis of a mean and p random orthonormal directions."""
    n, positions, r, p = shape
    u = torch.linalg.qr(randn(positions, r, p, seed=seed, dtype=torch.float64)).Q
    mean = randn(1, positions, r, seed=seed + 1, dtype=torch.float64)
    basis = torch.cat([mean, u.permute(2, 0, 1)])
    return randn(n, positions, r, seed=seed + 2, dtype=dtype), basis.to(dtype)


def check(x: Tensor, basis: Tensor, got: Tensor) -> None:
    assert got.dtype == x.dtype and got.is_contiguous()
    centred = x.cpu().double() - basis[0].cpu().double()
    u = basis[1:].cpu().double()
    exact = torch.einsum("nsr,psr->nps", centred, u)
    size = torch.einsum("nsr,psr->nps", centred.abs(), u.abs())
    assert_close("coeff", got.cpu(), exact, size, x.shape[2])


@ops.each("project", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(run: ops.Overload, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    x, basis = inputs(shape, dtype, seed=sum(shape))
    check(x, basis, run(x.to(run.device), basis.to(run.device)))


@ops.each("project", dtypes=FLOATS)
def test_offset(run: ops.Overload, dtype: torch.dtype) -> None:
    """The mean is subtracted before anything is multiplied, so an offset that x and mean share costs nothing."""
    x, basis = inputs((8, 33, 16, 3), dtype, seed=1)
    x = (x.double() + 1e3).to(dtype)
    basis[0] = (basis[0].double() + 1e3).to(dtype)
    check(x, basis, run(x.to(run.device), basis.to(run.device)))


@ops.each("project", dtypes=FLOATS)
@pytest.mark.parametrize("shape", [(0, 33, 16, 3), (8, 0, 16, 3), (8, 33, 0, 0), (8, 33, 16, 0)], ids=str)
def test_empty(run: ops.Overload, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    n, positions, r, p = shape
    x = torch.ones(n, positions, r, dtype=dtype, device=run.device)
    got = run(x, torch.ones(p + 1, positions, r, dtype=dtype, device=run.device))
    assert (got.shape, got.dtype) == ((n, p, positions), dtype)


@ops.each("project", dtypes=FLOATS)
def test_no_rank(run: ops.Overload, dtype: torch.dtype) -> None:
    """Components of length 0: every coefficient is an empty sum."""
    got = run(torch.ones(8, 33, 0, dtype=dtype, device=run.device), torch.ones(4, 33, 0, dtype=dtype, device=run.device))
    assert got.shape == (8, 3, 33) and not got.any()


@ops.each("project", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("which", ["x", "basis"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(run: ops.Overload, dtype: torch.dtype, layout: str, which: str) -> None:
    for shape in [(8, 33, 16, 3), (3, 18, 7, 5)]:
        x, basis = inputs(shape, dtype, seed=2)
        given = {"x": x.to(run.device), "basis": basis.to(run.device)}
        given[which] = LAYOUTS[layout](given[which])
        check(x, basis, run(*given.values()))
        assert_same_bits(given[which].cpu(), {"x": x, "basis": basis}[which])


@ops.each("project", dtypes=FLOATS)
def test_expanded_basis(run: ops.Overload, dtype: torch.dtype) -> None:
    """One basis for all positions, stride 0."""
    x, basis = inputs((8, 33, 16, 3), dtype, seed=3)
    basis = basis[:, :1].expand(4, 33, 16)
    check(x, basis, run(x.to(run.device), basis.to(run.device)))


@ops.each("project", dtypes=FLOATS)
def test_nan_stays_in_its_position(run: ops.Overload, dtype: torch.dtype) -> None:
    good, basis = inputs((8, 33, 16, 3), dtype, seed=4)
    x = good.clone()
    x[5, 18, 2] = torch.nan
    got, expected = run(x.to(run.device), basis.to(run.device)), run(good.to(run.device), basis.to(run.device))
    assert got[5, :, 18].isnan().all()
    got[5, :, 18] = expected[5, :, 18]
    assert_same_bits(got, expected)


@ops.each("project", dtypes=(torch.float32, torch.float64))
def test_agrees_with_compress(run: ops.Overload, dtype: torch.dtype) -> None:
    x = randn(8, 33, 16, seed=5, dtype=dtype)
    basis, coeff, _ = rmm_kernels.compress(x, 3)
    torch.testing.assert_close(
        run(x.to(run.device), basis.to(run.device)).cpu(), coeff, rtol=0, atol=64 * torch.finfo(dtype).eps
    )


@ops.each("project", dtypes=FLOATS)
def test_threads_and_runs(run: ops.Overload, dtype: torch.dtype) -> None:
    for shape in [(8, 2051, 16, 3), (20, 300, 64, 8)]:
        x, basis = inputs(shape, dtype, seed=6)
        x, basis = x.to(run.device), basis.to(run.device)
        expected = run(x, basis)
        assert_same_bits(run(x, basis), expected)
        for number in (2, 3) if run.backend != "reference" else ():
            with ops.threads(number):
                assert_same_bits(run(x, basis), expected)


@ops.each_triton_way("project", dtypes=FLOATS)
def test_triton_on_cpu(run: ops.Overload, dtype: torch.dtype) -> None:
    """A partial block of positions and of tasks, ranks that are no power of two; any memory; offsets; NaN; empty shapes."""
    for shape in [(1, 1, 1, 1), (8, 33, 16, 3), (20, 70, 17, 5)]:
        x, basis = inputs(shape, dtype, seed=sum(shape))
        check(x, basis, run(x, basis))
    x, basis = inputs((8, 33, 16, 3), dtype, seed=2)
    expected = run(x, basis)
    for layout in ("transposed", "stepped"):
        check(x, basis, run(LAYOUTS[layout](x), basis))
        check(x, basis, run(x, LAYOUTS[layout](basis)))
    assert_same_bits(run(x[:, 2:20], basis[:, 2:20]), expected[..., 2:20])
    bad = x.clone()
    bad[5, 18, 2] = torch.nan
    got = run(bad, basis)
    assert got[5, :, 18].isnan().all()
    got[5, :, 18] = expected[5, :, 18]
    assert_same_bits(got, expected)
    shifted = (basis.double() + torch.tensor([1e3, 0, 0, 0])[:, None, None]).to(dtype)
    check((x.double() + 1e3).to(dtype), shifted, run((x.double() + 1e3).to(dtype), shifted))
    for n, count, r, p in [(0, 33, 16, 3), (8, 0, 16, 3), (8, 33, 0, 3), (8, 33, 16, 0)]:
        got = run(torch.ones(n, count, r, dtype=dtype), torch.ones(p + 1, count, r, dtype=dtype))
        assert got.shape == (n, p, count) and (r or not got.any())


@pytest.mark.parametrize("dtype", FLOATS, ids=ops.name)
def test_public_function(dtype: torch.dtype) -> None:
    x, basis = inputs((8, 33, 16, 3), dtype, seed=7)
    assert_same_bits(rmm_kernels.project(x, basis), ops.winner("project")(x, basis))


@ops.opcheck("project", dtypes=FLOATS)
def test_opcheck(run: ops.Overload, dtype: torch.dtype, handle: object) -> None:
    x, basis = inputs((8, 19, 16, 3), dtype, seed=8)
    torch.library.opcheck(handle, (x.to(run.device), basis.to(run.device)))
    torch.library.opcheck(handle, (LAYOUTS["transposed"](x.to(run.device)), LAYOUTS["reversed"](basis.to(run.device))))


@pytest.mark.parametrize("device", ops.devices())
def test_compile(device: str) -> None:
    compiled = torch.compile(rmm_kernels.project, fullgraph=True)
    for count in (19, 40, 41):
        x, basis = (t.to(device) for t in inputs((8, count, 16, 3), torch.float32, seed=count))
        assert_same_bits(compiled(x, basis), rmm_kernels.project(x, basis))


ONES = {"x": torch.ones(4, 5, 6), "basis": torch.ones(3, 5, 6)}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(4, 5)}, ValueError, r"x must be \[n, S, r\], got shape \[4, 5\]"),
        ({"basis": torch.ones(5, 6)}, ValueError, r"basis must be \[p\+1, S, r\], got shape \[5, 6\]"),
        ({"x": torch.ones(4, 5, 6, dtype=torch.int64)}, TypeError, "x must be one of float32, .*, got int64"),
        ({"basis": torch.ones(3, 5, 6).half()}, TypeError, "basis is float16, x float32; they must be of the same dtype"),
        ({"basis": torch.ones(3, 4, 6)}, ValueError, r"basis has shape \[3, 4, 6\]; axis 1 must be 5, as x says"),
        ({"basis": torch.ones(3, 5, 7)}, ValueError, r"basis has shape \[3, 5, 7\]; axis 2 must be 6, as x says"),
        ({"basis": torch.ones(0, 5, 6)}, ValueError, r"basis holds no component; basis\[0\] must be the mean"),
        ({"basis": torch.ones(3, 5, 6, device="meta")}, ValueError, "basis is on meta, x on cpu; .* same device"),
        ({"x": 1.0}, TypeError, "x must be a torch.Tensor, got float"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rmm_kernels.project(**{**ONES, **change})
