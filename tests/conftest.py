"""Adapters for tests: the real ones, their cut in tests/data, and synthetic ones with whatever a test needs."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # for `benchmarks`; at the end, for its rmm_kernels is the sources, without what was compiled

Shapes = Mapping[str, tuple[int, int]]

# (out, in) of the modules of a synthetic adapter.
SHAPES: Shapes = {"layers.0.q": (24, 20), "layers.0.up": (40, 24), "layers.1.q": (24, 20)}


@pytest.fixture(scope="session")
def shared_adapters() -> Path:
    """The full real adapters, with their evaluation data."""
    path = ROOT.parent / "shared" / "adapters"
    if not path.is_dir():
        pytest.skip("the shared real adapters are not beside this checkout")
    return path


@pytest.fixture(scope="session")
def real_adapters(shared_adapters: Path) -> list[Path]:
    """The eight real rank-16 adapters."""
    return sorted(shared_adapters.glob("tasks/*/lora_r16"))


@pytest.fixture(scope="session")
def cut_adapters() -> list[Path]:
    """Three modules of each of the eight real rank-16 adapters."""
    return sorted(path.parent for path in (ROOT / "tests" / "data").glob("*/adapter_config.json"))


MakeAdapter = Callable[..., Path]


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """`write_adapter` into the test's own directory."""
    return lambda name, **options: write_adapter(tmp_path / "adapters" / name, **options)


def write_adapter(
    path: Path,
    *,
    shapes: Shapes = SHAPES,
    rank: int = 4,
    ranks: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """A PEFT directory with randn factors that depend on its name alone.

    Args:
        ranks: ranks of some modules, put into rank_pattern.
        config: entries that replace or complete adapter_config.json.
        tensors: further tensors by key; one that exists is replaced.
        files: further files by name.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(path.name.encode()))
    ranks = ranks or {}
    state = {}
    for module, (out, wide) in shapes.items():
        r = ranks.get(module, rank)
        state[f"base_model.model.{module}.lora_A.weight"] = torch.randn(r, wide, generator=generator).to(dtype)
        state[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, r, generator=generator).to(dtype)
    written = {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "rank_pattern": dict(ranks),
        "target_modules": list(shapes),
        **(config or {}),
    }
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(written))
    save_file({**state, **(tensors or {})}, path / "adapter_model.safetensors")
    for name, content in (files or {}).items():
        (path / name).write_bytes(content)
    return path


def contents(directory: Path) -> dict[str, bytes]:
    """Every file under a directory, to see that nothing changed, or that nothing was left."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
