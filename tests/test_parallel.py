"""Models whose layers run in several processes."""

from multiprocessing import get_context
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tiny import tiny_llama

from think_compile import adapter, report, think_compile

pipeline = pytest.importorskip("transformers.distributed.pipeline_parallel")

IDS = torch.arange(2, 12)[None]
STAGES, LIMIT_S = 2, 120


def seeded():
    torch.manual_seed(0)
    return tiny_llama()


def generate(model):
    return model.generate(IDS, max_new_tokens=6, do_sample=False).tolist()


def stage(rank, meeting, results):
    """One process of a pipeline: its tokens, and its number of rewritten layers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=STAGES)
    mesh = dist.init_device_mesh("cpu", (STAGES,))
    model = think_compile(pipeline.apply_pipeline_parallelism(seeded(), mesh), 0.0, lowering="eager")
    with mock.patch.object(adapter, "_on_gpu", lambda model: True):
        results.put((generate(model), len(report(model).rewritten)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.host
@pytest.mark.slow  # two processes that import everything
def test_a_pipeline_on_gpus_gives_the_tokens_of_one_process(tmp_path):
    context = get_context("spawn")
    results = context.Queue()
    stages = [context.Process(target=stage, args=(rank, tmp_path / "meeting", results)) for rank in range(STAGES)]
    for process in stages:
        process.start()
    try:
        found = [results.get(timeout=LIMIT_S) for _ in stages]
        for process in stages:
            process.join(LIMIT_S)
    finally:
        for process in stages:
            process.kill()
    assert found == [(generate(seeded()), 1)] * STAGES
