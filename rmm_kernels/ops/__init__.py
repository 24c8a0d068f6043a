"""The public functions, one file per op: docstring, semantic checks, fake, gradient where it has one."""

from .compress import compress
from .error_grams import error_grams
from .gram import gram
from .lora_expand import lora_expand_
from .lora_forward import lora_forward, lora_forward_
from .lora_shrink import lora_shrink
from .project import project
from .reconstruct import reconstruct
from .truncated_svd import truncated_svd

__all__ = [
    "compress",
    "error_grams",
    "gram",
    "lora_expand_",
    "lora_forward",
    "lora_forward_",
    "lora_shrink",
    "project",
    "reconstruct",
    "truncated_svd",
]
