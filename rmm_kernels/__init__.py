"""Kernels for Reversible Model Merging: a shared basis for many LoRA adapters, and a forward straight from it."""

from ._library import backends, build_info
from ._version import __version__
from .ops import (
    compress,
    gram,
    lora_expand_,
    lora_forward,
    lora_forward_,
    lora_shrink,
    project,
    reconstruct,
    truncated_svd,
)

__all__ = [
    "__version__",
    "backends",
    "build_info",
    "compress",
    "gram",
    "lora_expand_",
    "lora_forward",
    "lora_forward_",
    "lora_shrink",
    "project",
    "reconstruct",
    "truncated_svd",
]
