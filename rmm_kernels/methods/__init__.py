"""Methods beside the merge itself: where adapters come from, and what they may be merged into."""

from .lore import Merged, Settings, lore_adapters, lore_checkpoints
from .osrm import Covariance, Osrm, covariances, least_energy, osrm
from .pt_svd import Extracted, ExtractedModule, extract

__all__ = [
    "Covariance",
    "Extracted",
    "ExtractedModule",
    "Merged",
    "Osrm",
    "Settings",
    "covariances",
    "extract",
    "least_energy",
    "lore_adapters",
    "lore_checkpoints",
    "osrm",
]
