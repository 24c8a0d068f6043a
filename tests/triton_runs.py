"""Other ways to run what the Triton launchers launch: in Triton's interpreter, and as PTX for sm_80 in the simulator.

Both take the launch exactly as a GPU would get it: the same kernel, grid, arguments and configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from rmm_kernels.triton_ops import _launch, lora
from rmm_kernels.triton_ops._launch import Launch

sys.path.insert(0, str(Path(__file__).parent))
import ptxsim

SEEDS = (1, 2)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@contextmanager
def running(run: Callable[[Launch], None]) -> Iterator[None]:
    """Launches go to `run`."""
    before, _launch.run = _launch.run, run
    try:
        yield
    finally:
        _launch.run = before


@contextmanager
def configured_for(target: str) -> Iterator[None]:
    """The launchers of the forward choose their parameters for one of TARGETS."""
    before, lora.arch = lora.arch, lambda device: target
    try:
        yield
    finally:
        lora.arch = before


# ---------------------------------------------------------------- the interpreter


def _call_interpreted(function: Any, *args: Any, **kwargs: Any) -> Any:
    return interpreter.InterpretedFunction(function.fn).rewrite()(*args, **kwargs)


def _language() -> None:
    """Its globals are what the interpreter patches."""


_language.__globals__.setdefault("tl_core", tl.core)


def interpret(what: Launch) -> None:
    """Runs every program of the grid in numpy, on CPU tensors.

    Functions that the kernel calls, Triton's own ones too, are not decorated for the interpreter: they are made so at the
    call. The parts of the language that those use are patched for the time of the launch, as the interpreter patches them.
    """
    call, JITFunction.__call__ = JITFunction.__call__, _call_interpreted
    scope = interpreter._patch_lang(_language)
    try:
        interpreter.InterpretedFunction(what.kernel.fn)[what.grid](*what.arguments, **what.options())
    finally:
        scope.restore()
        JITFunction.__call__ = call


# ---------------------------------------------------------------- ahead of time, and the simulator


class _Target:
    """As much of a driver as compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"  # so that kernels of several targets are kept apart

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compiled(what: Launch, target: str) -> Any:
    """The kernel, specialised as the JIT would for these very arguments, compiled for one of TARGETS."""
    before, driver._active = driver._active, _Target(TARGETS[target])
    try:
        return what.kernel.run(*what.arguments, grid=what.grid, warmup=True, **what.options())
    finally:
        driver._active = before


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
