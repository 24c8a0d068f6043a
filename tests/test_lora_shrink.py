"""lora_shrink: accuracy against fp64, ids, memory layouts, empty shapes, errors."""

from __future__ import annotations

import lora_inputs
import ops
import pytest
import torch
from lora_inputs import FEW_SHAPES, SHAPES, Problem, Shape, magnitudes, problem
from ops import FLOATS, LAYOUTS, LOW, assert_same_bits, one_thread, randn  # noqa: F401
from torch import Tensor

import rmm_kernels


def check(p: Problem, u: Tensor) -> None:
    dtype = p.x.dtype
    assert (u.shape, u.dtype) == ((p.x.shape[0], p.basis_a.shape[1]), ops.accumulator(dtype))
    assert u.is_contiguous()
    assert not u.cpu()[~p.active.cpu()].any(), "a row of −1 must be 0"
    wide = p.in_dtype(torch.float64)
    exact = lora_inputs.shrink(*wide.shrink)
    lora_inputs.assert_rule("u", u, exact, lora_inputs.shrink(*p.in_dtype(dtype).shrink), dtype)
    if dtype not in LOW:
        terms = p.x.shape[1] * p.basis_a.shape[0]
        lora_inputs.assert_accumulated("u", u, exact, lora_inputs.shrink(*magnitudes(wide).shrink), terms)


@lora_inputs.each("lora_shrink", SHAPES, isas=True, ids=True)
def test_accuracy(run: ops.Overload, dtype: torch.dtype, shape: Shape, id_dtype: torch.dtype) -> None:
    p = problem(shape, dtype, seed=1, id_dtype=id_dtype)
    check(p, run(*p.to(run.device).shrink))


@lora_inputs.each("lora_shrink", FEW_SHAPES)
def test_no_row_of_a_task(run: ops.Overload, dtype: torch.dtype, shape: Shape) -> None:
    p = problem(shape, dtype, seed=2)
    p = p.change(task_ids=torch.full_like(p.task_ids, -1), x=lora_inputs.poisoned(p.x)).to(run.device)
    u = run(*p.shrink)
    assert u.shape == (shape.tokens, shape.r) and not u.any()


@ops.each("lora_shrink", dtypes=FLOATS)
def test_no_tasks(run: ops.Overload, dtype: torch.dtype) -> None:
    """n = 0: every id is −1."""
    p = problem(Shape(5, 33, 7, 8, 1, 2), dtype, seed=3).to(run.device)
    p = p.change(coeff_a=p.coeff_a[:0], task_ids=torch.full_like(p.task_ids, -1))
    u = run(*p.shrink)
    assert u.shape == (5, 8) and not u.any()


@ops.each("lora_shrink", dtypes=FLOATS)
@pytest.mark.parametrize("shape", [Shape(5, 0, 7, 8, 3, 2), Shape(5, 33, 7, 0, 3, 2), Shape(0, 0, 0, 0, 1, 0)], ids=str)
def test_empty(run: ops.Overload, dtype: torch.dtype, shape: Shape) -> None:
    sizes = {"x": (shape.tokens, shape.width_in), "basis_a": (shape.p + 1, shape.r, shape.width_in)}
    sizes["coeff_a"] = (shape.n, shape.p, shape.width_in)
    given = [torch.ones(size, dtype=dtype, device=run.device) for size in sizes.values()]
    u = run(*given, torch.zeros(shape.tokens, dtype=torch.int64, device=run.device))
    assert (u.shape, u.dtype) == ((shape.tokens, shape.r), ops.accumulator(dtype)) and not u.any()


@ops.each("lora_shrink", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("which", ["x", "basis_a", "coeff_a", "task_ids"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(run: ops.Overload, dtype: torch.dtype, layout: str, which: str) -> None:
    for shape in FEW_SHAPES:
        p = problem(shape, dtype, seed=4).to(run.device)
        before = getattr(p, which)
        view = LAYOUTS[layout](before)
        check(p, run(*p.change(**{which: view}).shrink))
        assert_same_bits(view, before)


@ops.each("lora_shrink", dtypes=FLOATS)
def test_expanded_inputs(run: ops.Overload, dtype: torch.dtype) -> None:
    """Stride 0: one token, one row of coefficients, one id for all."""
    for shape in FEW_SHAPES:
        p = problem(shape, dtype, seed=5).to(run.device)
        one_x, one_id = p.x[:1].expand_as(p.x), torch.zeros_like(p.task_ids[:1]).expand_as(p.task_ids)
        one_coeff = p.coeff_a[:1].expand_as(p.coeff_a)
        for change in ({"x": one_x}, {"task_ids": one_id}, {"coeff_a": one_coeff}):
            changed = p.change(**change)
            check(changed, run(*changed.shrink))


@lora_inputs.each("lora_shrink", FEW_SHAPES)
def test_nan_stays_in_its_row(run: ops.Overload, dtype: torch.dtype, shape: Shape) -> None:
    """NaN in a token, and in the coefficients of a task, shows in the rows of that token and task only."""
    p = problem(shape, dtype, seed=6).to(run.device)
    expected = run(*p.shrink)
    x = p.x.clone()
    x[0] = torch.nan
    row = torch.arange(shape.tokens, device=run.device) == 0
    got = run(*p.change(x=x).shrink)
    assert got[row & p.active].isnan().all() and not got[row & ~p.active].any()
    assert_same_bits(got[~row], expected[~row])

    if shape.p and shape.n > 1:
        coeff_a = p.coeff_a.clone()
        coeff_a[1] = torch.nan
        got = run(*p.change(coeff_a=coeff_a).shrink)
        assert got[p.task_ids == 1].isnan().all()
        assert_same_bits(got[p.task_ids != 1], expected[p.task_ids != 1])


@ops.each("lora_shrink", dtypes=FLOATS)
@ops.bad_ids(-2, 8)
def test_id_out_of_range(run: ops.Overload, dtype: torch.dtype, bad: int, id_dtype: torch.dtype) -> None:
    p = problem(Shape(64, 33, 7, 8, 8, 2), dtype, seed=7).to(run.device)
    ids = p.task_ids.clone()
    ids[40] = bad
    given = p.change(task_ids=ids.to(id_dtype)).shrink
    if not run.gpu:
        with pytest.raises(RuntimeError, match=f"task_ids holds {bad}; allowed are -1 to 7"):
            run(*given)
    else:
        assert not run(*given)[40].any()


@ops.each("lora_shrink", dtypes=FLOATS)
def test_threads_and_runs(run: ops.Overload, dtype: torch.dtype) -> None:
    for shape in [Shape(64, 1000, 1, 16, 64, 3), Shape(257, 384, 1, 64, 2, 3), Shape(1, 4096, 1, 16, 8, 3)]:
        p = problem(shape, dtype, seed=8).to(run.device)
        expected = run(*p.shrink)
        assert_same_bits(run(*p.shrink), expected)
        for number in (2, 3) if run.backend != "reference" else ():
            with ops.threads(number):
                assert_same_bits(run(*p.shrink), expected)


@lora_inputs.on_cpu("lora_shrink")
def test_triton_on_cpu(run: ops.Overload, dtype: torch.dtype) -> None:
    """Any memory, ids out of range, tiles of one task, no tasks, empty shapes."""
    p = problem(Shape(19, 33, 7, 17, 5, 2), dtype, seed=12)
    expected = run(*p.shrink)
    for which, layout in [("x", "transposed"), ("x", "stepped"), ("basis_a", "reversed"), ("coeff_a", "rotated")]:
        assert_same_bits(run(*p.change(**{which: LAYOUTS[layout](getattr(p, which))}).shrink), expected)
    far = torch.where(p.active, p.task_ids, torch.tensor([5, 2**31, -(2**40)])[torch.arange(19) % 3])
    assert_same_bits(run(*p.change(task_ids=LAYOUTS["stepped"](far)).shrink), expected)
    one = p.change(task_ids=torch.where(p.active, 3, -1), coeff_a=p.coeff_a[:1].expand_as(p.coeff_a))
    check(one, run(*one.shrink))
    assert not run(*p.change(coeff_a=p.coeff_a[:0]).shrink).any()
    for shape in [Shape(5, 0, 7, 8, 3, 2), Shape(5, 33, 7, 0, 3, 2), Shape(0, 0, 0, 0, 1, 0)]:
        empty = problem(shape, dtype, seed=13).change(basis_a=torch.ones(shape.p + 1, shape.r, shape.width_in, dtype=dtype))
        u = run(*empty.shrink)
        assert u.shape == (shape.tokens, shape.r) and not u.any()


@pytest.mark.parametrize("dtype", FLOATS, ids=ops.name)
def test_public_function(dtype: torch.dtype) -> None:
    p = problem(FEW_SHAPES[2], dtype, seed=9)
    assert_same_bits(rmm_kernels.lora_shrink(*p.shrink), ops.winner("lora_shrink")(*p.shrink))


@ops.opcheck("lora_shrink", dtypes=FLOATS)
def test_opcheck(run: ops.Overload, dtype: torch.dtype, handle: object) -> None:
    p = problem(FEW_SHAPES[2], dtype, seed=10).to(run.device)
    torch.library.opcheck(handle, p.shrink)
    strided = p.change(x=LAYOUTS["sliced"](p.x), basis_a=LAYOUTS["transposed"](p.basis_a), task_ids=p.task_ids.int())
    torch.library.opcheck(handle, strided.shrink)


@pytest.mark.parametrize("device", ops.devices())
def test_compile(device: str) -> None:
    compiled = torch.compile(rmm_kernels.lora_shrink, fullgraph=True)
    for tokens in (5, 64, 65):
        p = problem(Shape(tokens, 33, 7, 16, 8, 3), torch.float32, seed=tokens).to(device)
        assert_same_bits(compiled(*p.shrink), rmm_kernels.lora_shrink(*p.shrink))


def arguments() -> dict[str, Tensor]:
    return {
        "x": torch.ones(4, 5),
        "basis_a": torch.ones(3, 2, 5),
        "coeff_a": torch.ones(6, 2, 5),
        "task_ids": torch.tensor([0, 5, -1, 2]),
    }


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(5)}, ValueError, r"x must be \[T, in\], got shape \[5\]"),
        ({"x": torch.ones(1, 4, 5)}, ValueError, r"x must be \[T, in\], got shape \[1, 4, 5\]"),
        ({"x": torch.ones(4, 5).int()}, TypeError, "x must be one of float32, .*, got int32"),
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(4, 5).half()}, TypeError, "basis_a is float32, x float16; they must be of the same dtype"),
        ({"x": torch.ones(4, 6)}, ValueError, r"basis_a has shape \[3, 2, 5\]; axis 2 must be 6, as x says"),
        ({"x": torch.ones(3, 5)}, ValueError, r"task_ids has shape \[4\]; axis 0 must be 3, as x says"),
        ({"basis_a": torch.ones(2, 5)}, ValueError, r"basis_a must be \[p\+1, r, in\], got shape \[2, 5\]"),
        ({"basis_a": torch.ones(2, 2, 5)}, ValueError, "basis_a holds 2 components with the mean, coeff_a 2 coefficients"),
        ({"basis_a": torch.ones(0, 2, 5)}, ValueError, "basis_a holds 0 components with the mean"),
        ({"coeff_a": torch.ones(6, 2)}, ValueError, r"coeff_a must be \[n, p, in\], got shape \[6, 2\]"),
        ({"coeff_a": torch.ones(6, 2, 5).double()}, TypeError, "coeff_a is float64, basis_a float32"),
        ({"coeff_a": torch.ones(6, 2, 4)}, ValueError, r"coeff_a has shape \[6, 2, 4\]; axis 2 must be 5, as basis_a says"),
        ({"coeff_a": torch.ones(6, 2, 5, device="meta")}, ValueError, "coeff_a is on meta, basis_a on cpu"),
        ({"task_ids": torch.zeros(4, 1).long()}, ValueError, r"task_ids must be \[T\], got shape \[4, 1\]"),
        ({"task_ids": torch.zeros(4).short()}, TypeError, "task_ids must be one of int32, int64, got int16"),
        ({"task_ids": torch.zeros(4)}, TypeError, "task_ids must be one of int32, int64, got float32"),
        ({"task_ids": torch.zeros(4, device="meta").long()}, ValueError, "task_ids is on meta, x on cpu"),
        ({"task_ids": torch.tensor([0, 6, 0, 0])}, RuntimeError, "task_ids holds 6; allowed are -1 to 5"),
        ({"task_ids": torch.tensor([0, 0, -2, 0])}, RuntimeError, "task_ids holds -2; allowed are -1 to 5"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rmm_kernels.lora_shrink(**{**arguments(), **change})
