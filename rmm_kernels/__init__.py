"""Kernels for Reversible Model Merging: a shared basis for many LoRA adapters, and a forward straight from it."""

from ._library import backends, build_info
from ._version import __version__
from .adapters import Adapter, AdapterError, LoraFactors, load_adapter, load_adapters, save_adapter
from .engine import Engine
from .heads import TaskHeads
from .merge import MergedAdapters, MergedModule, MergeError, merge
from .modules import Attachment, MultiTaskLoRALinear, attach
from .ops import (
    compress,
    error_grams,
    gram,
    lora_expand_,
    lora_forward,
    lora_forward_,
    lora_shrink,
    project,
    reconstruct,
    truncated_svd,
)
from .slots import TensorParallel

__all__ = [
    "Adapter",
    "AdapterError",
    "Attachment",
    "Engine",
    "LoraFactors",
    "MergeError",
    "MergedAdapters",
    "MergedModule",
    "MultiTaskLoRALinear",
    "TaskHeads",
    "TensorParallel",
    "__version__",
    "attach",
    "backends",
    "build_info",
    "compress",
    "error_grams",
    "gram",
    "load_adapter",
    "load_adapters",
    "lora_expand_",
    "lora_forward",
    "lora_forward_",
    "lora_shrink",
    "merge",
    "project",
    "reconstruct",
    "save_adapter",
    "truncated_svd",
]
