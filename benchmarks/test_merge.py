"""A merge of real adapters from disk to disk, in process, imports excluded; the adapters are in the page cache."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rmm_kernels import MergedAdapters, merge

from . import peers, workloads
from .peers import Factors, Merger, Module, Task
from .timing import rounds, stopwatch
from .workloads import OURS, SCRIPT, SCRIPT_1_THREAD, MergeInputs

WORKLOADS = workloads.MERGE


def ours(inputs: MergeInputs) -> Merger:
    """merge and save with their defaults: errors per module reported, heads carried."""

    def write(out: Path) -> None:
        merge(list(inputs.adapters.values()), components=inputs.components).save(out)

    def read(out: Path) -> Iterator[tuple[Task, Module, Factors]]:
        merged = MergedAdapters.load(out)
        for task, name in zip(inputs.adapters, merged.tasks, strict=True):
            for module, factors in merged.restore(name).items():
                yield task, module, (factors.lora_a, factors.lora_b)

    return Merger(write, read)


CONTENDERS = {OURS: ours, **peers.MERGE}


def _error(inputs: MergeInputs, merger: Merger, out: Path) -> float:
    """Relative Frobenius error of lora_B @ lora_A over all tasks and modules, as read back from `out`."""
    original = {
        task: peers.modules_of(peers.load_file(path / "adapter_model.safetensors")) for task, path in inputs.adapters.items()
    }
    missing = {(task, module) for task, modules in original.items() for module in modules}
    wrong = total = 0.0
    for task, module, (lora_a, lora_b) in merger.read(out):
        missing.remove((task, module))
        a, b = original[task][module]
        delta = b @ a
        wrong += float((lora_b @ lora_a - delta).square().sum())
        total += float(delta.square().sum())
    assert not missing, f"{len(missing)} factors were not restored"
    return (wrong / total) ** 0.5


# The same algorithm, so the same error as ours; the others are lossy in their own way, and only must restore everything.
SAME_ALGORITHM = (OURS, SCRIPT, SCRIPT_1_THREAD)


@pytest.fixture(scope="module")
def outputs() -> dict[str, dict[str, float]]:
    """What each contender wrote when it was checked: its relative error of ΔW and its size."""
    return {}


@pytest.mark.skipif(not workloads.real_adapters(), reason="the shared real adapters are not beside this checkout")
def test_merge(benchmark, prepared, outputs, tmp_path, workload, turn, contender):
    out = tmp_path / "merged"

    def check(inputs: MergeInputs, contender: str, merger: Merger) -> float:
        _, seconds = stopwatch(merger.write, out)
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        outputs[contender] = {"error": _error(inputs, merger, out), "bytes": size}
        if contender in SAME_ALGORITHM:
            errors = [outputs[name]["error"] for name in SAME_ALGORITHM if name in outputs]
            assert max(errors) - min(errors) <= 1e-4
        return seconds

    def fresh() -> tuple[tuple[Path], dict[str, object]]:
        shutil.rmtree(out, ignore_errors=True)
        return (out,), {}

    merger, seconds = prepared.call(workload, contender, CONTENDERS[contender], check)
    benchmark.extra_info["output"] = outputs[contender]
    benchmark.pedantic(merger.write, setup=fresh, **rounds(seconds))
