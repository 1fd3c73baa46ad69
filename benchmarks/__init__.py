"""Benchmarks anyone can run: ``python -m benchmarks.NAME [--quick] [--json FILE]``."""
