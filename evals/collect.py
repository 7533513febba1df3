"""``python -m evals.collect FOLDER``: records of ``think-compile eval`` as one file of evals/results.

A row for each task, method and ratio: its metrics, their paired differences to the dense model with 95% intervals, and
what each sample contributed, from which both can be computed again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.measure import write_rows
from evals.studies import RESULTS
from think_compile.evals.table import Record, difference, sample_values, through_pruned

SHARED = ("model", "dtype", "versions")  # of all records of a file


def read(folder: Path) -> list[Record]:
    """All records in a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.json"))]


def rows_of(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """The rows, by task, method and ratio.

    Raises:
        ValueError: a task has no dense record, or several of one setting.
    """
    for task in sorted({record["settings"]["task"] for record in records}):
        of_task = [record for record in records if record["settings"]["task"] == task]
        dense = [record for record in of_task if record["settings"]["method"] == "dense"]
        if len(dense) != 1:
            raise ValueError(f"{task} has {len(dense)} dense records; it needs one to compare with.")
        seen: list[dict[str, Any]] = []
        for record in sorted(of_task, key=_order):
            if record["settings"] in seen:
                raise ValueError(f"{task} has two records of one setting: {record['settings']}.")
            seen.append(record["settings"])
            yield _row(record, dense[0])


def _order(record: Record) -> tuple[bool, str, float]:
    settings = record["settings"]
    return settings["method"] != "dense", settings["method"], settings.get("ratio", 0)


def _row(record: Record, dense: Record) -> dict[str, Any]:
    differences = {} if record is dense else {key: difference(record, dense, key) for key in record["metrics"]}
    less = {key: [round(x, 5) for x in (d.mean, d.low, d.high)] for key, d in differences.items() if d is not None}
    samples = {key: list(sample_values(record, key).values()) for key in record["metrics"]}
    return {
        **{name: value for name, value in record["settings"].items() if name not in SHARED},
        "metrics": record["metrics"],
        "less_dense": less,
        "n": max(map(len, samples.values())),
        "through_pruned": through_pruned(record),
        "effective_ratio": round(record["counters"]["effective_ratio"], 4),
        "cut_contexts": record["counters"]["truncated_contexts"],
        "batch_size": record["batch_size"],
        "seeds": record["seeds"],
        "samples": samples,
    }


def head_of(records: Sequence[Record]) -> dict[str, Any]:
    """What all records share.

    Raises:
        ValueError: there are none, or they do not.
    """
    shared: dict[str, Any] = {"device": _only(record["machine"] for record in records)}
    return shared | {name: _only(record["settings"][name] for record in records) for name in SHARED}


def _only(values: Iterable[Any]) -> Any:
    distinct: list[Any] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    if len(distinct) != 1:
        raise ValueError(f"records of one file agree in what made them; got {distinct or 'no record'}.")
    return distinct[0]


def main(
    folder: Annotated[Path, typer.Argument(help="of the records, as `think-compile eval` says at its end")],
    out: Annotated[Path, typer.Option(help="the file")] = RESULTS / "tasks.json",
) -> None:
    """Collect records."""
    records = read(folder)
    rows = list(rows_of(records))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(out, head_of(records), rows)
    Console().print(f"{out}: {len(rows)} rows")


if __name__ == "__main__":
    typer.run(main)
