"""The forward's part of triton_cases.CASES: both forms of shrink and expand at shipped configurations, gated by gpu_model."""

from __future__ import annotations

import torch
from lora_inputs import Problem, Shape, problem
from triton_cases import Case

from benchmarks import gpu_model


def _problem(shape: Shape, dtype: torch.dtype, tasks: int) -> Problem:
    """Every token has a task; of several, none has a tile to itself."""
    return problem(shape, dtype, seed=3).change(task_ids=torch.arange(shape.tokens) % tasks)


def _case(
    tokens: int, width: int, r: int, p: int, tasks: int, dtype: torch.dtype = torch.bfloat16, simulated: bool = True
) -> Case:
    shape = Shape(tokens, width, width, r, max(tasks, 2), p)
    batch = gpu_model.Batch(tokens, r, p, width, width, tokens, tasks, uniform=tasks == 1, itemsize=dtype.itemsize)

    def call() -> object:
        return torch.ops.rmm_kernels.lora_forward_.triton(*_problem(shape, dtype, tasks).forward)

    return Case(
        name=f"lora_forward_ T={tokens} d={width} r={r} p={p} tasks={tasks} {str(dtype)[6:]}",
        call=call,
        dot=True,
        wgmma=tokens > 64,
        asynchronous=True,
        bytes=sum(work.requested for work in gpu_model.kernels(batch, "sm_80").values()) if simulated else None,
    )


CASES = [
    _case(16, 512, 16, 4, 16),
    _case(64, 512, 64, 8, 64, torch.float16),
    _case(128, 512, 16, 4, 16),
    _case(128, 512, 64, 4, 1),
    _case(2048, 512, 16, 4, 16, simulated=False),
    _case(2048, 512, 256, 16, 16, simulated=False),
    _case(16, 512, 16, 4, 16, torch.float32),
    _case(64, 512, 64, 8, 64, torch.float32),
    _case(128, 512, 16, 4, 16, torch.float32),
    _case(128, 512, 64, 4, 1, torch.float32),
    _case(2048, 512, 256, 16, 16, torch.float32, simulated=False),
]
