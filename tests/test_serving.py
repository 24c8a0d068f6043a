"""attach() as a drop-in where PEFT was: decoders with a KV cache, Conv1D, adapter_names, task_ids, compile, export."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_file, save_file
from tiny_models import EQUAL, batch, relative, run, tiny_bert, transformers, with_peft, write_adapters
from torch import nn

from rmm_kernels import TaskHeads
from rmm_kernels.merge import MergedAdapters, merge
from rmm_kernels.modules import BASE, attach

STRONG = {"lora_alpha": 40}


def tiny_gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def decoder() -> nn.Module:
    """Of a config alone: 4 layers, 512 wide, grouped keys and values."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=200,
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1024,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config).eval()


DECODERS: dict[str, tuple[Callable[[], nn.Module], list[str], int]] = {
    "llama": (decoder, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 200),
    "gpt2": (tiny_gpt2, ["c_attn", "c_proj", "c_fc"], 60),
}


@pytest.mark.parametrize("kind", DECODERS)
def test_generation_token_for_token_as_peft_alone(tmp_path: Path, kind: str) -> None:
    """Every row another task, prompts of different lengths, with KV cache; each as PEFT generates it alone, in fp32."""
    make, targets, vocabulary = DECODERS[kind]
    configs = {name: {**EQUAL[name], **STRONG, "target_modules": targets, "fan_in_fan_out": kind == "gpt2"} for name in EQUAL}
    paths = write_adapters(tmp_path, configs, make)
    merged = merge(paths, components=len(paths) - 1)
    names = [*merged.tasks, BASE]
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(1, vocabulary, (5 + row,), generator=generator) for row in range(4)]
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}

    wrapped, alone = with_peft(make(), paths), []
    for name, prompt in zip(names, prompts, strict=True):
        mask = torch.ones_like(prompt)[None]
        out = wrapped.generate(input_ids=prompt[None], attention_mask=mask, adapter_names=[name], **settings)
        alone.append(out[0, len(prompt) :].tolist())
    assert len({tuple(tokens) for tokens in alone}) == 4

    longest = max(map(len, prompts))
    ids = torch.stack([nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([nn.functional.pad(torch.ones_like(prompt), (longest - len(prompt), 0)) for prompt in prompts])
    model = make()
    with attach(model, merged) as attachment:
        together = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **settings)
        with attachment.tasks(names):
            assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **settings), together)
        tensor = torch.tensor([0, 1, 2, -1])
        assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, task_ids=tensor, **settings), together)
        beams = model.generate(input_ids=ids, attention_mask=mask, task_ids=tensor, num_beams=2, **settings)
        assert beams.shape[0] == 4
    rows = [row.tolist() for row in together[:, longest:]]
    assert [row[: len(tokens)] for row, tokens in zip(rows, alone, strict=True)] == alone


def test_conv1d_as_peft(tmp_path: Path) -> None:
    """The whole model's logits, and the gradient that reaches the embeddings."""
    configs = {name: {**EQUAL[name], "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True} for name in EQUAL}
    paths = write_adapters(tmp_path, configs, tiny_gpt2)
    merged, names = merge(paths, components=2), ["blue", "red", BASE, "green"]
    ids = torch.randint(1, 60, (4, 6), generator=torch.Generator().manual_seed(2))
    model = tiny_gpt2()
    embeddings = model.get_input_embeddings()(ids).detach()
    with attach(model, merged) as attachment, attachment.tasks(names):
        layer = attachment.layers["transformer.h.0.attn.c_attn"]
        assert (layer.in_features, layer.out_features) == (32, 96)
        x = embeddings.clone().requires_grad_()
        ours = model(inputs_embeds=x).logits
        ours.square().sum().backward()
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, model(inputs_embeds=embeddings).logits)
    wrapped, z = with_peft(tiny_gpt2(), paths), embeddings.clone().requires_grad_()
    theirs = wrapped(inputs_embeds=z, adapter_names=names).logits
    theirs.square().sum().backward()
    assert (ours - theirs).abs().max() <= 1e-4
    assert relative(x.grad, z.grad) <= 1e-4


def test_other_layers_are_refused_by_name(tmp_path: Path) -> None:
    merged = merge(write_adapters(tmp_path, {"red": {**EQUAL["red"], "target_modules": ["c_fc"]}}, tiny_gpt2), components=0)
    model = tiny_gpt2()
    model.transformer.h[1].mlp.c_fc = nn.Conv1d(32, 128, 1)
    with pytest.raises(TypeError, match=r"module transformer\.h\.1\.mlp\.c_fc: base_layer is a torch\.nn\S+Conv1d; it must be"):
        attach(model, merged)
    assert "forward" not in vars(model)


# ---------------------------------------------------------------- the model's own arguments


NAMES = ["narrow", BASE, "wide", "stabilised", BASE]


def test_adapter_names_and_task_ids_are_blocks(mixed: MergedAdapters) -> None:
    model = tiny_bert()
    with attach(model, mixed) as attachment:
        with attachment.tasks(NAMES):
            expected = run(model, batch())
        assert torch.equal(run(model, batch(), adapter_names=NAMES), expected)
        assert torch.equal(run(model, batch(), task_ids=torch.tensor([1, -1, 0, 3, -1])), expected)
        per_token = torch.tensor([1, -1, 0, 3, -1])[:, None].expand(5, 7)
        assert torch.equal(run(model, batch(), task_ids=per_token), expected)
        with attachment.tasks("wide"):  # the innermost counts
            assert torch.equal(run(model, batch(), adapter_names=NAMES), expected)
        with pytest.raises(RuntimeError, match="no tasks are set"):
            run(model, batch())
        with pytest.raises(ValueError, match="unknown task 'teal'; allowed are wide"):
            run(model, batch(), adapter_names=["teal"] * 5)
        with pytest.raises(ValueError, match="adapter_names and task_ids are both given"):
            run(model, batch(), adapter_names=NAMES, task_ids=torch.zeros(5, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"task ids of shape \[2\] do not fit"):
            run(model, batch(), adapter_names=["wide", "narrow"])
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.float64).to(torch.float32)
        for other in copies:
            assert torch.equal(run(other, batch(), adapter_names=NAMES), expected)
            assert other.forward.model is other
    assert "forward" not in vars(model)


def test_packed_sequences(mixed: MergedAdapters) -> None:
    """Several samples in one row, a task for each token: each layer gives what it gives the samples alone."""
    model = tiny_bert()
    with attach(model, mixed) as attachment:
        lengths, tasks = (3, 5, 2), (0, 3, -1)
        ids = torch.tensor([task for task, length in zip(tasks, lengths, strict=True) for _ in range(length)])
        x = torch.randn(1, 10, 24)
        for layer in attachment.layers.values():
            if layer.in_features != 24:
                continue
            with attachment.tasks(ids), torch.no_grad():
                packed = layer(x)[0]
            begin = 0
            for task, length in zip(tasks, lengths, strict=True):
                with attachment.tasks(task), torch.no_grad():
                    alone = layer(x[:, begin : begin + length])[0]
                assert relative(packed[begin : begin + length], alone) <= 1e-6
                begin += length


# ---------------------------------------------------------------- heads


def test_heads(tmp_path: Path) -> None:
    """Of modules_to_save, and of files; as many classes as each task has."""
    paths = write_adapters(tmp_path, EQUAL)
    weights = {}
    for number, path in enumerate(paths):
        weights[path.name] = torch.randn(2 + number, 24)
        head = {"weight": weights[path.name], "bias": torch.full((2 + number,), 1.0 + number)}
        save_file(head, path / "head.safetensors")
    heads = TaskHeads.from_merged(merge(paths, components=1))
    assert heads.tasks == ("red", "green", "blue")
    x = torch.randn(4, 24)
    tasks = ["blue", "red", "green", "red"]
    logits = heads(x, tasks)
    for row, task in enumerate(tasks):
        expected = weights[task] @ x[row] + 1.0 + heads.tasks.index(task)
        torch.testing.assert_close(logits[row], expected)
    for same in (torch.tensor([2, 0, 1, 0]), [2, "red", 1, 0]):
        assert all(torch.equal(one, other) for one, other in zip(heads(x, same), logits, strict=True))
    with pytest.raises(ValueError, match="unknown task 'teal'; allowed are red, green, blue"):
        heads(x, ["teal"] * 4)
    with pytest.raises(ValueError, match="task 3 is out of range; allowed are 0 to 2"):
        heads(x, [3] * 4)
    with pytest.raises(ValueError, match="tasks holds 1 tasks for 4 rows"):
        heads(x, [0])


def test_heads_of_modules_to_save(tmp_path: Path) -> None:
    def classifier() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, num_labels=3
        )
        return transformers.BertForSequenceClassification(config).eval()

    config = {"r": 4, "target_modules": ["query"], "modules_to_save": ["classifier"]}
    paths = write_adapters(tmp_path, {"one": config, "two": config}, classifier)
    merged = merge(paths, components=1)
    heads = TaskHeads.from_merged(merged)
    x = torch.randn(2, 24)
    for task, logits in zip(merged.tasks, heads(x, merged.tasks), strict=True):
        extras = merged.parts[task].extras
        weight = next(extras[key] for key in extras if key.endswith("classifier.weight"))
        bias = next(extras[key] for key in extras if key.endswith("classifier.bias"))
        torch.testing.assert_close(logits, weight @ x[merged.tasks.index(task)] + bias)
    plain = merge(write_adapters(tmp_path / "plain", {"red": EQUAL["red"]}), components=0)
    with pytest.raises(ValueError, match=r"task 'red' brought no head: .* no head.safetensors"):
        TaskHeads.from_merged(plain)


def classifier(labels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=16,
        num_labels=labels,
    )
    return transformers.BertForSequenceClassification(config).eval()


WITH_HEAD = {"r": 4, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}


def adapters_with_heads(directory: Path) -> list[Path]:
    """Adapters "one" and "two" of `classifier`, each with a head of its own."""
    paths = write_adapters(directory, {"one": WITH_HEAD, "two": {**WITH_HEAD, "lora_alpha": 20}}, classifier)
    for seed, path in enumerate(paths):  # trained, as it were
        tensors = load_file(path / "adapter_model.safetensors")
        generator = torch.Generator().manual_seed(seed)
        for key in tensors:
            if "classifier" in key:
                tensors[key] = torch.randn(tensors[key].shape, generator=generator)
        save_file(tensors, path / "adapter_model.safetensors")
    return paths


def test_heads_in_the_attached_model(tmp_path: Path) -> None:
    """A merged directory where PEFT's adapters were: one forward gives every row its own task's logits, as PEFT's does."""
    paths = adapters_with_heads(tmp_path)
    merge(paths, components=1).save(tmp_path / "merged")
    merged = MergedAdapters.load(tmp_path / "merged")
    names = ["two", BASE, "one", "two", "one"]
    expected = with_peft(classifier(), paths)(**batch(), adapter_names=names).logits
    model = classifier()
    own = model.classifier
    with attach(model, merged) as attachment:
        assert list(attachment.heads) == ["classifier"] and not any("classifier" in key for key in attachment.layers)
        logits = model(**batch(), adapter_names=names).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert torch.equal(copied(**batch(), adapter_names=names).logits, logits)
        logits.sum().backward()
        assert own.weight.grad.isfinite().all()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with attachment.tasks(names), torch.no_grad():
            torch.testing.assert_close(compiled(**batch()).logits, logits)
    assert model.classifier is own

    # Another number of classes, a task without a head, a model without one, and a head that can't be this model's.
    more = write_adapters(tmp_path / "more", {"five": WITH_HEAD}, lambda: classifier(5))
    bare = write_adapters(tmp_path / "bare", {"none": {**WITH_HEAD, "modules_to_save": None}}, classifier)
    mixed = merge([*paths, *more, *bare], components=1)
    with attach(model, mixed), torch.no_grad():
        wide = model(**batch(), adapter_names=["two", BASE, "five", "none", "one"]).logits
        assert wide.shape == (5, 5)
        assert wide[[0, 1, 3, 4], 3:].eq(-torch.inf).all() and wide[2].isfinite().all()
        assert wide[:, :3].isfinite().all()
    broken = merge(paths, components=1)
    key = next(key for key in broken.parts["two"].extras if key.endswith("classifier.weight"))
    broken.parts["two"] = replace(broken.parts["two"], extras={key: torch.zeros(3, 25)})
    with pytest.raises(ValueError, match=r"module classifier: a head is \[3, 25\]; base_layer takes 24 features"):
        attach(model, broken)
    assert model.classifier is own and "forward" not in vars(model)


def test_heads_follow_their_model(tmp_path: Path) -> None:
    """To another dtype and back, and through state_dict, which holds the model's own head alone; of packed samples a head
    wants a task for each of its rows."""
    names = ["two", BASE, "one", "two", "one"]
    model = classifier()
    with attach(model, merge(adapters_with_heads(tmp_path), components=1)), torch.no_grad():
        expected = model(**batch(), adapter_names=names).logits
        model.to(torch.bfloat16)
        low = model(**batch(), adapter_names=names).logits
        assert low.dtype == torch.bfloat16 and 0 < relative(low, expected) < 0.05
        state = model.state_dict()
        assert {key for key in state if "classifier" in key} == {"classifier.base_layer.weight", "classifier.base_layer.bias"}
        model.load_state_dict(state)
        per_token = torch.zeros(5, 7, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"task ids of shape \[5, 7\] do not fit an input of shape \[5, 'in'\]"):
            model(**batch(), task_ids=per_token)


# ---------------------------------------------------------------- compile and export


def test_whole_model_compiles_once_for_every_mix(mixed: MergedAdapters) -> None:
    """One graph, no break; 50 mixes of tasks after the first compile nothing anew."""
    torch._dynamo.reset()
    model, inputs = tiny_bert(), batch()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    generator = random.Random(0)
    with attach(model, mixed) as attachment:
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for _ in range(51):
            tasks = [generator.choice([*mixed.tasks, None]) for _ in range(5)]
            with attachment.tasks(tasks):
                assert (run(compiled, inputs) - run(model, inputs)).abs().max() <= 1e-5
        assert counter.frame_count == 1
        with pytest.raises(Exception, match=r"enter attachment\.tasks"):
            run(compiled, inputs, adapter_names=NAMES)


def test_export(mixed: MergedAdapters) -> None:
    """The exported program reads the tasks when it runs, too."""
    model, inputs = tiny_bert(), batch()
    with attach(model, mixed) as attachment:
        with attachment.tasks(NAMES), torch.no_grad():
            program = torch.export.export(model, (), inputs, strict=False)
        exported = program.module()
        for tasks in (NAMES, ["wide", None, "patterned", "narrow", "wide"], None):
            with attachment.tasks(tasks), torch.no_grad():
                expected = model(**inputs).last_hidden_state
                assert (exported(**inputs).last_hidden_state - expected).abs().max() <= 1e-6


def test_export_with_heads(tmp_path: Path) -> None:
    """The exported program takes every row through the head of the task that is set when it runs, its own where that has none;
    also when it was saved and read."""
    model, inputs = classifier(), batch()
    with attach(model, merge(adapters_with_heads(tmp_path), components=1)) as attachment, torch.no_grad():
        with attachment.tasks(["one", "two", None, "one", "two"]):
            program = torch.export.export(model, (), inputs, strict=False)
        torch.export.save(program, tmp_path / "program.pt2")
        outputs = []
        for exported in (program.module(), torch.export.load(tmp_path / "program.pt2").module()):
            for tasks in (["two", None, "one", "two", "two"], "one", None):
                with attachment.tasks(tasks):
                    expected = model(**inputs).logits
                    outputs.append(exported(**inputs)["logits"])
                torch.testing.assert_close(outputs[-1], expected, rtol=0, atol=1e-6)
    assert len({tuple(logits.flatten().tolist()) for logits in outputs}) == 3
