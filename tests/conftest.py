"""Adapters for tests: the real ones, their cut in tests/data, synthetic ones of any kind; a small model that has some.

And tables of what tests measured."""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmm_kernels import Adapter, MergedAdapters, attach, load_adapter, merge
from rmm_kernels.modules import Attachment

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # for `benchmarks`; at the end, for its rmm_kernels is the sources, without what was compiled

# Workers of pytest-xdist share the cores.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

AddRow = Callable[[Mapping[str, Any]], None]


@pytest.fixture
def add_row(record_property: Callable[[str, object], None]) -> AddRow:
    """Adds a row to the table that pytest prints at its end for the test's file, unless it is to be quiet (-q)."""
    return lambda row: record_property("row", dict(row))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tables: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        tables[report.location[0]] += [row for name, row in report.user_properties if name == "row"]
    for file, rows in sorted(tables.items()):
        if rows and terminalreporter.verbosity >= 0:
            terminalreporter.section(file)
            widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
            for values in [list(widths), *sorted([str(row[key]) for key in widths] for row in rows)]:
                cells = (value.ljust(width) for value, width in zip(values, widths.values(), strict=True))
                terminalreporter.line("  ".join(cells).rstrip())


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
    save_file = pytest.importorskip("safetensors.torch").save_file
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


def update(adapter: Adapter, module: str) -> Tensor:
    """ΔW in fp64."""
    factors = adapter.factors(module)
    return factors.scaling * factors.lora_b.double() @ factors.lora_a.double()


# Adapters of tiny_models.py, which skips where transformers or peft are missing; hence imported where it is wanted.


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> MergedAdapters:
    """Adapters of one rank that all have every module."""
    from tiny_models import EQUAL, write_adapters

    return merge(write_adapters(tmp_path_factory.mktemp("equal"), EQUAL), components=1)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> MergedAdapters:
    """Adapters that differ in rank, scaling, and in which modules they have."""
    from tiny_models import MIXED, write_adapters

    return merge(write_adapters(tmp_path_factory.mktemp("mixed"), MIXED), components=1)


@pytest.fixture
def model() -> nn.Module:
    from tiny_models import tiny_bert

    return tiny_bert()


@pytest.fixture
def attachment(model: nn.Module, mixed: MergedAdapters) -> Iterator[Attachment]:
    with attach(model, mixed) as attachment:
        yield attachment


def contents(directory: Path) -> dict[str, bytes]:
    """Every file under a directory, to see that nothing changed, or that nothing was left."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
