"""The plot of the README: the time of a decode step against the context, for each way of decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, load


def step_times(rows: list[dict[str, Any]], batch: int) -> dict[str, list[tuple[int, float]]]:
    """For each way, its (context, milliseconds), ascending."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.get("batch") == batch and "ms" in row:
            lines.setdefault(row["way"], []).append((row["context"], row["ms"]))
    return {way: sorted(points) for way, points in lines.items()}


def draw(path: Path = RESULTS / "decode.svg") -> Path:
    """Draw the results of ``decode``, a panel for each batch size."""
    import matplotlib.pyplot as plt

    results = [load(found) for found in sorted(RESULTS.glob("decode_*.json"))]
    rows = [row for result in results for row in result["rows"]]
    batches = sorted({row["batch"] for row in rows if "batch" in row})
    figure, panels = plt.subplots(1, len(batches), figsize=(5 * len(batches), 4), squeeze=False)
    for panel, batch in zip(panels[0], batches, strict=True):
        for way, points in step_times(rows, batch).items():
            style = "--" if "floor" in way else "o-"
            panel.plot(*zip(*points, strict=True), style, label=way)
        panel.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="ms a step", title=f"batch {batch}")
        panel.legend(fontsize=7)
    figure.suptitle(f"Llama-3.1-8B shape, bf16, {' and '.join(sorted({result['device'] for result in results}))}")
    figure.tight_layout()
    figure.savefig(path)
    return path
