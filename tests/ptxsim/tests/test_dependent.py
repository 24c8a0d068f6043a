"""A kernel that may start before the one before it has ended: what it must leave alone until it has waited."""

import numpy as np
import pytest

import ptxsim

WAIT = "griddepcontrol.wait;"
LOAD = "ld.global.u32 %r1, [%rd0];"
STORE = "st.global.u32 [%rd1], %r0;"
ADD = "red.global.add.u32 [%rd1], 1;"


def run(body: str, **pending: list[np.ndarray]) -> None:
    """Of `given` and `taken`, which `pending` may name."""
    text = f"""
.version 8.4
.target sm_90
.address_size 64
.visible .entry k(.param .u64 given, .param .u64 taken)
{{
  .reg .pred %p<2>; .reg .b32 %r<4>; .reg .b64 %rd<4>;
  ld.param.u64 %rd0, [given]; ld.param.u64 %rd1, [taken];
  mov.u32 %r0, %tid.x; mul.wide.u32 %rd2, %r0, 4; add.u64 %rd0, %rd0, %rd2; add.u64 %rd1, %rd1, %rd2;
  setp.lt.u32 %p0, %r0, 32;
  griddepcontrol.launch_dependents;
  {body}
  ret;
}}
"""
    ptxsim.Module(text).launch("k", 2, 64, [GIVEN, TAKEN], check=False, **pending)


GIVEN, TAKEN = np.zeros(64, np.uint32), np.zeros(64, np.uint32)


@pytest.mark.parametrize("body", [LOAD + STORE, "@%p0 " + WAIT + LOAD, LOAD + WAIT])
def test_read_too_early(body: str) -> None:
    with pytest.raises(ptxsim.SimulationError, match=r"reads 0x\w+, which the kernel before this one may still write"):
        run(body, pending_writes=[GIVEN])


@pytest.mark.parametrize("body", [STORE, ADD, STORE + WAIT])
def test_written_too_early(body: str) -> None:
    with pytest.raises(ptxsim.SimulationError, match="which the kernel before this one may still read"):
        run(body, pending_reads=[TAKEN])
    with pytest.raises(ptxsim.SimulationError, match="which the kernel before this one may still write"):
        run(body, pending_writes=[TAKEN[60:]])


def test_what_is_allowed() -> None:
    run(WAIT + LOAD + STORE + ADD, pending_writes=[GIVEN, TAKEN], pending_reads=[GIVEN, TAKEN])
    run(LOAD + WAIT + STORE, pending_reads=[GIVEN, TAKEN], pending_writes=[TAKEN])
    run(LOAD + STORE)
