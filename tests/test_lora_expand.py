"""lora_expand_: accuracy against fp64, what must keep every bit, ids, memory layouts, empty shapes, errors."""

from __future__ import annotations

import lora_inputs
import ops
import pytest
import torch
from lora_inputs import FEW_SHAPES, SHAPES, Problem, Shape, assert_bits_kept, magnitudes, poisoned, problem
from ops import FLOATS, LAYOUTS, LOW, assert_same_bits, one_thread, randn  # noqa: F401
from torch import Tensor

import rmm_kernels


def rows_of_u(p: Problem, shape: Shape) -> Tensor:
    """u [T, r] as a caller may hand it over: rows of −1 hold anything."""
    u = randn(shape.tokens, shape.r, seed=77, dtype=ops.accumulator(p.y.dtype), device=str(p.y.device))
    u[~p.active] = torch.nan
    return u


def check(p: Problem, u: Tensor, y: Tensor, tf32x3: bool = False) -> None:
    """`y` is p.y after the op: right where a task is, the same bits elsewhere."""
    dtype = p.y.dtype
    assert_bits_kept(p.y[~p.active], y[~p.active], "rows of −1")
    active = p.active.cpu()

    def updated(q: Problem, u: Tensor) -> Tensor:
        delta = lora_inputs.expand(u[active], q.basis_b, q.coeff_b, q.task_ids[active], q.scaling)
        return q.y[active] + delta

    wide, u = p.in_dtype(torch.float64), u.cpu()
    exact = updated(wide, u.double())
    lora_inputs.assert_rule("y", y[p.active], exact, updated(p.in_dtype(dtype), u.to(dtype)), dtype)
    if dtype not in LOW:
        terms = p.basis_b.shape[2] * p.basis_b.shape[0]
        lora_inputs.assert_accumulated("y", y[p.active], exact, updated(magnitudes(wide), u.double().abs()), terms, tf32x3)


def check_run(run: ops.Overload, p: Problem, u: Tensor) -> None:
    before = p.change(y=p.y.clone())
    assert run(*p.expand(u)) is None
    check(before, u, p.y, run.tf32x3)


@lora_inputs.each("lora_expand_", SHAPES, isas=True, ids=True)
def test_accuracy(run: ops.Overload, dtype: torch.dtype, shape: Shape, id_dtype: torch.dtype) -> None:
    p = problem(shape, dtype, seed=11, id_dtype=id_dtype).to(run.device)
    check_run(run, p, rows_of_u(p, shape))


@lora_inputs.each("lora_expand_", FEW_SHAPES)
def test_slice_of_a_fused_projection(run: ops.Overload, dtype: torch.dtype, shape: Shape) -> None:
    """y is some columns of a wider output; the columns beside it keep every bit, and so do rows of −1, NaN or not."""
    p = problem(shape, dtype, seed=12).to(run.device)
    u = rows_of_u(p, shape)
    first, last = 5, 5 + shape.width_out
    for padding in (17, 24):
        wide = poisoned(torch.empty(shape.tokens, shape.width_out + padding, dtype=dtype, device=run.device))
        wide[p.active, first:last] = p.y[p.active]
        before = wide.clone()
        q = p.change(y=wide[:, first:last])
        run(*q.expand(u))
        check(q.change(y=before[:, first:last]), u, wide[:, first:last], run.tf32x3)
        assert_bits_kept(before[:, :first], wide[:, :first], "columns on the left")
        assert_bits_kept(before[:, last:], wide[:, last:], "columns on the right")


@ops.each("lora_expand_", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_y(run: ops.Overload, dtype: torch.dtype, layout: str) -> None:
    for shape in FEW_SHAPES:
        p = problem(shape, dtype, seed=13).to(run.device)
        u = rows_of_u(p, shape)
        view = LAYOUTS[layout](p.y)
        storage = torch.as_strided(view, (view.untyped_storage().nbytes() // view.element_size(),), (1,), 0)
        outside = torch.ones_like(storage, dtype=torch.bool)
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        before = storage.clone()
        run(*p.change(y=view).expand(u))
        check(p, u, view)
        assert_bits_kept(before[outside], storage[outside], "memory around y")


@ops.each("lora_expand_", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("which", ["u", "basis_b", "coeff_b", "task_ids", "scaling"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs(run: ops.Overload, dtype: torch.dtype, layout: str, which: str) -> None:
    for shape in FEW_SHAPES:
        p = problem(shape, dtype, seed=14).to(run.device)
        u = rows_of_u(p, shape)
        before = u if which == "u" else getattr(p, which)
        view = LAYOUTS[layout](before)
        check_run(run, p if which == "u" else p.change(**{which: view}), view if which == "u" else u)
        assert_same_bits(view, before)


@ops.each("lora_expand_", dtypes=FLOATS)
def test_expanded_inputs(run: ops.Overload, dtype: torch.dtype) -> None:
    """Stride 0: one row of u, one row of coefficients, one id and one scaling for all."""
    for shape in FEW_SHAPES:
        p = problem(shape, dtype, seed=15).to(run.device)
        p = p.change(task_ids=torch.zeros_like(p.task_ids[:1]).expand_as(p.task_ids))
        u = rows_of_u(p, shape)
        check_run(run, p, u)
        check_run(run, p, u[:1].expand_as(u))
        check_run(run, p.change(coeff_b=p.coeff_b[:1].expand_as(p.coeff_b)), u)
        check_run(run, p.change(scaling=p.scaling[:1].expand_as(p.scaling)), u)


@lora_inputs.each("lora_expand_", FEW_SHAPES)
def test_no_row_of_a_task(run: ops.Overload, dtype: torch.dtype, shape: Shape) -> None:
    p = problem(shape, dtype, seed=16)
    p = p.change(task_ids=torch.full_like(p.task_ids, -1), y=poisoned(p.y)).to(run.device)
    before = p.y.clone()
    run(*p.expand(rows_of_u(p, shape)))
    assert_bits_kept(before, p.y, "y")


@ops.each("lora_expand_", dtypes=FLOATS)
def test_no_tasks(run: ops.Overload, dtype: torch.dtype) -> None:
    """n = 0: every id is −1."""
    shape = Shape(5, 33, 7, 8, 1, 2)
    p = problem(shape, dtype, seed=17).to(run.device)
    p = p.change(coeff_b=p.coeff_b[:0], scaling=p.scaling[:0], task_ids=torch.full_like(p.task_ids, -1))
    before = p.y.clone()
    run(*p.expand(rows_of_u(p, shape)))
    assert_bits_kept(before, p.y, "y")


@ops.each("lora_expand_", dtypes=FLOATS)
@pytest.mark.parametrize("shape", [Shape(5, 7, 0, 8, 3, 2), Shape(5, 7, 33, 0, 3, 2), Shape(0, 0, 0, 0, 1, 0)], ids=str)
def test_empty(run: ops.Overload, dtype: torch.dtype, shape: Shape) -> None:
    """Without outputs nothing happens; without rank, y + 0."""
    y = randn(shape.tokens, shape.width_out, seed=18, dtype=dtype, device=run.device)
    before = y.clone()
    sizes = [(shape.p + 1, shape.width_out, shape.r), (shape.n, shape.p, shape.width_out)]
    wide = ops.accumulator(dtype)
    run(
        y,
        torch.ones(shape.tokens, shape.r, dtype=wide, device=run.device),
        *(torch.ones(size, dtype=dtype, device=run.device) for size in sizes),
        torch.zeros(shape.tokens, dtype=torch.int64, device=run.device),
        torch.ones(shape.n, dtype=wide, device=run.device),
    )
    assert torch.equal(y, before)


@lora_inputs.each("lora_expand_", FEW_SHAPES)
def test_nan_stays_in_its_row(run: ops.Overload, dtype: torch.dtype, shape: Shape) -> None:
    """NaN in a row of u, in a row of y and in the scaling of a task shows in the rows of that token and task only."""
    p = problem(shape, dtype, seed=19).to(run.device)
    u = rows_of_u(p, shape)
    expected = p.change(y=p.y.clone())
    run(*expected.expand(u))
    first = (torch.arange(shape.tokens, device=run.device) == 0) & p.active
    hit = {"u": first, "y": first, "scaling": p.task_ids == 0}
    for which, rows in hit.items():
        q, changed = p.to(run.device), u.clone()
        if which == "u":
            changed[rows] = torch.nan
        elif which == "y":
            q.y[rows] = torch.nan
        else:
            q.scaling[0] = torch.nan
        run(*q.expand(changed))
        assert q.y[rows].isnan().all()
        assert_same_bits(q.y[~rows], expected.y[~rows])


@ops.each("lora_expand_", dtypes=FLOATS)
@ops.bad_ids(-2, 8)
def test_id_out_of_range(run: ops.Overload, dtype: torch.dtype, bad: int, id_dtype: torch.dtype) -> None:
    """Refused before anything is written; on a GPU, where looking would need a host sync, such a row is like −1."""
    shape = Shape(64, 7, 33, 8, 8, 2)
    p = problem(shape, dtype, seed=20).to(run.device)
    u = rows_of_u(p, shape)
    ids = p.task_ids.clone()
    ids[63] = bad
    before = p.y.clone()
    given = p.change(task_ids=ids.to(id_dtype)).expand(u)
    if not run.gpu:
        with pytest.raises(RuntimeError, match=f"task_ids holds {bad}; allowed are -1 to 7"):
            run(*given)
        assert_bits_kept(before, p.y, "y")
    else:
        run(*given)
        assert_bits_kept(before[63], p.y[63], "the row")


@ops.each("lora_expand_", dtypes=FLOATS)
def test_threads_and_runs(run: ops.Overload, dtype: torch.dtype) -> None:
    for shape in [Shape(64, 1, 1000, 16, 64, 3), Shape(257, 1, 384, 64, 2, 3), Shape(1, 1, 4096, 16, 8, 3)]:
        p = problem(shape, dtype, seed=21).to(run.device)
        u = rows_of_u(p, shape)
        results = []
        for number in (1, 1, 2, 3) if run.backend != "reference" else (1, 1):
            q = p.to(run.device)
            with ops.threads(number):
                run(*q.expand(u))
            results.append(q.y)
        for result in results[1:]:
            assert_same_bits(result, results[0])


@lora_inputs.on_cpu("lora_expand_")
def test_triton_on_cpu(run: ops.Overload, dtype: torch.dtype) -> None:
    """Any memory, ids out of range, tiles of one task, no tasks, empty shapes, u beyond fp16."""
    shape = Shape(19, 7, 40, 17, 5, 2)
    p = problem(shape, dtype, seed=24)
    u = rows_of_u(p, shape)

    def after(q: Problem, u: Tensor = u) -> Tensor:
        y = q.y.clone(memory_format=torch.preserve_format)
        run(*q.change(y=y).expand(u))
        return y

    expected = after(p)
    check(p, u, expected)
    for which, layout in [("y", "transposed"), ("basis_b", "transposed"), ("basis_b", "stepped"), ("coeff_b", "rotated")]:
        assert_same_bits(after(p.change(**{which: LAYOUTS[layout](getattr(p, which))})), expected)
    assert_same_bits(after(p.change(scaling=LAYOUTS["stepped"](p.scaling)), LAYOUTS["reversed"](u)), expected)
    far = torch.where(p.active, p.task_ids, torch.tensor([5, 2**31, -(2**40)])[torch.arange(19) % 3])
    assert_same_bits(after(p.change(task_ids=LAYOUTS["stepped"](far))), expected)
    one = p.change(task_ids=torch.where(p.active, 3, -1), coeff_b=p.coeff_b[:1].expand_as(p.coeff_b))
    check_run(run, one, u)
    huge = p.change(scaling=p.scaling * 2.0**-40, y=torch.zeros_like(p.y))
    assert_same_bits(after(huge, u * 2.0**40), after(p.change(y=torch.zeros_like(p.y))))
    nobody = p.change(coeff_b=p.coeff_b[:0], scaling=p.scaling[:0])
    assert_bits_kept(p.y, after(nobody), "y")
    for empty in [Shape(5, 7, 0, 8, 3, 2), Shape(5, 7, 33, 0, 3, 2), Shape(0, 0, 0, 0, 1, 0)]:
        q = problem(empty, dtype, seed=25).change(basis_b=torch.ones(empty.p + 1, empty.width_out, empty.r, dtype=dtype))
        assert_same_bits(after(q, torch.ones(empty.tokens, empty.r)), q.y)


@pytest.mark.parametrize("dtype", FLOATS, ids=ops.name)
def test_public_function(dtype: torch.dtype) -> None:
    shape = FEW_SHAPES[2]
    p = problem(shape, dtype, seed=22)
    u = rows_of_u(p, shape)
    expected = p.to("cpu")
    ops.winner("lora_expand_")(*expected.expand(u))
    assert rmm_kernels.lora_expand_(*p.expand(u)) is p.y
    assert_same_bits(p.y, expected.y)


@ops.opcheck("lora_expand_", dtypes=FLOATS)
def test_opcheck(run: ops.Overload, dtype: torch.dtype, handle: object) -> None:
    shape = FEW_SHAPES[2]
    p = problem(shape, dtype, seed=23).to(run.device)
    u = torch.where(p.active[:, None], rows_of_u(p, shape), 0)
    torch.library.opcheck(handle, p.expand(u))
    strided = p.change(basis_b=LAYOUTS["transposed"](p.basis_b), task_ids=p.task_ids.int())
    torch.library.opcheck(handle, strided.expand(LAYOUTS["sliced"](u)))


@pytest.mark.parametrize("device", ops.devices())
def test_compile(device: str) -> None:
    """In place, on a whole tensor and on a slice that is read afterwards."""

    def fused(wide: Tensor, *rest: Tensor) -> Tensor:
        rmm_kernels.lora_expand_(wide[:, 3:43], *rest)
        return rmm_kernels.gram(wide[None])

    compiled, compiled_fused = torch.compile(rmm_kernels.lora_expand_, fullgraph=True), torch.compile(fused, fullgraph=True)
    for tokens in (5, 64, 65):
        shape = Shape(tokens, 7, 40, 16, 8, 3)
        p = problem(shape, torch.float32, seed=tokens).to(device)
        u = torch.where(p.active[:, None], rows_of_u(p, shape), 0)
        expected = p.to(device)
        rmm_kernels.lora_expand_(*expected.expand(u))
        wide = torch.cat([p.y[:, :3], p.y, p.y[:, :4]], 1)
        gram = compiled_fused(wide, *p.expand(u)[1:])
        assert_same_bits(wide[:, 3:43], expected.y)
        assert_same_bits(gram, rmm_kernels.gram(wide[None]))
        assert_same_bits(compiled(*p.expand(u)), expected.y)
        assert_same_bits(p.y, expected.y)


def arguments() -> dict[str, Tensor]:
    return {
        "y": torch.ones(4, 5),
        "u": torch.ones(4, 2),
        "basis_b": torch.ones(3, 5, 2),
        "coeff_b": torch.ones(6, 2, 5),
        "task_ids": torch.tensor([0, 5, -1, 2]),
        "scaling": torch.ones(6),
    }


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"y": torch.ones(5)}, ValueError, r"y must be \[T, out\], got shape \[5\]"),
        ({"y": torch.ones(4, 5).int()}, TypeError, "y must be one of float32, .*, got int32"),
        ({"y": torch.ones(4, 1).expand(4, 5)}, ValueError, r"y has strides \[1, 0\] .* expanded view can't be written"),
        ({"y": torch.ones(4, 5).half()}, TypeError, "basis_b is float32, y float16; they must be of the same dtype"),
        ({"y": torch.ones(4, 6)}, ValueError, r"basis_b has shape \[3, 5, 2\]; axis 1 must be 6, as y says"),
        ({"y": torch.ones(3, 5)}, ValueError, r"task_ids has shape \[4\]; axis 0 must be 3, as y says"),
        ({"y": None}, TypeError, "y must be a torch.Tensor, got NoneType"),
        ({"u": torch.ones(4)}, ValueError, r"u must be \[T, r\], got shape \[4\]"),
        ({"u": torch.ones(4, 2).half()}, TypeError, "u must be float32 where y is float32, got float16"),
        ({"u": torch.ones(4, 2).double()}, TypeError, "u must be float32 where y is float32, got float64"),
        ({"u": torch.ones(5, 2)}, ValueError, r"u has shape \[5, 2\]; axis 0 must be 4, as y says"),
        ({"u": torch.ones(4, 3)}, ValueError, r"u has shape \[4, 3\]; axis 1 must be 2, as basis_b says"),
        ({"u": torch.ones(4, 2, device="meta")}, ValueError, "u is on meta, y on cpu"),
        ({"basis_b": torch.ones(5, 2)}, ValueError, r"basis_b must be \[p\+1, out, r\], got shape \[5, 2\]"),
        ({"basis_b": torch.ones(2, 5, 2)}, ValueError, "basis_b holds 2 components with the mean, coeff_b 2 coefficients"),
        ({"coeff_b": torch.ones(6, 5)}, ValueError, r"coeff_b must be \[n, p, out\], got shape \[6, 5\]"),
        ({"coeff_b": torch.ones(6, 2, 5).half()}, TypeError, "coeff_b is float16, basis_b float32"),
        ({"coeff_b": torch.ones(6, 2, 4)}, ValueError, r"coeff_b has shape \[6, 2, 4\]; axis 2 must be 5, as basis_b says"),
        ({"task_ids": torch.zeros(5).long()}, ValueError, r"task_ids has shape \[5\]; axis 0 must be 4, as y says"),
        ({"task_ids": torch.zeros(4)}, TypeError, "task_ids must be one of int32, int64, got float32"),
        ({"task_ids": torch.zeros(4, device="meta").long()}, ValueError, "task_ids is on meta, y on cpu"),
        ({"scaling": torch.ones(6, 1)}, ValueError, r"scaling must be \[n\], got shape \[6, 1\]"),
        ({"scaling": torch.ones(5)}, ValueError, r"scaling has shape \[5\]; axis 0 must be 6, as coeff_b says"),
        ({"scaling": torch.ones(6).double()}, TypeError, "scaling must be float32 where y is float32, got float64"),
        ({"scaling": torch.ones(6).int()}, TypeError, "scaling must be one of float32, .*, got int32"),
        ({"scaling": 2.0}, TypeError, "scaling must be a torch.Tensor, got float"),
        ({"task_ids": torch.tensor([0, 6, 0, 0])}, RuntimeError, "task_ids holds 6; allowed are -1 to 5"),
        ({"task_ids": torch.tensor([0, 0, -2, 0])}, RuntimeError, "task_ids holds -2; allowed are -1 to 5"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    given = {**arguments(), **change}
    with pytest.raises(error, match=message):
        rmm_kernels.lora_expand_(**given)
    if isinstance(given["y"], Tensor):
        assert (given["y"] == 1).all()
