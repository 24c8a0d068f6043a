"""Every Triton kernel compiled ahead of time for five architectures, and run in the simulator: what the compiler made of it.

Gates, per case of triton_cases.CASES: no spills, shared memory within the limit, tensor-core instructions where a product is
meant, 128-bit loads, asynchronous copies in pipelined loops; from the simulator coalescing, bank conflicts and bytes moved.
`pytest tests/test_triton_aot.py -k compiled` prints the table (see conftest.py).
"""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("triton")
import triton_runs
from conftest import AddRow
from ops import one_thread  # noqa: F401
from triton_cases import CASES as COMPRESSION
from triton_cases import Case
from triton_lora_cases import CASES as FORWARD

from benchmarks import aot
from rmm_kernels.triton_ops import lora

CASES = [*COMPRESSION, *FORWARD]

# Bytes of shared memory that one program may have.
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}

TENSOR_CORE = {
    "sm_80": r"\bmma\.sync",
    "sm_90": r"\bwgmma\.mma_async|\bmma\.sync",
    "sm_100": r"\btcgen05\.mma|\bmma\.sync",
    "sm_120": r"\bmma\.sync",
    "gfx942": r"\bv_mfma_",
}
# A small tile over a wavefront of 64 is 64 bits a lane.
WIDE_LOAD = {"gfx942": r"\b(?:global|buffer)_load_dwordx[24]"}
WIDE_LOAD_PTX = r"\bld\.global\S*\.v(?:4\.b32|2\.b64|8\.b16)|\bcp\.async\.c[ag]\.shared\.global .*, 0x10"
ASYNCHRONOUS = r"\bcp\.async\.c[ag]\.shared|\bcp\.async\.bulk"
ATOMIC = r"(?<![.\w])(?:atom|red)\.|_atomic_"

COALESCING = 0.9
CONFLICTS = 1.2
TRAFFIC = 1.1


def facts(case: Case, target: str) -> list[dict[str, Any]]:
    """One row for each kernel that the case launches."""
    rows = []
    for what in aot.launches(case.call, target):
        kernel = aot.compiled(what, target)
        text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
        code = re.sub(r"//.*|\s;.*", "", text) if "ptx" in kernel.asm else text
        row = {"case": case.name, "kernel": what.kernel.__name__, "arch": target, **aot.resources(kernel)}
        row["mma"] = len(re.findall(TENSOR_CORE[target], code))
        row["wgmma"] = len(re.findall(r"\bwgmma\.mma_async", code))
        row["wide"] = len(re.findall(WIDE_LOAD.get(target, WIDE_LOAD_PTX), code))
        row["async"] = len(re.findall(ASYNCHRONOUS, code))
        assert not re.search(ATOMIC, code), row
        row["instructions"] = len(re.findall(r"^\s+(?:@!?%p\d+ )?[a-z][\w.]+[ \t;]", code, re.MULTILINE))
        rows.append(row)
    assert rows, f"{case.name} launches nothing"
    return rows


COMPILED = [(case, target) for case in CASES for target in case.targets or triton_runs.TARGETS]


@pytest.mark.parametrize("case, target", COMPILED, ids=[f"{case.name}-{target}" for case, target in COMPILED])
def test_compiled(case: Case, target: str, add_row: AddRow) -> None:
    rows = facts(case, target)
    for row in rows:
        add_row(row)
        assert row["spills"] == 0, row
        assert row["shared"] <= SHARED[target], row
    total = {key: sum(row[key] for row in rows) for key in ("mma", "wgmma", "wide", "async")}
    if case.dot:
        assert total["mma"], rows
    if case.wgmma and target == "sm_90":
        assert total["wgmma"], rows
    if case.wide_loads:
        assert total["wide"], rows
    if case.asynchronous and target != "gfx942":
        assert total["async"], rows


def test_every_row_of_the_table_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(lora, "_find", lambda *asked, find=lora._find: (found.append(find(*asked)), found[-1])[1])
    for case in FORWARD:
        for target in triton_runs.TARGETS:
            aot.launches(case.call, target)
    assert [row for row in lora.TABLE if row not in found] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_simulated(case: Case) -> None:
    simulator = triton_runs.Simulator(seeds=(1,))
    with triton_runs.running(simulator):
        case.call()
    sectors = 0
    for counts in simulator.counts:
        assert counts["local"]["requests"] == 0
        assert counts["shared"]["wavefronts"] <= CONFLICTS * counts["shared"]["ideal_wavefronts"], counts["shared"]
        for access in counts["regions"]:
            if access["sectors"] >= 64:  # less is edges: a tensor of a few ids starts and ends within a sector
                efficiency = access["ideal_sectors"] / access["sectors"]
                assert efficiency >= COALESCING, (counts["kernel"], access, efficiency)
        sectors += sum(counts["global"][kind]["sectors"] for kind in ("load", "store"))
    assert 32 * sectors <= TRAFFIC * case.bytes, (32 * sectors, case.bytes, 32 * sectors / case.bytes)
