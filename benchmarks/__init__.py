"""Benchmarks: the source of every statement about speed or memory. Run ``python -m benchmarks``."""
