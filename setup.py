"""Builds rmm_kernels._C: every file of csrc/cpu once per instruction set, and the pybind11 module.

Only torch's stable headers are used (TORCH_TARGET_VERSION 2.10), so that one build serves every torch from 2.10 on.
RMM_SANITIZE=1 at build time adds the address and undefined-behaviour sanitizers (tests/sanitize.py).
"""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc")
TORCH = Path(torch.__file__).parent
SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"] if os.environ.get("RMM_SANITIZE") == "1" else []

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


class BuildPerInstructionSet(build_ext):
    """Adds the objects of csrc/cpu, one per file and instruction set, to the module's own."""

    def build_extension(self, ext: Extension) -> None:
        jobs = [
            (str(source), isa, flags)
            for isa, flags in INSTRUCTION_SETS.items()
            for source in sorted((SOURCES / "cpu").glob("*.cpp"))
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

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects = [obj for objects in pool.map(compile_one, jobs) for obj in objects]
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "rmm_kernels._C",
            [str(SOURCES / "module.cpp")],
            include_dirs=[pybind11.get_include()],
            library_dirs=[str(TORCH / "lib")],
            libraries=["torch_cpu"],
            extra_compile_args=COMMON,
            extra_link_args=SANITIZE,
            depends=[str(path) for path in sorted(SOURCES.rglob("*.[hc]*"))],
        )
    ],
    cmdclass={"build_ext": BuildPerInstructionSet},
)
