"""Accuracy through the pruned cache: lm-evaluation-harness, methods side by side, statistics.

Needs the extra ``eval``; only the commands import this folder.
"""
