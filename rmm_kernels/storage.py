"""What a merge stores, and how it lies on disk.

A merged directory holds

    manifest.json           format and package version, tasks with their configs, per-module shapes, storage and errors
    factors.safetensors     "<module>.basis_a", ".coeff_a", ".basis_b" and ".coeff_b"
    tasks/<i>.safetensors   the tensors of task i that are no factors
    tasks/<i>/              the files that lay beside the adapter of task i
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import delta
from ._files import TensorStream, new_directory, open_tensors, write_json, write_tensors
from ._version import __version__
from .adapters import (
    CONFIG,
    WEIGHTS,
    AdapterError,
    StoredTensors,
    beyond_factors,
    copy_files,
    lora_rank_and_scaling,
    lora_scaling,
)

FORMAT = "rmm_kernels.merged"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
FACTORS = "factors.safetensors"
TASKS = "tasks"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


_TENSORS = ("basis_a", "coeff_a", "basis_b", "coeff_b")


class MergeError(ValueError):
    """What is wrong with a merge or a merged directory, on one line."""


@dataclass(frozen=True)
class MergedModule:
    """One module of n tasks on p components, rank r (the highest of its tasks)."""

    basis_a: Tensor
    """[p+1, r, in], component 0 the mean"""
    coeff_a: Tensor
    """[n, p, in]"""
    basis_b: Tensor
    """[p+1, out, r]"""
    coeff_b: Tensor
    """[n, p, out]"""
    scaling: Tensor
    """[n], fp32"""
    tasks: tuple[int, ...]
    """which of the merge's tasks the n rows are, rising; the others lack this module"""
    ranks: tuple[int, ...]
    """the true rank of each of those tasks; lower ones are padded with zeros to r"""
    raw_bytes: int
    """what the tasks' own factors take"""
    squares: tuple[tuple[float, float], ...]
    """(‖ΔW − ΔŴ‖², ‖ΔW‖²) (Frobenius) of each of those tasks, scaling included"""

    @property
    def components(self) -> int:
        """p"""
        return self.coeff_a.shape[1]

    @property
    def rank(self) -> int:
        """r"""
        return self.basis_a.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the base weight."""
        return self.basis_b.shape[1], self.basis_a.shape[2]

    @property
    def merged_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.basis_a, self.coeff_a, self.basis_b, self.coeff_b))

    @property
    def ratio(self) -> float:
        """merged_bytes / raw_bytes: (p(r+n) + r) / (rn) at equal ranks and dtypes."""
        return self.merged_bytes / self.raw_bytes

    @property
    def error(self) -> float:
        """Relative Frobenius error of ΔW over all tasks of the module."""
        return delta.relative(self.squares)


@dataclass(frozen=True)
class TaskParts:
    """What a task keeps for itself: all of its adapter but the factors."""

    config: Mapping[str, Any]
    """adapter_config.json"""
    extras: Mapping[str, Tensor]
    """as `Adapter.extras`"""
    files: Mapping[str, Path]
    """as `Adapter.files`"""

    @property
    def beyond_factors(self) -> tuple[str, ...]:
        """As `Adapter.beyond_factors`."""
        return beyond_factors(self.config, self.extras)


@dataclass(frozen=True)
class Alternative:
    """Another way to store the same adapters: its bytes, and the relative error of ΔW over everything."""

    name: str
    bytes: int
    error: float


@dataclass(frozen=True)
class Stored:
    """All that a merged directory holds."""

    tasks: tuple[str, ...]
    """names"""
    modules: dict[str, MergedModule]
    """by path in the base model"""
    base_model: str | None
    """what the adapters' configs call it; None where they do not say"""
    components: int
    """p as it was asked for; a module may have fewer where that was clamped"""
    dtype: torch.dtype
    """of bases and coefficients"""
    parts: dict[str, TaskParts]
    """by task"""
    comparison: tuple[Alternative, ...] = ()
    """other ways to store the adapters, where the merge was asked to compare"""


_AnyStored = TypeVar("_AnyStored", bound=Stored)


def write(stored: Stored, directory: str | Path) -> None:
    """Write a merged directory; all of it or nothing.

    Raises:
        OSError: the directory exists and is not empty, or can't be written.
    """
    with new_directory(directory) as staging:
        shapes = {name: {key: list(getattr(module, key).shape) for key in _TENSORS} for name, module in stored.modules.items()}
        with factors_stream(staging, stored.dtype, shapes) as stream:
            for module in stored.modules.values():
                for key in _TENSORS:
                    write_factor(stream, getattr(module, key))
        write_rest(stored, staging)


def factors_stream(directory: Path, dtype: torch.dtype, shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> TensorStream:
    """The file of factors in `directory`, to be filled by `write_factor` of every tensor in the order of `shapes`, which gives
    every module's `tensor_shapes`."""
    flat = {f"{name}.{key}": shape for name, module in shapes.items() for key, shape in module.items()}
    return TensorStream(directory / FACTORS, dtype, flat)


def write_factor(stream: TensorStream, tensor: Tensor) -> Tensor:
    """Write the next tensor of a module.

    Returns:
        The same on the meta device: its shape, no memory.
    """
    stream.write(tensor)
    return tensor.to("meta")


def write_rest(stored: Stored, directory: Path) -> None:
    """All of a merged directory but its factors, whose values are not looked at."""
    (directory / TASKS).mkdir()
    for index, task in enumerate(stored.tasks):
        parts, own = stored.parts[task], directory / TASKS / str(index)
        if parts.extras:
            write_tensors(own.with_suffix(".safetensors"), parts.extras)
        if parts.files:
            own.mkdir()
            copy_files(parts.files, own)
    write_json(directory / MANIFEST, _manifest(stored, directory))


def reopened(stored: _AnyStored, directory: str | Path, stream: TensorStream) -> _AnyStored:
    """What `read` returns of a directory that `write_factor` and `write_rest` have just written, of which nothing is looked at
    again.

    Args:
        stored: what was written; its values may be on the meta device.
        directory: where it lies now.
        stream: which wrote its factors.
    """
    factors = stream.mapped(Path(directory) / FACTORS)
    modules = {}
    for name, module in stored.modules.items():
        tensors: dict[str, Any] = {key: factors[f"{name}.{key}"] for key in _TENSORS}
        modules[name] = replace(module, **tensors)
    parts = {
        task: _parts(Path(directory), index, own.config, own.extras, own.files)
        for index, (task, own) in enumerate(stored.parts.items())
    }
    return replace(stored, modules=modules, parts=parts)


def _parts(root: Path, index: int, config: Mapping[str, Any], extras: Iterable[str], files: Iterable[str]) -> TaskParts:
    """What task `index` keeps for itself in the merged directory `root`."""
    tensors = StoredTensors(root / TASKS / f"{index}.safetensors", {key: key for key in extras})
    return TaskParts(dict(config), tensors, {name: root / TASKS / str(index) / name for name in files})


def _manifest(stored: Stored, directory: Path) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "base_model": stored.base_model,
        "dtype": dtype_name(stored.dtype),
        "components": stored.components,
        "tasks": [
            {
                "name": task,
                "config": stored.parts[task].config,
                "extras": list(stored.parts[task].extras),
                "files": {name: (directory / TASKS / str(index) / name).stat().st_size for name in stored.parts[task].files},
            }
            for index, task in enumerate(stored.tasks)
        ],
        "modules": {
            name: {
                "shape": module.shape,
                "rank": module.rank,
                "components": module.components,
                "tasks": module.tasks,
                "ranks": module.ranks,
                "scaling": [lora_scaling(stored.parts[stored.tasks[index]].config, name) for index in module.tasks],
                "raw_bytes": module.raw_bytes,
                "merged_bytes": module.merged_bytes,
                "squared_errors": [error for error, _ in module.squares],
                "squared_norms": [norm for _, norm in module.squares],
            }
            for name, module in stored.modules.items()
        },
        "comparison": [{"name": other.name, "bytes": other.bytes, "error": other.error} for other in stored.comparison],
    }


def read(directory: str | Path) -> Stored:
    """Open a merged directory. Its tensors are memory mapped.

    Raises:
        MergeError: something is missing or corrupt, the format version is unknown, or tensors and manifest disagree.
    """
    root = Path(directory)
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise MergeError(f"{root} is not a merged directory: it has no {MANIFEST}") from None
    except OSError as error:
        raise MergeError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise MergeError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise MergeError(f"{path} is not the manifest of a merged directory: its format must be {FORMAT!r}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise MergeError(
            f"{path} is of format version {manifest.get('format_version')!r}; "
            f"rmm_kernels {__version__} reads version {FORMAT_VERSION}"
        )
    try:
        return _read(root, manifest)
    except MergeError:
        raise
    except AdapterError as error:
        raise MergeError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise MergeError(f"{path} is incomplete or malformed: {type(error).__name__} {error}") from error


def _read(root: Path, manifest: dict[str, Any]) -> Stored:
    from safetensors import SafetensorError

    tasks = tuple(str(task["name"]) for task in manifest["tasks"])
    if len(set(tasks)) != len(tasks):
        raise MergeError(f"{root / MANIFEST} lists a task twice")
    parts = {name: _read_parts(root, index, manifest["tasks"][index]) for index, name in enumerate(tasks)}
    dtype = DTYPES[manifest["dtype"]]
    path = root / FACTORS
    try:
        with open_tensors(path) as file:
            stored_keys = set(file.keys())
            modules = {}
            for name, entry in manifest["modules"].items():
                configs = [parts[tasks[index]].config for index in entry["tasks"]]
                _check_module(root, name, entry, configs)
                tensors = {}
                shapes = tensor_shapes(entry["shape"], entry["rank"], entry["components"], len(entry["tasks"]))
                for key, shape in shapes.items():
                    full = f"{name}.{key}"
                    if full not in stored_keys:
                        raise MergeError(f"{path} lacks {full}, which {MANIFEST} lists")
                    tensors[key] = tensor = file.get_tensor(full)
                    if list(tensor.shape) != shape or tensor.dtype != dtype:
                        raise MergeError(
                            f"{path}: {full} is {dtype_name(tensor.dtype)} {list(tensor.shape)}; "
                            f"{MANIFEST} says {dtype_name(dtype)} {shape}"
                        )
                modules[name] = MergedModule(
                    **tensors,
                    scaling=torch.tensor(entry["scaling"], dtype=torch.float32),
                    tasks=tuple(entry["tasks"]),
                    ranks=tuple(entry["ranks"]),
                    raw_bytes=int(entry["raw_bytes"]),
                    squares=tuple(zip(map(float, entry["squared_errors"]), map(float, entry["squared_norms"]), strict=True)),
                )
    except (SafetensorError, OSError) as error:
        raise MergeError(f"{path} can't be read: {error}") from error
    comparison = tuple(
        Alternative(str(other["name"]), int(other["bytes"]), float(other["error"])) for other in manifest["comparison"]
    )
    base = manifest["base_model"]
    return Stored(tasks, modules, base, int(manifest["components"]), dtype, parts, comparison)


def tensor_shapes(shape: Sequence[int], rank: int, components: int, tasks: int) -> dict[str, list[int]]:
    """The shapes of a module's tensors, (out, in) being `shape`, in the order they lie in the file."""
    out, wide = shape
    return {
        "basis_a": [components + 1, rank, wide],
        "coeff_a": [tasks, components, wide],
        "basis_b": [components + 1, out, rank],
        "coeff_b": [tasks, components, out],
    }


def _check_module(root: Path, name: str, entry: Mapping[str, Any], configs: list[Mapping[str, Any]]) -> None:
    """The manifest's figures for a module fit together and with its tasks' configs."""
    count = len(entry["tasks"])
    lists = ("ranks", "scaling", "squared_errors", "squared_norms")
    if not count or list(entry["tasks"]) != sorted(set(entry["tasks"])) or any(len(entry[key]) != count for key in lists):
        raise MergeError(f"{root / MANIFEST}: module {name!r} must list its tasks once, and a figure of each for each")
    ranks, scaling = zip(*(lora_rank_and_scaling(config, name) for config in configs), strict=True)
    if tuple(entry["ranks"]) != ranks or entry["rank"] != max(ranks) or tuple(entry["scaling"]) != scaling:
        raise MergeError(f"{root / MANIFEST}: ranks or scaling of module {name!r} are not what its tasks' configs say")


def _read_parts(root: Path, index: int, entry: Mapping[str, Any]) -> TaskParts:
    from safetensors import SafetensorError

    for name in entry["files"]:
        if Path(name).name != name or name in ("", "..", CONFIG, WEIGHTS):
            raise MergeError(f"{root / MANIFEST} lists a file {name!r}; it must be a plain file name")
    parts = _parts(root, index, entry["config"], entry["extras"], entry["files"])
    for name, path in parts.files.items():
        size = entry["files"][name]
        if not path.is_file() or path.stat().st_size != size:
            state = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
            raise MergeError(f"{path} {state}; {MANIFEST} says {size} bytes")
    if parts.extras:
        path = root / TASKS / f"{index}.safetensors"
        try:
            with open_tensors(path) as file:
                missing = sorted(set(parts.extras) - set(file.keys()))
        except (SafetensorError, OSError) as error:
            raise MergeError(f"{path} can't be read: {error}") from error
        if missing:
            raise MergeError(f"{path} lacks {missing[0]}, which {MANIFEST} lists")
    return parts


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
