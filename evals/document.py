"""``python -m evals.document``: writes what evals/results holds into the tables of docs/accuracy.md.

A table stands between ``<!-- NAME -->`` and ``<!-- end NAME -->``; everything else in the file is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from benchmarks.measure import load
from evals.plots import line_of
from evals.studies import RESULTS
from think_compile import ThinkConfig

DOCUMENT = Path(__file__).parents[1] / "docs" / "accuracy.md"
Row = dict[str, Any]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def crossed(
    rows: Sequence[Row], down: Callable[[Row], str], across: Callable[[Row], str], cell: Callable[[Row], str]
) -> list[list[str]]:
    """A table of two axes in the order of the rows, its header first; what there is not is left empty."""
    cells = {(down(row), across(row)): cell(row) for row in rows}
    columns = list(dict.fromkeys(across(row) for row in rows))
    lines = [[name, *(cells.get((name, column), "") for column in columns)] for name in dict.fromkeys(map(down, rows))]
    return [["", *columns], *lines]


def about(result: dict[str, Any]) -> str:
    """One line: what was measured on what."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    what = f"{result['samples']} samples of `{result['task']}`, " if "task" in result else ""
    return f"{result['model']}, {what}{result['dtype'].removeprefix('torch.')}, {result['device']}; {versions}."


def ratio(result: dict[str, Any]) -> str:
    """KL of each method at each ratio, then agreement."""
    rows = result["rows"]
    tables = [
        crossed(rows, line_of, lambda row: f"{row['ratio']:g}", cell)
        for cell in (lambda row: f"{row['kl'][0]:.4f}", lambda row: f"{100 * row['agreement'][0]:.1f}")
    ]
    for table, name in zip(tables, ("KL, nats a token", "top-1 agreement, %"), strict=True):
        table[0][0] = name
    return "\n\n".join([about(result), *(markdown(table[0], table[1:]) for table in tables)])


def option(name: str) -> Callable[[dict[str, Any]], str]:
    """KL with its interval against an option, for each ratio."""

    def table(result: dict[str, Any]) -> str:
        lines = crossed(
            result["rows"],
            lambda row: f"`{name}={row[name]}`",
            lambda row: f"ratio {row['ratio']:g}",
            lambda row: "{:.4f} [{:.4f}, {:.4f}]".format(*row["kl"]),
        )
        return "\n\n".join([about(result), markdown(lines[0], lines[1:])])

    return table


HEAD_DIM = 64  # of the demonstration's model


def bits_of(row: Row) -> str:
    """Bits per number of keys and values outside the window, with scales and zeros."""
    plans = {name: row[name] for name in ("keys", "values", "group", "channel_multiple") if name in row}
    form = ThinkConfig(**plans).format_for(HEAD_DIM, HEAD_DIM)
    bits = (form.side(of).bits for of in ("keys", "values"))
    return ", ".join(f"{number:.3g}" for number in bits)


def plans(result: dict[str, Any]) -> str:
    """KL and agreement of each pair of plans."""
    rows = [
        [
            *(f"{row.get(side, 16)}" for side in ("keys", "values")),
            bits_of(row),
            "{:.5f} [{:.5f}, {:.5f}]".format(*row["kl"]),
            f"{100 * row['agreement'][0]:.1f}",
        ]
        for row in result["rows"]
    ]
    return "\n\n".join([about(result), markdown(["keys", "values", "bits a number", "KL", "agreement, %"], rows)])


def option_of_plans(name: str) -> Callable[[dict[str, Any]], str]:
    """KL with its interval against an option of plans, for each plan of the keys (values have 4 bits)."""

    def table(result: dict[str, Any]) -> str:
        lines = crossed(
            result["rows"],
            lambda row: f"`{name}={row[name]}`",
            lambda row: f"keys {row['keys']}",
            lambda row: "{:.5f} [{:.5f}, {:.5f}]".format(*row["kl"]),
        )
        return "\n\n".join([about(result), markdown(lines[0], lines[1:])])

    return table


def form_of(row: Row) -> str:
    """How keys and values are stored."""
    if "keys" in row:
        return f"keys {row['keys']}, values {row['values']}"
    return f"ratio {row['ratio']:g}" if row["ratio"] else "whole"


def tokens(result: dict[str, Any]) -> str:
    """What each token rule stores, and KL and agreement."""
    lines = [
        [
            *(row["tokens"].split(":")[0], f"{float(row['tokens'].split(':')[1]):g}", form_of(row)),
            *(f"{100 * row['stored_share']:.1f}", *_distance(row)),
        ]
        for row in result["rows"]
    ]
    header = ["rule", "share of the tokens", "keys and values", "bytes, % of dense", "KL", "agreement, %"]
    return "\n\n".join([about(result), markdown(header, lines)])


def _distance(row: Row) -> tuple[str, str]:
    return "{:.4f} [{:.4f}, {:.4f}]".format(*row["kl"]), f"{100 * row['agreement'][0]:.1f}"


def peers(result: dict[str, Any]) -> str:
    """KL and agreement of kvpress's rules."""
    lines = [[f"`{row['method']}`", f"{row['share']:g}", *_distance(row)] for row in result["rows"]]
    return "\n\n".join([about(result), markdown(["press", "share of the tokens", "KL", "agreement, %"], lines)])


def needles(result: dict[str, Any]) -> str:
    """The share of needles that each way of storing finds, and the difference to the dense model."""

    def found(row: Row) -> str:
        share, less = f"{row['metrics']['acc,none']:.3f}", row["less_dense"].get("acc,none")
        return share if less is None else "{} ({:+.3f} [{:+.3f}, {:+.3f}])".format(share, *less)

    def plan(row: Row) -> str:
        selected = f"{row['tokens']}, " if "tokens" in row else ""
        return "dense" if row["method"] == "dense" else selected + form_of(row)

    lines = crossed(result["rows"], plan, lambda row: f"`{row['task']}`, n = {row['n']}", found)
    return "\n\n".join([about(result), markdown(lines[0], lines[1:])])


def pruned(row: Row) -> str:
    """Method and ratio, and what was really dropped where that is something else."""
    dropped = row["effective_ratio"]
    return f"{row['method']} {row['ratio']:g}" + (f" ({dropped:.0%} dropped)" if dropped != row["ratio"] else "")


def tasks(result: dict[str, Any]) -> str:
    """Each task's metrics, dense; and what other methods differ by."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in result["rows"]:
        for metric, value in row["metrics"].items():
            line = lines.setdefault((row["task"], metric.removesuffix(",none")), {"n": str(row["n"])})
            if row["method"] == "dense":
                line["dense"] = f"{value:.4f}"
            elif metric in row["less_dense"]:
                mean, low, high = row["less_dense"][metric]
                line[pruned(row)] = f"{mean:+.4f} [{low:+.3f}, {high:+.3f}]"
    others = sorted((row["method"], row["ratio"], pruned(row)) for row in result["rows"] if row["method"] != "dense")
    columns = list(dict.fromkeys(["n", "dense", *(name for _, _, name in others)]))
    body = [[f"`{task}`", metric, *(line.get(name, "") for name in columns)] for (task, metric), line in lines.items()]
    return "\n\n".join([about(result), markdown(["task", "metric", *columns], body)])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "ratio": ratio,
    **{name: option(name) for name in ("recent", "observe", "score_over", "channel_multiple")},
    **dict.fromkeys(("plans", "mustafar"), plans),
    **{name: option_of_plans(name) for name in ("group", "sinks")},
    "tokens": tokens,
    "peers": peers,
    **dict.fromkeys(("needles", "token_needles"), needles),
    "tasks": tasks,
}


def filled(text: str, folder: Path = RESULTS) -> str:
    """The document with its tables as the results say.

    Raises:
        ValueError: it names a table that is not known.
        FileNotFoundError: there is no result for one.
    """

    def table(found: re.Match[str]) -> str:
        name = found[1]
        if name not in TABLES:
            raise ValueError(f"no such table: {name!r}; there are {', '.join(TABLES)}.")
        return f"<!-- {name} -->\n\n{TABLES[name](load(folder / f'{name}.json'))}\n\n<!-- end {name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end \1 -->", table, text, flags=re.DOTALL)


def main(path: Path = DOCUMENT, folder: Path = RESULTS) -> None:
    """Fill the tables."""
    path.write_text(filled(path.read_text(encoding="utf-8"), folder), encoding="utf-8")
    Console().print(str(path))


if __name__ == "__main__":
    typer.run(main)
