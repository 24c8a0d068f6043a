"""Benchmarks: every op beside its named peers. `python -m benchmarks.run` runs them; README.md says what is counted."""
