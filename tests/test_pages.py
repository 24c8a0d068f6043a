"""Large results of the CPU kernels lie in memory for which huge pages are asked."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ops import randn
from torch import Tensor

ops = torch.ops.rmm_kernels

POSITIONS = 600_000  # of rank 4: every result is beyond the 32 MiB that malloc may keep for later, so it is fresh

pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no transparent huge pages"
)


def asked_for(result: Tensor) -> bool:
    """Whether the mapping that holds the middle of a result has the flag of huge pages, "hg"."""
    middle = result.data_ptr() + result.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds the result")


RESULTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "basis": lambda x, basis, coeff: ops.compress.cpu(x, 3)[0],
    "coeff": lambda x, basis, coeff: ops.compress.cpu(x, 3)[1],
    "project": lambda x, basis, coeff: ops.project.cpu(x, basis),
    "reconstruct": lambda x, basis, coeff: ops.reconstruct.cpu(basis, coeff, torch.arange(8)),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_large_result(name: str) -> None:
    result = RESULTS[name](*(randn(*shape, seed=0) for shape in ((8, POSITIONS, 4), (4, POSITIONS, 4), (8, 3, POSITIONS))))
    assert result.nbytes > 1 << 25
    assert asked_for(result)
