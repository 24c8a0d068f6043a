"""The one place where a Triton kernel is launched.

A launcher computes grid, arguments and configuration from shapes, strides and dtypes alone, and hands them to `launch`. So
the same launcher serves a GPU, Triton's interpreter and a simulator: they differ in what `run` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the @triton.jit function.
        grid: programs along up to three axes, of which only the first may pass 65535.
        arguments: positional, tensors and scalars, as the kernel takes them.
        constants: the kernel's constexpr parameters, by name.
        num_warps, num_stages: as Triton means them.
        fp_fusion: whether the compiler may make a product and a sum one fused multiply-add, which rounds once. Not beside
            a sum across lanes of products: each lane would fuse its own one, and lanes that hold copies of the sum would
            differ in bits. tl.fma is always fused.
        maxnreg: registers that a thread may take, from `most_registers`; None leaves it to the compiler.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    fp_fusion: bool
    maxnreg: int | None = None

    def options(self) -> dict[str, Any]:
        """Everything that is passed by name: constants, and how to compile."""
        return {
            **self.constants,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fp_fusion,
            **({} if self.maxnreg is None else {"maxnreg": self.maxnreg}),
        }


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 1,
    fp_fusion: bool = False,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """Run `kernel` on the device of its arguments; nothing where the grid is empty."""
    if all(grid):
        run(Launch(kernel, grid, arguments, constants, num_warps, num_stages, fp_fusion, maxnreg))


def run_on_gpu(what: Launch) -> None:
    """On the current stream of the device that the first tensor among the arguments is on."""
    device = next(value.device for value in what.arguments if isinstance(value, Tensor))
    if device.type != "cuda":
        raise RuntimeError(f"Triton kernels run on cuda tensors, got one on {device}")
    with torch.cuda.device(device):
        what.kernel[what.grid](*what.arguments, **what.options())


# What `launch` does with a launch; tests put other ways to run it here.
run = run_on_gpu


def most_registers(arch: str, num_warps: int) -> int | None:
    """All the registers that a thread of so many warps can have, for kernels that hold a matrix in them.

    Left alone, NVIDIA's compiler spills a few so that another block fits. AMD's takes no such option.
    """
    return min(255, 65536 // (32 * num_warps)) if arch.startswith("sm_") else None


def require(condition: bool, expected: str) -> None:
    """The layout a kernel relies on is there; the public functions have checked it, so this is for whoever goes past them."""
    if not condition:
        raise RuntimeError(f"arguments do not fit together: expected {expected}")


def require_floats(*tensors: Tensor) -> None:
    """All are of one dtype that the kernels take, and on one device."""
    first = tensors[0]
    require(
        first.dtype in (torch.float32, torch.float16, torch.bfloat16) and all(t.dtype == first.dtype for t in tensors),
        "float32, float16 or bfloat16, the same for all",
    )
    require(all(t.device == first.device for t in tensors), "all tensors on one device")


def vector_width(x: Tensor) -> int:
    """How many neighbours along the last axis of x one 128-bit access takes, 1 where x's memory does not allow it.

    A property of the tensor, not of the part of it that a program sees: every matrix of a batch is treated alike.
    """
    width = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and x.shape[-1] % width == 0 and all(s % width == 0 for s in x.stride()[:-1])
    return width if x.stride(-1) == 1 and aligned else 1
