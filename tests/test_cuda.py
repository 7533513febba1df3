"""On a CUDA GPU only: Inductor's generated kernels, and the allocator's word on the stored bytes."""

import gc
import re

import pytest
import torch
from oracle import CACHE
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from think_compile import report, think_compile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

BATCH, PROMPT = 4, 4096


def llama(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=1024,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def cache_of(kind: str, config: LlamaConfig) -> DynamicCache | StaticCache:
    if kind == "growing":
        return DynamicCache(config=config)
    return StaticCache(config=config, max_cache_len=PROMPT + 64)


def generated_code(call) -> str:
    """All code that Inductor writes while ``call`` runs."""
    from torch._inductor.utils import run_and_get_code

    lines = "\n".join(run_and_get_code(call)[1]).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@torch.no_grad()
def test_scoring_and_packing_are_fused_triton_kernels(kind):
    model = think_compile(llama(1), 0.5)
    ids = torch.randint(0, 1024, (1, 256), device="cuda")
    code = generated_code(lambda: model(ids, **{CACHE: cache_of(kind, model.config)}))
    kernels = [line for line in code.splitlines() if line.startswith("triton_") and "async_compile" in line]
    names = " ".join(kernel.split(" =")[0] for kernel in kernels)
    assert "pow" in names or "mean" in names or "sum" in names, names  # energies of queries and keys
    assert "gather" in names, names  # narrow rows, written with their padding in one kernel
    assert not re.search(r"torch\.ops\.aten\.(sort|topk|gather|scatter)", code)  # none left to stock kernels


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@torch.no_grad()
def test_the_allocator_confirms_the_stored_bytes(kind):
    model = think_compile(llama(4), 0.5)
    ids = torch.randint(0, 1024, (BATCH, PROMPT), device="cuda")
    warm = cache_of(kind, model.config)
    model(ids, **{CACHE: warm})  # compiles; workspaces are allocated
    model(ids[:, :1], **{CACHE: warm})
    del warm
    assert_stored_bytes_are_allocated(model, ids, cache_of(kind, model.config))


def assert_stored_bytes_are_allocated(model, ids, cache):
    gc.collect()
    before = torch.cuda.memory_allocated()
    model(ids, **{CACHE: cache}, logits_to_keep=1)
    for _ in range(3):
        model(ids[:, :1], **{CACHE: cache}, logits_to_keep=1)
    gc.collect()
    allocated = torch.cuda.memory_allocated() - before
    stored = report(model).stored_bytes
    assert abs(allocated - stored) <= 0.02 * stored, (allocated, stored)
    assert report(model).stored_key_bytes <= 0.55 * report(model).dense_key_bytes
