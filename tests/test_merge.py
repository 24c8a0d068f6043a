"""Merging: exact where it must be, honest about error and storage, frugal with memory."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import SHAPES, MakeAdapter, update, various, write_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmm_kernels import Adapter, AdapterError, MergedAdapters, MergeError, backends, load_adapter, merge

DTYPES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def restored_update(merged: MergedAdapters, task: str, module: str) -> Tensor:
    factors = merged.restore(task)[module]
    return factors.scaling * factors.lora_b.double() @ factors.lora_a.double()


def dense_error(merged: MergedAdapters, adapters: Sequence[Adapter], modules: Sequence[str]) -> float:
    """The relative error of ΔW over some modules, by forming every ΔW in fp64."""
    wrong = total = 0.0
    for adapter in adapters:
        for module in set(modules) & set(adapter.modules):
            original = update(adapter, module)
            wrong += float((restored_update(merged, adapter.name, module) - original).square().sum())
            total += float(original.square().sum())
    return math.sqrt(wrong / total)


# ---------------------------------------------------------------- exactness, errors, storage


@pytest.mark.parametrize("fixture", ["cut_adapters", "real_adapters"])
def test_exact_at_n_minus_1(request: pytest.FixtureRequest, fixture: str) -> None:
    paths = request.getfixturevalue(fixture)
    adapters = [load_adapter(path, path.parent.name if path.name == "lora_r16" else None) for path in paths]
    merged = merge(paths, components=7)
    assert merged.tasks == tuple(adapter.name for adapter in adapters)
    assert set(merged.modules) == set(adapters[0].modules)
    factors = {adapter.name: merged.restore(adapter.name) for adapter in adapters}
    for name, module in merged.modules.items():
        for adapter in adapters:
            original, restored = adapter.factors(name), factors[adapter.name][name]
            exact = original.lora_b.double() @ original.lora_a.double()
            error = (restored.lora_b.double() @ restored.lora_a.double() - exact).norm() / exact.norm()
            assert error <= 1e-5
            assert restored.scaling == original.scaling
        assert module.error <= 1e-5
        assert module.ratio == (7 * (16 + 8) + 16) / (16 * 8)
    assert merged.ratio == (7 * (16 + 8) + 16) / (16 * 8)


@pytest.mark.parametrize("components", range(8))
def test_reported_error_is_the_dense_one(cut_adapters: list[Path], components: int) -> None:
    adapters = [load_adapter(path) for path in cut_adapters]
    merged = merge(adapters, components)
    tolerance = {"rel": 1e-5} if components < 7 else {"rel": 1e-2}  # there, rounding is what is measured
    assert merged.error == pytest.approx(dense_error(merged, adapters, list(merged.modules)), **tolerance)
    for name, module in merged.modules.items():
        assert module.error == pytest.approx(dense_error(merged, adapters, [name]), **tolerance)
    for adapter in adapters:
        assert merged.task_error(adapter.name) == pytest.approx(
            dense_error(merged, [adapter], list(merged.modules)), **tolerance
        )


def test_error_falls_with_components(cut_adapters: list[Path]) -> None:
    errors = [merge(cut_adapters, components).error for components in range(8)]
    assert errors == sorted(errors, reverse=True)
    assert 0.4 < errors[3] < 0.5 and 0.9 < errors[0] < 1


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12, 1e25], ids=str)
def test_errors_of_tiny_and_huge_weights(make_adapter: MakeAdapter, size: float) -> None:
    """Squares of such weights leave the range of fp32."""
    paths = []
    for name in ("a", "b", "c"):
        path = make_adapter(name)
        state = {key: tensor * size for key, tensor in load_file(path / "adapter_model.safetensors").items()}
        save_file(state, path / "adapter_model.safetensors")
        paths.append(path)
    adapters = [load_adapter(path) for path in paths]
    for components in (1, 2):
        merged = merge(adapters, components)
        assert merged.error == pytest.approx(dense_error(merged, adapters, list(SHAPES)), rel=1e-2)


def test_untrained_adapters(make_adapter: MakeAdapter) -> None:
    """lora_B starts as zeros: ΔW is 0, and so is its error where it is restored as 0."""
    zeros = {f"base_model.model.{module}.lora_B.weight": torch.zeros(out, 4) for module, (out, _) in SHAPES.items()}
    one, two = make_adapter("one", tensors=zeros), make_adapter("two", tensors=zeros)
    merged = merge([one, two], 0)
    assert merged.error == 0 and merged.report()["total"]["error"] == 0
    merged = merge([one, make_adapter("trained")], 0)
    assert merged.task_error("one") == math.inf and merged.error < 1
    assert merged.report()["by_task"]["one"]["error"] is None


@pytest.mark.parametrize("p", [0, 1, 2, 3])
@pytest.mark.parametrize(("n", "rank"), [(4, 4), (5, 8), (8, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_storage(make_adapter: MakeAdapter, p: int, n: int, rank: int, dtype: torch.dtype) -> None:
    merged = merge([make_adapter(f"task{i}", rank=rank, dtype=dtype) for i in range(n)], p)
    assert merged.raw_bytes == n * rank * sum(map(sum, SHAPES.values())) * dtype.itemsize
    for module in (merged, *merged.modules.values()):
        assert module.ratio == (p * (rank + n) + rank) / (rank * n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(make_adapter: MakeAdapter, dtype: torch.dtype) -> None:
    adapters = [load_adapter(make_adapter(name, dtype=dtype)) for name in "abcd"]
    merged = merge(adapters, 3)
    assert merged.dtype == dtype
    for module in merged.modules.values():
        assert {t.dtype for t in (module.basis_a, module.coeff_a, module.basis_b, module.coeff_b)} == {dtype}
        assert module.scaling.dtype == torch.float32
    assert merged.error <= DTYPES[dtype]
    assert merged.error == pytest.approx(dense_error(merged, adapters, list(SHAPES)), rel=1e-2)
    assert merged.restore("a")["layers.0.q"].lora_a.dtype == dtype


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("own", [*DTYPES, torch.float64])
def test_storage_dtype(make_adapter: MakeAdapter, own: torch.dtype, stored: torch.dtype) -> None:
    adapters = [load_adapter(make_adapter(name, dtype=own)) for name in "abcd"]
    merged = merge(adapters, 3, dtype=stored)
    assert merged.dtype == stored and merged.restore("b")["layers.0.up"].lora_b.dtype == stored
    assert merged.ratio == (3 * (4 + 4) + 4) / (4 * 4) * stored.itemsize / own.itemsize
    assert merged.error <= DTYPES[stored]
    assert merged.error == pytest.approx(dense_error(merged, adapters, list(SHAPES)), rel=1e-2)


def test_mixed_dtypes(make_adapter: MakeAdapter) -> None:
    paths = [make_adapter("a", dtype=torch.float16), make_adapter("b", dtype=torch.bfloat16)]
    with pytest.raises(MergeError, match=r"'a' has float16 in module .*'b' bfloat16 in .*give dtype, one of float32, fl"):
        merge(paths, 1)
    assert merge(paths, 1, dtype=torch.float32).error <= 1e-6
    with pytest.raises(MergeError, match="the adapters are float64; give dtype"):
        merge([make_adapter("c", dtype=torch.float64)], 0)
    with pytest.raises(MergeError, match=r"dtype is torch\.int8; allowed are float32, float16, bfloat16"):
        merge(paths, 1, dtype=torch.int8)


# ---------------------------------------------------------------- what adapters may differ in


def test_various_adapters_are_exact(make_adapter: MakeAdapter) -> None:
    adapters = various(make_adapter)
    merged = merge(adapters, 7, clamp=True)
    assert {name: module.components for name, module in merged.modules.items()} == {
        "layers.0.q": 3,
        "layers.0.up": 2,
        "layers.1.q": 3,
    }
    up = merged.modules["layers.0.up"]
    assert (up.tasks, up.ranks, up.rank, up.shape) == ((0, 1, 3), (4, 6, 1), 6, (40, 24))
    assert up.raw_bytes == (4 + 6 + 1) * (40 + 24) * 4
    assert torch.allclose(up.scaling, torch.tensor([2.0, 12 / math.sqrt(6), 6 / 1]))
    for adapter in adapters:
        restored = merged.restore(adapter.name)
        assert list(restored) == list(adapter.modules)
        for module, factors in restored.items():
            original = adapter.factors(module)
            assert factors.lora_a.shape == original.lora_a.shape and factors.lora_b.shape == original.lora_b.shape
            assert factors.scaling == original.scaling
            assert torch.allclose(factors.lora_a, original.lora_a, atol=1e-5)
            assert torch.allclose(factors.lora_b, original.lora_b, atol=1e-5)


def test_various_errors(make_adapter: MakeAdapter) -> None:
    """What a padded task is restored as beyond its true rank does not count: restore drops it."""
    adapters = various(make_adapter)
    merged = merge(adapters, 1)
    for adapter in adapters:
        assert merged.task_error(adapter.name) == pytest.approx(dense_error(merged, [adapter], list(SHAPES)), rel=1e-5)
    assert merged.error == pytest.approx(dense_error(merged, adapters, list(SHAPES)), rel=1e-5)


def test_modules_of_one_task_alone(make_adapter: MakeAdapter) -> None:
    one = make_adapter("one", shapes={"x": (5, 6), "y": (5, 6)})
    two = make_adapter("two", shapes={"y": (5, 6), "z": (7, 3)})
    merged = merge([one, two], 1, clamp=True)
    assert {name: (module.tasks, module.components) for name, module in merged.modules.items()} == {
        "x": ((0,), 0),
        "y": ((0, 1), 1),
        "z": ((1,), 0),
    }
    assert torch.equal(merged.restore("one")["x"].lora_a, load_adapter(one).factor("x", "A"))
    assert list(merged.restore("two")) == ["y", "z"]
    with pytest.raises(MergeError, match="components is 1; allowed are 0 to 0 in module 'x'"):
        merge([one, two], 1)


def test_a_single_adapter(make_adapter: MakeAdapter) -> None:
    path = make_adapter("one")
    merged = merge([path], 0)
    assert merged.ratio == 1 and merged.error == 0
    for module, factors in merged.restore("one").items():
        assert torch.equal(factors.lora_b, load_adapter(path).factor(module, "B"))


def test_equal_adapters(make_adapter: MakeAdapter) -> None:
    path = make_adapter("one")
    merged = merge([path, path, path], 2, names=["a", "b", "c"])
    assert merged.error <= 1e-6
    assert merge([path] * 3, 0, names=["a", "b", "c"]).error <= 1e-6


def test_merging_is_deterministic(cut_adapters: list[Path], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            merge(cut_adapters, 3).save(tmp_path / str(count))
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "1/factors.safetensors").read_bytes() == (tmp_path / "2/factors.safetensors").read_bytes()


# ---------------------------------------------------------------- bad input


def test_components_out_of_range(cut_adapters: list[Path]) -> None:
    with pytest.raises(MergeError, match=r"components is 8; allowed are 0 to 7 in module .*rank 16 and 8 adapters.*unless cl"):
        merge(cut_adapters, 8)
    assert merge(cut_adapters, 8, clamp=True).modules["encoder.layer.0.intermediate.dense"].components == 7
    for clamp in (False, True):
        with pytest.raises(MergeError, match="components is -1; it must be at least 0"):
            merge(cut_adapters, -1, clamp=clamp)
    for wrong in (1.5, True, "3", None):
        with pytest.raises(MergeError, match="components must be an integer"):
            merge(cut_adapters, wrong)  # type: ignore[arg-type]


def test_rank_limits_components(make_adapter: MakeAdapter) -> None:
    paths = [make_adapter(name, rank=2) for name in "abcd"]
    with pytest.raises(MergeError, match="allowed are 0 to 2"):
        merge(paths, 3)
    assert merge(paths, 2).error <= 1e-6  # rank 2 in two dimensions


def test_no_adapters() -> None:
    with pytest.raises(MergeError, match="adapters is empty"):
        merge([])


def test_other_base_model(make_adapter: MakeAdapter) -> None:
    one, two = make_adapter("one"), make_adapter("two", config={"base_model_name_or_path": "another"})
    with pytest.raises(MergeError, match="'one' and 'two' are for different base models: 'base' and 'another'"):
        merge([one, two], 1)
    unnamed = make_adapter("unnamed", config={"base_model_name_or_path": None})
    assert merge([unnamed, one], 1).base_model == "base"
    assert merge([unnamed], 0).base_model is None


def test_other_shapes(make_adapter: MakeAdapter) -> None:
    one, two = make_adapter("one", shapes={"m": (5, 6)}), make_adapter("two", shapes={"m": (5, 7)})
    with pytest.raises(MergeError, match=r"'one' and 'two' disagree about the shape .*'m': \[5, 6\] and \[5, 7\]"):
        merge([one, two], 1)


def test_two_of_one_name(make_adapter: MakeAdapter) -> None:
    path = make_adapter("one")
    with pytest.raises(AdapterError, match="two adapters have the task name"):
        merge([path, load_adapter(path)], 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["A", "B"])
def test_not_finite(make_adapter: MakeAdapter, value: float, side: str) -> None:
    bad = make_adapter("bad")
    state = load_file(bad / "adapter_model.safetensors")
    state[f"base_model.model.layers.0.up.lora_{side}.weight"][2, 1] = value
    save_file(state, bad / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=rf"task 'bad': module 'layers\.0\.up' holds NaN or Inf in lora_{side}"):
        merge([make_adapter("good"), bad], 1)


def test_overflow_of_the_storage_dtype(make_adapter: MakeAdapter) -> None:
    big = {f"base_model.model.{module}.lora_A.weight": torch.randn(4, wide) * 1e6 for module, (_, wide) in SHAPES.items()}
    with pytest.raises(MergeError, match=r"module 'layers\.0\.q': values overflow float16; choose another dtype"):
        merge([make_adapter("a", tensors=big), make_adapter("b")], 1, dtype=torch.float16)


# ---------------------------------------------------------------- memory, progress

MEMORY = """
import sys
from pathlib import Path
from rmm_kernels import merge

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])

target, small, large, streamed = Path(sys.argv[1]), sys.argv[3:9], sys.argv[9:], sys.argv[2] == "streamed"

def run(adapters, directory):
    if streamed:
        return merge(adapters, 2, output=directory)
    merged = merge(adapters, 2)
    merged.save(directory)
    return merged

run(small, target / "small")  # code, thread pools and allocator are there now
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
merged = run(large, target / "large")
print(status("VmHWM") - before, merged.merged_bytes, merged.raw_bytes // len(merged.modules))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(backends()["compress"]["cpu"] == "reference", reason="the reference holds whole SVDs")
@pytest.mark.parametrize("way", ["held", "streamed"])
def test_peak_memory(tmp_path: Path, way: str) -> None:
    """At most the output, or with a streamed one a factor of it, and one and a half modules' worth of input, whatever is
    resident: heap, stacks, mapped pages. malloc is to give back what is freed: by how much the holes of a heap hold it up
    differs from run to run."""
    shapes = {f"layers.{i}": (4096, 4096) for i in range(8)}
    small = [write_adapter(tmp_path / f"small{i}", shapes={"m": (64, 64)}) for i in range(6)]
    large = [write_adapter(tmp_path / f"large{i}", shapes=shapes, rank=64) for i in range(6)]
    command = [sys.executable, "-c", MEMORY, tmp_path, way, *small, *large]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(  # the installed package, not this tree
        command, cwd="/", env=environment, capture_output=True, text=True, check=True
    )
    peak, output, module = map(int, done.stdout.split())
    held = output if way == "held" else output // (2 * len(shapes))
    assert peak <= held + 3 * module // 2, f"{peak:,} bytes; output {output:,}, one module's input {module:,}"


def test_progress_is_silent_without_a_terminal(cut_adapters: list[Path], capfd: pytest.CaptureFixture[str]) -> None:
    merge(cut_adapters, 1, progress=True, compare=True)
    assert capfd.readouterr() == ("", "")


def test_progress_on_a_terminal(
    cut_adapters: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    merge(cut_adapters, 1, progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "merging" in captured.err
