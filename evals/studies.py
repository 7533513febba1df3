"""``python -m evals.studies NAME...``: how far from the dense model methods and options are, on a real model.

Each study is a list of settings. Each is compared with the dense model by KL divergence and top-1 agreement over the
continuations of one of the offline tasks, sample by sample; a row for each, with the samples, is kept in evals/results.
Rows that are there already, with the same head, are not measured again. The rule of think_compile is simulated, so that
all settings share the first calls; in the study ``ratio`` the compiled path stands beside it, to show that it is the
same. ``energy`` is what the scores look like.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.measure import device_name, load, versions, write_rows
from think_compile import ThinkConfig, demo, hf
from think_compile.evals.calls import TwoCalls
from think_compile.evals.divergence import Distance, Divergence, Sample
from think_compile.evals.methods import Recorder
from think_compile.evals.rules import Observed, group_mean, last_valid
from think_compile.evals.settings import SIMULATED, Settings
from think_compile.evals.statistics import mean_interval
from think_compile.evals.tasks import FOLDER, prompts

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
RATIOS = [tenths / 10 for tenths in range(9)]
OBSERVE, RECENT = ThinkConfig.observe, ThinkConfig.recent
PAPER = {"recent": 32, "observe": 32, "channel_multiple": 1}


def _settings(method: str = "simulated", **options: Any) -> Settings:
    """The paper's window and widths unless told otherwise."""
    return Settings.of(**{"method": method} | PAPER | options)


def _over(method: str) -> str:
    """The keys that score: queries attend to the latest most, which stay whole."""
    return "old" if method == "attended" else Settings.score_over


def _plan(keys: Any, values: Any = None, **options: Any) -> Settings:
    """A bit plan, by the compiled path, with think_compile's own window."""
    return _settings("think", keys=keys, values=values, recent=RECENT, lowering="eager", **options)


TOKEN_RULES = ("snapkv", "h2o", "kvcrush")
FORMS: tuple[dict[str, Any], ...] = ({"ratio": 0.0}, {"ratio": 0.5}, {"keys": "4", "values": "4"})


def _selected(rule: str, share: float, **form: Any) -> Settings:
    """A share of the tokens, in some form, by the compiled path."""
    return _settings("think", tokens=f"{rule}:{share:g}", recent=RECENT, lowering="eager", **form)


STUDIES: dict[str, list[Settings]] = {
    "plans": [
        *(_plan(keys) for keys in ("8", "4", "8:0.25+4:0.75", "4:0.5+2:0.5", "4:0.7", "4:0.5", "2")),
        *(_plan("16", values) for values in ("8", "4", "2", "16:0.7")),
        *(_plan(keys, "4") for keys in ("4", "8:0.25+4:0.75", "4:0.5+2:0.5", "4:0.5")),
        _plan("8", "8"),
    ],
    "sinks": [_plan(keys, "4", sinks=n) for keys in ("4", "4:0.5+2:0.5") for n in (0, 1, 4, 16)],
    "group": [_plan(keys, "4", group=n) for keys in ("4", "4:0.5+2:0.5") for n in (32, 64, 128)],
    "mustafar": [
        _plan(keys.format(numbers), values and values.format(numbers))
        for numbers in ("0.3", "0.5", "0.7", "0.3:8", "0.5:8", "0.7:8")
        for keys, values in (("mustafar:{}", None), ("16", "mustafar:{}"), ("mustafar:{}", "mustafar:{}"))
    ],
    "tokens": [_selected(rule, share, **FORMS[0]) for rule in TOKEN_RULES for share in (0.5, 0.25, 0.125)]
    + [_selected(rule, 0.25, **form) for rule in TOKEN_RULES for form in FORMS[1:]],
    "ratio": [
        *(_settings(ratio=ratio, recent=RECENT) for ratio in RATIOS),
        *(_settings(method, ratio=ratio, score_over=_over(method)) for method in SIMULATED for ratio in RATIOS),
        *(_settings("think", ratio=ratio, recent=RECENT, lowering="eager") for ratio in (0.0, 0.5)),
    ],
    "recent": [_settings(ratio=ratio, recent=recent) for ratio in (0.5, 0.7) for recent in (0, 8, 16, 32, 64, 128)],
    "observe": [_settings(ratio=ratio, observe=observe) for ratio in (0.5, 0.7) for observe in (8, 16, 32, 64, 128)],
    "score_over": [_settings(ratio=ratio, score_over=keys) for ratio in (0.3, 0.5, 0.7) for keys in ("all", "old")],
    "channel_multiple": [
        _settings(ratio=ratio, channel_multiple=multiple)
        for ratio in (0.3, 0.4, 0.5, 0.6)
        for multiple in (1, 8, 16, 32)
    ],
}


MEASURED: tuple[str, ...] = ("kl", "agreement", "scored", "through_pruned", "effective_ratio", "stored_share")
MEASURED += ("kl_of_samples", "agreement_of_samples")


def samples_of(task: str, tokenizer: Any, count: int) -> list[Sample]:
    """Samples of a task of continuations, evenly spread over it."""
    docs = [json.loads(line) for line in (FOLDER / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = [docs[i * len(docs) // count] for i in range(min(count, len(docs)))]
    return [Sample.of(tokenizer, prompts.context(doc), prompts.continuation(doc)) for doc in chosen]


def row_of(settings: Settings, found: Distance) -> Row:
    """What is kept of one setting."""
    return settings.described() | measures(found)


def measures(found: Distance) -> Row:
    """Means with 95% intervals over samples, and the samples; ``stored_share``: of the bytes of a dense cache."""
    kl, agreement, told = mean_interval(found.kl), mean_interval(found.agreement), found.told
    dense, stored = (sum(told.get(f"{what}_{of}_bytes", 0) for of in ("key", "value")) for what in ("dense", "stored"))
    return {
        "kl": [round(x, 5) + 0.0 for x in (kl.mean, kl.low, kl.high)],  # no -0.0
        "agreement": [round(x, 4) for x in (agreement.mean, agreement.low, agreement.high)],
        "scored": found.tokens,
        "through_pruned": found.through_pruned,
        "effective_ratio": round(told.get("effective_ratio", 0.0), 4),
        **({"stored_share": round(stored / dense, 4)} if dense else {}),
        "kl_of_samples": [round(x, 5) for x in found.kl],
        "agreement_of_samples": [round(x, 4) for x in found.agreement],
    }


def find(rows: Iterable[Row], settings: Settings) -> Row | None:
    """The row of a setting, if there is one."""
    told = settings.described()
    return next((row for row in rows if {name: x for name, x in row.items() if name not in MEASURED} == told), None)


def measured(missing: Sequence[Settings], divergence: Divergence) -> Iterator[list[Row]]:
    """Rows of settings: first of all that are simulated, at once, then of the others, one by one."""
    simulated = [one for one in missing if one.method in SIMULATED]
    if simulated:
        found = divergence.of_simulated(simulated)
        yield [row_of(*pair) for pair in zip(simulated, found, strict=True)]
    for one in missing:
        if one not in simulated:
            yield [row_of(one, divergence.of(one))]


def energies(model: Any, samples: Sequence[Sample]) -> list[Row]:
    """For each layer the scores of its channels [Hkv, D], mean over samples, each head's divided by its mean."""
    sums: dict[int, torch.Tensor] = {}
    with closing(Recorder(model, OBSERVE)) as recorder:
        calls = TwoCalls(model, recorder)
        for sample in samples:
            calls.fill([sample.context])
            for seen in recorder.layers:
                queries = last_valid(seen.valid, OBSERVE)[:, -seen.q.shape[2] :]
                scores = group_mean(Observed(seen.q, seen.k, queries, seen.valid, seen.valid, seed=0))[0]
                sums[seen.layer] = sums.get(seen.layer, 0) + scores / scores.mean(-1, keepdim=True)
    means = {layer: (total / len(samples)).tolist() for layer, total in sums.items()}
    return [
        {"layer": layer, "scores": [[round(x, 4) for x in head] for head in heads]} for layer, heads in means.items()
    ]


def head_of(study: str, network: Any, **what: Any) -> Row:
    """What all rows of a study share, but for the date and the command."""
    told = versions() | {"think-compile": version("think-compile")}
    return {
        "study": study,
        "device": device_name(network.device),
        "dtype": str(network.dtype),
        **what,
        "versions": told,
    }


def main(
    names: Annotated[list[str], typer.Argument(help=f"of {', '.join([*STUDIES, 'energy'])}; or all")],
    model: Annotated[str | None, typer.Option(help="a folder, GGUF file or hub id; by default the demo's")] = None,
    task: Annotated[str, typer.Option(help="whose texts are read")] = "continuation_2k",
    samples: Annotated[int, typer.Option(min=1)] = 100,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    device: str = "cpu",
    out: Annotated[Path, typer.Option(help="where rows are kept")] = RESULTS,
) -> None:
    """Measure studies; the rows of each are kept in a file."""
    console, known = Console(), [*STUDIES, "energy"]
    wanted = known if names == ["all"] else names
    if unknown := sorted(set(wanted) - set(known)):
        raise typer.BadParameter(f"no such study: {', '.join(unknown)}; there are {', '.join(known)}, all.")
    network, tokenizer = hf.load_model(model, device=device) if model else demo.load_demo_model(console, device)
    texts = samples_of(task, tokenizer, samples)
    what = {"model": model or demo.CONVERTED, "task": task, "samples": len(texts)}
    results = {study: Result(out / f"{study}.json", head_of(study, network, **what)) for study in wanted}
    if "energy" in results:
        results.pop("energy").keep(energies(network, texts))
    missing = list(dict.fromkeys(one for study, result in results.items() for one in result.missing(STUDIES[study])))
    if missing:
        for rows in measured(missing, Divergence(network, texts, batch_size=batch_size)):
            for study, result in results.items():
                result.add(rows, STUDIES[study])
    for study, result in results.items():
        console.rule(study)
        for row in result.rows:
            console.print({name: value for name, value in row.items() if "samples" not in name})


class Result:
    """A study's file. Rows that it holds under the same head count; others are replaced."""

    def __init__(self, path: Path, head: Row) -> None:
        self.path, self.head = path, head
        found = load(path) if path.is_file() else {}
        same = all(found.get(name) == value for name, value in head.items())
        self.rows: list[Row] = found["rows"] if found and same else []

    def missing(self, settings: Sequence[Settings]) -> list[Settings]:
        """Those of which there is no row."""
        return [one for one in settings if find(self.rows, one) is None]

    def add(self, rows: Sequence[Row], settings: Sequence[Settings]) -> None:
        """Keep the rows that are of ``settings``, in their order."""
        known = [*self.rows, *rows]
        ordered = [row for one in settings if (row := find(known, one)) is not None]
        if len(ordered) > len(self.rows):
            self.keep(ordered)

    def keep(self, rows: list[Row]) -> None:
        """Write the rows."""
        told = {"command": "python -m evals.studies " + " ".join(sys.argv[1:]), "date": str(datetime.date.today())}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(self.path, self.head | told, rows)
        self.rows = rows


if __name__ == "__main__":
    typer.run(main)
