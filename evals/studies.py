"""``python -m evals.studies NAME...``: how far from the dense model methods and options are, on a real model.

Each study is a list of settings. Each is compared with the dense model by KL divergence and top-1 agreement over the
continuations of one of the offline tasks, sample by sample; a row for each, with the samples, is kept in evals/results.
Rows that are there already, with the same head, are not measured again. ``energy`` is what the scores look like.
"""

from __future__ import annotations

import datetime
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.measure import device_name, load, versions, write_rows
from think_compile import demo, hf
from think_compile.evals.calls import TwoCalls
from think_compile.evals.divergence import Divergence, Sample
from think_compile.evals.methods import Simulation, group_mean
from think_compile.evals.settings import Settings
from think_compile.evals.statistics import mean_interval
from think_compile.evals.tasks import FOLDER, prompts

RESULTS = Path(__file__).parent / "results"
RATIOS = [tenths / 10 for tenths in range(9)]
METHODS = ("think", "kvpress", "per_query_head", "magnitude", "random")


def _think(**options: Any) -> Settings:
    """Ours, of every width that the ratio asks for unless told otherwise, op by op: the numbers are the same."""
    return Settings.of(**{"method": "think", "channel_multiple": 1, "lowering": "eager"} | options)


STUDIES: dict[str, list[Settings]] = {
    "ratio": [_think(method=method, ratio=ratio) for method in METHODS for ratio in RATIOS],
    "recent": [_think(ratio=ratio, recent=recent) for ratio in (0.5, 0.7) for recent in (0, 8, 16, 32, 64, 128)],
    "observe": [_think(ratio=ratio, observe=observe) for ratio in (0.5, 0.7) for observe in (8, 16, 32, 64, 128)],
    "score_over": [
        _think(method="simulated", ratio=ratio, score_over=keys) for ratio in (0.3, 0.5, 0.7) for keys in ("all", "old")
    ],
    "channel_multiple": [
        _think(ratio=ratio, channel_multiple=multiple) for ratio in (0.3, 0.4, 0.5, 0.6) for multiple in (1, 8, 16, 32)
    ],
}


def samples_of(task: str, tokenizer: Any, count: int) -> list[Sample]:
    """Samples of a task of continuations, evenly spread over it."""
    docs = [json.loads(line) for line in (FOLDER / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = [docs[i * len(docs) // count] for i in range(min(count, len(docs)))]
    return [Sample.of(tokenizer, prompts.context(doc), prompts.continuation(doc)) for doc in chosen]


def row_of(settings: Settings, divergence: Divergence) -> dict[str, Any]:
    """What is kept of one setting: means with 95% intervals over samples, and the samples."""
    found = divergence.of(settings)
    kl, agreement = mean_interval(found.kl), mean_interval(found.agreement)
    return {
        **settings.described(),
        "kl": [round(x, 5) for x in (kl.mean, kl.low, kl.high)],
        "agreement": [round(x, 4) for x in (agreement.mean, agreement.low, agreement.high)],
        "tokens": found.tokens,
        "through_pruned": found.through_pruned,
        "effective_ratio": round(found.told["effective_ratio"], 4),
        "kl_of_samples": [round(x, 5) for x in found.kl],
        "agreement_of_samples": [round(x, 4) for x in found.agreement],
    }


def measured(
    settings: Sequence[Settings], known: Sequence[dict[str, Any]], measure: Callable[[Settings], Any]
) -> Iterator:
    """A row for each setting: what is known already, or measured."""
    for one in settings:
        told = one.described()
        same = (row for row in known if all(row.get(name) == value for name, value in told.items()))
        yield next(same, None) or measure(one)


class Watching(Simulation):
    """Keeps the channels' scores of every layer that chooses."""

    def __init__(self, model: Any, settings: Settings) -> None:
        super().__init__(model, settings)
        self.scores: list[Tensor] = []

    def _choose(self, module: Any, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        self.scores.append(group_mean(self.observed(module, query, key, mask)))
        return super()._choose(module, query, key, mask)


def energies(model: Any, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    """For each layer the scores of its channels [Hkv, D], mean over samples, each head's divided by its mean."""
    watching = Watching(model, _think(method="simulated", ratio=0.5))
    calls = TwoCalls(model, watching)
    try:
        for sample in samples:
            calls.fill([sample.context])
    finally:
        watching.close()
    layers = len(watching.scores) // len(samples)
    for layer in range(layers):
        scores = torch.cat(watching.scores[layer::layers])  # [samples, Hkv, D]
        relative = (scores / scores.mean(-1, keepdim=True)).mean(0)
        yield {"layer": layer, "scores": [[round(x, 4) for x in head] for head in relative.tolist()]}


def head_of(study: str, model: Any, **what: Any) -> dict[str, Any]:
    """What all rows of a study share, but for the date and the command."""
    told = versions() | {"think-compile": version("think-compile")}
    return {"study": study, "device": device_name(model.device), "dtype": str(model.dtype), **what, "versions": told}


def main(
    names: Annotated[list[str], typer.Argument(help=f"of {', '.join([*STUDIES, 'energy'])}; or all")],
    model: Annotated[str | None, typer.Option(help="a folder, GGUF file or hub id; by default the demo's")] = None,
    task: Annotated[str, typer.Option(help="whose texts are read")] = "continuation_2k",
    samples: Annotated[int, typer.Option(min=1)] = 100,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    device: str = "cpu",
    out: Annotated[Path, typer.Option(help="where rows are kept")] = RESULTS,
) -> None:
    """Measure studies; each row is kept as soon as it is there."""
    console, known = Console(), [*STUDIES, "energy"]
    wanted = known if names == ["all"] else names
    if unknown := sorted(set(wanted) - set(known)):
        raise typer.BadParameter(f"no such study: {', '.join(unknown)}; there are {', '.join(known)}, all.")
    network, tokenizer = hf.load_model(model, device=device) if model else demo.load_demo_model(console, device)
    texts = samples_of(task, tokenizer, samples)
    what = {"model": model or demo.CONVERTED, "task": task, "samples": len(texts)}
    divergence = None
    for study in wanted:
        head = head_of(study, network, **what)
        path = out / f"{study}.json"
        if study == "energy":
            _keep(path, head, energies(network, texts), console)
            continue
        divergence = divergence or Divergence(network, texts, batch_size=batch_size)
        rows = measured(STUDIES[study], _known(path, head), functools.partial(row_of, divergence=divergence))
        _keep(path, head, rows, console)


def _known(path: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    found = load(path) if path.is_file() else {}
    return found["rows"] if all(found.get(name) == value for name, value in head.items()) else []


def _keep(path: Path, head: dict[str, Any], rows: Iterator[dict[str, Any]], console: Console) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"command": "python -m evals.studies " + " ".join(sys.argv[1:]), "date": datetime.date.today().isoformat()}
    kept = []
    for row in rows:
        kept.append(row)
        write_rows(path, head | told, kept)
        console.print({name: value for name, value in row.items() if "samples" not in name and name != "scores"})


if __name__ == "__main__":
    typer.run(main)
