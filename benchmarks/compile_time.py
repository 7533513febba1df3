"""Seconds for a prompt and three steps in a fresh process: mostly compile time.

Each way runs twice, in processes of its own: with empty caches on disk, and again with the caches of the first run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

WAYS = ("torch.compile", "think_compile")
CACHES = ("fixed", "growing")
PROMPT, STEPS = 64, 3


def run(
    layers: int = 32, device: str = "cuda", small: bool = False, caches: Sequence[str] = CACHES
) -> Iterator[dict[str, Any]]:
    """The rows. ``small``: a model of narrow layers, which take as long to compile."""
    for cache in caches:
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                for state in ("cold", "warm"):
                    yield _in_a_process(folder, state, way=way, cache=cache, layers=layers, device=device, small=small)


def _in_a_process(folder: str, state: str, **what: Any) -> dict[str, Any]:
    settings = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
    command = [sys.executable, "-m", "benchmarks.compile_time", json.dumps(what)]
    ran = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{what}: {ran.stderr[-2000:]}")
    return {"state": state, **what, **json.loads(ran.stdout.splitlines()[-1])}


def measure(way: str, cache: str, layers: int, device: str, small: bool) -> dict[str, float]:
    """Seconds of the first prompt and of the first steps, in this process."""
    import torch
    from transformers import DynamicCache, StaticCache

    from benchmarks import models
    from think_compile import think_compile

    narrow: dict[str, Any] = {"hidden": 256, "inner": 512, "vocabulary": 1024}
    model = models.llama(layers, device=device, **(narrow if small else {}))
    model = think_compile(model, 0.5) if way == "think_compile" else model
    if way == "torch.compile":
        model.compile()
    past: Any = DynamicCache(config=model.config)
    if cache == "fixed":
        past = StaticCache(config=model.config, max_cache_len=256)
    ids, seconds = torch.zeros(1, PROMPT, dtype=torch.long, device=device), []
    with torch.no_grad():
        for part in (ids, *[ids[:, :1]] * STEPS):
            begin = time.perf_counter()
            model(input_ids=part, use_cache=True, **{models.CACHE: past}).logits.sum().item()
            seconds.append(time.perf_counter() - begin)
    return {"prompt_s": round(seconds[0], 2), "steps_s": round(sum(seconds[1:]), 2), "total_s": round(sum(seconds), 2)}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
