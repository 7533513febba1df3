"""``python -m benchmarks NAME``: runs one benchmark, prints its rows and keeps them in benchmarks/results/."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.measure import RESULTS, save

app = typer.Typer(add_completion=False, help=__doc__)
Out = Annotated[Path, typer.Option(help="where the rows are kept")]
Settings = Annotated[
    list[str] | None, typer.Option("--setting", help="BATCHxCONTEXT, for example 8x32768; may be repeated")
]


def _keep(name: str, rows: Iterable[dict[str, Any]], folder: Path, device: str = "cuda") -> None:
    """Print each row as it comes, and save it even if a later row fails."""
    console, kept = Console(width=160), []
    try:
        for row in rows:
            console.print(row)
            kept.append(row)
            save(name, kept, device, folder)
    finally:
        if kept:
            console.print(_table(name, kept))


def _table(name: str, rows: list[dict[str, Any]]) -> Table:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(*columns, title=name)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    return table


@app.command()
def kernel(out: Out = RESULTS) -> None:
    """One layer's attention of a decode step, beside the dense backends."""
    from benchmarks import kernel

    _keep("kernel", kernel.run(), out)


@app.command()
def plans(
    out: Out = RESULTS,
    setting: Settings = None,
    first: Annotated[int | None, typer.Option(help="only the first plans of the list")] = None,
) -> None:
    """The same on bit plans."""
    from benchmarks import plans

    shapes = [plans.Shape(*_sizes(text)) for text in setting or []] or plans.SHAPES
    _keep("plans", plans.run(shapes, plans.PLANS[:first]), out)


def _sizes(setting: str) -> tuple[int, int]:
    batch, context = map(int, setting.split("x"))
    return batch, context


@app.command()
def decode(
    out: Out = RESULTS,
    setting: Settings = None,
    baselines: Annotated[bool, typer.Option(help="also what users run today")] = True,
) -> None:
    """A decode step through the wrapped model, beside Hugging Face's caches and the floor set by the bytes to read."""
    from benchmarks import decode

    settings = tuple(decode.Setting(*_sizes(text)) for text in setting or []) or decode.SETTINGS
    ways = decode.OURS + decode.BASELINES if baselines else decode.OURS
    for at in settings:
        _keep(f"decode_{at.batch}x{at.context}", decode.run(at, ways), out)


@app.command()
def latent(out: Out = RESULTS, setting: Annotated[str, typer.Argument(help="BATCHxCONTEXT")] = "8x32768") -> None:
    """A decode step on latents in codes, beside the dense model."""
    from benchmarks import decode, latent

    _keep("latent", latent.run(decode.Setting(*_sizes(setting))), out)


@app.command()
def tokens(out: Out = RESULTS, setting: Settings = None) -> None:
    """A decode step on some of a prompt's tokens, beside a step on a context of as many."""
    from benchmarks import decode, tokens

    for text in setting or ["1x32768", "8x32768"]:
        _keep(f"tokens_{text}", tokens.run(decode.Setting(*_sizes(text))), out)


@app.command()
def shares(out: Out = RESULTS) -> None:
    """The bytes of a prompt's cache with token rules, relative to the dense one."""
    from benchmarks import tokens

    _keep("token_shares", tokens.shares(), out, "cpu")


@app.command()
def answers(out: Out = RESULTS) -> None:
    """A prompt and a hundred steps with token rules."""
    from benchmarks import tokens

    _keep("answers", tokens.answers(), out)


@app.command()
def prefill(
    out: Out = RESULTS,
    context: int = 32768,
    rules: Annotated[
        bool, typer.Option("--tokens", help="token rules instead of the forms of keys and values")
    ] = False,
) -> None:
    """The first token of a long prompt, beside the plain model under torch.compile."""
    from benchmarks import prefill

    configs = prefill.RULES if rules else prefill.CONFIGS
    _keep("prefill_tokens" if rules else "prefill", prefill.run(context=context, configs=configs), out)


@app.command()
def memory(
    out: Out = RESULTS, model: Annotated[str | None, typer.Option(help="the shape of one model alone")] = None
) -> None:
    """The peak of decode steps, the largest batch that fits, and its tokens/s."""
    from benchmarks import memory

    _keep("memory", memory.run([one for one in memory.WORKLOADS if model in (None, one.model)]), out)


@app.command()
def cpu(out: Out = RESULTS, context: int = 4096) -> None:
    """A decode step on a CPU, beside the plain model under torch.compile."""
    from benchmarks import cpu

    _keep("cpu", cpu.run(context), out, "cpu")


@app.command("compile")
def compile_time(
    out: Out = RESULTS,
    layers: int = 32,
    device: str = "cuda",
    small: Annotated[bool, typer.Option(help="narrow layers, which take as long to compile")] = False,
    cache: Annotated[list[str] | None, typer.Option(help="fixed or growing; by default both")] = None,
) -> None:
    """Compile time, with empty caches on disk and with full ones."""
    from benchmarks import compile_time

    _keep(f"compile_{device}", compile_time.run(layers, device, small, cache or compile_time.CACHES), out, device)


@app.command()
def profile(setting: Annotated[str, typer.Argument(help="BATCHxCONTEXT")] = "1x8192", out: Out = RESULTS) -> None:
    """Where the time of a decode step goes, on the device and on the host."""
    from benchmarks import decode, profile

    _keep("profile", profile.run(decode.Setting(*_sizes(setting))), out)


@app.command()
def plot() -> None:
    """Draw benchmarks/results/decode.svg from all results of ``decode``."""
    from benchmarks.plot import draw

    typer.echo(draw())


if __name__ == "__main__":
    app()
