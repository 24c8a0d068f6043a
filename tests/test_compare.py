"""What a merge is compared with: adapters of the same bytes, truncated or quantised."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import MakeAdapter, update, various

from rmm_kernels import MergedAdapters, merge
from rmm_kernels.compare import quantise, truncate


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
