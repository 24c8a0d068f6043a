"""Methods beside the merge itself: where adapters come from, and what they may be merged into."""

from .osrm import Covariance, Osrm, covariances, least_energy, osrm
from .pt_svd import Extracted, ExtractedModule, extract

__all__ = ["Covariance", "Extracted", "ExtractedModule", "Osrm", "covariances", "extract", "least_energy", "osrm"]
