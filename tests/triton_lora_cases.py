"""The forward's part of triton_cases.CASES: both forms of shrink and expand at shipped configurations, gated by gpu_model."""

from __future__ import annotations

from dataclasses import replace

import torch
from lora_inputs import Problem, Shape, problem
from triton_cases import Case

from benchmarks import gpu_model
from rmm_kernels.triton_ops import lora, lora_forward
from rmm_kernels.triton_ops.lora import Config


def _problem(shape: Shape, dtype: torch.dtype, tasks: int) -> Problem:
    """Every token has a task; of several, none has a tile to itself."""
    return problem(shape, dtype, seed=3).change(task_ids=torch.arange(shape.tokens) % tasks)


def _case(
    tokens: int, width: int, r: int, p: int, tasks: int, dtype: torch.dtype = torch.bfloat16, bucket: int | None = None
) -> Case:
    """With `bucket`, the kernels that so many tokens would get, over as many programs along the positions."""
    shape = Shape(tokens, width, width, r, max(tasks, 2), p)
    batch = gpu_model.Batch(tokens, r, p, width, width, tokens, tasks, uniform=tasks == 1, itemsize=dtype.itemsize)

    def parameters(arch: str) -> tuple[Config, Config]:
        shrink, expand = gpu_model.configs(replace(batch, tokens=bucket or tokens), arch)
        return replace(shrink, programs=shrink.programs * tokens // (bucket or tokens)), expand

    def call() -> object:
        given = _problem(shape, dtype, tasks).forward
        if bucket is None:
            return torch.ops.rmm_kernels.lora_forward_.triton(*given)
        return lora_forward.lora_forward_(*given, *parameters(lora.arch(given[0].device)))

    return Case(
        name=f"lora_forward_ T={bucket or tokens} d={width} r={r} p={p} tasks={tasks} {str(dtype)[6:]}",
        call=call,
        dot=True,
        wgmma=(bucket or tokens) > 64,
        asynchronous=True,
        bytes=sum(work.requested for work in gpu_model.kernels(batch, *parameters("sm_80")).values()),
    )


CASES = [
    _case(16, 512, 16, 4, 16),
    _case(32, 512, 16, 4, 32),
    _case(64, 512, 16, 4, 64),
    _case(64, 512, 64, 8, 64, torch.float16),
    _case(128, 512, 16, 4, 16),
    _case(128, 512, 64, 4, 1),
    _case(128, 128, 16, 4, 16, bucket=2048),
    _case(128, 128, 256, 16, 16, bucket=2048),
    _case(16, 512, 16, 4, 16, torch.float32),
    _case(64, 512, 16, 0, 64, torch.float32),
    _case(64, 512, 64, 8, 64, torch.float32),
    _case(128, 512, 16, 4, 16, torch.float32),
    _case(128, 512, 64, 4, 1, torch.float32),
    _case(128, 128, 256, 16, 16, torch.float32, bucket=2048),
]
