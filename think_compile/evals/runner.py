"""Runs of tasks under several methods on one loaded model, each written to a file on completion.

A run whose file exists with the same settings and versions is read instead. The model is wrapped once for each method
and ratio, and all tasks run on it, since wrapping means compiling.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import torch
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
from huggingface_hub.errors import LocalEntryNotFoundError
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from rich.console import Console

from think_compile.evals.model import Counters, ThinkLM
from think_compile.evals.settings import Settings
from think_compile.evals.tasks import FOLDER

PACKAGES = ("think-compile", "torch", "transformers", "lm-eval", "datasets")
KEPT_OF_SAMPLES = ("doc_id", "doc_hash", "prompt_hash", "target", "filter", "filtered_resps")
# Errors of datasets and the hub's client without network or for unknown data; offline mode is a ConnectionError.
NO_DATA = (ConnectionError, DatasetNotFoundError, DataFilesNotFoundError, LocalEntryNotFoundError)

Record = dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """How tasks are asked, for all methods alike.

    Attributes:
        limit: samples of a task, the first ones; None: all.
        num_fewshot: examples before a question; None: as the task says.
        apply_chat_template: whether prompts become a user's turn.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False


def grid(methods: Sequence[str], ratios: Sequence[float | None], **options: Any) -> list[Settings]:
    """Dense first, then each method with each ratio (None: as the plans say); ``options`` as of :meth:`Settings.of`.

    Raises:
        ValueError, TypeError: as :meth:`Settings.of`.
    """
    given = [{} if ratio is None else {"ratio": ratio} for ratio in ratios]
    pruned = [Settings.of(method=method, **ratio, **options) for method in methods for ratio in given]
    return [Settings(method="dense"), *(settings for settings in pruned if settings.method != "dense")]


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """The harness's tasks by name, groups and tags resolved: ours, the harness's own and paths of YAML files.

    Raises:
        ValueError: there is no such task.
        OSError: a task's data is not available; the message names the data.
    """
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    if any(name not in manager.task_index and not Path(name).is_file() for name in names):
        manager = TaskManager(include_path=str(FOLDER))  # takes seconds
    tasks: dict[str, Any] = {}
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            raise ValueError(f"no such task: {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
        try:
            tasks |= manager.load([name])["tasks"]
        except NO_DATA as error:
            raise OSError(no_data(name, error, manager)) from error
    return tasks


def no_data(name: str, error: Exception, manager: TaskManager) -> str:
    """One sentence: the missing data of a task, and the remedy."""
    entry = manager.task_index.get(name)
    config = (entry.cfg or {}) if entry is not None else {}
    parts = [str(config[key]) for key in ("dataset_path", "dataset_name") if config.get(key)]
    data = f"dataset {' / '.join(parts)}" if parts else "its dataset"
    return (
        f"task {name!r} needs {data}, which cannot be had ({' '.join(str(error).split())}): there is no network, or no "
        "such data. Fetch it where there is one and copy the cache (HF_HOME names its folder; HF_DATASETS_OFFLINE=1 "
        "uses it without asking), or copy the task's YAML file, set dataset_path to a local folder (or dataset_path: "
        "json and dataset_kwargs: {data_files: ...}), and give that file as the task."
    )


@dataclass
class Runner:
    """Evaluates one loaded model.

    Attributes:
        model, tokenizer: as ``think_compile.hf.load_model`` gives them.
        name: of the model, for the records.
        folder: where records are kept.
        protocol: how tasks are asked.
        batch_size: as of ``HFLM``; not part of the settings, since only rounding depends on it.
        console: gets a line for each run.
    """

    model: Any
    tokenizer: Any
    name: str
    folder: Path
    protocol: Protocol
    batch_size: int | str
    console: Console

    def run(self, tasks: dict[str, Any], methods: Sequence[Settings]) -> list[Record]:
        """The records of all tasks under all methods, in the order of the tasks."""
        done = {(task, settings): self._read(task, settings) for settings in methods for task in tasks}
        for settings in methods:
            missing = [task for task in tasks if done[task, settings] is None]
            if missing:
                done |= {(task, settings): record for task, record in self._evaluate(tasks, missing, settings)}
        return [record for task in tasks for settings in methods if (record := done[task, settings]) is not None]

    def _evaluate(self, tasks: dict[str, Any], missing: list[str], settings: Settings) -> Iterable[tuple[str, Record]]:
        lm = ThinkLM(self.model, tokenizer=self.tokenizer, batch_size=self.batch_size, **settings.described())
        with closing(lm):
            for number, task in enumerate(missing, 1):
                self.console.rule(f"{settings.label}: {task} ({number} of {len(missing)})")
                lm.counters = Counters()
                record = self._record(task, settings, self._answers(lm, tasks[task]))
                self._write(task, settings, record)
                yield task, record

    def _answers(self, lm: ThinkLM, task: Any) -> Any:
        return lm_eval.simple_evaluate(
            lm,
            tasks=[task],
            bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),  # for its log; the task is loaded
            **asdict(self.protocol),
        )

    def settings_of(self, task: str, settings: Settings) -> dict[str, Any]:
        """Everything with an influence on the numbers of a run, except the machine."""
        told = {"task": task, "model": self.name, "dtype": str(self.model.dtype), "device": self.model.device.type}
        return told | asdict(self.protocol) | settings.described() | {"versions": versions()}

    def path(self, task: str, settings: Settings) -> Path:
        """Where the record of a run is kept; other settings, another file."""
        told = json.dumps(self.settings_of(task, settings), sort_keys=True)
        digest = hashlib.sha256(told.encode()).hexdigest()[:8]
        return self.folder / re.sub(r"\W+", "_", task) / f"{settings.label}-{digest}.json"

    def _read(self, task: str, settings: Settings) -> Record | None:
        """The complete record of an earlier run, or None."""
        try:
            record = json.loads(self.path(task, settings).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return record if record["settings"] == self.settings_of(task, settings) else None

    def _write(self, task: str, settings: Settings, record: Record) -> None:
        path = self.path(task, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1, default=handle_non_serializable), encoding="utf-8")
        os.replace(partial, path)

    def _record(self, task: str, settings: Settings, results: Any) -> Record:
        config, found = results["config"], results["results"][task]
        kept = [*KEPT_OF_SAMPLES, *{key.split(",")[0] for key in found if "," in key}]
        record = {
            "settings": self.settings_of(task, settings),
            "machine": _machine(self.model.device),
            "batch_size": self.batch_size,
            "seeds": {name: value for name, value in config.items() if name.endswith("_seed")},
            "metrics": {key: value for key, value in found.items() if "," in key and "_stderr," not in key},
            "counters": config["think"],
            "samples": [{key: s[key] for key in kept if key in s} for s in results["samples"][task]],
        }
        plain: Record = json.loads(json.dumps(record, default=handle_non_serializable))  # as it will be read
        return plain


def _machine(device: torch.device) -> str:
    """The name of the GPU or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def versions() -> dict[str, str]:
    """Versions of the packages with an influence on the numbers."""
    return {package: version(package) for package in PACKAGES}
