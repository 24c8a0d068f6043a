"""Small transformers, random PEFT adapters for them, and PEFT's own layers around them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ATTENTION = ["query", "key", "value", "attention.output.dense"]
ALL = [*ATTENTION, "intermediate.dense", "output.dense"]
FEED_FORWARD = "encoder.layer.0.intermediate.dense"  # adapter "narrow" lacks it

# Adapters of one rank that all have every module; and such as differ in rank, scaling, and in which modules they have.
EQUAL: dict[str, dict[str, Any]] = {
    name: {"r": 4, "lora_alpha": alpha, "target_modules": ALL} for name, alpha in [("red", 8), ("green", 4), ("blue", 12)]
}
MIXED: dict[str, dict[str, Any]] = {
    "wide": {"r": 6, "lora_alpha": 6, "target_modules": ALL},
    "narrow": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
    "patterned": {
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {"key": 2, "layer.1.output.dense": 6},
        "alpha_pattern": {"value": 3},
        "target_modules": ALL,
    },
    "stabilised": {"r": 6, "lora_alpha": 3, "use_rslora": True, "target_modules": ["intermediate.dense", "query"]},
}


def tiny_bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=16,
    )
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def write_adapters(
    directory: Path, configs: dict[str, dict[str, Any]], model: Callable[[], nn.Module] = tiny_bert
) -> list[Path]:
    """PEFT adapters of random weights for `model`, each in the directory of its name."""
    paths = []
    for seed, (name, config) in enumerate(configs.items()):
        base = model()
        torch.manual_seed(100 + seed)
        peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **config)).save_pretrained(directory / name)
        paths.append(directory / name)
    return paths


def with_peft(model: nn.Module, paths: list[Path]) -> nn.Module:
    """`model` with PEFT's own layers, one adapter for each directory, under the directory's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(model, paths[0], adapter_name=paths[0].name)
        for path in paths[1:]:
            wrapped.load_adapter(path, path.name)
    return wrapped.eval()


def batch(size: int = 5, length: int = 7) -> dict[str, Tensor]:
    """Token ids, and a mask under which the samples have different lengths."""
    torch.manual_seed(1)
    mask = (torch.arange(length) < torch.randint(2, length + 1, (size, 1))).long()
    return {"input_ids": torch.randint(0, 50, (size, length)), "attention_mask": mask}


def run(model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **kwargs).last_hidden_state


def relative(value: Tensor, expected: Tensor) -> float:
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm())
