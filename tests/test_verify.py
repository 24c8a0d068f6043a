"""Verifying: a merge and its originals agree, and whatever was changed on either side is found."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeAdapter, carrying, various, write_adapter
from safetensors.torch import load_file, save_file

from rmm_kernels import AdapterError, MergedAdapters, MergeError, load_adapter, merge


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
    assert any(re.search(message, line) for line in found.differences), found.differences


def test_verify_finds_a_changed_merge(merged: MergedAdapters, originals: list[Path], tmp_path: Path) -> None:
    state = load_file(tmp_path / "merged/factors.safetensors")
    state["layers.0.up.coeff_a"] = state["layers.0.up.coeff_a"] * 1.01
    save_file(state, tmp_path / "merged/factors.safetensors")
    found = MergedAdapters.load(tmp_path / "merged").verify(originals)
    assert len(found.differences) == 3 and all("'layers.0.up'" in line for line in found.differences)
