"""Benchmarks: every op beside its named peers. `python -m benchmarks.run` runs them; README.md says what is counted."""

import sys
from pathlib import Path

# `python -m` puts the checkout first on the path, where rmm_kernels is the sources: an installed package goes before them.
_CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[:] = [*(path for path in sys.path if Path(path).resolve() != _CHECKOUT), str(_CHECKOUT)]
