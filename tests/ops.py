"""What the op tests share: the overloads this process has, awkward memory layouts, bit equality, error bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import simulator
import torch
from torch import Tensor

import rmm_kernels
from rmm_kernels import _library

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LOW = (torch.float16, torch.bfloat16)
INTEGER = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

# Which devices a backend serves.
DEVICES = {"cuda": ("cuda",), "triton": ("cuda",), "cpu": ("cpu",), "reference": ("cpu", "cuda")}


@contextmanager
def instruction_set(name: str | None) -> Iterator[None]:
    """The CPU kernels use `name`; None leaves them what they use."""
    before = _library._C.use_instruction_set(name) if name else None
    try:
        yield
    finally:
        if before:
            _library._C.use_instruction_set(before)


@contextmanager
def triton_on_cpu(way: str | None) -> Iterator[None]:
    """Triton's kernels take CPU tensors, and run in the interpreter or in the simulator; None leaves them to a GPU."""
    if way is None:
        yield
        return
    import triton_runs

    with triton_runs.running(triton_runs.RUNNERS[way]()):
        yield


@dataclass(frozen=True)
class Overload:
    """One op of one backend on one device; calling it goes straight to `torch.ops.rmm_kernels.<op>.<backend>`."""

    op: str
    backend: str
    device: str
    isa: str | None = None  # the CPU kernels' instruction set, where it is not the best one
    way: str | None = None  # how a GPU backend's kernels run on CPU tensors: "ptxsim", Triton's also "interpreter"

    @property
    def gpu(self) -> bool:
        """Whether the kernel is a GPU's: it does not look for ids out of range, which would need a host sync."""
        return self.way is not None or self.device == "cuda"

    @property
    def tf32x3(self) -> bool:
        """Whether the LoRA forward multiplies fp32 as three products of TF32 values: of each, 2⁻²² may be missing."""
        return self.backend == "triton" and (self.way == "ptxsim" or self.device == "cuda")

    @property
    def handle(self) -> Any:
        if self.backend == "cuda" and self.way:
            simulator.load()
        return getattr(getattr(torch.ops.rmm_kernels, self.op), self.backend)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """GPU kernels have no fp64; for bf16 in Triton's interpreter there is tests/test_triton_overloads.py."""
        own = FLOATS if self.backend in ("reference", "cpu") else FLOATS[:-1]
        return tuple(d for d in own if d != torch.bfloat16 or self.way != "interpreter")

    def __call__(self, *args: Any) -> Any:
        """Memory that a kernel allocates is filled with NaN first, so that what it fails to write shows."""
        if self.backend == "reference":
            return self.handle(*args)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            with instruction_set(self.isa), triton_on_cpu(self.way if self.backend == "triton" else None):
                return self.handle(*args)
        finally:
            torch.use_deterministic_algorithms(False)

    def sibling(self, op: str) -> Overload:
        """Another op of the same backend."""
        return replace(self, op=op)

    def __str__(self) -> str:
        return f"{self.backend}-{self.isa or self.way or self.device}"


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def overloads(op: str) -> list[Overload]:
    """Every overload of `op` that has a kernel in this process, on every device it serves here, or in the simulator."""
    simulated = [Overload(op, "cuda", "cpu", way="ptxsim")] if op in simulator.ops() else []
    return simulated + [
        Overload(op, backend, device)
        for backend in _library.BACKENDS
        if _library.has_kernel(op, backend)
        for device in DEVICES[backend]
        if device in devices()
    ]


def bad_ids(*values: int) -> pytest.MarkDecorator:
    """Parametrise a test over `bad` and `id_dtype`: each value, and ids far beyond int32, in the id dtypes that hold it."""
    far = (-(2**31), 2**31 - 1, 2**31, -(2**40), 2**40 + 1)
    pairs = [
        pytest.param(value, dtype, id=f"{value}-{name(dtype)}")
        for value in (*values, *far)
        for dtype in (torch.int32, torch.int64)
        if torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max
    ]
    return pytest.mark.parametrize("bad, id_dtype", pairs)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def lesser_isas(op: str) -> list[Overload]:
    """The CPU overload of `op` with each instruction set that this machine has below its best."""
    info = rmm_kernels.build_info()
    sets = [isa for isa in info.get("instruction_sets", ()) if isa != info["instruction_set"]]
    if info.get("instruction_set") == "avx512_bf16" and not op.startswith("lora_"):
        sets.remove("avx512")  # what the best one runs
    return [Overload(op, "cpu", "cpu", isa) for isa in sets if _library.has_kernel(op, "cpu")]


def triton_ways(op: str) -> list[Overload]:
    """Triton's overload of `op` on CPU tensors, in the interpreter and in the simulator: slow, so for few small shapes."""
    ways = ("interpreter", "ptxsim") if _library.has_kernel(op, "triton") else ()
    return [Overload(op, "triton", "cpu", way=way) for way in ways]


def each(op: str, dtypes: tuple[torch.dtype, ...] = (), isas: bool = False) -> pytest.MarkDecorator:
    """Parametrise a test over `run`, every overload of `op`; with `dtypes`, over `dtype` too.

    With `isas`, the CPU kernels run once for each instruction set.
    """
    return _parametrise(overloads(op) + (lesser_isas(op) if isas else []), dtypes)


def each_triton_way(op: str, dtypes: tuple[torch.dtype, ...] = ()) -> pytest.MarkDecorator:
    """As `each`, over Triton's kernels on CPU tensors. Where there is no Triton, the test is skipped."""
    return _parametrise(triton_ways(op), dtypes)


def _parametrise(runs: list[Overload], dtypes: tuple[torch.dtype, ...]) -> pytest.MarkDecorator:
    if not dtypes:
        return pytest.mark.parametrize("run", runs, ids=str)
    pairs = [(run, dtype) for run in runs for dtype in dtypes if dtype in run.dtypes]
    return pytest.mark.parametrize("run, dtype", pairs, ids=[f"{run}-{name(dtype)}" for run, dtype in pairs])


def default(op: str) -> Any:
    return getattr(torch.ops.rmm_kernels, op).default


def winner(op: str, device: str = "cpu") -> Overload:
    """The overload that the public function runs on `device`."""
    return Overload(op, _library.backends()[op][device], device)


def opcheck(op: str, dtypes: tuple[torch.dtype, ...]) -> pytest.MarkDecorator:
    """Parametrise a test over `run`, `dtype` and `handle`: every overload of `op`, the default one once a device too."""
    cases = []
    for run in overloads(op):
        handles = {str(run): run.handle}
        if run == winner(op, run.device):
            handles[f"default-{run.device}"] = default(op)
        cases += [
            pytest.param(run, dtype, handle, id=f"{label}-{name(dtype)}")
            for label, handle in handles.items()
            for dtype in dtypes
            if dtype in run.dtypes
        ]
    return pytest.mark.parametrize("run, dtype, handle", cases)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def underflow(dtype: torch.dtype) -> float:
    """The smallest number of `dtype`: a rounding among the subnormal numbers is off by half of it."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Standard normal, the same numbers for every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def bits(x: Tensor) -> Tensor:
    """The bit patterns of x: tells NaN payloads and signs of zero apart."""
    return x.detach().contiguous().view(INTEGER.get(x.dtype, x.dtype))


def assert_same_bits(got: Any, expected: Any) -> None:
    """Equal in shape, dtype and every bit, for a tensor or a sequence of tensors."""
    if not isinstance(got, Tensor):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b)
        return
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    differing = int((bits(got) != bits(expected)).sum())
    assert differing == 0, f"{differing} of {got.numel()} values differ in bits"


def assert_within(what: str, value: Tensor, bound: Tensor | float) -> None:
    """value ≤ bound everywhere; NaN fails."""
    bound = torch.as_tensor(bound, dtype=value.dtype, device=value.device).expand_as(value)
    bad = ~(value <= bound)
    if bad.any():
        excess = torch.where(value.isnan(), torch.inf, value - bound)
        worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), value.shape)) if value.ndim else ()
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {value.numel()} beyond the bound; at {worst} "
            f"{float(value[worst]):.4g}, allowed {float(bound[worst]):.4g}"
        )


def assert_close(what: str, got: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """got is `exact` (fp64), summed in its accumulator dtype and rounded once to its own.

    `magnitude` (fp64) is the sum of the absolute values of the `terms` terms. In whatever order they are added, rounding
    errors behave much like a random walk: 2 + 2 √terms roundings of the magnitude bound them.
    """
    assert got.shape == exact.shape
    summing = roundoff(accumulator(got.dtype)) * (2 + 2 * terms**0.5) * magnitude
    rounding = 0.0 if got.dtype == accumulator(got.dtype) else roundoff(got.dtype) * (exact.abs() + summing)
    assert_within(what, (got.double() - exact).abs(), summing + rounding + underflow(got.dtype))


def norm(x: Tensor) -> Tensor:
    """Frobenius norm of each matrix of a batch."""
    return x.flatten(-2).norm(dim=-1)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For every test of a module that imports this: on problems this small, threads only get in each other's way."""
    with threads(1):
        yield


class Failures:
    """Collects the failed assertions of many cases in one test, so that the report names all of them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def case(self, label: str) -> Iterator[None]:
        try:
            yield
        except AssertionError as error:
            self.lines.append(f"{label}: {error}")

    def report(self) -> None:
        assert not self.lines, "\n" + "\n".join(self.lines)


def _poison(dtype: torch.dtype) -> float | int:
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max


def _permuted(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """x with the memory order of its axes as `order`, the last innermost."""
    inverse = [order.index(axis) for axis in range(x.ndim)]
    return x.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse)


def _offset(x: Tensor) -> Tensor:
    """x behind a few poisoned elements of its storage."""
    flat = torch.full((x.numel() + 5,), _poison(x.dtype), dtype=x.dtype, device=x.device)
    view = flat[3 : 3 + x.numel()].view(x.shape)
    return view.copy_(x)


def _sliced(x: Tensor) -> Tensor:
    """x as a slice of a larger tensor, poisoned around it."""
    wide = torch.full([size + 3 for size in x.shape], _poison(x.dtype), dtype=x.dtype, device=x.device)
    view = wide[tuple(slice(1, 1 + size) for size in x.shape)]
    return view.copy_(x)


def _stepped(x: Tensor) -> Tensor:
    """x as every other element, along every axis, of a larger tensor that is poisoned between."""
    wide = torch.full([2 * size for size in x.shape], _poison(x.dtype), dtype=x.dtype, device=x.device)
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


# A copy of the same values in other memory. Anything around them is NaN (the largest integer among ids), so reading it shows.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "transposed": lambda x: _permuted(x, (*range(x.ndim - 2), x.ndim - 1, x.ndim - 2)) if x.ndim > 1 else x.clone(),
    "reversed": lambda x: _permuted(x, tuple(reversed(range(x.ndim)))),
    "rotated": lambda x: _permuted(x, (*range(1, x.ndim), 0)),
    "offset": _offset,
    "sliced": _sliced,
    "sliced_transposed": lambda x: _sliced(x.mT).mT if x.ndim > 1 else _sliced(x),
    "stepped": _stepped,
}
