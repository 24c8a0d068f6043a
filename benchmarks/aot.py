"""What the Triton launchers launch, compiled ahead of time for an architecture that need not be here."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from rmm_kernels.triton_ops import _launch, lora
from rmm_kernels.triton_ops._launch import Launch


def target_of(arch: str) -> GPUTarget:
    """Of "sm_90" or "gfx942", as `lora.arch` names them."""
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


@contextmanager
def running(run: Callable[[Launch], None]) -> Iterator[None]:
    """Launches go to `run`."""
    before, _launch.run = _launch.run, run
    try:
        yield
    finally:
        _launch.run = before


@contextmanager
def configured_for(arch: str) -> Iterator[None]:
    """The launchers choose their parameters for `arch`."""
    before, lora.arch = lora.arch, lambda device: arch
    try:
        yield
    finally:
        lora.arch = before


def launches(call: Callable[[], object], arch: str) -> list[Launch]:
    """What `call`, of a launcher on CPU tensors, launches on `arch`; nothing runs."""
    collected: list[Launch] = []
    with running(collected.append), configured_for(arch):
        call()
    return collected


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


def compiled(what: Launch, arch: str) -> Any:
    """The kernel, specialised as the JIT would for these very arguments, compiled for `arch`."""
    place = "_active" if hasattr(driver, "_active") else "active"  # the latter in Triton 3.4
    before = getattr(driver, place)
    setattr(driver, place, _Target(target_of(arch)))
    try:
        return what.kernel.run(*what.arguments, grid=what.grid, warmup=True, **what.options())
    finally:
        setattr(driver, place, before)


def resources(kernel: Any) -> dict[str, int]:
    """Registers a thread, bytes it spills (on AMD: registers), shared memory, of one compiled kernel."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        found = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        return {"registers": found["vgpr_count"], "spills": found["vgpr_spill_count"], "shared": kernel.metadata.shared}
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True, timeout=300
        ).stdout
    found = {key: int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"], "shared": kernel.metadata.shared}
