"""A merge from disk to disk, each contender in a process of its own (disk.py), and what it wrote read back."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import models, peers, workloads
from .peers import Adapters, Merger
from .workloads import OURS, SCRIPT, SCRIPT_1_THREAD, MergeInputs, Workload

WORKLOADS = workloads.MERGE
CONTENDERS = peers.MERGE

# The same algorithm, so the same error as ours; the others are lossy in their own way, and only must restore everything.
SAME_ALGORITHM = (OURS, SCRIPT, SCRIPT_1_THREAD)


def _error(adapters: Adapters, merger: Merger, out: Path, tasks: list[str]) -> float:
    """Relative Frobenius error of lora_B @ lora_A over all modules of `tasks`, as read back from `out`.

    With L = [B̂, −B] and R = [Â; A], ‖L R‖² = tr(LᵀL R Rᵀ), in fp64.
    """
    original = {task: peers.modules_of(peers.load_file(adapters[task] / "adapter_model.safetensors")) for task in tasks}
    missing = {(task, module) for task, modules in original.items() for module in modules}
    wrong = total = 0.0
    for task, module, restored in merger.read(out, tasks):
        missing.remove((task, module))
        a, b = (factor.double() for factor in original[task][module])
        a_hat, b_hat = (factor.double() for factor in restored)
        left, right = peers.torch.cat((b_hat, -b), 1), peers.torch.cat((a_hat, a))
        wrong += float(((left.mT @ left) * (right @ right.mT)).sum())
        total += float(((b.mT @ b) * (a @ a.mT)).sum())
    assert not missing, f"{len(missing)} factors were not restored"
    return (max(wrong, 0) / total) ** 0.5


class Sets:
    """The adapters of the workload being run, written once and removed with the next one's."""

    def __init__(self) -> None:
        self._made: tuple[Workload, Adapters] | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def of(self, workload: Workload) -> Adapters:
        if self._made is None or self._made[0] is not workload:
            self.close()
            self._made = workload, self._make(workload.make())
        return self._made[1]

    def close(self) -> None:
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _make(self, inputs: MergeInputs) -> Adapters:
        if inputs.model is None:
            return workloads.real_adapters()
        self._directory = tempfile.TemporaryDirectory(prefix="rmm-benchmark-")
        where = Path(self._directory.name)
        paths = models.write_adapters(where, inputs.model, inputs.blocks, inputs.n, inputs.rank, inputs.dtype)
        return {path.name: path for path in paths}


@pytest.fixture(scope="module")
def sets() -> Iterator[Sets]:
    made = Sets()
    yield made
    made.close()


@pytest.fixture(scope="module")
def outputs() -> dict[tuple[str, str], dict[str, float]]:
    """What each contender wrote in its first turn: its relative error of ΔW and its size."""
    return {}


class _Replay:
    """A timer for pytest-benchmark whose rounds take as long as those of the other process did."""

    def __init__(self) -> None:
        self._instants: Iterator[float] = iter(())

    def load(self, seconds: list[float]) -> None:
        self._instants = iter([instant for value in seconds for instant in (0.0, value)])

    def __call__(self) -> float:
        return next(self._instants, 0.0)


replay = _Replay()


@pytest.mark.benchmark(timer=replay)
def test_merge(benchmark, sets, outputs, workload, turn, contender):
    inputs = workload.make()
    if inputs.model is None and not workloads.real_adapters():
        pytest.skip("the shared real adapters are not beside this checkout")
    adapters = sets.of(workload)
    if inputs.cold and turn:
        pytest.skip("a merge of a whole model is timed in the first turn alone")
    with tempfile.TemporaryDirectory(prefix="rmm-benchmark-") as scratch:
        out = Path(scratch) / "merged"
        command = [sys.executable, "-m", "benchmarks.disk", contender, out, *adapters.values()]
        command += [f"--components={inputs.components}", f"--threads={workload.threads}", *(["--cold"] if inputs.cold else [])]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        if "absent" in found:
            pytest.skip(found["absent"])
        key = (workload.name, contender)
        if key not in outputs:
            merger = CONTENDERS[contender](adapters, inputs.components)
            tasks = list(adapters) if inputs.blocks <= 2 else list(adapters)[:2]
            size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
            outputs[key] = {"error": _error(adapters, merger, out, tasks), "bytes": size}
            if contender in SAME_ALGORITHM and (workload.name, OURS) in outputs:
                assert abs(outputs[key]["error"] - outputs[workload.name, OURS]["error"]) <= 1e-4
    benchmark.extra_info["output"] = {**outputs[key], "phases": found["phases"], "peak_bytes": found["peak_bytes"]}
    replay.load(found["seconds"])
    benchmark.pedantic(lambda: None, rounds=len(found["seconds"]))
