"""Benchmarks: every statement about speed or memory is a row that one of these wrote. Run ``python -m benchmarks``."""
