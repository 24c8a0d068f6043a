"""PEFT directories in and out, against PEFT itself and against everything that can be wrong with them."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPES, MakeAdapter, contents, write_adapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rmm_kernels import Adapter, AdapterError, LoraFactors, load_adapter, load_adapters, save_adapter
from rmm_kernels.adapters import FactorStack, factor_key, lora_rank, lora_scaling

KEY = "base_model.model.layers.0.q"


def weights(path: Path) -> Path:
    return path / "adapter_model.safetensors"


def test_real_adapters(cut_adapters: list[Path]) -> None:
    for path in cut_adapters:
        adapter = load_adapter(path)
        state = load_file(weights(path))
        assert adapter.name == path.name
        assert adapter.base_model == "sentence-transformers/all-MiniLM-L6-v2"
        assert adapter.modules == (
            "encoder.layer.0.attention.self.query",
            "encoder.layer.0.intermediate.dense",
            "encoder.layer.1.attention.self.value",
        )
        for module in adapter.modules:
            factors = adapter.factors(module)
            assert torch.equal(factors.lora_a, state[factor_key(module, "A")])
            assert torch.equal(factors.lora_b, state[factor_key(module, "B")])
            assert adapter.shape(module) == (factors.lora_b.shape[0], factors.lora_a.shape[1])
            assert (adapter.rank(module), adapter.scaling(module), adapter.dtype(module)) == (16, 2.0, torch.float32)
            assert factors.magnitude is None
        assert list(adapter.files) == ["head.safetensors"]
        assert not adapter.extras and not adapter.skipped and not adapter.beyond_factors


def test_cut_is_the_real_thing(cut_adapters: list[Path], real_adapters: list[Path]) -> None:
    for cut, whole in zip(cut_adapters, real_adapters, strict=True):
        full = load_adapter(whole)
        for module in load_adapter(cut).modules:
            assert torch.equal(load_adapter(cut).factor(module, "A"), full.factor(module, "A"))
            assert torch.equal(load_adapter(cut).factor(module, "B"), full.factor(module, "B"))
        assert (cut / "head.safetensors").read_bytes() == (whole / "head.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(make_adapter: MakeAdapter, dtype: torch.dtype) -> None:
    adapter = load_adapter(make_adapter("one", dtype=dtype))
    for module in adapter.modules:
        assert adapter.dtype(module) == adapter.factors(module).lora_a.dtype == dtype
        assert adapter.factor_bytes(module) == 4 * sum(SHAPES[module]) * dtype.itemsize


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 16)
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(16, 16), "up": nn.Linear(16, 24)}) for _ in range(3)])
        self.conv = nn.Conv2d(2, 3, 3)
        self.head = nn.Linear(24, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer["q"](x)
        return self.head(self.layers[2]["up"](x)) + self.conv(x.reshape(1, 2, 4, -1)[..., :16]).mean()


def peft_directory(path: Path, **config: Any) -> tuple[Path, nn.Module]:
    """A directory PEFT wrote, and the model it wrote it from."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    settings = peft.LoraConfig(**{"init_lora_weights": False, "r": 4, "lora_alpha": 6, **config})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(TinyModel(), settings)
        model.save_pretrained(path)
    return path, model


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q": 2}, "alpha_pattern": {"layers.1.q": 5}},
        {"rank_pattern": {r"^layers\.0\.q": 3, "q": 2, "layers.2.up": 6}, "alpha_pattern": {"[012].up": 1, "up": 9}},
        {"rank_pattern": {"layers.*q": 5}, "alpha_pattern": {"s.1.q": 100, "1.q": 7}, "use_rslora": True},
    ],
    ids=lambda config: ",".join(config),
)
def test_ranks_and_scalings_are_pefts(tmp_path: Path, config: dict[str, Any]) -> None:
    path, model = peft_directory(tmp_path / "one", target_modules=["q", "up"], **config)
    adapter = load_adapter(path)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if getattr(layer, "scaling", None)
    }
    assert set(adapter.modules) == set(layers) and len(layers) == 6
    for module, layer in layers.items():
        assert adapter.rank(module) == layer.r["default"]
        assert adapter.scaling(module) == layer.scaling["default"]
        assert torch.equal(adapter.factors(module).lora_a, layer.lora_A["default"].weight)


@pytest.mark.parametrize("key", ["q", "layers.0.q", "^layers.0.q", "s.0.q", ".*q", "0|1.q", "q$", "up", "layers", "(q)|(k)"])
def test_patterns_match_as_pefts(key: str) -> None:
    other = pytest.importorskip("peft.utils.other")
    for module in ("q", "layers.0.q", "a.layers.0.q", "layers.10.q", "qq", "layers.0.q.k"):
        matched = other.get_pattern_key([key], module) == key
        expected = 7 if matched else 4
        assert lora_rank({"r": 4, "rank_pattern": {key: 7}}, module) == expected, module


def test_what_is_not_factors_is_carried(tmp_path: Path) -> None:
    """LoRA on embeddings and convolutions, biases and saved modules, as PEFT writes them."""
    path, _ = peft_directory(
        tmp_path / "one",
        target_modules=["q", "up", "embed", "conv"],
        modules_to_save=["head"],
        lora_bias=False,
        bias="lora_only",
    )
    adapter, state = load_adapter(path), load_file(weights(path))
    assert [module for module in adapter.modules if "q" in module or "up" in module] == list(adapter.modules)
    factor_keys = {factor_key(module, side) for module in adapter.modules for side in "AB"}
    assert set(adapter.extras) == set(state) - factor_keys
    for key, tensor in adapter.extras.items():
        assert torch.equal(tensor, state[key])
    assert any("lora_embedding_A" in key for key in adapter.extras)
    assert factor_key("conv", "A") in adapter.extras
    assert {"base_model.model.head.weight", "base_model.model.head.bias"} <= set(adapter.extras)
    assert adapter.beyond_factors == (
        "trained biases (bias='lora_only')",
        "LoRA on embeddings",
        "LoRA on convolutions",
    )


def test_lora_bias_is_carried(tmp_path: Path) -> None:
    path, _ = peft_directory(tmp_path / "one", target_modules=["q"], lora_bias=True)
    adapter = load_adapter(path)
    assert sorted(adapter.extras) == [f"base_model.model.layers.{i}.q.lora_B.bias" for i in range(3)]
    assert adapter.beyond_factors == ("a bias on lora_B (lora_bias)",)


def test_dora(tmp_path: Path) -> None:
    path, model = peft_directory(tmp_path / "one", target_modules=["q"], use_dora=True)
    adapter = load_adapter(path)
    assert adapter.beyond_factors == ("DoRA (use_dora)",)
    for module in adapter.modules:
        vector = model.get_submodule(f"base_model.model.{module}").lora_magnitude_vector["default"].weight
        assert torch.equal(adapter.factors(module).magnitude, vector)


@pytest.mark.parametrize(
    ("config", "phrase"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "base weights that PEFT changes on loading"),
        ({"init_lora_weights": "olora"}, "base weights that PEFT changes on loading"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"trainable_token_indices": [1]}, "trained tokens"),
    ],
)
def test_beyond_factors(make_adapter: MakeAdapter, config: dict[str, Any], phrase: str) -> None:
    (found,) = load_adapter(make_adapter("one", config=config)).beyond_factors
    assert found.startswith(phrase)


def test_adapter_name_inside_keys(make_adapter: MakeAdapter) -> None:
    path = make_adapter("one", tensors={f"{KEY}.lora_magnitude_vector": torch.randn(24)})
    plain = load_adapter(path)
    renamed = {
        key.replace(".weight", ".default.weight").replace("vector", "vector.default.weight"): tensor
        for key, tensor in load_file(weights(path)).items()
    }
    other = path.with_name("other")
    other.mkdir()
    (other / "adapter_config.json").write_text((path / "adapter_config.json").read_text())
    save_file(renamed, weights(other))
    adapter = load_adapter(other)
    assert adapter.modules == plain.modules
    assert list(adapter.extras) == list(plain.extras) == [f"{KEY}.lora_magnitude_vector"]
    for module in plain.modules:
        assert torch.equal(adapter.factors(module).lora_b, plain.factors(module).lora_b)
    assert torch.equal(adapter.factors("layers.0.q").magnitude, plain.factors("layers.0.q").magnitude)


def test_files_beside(make_adapter: MakeAdapter) -> None:
    path = make_adapter(
        "one",
        files={
            "head.safetensors": b"head",
            "README.md": b"card",
            "tokenizer.json": b"{}",
            "adapter_model.bin": b"pickle",
            ".gitattributes": b"",
            "optimizer.pt": b"",
            "rng_state_0.pth": b"",
            "trainer_state.json": b"",
            "training_args.bin": b"",
        },
    )
    (path / "checkpoint-10").mkdir()
    adapter = load_adapter(path)
    assert adapter.files == {name: path / name for name in ("README.md", "head.safetensors", "tokenizer.json")}
    assert adapter.skipped == (
        ".gitattributes",
        "adapter_model.bin",
        "checkpoint-10",
        "optimizer.pt",
        "rng_state_0.pth",
        "trainer_state.json",
        "training_args.bin",
    )


def test_misaligned_tensors(make_adapter: MakeAdapter) -> None:
    """The format lets a tensor begin anywhere."""
    path = make_adapter("one", shapes={"m": (3, 2)}, rank=1)
    a, b = torch.tensor([[1.5, -2.5]]), torch.tensor([[3.0], [4.0], [5.0]])
    entries = {
        "base_model.model.flag": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        factor_key("m", "A"): {"dtype": "F32", "shape": [1, 2], "data_offsets": [1, 9]},
        factor_key("m", "B"): {"dtype": "F32", "shape": [3, 1], "data_offsets": [9, 21]},
    }
    header = json.dumps(entries).encode()
    weights(path).write_bytes(struct.pack("<Q", len(header)) + header + b"\1" + a.numpy().tobytes() + b.numpy().tobytes())
    factors = load_adapter(path).factors("m")
    assert torch.equal(factors.lora_a, a) and torch.equal(factors.lora_b, b)


def test_views_do_not_reach_the_file(make_adapter: MakeAdapter) -> None:
    path = make_adapter("one")
    before = contents(path)
    load_adapter(path).factors("layers.0.q").lora_a.zero_()
    assert contents(path) == before


def test_stacks_pad_with_zeros(make_adapter: MakeAdapter) -> None:
    adapters = [load_adapter(make_adapter("a", rank=2, dtype=torch.float16)), load_adapter(make_adapter("b", rank=3))]
    module = "layers.0.up"
    with FactorStack() as stack:
        for _ in range(2):  # the second time in used memory
            a = stack.fill(adapters, module, "A", 3, torch.float16)
            assert (a.shape, a.dtype) == ((2, 3, 24), torch.float32)
            assert torch.equal(a[0, :2], adapters[0].factor(module, "A").float()) and not a[0, 2].any()
            assert torch.equal(a[1], adapters[1].factor(module, "A"))
            b = stack.fill(adapters, module, "B", 3, torch.float16)
            assert (b.shape, b.dtype) == ((2, 40, 3), torch.float32)
            assert torch.equal(b[0, :, :2], adapters[0].factor(module, "B").float()) and not b[0, :, 2].any()
            assert torch.equal(b[1], adapters[1].factor(module, "B"))


@pytest.mark.parametrize("kept_open", [0, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_stacks_of_equal_adapters(
    make_adapter: MakeAdapter, dtype: torch.dtype, kept_open: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FactorStack, "_KEPT_OPEN", kept_open)
    adapters = [load_adapter(make_adapter(name, dtype=dtype)) for name in "abc"]
    with FactorStack() as stack:
        for module in SHAPES:
            for side in "AB":
                expected = torch.stack([adapter.factor(module, side) for adapter in adapters])
                assert torch.equal(stack.fill(adapters, module, side, 4, dtype), expected)
        files = list(stack._files.values())
    assert len(files) == kept_open and all(file.closed for file in files)


def test_file_that_shrinks(make_adapter: MakeAdapter) -> None:
    path = make_adapter("one")
    adapter = load_adapter(path)
    weights(path).write_bytes(weights(path).read_bytes()[:-100])
    with FactorStack() as stack, pytest.raises(AdapterError, match=r"ends within base_model\.model\.layers\.1\.q\.lora_B\."):
        stack.fill([adapter], "layers.1.q", "B", 4, torch.float32)


# ---------------------------------------------------------------- names


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="there is no way to ask here")
def test_what_is_expected_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each adapter whose file is open, all bytes of both factors and none else, in requests that the system takes whole."""
    asked: dict[int, list[range]] = {}

    def advise(descriptor: int, begin: int, size: int, advice: int) -> None:
        assert 0 < size <= 1 << 17 and advice == os.POSIX_FADV_WILLNEED
        asked.setdefault(descriptor, []).append(range(begin, begin + size))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(FactorStack, "_KEPT_OPEN", 2)
    adapters = [load_adapter(write_adapter(tmp_path / name, shapes={"q": (4000, 40), "k": (4, 4)}, rank=16)) for name in "abc"]
    with FactorStack() as stack:
        stack.expect(adapters, "q")
        assert len(asked) == 2
    for adapter, ranges in zip(adapters, asked.values(), strict=False):
        data = adapter.path.joinpath("adapter_model.safetensors").read_bytes()
        found = b"".join(data[part.start : part.stop] for part in ranges)
        assert found == b"".join(adapter.factor("q", side).numpy().tobytes() for side in "AB")


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write_adapter(tmp_path / "news" / "lora")
    two = write_adapter(tmp_path / "tweets" / "lora")
    three = write_adapter(tmp_path / "pairs")

    def names(*adapters: Any, **options: Any) -> list[str]:
        return [adapter.name for adapter in load_adapters(adapters, **options)]

    assert load_adapter(one).name == "lora"
    assert load_adapter(one, "mine").name == "mine"
    assert names(one, three) == ["lora", "pairs"]
    assert names(one, two, three) == ["news", "tweets", "pairs"]
    assert names(one, load_adapter(two, "t")) == ["lora", "t"]
    assert names(one, two, names=["x", "y"]) == ["x", "y"]
    assert names(load_adapter(two, "t"), names=["u"]) == ["u"]
    monkeypatch.chdir(one)
    assert names(".") == ["lora"]
    with pytest.raises(AdapterError, match=r"two adapters have the task name 'news'.*give names"):
        load_adapters([one, two, load_adapter(three, "news")])
    with pytest.raises(AdapterError, match="two adapters have the task name 'x'"):
        load_adapters([one, two], ["x", "x"])
    with pytest.raises(AdapterError, match="names holds 1 names for 2 adapters"):
        load_adapters([one, two], ["x"])
    with pytest.raises(AdapterError, match="must be printable and not empty"):
        load_adapters([one], [""])


# ---------------------------------------------------------------- bad input


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def edit_tensors(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    """Replace tensors, by their key within module layers.0.q; None removes one."""

    def edit(path: Path) -> None:
        state = load_file(weights(path))
        for name, tensor in changes.items():
            key = f"{KEY}.{name.replace('__', '.')}"
            state.pop(key, None)
            if tensor is not None:
                state[key] = tensor
        save_file(state, weights(path))

    return edit


def only_pickled(path: Path) -> None:
    weights(path).rename(path / "adapter_model.bin")


def truncated(path: Path) -> None:
    weights(path).write_bytes(weights(path).read_bytes()[:-100])


BAD = {
    "no directory": (lambda path: path.rename(path.with_name("gone")), "does not exist"),
    "no config": (lambda path: (path / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "broken config": (lambda path: (path / "adapter_config.json").write_text("{"), "is not valid JSON"),
    "binary config": (lambda path: (path / "adapter_config.json").write_bytes(b"\xff\xfe\x00"), "is not valid JSON"),
    "config is a list": (lambda path: (path / "adapter_config.json").write_text("[]"), "holds a list; it must be an object"),
    "not LoRA": (edit_config(peft_type="IA3"), "peft_type 'IA3'; only LORA"),
    "target parameters": (edit_config(target_parameters=["experts.up"]), "sets target_parameters .*not supported"),
    "QA-LoRA": (edit_config(use_qalora=True), "sets use_qalora"),
    "no weights": (lambda path: weights(path).unlink(), "has no adapter_model.safetensors"),
    "pickled weights": (only_pickled, r"only adapter_model.bin, a pickle.*executes code.*torch.load"),
    "empty weights": (lambda path: weights(path).write_bytes(b""), "can't be read"),
    "garbage": (lambda path: weights(path).write_bytes(b"garbage" * 100), "can't be read"),
    "truncated": (truncated, "can't be read"),
    "no factors": (edit_tensors(lora_A__weight=None, lora_B__weight=None), "no lora_A and lora_B"),
    "lone lora_A": (edit_tensors(lora_B__weight=None), "'layers.0.q' has lora_A but no lora_B"),
    "lone lora_B": (edit_tensors(lora_A__weight=None), "'layers.0.q' has lora_B but no lora_A"),
    "two of one": (edit_tensors(lora_A__x__weight=torch.randn(4, 20)), "'layers.0.q' has two lora_A"),
    "several adapters": (
        edit_tensors(
            lora_A__weight=None,
            lora_B__weight=None,
            lora_A__x__weight=torch.randn(4, 20),
            lora_B__y__weight=torch.randn(24, 4),
        ),
        r"several adapters \(x, y\)",
    ),
    "real rank": (
        edit_tensors(lora_A__weight=torch.randn(3, 20), lora_B__weight=torch.randn(24, 3)),
        "'layers.0.q' has rank 3 in adapter_model.safetensors, but adapter_config.json says 4",
    ),
    "ranks disagree": (edit_tensors(lora_B__weight=torch.randn(24, 3)), r"lora_A \[4, 20\] and lora_B \[24, 3\]"),
    "rank 0": (edit_tensors(lora_A__weight=torch.randn(0, 20), lora_B__weight=torch.randn(24, 0)), "all at least 1"),
    "a vector": (edit_tensors(lora_A__weight=torch.randn(80)), r"lora_A \[80\]"),
    "rank 0 in config": (edit_config(r=0), "'layers.0.q' rank 0; it must be an integer of at least 1"),
    "no rank": (edit_config(r=None), "rank None"),
    "rank in text": (edit_config(rank_pattern={"q": "4"}), "rank '4'"),
    "no alpha": (edit_config(lora_alpha=None), "lora_alpha None"),
    "infinite alpha": (edit_config(lora_alpha=math.inf), "lora_alpha inf; it must be a finite number"),
    "bad pattern": (edit_config(alpha_pattern={"(": 1}), r"alpha_pattern holds '\(', not a regular expression"),
    "pattern list": (edit_config(rank_pattern=["q"]), "rank_pattern must be an object"),
    "two dtypes": (edit_tensors(lora_B__weight=torch.randn(24, 4).half()), "lora_A in F32 and lora_B in F16"),
    "integers": (
        edit_tensors(lora_A__weight=torch.ones(4, 20, dtype=torch.int8), lora_B__weight=torch.ones(24, 4, dtype=torch.int8)),
        "I8",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_adapter(make_adapter: MakeAdapter, tmp_path: Path, case: str) -> None:
    spoil, message = BAD[case]
    path = make_adapter("one", shapes={"layers.0.q": (24, 20)})
    spoil(path)
    before = contents(tmp_path)
    with pytest.raises(AdapterError, match=message) as raised:
        load_adapter(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    assert contents(tmp_path) == before


def test_directory_is_a_file(make_adapter: MakeAdapter) -> None:
    with pytest.raises(AdapterError, match="is a file; give the adapter's directory"):
        load_adapter(weights(make_adapter("one")))


def test_foreign_prefix(make_adapter: MakeAdapter) -> None:
    with pytest.raises(AdapterError, match=r"'transformer.q.lora_A.weight' does not begin with 'base_model.model.'"):
        load_adapter(make_adapter("one", tensors={"transformer.q.lora_A.weight": torch.randn(4, 20)}))


def test_unknown_module(make_adapter: MakeAdapter) -> None:
    adapter = load_adapter(make_adapter("one"))
    for method in (adapter.factors, adapter.shape, adapter.rank, adapter.scaling, adapter.dtype):
        with pytest.raises(AdapterError, match="adapter 'one' has no module 'nope'"):
            method("nope")


# ---------------------------------------------------------------- writing


def written(adapter: Adapter, target: Path) -> Adapter:
    factors = {module: adapter.factors(module) for module in adapter.modules}
    save_adapter(target, adapter.config, factors, adapter.extras, adapter.files)
    return load_adapter(target)


def test_save_gives_the_same_adapter(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    path = make_adapter(
        "one",
        dtype=torch.bfloat16,
        ranks={"layers.0.up": 2},
        config={"use_rslora": True},
        tensors={
            "base_model.model.head.weight": torch.randn(3, 5),
            "base_model.model.count": torch.tensor(7),
            f"{KEY}.lora_magnitude_vector": torch.randn(24),
        },
        files={"head.safetensors": b"any bytes"},
    )
    again = written(load_adapter(path), tmp_path / "out")
    assert again.config == load_adapter(path).config
    ours, theirs = load_file(weights(again.path)), load_file(weights(path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert (again.path / "head.safetensors").read_bytes() == b"any bytes"


def test_saved_files_have_ordinary_permissions(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    path = written(load_adapter(make_adapter("one", files={"a": b""})), tmp_path / "out").path
    (tmp_path / "plain").mkdir()
    (tmp_path / "file").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    for file in path.iterdir():
        assert file.stat().st_mode == (tmp_path / "file").stat().st_mode, file.name


def test_save_checks_the_config(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = load_adapter(make_adapter("one"))
    factors = adapter.factors("layers.0.q")
    wrong = LoraFactors(factors.lora_a, factors.lora_b, 3.0)
    with pytest.raises(AdapterError, match=r"'layers\.0\.q' has rank 4 and scaling 3, but config says 4 and 2"):
        save_adapter(tmp_path / "out", adapter.config, {"layers.0.q": wrong})
    wrong = LoraFactors(factors.lora_a[:2], factors.lora_b[:, :2], 2.0)
    with pytest.raises(AdapterError, match="has rank 2 and scaling 2, but config says 4"):
        save_adapter(tmp_path / "out", adapter.config, {"layers.0.q": wrong})
    assert not (tmp_path / "out").exists()


def test_targets(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = load_adapter(make_adapter("one"))
    (tmp_path / "empty").mkdir()
    written(adapter, tmp_path / "empty")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        written(adapter, tmp_path / "empty")
    with pytest.raises(FileExistsError, match="is not a directory"):
        written(adapter, tmp_path / "empty" / "adapter_config.json")
    with pytest.raises(FileNotFoundError, match="can't be created"):
        written(adapter, tmp_path / "no" / "such")
    long = "x" * 250  # the directory beside it that is written first has a longer name yet
    with pytest.raises(OSError, match=f"output .*/{long} can't be created: File name too long"):
        written(adapter, tmp_path / long)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("where", ["write_json", "save_file", "copyfile"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_failed_save_leaves_nothing(
    make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    adapter = load_adapter(make_adapter("one", files={"head.safetensors": b"head"}))
    before = contents(tmp_path)

    def fail(*arguments: Any, **options: Any) -> None:
        Path(arguments[1] if where != "write_json" else arguments[0]).write_bytes(b"half of it")
        raise error

    target = {
        "write_json": "rmm_kernels.adapters.write_json",
        "save_file": "safetensors.torch.save_file",
        "copyfile": "shutil.copyfile",
    }
    monkeypatch.setattr(target[where], fail)
    with pytest.raises(type(error)):
        written(adapter, tmp_path / "out")
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters"]


def test_full_disk_is_an_os_error(make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors has an exception of its own for it."""
    adapter = load_adapter(make_adapter("one"))

    def fail(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="No space left on device") as raised:
        written(adapter, tmp_path / "out")
    assert raised.value.errno == errno.ENOSPC


def test_scaling_of_a_config() -> None:
    assert lora_scaling({"r": 8, "lora_alpha": 16}, "m") == 2.0
    assert lora_scaling({"r": 8, "lora_alpha": 16, "use_rslora": True}, "m") == 16 / math.sqrt(8)
    assert lora_scaling({"r": 8, "lora_alpha": 16, "rank_pattern": None, "alpha_pattern": {"m": 4.5}}, "a.m") == 4.5 / 8
