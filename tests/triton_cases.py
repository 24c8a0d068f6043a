"""What tests/test_triton_aot.py compiles, runs in the simulator and gates: every Triton op at its shipped configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of a Triton op, on CPU tensors.

    Attributes:
        name: unique: op, sizes, dtype, layout.
        call: makes the arguments, calls the launcher, and returns the tensors it read and wrote.
        dot: a tensor-core product is meant: mma on every arch that has it.
        wgmma: on sm_90 that is wgmma.
        wide_loads: global loads of 128 bits are meant.
        asynchronous: loads are pipelined through shared memory.
        bytes: the traffic that the op's model says; None where the simulator is not to run this case.
    """

    name: str
    call: Callable[[], Any]
    dot: bool = False
    wgmma: bool = False
    wide_loads: bool = True
    asynchronous: bool = False
    bytes: int | None = None


def size(*tensors: Tensor) -> int:
    """Bytes of tensors read or written once."""
    return sum(value.numel() * value.element_size() for value in tensors)


CASES: list[Case] = []
