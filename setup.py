"""Builds rmm_kernels._C: every file of csrc/cpu once per instruction set, and the pybind11 module. Where nvcc is, also
rmm_kernels._cuda: every file of csrc/cuda for the archs of TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), else for DEFAULT_ARCHS.

Only torch's stable headers are used (TORCH_TARGET_VERSION 2.10), so that one build serves every torch from 2.10 on.
RMM_SANITIZE=1 at build time adds the address and undefined-behaviour sanitizers (tests/sanitize.py).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

SOURCES = Path("csrc")
TORCH = Path(torch.__file__).parent
SANITIZE = (
    # Instrumented, one kernel for two groups of lanes and for one would contract different products and sums.
    ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-ffp-contract=off"]
    if os.environ.get("RMM_SANITIZE") == "1"
    else []
)

COMMON = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-isystem",  # torch's headers do not build without warnings
    str(TORCH / "include"),
    "-Wno-psabi",  # no vector crosses an object's boundary
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    *SANITIZE,
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
INSTRUCTION_SETS = {"baseline": ["-DRMM_OPS"]}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = AVX2
    INSTRUCTION_SETS["avx512"] = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS["avx512_bf16"] = [*INSTRUCTION_SETS["avx512"], "-mavx512bf16"]
SOURCES_OF = {"avx512_bf16": "lora_*.cpp"}  # of the other sets all of them


OLDEST_NVCC = (12, 4)
DEFAULT_ARCHS = "8.0;9.0;10.0;12.0+PTX"


class Cuda:
    """The CUDA compiler, if there is one, and what it is to compile for. `absent` says why nothing is built."""

    def __init__(self) -> None:
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        self.nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin") or ""
        self.absent = self._why_not()
        if self.absent:
            return
        self.home = self._home()
        self.archs = self._archs()
        self.flags = [
            "-std=c++17",
            "-O3",
            *(flag for arch in self.archs for flag in self._gencode(arch)),
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            "-diag-suppress=1394,1388",  # torch's headers
            "-isystem",
            str(TORCH / "include"),
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
        ]

    def _ask(self, *question: str) -> str:
        return subprocess.run([self.nvcc, *question], capture_output=True, text=True, check=True).stdout

    def _why_not(self) -> str:
        if SANITIZE:
            return "not built: the sanitizers are for the CPU kernels"
        if not self.nvcc:
            return "not built: nvcc not found"
        found = re.search(r"release (\d+)\.(\d+)", self._ask("--version"))
        version = tuple(int(part) for part in found.groups()) if found else (0, 0)
        if version < OLDEST_NVCC:
            return f"not built: nvcc is {version[0]}.{version[1]}, 12.4 is the oldest that will do"
        return ""

    def _home(self) -> Path:
        """Where this nvcc has its headers and libraries, whatever wrapper or link it was found as."""
        dry = subprocess.run([self.nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        found = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
        return Path(found[1]).resolve() if found else Path(self.nvcc).resolve().parent.parent

    def _archs(self) -> list[str]:
        wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
        if wanted:
            return re.split(r"[;, ]+", wanted.strip())
        known = self._ask("--list-gpu-arch").split()
        archs = [arch for arch in DEFAULT_ARCHS.split(";") if f"compute_{self._number(arch)}" in known]
        return [arch if arch.endswith("+PTX") or arch != archs[-1] else f"{arch}+PTX" for arch in archs]

    @staticmethod
    def _number(arch: str) -> str:
        return arch.removesuffix("+PTX").replace(".", "")

    def _gencode(self, arch: str) -> list[str]:
        number = self._number(arch)
        targets = [f"sm_{number}", *([f"compute_{number}"] if arch.endswith("+PTX") else [])]
        return [f"-gencode=arch=compute_{number},code={target}" for target in targets]

    @property
    def report(self) -> str:
        return self.absent or f"built with {self.nvcc} for archs {', '.join(self.archs)}"

    def stamp(self) -> Path:
        """A file that is newer than what was built with another compiler, or for other archs."""
        path = Path("build") / "cuda.txt"
        content = f"{self.report}\n{'' if self.absent else self._ask('--version')}"
        if not path.exists() or path.read_text() != content:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
        return path


class Build(build_ext):
    """Adds the objects of csrc/cpu, one per file and instruction set, or of csrc/cuda, one per file, to the module's own."""

    def build_extension(self, ext: Extension) -> None:
        if not self.force and not newer_group([*ext.sources, *ext.depends], self.get_ext_fullpath(ext.name), "newer"):
            return
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects = self.cuda_objects(ext, pool) if ext.name.endswith("._cuda") else self.cpu_objects(ext, pool)
        super().build_extension(ext)

    def cpu_objects(self, ext: Extension, pool: ThreadPoolExecutor) -> list[str]:
        jobs = [
            (str(source), isa, flags)
            for isa, flags in INSTRUCTION_SETS.items()
            for source in sorted((SOURCES / "cpu").glob(SOURCES_OF.get(isa, "*.cpp")))
        ]

        def compile_one(job: tuple[str, str, list[str]]) -> list[str]:
            source, isa, flags = job
            return self.compiler.compile(
                [source],
                output_dir=str(Path(self.build_temp) / isa),
                include_dirs=ext.include_dirs,
                extra_postargs=[*COMMON, f"-DRMM_ISA={isa}", *flags],
                depends=ext.depends,
            )

        return [obj for objects in pool.map(compile_one, jobs) for obj in objects]

    def cuda_objects(self, ext: Extension, pool: ThreadPoolExecutor) -> list[str]:
        """One object per file; one that is newer than its file and every header is kept."""
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        common = [path for path in ext.depends if not path.endswith((".cu", ".cpp"))]

        def compile_one(source: Path) -> str:
            target = folder / f"{source.stem}.o"
            if self.force or newer_group([str(source), *common], str(target), "newer"):
                subprocess.run([cuda.nvcc, *cuda.flags, "-c", str(source), "-o", str(target)], check=True)
            return str(target)

        return list(pool.map(compile_one, sorted((SOURCES / "cuda").glob("*.cu"))))


def sources(folder: str) -> list[str]:
    return [str(path) for path in sorted((SOURCES / folder).rglob("*.[hc]*"))]


cuda = Cuda()
stamp = str(cuda.stamp())
print(f"rmm_kernels: CUDA part {cuda.report}", file=sys.stderr)

extensions = [
    Extension(
        "rmm_kernels._C",
        [str(SOURCES / "module.cpp")],
        include_dirs=[pybind11.get_include()],
        library_dirs=[str(TORCH / "lib")],
        libraries=["torch_cpu"],
        extra_compile_args=[*COMMON, f'-DRMM_CUDA="{cuda.report}"'],
        extra_link_args=SANITIZE,
        depends=[*sources("common"), *sources("cpu"), stamp],
    )
]
if not cuda.absent:
    extensions.append(
        Extension(
            "rmm_kernels._cuda",
            [str(SOURCES / "cuda" / "module.cpp")],
            include_dirs=[pybind11.get_include(), str(cuda.home / "include")],
            library_dirs=[str(TORCH / "lib"), str(cuda.home / "lib64"), str(cuda.home / "lib")],
            libraries=["torch_cpu", "cudart_static", "rt", "pthread", "dl"],
            extra_compile_args=[*COMMON, f'-DRMM_CUDA_ARCHS="{", ".join(cuda.archs)}"'],
            depends=[*sources("common"), *sources("cuda"), stamp],
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": Build})
