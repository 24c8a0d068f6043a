"""The engine: tasks in slots, fused slices, scaling, tensor parallelism, exports, what it refuses, tasks that come and go."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import MakeAdapter, Shapes
from ops import assert_same_bits
from torch import Tensor

from rmm_kernels import backends, slots
from rmm_kernels.engine import Engine
from rmm_kernels.merge import MergedAdapters, merge
from rmm_kernels.slots import Layer, TensorParallel

# Attention with fewer key than query outputs, of which only q and v are adapted; gate and up; and a layer by itself.
SHAPES = {
    "layers.0.attn.q_proj": (48, 40),
    "layers.0.attn.v_proj": (16, 40),
    "layers.0.attn.o_proj": (40, 48),
    "layers.0.mlp.gate_proj": (72, 40),
    "layers.0.mlp.up_proj": (72, 40),
    "layers.0.mlp.down_proj": (40, 72),
}
FUSED = {"qkv_proj": {"q_proj": 48, "k_proj": 16, "v_proj": 16}, "gate_up_proj": {"gate_proj": 72, "up_proj": 72}}
PLAN = {**dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "column"), "o_proj": "row", "down_proj": "row"}
QKV = "layers.0.attn.qkv_proj"
NAMES = ["red", "green", "blue", "white"]


@pytest.fixture
def paths(make_adapter: MakeAdapter) -> dict[str, Path]:
    return {name: make_adapter(name, shapes=SHAPES) for name in NAMES}


@pytest.fixture
def merged(paths: dict[str, Path]) -> MergedAdapters:
    return merge(list(paths.values()), components=2)


@pytest.fixture
def engine(merged: MergedAdapters) -> Engine:
    return Engine(merged, max_tasks=6, fused=FUSED)


def inputs(layer: Layer, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y, x = (torch.randn(tokens, width, generator=generator).to(dtype) for width in (layer.width, layer.wide))
    return y, x


def expected(engine: Engine, merged: MergedAdapters, layer: Layer, y: Tensor, x: Tensor, tasks: list[str | None]) -> Tensor:
    """y and each row's update from factors that `merged` restores, in fp64."""
    out = y.double().clone()
    for row, task in enumerate(tasks):
        factors = {} if task is None else merged.restore(task)
        for part in layer.slices:
            if part.module in factors:
                f = factors[part.module]
                delta = f.lora_b.double() @ (f.lora_a.double() @ x[row].double())
                out[row, part.columns] += f.scaling * delta
    return out


def close(value: Tensor, exact: Tensor, bound: float = 2e-6) -> bool:
    return float((value.double() - exact).norm()) <= bound * float(exact.norm())


MIX = ["red", None, "white", "green", "green", None, "blue"]


def test_every_layer_adds_what_restored_factors_give(engine: Engine, merged: MergedAdapters) -> None:
    assert {name: layer.width for name, layer in engine.layers.items()} == {
        QKV: 80,
        "layers.0.attn.o_proj": 40,
        "layers.0.mlp.gate_up_proj": 144,
        "layers.0.mlp.down_proj": 40,
    }
    ids = engine.ids(MIX)
    for layer in engine.layers.values():
        y, x = inputs(layer, len(MIX))
        before = y.clone()
        assert layer.forward_(y, x, ids) is y
        assert close(y, expected(engine, merged, layer, before, x, MIX))
        assert_same_bits(y[[1, 5]], before[[1, 5]])
    y, x = inputs(engine.layers[QKV], len(MIX))
    before = y.clone()
    engine.layers[QKV].forward_(y, x, ids)
    assert_same_bits(y[:, 48:64], before[:, 48:64])  # k_proj has no adapters


def test_no_adapter_skips_the_op(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.ids([None, None]) is None
    monkeypatch.setattr(slots, "lora_forward_", None)
    y, x = inputs(engine.layers[QKV], 2)
    before = y.clone()
    assert_same_bits(engine.layers[QKV].forward_(y, x, None), before)


def test_scales(engine: Engine, merged: MergedAdapters) -> None:
    """One for all, and one for each token, on top of the tasks' own."""
    layer, ids = engine.layers[QKV], engine.ids(MIX)
    y, x = inputs(layer, len(MIX))
    update = expected(engine, merged, layer, torch.zeros_like(y), x, MIX)
    each = torch.linspace(-1, 2, len(MIX))
    for scale, factor in ((0.5, 0.5), (each, each.double()[:, None])):
        out = layer.forward_(y.clone(), x, ids, scale)
        assert close(out, y.double() + factor * update)
        assert_same_bits(out[[1, 5]], y[[1, 5]])


def test_adding_replacing_and_removing(engine: Engine, merged: MergedAdapters, make_adapter: MakeAdapter) -> None:
    """Others keep their slots and every bit, buffers their addresses, and the newcomer gets its projection on the basis."""
    addresses = [buffer.data_ptr() for part in engine._slices.values() for buffer in part.buffers.values()]
    layer = engine.layers[QKV]
    y, x = inputs(layer, len(MIX))
    old = layer.forward_(y.clone(), x, engine.ids(MIX))

    def check(task: str) -> None:
        a, b = engine.to_vllm([task])[QKV]
        ids = engine.ids([task] * len(MIX))
        out = layer.forward_(y.clone(), x, ids)
        for part, lora_a, lora_b in zip(layer.slices, a, b, strict=True):
            delta = x.double() @ lora_a[0].double().mT @ lora_b[0].double().mT
            assert close(out[:, part.columns], y[:, part.columns] + delta)
        assert_same_bits(layer.forward_(y.clone(), x, engine.ids(MIX)), old)

    assert engine.add("black", make_adapter("black", shapes=SHAPES)) == 4
    check("black")
    assert 0.3 < engine.errors["black"] < 1.5  # random: most of it is not in the basis
    first = engine.to_vllm(["black"])[QKV]
    assert engine.replace("black", make_adapter("other", shapes=SHAPES)) == 4
    assert not torch.equal(engine.to_vllm(["black"])[QKV][0][0], first[0][0])
    check("black")
    engine.remove("black")
    assert_same_bits(layer.forward_(y.clone(), x, torch.full((len(MIX),), 4)), y)  # a free slot changes nothing
    assert "black" not in engine.tasks and engine.add("grey", make_adapter("grey", shapes=SHAPES)) == 4
    check("grey")
    assert addresses == [buffer.data_ptr() for part in engine._slices.values() for buffer in part.buffers.values()]


def test_a_task_of_the_merge_comes_back_by_projection(engine: Engine, merged: MergedAdapters, paths: dict[str, Path]) -> None:
    engine.remove("green")
    assert engine.add("green", paths["green"]) == 1
    assert engine.errors["green"] == pytest.approx(merged.task_error("green"), rel=1e-4)
    layer = engine.layers[QKV]
    y, x = inputs(layer, 3)
    out = layer.forward_(y.clone(), x, engine.ids(["green"] * 3))
    assert close(out, expected(engine, merged, layer, y, x, ["green"] * 3), 1e-5)


def test_task_that_lacks_a_module(make_adapter: MakeAdapter) -> None:
    some = {name: shape for name, shape in SHAPES.items() if "v_proj" not in name}
    paths = [make_adapter("a", shapes=SHAPES), make_adapter("b", shapes=SHAPES), make_adapter("c", shapes=some)]
    merged = merge(paths, components=1)
    engine = Engine(merged, max_tasks=5, fused=FUSED)
    engine.add("d", make_adapter("d", shapes=some))
    layer = engine.layers[QKV]
    y, x = inputs(layer, 4)
    out = layer.forward_(y.clone(), x, engine.ids(["a", "c", "b", "d"]))
    assert_same_bits(out[[1, 3], 64:], y[[1, 3], 64:])
    assert close(out[:3], expected(engine, merged, layer, y[:3], x[:3], ["a", "c", "b"]))
    assert not torch.equal(out[3, :48], y[3, :48])


def test_mixed_ranks(make_adapter: MakeAdapter) -> None:
    paths = [make_adapter(name, shapes=SHAPES, rank=rank) for name, rank in (("a", 4), ("b", 2), ("c", 4))]
    merged = merge(paths, components=2)
    engine = Engine(merged, max_tasks=4, fused=FUSED)
    low = make_adapter("d", shapes=SHAPES, rank=3)
    engine.add("d", low)
    layer, tasks = engine.layers[QKV], ["a", "b", None, "c"]
    y, x = inputs(layer, 4)
    out = layer.forward_(y.clone(), x, engine.ids(tasks))
    assert close(out, expected(engine, merged, layer, y, x, tasks))
    assert_same_bits(out[2], y[2])
    assert not engine.to_vllm(["d"])[QKV][0][0][0, 3:].any()
    with pytest.raises(ValueError, match=r"ranks below 4; make the engine with mixed_ranks=True"):
        Engine(merged, max_tasks=4, mixed_ranks=False)
    plain = Engine(merge(paths[:1] + paths[2:], components=1), max_tasks=4)
    with pytest.raises(ValueError, match=r"rank 3, the basis 4; make the engine with mixed_ranks=True"):
        plain.add("d", low)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(merged: MergedAdapters, dtype: torch.dtype) -> None:
    engine = Engine(merged, max_tasks=4, fused=FUSED, dtype=dtype)
    layer = engine.layers[QKV]
    y, x = inputs(layer, len(MIX), dtype=dtype)
    out = layer.forward_(y.clone(), x, engine.ids(MIX))
    assert close(out, expected(engine, merged, layer, y, x, MIX), max(1e-6, 2 * torch.finfo(dtype).eps))


def test_another_basis_in_the_same_buffers(merged: MergedAdapters, make_adapter: MakeAdapter) -> None:
    engine = Engine(merged, max_tasks=5, max_rank=6, max_components=3, fused=FUSED)
    addresses = [buffer.data_ptr() for part in engine._slices.values() for buffer in part.buffers.values()]
    other = merge([make_adapter(f"n{i}", shapes=SHAPES, rank=6) for i in range(5)], components=3)
    engine.load(other)
    layer = engine.layers[QKV]
    y, x = inputs(layer, 5)
    out = layer.forward_(y.clone(), x, engine.ids(list(other.tasks)))
    assert close(out, expected(engine, other, layer, y, x, list(other.tasks)))
    assert addresses == [buffer.data_ptr() for part in engine._slices.values() for buffer in part.buffers.values()]
    before = engine.tasks
    with pytest.raises(ValueError, match="has rank 7; the buffers hold 6, as max_rank says"):
        engine.load(merge([make_adapter(f"m{i}", shapes=SHAPES, rank=7) for i in range(2)], components=1))
    assert engine.tasks == before
    assert_same_bits(layer.forward_(y.clone(), x, engine.ids(list(other.tasks))), out)


# ---------------------------------------------------------------- what is refused, buffers unchanged


def refused(engine: Engine, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    before = [buffer.clone() for part in engine._slices.values() for buffer in part.buffers.values()]
    tasks = engine.tasks
    with pytest.raises(error, match=message):
        call()
    assert engine.tasks == tasks
    for old, new in zip(before, (b for part in engine._slices.values() for b in part.buffers.values()), strict=True):
        assert_same_bits(new, old)


def merge_of(make_adapter: MakeAdapter, prefix: str, shapes: Shapes, components: int = 1, **options: Any) -> MergedAdapters:
    return merge([make_adapter(f"{prefix}{i}", shapes=shapes, **options) for i in range(components + 1)], components)


def test_refusals(engine: Engine, make_adapter: MakeAdapter, merged: MergedAdapters) -> None:
    adapter = make_adapter("adapter", shapes=SHAPES)
    not_finite = {"base_model.model.layers.0.mlp.up_proj.lora_B.weight": torch.full((72, 4), torch.inf)}
    wide = {**SHAPES, "layers.0.attn.o_proj": (40, 50)}
    for call, error, message in (
        (lambda: engine.add("red", adapter), ValueError, "there is a task 'red' already, in slot 0"),
        (lambda: engine.remove("teal"), ValueError, "unknown task 'teal'; there are red, green, blue, white"),
        (lambda: engine.replace("teal", adapter), ValueError, "unknown task 'teal'"),
        (lambda: engine.ids(["teal"]), ValueError, "unknown task 'teal'"),
        (lambda: engine.add("new", make_adapter("rank", shapes=SHAPES, rank=5)), ValueError, "has rank 5; the basis has 4"),
        (lambda: engine.add("new", make_adapter("wide", shapes=wide)), ValueError, r"o_proj is \[40, 50\], not what"),
        (
            lambda: engine.add("new", make_adapter("more", shapes={**SHAPES, "layers.1.x": (8, 8)})),
            ValueError,
            "has module layers.1.x, which the basis lacks",
        ),
        (
            lambda: engine.add("new", make_adapter("dora", shapes=SHAPES, config={"use_dora": True})),
            ValueError,
            "DoRA.*, which the forward lacks",
        ),
        (
            lambda: engine.add("new", make_adapter("infinite", shapes=SHAPES, tensors=not_finite)),
            ValueError,
            "adapter 'new': module layers.0.mlp.up_proj holds NaN or Inf",
        ),
        (
            lambda: engine.replace("red", make_adapter("foreign", shapes=SHAPES, config={"base_model_name_or_path": "other"})),
            ValueError,
            "adapter 'red' is for 'other', the basis for 'base'",
        ),
        (lambda: engine.add("new", make_adapter("gone") / "away"), ValueError, "away does not exist"),
        (lambda: engine.load(merged, ["teal"]), ValueError, "unknown task 'teal'; merged has red"),
        (lambda: engine.load(merged, ["red", "blue", "red"]), ValueError, "task 'red' is given twice; a task has one slot"),
        (
            lambda: engine.load(merge_of(make_adapter, "many", SHAPES, 3)),
            ValueError,
            "has components 3; the buffers hold 2, as max_components says",
        ),
        (lambda: engine.load(merge_of(make_adapter, "high", SHAPES, rank=5)), ValueError, "has rank 5; the buffers hold 4"),
        (lambda: engine.load(merge_of(make_adapter, "broad", wide)), ValueError, r"o_proj is \[40, 50\] in merged, not the"),
        (
            lambda: engine.load(merge_of(make_adapter, "few", {"layers.0.attn.q_proj": (48, 40)})),
            ValueError,
            "module layers.0.attn.o_proj is on one side alone",
        ),
        (lambda: engine.to_vllm(["red"], max_rank=3), ValueError, "max_rank is 3; module .* has rank 4"),
    ):
        refused(engine, call, error, message)
    engine.add("fifth", adapter)
    engine.add("sixth", adapter)
    refused(engine, lambda: engine.add("seventh", adapter), ValueError, "all 6 slots are taken, as max_tasks says")


def test_task_in_use(engine: Engine, make_adapter: MakeAdapter, merged: MergedAdapters) -> None:
    adapter = make_adapter("adapter", shapes=SHAPES)
    with engine.lease("blue", "red") as held, engine.lease("blue"):
        assert held == [2, 0]
        for call in (lambda: engine.remove("blue"), lambda: engine.replace("blue", adapter), lambda: engine.load(merged)):
            refused(engine, call, RuntimeError, r"task '(blue|red)' is in use \([12] leases\)")
        engine.remove("green")
    engine.remove("blue")
    with pytest.raises(ValueError, match="unknown task 'blue'"), engine.lease("red", "blue"):
        pass
    engine.remove("red")


def test_bad_calls_of_a_layer(engine: Engine) -> None:
    layer = engine.layers[QKV]
    y, x = inputs(layer, 3)
    before = y.clone()
    ids = torch.tensor([0, 1, 2])
    for wrong, error, message in (
        ((y, x[:, :39], ids), ValueError, "basis_a has shape .*; axis 2 must be 39, as x says"),
        ((y, x[:2], ids), ValueError, r"task_ids has shape \[3\]; axis 0 must be 2, as x says"),
        ((y, x[:2], ids[:2]), ValueError, r"axis 0 must be 3, as y says"),
        ((y, x, ids[None]), ValueError, r"task_ids must be \[T\], got shape \[1, 3\]"),
        ((y, x.half(), ids), TypeError, "basis_a is float32, x float16; they must be of the same dtype"),
        ((y.double(), x, ids), TypeError, "basis_b is float32, y float64; they must be of the same dtype"),
        ((y, x, ids.float()), TypeError, "task_ids must be one of int32, int64, got float32"),
        ((y, x, ids.to("meta")), ValueError, "task_ids is on meta, x on cpu; they must be on the same device"),
        ((y, x.to("meta"), ids), ValueError, "basis_a is on cpu, x on meta; they must be on the same device"),
        ((y, x, ids, torch.ones(3, device="meta")), ValueError, "scale is on meta, y on cpu; they must be on the same device"),
        ((y, x, ids, torch.ones(3).half()), TypeError, "scale must be float32 where y is float32, got float16"),
    ):
        with pytest.raises(error, match=message):
            layer.forward_(*wrong)
        assert_same_bits(y, before)
    with pytest.raises(
        ValueError, match=r"y has shape \[3, 64\]; layer layers.0.attn.qkv_proj has \[T, 80\], with .*q_proj 48"
    ):
        layer.forward_(y[:, :64], x, ids)
    with pytest.raises(ValueError, match=r"scale has shape \[2\]; it must be \[3\]"):
        layer.forward_(y, x, ids, torch.ones(2))
    with pytest.raises(RuntimeError, match="task_ids holds 6; allowed are -1 to 5"):
        layer.forward_(y, x, torch.tensor([0, 6, 1]))
    assert_same_bits(y, before)
    engine.check(torch.tensor([-1, 0, 3]))
    assert not engine.bad_ids
    for bad, what in ((6, "out of range; allowed are -1 to 5"), (-2, "out of range; allowed"), (5, "the id of a free slot")):
        with pytest.raises(ValueError, match=f"task_ids holds {bad}, {what}"):
            engine.check(torch.tensor([0, bad]))
        assert engine.bad_ids
        engine.bad_ids.zero_()


def test_check_does_not_wait_for_a_device(engine: Engine) -> None:
    """On meta tensors, of which whatever reads a value raises."""
    ids = torch.empty(3, dtype=torch.int32, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        ids.tolist()
    engine.bad_ids = engine.bad_ids.to("meta")
    engine.check(ids)


def test_bad_constructions(merged: MergedAdapters) -> None:
    for options, message in (
        ({"max_tasks": 3}, "merged has 4 tasks to load; the buffers hold 3"),
        ({"max_tasks": 0}, "max_tasks is 0; allowed are 1"),
        ({"max_tasks": 4, "tasks": ["red", "red"]}, "task 'red' is given twice"),
        ({"max_tasks": 4, "tasks": ["teal"]}, "unknown task 'teal'; merged has red"),
        ({"max_tasks": 4, "max_rank": 3}, "has rank 4; the buffers hold 3, as max_rank says"),
        ({"max_tasks": 4, "max_components": 1}, "has components 2; the buffers hold 1, as max_components says"),
        ({"max_tasks": 4, "fused": {"qkv": {"q_proj": 40, "v_proj": 16}}}, "q_proj is 40 wide in `fused`, but .* 48 outputs"),
        ({"max_tasks": 4, "fused": {"odd": {"q_proj": 48, "o_proj": 40}}}, "different numbers of inputs"),
        ({"max_tasks": 4, "parallel": TensorParallel(0, 7, PLAN)}, "48 positions can't be split over 7 processes evenly"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(merged, **options)
    with pytest.raises(ValueError, match=r"is 'diagonal'; allowed are"):
        TensorParallel(0, 2, {"q_proj": "diagonal"})
    with pytest.raises(ValueError, match="rank is 2; allowed are 0 to 1"):
        TensorParallel(2, 2, {})


# ---------------------------------------------------------------- memory, exports


def test_memory(engine: Engine) -> None:
    values = sum(out + wide for out, wide in SHAPES.values())
    assert engine.buffer_bytes == {"shared": 4 * 3 * 4 * values, "task": 4 * (2 * values + len(SHAPES) * (1 + 4))}
    assert engine.workspace_bytes(300) == 4 * 4 * 300
    before = [buffer.clone() for part in engine._slices.values() for buffer in part.buffers.values()]
    engine.warm_up([1, 8])
    for old, new in zip(before, (b for part in engine._slices.values() for b in part.buffers.values()), strict=True):
        assert_same_bits(new, old)


def test_exports_restore_the_forward(engine: Engine) -> None:
    """Round trip: the factors in vLLM's and SGLang's layouts, in plain products, are the forward."""
    tasks = ["white", "red"]
    vllm, sglang = engine.to_vllm(tasks, max_rank=8), engine.to_sglang(tasks, max_rank=8)
    for name, layer in engine.layers.items():
        y, x = inputs(layer, 2, seed=3)
        out = layer.forward_(y.clone(), x, engine.ids(tasks))
        a, b = sglang[name]
        assert a.shape == (2, 8 * len(layer.slices), layer.wide) and b.shape == (2, layer.width, 8)
        for number, part in enumerate(layer.slices):
            lora_a, lora_b = vllm[name][0][number], vllm[name][1][number]
            assert lora_a.shape == (2, 8, layer.wide) and lora_b.shape == (2, part.columns.stop - part.columns.start, 8)
            assert lora_a.is_contiguous() and lora_b.is_contiguous()
            assert_same_bits(a[:, 8 * number : 8 * number + 8], lora_a)
            assert_same_bits(b[:, part.columns], lora_b)
            delta = torch.stack([lora_b[i].double() @ (lora_a[i].double() @ x[i].double()) for i in range(2)])
            assert close(out[:, part.columns], y[:, part.columns] + delta)


# ---------------------------------------------------------------- tensor parallelism


def sharded(rank: int, merged: MergedAdapters, adapter: Path, meeting: Path, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    parallel = TensorParallel(rank, 2, PLAN)
    engine = Engine(merged, max_tasks=6, fused=FUSED, parallel=parallel)
    engine.add("new", adapter)
    ids = engine.ids([*MIX, "new"])
    found = {}
    for name in (QKV, "layers.0.mlp.gate_up_proj"):  # column: inputs are whole
        layer = engine.layers[name]
        y, x = inputs(layer, 8)
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(9))
        y.zero_()
        found[name] = layer.forward_(y, x, ids)
    for name, wide in (("layers.0.attn.o_proj", 48), ("layers.0.mlp.down_proj", 72)):  # row: this process' part of them
        layer = engine.layers[name]
        x = torch.randn(8, wide, generator=torch.Generator().manual_seed(9)).chunk(2, 1)[rank]
        y = layer.forward_(torch.zeros(8, 40), x, ids)
        dist.all_reduce(y)  # the layer's own
        found[name] = y
    results[rank] = {name: value.tolist() for name, value in found.items()}
    results["served"] = backends()["lora_forward_"]["cpu"]
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one(merged: MergedAdapters, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """Column-parallel layers bitwise: each output is computed as in one process. Row-parallel ones to rounding: the sum over
    inputs is cut in two, and all_reduce adds the halves."""
    adapter = make_adapter("new", shapes=SHAPES)
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        mp.spawn(sharded, (merged, adapter, tmp_path / "meeting", results), nprocs=2)
        assert results["served"] == backends()["lora_forward_"]["cpu"], "another rmm_kernels than this process has"
        found = [{name: torch.tensor(value) for name, value in results[rank].items()} for rank in (0, 1)]
    engine = Engine(merged, max_tasks=6, fused=FUSED)
    engine.add("new", adapter)
    ids = engine.ids([*MIX, "new"])
    for name, layer in engine.layers.items():
        x = torch.randn(8, layer.wide, generator=torch.Generator().manual_seed(9))
        expected = layer.forward_(torch.zeros(8, layer.width), x, ids)
        if name in ("layers.0.attn.o_proj", "layers.0.mlp.down_proj"):
            for part in found:
                assert_same_bits(part[name], found[0][name])
                assert close(part[name], expected.double(), 1e-6)
        else:
            begin = 0
            for width in FUSED[name.rpartition(".")[2]].values():
                halves = [part[name][:, begin // 2 : (begin + width) // 2] for part in found]
                assert_same_bits(torch.cat(halves, 1), expected[:, begin : begin + width])
                begin += width


# ---------------------------------------------------------------- threads


def test_tasks_come_and_go_while_forwards_run(engine: Engine, merged: MergedAdapters, make_adapter: MakeAdapter) -> None:
    """Not one wrong row in 10^5 tokens, and every newcomer right when it is used."""
    newcomers = [make_adapter(f"new{i}", shapes=SHAPES) for i in range(3)]
    layer = engine.layers[QKV]
    tasks = [NAMES[i % 4] if i % 5 else None for i in range(100)]
    ids = engine.ids(tasks)
    y, x = inputs(layer, len(tasks))
    right = layer.forward_(y.clone(), x, ids)
    alone = []
    for path in newcomers:
        slot = engine.add("newcomer", path)
        alone.append(layer.forward_(y.clone(), x, torch.full((len(tasks),), slot)))
        engine.remove("newcomer")
    stop, changes = threading.Event(), [0]
    failures: list[str] = []

    def change() -> None:
        while not stop.is_set():
            which = changes[0] % 3
            slot = engine.add("newcomer", newcomers[which])
            with engine.lease("newcomer"):
                out = layer.forward_(y.clone(), x, torch.full((len(tasks),), slot))
            if not torch.equal(out, alone[which]):
                failures.append(f"newcomer {which}")
            engine.remove("newcomer")
            changes[0] += 1

    thread = threading.Thread(target=change)
    thread.start()
    try:
        with engine.lease(*NAMES):
            for _ in range(1000):
                if not torch.equal(layer.forward_(y.clone(), x, ids), right):
                    failures.append("row of an old task")
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert changes[0] >= 3
