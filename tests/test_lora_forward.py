"""lora_forward_ and lora_forward: accuracy, what must keep every bit, shrink + expand, gradients, layouts, errors."""

from __future__ import annotations

import lora_inputs
import ops
import pytest
import torch
from lora_inputs import FEW_SHAPES, SHAPES, Problem, Shape, assert_bits_kept, magnitudes, poisoned, problem
from ops import FLOATS, LAYOUTS, LOW, assert_same_bits, one_thread  # noqa: F401
from torch import Tensor

import rmm_kernels
from rmm_kernels import _library

NAMES = ("y", "x", "basis_a", "coeff_a", "basis_b", "coeff_b", "task_ids", "scaling")


def with_nan_beside(p: Problem) -> Problem:
    """Rows of −1 are NaN in x and, with a payload, in y: the base model's own, and nobody's business."""
    x, y = p.x.clone(), p.y.clone()
    x[~p.active], y[~p.active] = torch.nan, poisoned(y[~p.active])
    return p.change(x=x, y=y)


def check(p: Problem, y: Tensor) -> None:
    """`y` is what p.y must become: right where a task is, the same bits elsewhere."""
    dtype = p.y.dtype
    assert_bits_kept(p.y[~p.active], y[~p.active], "rows of −1")
    active = p.active.cpu()
    rows = {name: getattr(p, name).cpu()[active] for name in ("y", "x", "task_ids")}
    wide = Problem(**{**vars(p), **rows}).in_dtype(torch.float64)
    exact = lora_inputs.forward(wide)
    plain = lora_inputs.forward(Problem(**{**vars(p), **rows}).in_dtype(dtype))
    lora_inputs.assert_rule("y", y[p.active], exact, plain, dtype)
    if dtype not in LOW:
        terms = p.x.shape[1] * p.basis_a.shape[0] + p.basis_b.shape[2] * p.basis_b.shape[0]
        lora_inputs.assert_accumulated("y", y[p.active], exact, lora_inputs.forward(magnitudes(wide)), terms)


@lora_inputs.each("lora_forward_", SHAPES, isas=True, ids=True)
def test_accuracy(run: ops.Overload, dtype: torch.dtype, shape: Shape, id_dtype: torch.dtype) -> None:
    p = with_nan_beside(problem(shape, dtype, seed=31, id_dtype=id_dtype).to(run.device))
    before = p.to(run.device)
    assert run(*p.forward) is None
    check(before, p.y)
    for name in NAMES[1:]:
        assert_same_bits(getattr(p, name), getattr(before, name))


@lora_inputs.each("lora_forward", SHAPES, on_cpu=FEW_SHAPES)
def test_functional(run: ops.Overload, dtype: torch.dtype, shape: Shape) -> None:
    """The same bits as in place, in a new contiguous tensor; y keeps its own."""
    p = with_nan_beside(problem(shape, dtype, seed=32).to(run.device))
    before, in_place = p.to(run.device), p.to(run.device)
    result = run(*p.forward)
    run.sibling("lora_forward_")(*in_place.forward)
    assert_same_bits(result, in_place.y)
    assert_same_bits(p.y, before.y)
    assert result.is_contiguous()
    assert result.untyped_storage().data_ptr() != p.y.untyped_storage().data_ptr() or not result.numel()
    transposed = run(*p.change(y=LAYOUTS["transposed"](p.y)).forward)
    assert transposed.is_contiguous()
    check(before, transposed)


@lora_inputs.each("lora_forward_", SHAPES, on_cpu=FEW_SHAPES)
def test_equals_shrink_and_expand(run: ops.Overload, dtype: torch.dtype, shape: Shape) -> None:
    """One op does what the two do; u in between is not rounded to x's dtype, so only sums may differ, and one rounding."""
    p = problem(shape, dtype, seed=33).to(run.device)
    both = p.to(run.device)
    run(*p.forward)
    u = run.sibling("lora_shrink")(*both.shrink)
    run.sibling("lora_expand_")(*both.expand(u))
    wide = magnitudes(both.in_dtype(torch.float64))
    rows = wide.active
    size = torch.zeros_like(wide.y)
    size[rows] = lora_inputs.forward(wide.change(y=wide.y[rows], x=wide.x[rows], task_ids=wide.task_ids[rows]))
    terms = shape.width_in * p.basis_a.shape[0] + shape.r * p.basis_b.shape[0]
    summing = (4 + terms**0.5) * ops.roundoff(ops.accumulator(dtype)) * size
    rounding = torch.finfo(dtype).eps * both.y.cpu().double().abs() if dtype in LOW else 0.0
    ops.assert_within("difference", (p.y.cpu().double() - both.y.cpu().double()).abs(), summing + rounding + 1e-300)


@lora_inputs.each("lora_forward_", FEW_SHAPES)
def test_slice_of_a_fused_projection(run: ops.Overload, dtype: torch.dtype, shape: Shape) -> None:
    """y is some columns of a wider output; the columns beside it keep every bit, and so do rows of −1."""
    p = with_nan_beside(problem(shape, dtype, seed=34).to(run.device))
    first, last = 5, 5 + shape.width_out
    wide = poisoned(torch.empty(shape.tokens, shape.width_out + 17, dtype=dtype, device=run.device))
    wide[:, first:last] = p.y
    before = wide.clone()
    run(*p.change(y=wide[:, first:last]).forward)
    check(p.change(y=before[:, first:last]), wide[:, first:last])
    assert_bits_kept(before[:, :first], wide[:, :first], "columns on the left")
    assert_bits_kept(before[:, last:], wide[:, last:], "columns on the right")


@ops.each("lora_forward_", dtypes=FLOATS, isas=True)
@pytest.mark.parametrize("which", NAMES)
def test_memory_layouts(run: ops.Overload, dtype: torch.dtype, which: str) -> None:
    failures = ops.Failures()
    for name, layout in LAYOUTS.items():
        for shape in FEW_SHAPES:
            p = problem(shape, dtype, seed=35).to(run.device)
            view = layout(getattr(p, which))
            q = p.to(run.device).change(**{which: view})
            run(*q.forward)
            with failures.case(f"{name} {shape}"):
                check(p, q.y)
    failures.report()


@lora_inputs.each("lora_forward_", FEW_SHAPES)
def test_no_row_of_a_task(run: ops.Overload, dtype: torch.dtype, shape: Shape) -> None:
    p = problem(shape, dtype, seed=36)
    p = with_nan_beside(p.change(task_ids=torch.full_like(p.task_ids, -1)).to(run.device))
    before = p.y.clone()
    run(*p.forward)
    assert_bits_kept(before, p.y, "y")


@ops.each("lora_forward_", dtypes=FLOATS)
def test_no_tasks(run: ops.Overload, dtype: torch.dtype) -> None:
    """n = 0: every id is −1."""
    p = problem(Shape(5, 7, 33, 8, 1, 2), dtype, seed=37).to(run.device)
    p = p.change(coeff_a=p.coeff_a[:0], coeff_b=p.coeff_b[:0], scaling=p.scaling[:0])
    p = p.change(task_ids=torch.full_like(p.task_ids, -1))
    before = p.y.clone()
    run(*p.forward)
    assert_bits_kept(before, p.y, "y")


@ops.each("lora_forward_", dtypes=FLOATS)
@pytest.mark.parametrize(
    "shape",
    [Shape(5, 0, 33, 8, 3, 2), Shape(5, 7, 0, 8, 3, 2), Shape(5, 7, 33, 0, 3, 2), Shape(0, 7, 33, 8, 3, 2)],
    ids=str,
)
def test_empty(run: ops.Overload, dtype: torch.dtype, shape: Shape) -> None:
    """Without tokens or outputs nothing happens; without rank or inputs, y + 0."""
    p, q = shape.p + 1, shape.p
    sizes = [(p, shape.r, shape.width_in), (shape.n, q, shape.width_in), (p, shape.width_out, shape.r)]
    sizes.append((shape.n, q, shape.width_out))
    y = ops.randn(shape.tokens, shape.width_out, seed=38, dtype=dtype, device=run.device)
    before = y.clone()
    run(
        y,
        torch.ones(shape.tokens, shape.width_in, dtype=dtype, device=run.device),
        *(torch.ones(size, dtype=dtype, device=run.device) for size in sizes),
        torch.zeros(shape.tokens, dtype=torch.int64, device=run.device),
        torch.ones(shape.n, dtype=ops.accumulator(dtype), device=run.device),
    )
    assert torch.equal(y, before)


@lora_inputs.each("lora_forward_", FEW_SHAPES)
def test_nan_stays_in_its_row(run: ops.Overload, dtype: torch.dtype, shape: Shape) -> None:
    """NaN in a token, or in what belongs to one task, shows in the rows of that token or task only."""
    p = problem(shape, dtype, seed=39).to(run.device)
    expected = p.to(run.device)
    run(*expected.forward)
    first = (torch.arange(shape.tokens, device=run.device) == 0) & p.active
    hit = {"x": first, "y": first, "scaling": p.task_ids == 0}
    if shape.p:
        hit |= {"coeff_a": p.task_ids == 0, "coeff_b": p.task_ids == 0}
    for which, rows in hit.items():
        q = p.to(run.device)
        value = getattr(q, which)
        value[rows if which in ("x", "y") else 0] = torch.nan
        run(*q.forward)
        assert q.y[rows].isnan().all()
        assert_same_bits(q.y[~rows], expected.y[~rows])


@pytest.mark.parametrize("op", ["lora_forward_", "lora_forward"])
@ops.bad_ids(-2, 8)
def test_id_out_of_range(op: str, bad: int, id_dtype: torch.dtype) -> None:
    """Refused before anything is written; on a GPU, where looking would need a host sync, such a row is like −1."""
    for run in ops.overloads(op) + ops.triton_ways(op)[:1]:
        for tokens, dtype in [(1, torch.float32), (64, torch.bfloat16), (257, torch.float16)]:
            if dtype not in run.dtypes:
                continue
            p = problem(Shape(tokens, 7, 33, 8, 8, 2), dtype, seed=40).to(run.device)
            ids = p.task_ids.clone()
            ids[-1] = bad
            before = p.y.clone()
            given = p.change(task_ids=ids.to(id_dtype)).forward
            if not run.gpu:
                with pytest.raises(RuntimeError, match=f"task_ids holds {bad}; allowed are -1 to 7"):
                    run(*given)
                assert_bits_kept(before, p.y, "y")
            else:
                result = run(*given)
                assert_bits_kept(before[-1], (p.y if result is None else result)[-1], "the row")


@ops.each("lora_forward_", dtypes=FLOATS)
def test_threads_and_runs(run: ops.Overload, dtype: torch.dtype) -> None:
    for shape in [Shape(64, 1000, 1000, 16, 64, 3), Shape(257, 384, 384, 64, 2, 3), Shape(1, 4096, 4096, 16, 8, 3)]:
        p = problem(shape, dtype, seed=41).to(run.device)
        results = []
        for number in (1, 1, 2, 3) if run.backend != "reference" else (1, 1):
            q = p.to(run.device)
            with ops.threads(number):
                run(*q.forward)
            results.append(q.y)
        for result in results[1:]:
            assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=ops.name)
@pytest.mark.parametrize(
    "run", [run for run in ops.overloads("lora_forward_") + ops.lesser_isas("lora_forward_") if run.backend == "cpu"], ids=str
)
def test_rows_do_not_depend_on_the_batch(run: ops.Overload, dtype: torch.dtype) -> None:
    """A row keeps every bit, alone or among others, whichever form its task takes and wherever a chunk ends."""
    shapes = [Shape(268, 1100, 700, 7, 3, 2), Shape(37, 64, 33, 16, 30, 3), Shape(9, 40, 7, 5, 2, 0)]
    shapes += [Shape(26, 300, 290, 17, 19, p) for p in (1, 4, 5, 6)]
    for shape in shapes:
        p = problem(shape, dtype, seed=52)
        whole, single, few = p.to("cpu"), p.to("cpu"), p.to("cpu")
        run(*whole.forward)
        for row in range(shape.tokens):
            one = slice(row, row + 1)
            run(*single.change(y=single.y[one], x=p.x[one], task_ids=p.task_ids[one]).forward)
        for rows in torch.randperm(shape.tokens, generator=torch.Generator().manual_seed(1)).split(11):
            y = p.y[rows]
            run(*p.change(y=y, x=p.x[rows], task_ids=p.task_ids[rows]).forward)
            few.y[rows] = y
        assert_same_bits(single.y, whole.y)
        assert_same_bits(few.y, whole.y)
        for form in (1, shape.tokens + 1):  # restored, direct
            q, before = p.to("cpu"), _library._C.force_restored(form)
            try:
                run(*q.forward)
            finally:
                _library._C.force_restored(before)
            assert_same_bits(q.y, whole.y)


@ops.each("lora_forward", dtypes=(torch.float64,))
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_gradcheck(run: ops.Overload, dtype: torch.dtype, shape: Shape) -> None:
    small = Shape(min(shape.tokens, 7), 5, 6, min(shape.r, 3), min(shape.n, 4), shape.p)
    p = problem(small, dtype, seed=42).to(run.device)
    y, x, *constants = p.forward
    assert torch.autograd.gradcheck(lambda y, x: run(y, x, *constants), (y.requires_grad_(), x.requires_grad_()))


@lora_inputs.each("lora_forward", FEW_SHAPES, dtypes=(torch.float32, *LOW))
def test_gradients(run: ops.Overload, dtype: torch.dtype, shape: Shape) -> None:
    """Within the forward's own rule of the fp64 gradients; rows of −1 pass y's gradient on and give x none."""
    p = problem(shape, dtype, seed=43)
    direction = ops.randn(shape.tokens, shape.width_out, seed=44, dtype=dtype)

    def gradients(p: Problem, direction: Tensor) -> tuple[Tensor, Tensor]:
        y, x = p.y.clone().requires_grad_(), p.x.clone().requires_grad_()
        lora_inputs.masked_forward(p.change(y=y, x=x)).backward(direction)
        return y.grad, x.grad

    _, exact = gradients(p.in_dtype(torch.float64), direction.double())
    _, plain = gradients(p.in_dtype(dtype), direction)
    q = p.to(run.device)
    y, x = q.y.requires_grad_(), q.x.requires_grad_()
    run(*q.forward).backward(direction.to(run.device))
    assert_same_bits(y.grad.cpu(), direction)
    assert not x.grad[~q.active].any()
    lora_inputs.assert_rule("gradient of x", x.grad, exact, plain, dtype)


@ops.each("lora_forward")
def test_gradient_of_one_input_only(run: ops.Overload) -> None:
    p = problem(FEW_SHAPES[2], torch.float32, seed=45).to(run.device)
    for which in ("x", "y"):
        leaf = getattr(p, which).clone().requires_grad_()
        result = run(*p.change(**{which: leaf}).forward)
        result.sum().backward()
        assert leaf.grad.shape == leaf.shape and leaf.grad.isfinite().all()
    assert not run(*p.forward).requires_grad


@ops.each("lora_forward")
def test_gradient_of_strided_inputs(run: ops.Overload) -> None:
    """Gradients of views, and of an expanded output gradient (sum's)."""
    p = problem(FEW_SHAPES[2], torch.float32, seed=46).to(run.device)
    plain = p.x.clone().requires_grad_()
    run(*p.change(x=plain).forward).sum().backward()
    strided = LAYOUTS["transposed"](p.x).requires_grad_()
    run(*p.change(x=strided, y=LAYOUTS["sliced"](p.y)).forward).sum().backward()
    torch.testing.assert_close(strided.grad, plain.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["basis_a", "coeff_a", "basis_b", "coeff_b", "scaling"])
def test_constants_that_require_gradients_are_refused(which: str) -> None:
    p = problem(FEW_SHAPES[2], torch.float32, seed=47)
    q = p.change(**{which: getattr(p, which).clone().requires_grad_()})
    with pytest.raises(ValueError, match=f"{which} requires a gradient; lora_forward has gradients for x and y only"):
        rmm_kernels.lora_forward(*q.forward)
    with torch.no_grad():
        assert_same_bits(rmm_kernels.lora_forward(*q.forward), rmm_kernels.lora_forward(*p.forward))


@pytest.mark.parametrize("dtype", FLOATS, ids=ops.name)
def test_public_functions(dtype: torch.dtype) -> None:
    p = problem(FEW_SHAPES[2], dtype, seed=48)
    expected = p.to("cpu")
    ops.winner("lora_forward_")(*expected.forward)
    assert_same_bits(rmm_kernels.lora_forward(*p.forward), expected.y)
    assert rmm_kernels.lora_forward_(*p.forward) is p.y
    assert_same_bits(p.y, expected.y)


@ops.opcheck("lora_forward_", dtypes=FLOATS)
def test_opcheck_in_place(run: ops.Overload, dtype: torch.dtype, handle: object) -> None:
    p = problem(FEW_SHAPES[2], dtype, seed=49).to(run.device)
    torch.library.opcheck(handle, p.forward)
    strided = p.change(basis_b=LAYOUTS["transposed"](p.basis_b), task_ids=p.task_ids.int(), x=LAYOUTS["sliced"](p.x))
    torch.library.opcheck(handle, strided.forward)


@ops.opcheck("lora_forward", dtypes=FLOATS)
def test_opcheck_functional(run: ops.Overload, dtype: torch.dtype, handle: object) -> None:
    p = problem(FEW_SHAPES[2], dtype, seed=50).to(run.device)
    torch.library.opcheck(handle, p.change(y=LAYOUTS["transposed"](p.y)).forward)
    p.y.requires_grad_()
    p.x.requires_grad_()
    torch.library.opcheck(handle, p.forward)


@pytest.mark.parametrize("device", ops.devices())
def test_compile(device: str) -> None:
    """In place on a tensor and on a slice that is read afterwards, and functional with its gradients; T may change."""

    def fused(wide: Tensor, *rest: Tensor) -> Tensor:
        rmm_kernels.lora_forward_(wide[:, 3:43], *rest)
        return rmm_kernels.gram(wide[None])

    in_place = torch.compile(rmm_kernels.lora_forward_, fullgraph=True)
    in_slice = torch.compile(fused, fullgraph=True)
    functional = torch.compile(rmm_kernels.lora_forward, fullgraph=True)
    for tokens in (5, 64, 65):
        p = problem(Shape(tokens, 33, 40, 16, 8, 3), torch.float32, seed=tokens).to(device)
        expected = rmm_kernels.lora_forward(*p.forward)
        assert_same_bits(functional(*p.forward), expected)

        leaves = {"compiled": p.x.clone().requires_grad_(), "eager": p.x.clone().requires_grad_()}
        functional(*p.change(x=leaves["compiled"]).forward).backward(p.y)
        rmm_kernels.lora_forward(*p.change(x=leaves["eager"]).forward).backward(p.y)
        assert_same_bits(leaves["compiled"].grad, leaves["eager"].grad)

        wide = torch.cat([p.y[:, :3], p.y, p.y[:, :4]], 1)
        gram = in_slice(wide, *p.forward[1:])
        assert_same_bits(wide[:, 3:43], expected)
        assert_same_bits(gram, rmm_kernels.gram(wide[None]))
        assert_same_bits(in_place(*p.forward), expected)
        assert_same_bits(p.y, expected)


def arguments() -> dict[str, Tensor]:
    return {
        "y": torch.ones(4, 5),
        "x": torch.ones(4, 3),
        "basis_a": torch.ones(3, 2, 3),
        "coeff_a": torch.ones(6, 2, 3),
        "basis_b": torch.ones(2, 5, 2),
        "coeff_b": torch.ones(6, 1, 5),
        "task_ids": torch.tensor([0, 5, -1, 2]),
        "scaling": torch.ones(6),
    }


@pytest.mark.parametrize("function", [rmm_kernels.lora_forward_, rmm_kernels.lora_forward])
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"y": torch.ones(5)}, ValueError, r"y must be \[T, out\], got shape \[5\]"),
        ({"y": torch.ones(4, 1).expand(4, 5)}, ValueError, r"y has strides \[1, 0\] .* expanded view can't be written"),
        ({"y": torch.ones(4, 6)}, ValueError, r"basis_b has shape \[2, 5, 2\]; axis 1 must be 6, as y says"),
        ({"y": torch.ones(4, 5).half()}, TypeError, "basis_b is float32, y float16"),
        ({"y": torch.ones(4, 5, device="meta")}, ValueError, "basis_b is on cpu, y on meta"),
        ({"x": torch.ones(4, 3, 1)}, ValueError, r"x must be \[T, in\], got shape \[4, 3, 1\]"),
        ({"x": torch.ones(4, 3).bool()}, TypeError, "x must be one of float32, .*, got bool"),
        ({"x": torch.ones(4, 2)}, ValueError, r"basis_a has shape \[3, 2, 3\]; axis 2 must be 2, as x says"),
        ({"x": torch.ones(3, 3)}, ValueError, r"task_ids has shape \[4\]; axis 0 must be 3, as x says"),
        ({"x": torch.ones(4, 3).half()}, TypeError, "basis_a is float32, x float16"),
        ({"basis_a": torch.ones(2, 3)}, ValueError, r"basis_a must be \[p\+1, r, in\], got shape \[2, 3\]"),
        ({"basis_a": torch.ones(4, 2, 3)}, ValueError, "basis_a holds 4 components with the mean, coeff_a 2 coefficients"),
        ({"basis_a": torch.ones(3, 4, 3)}, ValueError, r"basis_a has shape \[3, 4, 3\]; axis 1 must be 2, as basis_b says"),
        ({"coeff_a": torch.ones(6, 2, 4)}, ValueError, r"coeff_a has shape \[6, 2, 4\]; axis 2 must be 3, as basis_a says"),
        ({"coeff_a": torch.ones(7, 2, 3)}, ValueError, r"coeff_a has shape \[7, 2, 3\]; axis 0 must be 6, as coeff_b says"),
        ({"coeff_a": torch.ones(6, 2, 3).double()}, TypeError, "coeff_a is float64, basis_a float32"),
        ({"basis_b": torch.ones(2, 5)}, ValueError, r"basis_b must be \[p\+1, out, r\], got shape \[2, 5\]"),
        ({"basis_b": torch.ones(3, 5, 2)}, ValueError, "basis_b holds 3 components with the mean, coeff_b 1 coefficients"),
        ({"coeff_b": torch.ones(6, 1, 4)}, ValueError, r"coeff_b has shape \[6, 1, 4\]; axis 2 must be 5, as basis_b says"),
        ({"coeff_b": torch.ones(6, 1, 5, device="meta")}, ValueError, "coeff_b is on meta, basis_b on cpu"),
        ({"task_ids": torch.zeros(3).long()}, ValueError, r"task_ids has shape \[3\]; axis 0 must be 4, as x says"),
        ({"task_ids": torch.zeros(4)}, TypeError, "task_ids must be one of int32, int64, got float32"),
        ({"task_ids": [0, 0, 0, 0]}, TypeError, "task_ids must be a torch.Tensor, got list"),
        ({"scaling": torch.ones(5)}, ValueError, r"scaling has shape \[5\]; axis 0 must be 6, as coeff_b says"),
        ({"scaling": torch.ones(6).half()}, TypeError, "scaling must be float32 where y is float32, got float16"),
        ({"scaling": torch.ones(6, device="meta")}, ValueError, "scaling is on meta, y on cpu"),
        ({"task_ids": torch.tensor([0, 6, 0, 0])}, RuntimeError, "task_ids holds 6; allowed are -1 to 5"),
        ({"task_ids": torch.tensor([0, 0, -2, 0])}, RuntimeError, "task_ids holds -2; allowed are -1 to 5"),
    ],
)
def test_bad_arguments(function: object, change: dict[str, object], error: type[Exception], message: str) -> None:
    given = {**arguments(), **change}
    with pytest.raises(error, match=message):
        function(**given)
    if given["y"].device.type == "cpu":
        assert (given["y"] == 1).all()
