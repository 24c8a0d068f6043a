"""Which tasks a forward runs: said in many ways, per thread, nested, wrong."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import EQUAL, FEED_FORWARD, batch, run, tiny_bert, transformers, write_adapters
from torch import Tensor, nn

from rmm_kernels.merge import MergedAdapters, merge
from rmm_kernels.modules import BASE, Attachment, attach


@pytest.mark.parametrize(
    "tasks",
    [
        ["narrow", None, "wide", "stabilised", BASE],
        (1, -1, 0, "stabilised", None),
        np.array([1, -1, 0, 3, -1]),
        torch.tensor([1, -1, 0, 3, -1]),
        torch.tensor([1, -1, 0, 3, -1], dtype=torch.int32),
        torch.tensor([1, -1, 0, 3, -1])[:, None].expand(5, 7),
    ],
    ids=["names", "mixture", "numpy", "int64", "int32", "per token"],
)
def test_ways_to_say_the_same_tasks(attachment: Attachment, tasks: Any) -> None:
    with attachment.tasks(["narrow", BASE, "wide", "stabilised", BASE]):
        expected = run(attachment.model, batch())
    with attachment.tasks(tasks):
        assert torch.equal(run(attachment.model, batch()), expected)


@pytest.mark.parametrize("task", ["patterned", 2, np.int64(2), torch.tensor(2)])
def test_one_task_for_all(attachment: Attachment, task: Any) -> None:
    with attachment.tasks(["patterned"] * 5):
        expected = run(attachment.model, batch())
    with attachment.tasks(task):
        assert torch.equal(run(attachment.model, batch()), expected)
        assert torch.equal(run(attachment.model, batch(3)), run(attachment.model, batch(3)))  # fits any batch


def test_a_task_for_each_token(attachment: Attachment) -> None:
    layer = attachment.layers[FEED_FORWARD]
    x, ids = torch.randn(3, 4, layer.in_features), torch.tensor([[0, 0, -1, 2], [3, 3, 1, 1], [2, -1, 0, 3]])
    expected = layer(x.flatten(0, 1), ids.flatten())
    with attachment.tasks(ids):
        assert torch.equal(layer(x).flatten(0, 1), expected)
        assert torch.equal(layer(x.flatten(0, 1)), expected)  # packed
    with attachment.tasks(ids.flatten()):
        assert torch.equal(layer(x.reshape(1, 12, -1))[0], expected)
    assert torch.equal(layer(x, ids).flatten(0, 1), expected)
    assert torch.equal(layer(x, ids.flatten()).flatten(0, 1), expected)
    assert torch.equal(layer(x, ids[:, 0]), layer(x, ids[:, :1].expand(3, 4)))


def test_inputs_of_other_ranks(attachment: Attachment) -> None:
    layer = attachment.layers[FEED_FORWARD]
    x, ids = torch.randn(2, 3, 4, layer.in_features), torch.tensor([0, 2])
    assert torch.equal(layer(x, ids)[1], layer(x[1], torch.tensor(2)))
    assert torch.equal(layer(x[0, 0, 0], torch.tensor(2)), layer(x[0, 0, :1], torch.tensor(2))[0])
    assert layer(x[:0], ids[:0]).shape == (0, 3, 4, layer.out_features)


def test_ids_are_read_on_entry(attachment: Attachment) -> None:
    ids = torch.tensor([0, 1, 2, 3, -1])
    with attachment.tasks(ids.clone()):
        expected = run(attachment.model, batch())
    with attachment.tasks(ids):
        ids.fill_(-1)
        assert torch.equal(run(attachment.model, batch()), expected)


def test_blocks_nest_and_end(attachment: Attachment) -> None:
    def output() -> Tensor:
        return run(attachment.model, batch())

    with attachment.tasks(0):
        outer = output()
        with pytest.raises(ZeroDivisionError), attachment.tasks(1):
            assert not torch.equal(output(), outer)
            raise ZeroDivisionError
        assert torch.equal(output(), outer)
    with pytest.raises(RuntimeError, match=r"no tasks are set .* tasks\(None\) for the base model alone"):
        output()


def test_blocks_of_two_models_do_not_mix(model: nn.Module, mixed: MergedAdapters, equal: MergedAdapters) -> None:
    other = tiny_bert()
    with attach(model, mixed) as one, attach(other, equal) as two:
        with one.tasks(2):
            expected = run(model, batch())
        with one.tasks(2), two.tasks(0):
            assert torch.equal(run(model, batch()), expected)
        with two.tasks(0), pytest.raises(RuntimeError, match="no tasks"):
            run(model, batch())


def test_threads_and_asyncio_tasks_have_their_own_blocks(attachment: Attachment) -> None:
    inputs = batch()

    def output() -> Tensor:
        return run(attachment.model, inputs)

    expected = []
    for task in (0, 1):
        with attachment.tasks(task):
            expected.append(output())

    barrier, results = threading.Barrier(2), {}

    def thread(task: int) -> None:
        with attachment.tasks(task):
            barrier.wait(10)
            results[task] = [output() for _ in range(5)]
            barrier.wait(10)

    threads = [threading.Thread(target=thread, args=(task,)) for task in (0, 1)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(torch.equal(result, expected[task]) for task in (0, 1) for result in results[task])

    async def coroutine(task: int) -> Tensor:
        with attachment.tasks(task):
            await asyncio.sleep(0)
            return output()

    async def both() -> list[Tensor]:
        return await asyncio.gather(coroutine(0), coroutine(1))

    assert all(torch.equal(result, value) for result, value in zip(asyncio.run(both()), expected, strict=True))


def test_many_shapes_in_one_block(attachment: Attachment) -> None:
    layer = attachment.layers[FEED_FORWARD]
    with attachment.tasks(2):
        for rows in range(1, 140):
            x = torch.randn(rows, layer.in_features)
            assert torch.equal(layer(x), layer(x, torch.tensor(2)))


def test_generation_with_a_task_for_each_sample(tmp_path: Path) -> None:
    def tiny_llama() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40
        )
        return transformers.LlamaForCausalLM(config).eval()

    configs = {name: {**EQUAL[name], "lora_alpha": 40, "target_modules": ["q_proj", "v_proj", "down_proj"]} for name in EQUAL}
    merged = merge(write_adapters(tmp_path, configs, tiny_llama), components=2)
    model, prompt = tiny_llama(), torch.tensor([[7, 8, 9]])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with attach(model, merged) as attachment:
        alone = []
        for task in (*merged.tasks, None):
            with attachment.tasks(task):
                alone.append(model.generate(prompt, **settings)[0])
        with attachment.tasks([*merged.tasks, None]):
            together = model.generate(prompt.expand(4, -1), **settings)
    assert torch.equal(together, torch.stack(alone))
    assert len({tuple(tokens.tolist()) for tokens in alone}) == 4


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "tasks, error, message",
    [
        ("teal", ValueError, "unknown task 'teal'; allowed are wide, narrow, patterned, stabilised, __base__"),
        (["wide", "teal"], ValueError, "unknown task 'teal'"),
        (4, ValueError, r"task 4 is out of range; allowed are -1 \(base model alone\) to 3"),
        ([0, -2], ValueError, "task -2 is out of range"),
        (torch.tensor([0, 7]), ValueError, "task 7 is out of range"),
        (torch.tensor([0, -3]), ValueError, "task -3 is out of range"),
        (torch.tensor([0.0, 1.0]), TypeError, "tasks must be one of int32, int64, got float32"),
        (1.0, TypeError, "must be a name, an index or None .* got float"),
        ([True], TypeError, "got bool"),
        ([["wide"]], TypeError, "got list"),
    ],
)
def test_tasks_that_do_not_exist(attachment: Attachment, tasks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), attachment.tasks(tasks):
        pass
    with pytest.raises(RuntimeError, match="no tasks are set"):
        run(attachment.model, batch())


@pytest.mark.parametrize("tasks", [[0, 1], torch.zeros(5, 6, dtype=torch.int64), [0] * 35])
def test_tasks_that_do_not_fit_the_batch(attachment: Attachment, tasks: Any) -> None:
    message = (
        r"do not fit an input of shape \[5, 7, 'in'\]; allowed are one for all, one per sample \[5\] or one per token \[5, 7\]"
    )
    with attachment.tasks(tasks), pytest.raises(ValueError, match=message):
        run(attachment.model, batch())
