"""A table of runs: each metric beside the dense model's, with the paired difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from think_compile.evals.settings import PLANS
from think_compile.evals.statistics import Difference, paired_difference, ratio_difference

Record = dict[str, Any]


def summary(records: Sequence[Record]) -> Group:
    """A table for each task. Differences have 95% intervals over samples."""
    tasks = dict.fromkeys(record["settings"]["task"] for record in records)
    return Group(*(_table([record for record in records if record["settings"]["task"] == task]) for task in tasks))


def _table(records: Sequence[Record]) -> Table:
    """Of one task: a row for each method, ratio and metric; dense comes first."""
    dense = records[0]
    table = Table(title=dense["settings"]["task"], title_justify="left", box=SIMPLE_HEAD)
    if cut := dense["counters"]["truncated_contexts"]:
        table.caption = f"{cut} of {dense['counters']['contexts']} contexts were cut on the left to the model's length."
    for column in ("metric", "method", "value", "less dense [95%]", "n", "pruned"):
        table.add_column(column, no_wrap=True)
    for record in records:
        settings = record["settings"]
        for key, value in record["metrics"].items():
            found = None if record is dense else difference(record, dense, key)
            table.add_row(
                key.removesuffix(",none"),
                _named(settings),
                f"{value:.4f}" if isinstance(value, (int, float)) else str(value),
                "-" if found is None else f"{found.mean:+.4f} [{found.low:+.3f}, {found.high:+.3f}]",
                str(len(sample_values(record, key))),
                through_pruned(record),
            )
    return table


def _named(settings: dict[str, Any]) -> str:
    """The method with its ratio or plans."""
    if settings["method"] == "dense":
        return "dense"
    ratio = "" if "keys" in settings else f" {settings['ratio']:g}"
    return settings["method"] + ratio + "".join(f" {side} {settings[side]}" for side in PLANS if side in settings)


def through_pruned(record: Record) -> str:
    """For example ``120/128``: tokens predicted with narrow keys, of all."""
    counters = record["counters"]
    narrow = counters["scored_through_pruned"] + counters["generated_through_pruned"]
    return f"{narrow}/{counters['scored_tokens'] + counters['generated_tokens']}"


def difference(ours: Record, dense: Record, key: str) -> Difference | None:
    """The paired difference of a metric (``name,filter``); None for metrics other than means and bits per byte.

    Raises:
        ValueError: the two runs are not of the same samples.
    """
    samples = [sample_values(record, key) for record in (ours, dense)]
    if list(samples[0]) != list(samples[1]):
        raise ValueError(f"the runs of {ours['settings']['task']} are of other samples: no pairs can be made.")
    values = [list(pairs.values()) for pairs in samples]
    totals = [record["metrics"][key] for record in (ours, dense)]
    if all(_is_mean(total, series) for total, series in zip(totals, values, strict=True)):
        return paired_difference(*values)
    if all(_is_bits_per_byte(total, series) for total, series in zip(totals, values, strict=True)):
        losses = [[-likelihood for likelihood, _ in series] for series in values]
        return ratio_difference(losses[0], losses[1], [size for _, size in values[0]])
    return None


def sample_values(record: Record, key: str) -> dict[Any, Any]:
    """The samples' contributions to a metric, by prompt."""
    name, kind = key.split(",", 1)
    return {(s["doc_id"], s["doc_hash"]): s[name] for s in record["samples"] if s["filter"] == kind and name in s}


def _is_mean(total: Any, values: list[Any]) -> bool:
    numbers = all(isinstance(value, (bool, int, float)) for value in values)
    return bool(values) and numbers and math.isclose(sum(values) / len(values), total, abs_tol=1e-9)


def _is_bits_per_byte(total: Any, values: list[Any]) -> bool:
    """Whether the samples are (log-likelihood, bytes)."""
    if not values or not all(isinstance(value, list) and len(value) == 2 for value in values):
        return False
    bits = -sum(likelihood for likelihood, _ in values) / sum(size for _, size in values) / math.log(2)
    return math.isclose(bits, total, rel_tol=1e-9)
