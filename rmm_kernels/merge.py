"""Many adapters to bases and coefficients, and any adapter back (Reversible Model Merging, arXiv 2510.14163)."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import delta, storage
from ._files import check_target, new_directory
from .adapters import (
    Adapter,
    AdapterError,
    FactorStack,
    LoraFactors,
    load_adapters,
    lora_scaling,
    magnitude_key,
    save_adapter,
)
from .compare import alternatives
from .ops.compress import compress
from .ops.reconstruct import reconstruct
from .storage import DTYPES, Alternative, MergedModule, MergeError, TaskParts, dtype_name
from .verify import Verification, verify

__all__ = ["Alternative", "MergeError", "MergedAdapters", "MergedModule", "TaskParts", "Verification", "merge"]

_T = TypeVar("_T")

# Modules whose factors the disk is asked for before their turn: its queue has to stay filled.
_AHEAD = 4

# The paper's headline: 8 tasks of rank 16 in 69% of their bytes.
DEFAULT_COMPONENTS = 3


@dataclass(frozen=True)
class MergedAdapters(storage.Stored):
    """Many adapters on shared bases: restores any of them."""

    @property
    def raw_bytes(self) -> int:
        return sum(module.raw_bytes for module in self.modules.values())

    @property
    def merged_bytes(self) -> int:
        return sum(module.merged_bytes for module in self.modules.values())

    @property
    def ratio(self) -> float:
        """merged_bytes / raw_bytes; what tasks carry unchanged is in neither."""
        return self.merged_bytes / self.raw_bytes

    @property
    def error(self) -> float:
        """Relative Frobenius error of ΔW over all modules and tasks."""
        return delta.relative(pair for module in self.modules.values() for pair in module.squares)

    def task_error(self, task: str) -> float:
        """Relative Frobenius error of ΔW over all modules of one task."""
        index = self._index(task)
        return delta.relative(
            module.squares[module.tasks.index(index)] for module in self.modules.values() if index in module.tasks
        )

    def restore(self, task: str) -> dict[str, LoraFactors]:
        """The factors of one task by module, at their true ranks, in the dtype of the merge.

        Raises:
            MergeError: there is no such task, or a module of it comes out with NaN or Inf: no merge writes such a directory.
        """
        index = self._index(task)
        parts = self.parts[task]
        factors: dict[str, LoraFactors] = {}
        for name, module in self.modules.items():
            if index not in module.tasks:
                continue
            row = module.tasks.index(index)
            chosen, rank = torch.tensor([row]), module.ranks[row]
            lora_a = reconstruct(module.basis_a.mT, module.coeff_a, chosen)[0].mT[:rank]
            lora_b = reconstruct(module.basis_b, module.coeff_b, chosen)[0, :, :rank]
            for side, factor in (("A", lora_a), ("B", lora_b)):
                if not bool(factor.isfinite().all()):
                    raise MergeError(f"task {task!r}: module {name!r} is restored with NaN or Inf in lora_{side}")
            factors[name] = LoraFactors(
                lora_a,
                lora_b,
                lora_scaling(parts.config, name),
                parts.extras.get(magnitude_key(name)),
            )
        return factors

    def restore_to(self, task: str, directory: str | Path) -> None:
        """Write one task as a directory that `peft.PeftModel.from_pretrained` loads, with all it carried.

        Raises:
            MergeError: as `restore`.
            OSError: the directory exists and is not empty, or can't be written.
        """
        factors, parts = self.restore(task), self.parts[task]
        save_adapter(directory, parts.config, factors, parts.extras, parts.files)

    def save(self, directory: str | Path) -> None:
        """Write a merged directory, laid out as `rmm_kernels.storage` says; all of it or nothing.

        Raises:
            OSError: the directory exists and is not empty, or can't be written.
        """
        storage.write(self, directory)

    @classmethod
    def load(cls, directory: str | Path) -> MergedAdapters:
        """Open a merged directory. Tensors are memory mapped, so it must stay as it is while they are used.

        Raises:
            MergeError: something is missing or corrupt, the format version is unknown, or tensors and manifest disagree.
        """
        return cls(**vars(storage.read(directory)))

    def verify(self, adapters: Iterable[str | Path | Adapter], names: Sequence[str] | None = None) -> Verification:
        """Compare with the originals: configs, modules, errors, and all that is carried unchanged.

        Args:
            adapters: the originals of some or all tasks, in any order.
            names: which task each of them is. Unless given: the one called like the adapter or its directory, else
                like that directory's parent.

        Raises:
            AdapterError: an adapter can't be read, or two are of the same task.
            MergeError: an adapter is of no task.
        """
        given = list(adapters)
        if names is None:
            names = [self._task_of(adapter) for adapter in given]
        for name in names:
            self._index(name)
        return verify(self, {adapter.name: adapter for adapter in load_adapters(given, names)})

    def report(self) -> dict[str, Any]:
        """Storage and error in total, by task and by module, as plain values for JSON. An infinite error is None."""
        return {
            "tasks": list(self.tasks),
            "base_model": self.base_model,
            "dtype": dtype_name(self.dtype),
            "components": self.components,
            "total": _figures(self),
            "by_task": {
                task: {
                    "error": delta.finite(self.task_error(task)),
                    "modules": sum(index in module.tasks for module in self.modules.values()),
                    "extras": list(self.parts[task].extras),
                    "files": list(self.parts[task].files),
                    "beyond_factors": list(self.parts[task].beyond_factors),
                }
                for index, task in enumerate(self.tasks)
            },
            "by_module": {
                name: {
                    "shape": list(module.shape),
                    "tasks": len(module.tasks),
                    "rank": module.rank,
                    "components": module.components,
                    **_figures(module),
                }
                for name, module in self.modules.items()
            },
            "comparison": [
                {
                    "name": other.name,
                    "bytes": other.bytes,
                    "ratio": other.bytes / self.raw_bytes,
                    "error": delta.finite(other.error),
                }
                for other in self.comparison
            ],
        }

    def _index(self, task: str) -> int:
        if task not in self.tasks:
            raise MergeError(f"there is no task {task!r}; the tasks are {', '.join(self.tasks)}")
        return self.tasks.index(task)

    def _task_of(self, adapter: str | Path | Adapter) -> str:
        path = Path(os.path.abspath(adapter.path if isinstance(adapter, Adapter) else adapter))
        candidates = [*([adapter.name] if isinstance(adapter, Adapter) else []), path.name, path.parent.name]
        for name in candidates:
            if name in self.tasks:
                return name
        if not path.exists():
            raise AdapterError(f"adapter {adapter} does not exist")
        raise MergeError(
            f"adapter {adapter} is called {' or '.join(candidates)}, like no task; the tasks are "
            f"{', '.join(self.tasks)}: give names"
        )


def _figures(stored: MergedAdapters | MergedModule) -> dict[str, Any]:
    return {
        "raw_bytes": stored.raw_bytes,
        "merged_bytes": stored.merged_bytes,
        "ratio": stored.ratio,
        "error": delta.finite(stored.error),
    }


@dataclass(frozen=True)
class _Plan:
    """How one module is merged."""

    module: str
    tasks: tuple[int, ...]
    ranks: tuple[int, ...]
    components: int


def merge(
    adapters: Iterable[str | Path | Adapter],
    components: int = DEFAULT_COMPONENTS,
    *,
    names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    clamp: bool = False,
    compare: bool = False,
    progress: bool = False,
    output: str | Path | None = None,
) -> MergedAdapters:
    """Merge adapters into a mean, p components and each task's coefficients, module by module.

    Besides the result, no more than one factor of one module is held at a time; with `output`, no more of the result
    either. What tasks carry unchanged stays in the adapters' directories until it is asked for or saved.

    Args:
        adapters: PEFT directories, or adapters already opened. A module that some of them lack is merged from the
            others; lower ranks are padded with zeros, and restored at their own.
        components: p, 0 to min(r, n − 1) of every module, r its highest rank and n the number of its adapters.
            There, adapters come back exactly but for rounding.
        names: of the tasks, one for each adapter; see `load_adapters`.
        dtype: to store bases and coefficients in: float32, float16 or bfloat16; the adapters' own unless given.
        clamp: where `components` is too many for a module, use as many as it allows.
        compare: also find what truncated, int8 and int4 adapters would lose, which takes longer than the merge.
        progress: draw a progress bar on stderr if that is a terminal.
        output: write a merged directory there as `MergedAdapters.save` does, module by module, and return it opened.

    Raises:
        AdapterError: an adapter can't be read, holds NaN or Inf, or two have the same name.
        MergeError: adapters do not fit together, or `components` or `dtype` is out of range.
        OSError: `output` exists and is not empty, or can't be written.
    """
    if output is not None:
        check_target(output)
    opened = load_adapters(adapters, names)
    if not opened:
        raise MergeError("adapters is empty; give at least one")
    base_model = _base_model(opened)
    stored = _storage_dtype(opened, dtype)
    plans = _plan(opened, components, clamp)
    empty = MergedAdapters(
        tasks=tuple(adapter.name for adapter in opened),
        modules={},
        base_model=base_model,
        components=components,
        dtype=stored,
        parts={adapter.name: TaskParts(adapter.config, adapter.extras, adapter.files) for adapter in opened},
    )

    def compared(merged: MergedAdapters) -> MergedAdapters:
        if not compare:
            return merged
        modules = _track(list(merged.modules), "comparing", progress)
        return replace(merged, comparison=alternatives(opened, merged.merged_bytes, modules))

    if output is None:
        modules = _merge_modules(opened, plans, stored, progress, lambda tensor: tensor)
        return compared(replace(empty, modules=modules))
    with new_directory(output) as staging:
        with storage.factors_stream(staging, stored, {plan.module: _shapes(plan, opened) for plan in plans}) as stream:
            modules = _merge_modules(opened, plans, stored, progress, functools.partial(storage.write_factor, stream))
        merged = compared(replace(empty, modules=modules))
        storage.write_rest(merged, staging)
    return storage.reopened(merged, output, stream)


def _merge_modules(
    adapters: Sequence[Adapter],
    plans: Sequence[_Plan],
    dtype: torch.dtype,
    progress: bool,
    keep: Callable[[Tensor], Tensor],
) -> dict[str, MergedModule]:
    """Every module merged. `keep` is given each tensor of the result as soon as it is there and returns what to hold of it."""
    modules = {}
    with FactorStack() as stack:
        for number, plan in enumerate(_track(plans, "merging", progress)):
            first = number + _AHEAD if number else 1
            for following in plans[first : number + _AHEAD + 1]:
                stack.expect([adapters[index] for index in following.tasks], following.module)
            modules[plan.module] = _merge_module(plan, [adapters[index] for index in plan.tasks], dtype, stack, keep)
    return modules


def _shapes(plan: _Plan, adapters: Sequence[Adapter]) -> dict[str, list[int]]:
    shape = adapters[plan.tasks[0]].shape(plan.module)
    return storage.tensor_shapes(shape, max(plan.ranks), plan.components, len(plan.tasks))


def _merge_module(
    plan: _Plan, adapters: Sequence[Adapter], dtype: torch.dtype, stack: FactorStack, keep: Callable[[Tensor], Tensor]
) -> MergedModule:
    def factor(side: str) -> tuple[Tensor, Tensor, Tensor]:
        """Basis and coefficients of one factor, and the `delta.grams` of what they restore."""
        stacked = stack.fill(adapters, plan.module, side, max(plan.ranks), dtype)
        x = stacked.mT if side == "A" else stacked
        basis, coeff, _ = compress(x, plan.components)
        basis, coeff = basis.to(dtype), coeff.to(dtype)
        grams = delta.restored_grams(x, basis, coeff, range(len(x)), plan.ranks)
        return keep(basis.mT if side == "A" else basis), keep(coeff), grams

    basis_a, coeff_a, grams_a = factor("A")
    basis_b, coeff_b, grams_b = factor("B")
    scaling = [adapter.scaling(plan.module) for adapter in adapters]
    squares = delta.squares(grams_a, grams_b, scaling)
    if not all(math.isfinite(value) for pair in squares for value in pair):
        raise _not_finite(plan.module, adapters, dtype)
    return MergedModule(
        basis_a=basis_a,
        coeff_a=coeff_a,
        basis_b=basis_b,
        coeff_b=coeff_b,
        scaling=torch.tensor(scaling, dtype=torch.float32),
        tasks=plan.tasks,
        ranks=plan.ranks,
        raw_bytes=sum(adapter.factor_bytes(plan.module) for adapter in adapters),
        squares=tuple(squares),
    )


def _not_finite(module: str, adapters: Sequence[Adapter], dtype: torch.dtype) -> ValueError:
    """Why a module came out with NaN or Inf."""
    for adapter in adapters:
        factors = adapter.factors(module)
        for side, tensor in (("A", factors.lora_a), ("B", factors.lora_b)):
            if not bool(tensor.isfinite().all()):
                return AdapterError(f"task {adapter.name!r}: module {module!r} holds NaN or Inf in lora_{side}")
    return MergeError(f"module {module!r}: values overflow {dtype_name(dtype)}; choose another dtype")


def _base_model(adapters: Sequence[Adapter]) -> str | None:
    known = [adapter for adapter in adapters if adapter.base_model is not None]
    for adapter in known[1:]:
        if adapter.base_model != known[0].base_model:
            raise MergeError(
                f"adapters {known[0].name!r} and {adapter.name!r} are for different base models: "
                f"{known[0].base_model!r} and {adapter.base_model!r}"
            )
    return known[0].base_model if known else None


def _storage_dtype(adapters: Sequence[Adapter], dtype: torch.dtype | None) -> torch.dtype:
    allowed = ", ".join(DTYPES)
    if dtype is not None:
        if dtype not in DTYPES.values():
            raise MergeError(f"dtype is {dtype}; allowed are {allowed}")
        return dtype
    first = adapters[0]
    own = first.dtype(first.modules[0])
    for adapter in adapters:
        for module in adapter.modules:
            if adapter.dtype(module) != own:
                raise MergeError(
                    f"adapter {first.name!r} has {dtype_name(own)} in module {first.modules[0]!r}, adapter "
                    f"{adapter.name!r} {dtype_name(adapter.dtype(module))} in {module!r}; give dtype, one of {allowed}"
                )
    if own not in DTYPES.values():
        raise MergeError(f"the adapters are {dtype_name(own)}; give dtype, one of {allowed}")
    return own


def _plan(adapters: Sequence[Adapter], components: int, clamp: bool) -> list[_Plan]:
    """How each module is merged, by name. Everything that headers show to be wrong is found here."""
    if not isinstance(components, int) or isinstance(components, bool):
        raise MergeError(f"components must be an integer, got {components!r}")
    if components < 0:
        raise MergeError(f"components is {components}; it must be at least 0")
    plans = []
    for module in sorted({module for adapter in adapters for module in adapter.modules}):
        tasks = tuple(index for index, adapter in enumerate(adapters) if module in adapter)
        first = adapters[tasks[0]]
        for index in tasks[1:]:
            if adapters[index].shape(module) != first.shape(module):
                raise MergeError(
                    f"adapters {first.name!r} and {adapters[index].name!r} disagree about the shape [out, in] of module "
                    f"{module!r}: {list(first.shape(module))} and {list(adapters[index].shape(module))}"
                )
        ranks = tuple(adapters[index].rank(module) for index in tasks)
        most = min(max(ranks), len(tasks) - 1)
        if components > most and not clamp:
            raise MergeError(
                f"components is {components}; allowed are 0 to {most} in module {module!r} (min(r, n - 1) with rank "
                f"{max(ranks)} and {len(tasks)} adapters), unless clamped"
            )
        plans.append(_Plan(module, tasks, ranks, min(components, most)))
    return plans


def _track(items: Sequence[_T], description: str, progress: bool) -> Iterable[_T]:
    if not (progress and sys.stderr.isatty()):
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, description, console=Console(stderr=True), transient=True)
