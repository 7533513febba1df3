"""Accuracy through the pruned cache: lm-evaluation-harness, methods side by side, statistics.

Needs the extra ``eval``; nothing else in the package imports it.
"""
