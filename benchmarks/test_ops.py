"""The other ops beside plain torch, each first compared with the reference in fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import rmm_kernels
from rmm_kernels import reference

from . import peers, workloads
from .timing import rounds, stopwatch
from .workloads import LOWRANK, OURS, SVD, OpInputs, Workload

WORKLOADS = workloads.OPS
CONTENDERS = dict.fromkeys((OURS, *dict.fromkeys(name for op in peers.OPS.values() for name in op)))


def _prepare(workload: Workload, contender: str) -> Callable[[OpInputs], Callable[[], object]]:
    def ours(inputs: OpInputs) -> Callable[[], object]:
        op = getattr(rmm_kernels, workload.op)
        return lambda: op(*inputs.arguments)

    return ours if contender == OURS else lambda inputs: peers.OPS[workload.op][contender](*inputs.arguments)


def _check(workload: Workload) -> Callable[[OpInputs, str, Callable[[], object]], float]:
    """One call, in place or not, gives what the reference gives in fp64; an SVD is judged by what it restores."""

    def check(inputs: OpInputs, contender: str, call: Callable[[], object]) -> float:
        wide = [
            value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs.arguments
        ]
        in_place = workload.op.endswith("_")
        if in_place:
            inputs.arguments[0].zero_()
            wide[0].zero_()
        if workload.op == "truncated_svd":
            (u, s, vh), seconds = stopwatch(call)
            x, rank = wide
            sigma = torch.linalg.svdvals(x)
            error = torch.linalg.matrix_norm(x - (u.double() * s.double()[:, None]) @ vh.double())
            best = sigma[:, rank:].square().sum(-1).sqrt()
            allowed = 1e-2 if contender == LOWRANK else 1e-5 if contender == SVD or len(x) == 1 else inputs.allowed
            assert ((error - best) / sigma.square().sum(-1).sqrt()).max() <= allowed
            return seconds
        expected = getattr(reference, workload.op)(*wide)
        result, seconds = stopwatch(call)
        expected, result = (wide[0], inputs.arguments[0]) if in_place else (expected, result)
        assert (result - expected).norm() <= inputs.allowed * expected.norm()
        return seconds

    return check


def test_op(benchmark, prepared, workload, turn, contender):
    call, seconds = prepared.call(workload, contender, _prepare(workload, contender), _check(workload))
    benchmark.pedantic(call, **rounds(seconds))
