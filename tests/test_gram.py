"""gram: accuracy against fp64, symmetry, memory layouts, empty shapes, errors."""

from __future__ import annotations

import ops
import pytest
import torch
from ops import FLOATS, LAYOUTS, assert_close, assert_same_bits, one_thread, randn  # noqa: F401
from torch import Tensor

import rmm_kernels

SHAPES = [
    (1, 1, 1),
    (3, 1, 8),
    (3, 16, 1),
    (17, 16, 7),
    (33, 16, 8),
    (5, 7, 33),
    (4, 100, 17),
    (9, 33, 20),
    (2, 1000, 64),
    (3, 64, 100),
    (2, 384, 130),
]


def check(x: Tensor, center: bool, got: Tensor) -> None:
    batch, m, k = x.shape
    assert (got.shape, got.dtype) == ((batch, k, k), ops.accumulator(x.dtype))
    assert got.is_contiguous()
    assert_same_bits(got, got.mT)
    exact = x.cpu().double()
    size = exact.abs()
    if center:
        exact = exact - exact[..., :1]
        exact = exact - exact.mean(-1, keepdim=True)
        size = exact.abs() + exact.abs().amax(-1, keepdim=True)  # every entry bears the rounding of its row's mean
    assert_close("gram", got.cpu(), exact.mT @ exact, size.mT @ size, m + k)


@ops.each("gram", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("center", [False, True], ids=["plain", "center"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(run: ops.Overload, dtype: torch.dtype, shape: tuple[int, int, int], center: bool) -> None:
    x = randn(*shape, seed=sum(shape), dtype=dtype)
    check(x, center, run(x.to(run.device), center))


@ops.each("gram", dtypes=(torch.float32, torch.float64))
@pytest.mark.parametrize("offset", [1e3, -1e4, 1e5])
def test_centering_an_offset(run: ops.Overload, dtype: torch.dtype, offset: float) -> None:
    """What all columns share costs no accuracy, as in compress."""
    for shape in [(17, 16, 8), (3, 64, 20), (2, 384, 130)]:
        x = (randn(*shape, seed=1, dtype=torch.float64) + offset).to(dtype)
        check(x, True, run(x.to(run.device), True))


@ops.each("gram", dtypes=FLOATS)
@pytest.mark.parametrize("shape", [(0, 16, 8), (3, 0, 8), (3, 16, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("center", [False, True], ids=["plain", "center"])
def test_empty(run: ops.Overload, dtype: torch.dtype, shape: tuple[int, int, int], center: bool) -> None:
    x = torch.empty(shape, dtype=dtype, device=run.device)
    got = run(x, center)
    assert (got.shape, got.dtype) == ((shape[0], shape[2], shape[2]), ops.accumulator(dtype))
    assert not got.any()


@ops.each("gram", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(run: ops.Overload, dtype: torch.dtype, layout: str) -> None:
    for shape in [(5, 16, 8), (3, 33, 17)]:
        x = randn(*shape, seed=2, dtype=dtype)
        view = LAYOUTS[layout](x.to(run.device))
        for center in (False, True):
            check(x, center, run(view, center))
        assert_same_bits(view.cpu(), x)


@ops.each("gram", dtypes=FLOATS)
def test_a_bad_matrix_stays_alone(run: ops.Overload, dtype: torch.dtype) -> None:
    good = randn(19, 16, 8, seed=3, dtype=dtype, device=run.device)
    x = good.clone()
    x[7, 3, 2] = torch.nan
    for center in (False, True):
        got, expected = run(x, center), run(good, center)
        others = [b for b in range(19) if b != 7]
        assert_same_bits(got[others], expected[others])
        assert got[7, 2].isnan().all() and got[7, :, 2].isnan().all()


@ops.each("gram", dtypes=FLOATS)
def test_threads_and_runs(run: ops.Overload, dtype: torch.dtype) -> None:
    for shape in [(2051, 16, 8), (3, 3000, 33)]:
        x = randn(*shape, seed=4, dtype=dtype, device=run.device)
        expected = run(x, True)
        assert_same_bits(run(x, True), expected)
        for number in (2, 3) if run.backend != "reference" else ():
            with ops.threads(number):
                assert_same_bits(run(x, True), expected)


@ops.each_triton_way("gram", dtypes=FLOATS)
@pytest.mark.parametrize("center", [False, True], ids=["plain", "center"])
def test_triton_on_cpu(run: ops.Overload, dtype: torch.dtype, center: bool) -> None:
    """A partial group, a narrow and a wide block, two blocks; any memory; a bad matrix; an empty batch."""
    for shape in [(9, 16, 8), (3, 40, 20), (1, 33, 70)]:
        x = randn(*shape, seed=sum(shape), dtype=dtype)
        check(x, center, run(x, center))
    good = randn(9, 16, 8, seed=1, dtype=dtype)
    for layout in ("transposed", "stepped"):
        check(good, center, run(LAYOUTS[layout](good), center))
    x = good.clone()
    x[7, 3, 2] = torch.nan
    got, expected = run(x, center), run(good, center)
    others = [b for b in range(9) if b != 7]
    assert_same_bits(got[others], expected[others])
    assert got[7, 2].isnan().all() and got[7, :, 2].isnan().all()
    assert_same_bits(run(good[2:], center), expected[2:])
    for empty in [(0, 16, 8), (3, 0, 8), (3, 16, 0)]:
        got = run(torch.ones(empty, dtype=dtype), center)
        assert got.shape == (empty[0], empty[2], empty[2]) and not got.any()


@ops.each_triton_way("gram")
def test_triton_centering_an_offset(run: ops.Overload) -> None:
    x = (randn(9, 16, 8, seed=1, dtype=torch.float64) + 1e5).float()
    check(x, True, run(x, True))


@pytest.mark.parametrize("dtype", FLOATS, ids=ops.name)
@pytest.mark.parametrize("shape", [(15, 16, 8), (16, 16, 8), (16, 16, 64), (16, 16, 65)], ids=str)
def test_public_function(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Few or large matrices go to the reference, the others to the best kernel."""
    suited = shape[0] >= 16 and shape[2] <= 64
    run = ops.winner("gram") if suited else ops.Overload("gram", "reference", "cpu")
    x = randn(*shape, seed=5, dtype=dtype)
    assert_same_bits(rmm_kernels.gram(x), run(x, False))
    assert_same_bits(rmm_kernels.gram(x, center=True), run(x, True))


@ops.opcheck("gram", dtypes=FLOATS)
def test_opcheck(run: ops.Overload, dtype: torch.dtype, handle: object) -> None:
    x = randn(4, 19, 8, seed=6, dtype=dtype, device=run.device)
    torch.library.opcheck(handle, (x,))
    torch.library.opcheck(handle, (x.mT, True))


@pytest.mark.parametrize("device", ops.devices())
def test_compile(device: str) -> None:
    compiled = torch.compile(rmm_kernels.gram, fullgraph=True)
    for batch in (3, 20, 21):
        x = randn(batch, 16, 8, seed=batch, device=device)
        assert_same_bits(compiled(x, center=True), rmm_kernels.gram(x, center=True))


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.ones(4, 5), ValueError, r"x must be \[B, m, k\], got shape \[4, 5\]"),
        (torch.ones(4, 5, 6, dtype=torch.int8), TypeError, "x must be one of float32, float16, .*, got int8"),
        (torch.ones(4, 5, 6, dtype=torch.complex64), TypeError, "x must be one of float32, float16, .*, got complex64"),
        (None, TypeError, "x must be a torch.Tensor, got NoneType"),
    ],
)
def test_bad_arguments(x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rmm_kernels.gram(x)
