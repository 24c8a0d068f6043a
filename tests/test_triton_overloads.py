"""Triton's overloads themselves, in the interpreter: opcheck, gradients on Triton's kernels alone, bf16, long sums."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lora_inputs
import ops
import pytest
import torch
from lora_inputs import FEW_SHAPES, Problem, Shape, problem
from ops import LAYOUTS, assert_same_bits, one_thread, randn  # noqa: F401
from test_lora_forward import check
from torch import Tensor

from rmm_kernels import reference

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction
from triton_runs import Simulator, interpret, running

from rmm_kernels.triton_ops import FILES, lora, lora_forward, lora_shrink
from rmm_kernels.triton_ops._launch import Launch

SHAPE = Shape(3, 20, 18, 4, 3, 2)


def _basis(dtype: torch.dtype) -> Tensor:
    return randn(3, 5, 8, seed=2, dtype=dtype) / 3


def _forward(dtype: torch.dtype) -> Problem:
    return problem(SHAPE, dtype, seed=3)


# Arguments of each op, small, once as they come and once strided.
ARGUMENTS: dict[str, Callable[[torch.dtype], list[tuple[Any, ...]]]] = {
    "gram": lambda dtype: [(randn(2, 9, 4, seed=1, dtype=dtype),), (randn(2, 4, 9, seed=1, dtype=dtype).mT, True)],
    "project": lambda dtype: [(randn(4, 5, 8, seed=1, dtype=dtype), _basis(dtype))],
    "reconstruct": lambda dtype: [
        (_basis(dtype), randn(4, 2, 5, seed=1, dtype=dtype), torch.tensor([3, 0])),
        (LAYOUTS["transposed"](_basis(dtype)), LAYOUTS["stepped"](randn(4, 2, 5, seed=1, dtype=dtype)), torch.tensor([1])),
    ],
    "compress": lambda dtype: [
        (randn(4, 5, 8, seed=1, dtype=dtype), 2),
        (LAYOUTS["transposed"](randn(6, 5, 3, seed=1, dtype=dtype)), 2),
    ],
    "truncated_svd": lambda dtype: [(randn(2, 6, 4, seed=1, dtype=dtype), 2), (randn(2, 6, 4, seed=1, dtype=dtype).mT, 2)],
    "lora_shrink": lambda dtype: [
        _forward(dtype).shrink,
        _forward(dtype).change(task_ids=_forward(dtype).task_ids.int()).shrink,
    ],
    "lora_expand_": lambda dtype: [_forward(dtype).expand(randn(SHAPE.tokens, SHAPE.r, seed=4))],
    "lora_forward_": lambda dtype: [_forward(dtype).forward],
    "lora_forward": lambda dtype: [_forward(dtype).forward],
}


@pytest.mark.parametrize("op", ARGUMENTS)
def test_opcheck(op: str) -> None:
    """Schema, autograd registration, fake, and what aot_autograd makes of it with dynamic shapes."""
    run = ops.Overload(op, "triton", "cpu", way="interpreter")
    with ops.triton_on_cpu("interpreter"):
        for arguments in ARGUMENTS[op](torch.float32):
            torch.library.opcheck(run.handle, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=ops.name)
def test_gradients_by_tritons_kernels_alone(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """As on a GPU that only Triton serves: there the default overloads, which backward calls, are Triton's."""
    shape = FEW_SHAPES[2]
    p = problem(shape, dtype, seed=43)
    direction = randn(shape.tokens, shape.width_out, seed=44, dtype=dtype)

    def gradient(p: Problem, direction: Tensor) -> Tensor:
        x = p.x.clone().requires_grad_()
        lora_inputs.masked_forward(p.change(x=x)).backward(direction)
        return x.grad

    exact = gradient(p.in_dtype(torch.float64), direction.double())
    plain = gradient(p.in_dtype(dtype), direction)
    run = ops.Overload("lora_forward", "triton", "cpu", way="interpreter")
    called: list[str] = []
    for op in ("lora_shrink", "lora_expand_"):
        handle = run.sibling(op).handle
        monkeypatch.setattr(
            torch.ops.rmm_kernels, op, lambda *args, op=op, handle=handle: (called.append(op), handle(*args))[1]
        )
    y, x = p.y.requires_grad_(), p.x.requires_grad_()
    with ops.triton_on_cpu("interpreter"):
        run.handle(*p.change(y=y, x=x).forward).backward(direction)
    assert called == ["lora_shrink", "lora_expand_"]
    assert_same_bits(y.grad, direction)
    lora_inputs.assert_rule("gradient of x", x.grad, exact, plain, dtype)


@triton.jit
def _round(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16))


@triton.jit
def _product(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def test_bf16_is_rounded_to_nearest() -> None:
    """Ties to even, infinities, what overflows, NaN: as torch does."""
    ties = (torch.arange(0x3F808000, 0x3F908000, 0x10000, dtype=torch.int32)).view(torch.float32)  # halfway
    x = torch.cat([ties, randn(109, seed=5), torch.tensor([torch.inf, 3.4e38, torch.nan])])
    out = torch.empty(128, dtype=torch.bfloat16)
    interpret(Launch(_round, (1,), (x, out), {"N": 128}, 4, 1, False))
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_bf16_products() -> None:
    a, b = randn(16, 16, seed=6, dtype=torch.bfloat16), randn(16, 16, seed=7, dtype=torch.bfloat16)
    out = torch.empty(16, 16)
    interpret(Launch(_product, (1,), (a, b, out), {"N": 16}, 4, 1, False))
    torch.testing.assert_close(out, a.float() @ b.float())


@pytest.mark.parametrize("op", ["gram", "project", "reconstruct", "compress", "lora_forward"])
def test_bf16(op: str) -> None:
    """Each output within the roundings of the fp32 one: rounding towards zero, or integers for bf16, would show."""
    run = ops.Overload(op, "triton", "cpu", way="interpreter")
    for arguments in ARGUMENTS[op](torch.bfloat16):
        got = run(*arguments)
        wide = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
        expected = getattr(reference, op)(*wide)
        if op == "compress":  # directions are free where singular values are close: the restored vectors are not
            every = torch.arange(len(arguments[0]))
            got = reference.reconstruct(got[0].float(), got[1].float(), every)
            expected = reference.reconstruct(expected[0], expected[1], every)
        error = (got.float() - expected).norm() / expected.norm()
        assert error <= (2**-8 if op in ("compress", "lora_forward") else 0.6 * 2**-8), error


def test_long_fp32_sums_are_not_the_tensor_cores() -> None:
    """Tensor cores cut every partial sum off, and errors of one sign add up: sums across tiles must be fp32's own."""
    width = 16384
    x, basis = randn(16, width, seed=8).abs(), randn(1, 16, width, seed=9).abs()
    config = replace(lora.configure("shrink", "sm_80", 16, 0, 16, width, 4), programs=1)
    with running(Simulator(seeds=(1,))):
        u = lora_shrink.lora_shrink(x, basis, torch.empty(1, 0, width), torch.zeros(16, dtype=torch.int64), config)
    exact = x.double() @ basis[0].double().mT
    lora_inputs.assert_accumulated("u", u, exact, exact, width)


@pytest.mark.parametrize("shape", [Shape(17, 40, 33, 256, 4096, 16), Shape(65536, 9, 8, 4, 3, 1)], ids=str)
def test_largest_sizes(shape: Shape) -> None:
    """The highest rank, the most components and tasks, the most tokens: as compiled, in the simulator."""
    p = problem(shape, torch.float16, seed=11)
    before = p.to("cpu")
    with running(Simulator(seeds=(1,))):
        lora_forward.lora_forward_(*p.forward)
    check(before, p.y)


# At once a rank, components and tasks beyond what the kernels are meant for, as far as each op has them.
BEYOND: dict[str, Callable[[], tuple[Any, ...]]] = {
    "gram": lambda: (randn(2, 257, 65, seed=1),),
    "truncated_svd": lambda: (randn(2, 257, 17, seed=1), 17),
    "project": lambda: (randn(4097, 2, 257, seed=1), randn(18, 2, 257, seed=2)),
    "reconstruct": lambda: (randn(18, 2, 257, seed=1), randn(4097, 17, 2, seed=2), torch.tensor([4096, 0])),
    "compress": lambda: (randn(19, 2, 257, seed=1), 17),
    "lora_shrink": lambda: problem(Shape(3, 20, 18, 257, 4097, 17), torch.float32, seed=3).shrink,
    "lora_forward": lambda: problem(Shape(3, 20, 18, 257, 4097, 17), torch.float32, seed=3).forward,
}


@pytest.mark.parametrize("op", BEYOND)
def test_larger_than_meant(op: str) -> None:
    """Works all the same: 257 ranks, 17 components, 4097 tasks."""
    arguments = BEYOND[op]()
    got = ops.Overload(op, "triton", "cpu", way="interpreter")(*arguments)
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    expected = getattr(reference, op)(*wide)
    if op == "compress":  # directions are free where singular values are close
        every = torch.arange(len(arguments[0]))
        got, expected = (reference.reconstruct(found[0], found[1], every) for found in (got, expected))
    if op == "truncated_svd":
        got, expected = ((u * s[:, None]) @ vh for u, s, vh in (got, expected))
    assert (got.double() - expected).norm() <= 1e-5 * expected.norm()


def calls(name: str) -> list[tuple[Path, ast.Call]]:
    """Every call of tl.<name> in the kernels' files."""
    found = []
    for path in sorted(Path(lora.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == f"tl.{name}":
                found.append((path, node))
    return found


def test_numerics_are_stated() -> None:
    """Each file of an op says what its kernels do, and each product in which precision: not Triton's defaults, which change."""
    for file in set(FILES.values()) - {"lora_forward"}:  # which launches the other two's
        assert "Numerics: " in importlib.import_module(f"rmm_kernels.triton_ops.{file}").__doc__, file
    products = calls("dot")
    assert len(products) >= 4
    for path, call in products:
        assert "input_precision" in {keyword.arg for keyword in call.keywords}, (path.name, call.lineno)


def test_nothing_is_tuned_inside_a_call() -> None:
    """What is launched is compiled for the parameters given, and how multiply-adds are fused is said each time."""
    launched: list[Launch] = []
    with running(lambda what: (launched.append(what), interpret(what))):
        for op, arguments in ARGUMENTS.items():
            getattr(torch.ops.rmm_kernels, op).triton(*arguments(torch.float32)[0])
    assert len(launched) >= len(ARGUMENTS)
    for what in launched:
        assert type(what.kernel) is JITFunction
        assert {"num_warps", "num_stages", "enable_fp_fusion"} <= what.options().keys()
