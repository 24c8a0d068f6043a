"""What nvcc made of csrc/cuda, read from the library that is installed: registers, spills, wide loads, tensor cores."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import AddRow

import rmm_kernels

LIBRARIES = sorted(Path(rmm_kernels.__file__).parent.glob("_cuda.*.so"))
pytestmark = pytest.mark.skipif(not LIBRARIES, reason=rmm_kernels.build_info().get("cuda", "nothing was compiled"))

# Most registers a thread may use, where that is below the hardware's 255: so that as many warps as meant fit a multiprocessor.
# What holds whole columns of up to 64 entries (ILi32ELi1E) has 8 warps there at most.
REGISTERS = {
    r"(compress_team|truncated_svd)ILi(8ELi1|32ELi2)E": 128,
    "compress_streamedILi32ELi2E": 128,
    "compress_streamedILi8E": 168,
    "(compress|truncated_svd)_large": 128,
    "turn_kernel": 64,
    "gram": 128,
    "project": 128,
    "reconstruct": 64,
}


def tool() -> str:
    """cuobjdump: the triton wheel's, or the toolkit's."""
    triton = pytest.importorskip("triton")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else shutil.which("cuobjdump") or pytest.skip("cuobjdump is not there")


@dataclass(frozen=True)
class Usage:
    arch: str
    kernel: str
    registers: int
    stack: int
    local: int


@cache
def usages() -> list[Usage]:
    """Every kernel of the library, once per arch."""
    done = subprocess.run([tool(), "-res-usage", LIBRARIES[0]], capture_output=True, text=True, check=True)
    found: list[Usage] = []
    arch = kernel = ""
    for line in (done.stdout + done.stderr).splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+?):?$", line.strip()):
            kernel = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            found.append(Usage(arch, kernel, *(int(value) for value in match.groups())))
    return found


@cache
def listing() -> dict[str, str]:
    """The sm_90 disassembly of every kernel, by mangled name."""
    done = subprocess.run([tool(), "-sass", "-arch", "sm_90", LIBRARIES[0]], capture_output=True, text=True, check=True)
    parts = re.split(r"^\s*Function : (\S+)$", done.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def bodies(kernel: str) -> list[str]:
    found = [body for name, body in listing().items() if re.search(rf"\d{kernel}[IE]", name)]
    assert found, f"no {kernel} among {sorted(listing())}"
    return found


def test_every_arch_has_every_kernel() -> None:
    built = rmm_kernels.build_info()["cuda"]
    archs = {f"sm_{number.replace('.', '')}" for number in re.findall(r"\d+\.\d+", built.partition("archs")[2])}
    assert archs and archs == {usage.arch for usage in usages()}
    assert len(usages()) == len(archs) * len({usage.kernel for usage in usages()})


def test_nothing_spills_and_registers_are_as_meant(add_row: AddRow) -> None:
    """No stack and no local memory, so no spill."""
    wrong = []
    for usage in usages():
        add_row(asdict(usage))
        most = next((limit for name, limit in REGISTERS.items() if re.search(rf"\d{name}", usage.kernel)), 255)
        if usage.stack or usage.local or usage.registers > most:
            wrong.append(usage)
    assert not wrong


@pytest.mark.parametrize(
    "kernel",
    [
        "compress_thread",
        "compress_team",
        "compress_streamed",
        "compress_large",
        "project",
        "reconstruct",
        "gram",
        "truncated_svd",
        "truncated_svd_large",
        "turn_kernel",
    ],
)
def test_global_loads_of_16_bytes(kernel: str) -> None:
    assert any(re.search(r"LDG\.E(\.\w+)*\.128", body) for body in bodies(kernel))


@pytest.mark.parametrize("kernel", ["lora_shrink_kernel", "lora_expand_kernel"])
def test_tensor_cores_and_asynchronous_copies(kernel: str) -> None:
    """In every instance: products on tensor cores, 16 bytes at a time copied past the registers."""
    for body in bodies(kernel):
        assert "HMMA" in body
        assert re.search(r"LDGSTS\.E(\.\w+)*\.128", body)


def test_loads_beside_a_torch_without_cuda() -> None:
    """It needs nothing that such a torch lacks; and says what it was built for where that does not fit, and what runs where."""
    code = (
        f"import sys, torch; sys.path.insert(0, {str(LIBRARIES[0].parent)!r})\n"
        "torch.library.Library('rmm_kernels', 'FRAGMENT')\n"
        "import _cuda\n"
        "print(_cuda.archs); print(_cuda.wrong_arch(7, 5))\n"
        "built = ['8.0, 9.0, 10.0, 12.0+PTX'] * 4 + ['8.0+PTX', '9.0']\n"
        "print([_cuda.newest_for(archs, device) for archs, device in zip(built, (75, 89, 90, 103, 90, 80))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    archs, message, newest = done.stdout.strip().splitlines()
    assert f"built for archs {archs}; this device has arch 7.5" in message
    assert newest == "[0, 80, 90, 100, 80, 0]", "a launch must not ask for what the code it runs was not compiled with"


def test_the_report_says_why_it_does_not_serve() -> None:
    if torch.version.cuda is None:
        reason = rmm_kernels.backends()["compress"]["absent"]["cuda"]
        assert "built with" in reason and "this torch has no CUDA" in reason
