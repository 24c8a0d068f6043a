"""truncated_svd of large matrices: block Krylov and what it falls back to, held to the bounds of every other overload."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hard_inputs
import ops
import pytest
import torch
from ops import FLOATS, LAYOUTS, assert_same_bits, assert_within, norm, one_thread, randn  # noqa: F401
from safetensors.torch import load_file
from test_truncated_svd import check
from torch import Tensor

import rmm_kernels
from rmm_kernels.ops import _filtered, _krylov, _large_svd, _triplets

large_svd = torch.ops.rmm_kernels.large_svd
UNDER_FP64 = tuple(dtype for dtype in FLOATS if dtype != torch.float64)


def strict(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    return large_svd(x, rank, True)


def with_spectrum(sigma: Tensor, m: int, k: int, seed: int = 0) -> Tensor:
    u, v = (torch.linalg.qr(randn(1, size, len(sigma), seed=seed + size)).Q for size in (m, k))
    return (u * sigma) @ v.mT


def clustered(size: int) -> Tensor:
    """Groups of 8 within 1e-4 of each other, the groups apart by a factor of 2 down to 1e-4."""
    index = torch.arange(size)
    return (2.0 ** -(index // 8)).clamp(min=1e-4) * (1 - 1e-4 * (index % 8))


SPECTRA = {
    "slow": lambda size: torch.arange(1, size + 1) ** -0.25,
    "harmonic": lambda size: 1.0 / torch.arange(1, size + 1),
    "clustered": clustered,
    "steep": lambda size: 10.0 ** -torch.linspace(0, 7, size),
    "step": lambda size: torch.where(torch.arange(size) < 5, 1.0, 1e-3),
}


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The methods that were asked, in order."""
    asked: list[str] = []
    for name in ("filtered", "block_krylov", "_gram_eigh"):
        original = getattr(_large_svd, name)

        def spy(*args: object, name: str = name, original: object = original, **options: object) -> object:
            asked.append(name)
            return original(*args, **options)  # type: ignore[operator]

        monkeypatch.setattr(_large_svd, name, spy)
    lapack = torch.linalg.svd

    def svd(a: Tensor, full_matrices: bool = True) -> object:
        if min(a.shape[1:]) > _large_svd.SHORTEST:
            asked.append("lapack")
        return lapack(a, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    yield asked


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(400, 300, 8), (300, 500, 16)], ids=str)
def test_spectra(spectrum: str, shape: tuple[int, int, int]) -> None:
    m, k, rank = shape
    x = with_spectrum(SPECTRA[spectrum](min(m, k)), m, k)
    check(x, rank, strict(x, rank))


def excess(x: Tensor, rank: int) -> Tensor:
    """How far large_svd's approximation is from the best, in units of ‖x‖."""
    u, s, vh = large_svd(x, rank, False)
    wide = x.double()
    error = norm(wide - (u.double() * s[:, None].double()) @ vh.double())
    return (error - torch.linalg.svdvals(wide)[:, rank:].norm(dim=1)) / norm(wide).clamp(min=1e-300)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(400, 600, 24), (660, 650, 16)], ids=str)
def test_excess_without_residuals(spectrum: str, shape: tuple[int, int, int], methods: list[str]) -> None:
    """What a low-rank approximation asks for: ‖A − U S Vᵀ‖ within 1e-6 ‖A‖ of the least; by the method that is meant."""
    m, k, rank = shape
    x = with_spectrum(SPECTRA[spectrum](min(m, k)), m, k)
    assert_within("excess", excess(x, rank), torch.tensor(1e-6))
    enough = min(m, k) <= _filtered.LONGEST and spectrum != "step"  # 1e-3 σ₁ is no more than a Gram matrix's rounding
    assert methods == ["filtered", *([] if enough else ["block_krylov"])]


@pytest.mark.parametrize("case", hard_inputs.names(torch.float32))
def test_excess_of_hard_inputs(case: str) -> None:
    for m, k, rank in [(230, 150, 8), (140, 260, 16)]:
        x = hard_inputs.generate(case, 2, m, k, rank).float()
        flat = case == "outlier" or case.startswith("offset")  # beside one σ, as the docstring says
        assert_within("excess", excess(x, rank), torch.tensor(2e-6 if flat else 1e-6))


@pytest.mark.parametrize("rank", [48, 64])
def test_many_vectors_need_no_other_method(rank: int, methods: list[str]) -> None:
    """Those of eigh in fp32, as they come, are not orthonormal enough."""
    x = with_spectrum(SPECTRA["harmonic"](660), 660, 700)
    u, _, vh = large_svd(x, rank, False)
    assert methods == ["filtered", "block_krylov"]
    for basis in (u.double(), vh.mT.double()):
        assert norm(basis.mT @ basis - torch.eye(rank)).max() <= 2e-6


def test_an_exhausted_space_stays_orthogonal(methods: list[str]) -> None:
    """Of clusters a block holds more than one step keeps apart: the rest of the next is rounding."""
    x = with_spectrum(clustered(700), 700, 800)
    found = strict(x, 100)
    assert methods == ["block_krylov"]
    check(x, 100, found)


def test_a_basis_that_degenerates_is_no_error() -> None:
    """A matrix of rank 1, beside whose image in fp32 a block holds nothing but rounding; its neighbour is served."""
    x = torch.cat([torch.ones(1, 700, 660), randn(1, 700, 660, seed=7)])
    assert_within("excess", excess(x, 8), torch.tensor(1e-6))


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_estimated_excess(spectrum: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the iterations stop at, wherever that is: no less than half the truth."""
    x = with_spectrum(SPECTRA[spectrum](400), 400, 600)
    for module in (_filtered, _krylov):
        for limit in (1e-4, 1e-5, 1e-6):
            for guard in (_filtered, _triplets):
                monkeypatch.setattr(guard, "EXCESS", limit)
            if module is _krylov:
                monkeypatch.setattr(_filtered, "LONGEST", 0)
            assert_within("excess", excess(x, 24), torch.tensor(2 * limit + 2e-7))


def test_batches_beyond_what_goes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every kind of matrix in every part."""
    x = torch.cat([with_spectrum(SPECTRA[name](200), 200, 210) for name in SPECTRA] + [torch.zeros(1, 200, 210)])
    monkeypatch.setattr(_large_svd, "_TOGETHER", 4 * x[0].nbytes)
    assert_within("excess", excess(x[:5], 16), torch.tensor(1e-6))
    check(x, 8, strict(x, 8))
    _, s, _ = large_svd(x, 16, False)
    assert s[5].abs().max() == 0


@pytest.mark.parametrize("case", hard_inputs.names(torch.float32))
def test_hard_inputs(case: str) -> None:
    for m, k, rank in [(230, 150, 8), (140, 260, 16)]:
        x = hard_inputs.generate(case, 2, m, k, rank).float()
        check(x, rank, strict(x, rank))


@pytest.mark.parametrize("dtype", UNDER_FP64, ids=ops.name)
@pytest.mark.parametrize("rank", [1, 8, 100, 140])
def test_ranks_and_dtypes(dtype: torch.dtype, rank: int) -> None:
    x = randn(2, 140, 200, seed=rank, dtype=dtype)
    check(x, rank, strict(x, rank))


def test_the_fastest_method_that_passes(methods: list[str]) -> None:
    x = randn(1, 300, 400, seed=1)
    strict(x, 8)
    assert methods == ["block_krylov"]
    methods.clear()
    strict(x, 100)  # too wide for block Krylov
    assert methods == ["block_krylov", "_gram_eigh"]
    methods.clear()
    strict(torch.zeros(1, 300, 400), 8)
    assert methods == ["block_krylov", "_gram_eigh", "lapack"]


def test_matrices_go_their_own_ways() -> None:
    """A batch in which every method is the last of some matrix."""
    slow, steep = (with_spectrum(SPECTRA[name](300), 300, 400)[0] for name in ("slow", "steep"))
    x = torch.stack([slow, torch.zeros(300, 400), steep, with_spectrum(torch.ones(3), 300, 400)[0], slow * 1e30])
    check(x, 8, strict(x, 8))


@pytest.mark.parametrize("guard", ["orthonormal", "excess", "residual"])
def test_every_guard_is_asked(guard: str, monkeypatch: pytest.MonkeyPatch, methods: list[str]) -> None:
    x = randn(1, 300, 400, seed=2)
    values = {"orthonormal": torch.tensor([False]), "excess": torch.tensor([torch.inf]), "residual": torch.full((1, 8), 1e9)}
    monkeypatch.setattr(_triplets, guard, lambda *args: values[guard])
    result = strict(x, 8)
    assert methods == ["block_krylov", "_gram_eigh", *([] if guard == "excess" else ["lapack"])]
    check(x, 8, result)


@pytest.mark.parametrize("guard", ["orthonormal", "residual"])
def test_the_filtered_subspace_is_guarded(guard: str, monkeypatch: pytest.MonkeyPatch, methods: list[str]) -> None:
    """By the matrix itself, not by its Gram matrix in fp32."""
    x = randn(1, 300, 400, seed=2)
    value = torch.tensor([False]) if guard == "orthonormal" else torch.full((1, 8), 1e9)
    monkeypatch.setattr(_triplets, guard, lambda *args: value)
    large_svd(x, 8, False)
    assert methods[:2] == ["filtered", "block_krylov"]


def test_too_steep_for_a_gram_matrix_in_fp32(methods: list[str]) -> None:
    x = with_spectrum(10.0 ** -torch.arange(300).clamp(max=20).div(2), 300, 400)
    assert_within("excess", excess(x, 16), torch.tensor(1e-6))
    assert methods[:2] == ["filtered", "block_krylov"]


@pytest.mark.parametrize("spectrum, most", [("slow", 2), ("harmonic", 1), ("step", 1)])
def test_rounds_end_where_nothing_more_is_gained(spectrum: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After what converges at once, and after what fp32's Gram matrix never resolves."""
    rounds, original = [], _filtered._filter
    monkeypatch.setattr(_filtered, "_filter", lambda *args: rounds.append(1) or original(*args))
    large_svd(with_spectrum(SPECTRA[spectrum](400), 400, 600), 24, False)
    assert len(rounds) == most


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_bad_matrix_stays_alone(value: float) -> None:
    good = randn(3, 200, 150, seed=3)
    x = good.clone()
    x[1, 17, 3] = value
    result = strict(x, 4)
    assert all(part[1].isnan().all() for part in result)
    u, s, vh = (part[[0, 2]] for part in result)
    check(good[[0, 2]], 4, (u.contiguous(), s.contiguous(), vh.contiguous()))


def test_runs_and_layouts() -> None:
    x = randn(2, 260, 150, seed=4)
    expected = strict(x, 5)
    assert_same_bits(strict(x, 5), expected)
    for make in LAYOUTS.values():
        check(x, 5, strict(make(x), 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(strict(x, 5), expected)


@pytest.mark.parametrize("shape", [(0, 150, 140, 3), (2, 150, 140, 0), (2, 0, 140, 0)], ids=str)
def test_empty(shape: tuple[int, int, int, int]) -> None:
    batch, m, k, rank = shape
    u, s, vh = strict(torch.ones(batch, m, k), rank)
    assert (u.shape, s.shape, vh.shape) == ((batch, m, rank), (batch, rank), (batch, rank, k))


def test_public_function() -> None:
    """Beyond 128 on the shorter side, but for fp64."""
    x = randn(1, 129, 140, seed=5)
    assert_same_bits(rmm_kernels.truncated_svd(x, 3), strict(x, 3))
    for other in (x[:, :128], x.double()):
        assert_same_bits(rmm_kernels.truncated_svd(other, 3), torch.ops.rmm_kernels.truncated_svd.reference(other, 3))


def test_opcheck_and_compile() -> None:
    x = randn(2, 140, 150, seed=6)
    torch.library.opcheck(large_svd.default, (x, 3, True))
    torch.library.opcheck(large_svd.default, (x.half().mT, 3, False))
    compiled = torch.compile(rmm_kernels.truncated_svd, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x, 3), rmm_kernels.truncated_svd(x, 3))


@pytest.mark.parametrize("task", ["desc_pair", "wordnet_supersense"])
def test_real_deltas(shared_adapters: Path, task: str) -> None:
    """Excess of the rank-16 approximation of every layer of a full fine-tune."""
    deltas = load_file(shared_adapters / "tasks" / task / "full_delta.safetensors")
    for shape in {tensor.shape for tensor in deltas.values()}:
        x = torch.stack([tensor.float() for tensor in deltas.values() if tensor.shape == shape][:3])
        assert_within("excess", excess(x, 16), torch.tensor(1e-6))
