"""The mixed-task LoRA part of one layer against PEFT's own and against batched products on restored adapters."""

from __future__ import annotations

from collections.abc import Callable

import torch

import rmm_kernels
from rmm_kernels import reference

from . import peers, workloads
from .timing import rounds, stopwatch
from .workloads import OURS, ForwardInputs

WORKLOADS = workloads.FORWARD
CONTENDERS = {OURS: lambda inputs: lambda: rmm_kernels.lora_forward_(*inputs.arguments()), **peers.FORWARD}


def _check(inputs: ForwardInputs, contender: str, call: Callable[[], object]) -> float:
    """One call adds to y what the reference adds in fp64, up to fp32's rounding."""
    _, *rest = inputs.arguments()
    expected = torch.zeros_like(inputs.y, dtype=torch.float64)
    wide = [value.double() if value.is_floating_point() else value for value in rest]
    reference.lora_forward_(expected, *wide)
    inputs.y.zero_()
    _, seconds = stopwatch(call)
    assert (inputs.y - expected).norm() <= 2e-6 * expected.norm()
    return seconds


def test_forward(benchmark, prepared, workload, turn, contender):
    call, seconds = prepared.call(workload, contender, CONTENDERS[contender], _check)
    benchmark.pedantic(call, **rounds(seconds))
