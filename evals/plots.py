"""``python -m evals.plots``: draws what evals/results holds of the studies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from benchmarks.measure import load
from evals.studies import PAPER, RESULTS

Row = dict[str, Any]
COMPILED = "think_compile, compiled"
MARKS = {COMPILED: "kx"}  # a few points, to stand on the line of the same rule
PAPERS = "the same with the paper's window, recent=32"
LINES = {
    "simulated": "think_compile",
    "think": COMPILED,
    "kvpress": "kvpress's rule",
    "per_query_head": "a set for each query head (no saving with groups)",
    "attended": "keys weighted by attention",
    "magnitude": "key energy alone",
    "random": "random channels",
}
LABELS = {"kl": "KL to the dense model, nats a token", "agreement": "top-1 agreement with the dense model"}


def line_of(row: Row) -> str:
    """What a row of the study ``ratio`` is called."""
    papers = row["method"] == "simulated" and row["recent"] == PAPER["recent"]
    return PAPERS if papers else LINES[row["method"]]


def lines_of(rows: list[Row], x: str, line: Callable[[Row], str], y: str) -> dict[str, list[tuple[float, list[float]]]]:
    """For each line (x, [mean, low, high]), ascending."""
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for row in rows:
        lines.setdefault(line(row), []).append((row[x], row[y]))
    return {name: sorted(points) for name, points in lines.items()}


def curves(result: dict[str, Any], x: str, line: Callable[[Row], str], path: Path) -> Path:
    """KL and agreement against ``x``, with 95% intervals over samples."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.3), layout="constrained")
    for panel, y in zip(panels, LABELS, strict=True):
        for name, points in lines_of(result["rows"], x, line, y).items():
            xs, values = zip(*points, strict=True)
            means, lows, highs = zip(*values, strict=True)
            if name in MARKS:
                panel.plot(xs, means, MARKS[name], label=name, markersize=7)
                continue
            panel.plot(xs, means, "o-", label=name, markersize=3)
            panel.fill_between(xs, lows, highs, alpha=0.2)
        panel.set(xlabel=x, ylabel=LABELS[y])
        if y == "kl":
            panel.set_yscale("symlog", linthresh=0.01)
            panel.set_ylim(bottom=0)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    return _saved(figure, result, path)


def heat_map(result: dict[str, Any], path: Path) -> Path:
    """Scores of the channels of every layer and KV head, in their order and sorted: how uneven they are."""
    import matplotlib.pyplot as plt

    heads = [head for row in result["rows"] for head in row["scores"]]
    figure, panels = plt.subplots(1, 2, figsize=(10, 5), sharey=True, layout="constrained")
    ordered = {"channels": heads, "channels, by their scores": [sorted(head, reverse=True) for head in heads]}
    for panel, (name, rows) in zip(panels, ordered.items(), strict=True):
        image = panel.imshow(rows, aspect="auto", norm="log", interpolation="nearest")
        panel.set(xlabel=name)
    panels[0].set_ylabel("KV heads, from the first layer to the last")
    figure.colorbar(image, ax=panels, label="score over the head's mean")
    return _saved(figure, result, path)


def _saved(figure: Any, result: dict[str, Any], path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.suptitle(f"{result['model']}, {result['samples']} x {result['task']}, {result['device']}", fontsize=9)
    figure.savefig(path)
    plt.close(figure)
    return path


def _at_ratio(row: Row) -> str:
    return f"ratio {row['ratio']:g}"


def main(folder: Path = RESULTS) -> None:
    """Draw every study that is there, beside its rows."""
    axes: dict[str, Callable[[Row], str]] = {
        "ratio": line_of,
        "recent": _at_ratio,
        "observe": _at_ratio,
        "channel_multiple": _at_ratio,
    }
    for study, line in axes.items():
        if (folder / f"{study}.json").is_file():
            result = load(folder / f"{study}.json")
            Console().print(str(curves(result, study, line, folder / f"{study}.svg")))
    if (folder / "energy.json").is_file():
        Console().print(str(heat_map(load(folder / "energy.json"), folder / "energy.svg")))


if __name__ == "__main__":
    typer.run(main)
