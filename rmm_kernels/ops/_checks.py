"""Checks every op shares. An error names the argument, what came and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
IDS = (torch.int32, torch.int64)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def tensor(name: str, value: Tensor, shape: str, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """`value` is a tensor with as many axes as `shape` has words, of one of `dtypes`. `shape` is like "n S r"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.ndim != len(shape.split()):
        raise ValueError(f"{name} must be [{', '.join(shape.split())}], got shape {list(value.shape)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {_names(dtypes)}, got {_names((value.dtype,))}")


def size(name: str, value: Tensor, axis: int, expected: int, source: str) -> None:
    """`value.shape[axis]` is `expected`, which `source` says."""
    if value.shape[axis] != expected:
        raise ValueError(f"{name} has shape {list(value.shape)}; axis {axis} must be {expected}, as {source} says")


def same(name: str, value: Tensor, other_name: str, other: Tensor, dtype: bool = True) -> None:
    """`value` is on the device of `other` and, unless `dtype` is False, of its dtype."""
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, {other_name} on {other.device}; they must be on the same device")
    if dtype and value.dtype != other.dtype:
        raise TypeError(
            f"{name} is {_names((value.dtype,))}, {other_name} {_names((other.dtype,))}; they must be of the same dtype"
        )


def within(name: str, value: int, low: int, high: int, meaning: str) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; allowed are {low} to {high} ({meaning})")


def gpu_dtype(op: str, name: str, value: Tensor) -> None:
    """`value` is not float64 where Triton's kernel serves `op`, which does not take it."""
    if value.dtype == torch.float64 and _library.runs_on(op, value) == "triton":
        raise TypeError(
            f"{name} is float64 on {value.device}; Triton's kernels take float32, float16 and bfloat16 "
            "(float64 is for CPU tensors, and for the overloads called reference)"
        )


def accumulated(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` is float64 where `other` is, else float32; and on the same device."""
    expected = torch.float64 if other.dtype == torch.float64 else torch.float32
    same(name, value, other_name, other, dtype=False)
    if value.dtype != expected:
        raise TypeError(
            f"{name} must be {_names((expected,))} where {other_name} is {_names((other.dtype,))}, got {_names((value.dtype,))}"
        )


def components(basis_name: str, basis: Tensor, coeff_name: str, coeff: Tensor) -> None:
    """`basis` [p+1, ., .] has a mean and the components that `coeff` [n, p, .] is for."""
    if basis.shape[0] != coeff.shape[1] + 1:
        raise ValueError(
            f"{basis_name} holds {basis.shape[0]} components with the mean, {coeff_name} {coeff.shape[1]} coefficients; "
            f"{basis_name} must hold one more"
        )


def shared_basis(side: str, basis: Tensor, coeff: Tensor) -> None:
    """basis_<side> [p+1, ., .] and coeff_<side> [n, p, .] belong together."""
    basis_name, coeff_name = f"basis_{side}", f"coeff_{side}"
    shape, width = ("p+1 r in", 2) if side == "a" else ("p+1 out r", 1)
    tensor(basis_name, basis, shape)
    tensor(coeff_name, coeff, "n p in" if side == "a" else "n p out")
    same(coeff_name, coeff, basis_name, basis)
    components(basis_name, basis, coeff_name, coeff)
    size(coeff_name, coeff, 2, basis.shape[width], basis_name)


def ids(task_ids: Tensor, count: int, source: str, other: Tensor) -> None:
    tensor("task_ids", task_ids, "T", IDS)
    size("task_ids", task_ids, 0, count, source)
    same("task_ids", task_ids, source.split(".")[0], other, dtype=False)


def output(y: Tensor) -> None:
    """`y` can be written in place: no two of its elements share memory."""
    for stride, length in zip(y.stride(), y.shape, strict=True):
        if stride == 0 and length > 1:
            raise ValueError(f"y has strides {list(y.stride())} for shape {list(y.shape)}: an expanded view can't be written")
