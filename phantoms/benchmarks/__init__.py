"""Benchmark scripts with known truth: ``python -m phantoms.benchmarks.NAME``."""
