"""The work of the commands `eval` and `lm-eval`, after their arguments are read."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval._cli.harness import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import setup_logging
from rich.console import Console

from think_compile import demo, hf
from think_compile.config import DEFAULT_RATIO
from think_compile.evals.runner import NO_DATA, Protocol, Runner, grid, load_tasks
from think_compile.evals.settings import Settings
from think_compile.evals.table import summary
from think_compile.evals.tasks import FOLDER


def listed(text: str, what: str) -> list[str]:
    """The items of a comma-separated list.

    Raises:
        ValueError: there are none.
    """
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise ValueError(f"{what} needs at least one item, separated by commas; got {text!r}")
    return items


def settings_from(methods: str, ratios: str | None, **options: Any) -> list[Settings]:
    """All runs of a task, from comma-separated methods and ratios, checked.

    Raises:
        ValueError, TypeError: as :meth:`Settings.of`; a ratio is not a number.
    """
    if ratios is None and (options.get("keys") is not None or options.get("tokens") is not None):
        return grid(listed(methods, "--methods"), [None], **options)
    numbers: list[float | None] = []
    for item in listed(ratios or f"0,{DEFAULT_RATIO}", "--ratio"):
        try:
            numbers.append(float(item))
        except ValueError:
            raise ValueError(f"--ratio takes numbers in [0, 1), separated by commas; got {item!r}") from None
    return grid(listed(methods, "--methods"), numbers, **options)


def batch_size_from(text: str) -> int | str:
    """A number of sequences, or ``auto``.

    Raises:
        ValueError: for any other text.
    """
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--batch-size must be a number >= 1 or auto, got {text!r}")
    return int(text)


def run_eval(
    console: Console,
    *,
    source: str | None,
    tasks: Sequence[str],
    methods: Sequence[Settings],
    protocol: Protocol,
    batch_size: int | str,
    folder: Path,
    where: dict[str, Any],
) -> None:
    """Runs all tasks under all methods and prints the table; ``where``: arguments of ``hf.load_model``.

    ``source`` None is the demonstration's model.
    """
    with _quiet("lm_eval"):
        loaded = load_tasks(tasks)
        model, tokenizer = _load(console, source, where)
        name = source or demo.CONVERTED
        runner = Runner(model, tokenizer, name, folder, protocol, batch_size, console)
        records = runner.run(loaded, methods)
    console.print(summary(records))
    console.print(f"Records: {folder}", highlight=False, soft_wrap=True)


def _load(console: Console, source: str | None, where: dict[str, Any]) -> tuple[Any, Any]:
    if source is not None:
        return hf.load_model(source, **where)
    model, tokenizer = demo.load_demo_model(console, where["device"])
    return model.to(where["dtype"] if isinstance(where["dtype"], torch.dtype) else model.dtype), tokenizer


def run_lm_eval(arguments: Sequence[str]) -> None:
    """The harness's own command line, with the model ``think`` and our tasks.

    Raises:
        OSError: a task's data is not available.
    """
    before = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        setup_logging()
        parser = HarnessCLI()
        parsed = parser.parse_args()
        if hasattr(parsed, "include_path"):
            parsed.include_path = [str(FOLDER), *_included(parsed)]
        parser.execute(parsed)
    except NO_DATA as error:
        raise OSError(
            f"a task's dataset cannot be had ({' '.join(str(error).split())}): set HF_HOME to a cache that holds it, "
            "or dataset_path in a copy of the task's YAML file to a local folder (--include_path finds such files)"
        ) from error
    finally:
        sys.argv = before


def _included(parsed: Any) -> list[str]:
    """The user's folders of tasks, from the arguments or a configuration file."""
    if parsed.include_path is not None:
        return [parsed.include_path]
    config = getattr(parsed, "config", None)
    path = EvaluatorConfig.load_yaml_config(config).get("include_path") if config else None
    return [] if path is None else [path]


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Silence warnings of the harness about model objects, as used here: they would hide the results."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
