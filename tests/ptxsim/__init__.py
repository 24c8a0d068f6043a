"""ptxsim: run NVIDIA PTX kernels on the CPU, with checks and counters.

    mod = ptxsim.Module(ptx_text)
    stats = mod.launch("kernel", grid=(4, 1, 1), block=(128, 1, 1), args=[array, 3, 1.5])
    print(ptxsim.report(stats))

See README.md for what is modelled and what is not.
"""

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import struct
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

_SOURCE_DIR = Path(__file__).resolve().parent
_SOURCES = sorted(path.name for pattern in ("*.cpp", "*.hpp") for path in _SOURCE_DIR.glob(pattern))
_FLAGS = [
    "-std=c++17",
    "-O2",
    "-ftree-vectorize",
    "-march=native",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-shared",
    "-fPIC",
    "-pthread",
]
_library = None

CHECKS = {"uninitialised": 1, "shared_race": 2, "global_race": 4, "convergence": 8}
_ALLOW_EARLY_EXIT, _POISON, _STATISTICS = 16, 32, 64
_PENDING_WRITES, _PENDING_READS = 1, 2


class SimulationError(RuntimeError):
    """A fault of the simulated kernel, or a check that failed."""


# ---- the compiled core ------------------------------------------------------
def _cache_dir():
    base = os.environ.get("PTXSIM_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir(), f"ptxsim-{os.getuid()}"
    )
    os.makedirs(base, exist_ok=True)
    return Path(base)


def _processor():
    try:
        with open("/proc/cpuinfo") as f:
            return "".join(line for line in f if line.startswith(("model name", "flags")))[:4000]
    except OSError:
        return ""


@contextmanager
def building():
    """What is built inside and kept in the cache folder is built by one process at a time: the others wait, and find it."""
    with open(_cache_dir() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile_core():
    digest = hashlib.sha256((" ".join(_FLAGS) + _processor()).encode())
    for name in _SOURCES:
        digest.update((_SOURCE_DIR / name).read_bytes())
    target = _cache_dir() / f"ptxsim-{digest.hexdigest()[:16]}.so"
    with building():
        if not target.exists():
            fresh = target.with_suffix(f".{os.getpid()}.tmp")
            command = [os.environ.get("CXX", "g++"), *_FLAGS, str(_SOURCE_DIR / "ptxsim.cpp"), "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"compiling the simulator failed:\n{done.stderr[-4000:]}")
            os.replace(fresh, target)
    return target


class _Region(ctypes.Structure):
    _fields_ = [
        ("low", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("origin", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("pending", ctypes.c_uint64),
    ]


class _LaunchArguments(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("instruction_limit", ctypes.c_uint64),
        ("params", ctypes.c_void_p),
        ("regions", ctypes.POINTER(_Region)),
        ("param_bytes", ctypes.c_uint32),
        ("region_count", ctypes.c_uint32),
        ("checks", ctypes.c_uint32),
        ("host_threads", ctypes.c_uint32),
    ]


def _core():
    global _library
    if _library is None:
        lib = ctypes.CDLL(str(_compile_core()))
        lib.ptxsim_load.argtypes, lib.ptxsim_load.restype = [ctypes.c_char_p], ctypes.c_void_p
        lib.ptxsim_describe.argtypes, lib.ptxsim_describe.restype = [ctypes.c_void_p], ctypes.c_char_p
        lib.ptxsim_launch.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(_LaunchArguments)]
        lib.ptxsim_launch.restype = ctypes.c_char_p
        lib.ptxsim_error.argtypes, lib.ptxsim_error.restype = [], ctypes.c_char_p
        lib.ptxsim_free.argtypes, lib.ptxsim_free.restype = [ctypes.c_void_p], None
        _library = lib
    return _library


# ---- arguments --------------------------------------------------------------
def _is_tensor(x):
    return hasattr(x, "data_ptr") and hasattr(x, "untyped_storage")


def _extent(x):
    """(address the kernel gets, lowest address, bytes, start of its allocation) of a numpy array or CPU torch tensor."""
    if _is_tensor(x):
        if x.device.type != "cpu":
            raise TypeError("ptxsim needs CPU tensors")
        if x.numel() == 0:
            return x.data_ptr(), x.data_ptr(), 0, x.data_ptr()
        span = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=False)) + 1
        return x.data_ptr(), x.data_ptr(), span * x.element_size(), x.untyped_storage().data_ptr()
    low, high = np.lib.array_utils.byte_bounds(x) if hasattr(np.lib, "array_utils") else np.byte_bounds(x)
    root = x
    while isinstance(root.base, np.ndarray):
        root = root.base
    return x.ctypes.data, low, high - low, root.ctypes.data


def _triple(v):
    v = (v,) if isinstance(v, int) else tuple(v)
    return v + (1,) * (3 - len(v))


def _scalar_bytes(value, param):
    size, kind = param["bytes"], param["type"]
    if isinstance(value, (bytes, bytearray)):
        if len(value) > size:
            raise ValueError(f"{param['name']} has {size} bytes, got {len(value)}")
        return bytes(value).ljust(size, b"\0")
    if isinstance(value, np.generic):
        raw = value.tobytes()
        return raw if len(raw) == size else _scalar_bytes(value.item(), param)
    if isinstance(value, float) or kind in ("f32", "f64"):
        return struct.pack("<d" if size == 8 else "<e" if size == 2 else "<f", value)
    return (int(value) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")


class Module:
    """Parsed PTX. `kernels` maps names to params, static shared size, unsupported opcodes and so on."""

    def __init__(self, ptx_text):
        self._handle = None
        text = ptx_text.encode() if isinstance(ptx_text, str) else ptx_text
        self._handle = _core().ptxsim_load(text)
        if not self._handle:
            raise SimulationError(_core().ptxsim_error().decode())
        info = json.loads(_core().ptxsim_describe(self._handle).decode())
        self.version, self.target, self.kernels, self._variables = (
            info["version"],
            info["target"],
            info["kernels"],
            info["variables"],
        )

    def __del__(self):
        if getattr(self, "_handle", None) and _library is not None:
            _library.ptxsim_free(self._handle)

    def variable(self, name):
        """The bytes of a .global or .const module variable, as a writable uint8 array (valid while the module lives)."""
        address, size = self._variables[name]
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=np.uint8)

    def find_kernel(self, name):
        """The kernel called `name`, or the only one whose (mangled) name contains it."""
        if name in self.kernels:
            return name
        found = [k for k in self.kernels if name in k]
        if len(found) != 1:
            raise KeyError(f"{name!r} names {len(found)} kernels of {list(self.kernels)}")
        return found[0]

    def launch(
        self,
        kernel_name,
        grid,
        block,
        args,
        shared_bytes=0,
        seed=0,
        check=True,
        extra_memory=(),
        instruction_limit=2_000_000_000,
        allow_early_exit=False,
        poison_registers=False,
        statistics=True,
        host_threads=1,
        cluster=1,
        pending_writes=(),
        pending_reads=(),
    ):
        """Runs the kernel, `cluster` blocks at a time. `check` is True, False or names out of CHECKS. `pending_…`: the memory
        that a kernel before it, which may still run, writes and reads. Returns statistics; raises SimulationError."""
        kernel_name = self.find_kernel(kernel_name)
        params = self.kernels[kernel_name]["params"]
        if len(args) != len(params):
            raise ValueError(
                f"{kernel_name} takes {len(params)} arguments ({', '.join(p['name'] for p in params)}), got {len(args)}"
            )
        block_bytes = bytearray(max([p["offset"] + p["bytes"] for p in params], default=0))
        regions, keep_alive = [], []
        for i, (value, param) in enumerate(zip(args, params, strict=False)):
            if isinstance(value, np.ndarray) or _is_tensor(value):
                pointer, low, size, origin = _extent(value)
                regions.append((low, size, origin, f"argument {i} ({param['name']})", 0))
                keep_alive.append(value)
                data = pointer.to_bytes(8, "little")
            elif value is None:
                data = bytes(param["bytes"])
            else:
                data = _scalar_bytes(value, param)
            block_bytes[param["offset"] : param["offset"] + param["bytes"]] = data[: param["bytes"]]
        for i, extra in enumerate(extra_memory):
            _, low, size, origin = getattr(extra, "extent", None) or _extent(extra)
            regions.append((low, size, origin, f"extra memory {i}", 0))
        for pending, memory in ((_PENDING_WRITES, pending_writes), (_PENDING_READS, pending_reads)):
            for some in memory:
                _, low, size, origin = getattr(some, "extent", None) or _extent(some)
                regions.append((low, size, origin, "", pending))
        if check is True:
            checks = sum(CHECKS.values())
        elif not check:
            checks = 0
        else:
            checks = sum(CHECKS[c] for c in ([check] if isinstance(check, str) else check))
        region_array = (_Region * max(1, len(regions)))(
            *[_Region(low, size, origin, name.encode(), pending) for low, size, origin, name, pending in regions]
        )
        raw = (ctypes.c_uint8 * max(1, len(block_bytes))).from_buffer_copy(bytes(block_bytes) or b"\0")
        a = _LaunchArguments()
        a.grid[:], a.block[:], a.cluster[:] = _triple(grid), _triple(block), _triple(cluster)
        a.shared_bytes, a.seed, a.instruction_limit = shared_bytes, seed, instruction_limit
        a.params, a.param_bytes = ctypes.addressof(raw), len(block_bytes)
        a.regions, a.region_count = region_array, len(regions)
        a.checks = (
            checks
            | (_ALLOW_EARLY_EXIT if allow_early_exit else 0)
            | (_POISON if poison_registers else 0)
            | (_STATISTICS if statistics else 0)
        )
        a.host_threads = 1 if checks else host_threads
        result = _core().ptxsim_launch(self._handle, kernel_name.encode(), ctypes.byref(a))
        if result is None:
            raise SimulationError(_core().ptxsim_error().decode(errors="replace"))
        return _summarise(json.loads(result.decode(errors="replace")), kernel_name, _triple(grid), _triple(block))


# ---- statistics -------------------------------------------------------------
_COLUMNS = [
    "line",
    "opcode",
    "class",
    "warp",
    "thread",
    "requests",
    "sectors",
    "ideal_sectors",
    "bytes",
    "wavefronts",
    "ideal_wavefronts",
]

_REGION_COLUMNS = ["region", "class", "requests", "sectors", "ideal_sectors", "bytes"]


def _grouped(instructions):
    """Rows of _COLUMNS added up by class, and by whether they touch global and shared memory: there are thousands of them."""
    sums = {}
    for _line, _opcode, klass, *counts in instructions:
        kind = klass, counts[3] > 0, counts[6] > 0  # sectors, wavefronts
        sums[kind] = [a + b for a, b in zip(sums[kind], counts, strict=True)] if kind in sums else counts
    return [{"class": kind[0], **dict(zip(_COLUMNS[3:], counts, strict=True))} for kind, counts in sums.items()]


def _summarise(raw, kernel, grid, block):
    rows = _grouped(raw["instructions"])
    classes = {}
    for r in rows:
        c = classes.setdefault(r["class"], {"warp": 0, "thread": 0})
        c["warp"] += r["warp"]
        c["thread"] += r["thread"]

    def total(column, *words):
        return sum(r[column] for r in rows if any(r["class"].startswith(w) for w in words))

    def efficiency(ideal, real):
        return ideal / real if real else 1.0

    loads, stores = ("load global", "load generic"), ("store global", "store generic")
    access = {"load": (*loads, "cp.async"), "store": stores, "atomic": ("atomic global", "atomic generic")}
    glob = {}
    for name, words in access.items():
        sectors, ideal = total("sectors", *words), total("ideal_sectors", *words)
        in_global = sum(r["bytes"] for r in rows if any(r["class"].startswith(w) for w in words) and r["sectors"])
        glob[name] = {
            "requests": sum(r["requests"] for r in rows if any(r["class"].startswith(w) for w in words) and r["sectors"]),
            "sectors": sectors,
            "ideal_sectors": ideal,
            "bytes": in_global,
            "efficiency": efficiency(ideal, sectors),
        }
    wavefronts, ideal = sum(r["wavefronts"] for r in rows), sum(r["ideal_wavefronts"] for r in rows)
    return {
        "kernel": kernel,
        "grid": grid,
        "block": block,
        "warp_instructions": sum(r["warp"] for r in rows),
        "thread_instructions": sum(r["thread"] for r in rows),
        "by_class": classes,
        "mma": {c[4:]: v["warp"] for c, v in classes.items() if c.startswith("mma ")},
        "global": glob,
        "regions": [dict(zip(_REGION_COLUMNS, r, strict=True)) for r in raw["regions"]],
        "widest_global_load": raw["widest_global_load"],
        "shared": {
            "wavefronts": wavefronts,
            "ideal_wavefronts": ideal,
            "efficiency": efficiency(ideal, wavefronts),
            "bytes": sum(r["bytes"] for r in rows if r["wavefronts"]),
        },
        "local": {
            "requests": total("requests", "load local", "store local"),
            "bytes": total("bytes", "load local", "store local"),
        },
        "barriers_per_warp": raw["barriers_per_warp"],
        "shared_bytes": raw["shared_bytes"],
        "printed": raw["printed"],
        "per_instruction": [dict(zip(_COLUMNS, r, strict=True)) for r in raw["instructions"]],
    }


def report(stats, hot=0):
    """A short table of the statistics; `hot` adds that many instructions with the most wasted sectors or wavefronts."""
    out = [
        f"{stats['kernel']}  grid {stats['grid']}  block {stats['block']}  shared {stats['shared_bytes']} B",
        f"  warp instructions {stats['warp_instructions']:,}   thread instructions {stats['thread_instructions']:,}   "
        f"barriers per warp {stats['barriers_per_warp']:g}",
    ]
    for name, c in sorted(stats["by_class"].items(), key=lambda kv: -kv[1]["warp"]):
        out.append(f"    {name:28s} {c['warp']:>14,} {c['thread']:>16,}")
    for name, g in stats["global"].items():
        if g["requests"]:
            out.append(
                f"  global {name:6s} requests {g['requests']:,}  sectors {g['sectors']:,}  ideal {g['ideal_sectors']:,}  "
                f"efficiency {g['efficiency']:.3f}  bytes {g['bytes']:,}"
            )
    s = stats["shared"]
    if s["wavefronts"]:
        out.append(
            f"  shared wavefronts {s['wavefronts']:,}  ideal {s['ideal_wavefronts']:,}  efficiency {s['efficiency']:.3f}  "
            f"bytes {s['bytes']:,}"
        )
    if stats["local"]["requests"]:
        out.append(f"  local requests {stats['local']['requests']:,}  bytes {stats['local']['bytes']:,}")
    out.append(f"  widest global load {stats['widest_global_load']} B")
    if hot:

        def waste(r):
            return (r["sectors"] - r["ideal_sectors"]) + (r["wavefronts"] - r["ideal_wavefronts"])

        for r in sorted(stats["per_instruction"], key=waste, reverse=True)[:hot]:
            if waste(r):
                out.append(
                    f"    line {r['line']}: {r['opcode']}  wasted sectors {r['sectors'] - r['ideal_sectors']:,}, "
                    f"wavefronts {r['wavefronts'] - r['ideal_wavefronts']:,}"
                )
    return "\n".join(out)


# ---- compilers --------------------------------------------------------------
def compile_cuda(source, arch="sm_80", include=(), defines=(), options=(), keep_ptx=None):
    """nvcc -ptx on a file (path) or on CUDA C++ source text; returns a Module (its text in .ptx)."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        is_path = isinstance(source, Path) or ("\n" not in source and os.path.exists(source))
        path = Path(source) if is_path else Path(folder, "kernel.cu")
        if not is_path:
            path.write_text(source)
        out = Path(folder, "kernel.ptx")
        command = [
            nvcc,
            "-ptx",
            f"-arch={arch}",
            *[f"-I{i}" for i in include],
            *[f"-D{d}" for d in defines],
            *options,
            str(path),
            "-o",
            str(out),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed:\n{done.stderr[-4000:]}")
        text = out.read_text()
    if keep_ptx:
        Path(keep_ptx).write_text(text)
    module = Module(text)
    module.ptx = text
    return module


class TritonKernel:
    """A compiled Triton kernel that runs in the simulator: kernel(grid, *arguments without constexprs)."""

    def __init__(self, compiled):
        self.ptx = compiled.asm["ptx"]
        self.module = Module(self.ptx)
        metadata = compiled.metadata
        self.name, self.shared, self.num_warps = metadata.name, metadata.shared, metadata.num_warps
        self.global_scratch_size = getattr(metadata, "global_scratch_size", 0) or 0
        self.profile_scratch_size = getattr(metadata, "profile_scratch_size", 0) or 0
        if getattr(metadata, "num_ctas", 1) not in (1, None):
            raise SimulationError("thread-block clusters are not supported")

    @property
    def unsupported(self):
        return self.module.kernels[self.name]["unsupported"]

    def __call__(self, grid, *args, seed=0, check=True, **launch_options):
        grid = _triple(grid)
        args = list(args)
        params = self.module.kernels[self.name]["params"]
        blocks = grid[0] * grid[1] * grid[2]
        for size in (self.global_scratch_size, self.profile_scratch_size)[: len(params) - len(args)]:
            args.append(np.zeros(size * blocks, np.uint8) if size else None)
        return self.module.launch(
            self.name,
            grid,
            (self.num_warps * 32, 1, 1),
            args,
            shared_bytes=self.shared,
            seed=seed,
            check=check,
            **launch_options,
        )


def from_triton(compiled_kernel):
    """Wraps the result of triton.compile(...) for the simulator."""
    return TritonKernel(compiled_kernel)


def compile_triton(fn, signature, constexprs=None, capability=80, num_warps=4, num_stages=3, attrs=None, **options):
    """Compiles a @triton.jit function ahead of time (no GPU needed) and wraps it.

    `signature` maps every parameter to a type such as '*fp32', 'i32' or 'constexpr'.
    `attrs` may give divisibility hints, as triton.compiler.ASTSource takes them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=fn, signature=signature, constexprs=constexprs or {}, attrs=attrs)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps, "num_stages": num_stages, **options}
    )
    return from_triton(compiled)
