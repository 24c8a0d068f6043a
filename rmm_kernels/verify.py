"""Does a merge hold what its originals do?"""

from __future__ import annotations

import filecmp
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from . import delta
from .adapters import Adapter, FactorStack
from .storage import MergedModule, Stored

# By how much a relative error may differ when it is computed again, and a norm by how much of itself: fp32 sums in
# another order.
_ABSOLUTE, _RELATIVE = 1e-6, 1e-4


_T = TypeVar("_T")


@dataclass(frozen=True)
class Verification:
    """What a comparison with the originals found."""

    errors: dict[str, float]
    """the relative error of ΔW of each task, computed again"""
    differences: tuple[str, ...]
    """where originals and merge disagree, one line each; empty if nowhere"""


def verify(stored: Stored, originals: Mapping[str, Adapter]) -> Verification:
    """Compare with the originals, by task: configs, modules, errors, and all that is carried unchanged."""
    differences = [line for task, adapter in originals.items() for line in _differences(stored, task, adapter)]
    found: dict[str, list[tuple[float, float]]] = {task: [] for task in originals}
    for name, module in stored.modules.items():
        tasks = [stored.tasks[index] for index in module.tasks]
        rows = {
            row: originals[task]
            for row, task in enumerate(tasks)
            if task in originals and not _layout_difference(module, row, originals[task], name)
        }
        if not rows:
            continue
        for row, squares in zip(rows, measure(module, rows, name), strict=True):
            found[tasks[row]].append(squares)
            if not _agree(module.squares[row], squares):
                differences.append(
                    f"task {tasks[row]!r}, module {name!r}: {_describe(squares)}; the manifest says "
                    f"{_describe(module.squares[row])}"
                )
    return Verification({task: delta.relative(squares) for task, squares in found.items() if squares}, tuple(differences))


def measure(module: MergedModule, originals: Mapping[int, Adapter], name: str) -> list[tuple[float, float]]:
    """(‖ΔW − ΔŴ‖², ‖ΔW‖²) of some of a module's rows against their original adapters."""
    rows, adapters = list(originals), list(originals.values())
    ranks = [module.ranks[row] for row in rows]
    with FactorStack() as stack:
        a = stack.fill(adapters, name, "A", module.rank, module.basis_a.dtype)
        grams_a = delta.restored_grams(a.mT, module.basis_a.mT, module.coeff_a, rows, ranks)
        b = stack.fill(adapters, name, "B", module.rank, module.basis_b.dtype)
        grams_b = delta.restored_grams(b, module.basis_b, module.coeff_b, rows, ranks)
    return delta.squares(grams_a, grams_b, [adapter.scaling(name) for adapter in adapters])


def _differences(stored: Stored, task: str, adapter: Adapter) -> Iterator[str]:
    """Where a task differs from its original in anything but the values of its factors."""
    index, parts = stored.tasks.index(task), stored.parts[task]
    for key in _unequal(adapter.config, parts.config, lambda x, y: x == y):
        yield f"task {task!r}: the adapter's config has another {key}"
    for key in _unequal(adapter.extras, parts.extras, _same_bits):
        yield f"task {task!r}: tensor {key!r} is not the adapter's"
    for key in _unequal(adapter.files, parts.files, lambda x, y: filecmp.cmp(x, y, shallow=False)):
        yield f"task {task!r}: file {key!r} is not the adapter's"
    merged = {name: module for name, module in stored.modules.items() if index in module.tasks}
    for name in sorted(merged.keys() ^ set(adapter.modules)):
        yield f"task {task!r}: module {name!r} is {'not in the adapter' if name in merged else 'not in the merge'}"
    for name in sorted(merged.keys() & set(adapter.modules)):
        difference = _layout_difference(merged[name], merged[name].tasks.index(index), adapter, name)
        if difference:
            yield f"task {task!r}, module {name!r}: {difference}"


def _layout_difference(module: MergedModule, row: int, adapter: Adapter, name: str) -> str:
    """What keeps a row of a module from being compared with its original; empty if nothing does."""
    if name not in adapter.modules:
        return "not in the adapter"
    theirs, ours = (adapter.shape(name), adapter.rank(name)), (module.shape, module.ranks[row])
    if theirs == ours:
        return ""
    return f"the adapter has shape {theirs[0]} and rank {theirs[1]}, the merge {ours[0]} and {ours[1]}"


def _unequal(x: Mapping[str, _T], y: Mapping[str, _T], equal: Callable[[_T, _T], bool]) -> list[str]:
    """The keys that only one of the two has, or under which they differ."""
    return sorted(key for key in {*x, *y} if key not in x or key not in y or not equal(x[key], y[key]))


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return (
        x.shape == y.shape
        and x.dtype == y.dtype
        and torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
    )


def _agree(stated: tuple[float, float], found: tuple[float, float]) -> bool:
    return math.isclose(math.sqrt(stated[1]), math.sqrt(found[1]), rel_tol=_RELATIVE) and math.isclose(
        delta.relative([stated]), delta.relative([found]), rel_tol=_RELATIVE, abs_tol=_ABSOLUTE
    )


def _describe(squares: tuple[float, float]) -> str:
    return f"ΔW has norm {math.sqrt(squares[1]):.6g} and relative error {delta.relative([squares]):.4g}"
