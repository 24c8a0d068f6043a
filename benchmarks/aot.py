"""What the Triton launchers launch, compiled ahead of time for an architecture that need not be here.

    python -m benchmarks.aot [--arch sm_80 ...] [-k WORDS]

compiles every case that tests/test_triton_aot.py gates, with whichever Triton is first on the path (`PYTHONPATH=DIR` after `pip
install --target DIR triton==3.4.0`), and says which do not compile, or spill. Each case has a process of its own: some
versions' compilers end theirs.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton
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


def _dumped(kernel: Any, what: str) -> str:
    """What cuobjdump says of a compiled kernel."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True, timeout=300).stdout


def resources(kernel: Any) -> dict[str, int]:
    """Registers a thread, bytes it spills (on AMD: registers), shared memory, of one compiled kernel."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        found = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        return {"registers": found["vgpr_count"], "spills": found["vgpr_spill_count"], "shared": kernel.metadata.shared}
    text = _dumped(kernel, "--dump-resource-usage")
    found = {key: int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}
    spills = found["STACK"] + found["LOCAL"]
    if spills and not re.search(r"\b(?:LDL|STL|CALL)\b", _dumped(kernel, "--dump-sass")):
        spills = 0  # a frame of 8 bytes that no instruction goes to
    return {"registers": found["REG"], "spills": spills, "shared": kernel.metadata.shared}


ROOT = Path(__file__).resolve().parents[1]
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


def shipped() -> dict[str, Callable[[], object]]:
    """By name, the calls that tests/test_triton_aot.py compiles."""
    sys.path.insert(0, str(ROOT / "tests"))
    import triton_cases
    import triton_lora_cases

    return {case.name: case.call for case in (*triton_cases.CASES, *triton_lora_cases.CASES)}


def compile_case(name: str, arch: str) -> None:
    """Prints what each kernel of the case takes; in a process of its own."""
    for what in launches(shipped()[name], arch):
        found = resources(compiled(what, arch))
        print(what.kernel.__name__, *(f"{key}={value}" for key, value in found.items()))


def attempt(name: str, arch: str) -> bool:
    """Prints what became of the case, in a row; whether it compiled and spills nothing."""
    command = [sys.executable, "-m", "benchmarks.aot", "--one", name, "--arch", arch]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        state, rows = f"FAILED ({done.returncode})", [*said[-1:]]
    else:
        rows = done.stdout.splitlines()
        state = "spills" if any(not row.count("spills=0") for row in rows) else "ok"
    print(f"{state:12}{arch:8}{name}: {'; '.join(rows)}", flush=True)
    return state == "ok"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=ARCHS, help=f"what to compile for ({' '.join(ARCHS)})")
    parser.add_argument("-k", metavar="WORDS", default="", help="only cases whose name has this in it")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        compile_case(arguments.one, arguments.arch[0])
        return 0
    print(f"Triton {triton.__version__}")
    asked = [(name, arch) for name in shipped() if arguments.k in name for arch in arguments.arch]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        fine = list(pool.map(lambda pair: attempt(*pair), asked))
    print(f"{fine.count(True)} of {len(fine)} compile and spill nothing")
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
