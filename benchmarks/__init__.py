"""Reproducible measurements: what README claims. Start one with `python benchmarks/NAME.py` or `-m benchmarks.NAME`."""
