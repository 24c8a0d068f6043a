"""The CUDA ops on CPU tensors: their own host code, their kernels in ptxsim.

`csrc/cuda` is compiled once more with RMM_SIMULATED (see launch.h) and registers `<op>.cuda` for the CPU; each launch comes
here with the kernel's symbol, grid, block, shared memory, arguments and the tensors it may touch, and is run from the PTX
that nvcc made of the same file for sm_80.

    torch.ops.rmm_kernels.compress.cuda(x, 3)      # after load()
    with simulator.settings(seed=1) as launches: ... # launches: the statistics of each

The build takes about a minute and is kept in ptxsim's cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import ptxsim
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-gencode=arch=compute_80,code=compute_80",
    "-DRMM_SIMULATED=1",
    "-DRMM_PDL=1",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-diag-suppress=1394,1388",
    "-Xcompiler=-fPIC",
]
# With its own __cudaRegisterFunction and others, whatever cudart a CUDA build of torch has loaded.
LINK = ["-shared", "-cudart=none", "-Xlinker=-Bsymbolic"]


def ops() -> frozenset[str]:
    """The ops that csrc/cuda registers; empty where nvcc is missing."""
    if shutil.which("nvcc") is None:
        return frozenset()
    registered = (re.findall(r'^RMM_CUDA_OP\("(\w+)"', path.read_text(), re.MULTILINE) for path in SOURCES.glob("*.cu"))
    return frozenset(op for found in registered for op in found)


@dataclass
class Settings:
    """How launches are run; `launches` collects their statistics."""

    seed: int = 0
    check: bool = True
    statistics: bool = False
    launches: list[dict[str, Any]] = field(default_factory=list)


_settings = Settings()


@contextmanager
def settings(**changes: Any) -> Iterator[list[dict[str, Any]]]:
    """Launches inside run with these settings; yields the list that their statistics go to."""
    global _settings
    before, _settings = _settings, Settings(**changes)
    try:
        yield _settings.launches
    finally:
        _settings = before


class Simulated:
    """One simulated build, loaded: from here on its ops are registered."""

    def __init__(self, folder: Path) -> None:
        self.kernels: dict[str, Any] = {}
        self.arch = 80
        self.before: dict[str, list[_Memory]] = {}  # what the last kernel wrote and read, on sm_90
        for path in sorted(folder.glob("*.ptx")):
            module = ptxsim.Module(path.read_text())
            self.kernels |= dict.fromkeys(module.kernels, module)
        self.library = ctypes.CDLL(str(folder / "library.so"))
        self.library.rmm_kernel_name.restype = ctypes.c_char_p
        self.library.rmm_kernel_name.argtypes = [ctypes.c_void_p]
        self.callback = _CALLBACK(self.launch)
        self.library.rmm_simulate(self.callback)

    def launch(self, kernel, shape, shared, arguments, sizes, count, regions, region_count, error, error_bytes) -> int:  # type: ignore[no-untyped-def]
        try:
            name = self.library.rmm_kernel_name(kernel).decode()
            memory = [_Memory(regions[i].low, regions[i].bytes, regions[i].origin) for i in range(region_count)]
            module = self.kernels[name]
            dependent = shape[7] and int(module.target.split(",")[0][3:5]) >= 90
            stats = module.launch(
                name,
                tuple(shape[0:3]),
                tuple(shape[3:6]),
                [ctypes.string_at(arguments[i], sizes[i]) for i in range(count)],
                shared_bytes=shared,
                seed=_settings.seed,
                check=_settings.check,
                statistics=_settings.statistics or self.arch >= 90,
                extra_memory=memory,
                **self.before if dependent else {},
                allow_early_exit=True,
                cluster=(1, shape[6], 1),
            )
            self.before = {"pending_writes": [], "pending_reads": []}
            for row in stats["regions"]:
                for index in re.findall(r"extra memory (\d+)", row["region"]):
                    way = "pending_writes" if row["class"].startswith(("store", "atomic")) else "pending_reads"
                    self.before[way].append(memory[int(index)])
            if _settings.statistics:
                _settings.launches.append(stats)
        except BaseException as raised:
            message = f"{type(raised).__name__}: {raised}".encode()[: error_bytes - 1]
            ctypes.memmove(error, message + b"\0", len(message) + 1)
            return 1
        return 0

    def device(self, arch: int, shared_bytes: int) -> None:
        """What launch.h's device() says from now on; at first an A100's, 80 and 163 KiB."""
        self.arch = arch
        self.library.rmm_simulated_device(arch, shared_bytes)


@cache
def load() -> Simulated:
    """The simulated build of csrc/cuda, made if it is not there."""
    return Simulated(build(SOURCES))


def build(sources: Path) -> Path:
    """A folder with library.so and the PTX of every file of `sources`, a copy of csrc/cuda beside a csrc/common.

    What nvcc makes of a file is kept for as long as neither it nor a header that it includes changes.
    """
    files = [*sorted(sources.glob("*.cu")), sources / "simulated.cpp"]
    with ptxsim.building(), ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(_compiled, files))
    target = _kept("rmm", *LINK, *(folder.name for folder in compiled))
    if not target.exists():
        with _fresh(target) as folder:
            objects = [str(made / "object.o") for made in compiled]
            torch_libraries = str(Path(torch.__file__).parent / "lib")
            library = str(folder / "library.so")
            _nvcc(*LINK, *objects, "-o", library, f"-L{torch_libraries}", "-ltorch_cpu")
            for made in compiled:
                for path in made.glob("*.ptx"):
                    shutil.copy(path, folder)
    return target


def _compiled(source: Path) -> Path:
    """A folder with object.o and, of a .cu file, its PTX."""
    target = _kept(source.stem, *(path.read_text() for path in (source, *included(source))))
    if not target.exists():
        with _fresh(target) as folder:
            include = ["-isystem", str(Path(torch.__file__).parent / "include")]
            _nvcc(*FLAGS, *include, "--keep", f"--keep-dir={folder}", "-c", str(source), "-o", str(folder / "object.o"))
            for path in folder.iterdir():
                if path.name not in ("object.o", f"{source.stem}.ptx"):
                    path.unlink()
    return target


def included(source: Path) -> list[Path]:
    """Every header that `source` includes with quotes, directly or not."""
    found: dict[Path, None] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            header = (path.parent / name).resolve()
            if header not in found:
                found[header] = None
                waiting.append(header)
    return sorted(found)


def _kept(name: str, *contents: str) -> Path:
    """Where to keep what is made from `contents`."""
    digest = hashlib.sha256(" ".join([*FLAGS, torch.__version__, _nvcc("--version"), *contents]).encode())
    return Path(ptxsim._cache_dir()) / f"{name}-{digest.hexdigest()[:16]}"


@contextmanager
def _fresh(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` once all is in it."""
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir()
        yield folder
        with suppress(OSError):  # another process was first
            os.replace(folder, target)


@cache
def _nvcc(*arguments: str) -> str:
    done = subprocess.run(["nvcc", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


class _Region(ctypes.Structure):
    _fields_ = [("low", ctypes.c_uint64), ("bytes", ctypes.c_uint64), ("origin", ctypes.c_uint64)]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.c_int,
    ctypes.POINTER(_Region),
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_size_t,
)


class _Memory:
    """Bytes from `low` on, of an allocation that starts at `origin`, in the form ptxsim takes memory in."""

    def __init__(self, low: int, size: int, origin: int) -> None:
        self.extent = (low, low, size, origin)


def ptx_text(sources: Path, file: str, arch: str) -> str:
    """What nvcc makes of a file of `sources` for `arch`."""
    include = ["-isystem", str(Path(torch.__file__).parent / "include")]
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "kernels.ptx"
        _nvcc(*FLAGS[:2], f"-arch={arch}", *FLAGS[3:], *include, "-ptx", str(sources / file), "-o", str(out))
        return out.read_text()


def kernels(text: str) -> dict[str, Any]:
    """The kernels of such a text, by name."""
    module = ptxsim.Module(text)
    return dict.fromkeys(module.kernels, module)


def ptx(sources: Path, file: str, arch: str) -> dict[str, Any]:
    """The kernels of a file of `sources` as nvcc makes them for `arch`, by name."""
    return kernels(ptx_text(sources, file, arch))


@contextmanager
def _with_kernels(kernels: dict[str, Any]) -> Iterator[None]:
    simulated = load()
    before = dict(simulated.kernels)
    simulated.kernels |= kernels
    try:
        yield
    finally:
        simulated.kernels = before


@contextmanager
def sm_90(kernels: dict[str, Any]) -> Iterator[None]:
    """Inside, ops find a device that has clusters, and `kernels`, from ptx(), run in place of those for sm_80."""
    with _with_kernels(kernels):
        load().device(90, 227 * 1024)
        try:
            yield
        finally:
            load().device(80, 163 * 1024)


@contextmanager
def planted(file: str, source: str, old: str, new: str, arch: str = "sm_80") -> Iterator[None]:
    """Inside, `file`'s kernels run as they would with `old`, which stands once in `source` (it or a header), become `new`."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "csrc"
        shutil.copytree(SOURCES.parent, copy, ignore=shutil.ignore_patterns("cpu"))
        path = copy / "cuda" / source
        text = path.read_text()
        if text.count(old) != 1:
            raise ValueError(f"{source} holds what is to be replaced {text.count(old)} times: {old!r}")
        path.write_text(text.replace(old, new))
        kernels = ptx(copy / "cuda", file, arch)
    with _with_kernels(kernels):
        yield
