"""Methods beside the merge itself: where adapters come from, and what they may be merged into."""

from .pt_svd import Extracted, ExtractedModule, extract

__all__ = ["Extracted", "ExtractedModule", "extract"]
