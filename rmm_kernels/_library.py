"""Op schemas, loading of the compiled parts, and which backend serves which op.

Every op has one schema here. The dispatcher then knows the default overload (`torch.ops.rmm_kernels.gram`) and one
overload per backend (`torch.ops.rmm_kernels.gram.cpu`, `.reference`). The reference serves the default overload wherever
no kernel of a device does: it is registered as CompositeExplicitAutograd, and a kernel registered for a device's own
dispatch key (the compiled part does that when it is loaded) goes before it. So nothing is ever registered twice.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from . import triton_ops

NAMESPACE = "rmm_kernels"

_FACTORS = "Tensor basis_a, Tensor coeff_a, Tensor basis_b, Tensor coeff_b, Tensor task_ids, Tensor scaling"

SCHEMAS = {
    "gram": "(Tensor x, bool center=False) -> Tensor",
    "truncated_svd": "(Tensor x, int rank) -> (Tensor, Tensor, Tensor)",
    "project": "(Tensor x, Tensor basis) -> Tensor",
    "compress": "(Tensor x, int components) -> (Tensor, Tensor, Tensor)",
    "reconstruct": "(Tensor basis, Tensor coeff, Tensor task_ids) -> Tensor",
    "error_grams": "(Tensor x, Tensor basis, Tensor coeff) -> Tensor",
    "lora_shrink": "(Tensor x, Tensor basis_a, Tensor coeff_a, Tensor task_ids) -> Tensor",
    "lora_expand_": "(Tensor(a!) y, Tensor u, Tensor basis_b, Tensor coeff_b, Tensor task_ids, Tensor scaling) -> ()",
    "lora_forward_": f"(Tensor(a!) y, Tensor x, {_FACTORS}) -> ()",
    "lora_forward": f"(Tensor y, Tensor x, {_FACTORS}) -> Tensor",
}

# Every backend a kernel may be written for, and the dispatch key of its overload. Triton's runs wherever Triton does.
BACKENDS = {"cuda": "CUDA", "triton": "CompositeExplicitAutograd", "cpu": "CPU", "reference": "CompositeExplicitAutograd"}

# For tensors on each device, the backends that may serve the default overload, best first.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

# Why a backend has no kernel for any op in this process; filled while its part is looked for.
_absent: dict[str, str] = {}

_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    for _suffix in ("", *(f".{backend}" for backend in BACKENDS)):
        _library.define(f"{_name}{_suffix}{_schema}")


def _load_compiled(name: str) -> ModuleType | None:
    """The compiled module `name`, or None where it was not built. One that is there and does not load raises."""
    if importlib.util.find_spec(f"{__package__}.{name}") is None:
        return None
    return importlib.import_module(f"{__package__}.{name}")


_C: Any = _load_compiled("_C")
if _C is None:
    _absent["cpu"] = "the compiled module rmm_kernels._C was not built; reinstall with a C++17 compiler"
_cuda_build = "not built" if _C is None else _C.build_info()["cuda"]  # "built with nvcc for …", "not built: why"
if torch.version.cuda is None:
    _absent["cuda"] = f"the CUDA part was {_cuda_build}; this torch has no CUDA"
elif _load_compiled("_cuda") is None:
    _absent["cuda"] = f"the CUDA part was {_cuda_build}"


def register_kernel(name: str, backend: str, function: Callable[..., Any]) -> None:
    """`function` implements op `name` for `backend`; for CUDA tensors it serves the default overload too, unless a better
    backend's kernel already does. So parts have to be registered best first."""
    _library.impl(f"{name}.{backend}", function, BACKENDS[backend])
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CUDA"):
        _library.impl(name, function, "CUDA")


_triton_absent = triton_ops.absent()
if _triton_absent is None:
    triton_ops.register(register_kernel)
else:
    _absent["triton"] = _triton_absent


def register(
    name: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Give op `name` its reference, its fake and, where it has one, its gradient, on every overload."""
    for overload in ("", ".reference"):
        _library.impl(f"{name}{overload}", _as_written(reference), BACKENDS["reference"])
    for overload in ("", *(f".{backend}" for backend in BACKENDS)):
        qualified = f"{NAMESPACE}::{name}{overload}"
        torch.library.register_fake(qualified, fake, lib=_library)
        if backward is not None:
            torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    _winner[name] = _winners(name)


def register_composite(name: str, schema: str, function: Callable[..., Any], *, fake: Callable[..., Any]) -> None:
    """An op made of torch's own on every device, with one overload: for what a traced graph can't look into."""
    _library.define(f"{name}{schema}")
    _library.impl(name, _as_written(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def _as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` without autocast, which would run its matrix products in a dtype of its own choice."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args, **kwargs)

    return run


def has_kernel(name: str, backend: str) -> bool:
    """Whether `backend` has an implementation of op `name` in this process."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}.{backend}", BACKENDS[backend])


def _winners(name: str) -> dict[str, str]:
    """By device, the backend that the default overload of op `name` runs there."""
    return {device: next(b for b in order if has_kernel(name, b)) for device, order in PREFERENCE.items()}


# Of every op, filled by `register`: looked up where a compiler traces, which could not ask the dispatcher.
_winner: dict[str, dict[str, str]] = {}


def runs_on(name: str, value: torch.Tensor) -> str:
    """The backend that the default overload of op `name` runs for tensors on the device of `value`."""
    return _winner[name].get(value.device.type, "reference")


# What a backend's kernels leave to torch, openly, by op.
LEFT_TO_TORCH = {
    "gram": {"cpu": "fewer than 16 matrices, or more than 64 columns", "cuda": "as on the CPU", "triton": "as on the CPU"},
    "truncated_svd": {
        "cpu": "min(m, k) > 128, or > 32 of fewer than 4 matrices",
        "cuda": "fewer than 16 matrices, min(m, k) > 128 (256 in the overload), or 16 columns beyond a block's shared memory",
        "triton": "fewer than 16 matrices, min(m, k) > 64, or m · k > 16384 with both rounded up to powers of two",
    },
    "error_grams": {"cpu": "x or basis float64 and the other not"},
    "compress": {
        "cuda": "min(r, n − 1) > 256, or 16 tasks' vectors beyond a block's shared memory",
        "triton": "min(r, n − 1) > 64, or a tile of more than 16384 values",
    },
}


def backends() -> dict[str, dict[str, Any]]:
    """Which backend serves each op, and why the others do not.

    Returns `{op: {"cpu": winner, "cuda": winner, "available": [...], "absent": {backend: reason}, "left_to_torch": {backend:
    what}}}`, where a winner is the backend the default overload runs for tensors on that device, and what it leaves to torch
    are the sizes for which the public function takes the reference instead.
    """
    report: dict[str, dict[str, Any]] = {}
    for name in SCHEMAS:
        available = [backend for backend in BACKENDS if has_kernel(name, backend)]
        absent = {b: _absent.get(b, "has no kernel for this op") for b in BACKENDS if b not in available}
        left = {b: what for b, what in LEFT_TO_TORCH.get(name, {}).items() if b in available}
        report[name] = {**_winners(name), "available": available, "absent": absent, "left_to_torch": left}
    return report


def build_info() -> dict[str, Any]:
    """How the compiled part was built and which instruction set its kernels use here; empty where it was not built."""
    return {} if _C is None else dict(_C.build_info())
