"""Other ways to run what the Triton launchers launch: in Triton's interpreter, and as PTX for sm_80 in the simulator.

Both take the launch exactly as a GPU would get it: the same kernel, grid, arguments and configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from rmm_kernels.triton_ops._launch import Launch

sys.path.insert(0, str(Path(__file__).parent))
import ptxsim

from benchmarks.aot import compiled
from benchmarks.aot import running as running

SEEDS = (1, 2)

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


# ---------------------------------------------------------------- the interpreter


def _call_interpreted(function: Any, *args: Any, **kwargs: Any) -> Any:
    return interpreter.InterpretedFunction(function.fn).rewrite()(*args, **kwargs)


def _language() -> None:
    """Its globals are what the interpreter patches."""


_language.__globals__.setdefault("tl_core", tl.core)


def _cast(builder: Any, src: Any, dst_type: Any) -> Any:
    """The interpreter's own, but that fp32 is rounded to bf16 as hardware does: to nearest, ties to even. It would truncate."""
    if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
        return _own_cast(builder, src, dst_type)
    rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
    return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)


def _dot(builder: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
    """The interpreter's own, but that operands in bf16, which it keeps as integers and would multiply as such, are widened, and
    that products are summed in fp64: in what order numpy's BLAS adds depends on the CPU, and then a Gram matrix need not be
    symmetric to the bit."""
    if a.dtype.scalar == tl.bfloat16:
        a, b = _own_cast(builder, a, tl.float32), _own_cast(builder, b, tl.float32)
    product = np.matmul(a.data, b.data, dtype=np.float64)
    return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


_own_cast = interpreter.InterpreterBuilder.cast_impl
_own_dot = interpreter.InterpreterBuilder.create_dot


def interpret(what: Launch) -> None:
    """Runs every program of the grid in numpy, on CPU tensors.

    Functions that the kernel calls, Triton's own ones too, are not decorated for the interpreter: they are made so at the
    call. The parts of the language that those use are patched for the time of the launch, as the interpreter patches them;
    and numpy has no bf16: what the interpreter does wrongly for want of it, and our kernels need, is mended (_cast, _dot).
    """
    builder = interpreter.InterpreterBuilder
    call, JITFunction.__call__ = JITFunction.__call__, _call_interpreted
    scope = interpreter._patch_lang(_language)
    builder.cast_impl, builder.create_dot = _cast, _dot
    try:
        interpreter.InterpretedFunction(what.kernel.fn)[what.grid](*what.arguments, **what.options())
    finally:
        builder.cast_impl, builder.create_dot = _own_cast, _own_dot
        scope.restore()
        JITFunction.__call__ = call


# ---------------------------------------------------------------- ahead of time, and the simulator


def runtime_arguments(what: Launch, kernel: Any) -> list[Any]:
    """What is left of the arguments to pass: those that were not compiled in (an int of 1, say)."""
    named = dict(zip(what.kernel.arg_names, what.arguments, strict=False))
    return [value for name, value in named.items() if kernel.src.signature[name] != "constexpr"]


_simulated: dict[int, ptxsim.TritonKernel] = {}


def simulate(what: Launch, seed: int, **options: Any) -> dict[str, Any]:
    """Runs the sm_80 PTX on CPU tensors with every check on; returns the simulator's counts."""
    kernel = compiled(what, "sm_80")
    if id(kernel) not in _simulated:  # the JIT keeps compiled kernels for good
        _simulated[id(kernel)] = ptxsim.from_triton(kernel)
    return _simulated[id(kernel)](what.grid, *runtime_arguments(what, kernel), seed=seed, **options)


class Simulator:
    """Runs each launch once for each of SEEDS, from the same memory, and demands the same bits of all of them."""

    def __init__(self, seeds: tuple[int, ...] = SEEDS) -> None:
        self.seeds = seeds
        self.counts: list[dict[str, Any]] = []

    def __call__(self, what: Launch) -> None:
        from ops import assert_same_bits

        tensors = [value for value in what.arguments if isinstance(value, Tensor)]
        before = [value.clone() for value in tensors]
        first: list[Tensor] = []
        for seed in self.seeds:
            for value, kept in zip(tensors, before, strict=True):
                if first and value.numel() and 0 not in value.stride():
                    value.copy_(kept)
            self.counts.append(simulate(what, seed))
            if first:
                assert_same_bits(tensors, first)
            else:
                first = [value.clone() for value in tensors]


RUNNERS: dict[str, Callable[[], Callable[[Launch], None]]] = {"interpreter": lambda: interpret, "ptxsim": Simulator}
