"""LoRE-Merging: both proxes against a plain fp64 SVD, the falling objective, adapters and checkpoints, bad input."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeAdapter, contents
from ops import norm, one_thread, randn  # noqa: F401
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rmm_kernels import cli, load_adapter
from rmm_kernels.checkpoints import Checkpoint, CheckpointError, write_checkpoint
from rmm_kernels.methods import Settings, lore_adapters, lore_checkpoints
from rmm_kernels.methods.lore import decompose, threshold, ties

PROXES = pytest.mark.parametrize("prox, mu", [("fixed", 0.5), ("squared", 0.02)])


def plain(theta: Tensor, settings: Settings) -> tuple[Tensor, Tensor, list[float]]:
    """The algorithm as written, by full SVDs."""
    delta, objective = torch.zeros_like(theta), []
    for _ in range(settings.iterations):
        shared = (theta - delta).mean(0)
        u, s, vh = torch.linalg.svd(theta - shared, full_matrices=False)
        shrunk = torch.stack([shrink(row, settings) for row in s])
        delta = (u * shrunk[:, None]) @ vh
        nuclear = shrunk.sum(1)
        penalty = settings.mu * nuclear.square() if settings.prox == "squared" else 2 * settings.mu * nuclear
        objective.append(float((shared + delta - theta).square().sum() + penalty.sum()))
    return shared, delta, objective


def shrink(sigma: Tensor, settings: Settings) -> Tensor:
    """σ̂; for the squared norm τ = μ Σσ̂ by bisection."""
    if settings.prox == "fixed":
        return (sigma - settings.mu).clamp(min=0)
    low, high = 0.0, float(sigma.max())
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if settings.mu * float((sigma - tau).clamp(min=0).sum()) > tau else (low, tau)
    return (sigma - low).clamp(min=0)


@PROXES
@pytest.mark.parametrize("shape", [(4, 20, 30), (3, 30, 20), (2, 70, 140)], ids=str)
def test_against_full_svds(shape: tuple[int, int, int], prox: Any, mu: float) -> None:
    theta = randn(*shape, seed=1, dtype=torch.float64)
    settings = Settings(mu, prox, tolerance=0)
    for got, expected in zip(decompose(theta, settings), plain(theta, settings), strict=True):
        got, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (got, expected))
        assert (got - expected).norm() <= 1e-9 * expected.norm()


@PROXES
def test_the_objective_falls(prox: Any, mu: float) -> None:
    theta = randn(5, 24, 16, seed=2)
    _, _, objective = decompose(theta, Settings(mu, prox, iterations=50, tolerance=0))
    assert all(after <= before * (1 + 1e-13) for before, after in itertools.pairwise(objective))
    assert objective[-1] < 0.9999 * objective[0]
    _, _, stopped = decompose(theta, Settings(mu, prox, iterations=50, tolerance=1e-3))
    assert len(stopped) < 50 and stopped == objective[: len(stopped)]
    assert stopped[-2] - stopped[-1] <= 1e-3 * stopped[-2]


@PROXES
def test_the_prox_is_a_minimum(prox: Any, mu: float) -> None:
    sigma = randn(1, 9, seed=3, dtype=torch.float64).abs()
    settings = Settings(mu, prox)
    best = (sigma - threshold(sigma, settings)[:, None]).clamp(min=0)

    def value(shrunk: Tensor) -> float:
        penalty = mu * shrunk.sum() ** 2 if prox == "squared" else 2 * mu * shrunk.sum()
        return float((shrunk - sigma).square().sum() + penalty)

    for seed in range(50):
        other = (best + 0.05 * randn(1, 9, seed=seed, dtype=torch.float64)).clamp(min=0)
        assert value(other) >= value(best)


def test_without_penalty_nothing_is_lost() -> None:
    theta = randn(3, 8, 6, seed=4, dtype=torch.float64)
    shared, delta, objective = decompose(theta, Settings(0.0))
    torch.testing.assert_close(shared + delta, theta)
    assert objective[0] < 1e-20
    equal = theta[:1].expand(3, -1, -1)
    shared, delta, _ = decompose(equal, Settings(0.1))
    torch.testing.assert_close(shared, theta[0])
    assert delta.abs().max() < 1e-12


def test_ties() -> None:
    delta = torch.tensor([[4.0, -3.0, 0.1, 2.0], [2.0, 1.0, 5.0, -0.1], [-1.0, 0.0, 3.0, -4.0]])
    torch.testing.assert_close(ties(delta, 0.5), torch.tensor([3.0, -3.0, 4.0, -4.0]))


def dense(factors: Any) -> dict[str, Tensor]:
    return {name: f.scaling * f.lora_b.double() @ f.lora_a.double() for name, f in factors.items()}


def stacked(paths: list[Path]) -> dict[str, Tensor]:
    adapters = [load_adapter(path) for path in paths]
    each = [dense({name: adapter.factors(name) for name in adapter.modules}) for adapter in adapters]
    return {name: torch.stack([deltas[name] for deltas in each]) for name in each[0]}


@PROXES
@pytest.mark.parametrize("finish", ["average", "ties"])
def test_adapters_as_dense(make_adapter: MakeAdapter, tmp_path: Path, prox: Any, mu: float, finish: Any) -> None:
    """The small core gives what dense ΔW would."""
    paths = [make_adapter(name) for name in ("one", "two", "three")]
    settings = Settings(mu, prox, finish=finish, scale=0.7, tolerance=0)
    merged = lore_adapters(paths, settings, rank=20 if finish == "ties" else None)
    total = [0.0] * 20
    for name, theta in stacked(paths).items():
        shared, delta, objective = plain(theta, settings)
        total = [a + b for a, b in zip(total, objective, strict=True)]
        expected = shared + 0.7 * (delta.mean(0) if finish == "average" else ties(delta.float(), 0.2).double())
        got = dense(merged.factors)[name]
        if finish == "average":
            assert (got - expected).norm() <= 1e-5 * expected.norm(), name
        else:  # TIES is of full rank
            optimum = float(torch.linalg.svdvals(expected)[20:].norm())
            assert float((got - expected).norm()) <= optimum + 1e-5 * float(expected.norm()), name
    assert merged.objective == pytest.approx(total, rel=1e-9)
    merged.save(tmp_path / "out")
    torch.testing.assert_close(stacked([tmp_path / "out"])["layers.0.q"][0], dense(merged.factors)["layers.0.q"])


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any torch op returns inside."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


def test_dense_deltas_are_not_formed(make_adapter: MakeAdapter) -> None:
    """Nothing as large as one ΔW, but for TIES."""
    paths = [make_adapter(name, shapes={"layers.0.q": (700, 500)}) for name in ("one", "two", "three")]
    with Largest() as average:
        lore_adapters(paths, Settings(iterations=3))
    assert average.entries <= 700 * 16  # a lora_b of rank 4, as bytes read
    with Largest() as entrywise:
        lore_adapters(paths, Settings(iterations=3, finish="ties"))
    assert entrywise.entries >= 700 * 500


def test_rank_of_the_merged_adapter(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    paths = [make_adapter("one"), make_adapter("two")]
    full = lore_adapters(paths)
    assert {f.lora_a.shape[0] for f in full.factors.values()} == {8}
    cut = lore_adapters(paths, rank=3)
    for name, f in cut.factors.items():
        whole = dense(full.factors)[name]
        optimum = float(torch.linalg.svdvals(whole)[3:].norm())
        assert float((dense(cut.factors)[name] - whole).norm()) == pytest.approx(optimum, rel=1e-4)
        assert f.lora_a.shape[0] == 3


def test_a_module_that_one_lacks_is_zero_there(make_adapter: MakeAdapter) -> None:
    one, two = make_adapter("one"), make_adapter("two", shapes={"layers.0.q": (24, 20)})
    settings = Settings(0.5, tolerance=0)
    theta = stacked([one])["layers.0.up"]
    shared, delta, _ = plain(torch.cat([theta, torch.zeros_like(theta)]), settings)
    expected = shared + delta.mean(0)
    assert (dense(lore_adapters([one, two], settings).factors)["layers.0.up"] - expected).norm() <= 1e-5 * expected.norm()


@PROXES
def test_real_adapters(cut_adapters: list[Path], prox: Any, mu: float) -> None:
    settings = Settings(0.01, prox, iterations=5, tolerance=0)
    merged = lore_adapters(cut_adapters, settings)
    for name, theta in stacked(cut_adapters).items():
        shared, delta, _ = plain(theta, settings)
        expected = shared + delta.mean(0)
        assert (dense(merged.factors)[name] - expected).norm() <= 1e-5 * expected.norm()


def tensors(seed: int) -> dict[str, Tensor]:
    return {
        "a.weight": randn(12, 9, seed=seed),
        "a.bias": randn(12, seed=seed + 1),
        "conv.weight": randn(3, 2, 2, seed=seed + 2),
        "half.weight": randn(8, 8, seed=seed + 3).half(),
        "ids": torch.arange(4),
    }


def write(path: Path, given: dict[str, Tensor], shard_bytes: int = 1 << 40) -> Path:
    path.mkdir()
    write_checkpoint(path, given.items(), shard_bytes)
    return path


@PROXES
@pytest.mark.parametrize("finish", ["average", "ties"])
def test_checkpoints(tmp_path: Path, prox: Any, mu: float, finish: Any) -> None:
    paths = [write(tmp_path / f"m{i}", tensors(10 * i), 300 if i == 1 else 1 << 40) for i in range(3)]
    (paths[0] / "config.json").write_text("{}")
    settings = Settings(mu, prox, finish=finish, scale=0.7, tolerance=0)
    objective = lore_checkpoints(paths, tmp_path / "out", settings)
    out = Checkpoint(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    assert out.shapes == Checkpoint(paths[0]).shapes and out.dtypes == Checkpoint(paths[0]).dtypes
    total = [0.0] * 20
    for name, unit in (("a.weight", 1e-6), ("half.weight", 1e-3)):
        theta = torch.stack([tensors(10 * i)[name].double() for i in range(3)])
        shared, delta, trace = plain(theta, settings)
        total = [a + b for a, b in zip(total, trace, strict=True)]
        expected = shared + 0.7 * (delta.mean(0) if finish == "average" else ties(delta, 0.2))
        assert (out[name].double() - expected).norm() <= unit * expected.norm()
    assert objective == pytest.approx(total, rel=1e-9)
    for name in ("a.bias", "conv.weight"):
        torch.testing.assert_close(out[name], torch.stack([tensors(10 * i)[name] for i in range(3)]).mean(0))
    assert torch.equal(out["ids"], torch.arange(4))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a.bias": None}, "m1 lacks a.bias"),
        ({"a.weight": torch.ones(12, 8)}, r"a.weight has shape \[12, 9\] in"),
        ({"a.weight": torch.ones(12, 9).half()}, "a.weight has dtype torch.float32 in"),
        ({"half.weight": torch.full((8, 8), torch.nan).half()}, "half.weight holds NaN or Inf"),
        ({"a.bias": torch.full((12,), torch.inf)}, "a.bias holds NaN or Inf"),
        ({"ids": torch.zeros(4).long()}, r"ids \(int64\) differs between"),
    ],
)
def test_checkpoints_that_do_not_fit(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    changed = {name: tensor for name, tensor in {**tensors(1), **change}.items() if tensor is not None}
    paths = [write(tmp_path / "m0", tensors(0)), write(tmp_path / "m1", changed)]
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        lore_checkpoints(paths, tmp_path / "out")
    assert contents(tmp_path) == before and sorted(p.name for p in tmp_path.iterdir()) == ["m0", "m1"]


def test_a_missing_shard(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"m{i}", tensors(i), 300) for i in range(2)]
    missing = sorted(paths[1].glob("model-*"))[-1]
    missing.unlink()
    with pytest.raises(CheckpointError, match=f"m1 lacks the shard {missing.name}"):
        lore_checkpoints(paths, tmp_path / "out")
    with pytest.raises(ValueError, match="checkpoints holds 1; at least 2 are needed"):
        lore_checkpoints(paths[:1], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1"]


def test_nothing_overflows_in_silence(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """A large λ, in fp16. Of three: what is left of two is opposite and sums to 0."""
    settings = Settings(0.1, scale=1e12, finish="ties")
    paths = [write(tmp_path / f"m{i}", tensors(i)) for i in range(3)]
    with pytest.raises(ValueError, match=r"half\.weight as merged overflows float16"):
        lore_checkpoints(paths, tmp_path / "out", settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "m2"]
    halves = [make_adapter(name, dtype=torch.float16) for name in ("one", "two", "three")]
    with pytest.raises(ValueError, match=r"lora_a of module 'layers\.0\.q' as merged overflows float16"):
        lore_adapters(halves, settings)


def test_checkpoints_without_tensors(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"m{i}", {}) for i in range(2)]
    with pytest.raises(CheckpointError, match="m0 holds no tensor"):
        lore_checkpoints(paths, tmp_path / "out")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mu": -0.1}, "mu is -0.1; it must be finite and at least 0"),
        ({"mu": float("nan")}, "mu is nan"),
        ({"prox": "cubed"}, "prox is 'cubed'; allowed are"),
        ({"finish": "dare"}, "finish is 'dare'; allowed are"),
        ({"iterations": 0}, "iterations is 0; it must be an integer of at least 1"),
        ({"density": 0.0}, "density is 0.0"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**options)


def test_adapters_that_do_not_fit(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    one, two = make_adapter("one"), make_adapter("two", shapes={"layers.0.q": (24, 21)})
    with pytest.raises(ValueError, match=r"disagree about the shape \[out, in\] of module 'layers.0.q': \[24, 20\]"):
        lore_adapters([one, two])
    with pytest.raises(ValueError, match="adapters holds 1; at least 2 are needed"):
        lore_adapters([one])
    with pytest.raises(ValueError, match=r"rank is 21; module 'layers\.0\.q'"):
        lore_adapters([one, make_adapter("three")], rank=21)
    other = make_adapter("four", config={"base_model_name_or_path": "elsewhere"})
    with pytest.raises(ValueError, match="different base models: base, elsewhere"):
        lore_adapters([one, other])
    with pytest.raises(ValueError, match=r"'one' and 'half' disagree about the dtype of module 'layers\.0\.q': float32 and"):
        lore_adapters([one, make_adapter("half", dtype=torch.float16)])
    with pytest.raises(ValueError, match=r"adapter 'dora' has DoRA \(use_dora\), which LoRE can't merge"):
        lore_adapters([one, make_adapter("dora", config={"use_dora": True})])
    with pytest.raises(ValueError, match=r"adapter 'biased' has trained biases \(bias='all'\), which LoRE can't merge"):
        lore_adapters([one, make_adapter("biased", config={"bias": "all"})])
    nan = make_adapter("five", tensors={"base_model.model.layers.0.q.lora_A.weight": torch.full((4, 20), torch.nan)})
    with pytest.raises(ValueError, match=r"task 'five': module 'layers\.0\.q' holds NaN or Inf"):
        lore_adapters([one, nan])


def test_command(make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(make_adapter(name)) for name in ("one", "two")]
    assert cli.main(["lore", *paths, "-o", str(tmp_path / "out"), "--mu", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["objective"] == lore_adapters(paths, Settings(0.5)).objective
    assert load_adapter(tmp_path / "out").modules == load_adapter(paths[0]).modules
    files = []
    for i in range(2):
        save_file(tensors(i), tmp_path / f"m{i}.safetensors")
        files.append(str(tmp_path / f"m{i}.safetensors"))
    assert cli.main(["lore", *files, "-o", str(tmp_path / "model"), "--prox", "squared", "--finish", "ties"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["iteration", "objective"]
    assert set(Checkpoint(tmp_path / "model")) == set(tensors(0))
    twice = ["lore", paths[0], paths[0], "-o", str(tmp_path / "same")]
    assert cli.main(twice) == 2 and "give names" in capsys.readouterr().err
    assert cli.main([*twice, "--names", "a", "b"]) == 0 and capsys.readouterr().out
    assert cli.main(["lore", *files, "-o", str(tmp_path / "bad"), "--names", "a", "b"]) == 2
    assert capsys.readouterr().err.startswith("rmm-kernels: error: --names is for adapters")
    assert cli.main(["lore", *files, "-o", str(tmp_path / "bad"), "--mu", "-1"]) == 2
    assert capsys.readouterr().err == "rmm-kernels: error: mu is -1.0; it must be finite and at least 0\n"
    ties = ["lore", *paths, "--finish", "ties", "--mu", "0.5", "-o"]
    assert cli.main([*ties, str(tmp_path / "dense"), "--density", "1"]) == 0 and capsys.readouterr().out
    expected = lore_adapters(paths, Settings(0.5, finish="ties", density=1.0)).factors["layers.0.q"].lora_a
    assert torch.equal(load_adapter(tmp_path / "dense").factors("layers.0.q").lora_a, expected)
    assert cli.main([*ties, str(tmp_path / "bad"), "--density", "1.5"]) == 2
    assert capsys.readouterr().err == "rmm-kernels: error: density is 1.5; it must be above 0 and at most 1\n"
    assert not (tmp_path / "bad").exists()
