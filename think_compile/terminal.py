"""Terminal output of the commands: text while it is generated, and a Report in a few lines."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from transformers import TextStreamer

from think_compile.report import Report


@dataclass(frozen=True)
class Generation:
    """One finished call of ``generate``, with its cache: a report counts live caches only."""

    tokens: list[int]  # the new ones
    text: str
    seconds: float
    output: Any  # of ``generate``, with the cache


class ConsoleStreamer(TextStreamer):
    """Prints each finished word on a rich console, without the prompt."""

    def __init__(self, tokenizer: Any, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece of final text."""
        self.console.print(text, end="\n" if stream_end else "", markup=False, highlight=False, soft_wrap=True)


def stream_generation(
    model: Any, tokenizer: Any, inputs: dict[str, torch.Tensor], max_new_tokens: int, console: Console
) -> Generation:
    """Greedy generation from ``inputs`` [1, S], printed as tokens arrive."""
    started = time.perf_counter()
    out = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=ConsoleStreamer(tokenizer, console),
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()  # waits for the device
    seconds = time.perf_counter() - started
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Generation(tokens, text, seconds, out)


def encode(tokenizer: Any, prompt: str, *, chat: bool, device: torch.device) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` of a prompt, [1, S]; ``chat``: as a user's turn of a chat."""
    if chat:
        turns = [{"role": "user", "content": prompt}]
        batch = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        batch = tokenizer(prompt, return_tensors="pt")
    if batch["input_ids"].shape[1] == 0:
        raise ValueError("the prompt is empty")
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


def layers_line(report: Report) -> str:
    """For example ``30 of 30``."""
    return f"{len(report.rewritten)} of {len(report.rewritten) + len(report.refused)}"


def channels_line(report: Report) -> str:
    """For example ``32 of 64``; several, if the layers differ; ``all`` if no layer is pruned."""
    shapes = sorted({(record.kept, record.head_dim) for record in report.rewritten if record.kept is not None})
    return ", ".join(f"{kept} of {head_dim}" for kept, head_dim in shapes) or "all"


def share(part: int, whole: int) -> str:
    """For example ``53%``; a dash if there is no whole."""
    return f"{100 * part / whole:.0f}%" if whole else "-"


def megabytes(count: int) -> str:
    """Bytes in units of 10^6, for example ``11.80 MB``."""
    return f"{count / 1e6:.2f} MB"


def summary(report: Report) -> str:
    """Two lines on a model with live caches: layers rewritten, bytes stored."""
    return (
        f"layers rewritten: {layers_line(report)}; key channels kept: {channels_line(report)}\n"
        f"keys stored: {megabytes(report.stored_key_bytes)} "
        f"({share(report.stored_key_bytes, report.dense_key_bytes)} of dense); "
        f"values: {megabytes(report.stored_value_bytes)} "
        f"({share(report.stored_value_bytes, report.dense_value_bytes)} of dense)"
    )
