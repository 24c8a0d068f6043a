"""reconstruct: accuracy against fp64, ids, memory layouts, empty shapes, errors; exactness after compress."""

from __future__ import annotations

import ops
import pytest
import torch
from ops import FLOATS, LAYOUTS, LOW, assert_close, assert_same_bits, one_thread, randn  # noqa: F401
from torch import Tensor

import rmm_kernels

# (n, S, r, p, a)
SHAPES = [
    (1, 1, 1, 1, 1),
    (8, 33, 16, 0, 3),
    (8, 33, 16, 3, 8),
    (8, 7, 1, 1, 2),
    (3, 384, 8, 2, 5),
    (20, 100, 17, 5, 64),
    (64, 1000, 16, 4, 3),
    (5, 33, 100, 20, 7),
]
IDS = pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])


def inputs(shape: tuple[int, int, int, int, int], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    n, positions, r, p, a = shape
    generator = torch.Generator().manual_seed(seed)
    return (
        randn(p + 1, positions, r, seed=seed, dtype=dtype),
        randn(n, p, positions, seed=seed + 1, dtype=dtype),
        torch.randint(n, (a,), generator=generator),
    )


def check(basis: Tensor, coeff: Tensor, ids: Tensor, got: Tensor) -> None:
    """Sums in the accumulator dtype, rounded once."""
    assert got.dtype == basis.dtype
    basis, chosen = basis.cpu().double(), coeff.cpu().double()[ids.cpu().long()]
    exact = basis[0] + torch.einsum("aps,psr->asr", chosen, basis[1:])
    size = basis[0].abs() + torch.einsum("aps,psr->asr", chosen.abs(), basis[1:].abs())
    assert_close("factors", got.cpu(), exact, size, basis.shape[0])


@ops.each("reconstruct", dtypes=FLOATS, isas=True)
@IDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(run: ops.Overload, dtype: torch.dtype, shape: tuple[int, int, int, int, int], id_dtype: torch.dtype) -> None:
    basis, coeff, ids = inputs(shape, dtype, seed=sum(shape))
    device = run.device
    check(basis, coeff, ids, run(basis.to(device), coeff.to(device), ids.to(device, id_dtype)))


@ops.each("reconstruct", dtypes=FLOATS)
@pytest.mark.parametrize(
    "shape", [(8, 33, 16, 3, 0), (8, 0, 16, 3, 4), (8, 33, 0, 3, 4), (0, 33, 16, 3, 0), (8, 0, 0, 0, 0)], ids=str
)
def test_empty(run: ops.Overload, dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    n, positions, r, p, a = shape
    basis = torch.ones(p + 1, positions, r, dtype=dtype, device=run.device)
    coeff = torch.ones(n, p, positions, dtype=dtype, device=run.device)
    got = run(basis, coeff, torch.zeros(a, dtype=torch.int64, device=run.device))
    assert (got.shape, got.dtype) == ((a, positions, r), dtype)


@ops.each("reconstruct", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("which", ["basis", "coeff", "task_ids"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(run: ops.Overload, dtype: torch.dtype, layout: str, which: str) -> None:
    """Bitwise the same values from any memory; the output takes the layout of basis."""
    for shape in [(8, 33, 16, 3, 5), (3, 18, 7, 5, 4)]:
        given = dict(zip(("basis", "coeff", "task_ids"), (t.to(run.device) for t in inputs(shape, dtype, 2)), strict=True))
        expected = run(*given.values())
        assert expected.is_contiguous()
        before = given[which]
        view = given[which] = LAYOUTS[layout](before)
        got = run(*given.values())
        assert_same_bits(got, expected)
        assert_same_bits(view, before)
        innermost_positions = given["basis"].stride(1) < given["basis"].stride(2)
        assert got.mT.is_contiguous() if innermost_positions else got.is_contiguous()


@ops.each("reconstruct", dtypes=FLOATS)
def test_expanded_input(run: ops.Overload, dtype: torch.dtype) -> None:
    basis, coeff, ids = (t.to(run.device) for t in inputs((8, 33, 16, 3, 5), dtype, seed=3))
    basis, coeff, ids = basis[:, :1].expand(4, 33, 16), coeff[:1].expand(8, 3, 33), ids[:1].expand(5)
    check(basis, coeff, ids, run(basis, coeff, ids))


@ops.each("reconstruct", dtypes=FLOATS)
def test_a_task_does_not_depend_on_the_others(run: ops.Overload, dtype: torch.dtype) -> None:
    basis, coeff, ids = (t.to(run.device) for t in inputs((8, 100, 16, 3, 20), dtype, seed=4))
    got = run(basis, coeff, ids)
    for row, task in enumerate(ids):
        assert_same_bits(run(basis, coeff, task.reshape(1))[0], got[row])
    coeff[3] = torch.nan
    others = ids != 3
    assert_same_bits(run(basis, coeff, ids)[others], got[others])


@ops.each("reconstruct", dtypes=FLOATS)
def test_nan_stays_in_its_position(run: ops.Overload, dtype: torch.dtype) -> None:
    basis, coeff, ids = (t.to(run.device) for t in inputs((8, 33, 16, 3, 5), dtype, seed=5))
    expected = run(basis, coeff, ids)
    coeff[ids[2], 1, 18] = torch.nan
    got = run(basis, coeff, ids)
    hit = ids == ids[2]
    assert got[hit, 18].isnan().all()
    got[hit, 18] = expected[hit, 18]
    assert_same_bits(got, expected)


@ops.each("reconstruct", dtypes=FLOATS)
@pytest.mark.parametrize("shape", [(8, 33, 16), (3, 17, 8), (20, 18, 16), (1, 5, 4)], ids=str)
def test_exact_after_compress(run: ops.Overload, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """With p = min(r, n − 1) components every task comes back, up to the rounding of basis and coefficients."""
    n, _, r = shape
    p = min(r, n - 1)
    x = randn(*shape, seed=6, dtype=dtype, device=run.device)
    basis, coeff, _ = rmm_kernels.compress(x, p)
    back = run(basis, coeff, torch.arange(n, device=run.device))
    error = (back.double() - x.double()).norm(dim=(0, 2)) / x.double().norm(dim=(0, 2))
    bound = 4 * ops.roundoff(dtype) if dtype in LOW else 1e-6 if dtype == torch.float32 else 1e-14
    ops.assert_within("relative error", error, bound)


@ops.each("reconstruct", dtypes=FLOATS)
@ops.bad_ids(-1, 8)
def test_id_out_of_range(run: ops.Overload, dtype: torch.dtype, bad: int, id_dtype: torch.dtype) -> None:
    if run.gpu:
        pytest.skip("looking for such an id on a GPU would need a host sync")
    basis, coeff, ids = inputs((8, 33, 16, 3, 5), dtype, seed=7)
    ids[3] = bad
    with pytest.raises(RuntimeError, match=f"task_ids holds {bad}; allowed are 0 to 7"):
        run(basis, coeff, ids.to(id_dtype))


@ops.each("reconstruct", dtypes=FLOATS)
def test_threads_and_runs(run: ops.Overload, dtype: torch.dtype) -> None:
    for shape in [(8, 2051, 16, 3, 8), (20, 300, 64, 8, 20)]:
        given = [t.to(run.device) for t in inputs(shape, dtype, seed=8)]
        expected = run(*given)
        assert_same_bits(run(*given), expected)
        for number in (2, 3) if run.backend != "reference" else ():
            with ops.threads(number):
                assert_same_bits(run(*given), expected)


@ops.each_triton_way("reconstruct", dtypes=FLOATS)
@IDS
def test_triton_on_cpu(run: ops.Overload, dtype: torch.dtype, id_dtype: torch.dtype) -> None:
    """Partial blocks of positions and of tasks; any memory; ids that are out of range; NaN; empty shapes."""
    for shape in [(1, 1, 1, 1, 1), (8, 33, 16, 3, 5), (20, 70, 17, 5, 9), (8, 33, 16, 0, 3)]:
        basis, coeff, ids = inputs(shape, dtype, seed=sum(shape))
        check(basis, coeff, ids, run(basis, coeff, ids.to(id_dtype)))
    basis, coeff, ids = inputs((8, 33, 16, 3, 5), dtype, seed=2)
    ids = ids.to(id_dtype)
    expected = run(basis, coeff, ids)
    for layout in ("transposed", "stepped"):
        for which in range(3):
            given = [basis, coeff, ids]
            given[which] = LAYOUTS[layout](given[which])
            got = run(*given)
            assert_same_bits(got, expected)
            innermost_positions = given[0].stride(1) < given[0].stride(2)
            assert got.mT.is_contiguous() if innermost_positions else got.is_contiguous()
    unknown = ids.clone()
    unknown[1], unknown[3] = 8, -1
    got = run(basis, coeff, unknown)
    assert got[[1, 3]].isnan().all()
    assert_same_bits(got[[0, 2, 4]], expected[[0, 2, 4]])
    bad = coeff.clone()
    bad[ids[2], 1, 18] = torch.nan
    got = run(basis, bad, ids)
    assert got[ids == ids[2], 18].isnan().all()
    got[ids == ids[2], 18] = expected[ids == ids[2], 18]
    assert_same_bits(got, expected)
    for n, count, r, p, a in [(8, 33, 16, 3, 0), (8, 0, 16, 3, 4), (8, 33, 0, 3, 4)]:
        got = run(torch.ones(p + 1, count, r).to(dtype), torch.ones(n, p, count).to(dtype), torch.zeros(a, dtype=id_dtype))
        assert got.shape == (a, count, r)


@pytest.mark.parametrize("dtype", FLOATS, ids=ops.name)
def test_public_function(dtype: torch.dtype) -> None:
    given = inputs((8, 33, 16, 3, 5), dtype, seed=9)
    assert_same_bits(rmm_kernels.reconstruct(*given), ops.winner("reconstruct")(*given))


@ops.opcheck("reconstruct", dtypes=FLOATS)
def test_opcheck(run: ops.Overload, dtype: torch.dtype, handle: object) -> None:
    basis, coeff, ids = (t.to(run.device) for t in inputs((8, 19, 16, 3, 5), dtype, seed=10))
    torch.library.opcheck(handle, (basis, coeff, ids))
    torch.library.opcheck(handle, (LAYOUTS["transposed"](basis), LAYOUTS["stepped"](coeff), ids.int()))


@pytest.mark.parametrize("device", ops.devices())
def test_compile(device: str) -> None:
    compiled = torch.compile(rmm_kernels.reconstruct, fullgraph=True)
    for count in (19, 40, 41):
        given = [t.to(device) for t in inputs((8, count, 16, 3, 5), torch.float32, seed=count)]
        assert_same_bits(compiled(*given), rmm_kernels.reconstruct(*given))
        given[0] = LAYOUTS["transposed"](given[0])
        assert_same_bits(compiled(*given), rmm_kernels.reconstruct(*given))


ONES = {"basis": torch.ones(3, 5, 6), "coeff": torch.ones(4, 2, 5), "task_ids": torch.tensor([0, 3])}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"basis": torch.ones(5, 6)}, ValueError, r"basis must be \[p\+1, S, r\], got shape \[5, 6\]"),
        ({"coeff": torch.ones(4, 2)}, ValueError, r"coeff must be \[n, p, S\], got shape \[4, 2\]"),
        ({"basis": torch.ones(3, 5, 6).int()}, TypeError, "basis must be one of float32, .*, got int32"),
        ({"coeff": torch.ones(4, 2, 5).double()}, TypeError, "coeff is float64, basis float32; .* same dtype"),
        ({"coeff": torch.ones(4, 3, 5)}, ValueError, "basis holds 3 components with the mean, coeff 3 coefficients"),
        ({"basis": torch.ones(0, 5, 6)}, ValueError, "basis holds 0 components with the mean, coeff 2 coefficients"),
        ({"coeff": torch.ones(4, 2, 7)}, ValueError, r"coeff has shape \[4, 2, 7\]; axis 2 must be 5, as basis says"),
        ({"coeff": torch.ones(4, 2, 5, device="meta")}, ValueError, "coeff is on meta, basis on cpu"),
        ({"task_ids": torch.zeros(2, 2).long()}, ValueError, r"task_ids must be \[a\], got shape \[2, 2\]"),
        ({"task_ids": torch.tensor([0.0])}, TypeError, "task_ids must be one of int32, int64, got float32"),
        ({"task_ids": torch.zeros(2, device="meta").long()}, ValueError, "task_ids is on meta, basis on cpu"),
        ({"task_ids": [0]}, TypeError, "task_ids must be a torch.Tensor, got list"),
        ({"task_ids": torch.tensor([0, 4])}, RuntimeError, "task_ids holds 4; allowed are 0 to 3"),
        ({"task_ids": torch.tensor([-1, 0])}, RuntimeError, "task_ids holds -1; allowed are 0 to 3"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rmm_kernels.reconstruct(**{**ONES, **change})
