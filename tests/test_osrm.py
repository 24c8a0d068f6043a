"""OSRM: the least-energy subspace against fp64, nothing but sums kept, adapters that PEFT trains, bad input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from ops import norm, one_thread, randn  # noqa: F401
from torch import Tensor, nn

import rmm_kernels
from rmm_kernels import load_adapter
from rmm_kernels.methods import Covariance, covariances, least_energy, osrm

TASKS = ("one", "two", "three")
LAST = torch.tensor([[1], [1], [1], [0]])


class Model(nn.Module):
    """Its arguments are its layers' inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(12, 5), nn.Linear(20, 7)

    def forward(self, h: Tensor, g: Tensor, attention_mask: Tensor | None = None) -> None:
        self.query(h)
        self.value(g)


def batches(task: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Inputs with a graded spectrum of the task's own, plus an offset."""
    found = []
    for i in range(3):
        seed = 100 * task + 10 * i
        mix_h, mix_g = (randn(size, size, seed=task + size) * 0.7 ** torch.arange(size) for size in (12, 20))
        mask = (torch.arange(9) < 9 - i).expand(4, 9).long()
        h, g = randn(4, 9, 12, seed=seed) @ mix_h.mT + 0.1, randn(4, 9, 20, seed=seed + 1) @ mix_g.mT
        found.append({"h": h.to(dtype), "g": g.to(dtype), "attention_mask": mask})
    return found


def inputs(task: int, key: str) -> Tensor:
    return torch.cat([batch[key][batch["attention_mask"].bool()].double() for batch in batches(task)])


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def run(model: nn.Module, **options: Any) -> Any:
    return osrm(model, {name: batches(i) for i, name in enumerate(TASKS)}, ["query", "value"], **{"rank": 4, **options})


def test_subspace_against_fp64(model: Model) -> None:
    found = run(model)
    assert found.tasks == TASKS
    for i, task in enumerate(TASKS):
        for name, key in (("query", "h"), ("value", "g")):
            h = torch.cat([inputs(other, key) for other in range(3) if other != i])
            values, vectors = torch.linalg.eigh(h.T @ h / len(h))
            assert values[4] - values[3] > 1e-6 * values[-1], "the gap decides the subspace"
            a = found.lora_a[task][name]
            assert a.shape == (4, vectors.shape[0]) and a.dtype == torch.float32
            cosines = torch.linalg.svdvals(a.double() @ vectors[:, :4])
            off = norm(a.double() - a.double() @ vectors[:, :4] @ vectors[:, :4].T)
            assert cosines.amin() > 0.5 and off <= 1e-4
            chosen, random = found.energy[task][name]
            assert chosen == pytest.approx(float(values[:4].sum() / values.sum()), rel=1e-6)
            assert chosen < 0.1 * random < 0.1
    assert found.report()["one"]["chosen"] < found.report()["one"]["random"]


def test_memory_does_not_depend_on_samples(model: Model) -> None:
    """Nothing that the hooks keep grows, and they are gone in the end."""
    with covariances({"query": model.query}) as (found, _):
        sizes = set()
        for seed in range(5):
            model.query(randn(1000, 12, seed=seed))
            sizes.add(sum(t.untyped_storage().nbytes() for t in (found["query"].second, found["query"].first)))
        assert found["query"].count == 5000 and len(sizes) == 1
        assert set(vars(found["query"])) == {"second", "first", "count"}
        assert not found["query"].second.requires_grad
    assert not model.query._forward_pre_hooks
    with pytest.raises(RuntimeError), covariances({"query": model.query}):
        raise RuntimeError
    assert not model.query._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_any_dtype(dtype: torch.dtype) -> None:
    h = randn(50, 6, seed=1, dtype=dtype)
    sums = Covariance(torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64))
    for part in h.split(7):
        sums.add(part)
    torch.testing.assert_close(sums.second, h.double().T @ h.double(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums.first, h.double().sum(0), rtol=1e-12, atol=1e-12)


def test_signs() -> None:
    a = least_energy(torch.diag(torch.tensor([3.0, 1.0, 2.0])), 2)
    torch.testing.assert_close(a, torch.tensor([[0, 1, 0], [0, 0, 1.0]], dtype=torch.float64))


def test_mean_variant(model: Model) -> None:
    """Orthogonal to the other tasks' mean vectors, all that the authors' code looks at."""
    found = run(model, variant="mean")
    for i, task in enumerate(TASKS):
        for other in range(3):
            mean = inputs(other, "h").mean(0)
            along = norm((found.lora_a[task]["query"].double() @ mean)[None]) / norm(mean[None])
            assert (along < 1e-6) == (other != i)


def test_peft_trains_it(tmp_path: Path) -> None:
    """The module docstring's example: it starts as the base model, and training moves lora_b."""
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=50, **size)
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    data = {
        task: [{"input_ids": torch.randint(50, (4, 7), generator=torch.Generator().manual_seed(i)), "attention_mask": None}]
        for i, task in enumerate(TASKS)
    }
    found = osrm(model, data, ["query", "value"], rank=3, alpha=6, base_model="bert")
    found.save("two", tmp_path / "two")
    adapter = load_adapter(tmp_path / "two")
    assert adapter.base_model == "bert" and adapter.modules[0] == "encoder.layer.0.attention.self.query"
    assert len(adapter.modules) == 4 and {adapter.scaling(m) for m in adapter.modules} == {2.0}
    ids = data["two"][0]["input_ids"]
    expected = model(ids).last_hidden_state
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "two", is_trainable=True)
    got = tuned(ids).last_hidden_state
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    layer = tuned.base_model.model.encoder.layer[0].attention.self.query
    assert torch.equal(layer.lora_A["default"].weight, found.lora_a["two"]["encoder.layer.0.attention.self.query"])
    assert layer.lora_B["default"].weight.grad.abs().sum() > 0


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module docstring's lines run as they stand."""
    example = "\n".join(line[4:] for line in str(sys.modules[osrm.__module__].__doc__).splitlines() if line.startswith("    "))
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=50, **size)).save_pretrained(tmp_path / "bert")
    news, law = ([{"input_ids": torch.randint(50, (8, 7))}] for _ in range(2))

    def train(tuned: nn.Module, task: str) -> None:
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.data = randn(*parameter.shape, seed=len(name))

    monkeypatch.chdir(tmp_path)
    Path("osrm").mkdir()
    names = {"name": "bert", "news_batches": news, "law_batches": law, "train": train, "osrm": osrm}
    names |= {"transformers": transformers, "peft": peft, "rmm_kernels": rmm_kernels}
    exec(example, names)
    assert names["merged"].tasks == ("news", "law") and names["merged"].error < 1e-5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batches": {"one": batches(0)}}, "batches holds 1 tasks; at least 2 are needed"),
        ({"batches": {"one": batches(0), "two": []}}, "task 'two' has no samples; at least 4 are needed, as many as rank"),
        (
            {"batches": {"one": batches(0), "two": [{"h": torch.ones(3, 9, 12), "g": torch.ones(3, 9, 20)}]}},
            "task 'two' has 3 samples; at least 4 are needed",  # of 27 vectors
        ),
        (
            {"batches": {"one": batches(0), "two": [{**batches(1)[0], "attention_mask": torch.eye(4, 9).long() * LAST}]}},
            "task 'two' has 3 samples; at least 4 are needed",  # the last one's positions are all masked
        ),
        (
            {"batches": {"one": batches(0), "two": [{"h": torch.full((9, 12), torch.nan), "g": torch.ones(9, 20)}]}},
            "NaN or Inf",
        ),
        (
            {"batches": [("one", batches(0)), ("one", batches(1))]},
            "batches is a list; it must be a mapping of every task to its batches",
        ),
        ({"batches": {"one": batches(0), "two": batches(1)[0]}}, "task 'two': a batch is a str; it must map"),
        (
            {"target_modules": ["query", "key"]},
            r"target_modules is \['query', 'key'\]; no linear layer of the model matches 'key'; their paths end in query, v",
        ),
        ({"target_modules": "query"}, "target_modules is 'query'; it must be a sequence of names"),
        ({"target_modules": []}, r"target_modules is \[\]; it must be a sequence of names, one at least"),
        ({"alpha": 0}, "alpha is 0; it must be a finite number above 0"),
        ({"alpha": float("nan")}, "alpha is nan; it must be a finite number above 0"),
        ({"alpha": None}, "alpha is None"),
        ({"rank": 13}, "rank is 13; module 'query' has 12 inputs"),
        ({"rank": 0}, "rank is 0; it must be an integer of at least 1"),
        ({"variant": "median"}, "variant is 'median'; allowed are 'covariance' and 'mean'"),
    ],
)
def test_bad_input(model: Model, change: dict[str, Any], message: str) -> None:
    given = {"batches": {"one": batches(0), "two": batches(1)}, "target_modules": ["query", "value"], "rank": 4, **change}
    with pytest.raises(ValueError, match=message):
        osrm(model, **given)
    assert not model.query._forward_pre_hooks


def test_a_layer_that_is_hardly_used() -> None:
    """Samples are counted of the model; a layer may be given less."""

    class Branch(Model):
        def forward(self, h: Tensor, g: Tensor, attention_mask: Tensor | None = None) -> None:
            self.query(h)
            self.value(g[:1, 0])

    with pytest.raises(ValueError, match="task 'one': module 'value' was given 3 vectors by 12 samples; at least 4 are needed"):
        run(Branch().eval())


def test_a_layer_called_by_keyword() -> None:
    class Named(Model):
        def forward(self, h: Tensor, g: Tensor, attention_mask: Tensor | None = None) -> None:
            self.query(input=h)
            self.value(input=g)

    torch.manual_seed(0)
    found, expected = run(Named().eval()), run(Model().eval())
    for task in TASKS:
        assert torch.equal(found.lora_a[task]["query"], expected.lora_a[task]["query"])


def test_half_precision_models() -> None:
    """The same subspaces, but for the inputs' rounding; sums in fp64 whatever the model is in."""
    expected = osrm(Model(), {name: batches(i) for i, name in enumerate(TASKS)}, ["query"], 4)
    for dtype in (torch.bfloat16, torch.float16):
        found = osrm(Model().to(dtype), {name: batches(i, dtype) for i, name in enumerate(TASKS)}, ["query"], 4)
        for task in TASKS:
            assert found.lora_a[task]["query"].dtype == torch.float32
            assert found.energy[task]["query"][0] == pytest.approx(expected.energy[task]["query"][0], rel=0.05)


def test_saving_where_something_is(model: Model, tmp_path: Path) -> None:
    found = run(model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(FileExistsError):
        found.save("one", tmp_path / "out")
    with pytest.raises(KeyError, match="there is no task 'four'; the tasks are one, two, three"):
        found.save("four", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()
